"""How the members of the family are related, and what each alone does."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import refuses
from oracle import exact_draws, gaussian_field

from mf_jax.flow.guidance import Guidance, guided_velocities
from mf_jax.flow.paths import interpolate, per_row
from mf_jax.flow.records import Draws, GuidanceScale, Prediction
from mf_jax.flow.rows import at_time, condition_of
from mf_jax.objectives import Controlled, Controls
from mf_jax.objectives.alpha_flow import AlphaFlow
from mf_jax.objectives.flow_matching import FlowMatching
from mf_jax.objectives.improved_meanflow import ImprovedMeanFlow
from mf_jax.objectives.meanflow import MeanFlow
from mf_jax.objectives.pixel_meanflow import PixelMeanFlow
from mf_jax.objectives.shortcut import Shortcut
from mf_jax.objectives.split_meanflow import SplitMeanFlow
from mf_jax.objectives.terminal_velocity import TerminalVelocity

pytestmark = pytest.mark.usefixtures("float64")
STEP = jnp.int32(0)
PARAMS = np.array([0.3, -0.2, 0.1, 0.4])


FIELD = gaussian_field(lambda condition: 0.5 * condition.labels - 0.7)


def _draws(**more):
    return exact_draws(0, 4, 4, some_dropped=False, **more)


def _value_and_gradient(objective, draws=None, *, step=STEP, field=FIELD, params=PARAMS):
    draws = _draws() if draws is None else draws
    of_params = jax.value_and_grad(lambda p, *more: objective.loss(field, p, *more)[0])
    return jax.jit(of_params)(params, draws, step)


def _same(a, b, rtol=1e-9):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, rtol=rtol, atol=1e-12)


def _constant_alpha(alpha):
    return AlphaFlow(alpha_start=alpha, alpha_end=alpha, derivative_below=0.0, target_clip=1e9)


def test_alpha_flow_at_1_is_flow_matching():
    draws = _draws()
    at_once = draws.replace(interval=at_time(draws.interval, draws.interval.t))
    _same(
        _value_and_gradient(_constant_alpha(1.0), at_once),
        _value_and_gradient(FlowMatching(), at_once),
    )


def test_alpha_flow_takes_the_derivative_below_its_threshold():
    objective = AlphaFlow(anneal_from=100, anneal_to=200, target_clip=1e9)
    at_start = _constant_alpha(float(objective.alpha(jnp.int32(100))))
    for step, other in ((100, at_start), (200, MeanFlow())):
        ours = _value_and_gradient(objective, step=jnp.int32(step))
        _same(ours, _value_and_gradient(other), rtol=1e-6)


def test_exponential_schedule_of_alpha():
    """SoFlow's exponential one; the sigmoid is recorded, see test_successors_reference.py."""
    ends = {"alpha_start": 0.1, "alpha_end": 0.002, "derivative_below": 0.0}
    soflow = AlphaFlow(annealing="exponential", anneal_to=100, **ends)
    values = [soflow.alpha(jnp.int32(k)) for k in (0, 50, 100, 150)]
    np.testing.assert_allclose(values, [0.1, 0.1 * 0.02**0.5, 0.002, 0.002], rtol=1e-6)


def test_targets_of_alpha_flow_are_clipped():
    draws = _draws()
    side = jnp.asarray([1.0, 1.0, -1.0, -1.0])[:, None]
    far = draws.replace(interval=draws.interval.replace(e=draws.interval.e + 100 * side))
    objective = AlphaFlow(target_clip=4.0, alpha_start=1.0, alpha_end=1.0)
    _, metrics = objective.loss(FIELD, PARAMS, far, STEP)
    rows, z = far.interval, interpolate(far.interval.x, far.interval.e, t=far.interval.t)
    u = FIELD(PARAMS, z, r=rows.r, t=rows.t, condition=condition_of(rows)).u
    error = np.mean((u - 4.0 * side) ** 2)
    np.testing.assert_allclose(metrics["u_error"].compute(), error, rtol=1e-6)


def test_shortcut_is_the_split_at_the_midpoint():
    draws = _draws(fraction=lambda num: jnp.full(num, 0.5))
    middle = _value_and_gradient(SplitMeanFlow(), draws)
    _same(middle, _value_and_gradient(SplitMeanFlow(split="midpoint"), draws))
    other = _draws(fraction=lambda num: jnp.full(num, 0.2))
    assert not np.allclose(_value_and_gradient(SplitMeanFlow(), other)[1], middle[1])


def test_pixel_clips_the_velocity_near_the_data():
    draws = _draws()
    near = draws.replace(instant=draws.instant.replace(t=jnp.full(4, 0.01), r=jnp.full(4, 0.01)))
    _, metrics = PixelMeanFlow(t_clip=0.05).loss(FIELD, PARAMS, near, STEP)
    rows = near.instant
    z = interpolate(rows.x, rows.e, t=rows.t)
    u = FIELD(PARAMS, z, r=rows.t, t=rows.t, condition=condition_of(rows)).u
    error = np.mean((u - (z - rows.x) / 0.05) ** 2)
    np.testing.assert_allclose(metrics["v_error"].compute(), error, rtol=1e-6)


def _linear(slope):
    """Return a field whose derivative in z is a number."""

    def field(params, z, *, r, t, condition):
        return Prediction(u=(slope + params) * z)

    return field


def test_shortcut_clips_the_middle_and_the_target():
    rows, c = _draws().interval, 0.3
    z = interpolate(rows.x, rows.e, t=rows.t)
    point = jnp.clip(z - per_row(rows.t - rows.r, z) / 2 * 0.5 * z, -c, c)
    _, target, _ = Shortcut(target_clip=c)._parts(_linear(0.5), 0.0, 0.0, rows)
    np.testing.assert_allclose(target, jnp.clip((0.5 * z + 0.5 * point) / 2, -c, c), rtol=1e-9)
    assert len(np.unique(np.abs(target))) > 2


def test_controls_charge_slopes_beyond_the_bound_and_steps_that_fold():
    draws = _draws()
    gap = np.asarray(draws.interval.t - draws.interval.r)
    controls = Controls(lipschitz=2.0, lipschitz_bound=1.0, monotone=3.0, non_expansive=4.0)
    for slope, steep in ((5.0, 16.0), (-3.0, 4.0), (0.5, 0.0)):
        folded = np.mean(np.maximum(gap * slope - 1, 0) ** 2)
        assert (folded > 0) == (slope == 5.0)
        apart = np.mean(np.maximum(np.abs(1 - gap * slope) - 1, 0) ** 2)
        penalty, metrics = controls.penalty(_linear(slope), jnp.zeros(()), draws)
        total = 2 * steep + 3 * folded + 4 * apart
        np.testing.assert_allclose(penalty, total, rtol=1e-9, atol=1e-12)
        charged = metrics["lipschitz_penalty"].compute()
        np.testing.assert_allclose(charged, steep, rtol=1e-6, atol=1e-12)


def test_controls_have_a_gradient_and_add_to_any_objective():
    controls = Controls(lipschitz=2.0, lipschitz_bound=1.0)
    slope = jax.grad(lambda p: controls.penalty(_linear(3.0), p, _draws())[0])(jnp.zeros(()))
    np.testing.assert_allclose(slope, 2 * 2 * (3.0 - 1), rtol=1e-9)
    penalties = []
    for objective in (MeanFlow(), FlowMatching()):
        both, is_map = Controlled(objective, controls), objective.learns_average
        added, _ = controls.penalty(FIELD, PARAMS, _draws(), is_map=is_map)
        penalties.append(float(added))
        loss, alone = (o.loss(FIELD, PARAMS, _draws())[0] for o in (both, objective))
        np.testing.assert_allclose(loss, alone + added, rtol=1e-9)
        assert both.learns_average == objective.learns_average
        assert both.target_ema == objective.target_ema
    assert abs(penalties[0] - penalties[1]) > 1e-3
    at_r = dataclasses.replace(controls, lipschitz_bound=1e-6)  # of a slope that r alone changes
    bent = lambda params, z, *, r, t, condition: z * per_row(t - r, z)  # noqa: E731
    of_map, of_flow = (at_r.penalty(bent, None, _draws(), is_map=k)[0] for k in (True, False))
    assert of_flow < 1e-9 < of_map


def test_guidance_holds_inside_its_window_and_with_a_label():
    """Outside its interval, and without label, a row's target is its own velocity."""
    draws = _draws()
    ends = draws.interval.t - jnp.asarray([0.01, -0.01, 0.01, -0.01])
    scale = GuidanceScale(jnp.full(4, 3.0), jnp.zeros(4), ends)
    instant = draws.instant.replace(guidance=scale, dropped=jnp.asarray([True, False, False, True]))
    draws = Draws(at_time(instant, instant.t), draws.interval.replace(guidance=scale))
    own = jnp.zeros_like(instant.x)
    for guidance in (Guidance(), Guidance(fade=True)):  # which is of fixed guidance
        v = guided_velocities(guidance, FIELD, PARAMS, draws, own_instant=own)
        for rows, guided, is_plain in (
            (draws.instant, v.instant, [True, False, False, True]),
            (draws.interval, v.interval, [True, False, True, False]),
        ):
            close = np.isclose(guided, rows.e - rows.x).all(axis=1)
            np.testing.assert_array_equal(close, is_plain)


def test_bad_arguments_are_named():
    rows = _draws().interval
    told = _draws().replace(interval=rows.replace(guidance=GuidanceScale(rows.t, rows.t, rows.t)))
    for build, named in [
        (lambda: ImprovedMeanFlow(velocity="own"), "velocity"),
        (lambda: PixelMeanFlow(t_clip=0.0), "t_clip"),
        (lambda: AlphaFlow(annealing="linear"), "annealing"),
        (lambda: AlphaFlow(alpha_start=1.5), "alpha_start"),
        (lambda: AlphaFlow(annealing="exponential"), "alpha_end"),
        (lambda: AlphaFlow(derivative_below=0.0), "alpha_end"),
        (lambda: AlphaFlow(anneal_from=5, anneal_to=5), "anneal_to"),
        (lambda: AlphaFlow(target_clip=0.0), "target_clip"),
        (lambda: SplitMeanFlow(split="third"), "split"),
        (lambda: SplitMeanFlow(target_ema=1.0), "target_ema"),
        (lambda: Shortcut(target_clip=0.0), "target_clip"),
        (lambda: Shortcut().loss(FIELD, PARAMS, told, STEP), "one scale of guidance"),
        (lambda: Shortcut(Guidance(2.0, t_max=0.5)), "guided at every t"),
        (lambda: TerminalVelocity(target_ema=-0.1), "target_ema"),
        (lambda: Controls(non_expansive=-1.0), "non_expansive"),
        (lambda: Controls(lipschitz_bound=0.0), "lipschitz_bound"),
        (lambda: ImprovedMeanFlow().loss(_linear(1.0), 0.0, _draws(), STEP), "second head"),
    ]:
        refuses(named, build)
