"""Estimates of the flow's velocity: against brute force, closed forms and the methods they make."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracle
from conftest import refuses
from oracle import class_mean, exact_draws
from scipy.special import softmax

import mf_jax
from configs.digits import get_config as digits
from mf_jax import AdaptiveWeight, Draws, Estimated, MeanFlow, VelocityEstimate
from mf_jax.config import make_objective
from mf_jax.flow.paths import per_row
from mf_jax.flow.rows import at_instant, point_of

FIELD = oracle.gaussian_field(lambda condition: class_mean(condition.labels))
PARAMS, OTHER = jnp.asarray(oracle.BENT, jnp.float32), jnp.array([-0.1, 0.2, 0.3, -0.4])


def _noisy(seed=3):
    """Return draws off the truth, so that v is not the velocity of the flow."""
    draws = exact_draws(seed)
    noise = lambda rows: rows.replace(x=rows.x + 0.3 * jnp.cos(7 * rows.e))  # noqa: E731
    return Draws(noise(draws.instant), noise(draws.interval))


def _estimated(estimate, draws, params=PARAMS, target_params=OTHER):
    estimated = jax.jit(functools.partial(estimate.estimated, FIELD))
    return estimated(params, draws, target_params)


def _brute_force(rows, scale, x, conditions, mask=None):
    """Return the mean velocity of all paths through z_t that start at alike data, in float64."""
    start, e, t, data = (np.asarray(a, np.float64) for a in (rows.x, rows.e, rows.t[:, None], x))
    z = (1 - t) * start + t * e
    alike = rows.dropped[:, None] | (conditions == rows.condition[:, None])
    if mask is not None:
        alike &= np.all(mask == rows.mask[:, None], axis=2)
    distance = np.sum((z[:, None] - (1 - t)[:, None] * data) ** 2, axis=2)
    weight = softmax(np.where(alike, -distance / (2 * (scale * t) ** 2), -np.inf), axis=1)
    return (z - weight @ data) / t


def _masked(rows):
    """Return rows of two masks, one of which hides the last two numbers."""
    mask = (jnp.arange(5) < 3) | (jnp.arange(len(rows.t)) % 2 == 0)[:, None]
    x, e = (jnp.where(mask, each, 0) for each in (rows.x, rows.e))
    return rows.replace(x=x, e=e, mask=mask)


def test_the_plug_in_is_the_mean_over_alike_data_and_0_where_hidden():
    """Among the data of a batch is a row's own x, without which few data would be biased."""
    draws, rng = _noisy(), np.random.default_rng(0)
    masked = Draws(_masked(draws.instant), _masked(draws.interval))
    both, own = oracle.joined(draws), oracle.joined(masked)
    whole, shown = (both.x, both.condition), (own.x, own.condition, own.mask)
    data, labels = rng.normal(size=(50, 5)), rng.integers(0, 4, 50)
    told = {"data": own.x + 9 * ~own.mask, "labels": own.condition, "mask": own.mask}
    for estimate, given, known in (
        (VelocityEstimate("batch", 1.0), draws, whole),
        (VelocityEstimate("batch", 1.0, noise_scale=3.0), draws, whole),
        (VelocityEstimate("data", 1.0, data=data, labels=labels), draws, (data, labels)),
        (VelocityEstimate("batch", 1.0), masked, shown),
        (VelocityEstimate("data", 1.0, **told), masked, shown),
    ):
        found = _estimated(estimate, given)
        for rows in (found.instant, found.interval):
            theirs = _brute_force(rows, estimate.noise_scale, *known)
            np.testing.assert_allclose(rows.v, theirs, rtol=2e-3, atol=2e-3)
            np.testing.assert_array_equal(rows.tangent, rows.e - rows.x)
            hidden = 0.0 if rows.mask is None else jnp.where(rows.mask, 0, rows.v)
            np.testing.assert_array_equal(hidden, 0)


def test_the_plug_in_nears_the_velocity_of_gaussian_data_as_they_grow_in_number():
    rows, mean = exact_draws(5, num_interval=40, some_dropped=False).interval, class_mean(0)
    rows = rows.replace(x=rows.x[:, :1], e=rows.e[:, :1], condition=0 * rows.condition)
    truth, errors = oracle.gaussian_velocity(point_of(rows), rows.t[:, None], mean), []
    for num in (20, 2000, 200_000):
        data = np.random.default_rng(1).normal(float(mean), oracle.STD, (num, 1))
        estimate = VelocityEstimate("data", 1.0, data=data, labels=np.zeros(num, int))
        found = _estimated(estimate, Draws(jax.tree.map(lambda a: a[:0], rows), rows)).interval
        inside = (rows.t > 0.3)[:, None]  # where many of the data count
        errors.append(float(jnp.sqrt(jnp.mean(((found.v - truth) ** 2)[inside]))))
    assert errors[0] > 3 * errors[1] > 9 * errors[2], errors
    assert errors[2] < 0.01


def test_drawn_guidance_is_of_the_target_alone():
    """The network is asked for the scale 1 at all t, and for no class of a row without one."""
    drawn = lambda num: mf_jax.GuidanceScale(*(jnp.full(num, each) for each in (4.0, 0.2, 0.6)))  # noqa: E731

    def field(params, z, *, r, t, condition):
        omega, t_min, t_max = jax.tree.leaves(condition.guidance)
        return per_row(omega + 10 * t_min + 100 * t_max, z) * jnp.ones_like(z)

    draws = exact_draws(guidance=drawn)
    told = VelocityEstimate("average", target=1.0).estimated(field, PARAMS, draws, OTHER)
    for rows in (told.instant, told.interval):
        np.testing.assert_allclose(rows.v, 101)
        np.testing.assert_array_equal(rows.guidance.omega, 4)


def test_the_networks_own_velocity_in_the_tangent_is_improved_meanflow():
    weight, draws = AdaptiveWeight(p=0.5), _noisy()
    ours = Estimated(MeanFlow(weight=weight), VelocityEstimate("network", tangent=1.0))
    theirs = mf_jax.ImprovedMeanFlow(weight=weight, velocity="boundary")
    losses = (lambda p, o=o: o.loss(FIELD, p, draws)[0] for o in (ours, theirs))
    pairs = (jax.value_and_grad(loss)(PARAMS) for loss in losses)
    oracle.assert_same(*pairs, rtol=1e-6, atol=0)


def test_shares_and_averages_reach_target_and_tangent():
    draws = _noisy()
    told = _estimated(VelocityEstimate("average", target=0.25, tangent=0.5), draws)
    for rows in (told.instant, told.interval):
        v, teacher = rows.e - rows.x, at_instant(FIELD, OTHER, rows).u
        np.testing.assert_allclose(rows.v, v + 0.25 * (teacher - v), rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(rows.tangent, v + 0.5 * (teacher - v), rtol=1e-5, atol=1e-6)
    network = _estimated(VelocityEstimate("network", target=1.0), draws)
    np.testing.assert_array_equal(network.instant.v, draws.instant.e - draws.instant.x)
    some = _estimated(VelocityEstimate("average", target=0.5, of_rows=True), draws).interval
    changed = np.any(some.v != some.e - some.x, axis=1)
    np.testing.assert_array_equal(changed, some.fraction * 1024 % 1 < 0.5)
    assert VelocityEstimate().estimated(FIELD, PARAMS, draws, OTHER) is draws
    one, other = (VelocityEstimate("data", 1.0, data=np.full((2, 3), i)) for i in (0, 1))
    assert one != other  # as a program compiled for one must not serve the other


def test_a_teacher_is_refused_where_an_average_is_not_its_own():
    assert Estimated(MeanFlow(), VelocityEstimate("average", 1.0), ema=1.0).target_ema == 1
    for estimate, ema in (("average", 0.0), ("batch", 0.9), ("average", 1.5)):
        refuses(r"velocity\.ema", Estimated, MeanFlow(), VelocityEstimate(estimate, 1.0), ema=ema)
    guided, off = MeanFlow(guidance=mf_jax.Guidance(0.2, 0.9)), "network learns a guided velocity"
    for objective, estimate, ema, problem in (
        (mf_jax.PixelMeanFlow(), VelocityEstimate("batch", 1.0), 0.0, "takes no estimate"),
        (guided, VelocityEstimate("network", tangent=1.0), 0.0, off),
        (guided, VelocityEstimate("average", 1.0), 0.9, off),
        (mf_jax.SplitMeanFlow(), VelocityEstimate("batch", 0.5, 0.5), 0.0, "has no direction"),
        (mf_jax.ImprovedMeanFlow(), VelocityEstimate("batch", 0.5, 0.5), 0.0, "has no direction"),
        (mf_jax.TerminalVelocity(), VelocityEstimate("network", 0.5), 0.0, "see no velocity"),
    ):
        refuses(problem, Estimated, objective, estimate, ema=ema)
    assert Estimated(guided, VelocityEstimate("average", 1.0), ema=1.0).guidable
    refuses("knows no data", _estimated, VelocityEstimate("data", 1.0), _noisy())
    config = digits("esc")
    assert isinstance(make_objective(config), Estimated)
    config.coupling.name = "optimal_transport"
    refuses(r"coupling\.name='optimal_transport'.*use independent", make_objective, config)
    refuses(r"velocity\.target=2", VelocityEstimate, "batch", 2.0)


def test_esc_lets_the_derivative_in_and_the_data_end_go():
    """Half-way up the ramp half of du/dt counts; arccos(1/2) / (pi/2) = 2/3 of rows have r = 0."""
    draws, weight = _noisy(), AdaptiveWeight(p=0.0)

    def loss(step=0, draws=draws, **options):
        return MeanFlow(weight=weight, **options).loss(FIELD, PARAMS, draws, step)[0]

    zero, quarter, half, whole = (loss(step, ramp_steps=20) for step in (0, 5, 10, 40))
    np.testing.assert_allclose(whole, loss())
    # a square of a + b k: its second difference is that of a parabola
    np.testing.assert_allclose(half - 2 * quarter + zero, (whole - 2 * half + zero) / 4, rtol=1e-4)
    rows = draws.interval
    ended = draws.replace(interval=rows.replace(r=jnp.where(rows.fraction < 2 / 3, 0, rows.r)))
    assert 0 < np.mean(rows.fraction < 2 / 3) < 1
    np.testing.assert_allclose(loss(50, to_data_steps=100), loss(draws=ended), rtol=1e-6)
    np.testing.assert_allclose(loss(100, to_data_steps=100), loss())


def test_data_must_be_like_the_rows_and_a_row_like_no_datum_keeps_its_own_velocity():
    draws = _noisy()
    rows = draws.interval
    is_known = rows.dropped | (rows.condition != rows.condition[-1])
    labels = jnp.where(is_known, rows.condition, 9)
    estimate = VelocityEstimate("data", 1.0, 1.0, data=rows.x, labels=labels)
    moved = np.abs(_estimated(estimate, draws).interval.v - (rows.e - rows.x)).max(axis=1)
    assert 0 < is_known.sum() < len(is_known)
    assert moved[~is_known].max() < 1e-6
    assert moved[is_known].max() > 0.01

    data, labels = np.zeros((50, 5)), np.zeros(50, int)
    for more, told in (
        ({"data": data}, "for x, condition and mask of"),
        ({"data": data, "labels": labels, "mask": data > 0}, r"\(5,\)\) for"),
        ({"data": data[:, :4], "labels": labels}, r"\(4,\)"),
        ({"data": data, "labels": {"class": labels}}, "'class'"),
    ):
        problem = f"velocity.source='data': data, labels.*{told}"
        refuses(problem, _estimated, VelocityEstimate("data", 1.0, **more), draws)
