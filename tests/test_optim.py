"""Schedules, clipping and moving averages."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mf_jax.optim import learning_rate, make_optimizer, start_averages, update_averages


def test_warmup_then_constant():
    rate = learning_rate(lr=2.0, warmup_steps=4, schedule="constant", num_steps=10)
    np.testing.assert_allclose([rate(i) for i in range(7)], [0.5, 1.0, 1.5, 2.0, 2.0, 2.0, 2.0])


def test_cosine_ends_at_zero():
    rate = learning_rate(lr=2.0, warmup_steps=0, schedule="cosine", num_steps=10)
    np.testing.assert_allclose([rate(0), rate(5), rate(10)], [2.0, 1.0, 0.0], atol=1e-6)


@pytest.mark.parametrize("warmup_steps", [1, 10])
def test_extreme_warmups(warmup_steps):
    rate = learning_rate(lr=1.0, warmup_steps=warmup_steps, schedule="cosine", num_steps=10)
    assert all(np.isfinite(float(rate(i))) and rate(i) <= 1.0 for i in range(12))


@pytest.mark.parametrize(("clip_norm", "seen"), [(1.0, [0.6, 0.8]), (0.0, [3.0, 4.0]), (10.0, [3.0, 4.0])])
def test_clipping_bounds_the_gradient_that_adam_sees(clip_norm, seen):
    params, gradient = {"w": jnp.zeros(2)}, {"w": jnp.array([3.0, 4.0])}
    optimizer = make_optimizer(lambda step: 0.1, b1=0.0, b2=0.5, weight_decay=0.0, clip_norm=clip_norm)
    _, state = optimizer.update(gradient, optimizer.init(params), params)
    np.testing.assert_allclose(optax.tree.get(state, "mu")["w"], seen, rtol=1e-6)


def test_weight_decay_is_decoupled():
    params = {"w": jnp.array([10.0])}
    optimizer = make_optimizer(lambda step: 0.1, b1=0.9, b2=0.9, weight_decay=0.5, clip_norm=0.0)
    updates, _ = optimizer.update({"w": jnp.zeros(1)}, optimizer.init(params), params)
    np.testing.assert_allclose(updates["w"], -0.1 * 0.5 * 10.0, rtol=1e-6)


def test_averages_move_as_their_names_say():
    averages = start_averages({"w": jnp.array(1.0)}, ("0.9", "0.5"))
    averages = update_averages(averages, {"w": jnp.array(2.0)})
    np.testing.assert_allclose([averages["0.9"]["w"], averages["0.5"]["w"]], [1.1, 1.5], rtol=1e-6)
