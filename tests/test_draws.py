"""Times and draws: what is random in a step, and which rows have r < t."""

import jax
import jax.numpy as jnp
import numpy as np
from conftest import refuses
from jobs import tiny_config
from oracle import assert_same

from mf_jax.config import make_scheme
from mf_jax.flow.draws import DrawScheme, group_sizes
from mf_jax.flow.records import NO_LABEL
from mf_jax.flow.rows import condition_of
from mf_jax.flow.times import TIMES, ConsistencyTimes, DyadicTimes, LogitNormalTimes, UniformTimes

ROWS, KEY = 4096, jax.random.key(0)


def _draw(scheme, rows=ROWS, seed=0):
    x = jnp.arange(rows, dtype=jnp.float32)[:, None] * jnp.ones((1, 3))
    labels = jnp.arange(rows, dtype=jnp.int32) % 7
    return jax.jit(scheme.draw)(jax.random.key(seed), x, labels)


def test_share_of_rows_is_exact_and_never_rounded_to_zero():
    sizes = {0.0: (0, 1), 1.0: (1, 0), 0.75: (3, 1), 0.25: (1, 3), 0.6: (3, 2), 0.333: (1, 2)}
    for share, group in sizes.items():
        assert group_sizes(share) == group
        scheme = DrawScheme(UniformTimes(), instant_share=share, label_drop_share=0.0)
        draws = _draw(scheme, rows=2 * sum(group))
        assert (len(draws.instant.t), len(draws.interval.t)) == (2 * group[0], 2 * group[1])
    draws = _draw(DrawScheme(UniformTimes()), rows=16)
    for rows, is_instant in ((draws.instant, True), (draws.interval, False)):
        expected = [i for i in range(16) if (i % 4 < 3) == is_instant]
        np.testing.assert_array_equal(rows.x[:, 0], expected)


def test_times_are_ordered_and_inside():
    wide = LogitNormalTimes(-0.6, 1.6, -4.0, 1.6)
    for times in (UniformTimes(), LogitNormalTimes(), wide, TIMES["gap"]()):
        draws = _draw(DrawScheme(times))
        assert jnp.all(draws.instant.r == draws.instant.t)
        r, t = draws.interval.r, draws.interval.t
        assert jnp.all((r >= 0) & (r < t) & (t <= 1))


def test_times_have_the_distribution_they_claim():
    def moments(times, of=lambda r, t: t):
        logit = jax.scipy.special.logit(of(*times.sample(jax.random.key(0), 20_000)))
        return [logit.mean(), logit.std()]

    # of the smaller and the larger draw
    means = [each.mean() for each in UniformTimes().sample(jax.random.key(0), 20_000)]
    np.testing.assert_allclose(means, [1 / 3, 2 / 3], atol=0.005)
    both = moments(LogitNormalTimes(), lambda r, t: jnp.concatenate([r, t]))
    np.testing.assert_allclose(both, [-0.4, 1.0], atol=0.02)
    apart = LogitNormalTimes(3.0, 0.5, -3.0, 0.25)  # so far that t is t
    np.testing.assert_allclose(moments(apart), [3.0, 0.5], atol=0.02)
    np.testing.assert_allclose(moments(apart, lambda r, t: r), [-3.0, 0.25], atol=0.01)
    gap = moments(TIMES["gap"](), lambda r, t: t - r)
    np.testing.assert_allclose(gap, [-0.8, 1.0], atol=0.03)
    with_room = moments(TIMES["gap"](t_mean=-9.0), lambda r, t: r)
    np.testing.assert_allclose(with_room, [-0.4, 1.0], atol=0.03)


def test_labels_are_dropped_where_the_name_says():
    for label_drop, share in (("instant_rows", 0.1), ("any_row", 0.3), ("any_row", 0.0)):
        scheme = DrawScheme(UniformTimes(), label_drop_share=share, label_drop=label_drop)
        draws = _draw(scheme)
        dropped = [np.asarray(rows.dropped) for rows in (draws.instant, draws.interval)]
        np.testing.assert_allclose(np.concatenate(dropped).mean(), share, atol=0.02)
        assert dropped[1].any() == (label_drop == "any_row" and share > 0)
        rows, seen = draws.instant, condition_of(draws.instant)
        np.testing.assert_array_equal(seen, np.where(rows.dropped, NO_LABEL, rows.condition))


def test_no_key_is_used_twice():
    """Noise, times and dropped labels of one step must not be functions of one another."""
    draws = _draw(DrawScheme(UniformTimes(), label_drop_share=0.5, label_drop="any_row"))
    columns = [draws.instant.e[:, 0], draws.instant.e[:, 1], draws.instant.t, draws.instant.dropped]
    correlation = np.corrcoef(np.asarray(columns, np.float64))
    assert np.abs(correlation - np.eye(4)).max() < 0.06


def test_consistency_times_end_at_the_data_and_dyadic_ones_are_steps_of_a_ladder():
    """Equally many of each size, and the rows left over of the whole."""
    r, t = ConsistencyTimes().sample(jax.random.key(0), 1000)
    assert (r == 0).all()
    assert abs(jnp.mean(jax.scipy.special.logit(t)) + 0.4) < 0.1
    r, t = DyadicTimes(levels=3).sample(jax.random.key(0), 1000)
    pairs = {tuple(pair) for pair in np.stack([r, t], 1).tolist()}
    assert pairs == {(i / 2**k, (i + 1) / 2**k) for k in range(3) for i in range(2**k)}
    np.testing.assert_array_equal(np.sort(1 / (t - r)), np.repeat([1, 2, 4], [334, 333, 333]))
    few = {DyadicTimes().sample(jax.random.key(k), 1)[0].item() for k in range(9)}
    assert len(few) > 2, "fewer rows than levels are of others at each step"
    r, t = TIMES["grid"](levels=3).sample(jax.random.key(0), 200)
    assert set((8 * t).tolist()) == set(range(1, 9))
    np.testing.assert_array_equal(t - r, 1 / 8)


def test_rows_with_r_equal_to_t_can_have_uniform_times_of_their_own():
    for order, mean in {"clip": 1 / 2, "swap": 2 / 3}.items():
        own = UniformTimes(order)
        t = _draw(DrawScheme(LogitNormalTimes(), instant_times=own), 4096).instant.t
        assert abs(t.mean() - mean) < 0.02
    config = tiny_config(**{"instant_times.name": "uniform"})
    assert make_scheme(config).instant_times == UniformTimes("clip")
    told = {"model.name": "in_context_dit", "draws.omega_max": 4.0}
    for name, windows in {"improved_meanflow": True, "split_meanflow": False}.items():
        config = tiny_config(**told | {"objective.name": name})
        assert make_scheme(config).omega_window == windows


def test_drawn_guidance_has_the_density_it_names():
    for power in (0.0, 1.0, 2.5):
        told = {"omega_max": 8.0, "omega_power": power, "for_networks": True}
        scheme = DrawScheme(UniformTimes(), 0.0, 0.0, **told)
        scale, edges = _draw(scheme).interval.guidance, np.linspace(1, 8, 2001)
        density = edges**-power
        mean = np.trapezoid(edges * density, edges) / np.trapezoid(density, edges)
        assert abs(scale.omega.mean() - mean) < 0.1
        assert 1 <= scale.omega.min() < scale.omega.max() <= 8
        assert 0 <= scale.t_min.min() < scale.t_min.max() <= 0.5
        assert 0.5 <= scale.t_max.min() < scale.t_max.max() <= 1


def test_more_draws_do_not_change_those_before_them():
    plain, guided = (
        _draw(DrawScheme(UniformTimes(), omega_max=w, for_networks=True), 8) for w in (1.0, 4.0)
    )
    assert plain.interval.guidance is None
    assert_same(guided.interval.replace(guidance=None), plain.interval, rtol=0, atol=0)
    assert (guided.interval.guidance.t_min > 0).all()
    told = {"omega_max": 4.0, "for_networks": True, "omega_window": False}
    whole = _draw(DrawScheme(UniformTimes(), **told), 8).interval.guidance
    np.testing.assert_array_equal(whole.omega, guided.interval.guidance.omega)
    for scale in (whole, guided.instant.guidance):
        assert {*zip(scale.t_min.tolist(), scale.t_max.tolist(), strict=True)} == {(0, 1)}


def test_bad_arguments_are_named():
    times = UniformTimes()
    bad = {"instant_share": 1.5, "label_drop_share": 1.0, "label_drop": "some", "omega_min": 2.0}
    for key, value in (bad | {"omega_max": 0.5, "omega_power": -1.0}).items():
        refuses(key, DrawScheme, times, **{key: value})
    refuses("instant_share.*fraction", DrawScheme, times, instant_share=0.007)
    refuses("any_row", DrawScheme, times, instant_share=0.0, label_drop_share=0.1)
    refuses("label_drop", DrawScheme, times, instant_of_every_row=True)
    refuses("6 rows.*multiple of 4", _draw, DrawScheme(times), rows=6)
    refuses("x: is uint8", DrawScheme(times).draw, KEY, jnp.ones((4, 2), jnp.uint8))
    refuses("t_std", LogitNormalTimes, t_std=0.0)
    refuses("levels", DyadicTimes, levels=0)
    refuses("levels", TIMES["grid"], levels=21)
