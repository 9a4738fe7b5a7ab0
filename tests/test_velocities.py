"""Estimates of the flow's velocity: against brute force, closed forms and the methods they make."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import refuses
from oracle import STD, class_mean, exact_draws, gaussian_field, gaussian_velocity

from configs.digits import get_config as digits
from mf_jax.config import make_objective
from mf_jax.flow.errors import BadInput
from mf_jax.flow.guidance import Guidance
from mf_jax.flow.paths import interpolate, per_row
from mf_jax.flow.records import Condition, Draws, GuidanceScale
from mf_jax.flow.velocities import VelocityEstimate
from mf_jax.objectives import Estimated
from mf_jax.objectives.improved_meanflow import ImprovedMeanFlow
from mf_jax.objectives.meanflow import MeanFlow
from mf_jax.objectives.pixel_meanflow import PixelMeanFlow
from mf_jax.objectives.split_meanflow import SplitMeanFlow
from mf_jax.objectives.terminal_velocity import TerminalVelocity
from mf_jax.objectives.terms import AdaptiveWeight

FIELD = gaussian_field(lambda condition: class_mean(condition.labels))
PARAMS, OTHER = jnp.array([0.3, -0.2, 0.1, 0.4]), jnp.array([-0.1, 0.2, 0.3, -0.4])


def _noisy(seed=3):
    """Return draws off the truth, so that v is not the velocity of the flow."""
    draws = exact_draws(seed)
    noise = lambda rows: rows.replace(x=rows.x + 0.3 * jnp.cos(7 * rows.e))  # noqa: E731
    return Draws(noise(draws.instant), noise(draws.interval))


def _estimated(estimate, draws, params=PARAMS, target_params=OTHER):
    estimated = jax.jit(functools.partial(estimate.estimated, FIELD))
    return estimated(params, draws, target_params)


def _brute_force(rows, x, conditions, scale=1.0, mask=None):
    """Return the mean velocity of all paths through z_t that start at alike data, in float64."""
    found, start, noise = [], np.asarray(rows.x, np.float64), np.asarray(rows.e, np.float64)
    for i, t in enumerate(np.asarray(rows.t, np.float64)):
        z = (1 - t) * start[i] + t * noise[i]
        alike = rows.dropped[i] | np.array(conditions == rows.condition[i])
        if mask is not None:
            alike &= np.all(np.asarray(mask) == np.asarray(rows.mask)[i], axis=1)
        data = np.asarray(x, np.float64)[alike]
        log = -np.sum((z - (1 - t) * data) ** 2, axis=1) / (2 * (scale * t) ** 2)
        weight = np.exp(log - log.max())
        found.append(((weight / weight.sum())[:, None] * (z - data) / t).sum(axis=0))
    return np.array(found)


def test_the_plug_in_is_the_mean_over_alike_data():
    draws = _noisy()
    both = jax.tree.map(lambda *a: jnp.concatenate(a), draws.instant, draws.interval)
    rng = np.random.default_rng(0)
    data, labels = rng.normal(size=(50, 5)), rng.integers(0, 4, 50)
    for estimate, known in (
        (VelocityEstimate("batch", target=1.0), (both.x, both.condition)),
        (VelocityEstimate("batch", target=1.0, noise_scale=3.0), (both.x, both.condition)),
        (VelocityEstimate("data", 1.0, data=data, labels=labels), (data, labels)),
    ):
        told = _estimated(estimate, draws)
        for rows in (told.instant, told.interval):
            theirs = _brute_force(rows, *known, estimate.noise_scale)
            np.testing.assert_allclose(rows.v, theirs, rtol=2e-3, atol=2e-3)
            np.testing.assert_array_equal(rows.tangent, rows.e - rows.x)


def _masked(rows):
    """Return rows of two masks, one of which hides the last two numbers."""
    mask = (jnp.arange(5) < 3) | (jnp.arange(len(rows.t)) % 2 == 0)[:, None]
    x, e = (jnp.where(mask, each, 0) for each in (rows.x, rows.e))
    return rows.replace(x=x, e=e, mask=mask)


def test_a_plug_in_of_masked_rows_is_over_rows_of_their_mask_and_0_where_hidden():
    draws = Draws(*map(_masked, (_noisy().instant, _noisy().interval)))
    both = jax.tree.map(lambda *a: jnp.concatenate(a), draws.instant, draws.interval)
    known = {"labels": both.condition, "mask": both.mask}
    of_data = VelocityEstimate("data", 1.0, data=both.x + 9 * ~both.mask, **known)
    for estimate in (VelocityEstimate("batch", 1.0), of_data):
        told = _estimated(estimate, draws)
        for rows in (told.instant, told.interval):
            theirs = _brute_force(rows, both.x, both.condition, mask=both.mask)
            np.testing.assert_allclose(rows.v, theirs, rtol=2e-3, atol=2e-3)
            np.testing.assert_array_equal(jnp.where(rows.mask, 0, rows.v), 0)
    assert not np.allclose(told.interval.v, draws.interval.e - draws.interval.x)


def test_drawn_guidance_is_of_the_target_alone():
    """The network is asked for the scale 1 at all t, and for no class of a row without one."""
    drawn = lambda num: GuidanceScale(*(jnp.full(num, each) for each in (4.0, 0.2, 0.6)))  # noqa: E731

    def field(params, z, *, r, t, condition):
        omega, t_min, t_max = jax.tree.leaves(condition.guidance)
        return per_row(omega + 10 * t_min + 100 * t_max, z) * jnp.ones_like(z)

    draws = exact_draws(guidance=drawn)
    told = VelocityEstimate("average", target=1.0).estimated(field, PARAMS, draws, OTHER)
    for rows in (told.instant, told.interval):
        np.testing.assert_allclose(rows.v, 101)
        np.testing.assert_array_equal(rows.guidance.omega, 4)


def test_the_plug_in_nears_the_velocity_of_gaussian_data_as_they_grow_in_number():
    draws = exact_draws(5, num_interval=40, some_dropped=False)
    rows = draws.interval.replace(
        x=draws.interval.x[:, :1], e=draws.interval.e[:, :1], condition=0 * draws.interval.condition
    )
    z = interpolate(rows.x, rows.e, t=rows.t)
    truth = gaussian_velocity(z, rows.t[:, None], float(class_mean(jnp.array(0))))
    errors = []
    for num in (20, 2000, 200_000):
        data = np.random.default_rng(1).normal(float(class_mean(jnp.array(0))), STD, (num, 1))
        known = {"data": data, "labels": np.zeros(num, int)}
        estimate = VelocityEstimate("data", target=1.0, **known)
        told = _estimated(estimate, Draws(jax.tree.map(lambda a: a[:0], rows), rows)).interval
        inside = (rows.t > 0.3)[:, None]  # where many of the data count
        errors.append(float(jnp.sqrt(jnp.mean(((told.v - truth) ** 2)[inside]))))
    assert errors[0] > 3 * errors[1] > 9 * errors[2], errors
    assert errors[2] < 0.01


def test_a_batch_is_unbiased_since_a_row_is_among_its_own_data():
    """At z = 1.5, t = 0.5 of data N(0, 1), in batches of 16; with 16 others the bias is 0.35."""
    z, t, num = 1.5, 0.5, 20_000
    rng = np.random.default_rng(0)
    others = rng.standard_normal((num, 16, 1), np.float32)
    own = others.copy()
    own[:, 0] = z + 0.5**0.5 * rng.standard_normal((num, 1))  # x given z has mean z here: v is 0
    same = exact_draws(num_instant=16, num_interval=0, some_dropped=False)
    same = jax.tree.map(lambda a: a[:, :1] if a.ndim == 2 else a, same)

    def first(x):
        told = {"x": x, "e": (z - (1 - t) * x) / t, "condition": jnp.zeros(16, jnp.int32)}
        draws = same.replace(instant=same.instant.replace(t=jnp.full(16, t), **told))
        return _estimated(VelocityEstimate("batch", target=1.0), draws).instant.v[0, 0]

    bias = [float(jnp.mean(jax.jit(jax.vmap(first))(x))) for x in (own, others)]
    assert abs(bias[0]) < 0.03, bias
    assert bias[1] == pytest.approx(0.35, abs=0.03)


def test_the_networks_own_velocity_in_the_tangent_is_improved_meanflow():
    weight, draws = AdaptiveWeight(p=0.5), _noisy()
    estimate = VelocityEstimate("network", tangent=1.0)
    ours = Estimated(MeanFlow(weight=weight), estimate)
    theirs = ImprovedMeanFlow(weight=weight, velocity="boundary")
    for a, b in zip(
        *(
            jax.value_and_grad(lambda p, o=o: o.loss(FIELD, p, draws)[0])(PARAMS)
            for o in (ours, theirs)
        ),
        strict=True,
    ):
        np.testing.assert_allclose(a, b, rtol=1e-6)


def test_shares_and_averages_reach_target_and_tangent():
    draws = _noisy()
    told = _estimated(VelocityEstimate("average", target=0.25, tangent=0.5), draws)
    for rows in (told.instant, told.interval):
        v, z = rows.e - rows.x, interpolate(rows.x, rows.e, t=rows.t)
        labels = jnp.where(rows.dropped, -1, rows.condition)
        condition = Condition(labels)
        teacher = FIELD(OTHER, z, r=rows.t, t=rows.t, condition=condition).u
        np.testing.assert_allclose(rows.v, v + 0.25 * (teacher - v), rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(rows.tangent, v + 0.5 * (teacher - v), rtol=1e-5, atol=1e-6)
    network = _estimated(VelocityEstimate("network", target=1.0), draws)
    np.testing.assert_array_equal(network.instant.v, draws.instant.e - draws.instant.x)
    some = _estimated(VelocityEstimate("average", target=0.5, of_rows=True), draws).interval
    changed = np.any(some.v != some.e - some.x, axis=1)
    np.testing.assert_array_equal(changed, some.fraction * 1024 % 1 < 0.5)
    assert VelocityEstimate().estimated(FIELD, PARAMS, draws, OTHER) is draws


def test_a_teacher_is_refused_where_an_average_is_not_its_own():
    assert Estimated(MeanFlow(), VelocityEstimate("average", 1.0), ema=1.0).target_ema == 1
    for estimate, ema in (("average", 0.0), ("batch", 0.9), ("average", 1.5)):
        refuses(r"velocity\.ema", Estimated, MeanFlow(), VelocityEstimate(estimate, 1.0), ema=ema)
    with pytest.raises(BadInput, match="pixel_meanflow takes no estimate"):
        Estimated(PixelMeanFlow(), VelocityEstimate("batch", 1.0))
    guided, off = MeanFlow(guidance=Guidance(0.2, 0.9)), "network learns a guided velocity"
    for objective, estimate, ema, problem in (
        (guided, VelocityEstimate("network", tangent=1.0), 0.0, off),
        (guided, VelocityEstimate("average", 1.0), 0.9, off),
        (SplitMeanFlow(), VelocityEstimate("batch", 0.5, 0.5), 0.0, "SplitMeanFlow has no direc"),
        (ImprovedMeanFlow(), VelocityEstimate("batch", 0.5, 0.5), 0.0, "has no direction"),
        (TerminalVelocity(), VelocityEstimate("network", 0.5), 0.0, "see no velocity"),
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


def test_a_row_like_no_datum_keeps_its_own_velocity():
    draws = _noisy()
    rows = draws.interval
    is_known = rows.dropped | (rows.condition != rows.condition[-1])
    labels = jnp.where(is_known, rows.condition, 9)
    estimate = VelocityEstimate("data", 1.0, 1.0, data=rows.x, labels=labels)
    moved = np.abs(_estimated(estimate, draws).interval.v - (rows.e - rows.x)).max(axis=1)
    assert 0 < is_known.sum() < len(is_known)
    assert moved[~is_known].max() < 1e-6
    assert moved[is_known].max() > 0.01


def test_data_must_be_like_the_rows():
    draws = _noisy()
    data, labels = np.zeros((50, 5)), np.zeros(50, int)
    for more, told in (
        ({"data": data}, "for x, condition and mask of"),
        ({"data": data, "labels": labels, "mask": data > 0}, r"\(5,\)\) for"),
        ({"data": data[:, :4], "labels": labels}, r"\(4,\)"),
        ({"data": data, "labels": {"class": labels}}, "'class'"),
    ):
        with pytest.raises(BadInput, match=f"velocity.source='data': data, labels.*{told}"):
            _estimated(VelocityEstimate("data", 1.0, **more), draws)
