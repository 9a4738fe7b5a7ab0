"""How blocks are run: a loop and computing again change the cost, not the numbers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mf_jax.errors import BadInput
from mf_jax.flow.records import Condition
from mf_jax.models import DiT, InContextDiT, initial_params, parameter_shapes
from mf_jax.models.blocks import laid_out_like, stack_blocks, unstack_blocks

SHAPE = (4, 4, 2)
SIZES = {"patch_size": 2, "depth": 3, "width": 16, "num_heads": 2, "num_classes": 3}
NETWORKS = {
    "dit": DiT(**SIZES),
    "decoupled": DiT(**SIZES, time_conditioning="t|r"),
    "in_context_dit": InContextDiT(**SIZES, head_depth=2),
}


@pytest.fixture(scope="module", params=NETWORKS)
def network(request):
    return NETWORKS[request.param]


def _drawn(network):
    params = initial_params(network, SHAPE, jax.random.key(0))
    keys = iter(jax.random.split(jax.random.key(1), 200))
    return jax.tree.map(lambda p: p + 0.2 * jax.random.normal(next(keys), p.shape), params)


def _loss(network, params):
    """Return what training asks of a network: a gradient through a prediction and its derivative without gradient."""
    z = jax.random.normal(jax.random.key(2), (4, *SHAPE))
    r, t = jnp.linspace(0.0, 0.4, 4), jnp.linspace(0.5, 1.0, 4)

    def u(z, t):
        prediction = network.apply(
            {"params": params}, z, r=r, t=t, condition=Condition(jnp.arange(4) - 1)
        )
        return prediction.u, prediction.v

    value, derivative, second = jax.jvp(u, (z, t), (z, jnp.ones(4)), has_aux=True)
    loss = jnp.mean((value - jax.lax.stop_gradient(z - derivative)) ** 2)
    return loss if second is None else loss + jnp.mean(second**2)


@functools.cache
def _plain(name):
    network = NETWORKS[name]
    params = _drawn(network)
    return params, jax.jit(jax.value_and_grad(lambda p: _loss(network, p)))(params)


@pytest.mark.parametrize(
    ("name", "remat", "scan"),
    [
        ("dit", "none", True),
        ("dit", "dots", False),
        ("dit", "block", False),
        ("dit", "dots", True),
        ("decoupled", "block", True),
        ("in_context_dit", "none", True),
        ("in_context_dit", "block", False),
        ("in_context_dit", "block", True),
    ],
)
def test_loss_and_gradient_are_the_same(name, remat, scan):
    params, expected = _plain(name)
    other = NETWORKS[name].clone(remat=remat, scan=scan)
    laid_out = stack_blocks(params) if scan else params
    loss, gradient = jax.jit(jax.value_and_grad(lambda p: _loss(other, p)))(laid_out)
    got = loss, unstack_blocks(gradient)
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=1e-6), got, expected)


def test_a_loop_has_the_stacked_parameters(network):
    shapes = parameter_shapes(network.clone(scan=True), SHAPE)
    stacked = stack_blocks(_drawn(network))
    assert jax.tree.map(lambda a: a.shape, shapes) == jax.tree.map(lambda a: a.shape, stacked)
    assert "block_0" not in str(jax.tree.structure(shapes))


def test_blocks_of_a_loop_start_differently(network):
    for leaf in jax.tree.leaves(
        initial_params(network.clone(scan=True), SHAPE, jax.random.key(0))["blocks"]
    ):
        assert (
            not leaf.any()
            or (leaf == 1).all()
            or not np.allclose(leaf[0], leaf[-1])
            or len(leaf) == 1
        )


def test_layouts_are_inverse_and_keep_the_order(network):
    params = _drawn(network)
    there = laid_out_like(params, parameter_shapes(network.clone(scan=True), SHAPE))
    back = laid_out_like(there, parameter_shapes(network, SHAPE))
    jax.tree.map(np.testing.assert_array_equal, back, params)
    assert laid_out_like(params, params) is params
    many = {f"block_{i}": {"w": np.full(2, i)} for i in reversed(range(12))}
    np.testing.assert_array_equal(stack_blocks(many)["blocks"]["w"][:, 0], np.arange(12))


def _saved(network):
    """Return how many numbers a gradient keeps between its forward and its backward pass, besides the parameters."""
    params = parameter_shapes(network, SHAPE)
    _, pullback = jax.eval_shape(lambda p: jax.vjp(lambda p: _loss(network, p), p), params)
    own = sum(leaf.size for leaf in jax.tree.leaves(params))
    return sum(leaf.size for leaf in jax.tree.leaves(pullback)) - own


def test_computing_again_keeps_less():
    networks = [DiT(**SIZES | {"width": 64}, remat=remat) for remat in ("none", "dots", "block")]
    everything, products, nothing = map(_saved, networks)
    assert nothing < products < everything / 4


def _operations(network):
    params = parameter_shapes(network, SHAPE)
    lowered = jax.jit(jax.grad(lambda p: _loss(network, p))).lower(params)
    return lowered.cost_analysis()["flops"]


def test_computing_again_costs_what_it_should():
    """Of a row's forward, tangent and backward (1 + 1 + 2), `block` adds a forward, `dots` next to nothing."""
    none, dots, block = (
        _operations(DiT(**SIZES | {"width": 128}, remat=remat))
        for remat in ("none", "dots", "block")
    )
    assert dots < 1.05 * none
    assert 1.15 * none < block < 1.3 * none


def test_the_program_of_a_loop_does_not_grow_with_depth():
    def size(depth):
        network = DiT(**SIZES | {"depth": depth}, scan=True)
        params = parameter_shapes(network, SHAPE)
        return len(jax.jit(jax.grad(lambda p: _loss(network, p))).lower(params).as_text())

    assert size(12) < 1.05 * size(3)


def test_an_unknown_name_is_refused():
    with pytest.raises(BadInput, match=r"model.remat='all'.*none, block, dots"):
        parameter_shapes(DiT(**SIZES, remat="all"), SHAPE)
