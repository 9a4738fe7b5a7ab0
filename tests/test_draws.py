"""Times and draws: what is random in a step, and which rows have r < t."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mf_jax.errors import BadInput
from mf_jax.flow.draws import (
    DrawScheme,
    condition_of,
    group_sizes,
    join_rows,
    split_rows,
)
from mf_jax.flow.records import NO_LABEL
from mf_jax.flow.times import LogitNormalTimes, UniformTimes

ROWS = 4096


def _draw(scheme, rows=ROWS, seed=0):
    x = jnp.arange(rows, dtype=jnp.float32)[:, None] * jnp.ones((1, 3))
    return scheme.draw(jax.random.key(seed), x, jnp.arange(rows, dtype=jnp.int32) % 7)


@pytest.mark.parametrize(
    ("share", "sizes"),
    [
        (0.0, (0, 1)),
        (1.0, (1, 0)),
        (0.75, (3, 1)),
        (0.5, (1, 1)),
        (0.25, (1, 3)),
        (0.6, (3, 2)),
        (0.333, (1, 2)),
    ],
)
def test_group_sizes(share, sizes):
    assert group_sizes(share) == sizes


@pytest.mark.parametrize("share", [0.0, 0.25, 0.5, 0.75, 1.0])
def test_share_of_rows_is_exact_and_never_rounded_to_zero(share):
    draws = _draw(DrawScheme(UniformTimes(), instant_share=share, label_drop_share=0.0), rows=16)
    assert (draws.instant.t.size, draws.interval.t.size) == (
        round(16 * share),
        round(16 * (1 - share)),
    )


def test_every_fourth_row_has_r_below_t():
    draws = _draw(DrawScheme(UniformTimes()), rows=16)
    np.testing.assert_array_equal(draws.interval.x[:, 0], [3, 7, 11, 15])
    np.testing.assert_array_equal(draws.instant.x[:, 0], [0, 1, 2, 4, 5, 6, 8, 9, 10, 12, 13, 14])


def test_split_and_join_are_inverse():
    array = jnp.arange(60).reshape(20, 3)
    parts = split_rows(array, (12, 8))
    assert [part.shape for part in parts] == [(12, 3), (8, 3)]
    np.testing.assert_array_equal(join_rows(parts), array)


@pytest.mark.parametrize(
    "times", [UniformTimes(), LogitNormalTimes(), LogitNormalTimes(-0.6, 1.6, -4.0, 1.6)]
)
def test_times_are_ordered_and_inside(times):
    draws = _draw(DrawScheme(times))
    assert jnp.all(draws.instant.r == draws.instant.t)
    assert jnp.all(
        (draws.interval.r >= 0) & (draws.interval.r < draws.interval.t) & (draws.interval.t <= 1)
    )


def test_times_have_the_distribution_they_claim():
    rows = 200_000
    r, t = UniformTimes().sample(jax.random.key(0), rows)
    np.testing.assert_allclose(
        [r.mean(), t.mean()], [1 / 3, 2 / 3], atol=0.005
    )  # of the smaller and the larger draw
    r, t = LogitNormalTimes(-0.4, 1.0, -0.4, 1.0).sample(jax.random.key(1), rows)
    logit = np.log(np.concatenate([r, t]) / (1 - np.concatenate([r, t])))
    np.testing.assert_allclose([logit.mean(), logit.std()], [-0.4, 1.0], atol=0.01)
    r, t = LogitNormalTimes(3.0, 0.5, -3.0, 0.25).sample(
        jax.random.key(2), rows
    )  # so far apart that t is t
    logit_t, logit_r = np.log(t / (1 - t)), np.log(r / (1 - r))
    np.testing.assert_allclose([logit_t.mean(), logit_t.std()], [3.0, 0.5], atol=0.01)
    np.testing.assert_allclose([logit_r.mean(), logit_r.std()], [-3.0, 0.25], atol=0.01)


@pytest.mark.parametrize(
    ("label_drop", "share"), [("instant_rows", 0.1), ("any_row", 0.3), ("any_row", 0.0)]
)
def test_labels_are_dropped_where_the_name_says(label_drop, share):
    draws = _draw(
        DrawScheme(UniformTimes(), label_drop_share=share, label_drop=label_drop), rows=40_000
    )
    dropped = [np.asarray(rows.dropped) for rows in (draws.instant, draws.interval)]
    np.testing.assert_allclose(np.concatenate(dropped).mean(), share, atol=0.01)
    assert dropped[1].any() == (label_drop == "any_row" and share > 0)
    told = condition_of(draws.instant).labels
    assert jnp.all((told == NO_LABEL) == draws.instant.dropped)
    assert jnp.all(told[~draws.instant.dropped] == draws.instant.labels[~draws.instant.dropped])


def test_no_key_is_used_twice():
    """Noise, times and dropped labels of one step must not be functions of one another."""
    draws = _draw(DrawScheme(UniformTimes(), label_drop_share=0.5, label_drop="any_row"))
    columns = [draws.instant.e[:, 0], draws.instant.e[:, 1], draws.instant.t, draws.instant.dropped]
    correlation = np.corrcoef(np.asarray(columns, np.float64))
    assert np.abs(correlation - np.eye(4)).max() < 0.06


def test_draws_are_a_pure_function_of_the_key():
    scheme = DrawScheme(LogitNormalTimes())
    same, again, other = _draw(scheme, 16), _draw(scheme, 16), _draw(scheme, 16, seed=1)
    for a, b in zip(jax.tree.leaves(same), jax.tree.leaves(again), strict=True):
        np.testing.assert_array_equal(a, b)
    assert not np.allclose(same.instant.e, other.instant.e)
    assert not np.allclose(same.interval.t, other.interval.t)


@pytest.mark.parametrize(
    ("build", "named"),
    [
        (lambda: LogitNormalTimes(t_std=0.0), "t_std"),
        (lambda: LogitNormalTimes(r_std=-1.0), "r_std"),
        (lambda: DrawScheme(UniformTimes(), instant_share=1.5), "instant_share"),
        (lambda: DrawScheme(UniformTimes(), instant_share=-0.1), "instant_share"),
        (lambda: DrawScheme(UniformTimes(), instant_share=0.007), "instant_share.*fraction"),
        (lambda: DrawScheme(UniformTimes(), label_drop_share=1.0), "label_drop_share"),
        (lambda: DrawScheme(UniformTimes(), label_drop="some"), "label_drop"),
        (lambda: _draw(DrawScheme(UniformTimes()), rows=6), "6 rows.*multiple of 4"),
        (lambda: DrawScheme(UniformTimes(), instant_share=0.0, label_drop_share=0.1), "any_row"),
    ],
)
def test_bad_arguments_are_named(build, named):
    with pytest.raises(BadInput, match=named):
        build()
