"""How blocks are run, and what InContextDiT has beside them."""

from unittest import mock

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from networks import CASES, draw

from mf_jax import models
from mf_jax.flow.records import Condition, Prediction
from mf_jax.models import (
    DataPrediction,
    as_field,
    dit,
    in_context_dit,
    layers,
    parameter_shapes,
    with_gather,
)
from mf_jax.models.blocks import laid_out_like, stack_blocks, unstack_blocks
from mf_jax.models.in_context_dit import rotary_angles

SHAPE = (4, 4, 2)
SMALL, IN_CONTEXT = CASES["dit"][0].clone(depth=2), CASES["in_context_dit"][0].clone(width=16)
NETWORKS = {"dit": SMALL.clone(time_conditioning="t|r"), "in_context_dit": IN_CONTEXT}


def _loss(network, params):
    """Return what training asks of a network: the gradient of a prediction and of a held jvp."""
    z = jnp.cos(jnp.arange(4.0 * 32)).reshape(4, *SHAPE)
    r, t = jnp.linspace(0.0, 0.4, 4), jnp.linspace(0.5, 1.0, 4)

    def u(z, t):
        condition = Condition(jnp.arange(4) - 1)
        prediction = network.apply({"params": params}, z, r=r, t=t, condition=condition)
        return prediction.u, prediction.v

    value, derivative, second = jax.jvp(u, (z, t), (z, jnp.ones(4)), has_aux=True)
    loss = jnp.mean((value - jax.lax.stop_gradient(z - derivative)) ** 2)
    return loss if second is None else loss + jnp.mean(second**2)


def _loss_and_gradient(network, params):
    return jax.jit(jax.value_and_grad(lambda p: _loss(network, p)))(params)


def test_loss_and_gradient_are_the_same_however_blocks_are_run():
    for name, remat, scan in (("dit", "block", True), ("in_context_dit", "dots", False)):
        network, params = NETWORKS[name], draw(NETWORKS[name], SHAPE)
        expected, other = _loss_and_gradient(network, params), network.clone(remat=remat, scan=scan)
        loss, gradient = _loss_and_gradient(other, stack_blocks(params) if scan else params)
        got = loss, unstack_blocks(gradient)
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
            atol = 1e-6 * (1 + np.abs(b).max())
            np.testing.assert_allclose(a, b, rtol=2e-4, atol=atol, err_msg=name)


def test_x_is_kept_in_memory_on_cpus_alone_and_no_bit_changes(monkeypatch):
    monkeypatch.setattr(layers, "_LARGE", 1)
    x, found, counts = jnp.linspace(0.1, 2.0, 24), [], {name: [] for name in NETWORKS}

    def kept(x):
        return jnp.sum(jnp.sin(layers.kept_in_memory(x, 3 * x)))

    for backend in ("cpu", "gpu"):
        monkeypatch.setattr(jax, "default_backend", lambda backend=backend: backend)
        for name, network in NETWORKS.items():
            params = parameter_shapes(network, SHAPE)
            program = jax.make_jaxpr(lambda p, network=network: _loss(network, p))(params)
            counts[name].append(str(program).count(" div "))
        found.append(jax.jit(lambda x: jax.jvp(jax.value_and_grad(kept), (x,), (x,)))(x))
    jax.tree.map(np.testing.assert_array_equal, *found)
    for name, blocks in {"dit": 2, "in_context_dit": 3}.items():  # u and v have a block each
        assert counts[name][0] - counts[name][1] == 2 * blocks  # value and tangent of each


def test_gradients_on_cpus_keep_no_more_of_a_modulation_than_it_was_given(monkeypatch):
    given = jnp.ones((2, 4, 8)), jnp.ones((2, 8)), jnp.ones((2, 8))
    for backend in ("cpu", "gpu"):
        monkeypatch.setattr(jax, "default_backend", lambda backend=backend: backend)
        _, pull = jax.vjp(lambda *given: dit._modulate(*given, "layer"), *given)
        kept = [leaf.size for leaf in jax.tree.leaves(pull)]
        assert (sum(kept) <= sum(each.size for each in given)) == (backend == "cpu"), kept


def test_layouts_are_inverse_keep_the_order_and_fit_a_loop():
    for network in NETWORKS.values():
        params, like = draw(network, SHAPE), parameter_shapes(network.clone(scan=True), SHAPE)
        there = laid_out_like(params, like)
        assert jax.tree.map(np.shape, there) == jax.tree.map(lambda a: a.shape, like)
        assert "block_0" not in str(jax.tree.structure(like))
        back = laid_out_like(there, parameter_shapes(network, SHAPE))
        jax.tree.map(np.testing.assert_array_equal, back, params)
        jax.tree.map(np.testing.assert_array_equal, laid_out_like(params, params), params)
        jax.tree.map(np.testing.assert_array_equal, laid_out_like(there, there), there)
    many = {f"block_{i}": {"w": np.full(2, i)} for i in reversed(range(12))}
    np.testing.assert_array_equal(stack_blocks(many)["blocks"]["w"][:, 0], np.arange(12))


def test_blocks_of_a_loop_start_differently():
    network = NETWORKS["dit"].clone(scan=True)
    params = models.initial_params(network, SHAPE, jax.random.key(0, impl="rbg"))["blocks"]
    for leaf in jax.tree.leaves(params):
        assert not leaf.any() or not np.allclose(leaf[0], leaf[-1])


def test_each_block_gathers_its_own_parameters_whatever_network_it_is_wrapped_in():
    def gathered(network, shapes):
        paths = set()

        def gather(path, part):
            paths.add("/".join(path))
            return jax.tree.map(lambda a: 2 * a, part)

        jax.eval_shape(jax.grad(lambda p: _loss(with_gather(network, gather), p)), shapes)
        return paths

    for scan, name in ((False, "block_0"), (True, "blocks")):
        network = NETWORKS["in_context_dit"].clone(scan=scan, remat="block")
        shapes = parameter_shapes(network, SHAPE)
        wrapped = DataPrediction(network) if scan else network
        assert gathered(wrapped, shapes) == {name, f"u_head/{name}", f"v_head/{name}"}
    network = CASES["mlp"][0]
    assert with_gather(network, lambda path, part: part) is network


def _saved(network):
    """Return how many numbers a gradient keeps from forward to backward, besides parameters."""
    params = parameter_shapes(network, SHAPE)
    _, pullback = jax.eval_shape(lambda p: jax.vjp(lambda p: _loss(network, p), p), params)
    kept, own = (sum(a.size for a in jax.tree.leaves(tree)) for tree in (pullback, params))
    return kept - own


def _lowered(network):
    params = parameter_shapes(network, SHAPE)
    return jax.jit(jax.grad(lambda p: _loss(network, p))).lower(params)


def test_computing_again_keeps_less_and_costs_what_it_should():
    """Of a row's forward, tangent, backward (1 + 1 + 2), `block` adds a forward, `dots` little."""
    remats = ("none", "dots", "block")
    networks = [SMALL.clone(depth=1, width=128, remat=remat) for remat in remats]
    everything, products, nothing = map(_saved, networks)
    assert nothing < products < everything / 4
    none, dots, block = (_lowered(network).cost_analysis()["flops"] for network in networks)
    assert dots < 1.05 * none
    assert 1.15 * none < block < 1.3 * none


def test_the_program_of_a_loop_does_not_grow_with_depth():
    networks = (SMALL.clone(depth=depth, scan=True) for depth in (2, 12))
    short, long = (len(_lowered(network).as_text()) for network in networks)
    assert long < 1.05 * short


def test_only_the_embeddings_multiply_matrices_in_float32():
    network, shape = CASES["in_context_dit"]
    inputs = {"r": jnp.zeros(1), "t": jnp.ones(1), "condition": Condition(jnp.zeros(1, int))}
    field = as_field(network.clone(dtype="bfloat16"))
    trace = jax.make_jaxpr(lambda params: field(params, jnp.zeros((1, *shape)), **inputs))
    program = str(trace(parameter_shapes(network, shape)))
    assert "bf16[1,28,32] = dot_general" in program, "20 tokens before 8 patches"
    assert program.count("f32[1,32] = dot_general") == 2 * 4, "two layers of 4 numbers"


def test_rotary_angles_tell_the_difference_of_positions():
    more = {"num_prefix": 3, "rows": 2, "columns": 5, "head_width": 8}
    line, grid = (rotary_angles(positions, **more) for positions in ("sequence", "grid"))
    assert line.shape == grid.shape == (13, 4)
    np.testing.assert_allclose(line[12] - line[7], line[5])
    assert np.all(grid[:3] == 0), "what is told has no place on the grid"
    np.testing.assert_allclose(grid[3:].reshape(2, 5, 4)[1, 4], [1, 1e-2, 4, 4e-2])
    np.testing.assert_allclose(line[4], [4, 4e-1, 4e-2, 4e-3])


def test_patches_turn_by_their_own_row_and_column():
    network, shape = CASES["pixel"]
    rows, columns = (side // network.patch_size for side in shape[:2])
    with mock.patch.object(in_context_dit, "rotary_angles", wraps=rotary_angles) as turned:
        parameter_shapes(network, shape)
    (_, told), sizes = turned.call_args, {"rows": rows, "columns": columns}
    assert rows != columns
    assert told.items() >= sizes.items()


class _Both(nn.Module):
    """Predict 2 z, and 3 z by a second head."""

    @nn.compact
    def __call__(self, z, *, r, t, condition):
        return Prediction(self.param("factor", nn.initializers.constant(2.0), ()) * z, 3 * z)


def test_data_prediction_is_the_network_read_as_velocity():
    wrapped = DataPrediction(_Both(), t_clip=0.25)
    z, t = jnp.ones((2, 3)), jnp.array([0.5, 0.1])
    row = {"r": 0 * t, "t": t, "condition": Condition(jnp.zeros(2, int))}
    params = models.initial_params(wrapped, (3,), jax.random.key(0))
    assert params == {"factor": 2.0}, "the names are the network's own"
    for size, head in enumerate(jax.tree.leaves(as_field(wrapped)(params, z, **row)), 1):
        np.testing.assert_allclose(head[:, 0], [-size / 0.5, -size / 0.25])
