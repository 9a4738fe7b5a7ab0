"""How the members of the family are related, and what each alone does."""

import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracle import exact_draws, exact_rows, gaussian_field

from mf_jax.errors import BadInput
from mf_jax.flow.draws import DrawScheme, at_time, condition_of
from mf_jax.flow.guidance import Guidance, guided_velocities
from mf_jax.flow.paths import interpolate, per_row
from mf_jax.flow.records import Condition, Draws, GuidanceScale, Prediction
from mf_jax.flow.times import ConsistencyTimes, DyadicTimes, UniformTimes
from mf_jax.models import DataPrediction, as_field
from mf_jax.objectives import Controlled, Controls
from mf_jax.objectives.alpha_flow import AlphaFlow
from mf_jax.objectives.flow_matching import FlowMatching
from mf_jax.objectives.improved_meanflow import ImprovedMeanFlow
from mf_jax.objectives.meanflow import MeanFlow
from mf_jax.objectives.pixel_meanflow import PixelMeanFlow
from mf_jax.objectives.split_meanflow import SplitMeanFlow
from mf_jax.objectives.terminal_velocity import TerminalVelocity
from mf_jax.objectives.terms import AdaptiveWeight, with_derivative

STEP = jnp.int32(0)
PARAMS = np.array([0.3, -0.2, 0.1, 0.4])


@pytest.fixture(autouse=True)
def _float64():
    with jax.enable_x64(True):
        yield


def _mean(condition):
    return 0.5 * condition.labels - 0.7


FIELD = gaussian_field(_mean)


def _draws(**more):
    return exact_draws(0, 4, 4, some_dropped=False, **more)


def _value_and_gradient(objective, draws=None, step=STEP, field=FIELD):
    draws = _draws() if draws is None else draws
    (loss, _), gradient = jax.value_and_grad(
        lambda p: objective.loss(field, p, draws, step), has_aux=True
    )(jnp.asarray(PARAMS))
    return loss, gradient


def _same(a, b, rtol=1e-9):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, rtol=rtol, atol=1e-12)


def _constant_alpha(alpha, **more):
    return AlphaFlow(
        alpha_start=alpha, alpha_end=alpha, derivative_below=0.0, target_clip=1e9, **more
    )


def test_alpha_flow_becomes_meanflow():
    """Its gradient differs by a multiple of alpha, whatever the weight."""
    weight = AdaptiveWeight(p=1.0)
    _, theirs = _value_and_gradient(MeanFlow(weight=weight))
    errors = [
        np.abs(_value_and_gradient(_constant_alpha(alpha, weight=weight))[1] - theirs).max()
        for alpha in (0.04, 0.02, 0.01)
    ]
    assert errors[-1] < 0.05 * np.abs(theirs).max()
    np.testing.assert_allclose([a / b for a, b in itertools.pairwise(errors)], 2, rtol=0.1)


def test_alpha_flow_at_1_is_flow_matching():
    _, metrics = _constant_alpha(1.0).loss(FIELD, PARAMS, _draws(), STEP)
    rows = _draws().interval
    u = FIELD(
        PARAMS,
        interpolate(rows.x, rows.e, t=rows.t),
        r=rows.r,
        t=rows.t,
        condition=condition_of(rows),
    ).u
    np.testing.assert_allclose(
        metrics["u_error"].compute(), np.mean((u - (rows.e - rows.x)) ** 2), rtol=1e-6
    )
    at_once = _draws().replace(interval=rows.replace(r=rows.t))
    _same(
        _value_and_gradient(_constant_alpha(1.0), at_once),
        _value_and_gradient(FlowMatching(), at_once),
    )


def test_alpha_flow_takes_the_derivative_below_its_threshold():
    objective = AlphaFlow(anneal_from=100, anneal_to=200, target_clip=1e9)
    for step, other in (
        (100, _constant_alpha(float(objective.alpha(jnp.int32(100))))),
        (200, MeanFlow()),
    ):
        ours = _value_and_gradient(objective, step=jnp.int32(step))
        _same(ours, _value_and_gradient(other), rtol=1e-6)


def test_soflow_is_alpha_flow():
    """An exponential schedule from 0.1 to 0.002 without derivative, alpha that of the step."""
    soflow = AlphaFlow(
        annealing="exponential",
        alpha_start=0.1,
        alpha_end=0.002,
        anneal_to=100,
        derivative_below=0.0,
    )
    np.testing.assert_allclose(
        [soflow.alpha(jnp.int32(k)) for k in (0, 50, 100, 150)],
        [0.1, 0.1 * 0.02**0.5, 0.002, 0.002],
        rtol=1e-6,
    )
    alpha = float(soflow.alpha(jnp.int32(30)))
    plain = AlphaFlow(alpha_start=alpha, alpha_end=alpha, derivative_below=0.0)
    _same(_value_and_gradient(soflow, step=jnp.int32(30)), _value_and_gradient(plain), rtol=1e-6)


def test_sigmoid_falls_from_1_to_0_around_the_middle():
    objective = AlphaFlow(anneal_from=100, anneal_to=300)
    values = [float(objective.alpha(jnp.int32(k))) for k in (0, 100, 200, 300, 400)]
    np.testing.assert_allclose(values, [1, 1, 0.5, 0, 0], atol=1e-5)
    np.testing.assert_allclose(
        objective.alpha(jnp.int32(208)), 1 / (1 + np.e), rtol=1e-6
    )  # 25 * 8 / 200 = 1


def test_targets_of_alpha_flow_are_clipped():
    draws = _draws()
    side = jnp.asarray([1.0, 1.0, -1.0, -1.0])[:, None]
    far = draws.replace(interval=draws.interval.replace(e=draws.interval.e + 100 * side))
    _, metrics = AlphaFlow(target_clip=4.0, alpha_start=1.0, alpha_end=1.0).loss(
        FIELD, PARAMS, far, STEP
    )
    rows = far.interval
    u = FIELD(
        PARAMS,
        interpolate(rows.x, rows.e, t=rows.t),
        r=rows.r,
        t=rows.t,
        condition=condition_of(rows),
    ).u
    np.testing.assert_allclose(
        metrics["u_error"].compute(), np.mean((u - 4.0 * side) ** 2), rtol=1e-6
    )


def test_split_becomes_the_identity_in_t_as_its_first_part_vanishes():
    """(u - target) / share tends to u - v_hat + (t - r) du/dt along v_hat = u(z, t, t)."""
    rows = _draws().interval
    z = interpolate(rows.x, rows.e, t=rows.t)
    own = FIELD(PARAMS, z, r=rows.t, t=rows.t, condition=condition_of(rows)).u
    (u, _), du_dt = with_derivative(FIELD, PARAMS, rows, own)
    limit = u - own + per_row(rows.t - rows.r, z) * du_dt
    errors = []
    for share in (0.04, 0.02, 0.01):
        split = rows.replace(fraction=jnp.full(4, 1 - share))
        ours, target, _ = SplitMeanFlow()._parts(FIELD, PARAMS, PARAMS, split)
        errors.append(np.abs((ours - target) / share - limit).max())
    np.testing.assert_allclose([a / b for a, b in itertools.pairwise(errors)], 2, rtol=0.15)


def test_shortcut_is_the_split_at_the_midpoint():
    draws = _draws(fraction=lambda num: jnp.full(num, 0.5))
    _same(
        _value_and_gradient(SplitMeanFlow(), draws),
        _value_and_gradient(SplitMeanFlow(split="midpoint"), draws),
    )
    other = _draws(fraction=lambda num: jnp.full(num, 0.2))
    assert not np.allclose(
        _value_and_gradient(SplitMeanFlow(), other)[1],
        _value_and_gradient(SplitMeanFlow(), draws)[1],
    )


class _Bent(nn.Module):
    """Predict z + w sin(z + r - t) and its negative, as the data or as a velocity."""

    @nn.compact
    def __call__(self, z, *, r, t, condition):
        w = self.param("w", nn.initializers.ones, z.shape[-1:], jnp.float64)
        out = z + w * jnp.sin(z + per_row(r - t, z))
        return Prediction(u=out, v=-out)


def test_pixel_is_improved_under_the_change_of_variables():
    """With u = (z - x_hat) / t, for t above the clip."""
    field, draws = as_field(_Bent()), _draws()
    assert min(draws.instant.t.min(), draws.interval.t.min()) > 0.05

    def in_velocity(params, z, *, r, t, condition):
        prediction = field(params, z, r=r, t=t, condition=condition)
        return Prediction(*((z - x) / per_row(t, z) for x in prediction))

    params = {"w": jnp.linspace(0.5, 1.5, 5)}
    pixel = jax.value_and_grad(
        lambda p: PixelMeanFlow().loss(
            as_field(DataPrediction(_Bent(), t_clip=0.05)), p, draws, STEP
        )[0]
    )(params)
    improved = jax.value_and_grad(
        lambda p: ImprovedMeanFlow().loss(in_velocity, p, draws, STEP)[0]
    )(params)
    _same(pixel, improved)


def test_pixel_clips_the_velocity_near_the_data():
    draws = _draws()
    near = draws.replace(instant=draws.instant.replace(t=jnp.full(4, 0.01), r=jnp.full(4, 0.01)))
    _, metrics = PixelMeanFlow(t_clip=0.05).loss(FIELD, PARAMS, near, STEP)
    rows = near.instant
    z = interpolate(rows.x, rows.e, t=rows.t)
    u = FIELD(PARAMS, z, r=rows.t, t=rows.t, condition=condition_of(rows)).u
    np.testing.assert_allclose(
        metrics["v_error"].compute(), np.mean((u - (z - rows.x) / 0.05) ** 2), rtol=1e-6
    )


def test_improved_and_meanflow_agree_where_a_sample_has_the_networks_velocity():
    """On the truth's own velocities the tangents are the same, and so are the losses."""
    rng, truth = np.random.default_rng(1), jnp.zeros(4)
    z, labels = jnp.asarray(rng.normal(size=(4, 5))), jnp.arange(4)
    r, t = jnp.full(4, 0.2), jnp.asarray([0.3, 0.5, 0.7, 0.9])
    rows = exact_rows(z, r, t, labels, jnp.zeros(4, bool), _mean(Condition(labels)))
    draws = Draws(instant=rows.replace(r=t), interval=rows)
    ours, theirs = (
        jax.grad(lambda p, o=o: o.loss(FIELD, p, draws, STEP)[0])(truth)
        for o in (ImprovedMeanFlow(velocity="boundary"), MeanFlow())
    )
    _same(ours, theirs)


def test_terminal_velocity_looks_at_the_data_only_at_r():
    """Its other term has no data in it, only the point z_t."""
    draws = _draws()
    rows = draws.interval
    z = interpolate(rows.x, rows.e, t=rows.t)
    moved = rows.replace(
        x=z - per_row(rows.t, z), e=z + 1 - per_row(rows.t, z)
    )  # other data, the same z_t
    errors = [
        TerminalVelocity()
        .loss(FIELD, PARAMS, draws.replace(interval=interval), STEP)[1]["u_error"]
        .compute()
        for interval in (rows, moved)
    ]
    np.testing.assert_allclose(*errors, rtol=1e-6)


def _linear(slope):
    """Return a field whose derivative in z is a number."""

    def field(params, z, *, r, t, condition):
        return Prediction(u=(slope + params) * z)

    return field


@pytest.mark.parametrize(("slope", "steep"), [(3.0, 4.0), (-3.0, 4.0), (0.5, 0.0)])
def test_lipschitz_control_charges_what_exceeds_the_bound(slope, steep):
    controls = Controls(lipschitz=2.0, lipschitz_bound=1.0)
    penalty, metrics = controls.penalty(_linear(slope), jnp.zeros(()), _draws())
    np.testing.assert_allclose(penalty, 2 * steep, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(metrics["lipschitz_penalty"].compute(), steep, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("slope", [5.0, 0.5])
def test_monotone_control_charges_steps_that_fold(slope):
    draws = _draws()
    gap = np.asarray(draws.interval.t - draws.interval.r)
    expected = np.mean(np.maximum(gap * slope - 1, 0) ** 2)
    assert (expected > 0) == (slope == 5.0)
    penalty, _ = Controls(monotone=3.0).penalty(_linear(slope), jnp.zeros(()), draws)
    np.testing.assert_allclose(penalty, 3 * expected, rtol=1e-9, atol=1e-12)


def test_controls_have_a_gradient_and_add_to_any_objective():
    controls = Controls(lipschitz=2.0, lipschitz_bound=1.0)
    slope = jax.grad(lambda p: controls.penalty(_linear(3.0), p, _draws())[0])(jnp.zeros(()))
    np.testing.assert_allclose(slope, 2 * 2 * (3.0 - 1), rtol=1e-9)
    for objective in (MeanFlow(), FlowMatching()):
        both = Controlled(objective, controls)
        alone, penalty = (
            _value_and_gradient(objective)[0],
            controls.penalty(FIELD, PARAMS, _draws())[0],
        )
        np.testing.assert_allclose(_value_and_gradient(both)[0], alone + penalty, rtol=1e-9)
        assert both.learns_average == objective.learns_average
        assert both.target_ema == objective.target_ema


def test_consistency_times_end_at_the_data():
    r, t = ConsistencyTimes().sample(jax.random.key(0), 1000)
    assert (r == 0).all()
    assert abs(float(jnp.mean(jax.scipy.special.logit(t))) + 0.4) < 0.1


def test_dyadic_times_are_steps_of_a_ladder():
    r, t = DyadicTimes(levels=3).sample(jax.random.key(0), 4000)
    pairs, counts = np.unique(np.stack([r, t], 1), axis=0, return_counts=True)
    assert {tuple(pair) for pair in pairs} == {
        (i / 2**k, (i + 1) / 2**k) for k in range(4) for i in range(2**k)
    }
    whole = counts[(pairs == (0.0, 1.0)).all(axis=1)]
    assert abs(whole[0] / 4000 - 1 / 4) < 0.03


@pytest.mark.parametrize("power", [0.0, 1.0, 2.5])
def test_drawn_guidance_has_the_density_it_names(power):
    scheme = DrawScheme(UniformTimes(), 0.0, 0.0, omega_max=8.0, omega_power=power)
    draws = scheme.draw(jax.random.key(0), jnp.zeros((8000, 1)), jnp.zeros(8000, jnp.int32))
    told = draws.interval.guidance
    edges = np.linspace(1, 8, 2001)
    density = edges**-power
    mean = (np.trapezoid(edges * density, edges) / np.trapezoid(density, edges)).item()
    assert abs(told.omega.mean() - mean) < 0.1
    assert told.omega.min() >= 1
    assert told.omega.max() <= 8
    assert told.t_min.min() >= 0
    assert told.t_min.max() <= 0.5 <= told.t_max.min()
    assert told.t_max.max() <= 1


def test_more_draws_do_not_change_those_before_them():
    x, labels = jnp.zeros((8, 2)), jnp.arange(8)
    plain, told = (
        DrawScheme(UniformTimes(), omega_max=w).draw(jax.random.key(3), x, labels)
        for w in (1.0, 4.0)
    )
    assert plain.interval.guidance is None
    _same(plain.interval, told.interval.replace(guidance=None))
    assert (told.instant.guidance.t_min == 0).all()
    assert (told.instant.guidance.t_max == 1).all()
    assert (told.interval.guidance.t_min > 0).all()


def test_guidance_holds_inside_its_window_and_with_a_label():
    """Outside its interval, and without label, a row's target is its own velocity."""
    draws = _draws()
    told = GuidanceScale(
        jnp.full(4, 3.0),
        jnp.full(4, 0.0),
        draws.interval.t - jnp.asarray([0.01, -0.01, 0.01, -0.01]),
    )
    draws = Draws(
        instant=draws.instant.replace(
            guidance=told, dropped=jnp.asarray([True, False, False, True])
        ),
        interval=draws.interval.replace(guidance=told),
    )

    def of(draws):
        instant = at_time(draws.instant, draws.instant.t)
        own = jnp.zeros_like(draws.instant.x)
        return guided_velocities(
            Guidance(), FIELD, PARAMS, draws.replace(instant=instant), own_instant=own
        )

    v = of(draws)
    plain = [rows.e - rows.x for rows in (draws.instant, draws.interval)]
    assert [bool(np.allclose(a, b)) for a, b in zip(v.instant, plain[0], strict=True)] == [
        True,
        False,
        False,
        True,
    ]
    assert [bool(np.allclose(a, b)) for a, b in zip(v.interval, plain[1], strict=True)] == [
        True,
        False,
        True,
        False,
    ]


@pytest.mark.parametrize(
    ("build", "named"),
    [
        (lambda: ImprovedMeanFlow(velocity="own"), "velocity"),
        (lambda: PixelMeanFlow(t_clip=0.0), "t_clip"),
        (lambda: AlphaFlow(annealing="linear"), "annealing"),
        (lambda: AlphaFlow(alpha_start=1.5), "alpha_start"),
        (lambda: AlphaFlow(annealing="exponential"), "alpha_end"),
        (lambda: AlphaFlow(derivative_below=0.0), "alpha_end"),
        (lambda: AlphaFlow(anneal_from=5, anneal_to=5), "anneal_to"),
        (lambda: AlphaFlow(sharpness=0.0), "sharpness"),
        (lambda: AlphaFlow(target_clip=0.0), "target_clip"),
        (lambda: SplitMeanFlow(split="third"), "split"),
        (lambda: SplitMeanFlow(target_ema=1.0), "target_ema"),
        (lambda: TerminalVelocity(target_ema=-0.1), "target_ema"),
        (lambda: Controls(lipschitz=-1.0), "lipschitz"),
        (lambda: Controls(lipschitz_bound=0.0), "lipschitz_bound"),
        (lambda: ConsistencyTimes(t_std=0.0), "t_std"),
        (lambda: DyadicTimes(levels=-1), "levels"),
        (lambda: DrawScheme(UniformTimes(), omega_max=0.5), "omega_max"),
        (lambda: DrawScheme(UniformTimes(), omega_power=-1.0), "omega_power"),
        (
            lambda: ImprovedMeanFlow().loss(_linear(1.0), jnp.zeros(()), _draws(), STEP),
            "second head",
        ),
    ],
)
def test_bad_arguments_are_named(build, named):
    with pytest.raises(BadInput, match=named):
        build()
