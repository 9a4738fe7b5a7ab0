"""Pairs of data and noise: least cost, within conditions, and the map between Gaussians."""

import jax
import jax.numpy as jnp
import numpy as np
from conftest import refuses
from scipy.optimize import linear_sum_assignment

from mf_jax.flow.couplings import OptimalTransport
from mf_jax.flow.draws import DrawScheme
from mf_jax.flow.times import UniformTimes

X = jax.random.normal(jax.random.key(0), (12, 3, 2))
E = jax.random.normal(jax.random.key(1), (12, 3, 2))


def _cost(x, e):
    return np.sum((np.asarray(x)[:, None] - np.asarray(e)[None]) ** 2, axis=(2, 3))


def _least(x, e):
    cost = _cost(x, e)
    return cost[linear_sum_assignment(cost)].sum()


def test_the_assignment_is_the_cheapest_within_each_condition():
    labels = jnp.arange(12) % 3
    dealt = OptimalTransport().pair(X, E, labels, None)
    for label in range(3):
        ours, own, x = (each[labels == label] for each in (dealt, E, X))
        assert sorted(map(float, ours[:, 0, 0])) == sorted(map(float, own[:, 0, 0]))
        np.testing.assert_allclose(np.trace(_cost(x, ours)), _least(x, own), rtol=1e-5)
    assert not jnp.array_equal(dealt, E)
    free = OptimalTransport().pair(X, E, None, None)
    np.testing.assert_allclose(np.trace(_cost(X, free)), _least(X, E), rtol=1e-5)


def test_rows_change_places_within_their_mask_and_block_and_what_is_hidden_costs_nothing():
    mask = jnp.broadcast_to((jnp.arange(3) < 2)[None, :, None], X.shape).at[::2].set(True)
    dealt = OptimalTransport(rows=6).pair(jnp.where(mask, X, jnp.nan), E, None, mask)
    shown = [np.where(mask, each, 0) for each in (X, dealt, E)]
    assert not np.array_equal(*shown[1:])
    for place in (slice(i, i + 6, 2) for i in (0, 1, 6, 7)):
        x, ours, own = (each[place] for each in shown)
        np.testing.assert_allclose(np.trace(_cost(x, ours)), _least(x, own), rtol=1e-5)
    refuses("must divide the 12 rows", OptimalTransport(rows=5).pair, X, E, None, None)


def test_batches_near_the_transport_map_of_gaussians_as_they_grow():
    """From N(0, 1) to N(0, 1/4) it is x = e / 2; independent pairs are off by sqrt(1/4 + 1/4)."""
    errors = []
    for num in (4, 256):
        x, e = 0.5 * jax.random.normal(jax.random.key(2), (num, 1)), None
        scheme = DrawScheme(UniformTimes(), 0.5, 0.0, coupling=OptimalTransport())
        draws = jax.jit(scheme.draw)(jax.random.key(3), x, e=e)
        pairs = [(rows.x, rows.e) for rows in (draws.instant, draws.interval)]
        errors.append(float(np.sqrt(np.mean([jnp.mean((a - b / 2) ** 2) for a, b in pairs]))))
    assert errors[1] < 0.1 < 0.2 < errors[0]
    drawn = jnp.concatenate([rows.e for rows in (draws.instant, draws.interval)])
    plain = DrawScheme(UniformTimes(), 0.5, 0.0).draw(jax.random.key(3), x)
    same = jnp.concatenate([rows.e for rows in (plain.instant, plain.interval)])
    np.testing.assert_array_equal(jnp.sort(drawn[:, 0]), jnp.sort(same[:, 0]))
