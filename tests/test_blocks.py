"""How blocks are run: a loop and computing again change the cost, not the numbers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from networks import draw

from mf_jax.flow.records import Condition
from mf_jax.models import (
    MLP,
    DataPrediction,
    DiT,
    InContextDiT,
    initial_params,
    parameter_shapes,
    with_gather,
)
from mf_jax.models.blocks import laid_out_like, stack_blocks, unstack_blocks

SHAPE = (4, 4, 2)
SMALL = {"patch_size": 2, "depth": 3, "width": 16, "num_heads": 2, "num_classes": 3}
NETWORKS = {
    "dit": DiT(**SMALL),
    "decoupled": DiT(**SMALL, time_conditioning="t|r"),
    "in_context_dit": InContextDiT(**SMALL, head_depth=2),
}


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


@functools.cache
def _plain(name):
    params = draw(NETWORKS[name], SHAPE)
    return params, _loss_and_gradient(NETWORKS[name], params)


@pytest.mark.parametrize(
    ("name", "remat", "scan"),
    [
        ("dit", "dots", False),
        ("dit", "dots", True),
        ("decoupled", "block", True),
        ("in_context_dit", "block", False),
        ("in_context_dit", "none", True),
    ],
)
def test_loss_and_gradient_are_the_same(name, remat, scan):
    params, expected = _plain(name)
    other = NETWORKS[name].clone(remat=remat, scan=scan)
    loss, gradient = _loss_and_gradient(other, stack_blocks(params) if scan else params)
    got = loss, unstack_blocks(gradient)

    def assert_close(a, b):
        np.testing.assert_allclose(a, b, rtol=2e-4, atol=1e-6 * (1 + np.abs(b).max()))

    jax.tree.map(assert_close, got, expected)


def test_layouts_are_inverse_keep_the_order_and_fit_a_loop():
    for network in NETWORKS.values():
        params, like = draw(network, SHAPE), parameter_shapes(network.clone(scan=True), SHAPE)
        there = laid_out_like(params, like)
        assert jax.tree.map(np.shape, there) == jax.tree.map(lambda a: a.shape, like)
        assert "block_0" not in str(jax.tree.structure(like))
        back = laid_out_like(there, parameter_shapes(network, SHAPE))
        jax.tree.map(np.testing.assert_array_equal, back, params)
        assert laid_out_like(params, params) is params
    many = {f"block_{i}": {"w": np.full(2, i)} for i in reversed(range(12))}
    np.testing.assert_array_equal(stack_blocks(many)["blocks"]["w"][:, 0], np.arange(12))


def test_blocks_of_a_loop_start_differently():
    network = NETWORKS["dit"].clone(scan=True)
    params = initial_params(network, SHAPE, jax.random.key(0, impl="rbg"))["blocks"]
    for leaf in jax.tree.leaves(params):
        assert not leaf.any() or not np.allclose(leaf[0], leaf[-1])


@pytest.mark.parametrize("scan", [False, True])
def test_each_block_gathers_its_own_parameters_and_again_where_it_is_computed_again(scan):
    def gathered(network, function):
        """Return how often each path is gathered, whatever network it is wrapped in."""
        paths = []

        def gather(path, part):
            paths.append("/".join(path))
            return jax.tree.map(lambda a: 2 * a, part)

        function(with_gather(network, gather))
        return sorted(set(paths)), len(paths)

    network = NETWORKS["in_context_dit"].clone(scan=scan, remat="block")
    shapes = parameter_shapes(network, SHAPE)
    names = ["blocks"] if scan else ["block_0", "block_1"]
    heads = [f"{head}/{name}" for head in ("u_head", "v_head") for name in names]
    expected = sorted([names[0], *heads])

    def forward(network):
        jax.eval_shape(lambda p: _loss(network, p), shapes)

    def backward(network):
        jax.eval_shape(jax.grad(lambda p: _loss(network, p)), shapes)

    once, again = gathered(network, forward), gathered(network, backward)
    assert once[0] == again[0] == expected
    assert gathered(DataPrediction(network), forward) == once
    network = MLP(depth=1, width=8, num_classes=0)
    assert with_gather(network, lambda path, part: part) is network


def test_gathered_parameters_are_those_that_blocks_compute_with():
    params, _ = _plain("dit")
    doubled = {
        k: jax.tree.map(lambda a: 2 * a, v) if "block" in k else v for k, v in params.items()
    }
    gathering = with_gather(NETWORKS["dit"], lambda path, part: jax.tree.map(lambda a: 2 * a, part))
    loss = jax.jit(lambda p, q: (_loss(gathering, p), _loss(NETWORKS["dit"], q)))
    np.testing.assert_allclose(*loss(params, doubled), rtol=1e-5)


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
    networks = [DiT(**SMALL | {"width": 128}, remat=remat) for remat in ("none", "dots", "block")]
    everything, products, nothing = map(_saved, networks)
    assert nothing < products < everything / 4
    none, dots, block = (_lowered(network).cost_analysis()["flops"] for network in networks)
    assert dots < 1.05 * none
    assert 1.15 * none < block < 1.3 * none


def test_the_program_of_a_loop_does_not_grow_with_depth():
    short, long = (
        len(_lowered(DiT(**SMALL | {"depth": depth}, scan=True)).as_text()) for depth in (3, 12)
    )
    assert long < 1.05 * short
