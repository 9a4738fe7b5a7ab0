"""How the members of the family are related, and what each alone does."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import refuses
from oracle import BENT, assert_same, exact_draws, gaussian_field

from mf_jax import (
    AdaptiveWeight,
    AlphaFlow,
    Controlled,
    Controls,
    Derivative,
    Draws,
    FlowMatching,
    Guidance,
    GuidanceScale,
    ImprovedMeanFlow,
    MeanFlow,
    PixelMeanFlow,
    Shortcut,
    SplitMeanFlow,
    TerminalVelocity,
)
from mf_jax.flow.guidance import guided_velocities
from mf_jax.flow.paths import per_row
from mf_jax.flow.rows import at_instant, at_time, point_of, predict

pytestmark = pytest.mark.usefixtures("float64")
FIELD = gaussian_field(lambda condition: 0.5 * condition.labels - 0.7)


def _draws(**more):
    return exact_draws(0, 4, 4, some_dropped=False, **more)


def _value_and_gradient(objective, draws=None, step=0):
    draws = _draws() if draws is None else draws
    of_params = jax.value_and_grad(lambda p, *more: objective.loss(FIELD, p, *more)[0])
    return jax.jit(of_params)(BENT, draws, step)


def test_alpha_flow_takes_the_derivative_below_its_threshold():
    objective = AlphaFlow(anneal_from=100, anneal_to=200, target_clip=1e9)
    alpha = float(objective.alpha(100))
    ends = {"alpha_start": alpha, "alpha_end": alpha, "derivative_below": 0.0}
    at_start = dataclasses.replace(objective, **ends)
    for step, other in ((100, at_start), (200, MeanFlow())):
        ours = _value_and_gradient(objective, step=step)
        assert_same(ours, _value_and_gradient(other), rtol=1e-6)


def test_exponential_schedule_of_alpha():
    """SoFlow's exponential one; the sigmoid is recorded, see test_reference.py."""
    ends = {"alpha_start": 0.1, "alpha_end": 0.002, "derivative_below": 0.0}
    soflow = AlphaFlow(annealing="exponential", anneal_to=100, **ends)
    values = [soflow.alpha(k) for k in (0, 50, 100, 150)]
    np.testing.assert_allclose(values, [0.1, 0.1 * 0.02**0.5, 0.002, 0.002], rtol=1e-6)


def test_targets_of_alpha_flow_are_clipped():
    draws, side = _draws(), jnp.asarray([1.0, 1.0, -1.0, -1.0])[:, None]
    far = draws.replace(interval=draws.interval.replace(e=draws.interval.e + 100 * side))
    objective, rows = AlphaFlow(target_clip=4.0, alpha_start=1.0, alpha_end=1.0), far.interval
    _, metrics = objective.loss(FIELD, BENT, far)
    u = predict(FIELD, BENT, rows, point_of(rows), r=rows.r, t=rows.t).u
    error = np.mean((u - 4.0 * side) ** 2)
    np.testing.assert_allclose(metrics["u_error"].compute(), error, rtol=1e-6)


def test_a_uniform_split_may_be_the_midpoint():
    at_half, draws = _draws(fraction=lambda num: jnp.full(num, 0.5)), _draws()
    middle = _value_and_gradient(SplitMeanFlow(split="midpoint"), draws)
    assert_same(_value_and_gradient(SplitMeanFlow(), at_half), middle)
    assert not np.allclose(_value_and_gradient(SplitMeanFlow(), draws)[1], middle[1])


def test_pixel_clips_the_velocity_near_the_data():
    draws = _draws()
    near = draws.replace(instant=at_time(draws.instant, jnp.full(4, 0.01)))
    _, metrics = PixelMeanFlow(t_clip=0.05).loss(FIELD, BENT, near)
    v = (point_of(near.instant) - near.instant.x) / 0.05
    error = np.mean((at_instant(FIELD, BENT, near.instant).u - v) ** 2)
    np.testing.assert_allclose(metrics["v_error"].compute(), error, rtol=1e-6)


def _linear(slope):
    """Return a field whose derivative in z is a number."""
    return lambda params, z, **told: (slope + params) * z


def test_shortcut_clips_the_middle_and_the_target():
    rows, c = _draws().interval, 0.3
    z = point_of(rows)
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
    steep = jax.grad(lambda p: controls.penalty(_linear(-3.0), p, draws)[0])(jnp.zeros(()))
    apart = -2 * 4 * np.mean(3 * gap**2)
    np.testing.assert_allclose(steep, 2 * -2 * (3.0 - 1) + apart, rtol=1e-9)


def test_controls_add_to_any_objective_and_are_of_what_it_learns():
    controls, draws = Controls(lipschitz=2.0, lipschitz_bound=1e-6), _draws()
    bent = lambda params, z, *, r, t, condition: z * per_row(t - r, z)  # noqa: E731
    for objective in (MeanFlow(), FlowMatching()):
        both, is_map = Controlled(objective, controls), objective.learns_average
        added, _ = controls.penalty(FIELD, BENT, draws, is_map=is_map)
        loss, alone = (o.loss(FIELD, BENT, draws)[0] for o in (both, objective))
        np.testing.assert_allclose(loss, alone + added, rtol=1e-9)
        assert (both.learns_average, both.target_ema) == (is_map, objective.target_ema)
        of_r_alone, _ = controls.penalty(bent, None, draws, is_map=is_map)
        assert (of_r_alone > 1e-9) == is_map


def test_networks_are_told_where_forward_mode_follows_without_a_gradient():
    for objective, expected in (
        (MeanFlow(), {False, True}),
        (MeanFlow(derivative=Derivative("backward")), {False}),
        (TerminalVelocity(), {False}),
    ):
        seen = set()

        def field(params, z, *, condition, seen=seen, **times):
            seen.add(condition.forward_mode)
            return FIELD(params, z, condition=condition, **times)

        objective.loss(field, BENT, _draws())
        assert seen == expected, objective


def test_guidance_holds_inside_its_window_and_with_a_label():
    """Outside its interval, and without label, a row's target is its own velocity."""
    draws = _draws()
    ends = draws.interval.t - jnp.asarray([0.01, -0.01, 0.01, -0.01])
    scale = GuidanceScale(jnp.full(4, 3.0), jnp.zeros(4), ends)
    instant = draws.instant.replace(guidance=scale, dropped=jnp.asarray([True, False, False, True]))
    draws = Draws(at_time(instant, instant.t), draws.interval.replace(guidance=scale))
    own = jnp.zeros_like(instant.x)
    for guidance in (Guidance(), Guidance(fade=True)):  # which is of fixed guidance
        v = guided_velocities(guidance, FIELD, BENT, draws, own_instant=own)
        for rows, guided, is_plain in (
            (draws.instant, v.instant, [True, False, False, True]),
            (draws.interval, v.interval, [True, False, True, False]),
        ):
            close = np.isclose(guided, rows.e - rows.x).all(axis=1)
            np.testing.assert_array_equal(close, is_plain)
    low, _, high, _ = jnp.sort(draws.interval.t)
    rows = draws.interval.replace(guidance=None)
    fixed = Guidance(2.0, t_min=float(low) + 1e-6, t_max=float(high))
    own = Draws(instant.replace(guidance=None), rows)
    v = guided_velocities(fixed, FIELD, BENT, own, own_instant=rows.x).interval
    is_plain = (rows.t < fixed.t_min) | (rows.t > high)
    np.testing.assert_array_equal(np.isclose(v, rows.e - rows.x).all(axis=1), is_plain)
    assert is_plain.sum() == 2


def test_bad_arguments_are_named():
    rows = _draws().interval
    told = _draws().replace(interval=rows.replace(guidance=GuidanceScale(rows.t, rows.t, rows.t)))
    for record, bad in (
        (MeanFlow, {"tangent": "v99"}),
        (Guidance, {"kappa": 1.0, "omega": float("nan")}),
        (AdaptiveWeight, {"p": -1.0, "c": 0.0}),
        (ImprovedMeanFlow, {"velocity": "own"}),
        (PixelMeanFlow, {"t_clip": 0.0}),
        (AlphaFlow, {"annealing": "linear", "alpha_start": 1.5, "target_clip": 0.0}),
        (SplitMeanFlow, {"split": "third", "target_ema": 1.0}),
        (Shortcut, {"target_clip": 0.0}),
        (TerminalVelocity, {"target_ema": -0.1}),
        (Controls, {"non_expansive": -1.0, "lipschitz_bound": 0.0}),
    ):
        for key, value in bad.items():
            refuses(rf"\b{key}=", record, **{key: value})
    refuses("t_min", Guidance, t_min=0.8, t_max=0.2)
    refuses("alpha_end", AlphaFlow, annealing="exponential")
    refuses("alpha_end", AlphaFlow, derivative_below=0.0)
    refuses(r"anneal_from=5: must be .*0, 5\)", AlphaFlow, anneal_from=5, anneal_to=5)
    refuses("one scale of guidance", Shortcut().loss, FIELD, BENT, told)
    refuses("guided at every t", Shortcut, Guidance(2.0, t_max=0.5))
    refuses("second head", ImprovedMeanFlow().loss, _linear(1.0), 0.0, _draws())
