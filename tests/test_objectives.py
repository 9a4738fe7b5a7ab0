"""Objectives against closed forms: the Gaussian oracle, plainly read equations, and mutations."""

import functools
import importlib
import inspect
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracle import BENT as BENT_PARAMS
from oracle import STD, class_mean, exact_draws, gaussian_field

import mf_jax.objectives
from mf_jax import AdaptiveWeight, Draws, Guidance, GuidanceScale, MeanFlow, Rows
from mf_jax.flow.paths import interpolate, per_row, velocity
from mf_jax.flow.records import NO_LABEL
from mf_jax.flow.rows import at_instant, condition_of
from mf_jax.objectives import OBJECTIVES
from mf_jax.objectives.meanflow import TANGENTS

PLAIN, GUIDED, SCALED = Guidance(), Guidance(omega=1.5, kappa=0.5), Guidance(omega=2.0)


@pytest.fixture(autouse=True)
def _branches_in_python(monkeypatch, float64):
    monkeypatch.setattr(jax.lax, "cond", lambda pred, true, false: true() if pred else false())


@functools.cache
def _guided_mean(guidance):
    """Return the means that a guided network describes: its velocity is a fixed point of guidance.

    v* = omega v + kappa v* + (1 - omega - kappa) v_null is linear in the mean; a drawn scale w is
    omega = 1, kappa = 1 - 1/w.
    """

    def mean(condition):
        labels, drawn = condition.labels, condition.guidance
        omega, kappa = (guidance.omega, guidance.kappa)
        if drawn is not None:
            omega, kappa = 1.0, 1 - 1 / drawn.omega
        null = class_mean(jnp.full_like(labels, NO_LABEL))
        guided = (omega * class_mean(labels) + (1 - omega - kappa) * null) / (1 - kappa)
        return jnp.where(labels == NO_LABEL, null, guided)

    return mean


def _scale(omega, num):
    """Return a drawn guidance scale for each row, over the whole interval; None for None."""
    if omega is None:
        return None
    return GuidanceScale(jnp.linspace(1.0, omega, num), jnp.zeros(num), jnp.ones(num))


@functools.cache
def _exact_draws(drawn_omega):
    return exact_draws(guidance=functools.partial(_scale, drawn_omega))


def _residual(objective, guidance, drawn_omega=None):
    field = gaussian_field(_guided_mean(guidance))
    _, metrics = objective.loss(field, jnp.zeros(4), _exact_draws(drawn_omega))
    names = ["u_error", "v_error", "head_error"]
    return max(abs(float(metrics[name].compute())) for name in names if name in metrics)


def _mean_gradient(objective, guidance, drawn_omega=None, label=2):
    """Return the gradient at the truth, averaged by Gauss-Hermite quadrature."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(20)
    x, e = (a.ravel() for a in np.meshgrid(nodes, nodes))
    mass = np.outer(weights, weights).ravel() / weights.sum() ** 2
    x = STD * x + float(class_mean(jnp.int32(label)))
    field = gaussian_field(_guided_mean(guidance))
    drawn = jax.tree.map(lambda leaf: leaf[1:], _scale(drawn_omega, 2))

    told = {"condition": jnp.int32([label]), "null": jnp.int32([NO_LABEL]), "guidance": drawn}
    told |= {"fraction": jnp.array([0.3]), "dropped": jnp.array([False]), "for_networks": True}

    def loss(params, x, e, r, t):
        row = lambda r: Rows(x[None, None], e[None, None], t[None], r[None], **told)  # noqa: E731
        return objective.loss(field, params, Draws(instant=row(t), interval=row(r)))[0]

    over_points = jax.vmap(jax.grad(loss), in_axes=(None, 0, 0, None, None))
    over_times = jax.vmap(over_points, in_axes=(None, None, None, 0, 0))
    r, t = jnp.array([0.1, 0.0, 0.45]), jnp.array([0.7, 1.0, 0.5])
    gradients = over_times(jnp.zeros(4), jnp.asarray(x), jnp.asarray(e), r, t)
    return float(np.abs(np.einsum("n,tnp->tp", mass, gradients)).max())


SETTINGS = {
    "boundary": {"velocity": "boundary"},
    "head": {"velocity": "head"},
    "derivative": {"alpha_start": 0.0, "alpha_end": 0.0, "target_clip": 1e9},
    "step": {"alpha_start": 0.02, "alpha_end": 0.02, "derivative_below": 0.0, "target_clip": 1e9},
    "midpoint": {"split": "midpoint"},
    "uniform": {"split": "uniform"},
    "unclipped": {"target_clip": 1e9},
    "clipped": {"velocity": "head", "t_clip": 0.01},
    "": {},
}
NAMES = {name: record.__name__ for name, record in OBJECTIVES.items()}


def _make(module, name, guidance, setting="", p=0.0):
    record, weight = getattr(module, NAMES[name]), module.terms.AdaptiveWeight(p=p)
    more = dict(SETTINGS[setting])
    if record.guidable:
        of_module = type(record.guidance)  # the mutated one
        more["guidance"] = of_module(guidance.omega, guidance.kappa)
    return record(weight=weight, **more)


def _module(name):
    return sys.modules[OBJECTIVES[name].__module__]


CASES = [
    ("flow_matching", "", PLAIN, None),
    ("meanflow", "", PLAIN, None),
    ("meanflow", "", GUIDED, None),
    ("meanflow", "", SCALED, None),
    ("meanflow", "", PLAIN, 3.0),
    ("improved_meanflow", "boundary", GUIDED, None),
    ("improved_meanflow", "head", PLAIN, None),
    ("improved_meanflow", "head", PLAIN, 3.0),
    ("pixel_meanflow", "clipped", PLAIN, 3.0),
    ("alpha_flow", "derivative", GUIDED, None),
    ("split_meanflow", "uniform", GUIDED, None),
    ("split_meanflow", "midpoint", SCALED, None),
    ("shortcut", "unclipped", PLAIN, None),
    ("terminal_velocity", "", GUIDED, None),
]


@pytest.mark.parametrize(("name", "setting", "guidance", "drawn_omega"), CASES)
def test_no_residual_and_no_mean_gradient_at_the_truth(name, setting, guidance, drawn_omega):
    objective = _make(_module(name), name, guidance, setting)
    assert _residual(objective, guidance, drawn_omega) < 1e-12
    assert _mean_gradient(objective, guidance, drawn_omega) < 1e-8


def _constant_targets(name, setting, field, params, draws, teacher):
    """Return functions of the parameters, and their targets away from any gradient."""
    instant, interval = draws.instant, draws.interval
    r, t, condition = interval.r, interval.t, condition_of(interval)
    z, v = interpolate(interval.x, interval.e, t=t), velocity(interval.x, interval.e)
    gap = per_row(t - r, z)

    def u(params, z, r, t):
        return field(params, z, r=r, t=t, condition=condition).u

    def at_t(params, rows, time):
        z = interpolate(rows.x, rows.e, t=time)
        return field(params, z, r=time, t=time, condition=condition_of(rows)).u

    def along(tangent, params):
        return jax.jvp(functools.partial(u, params), (z, r, t), tangent)

    still = jnp.zeros_like(r), jnp.ones_like(t)
    pairs = [(lambda p: at_t(p, instant, instant.t), velocity(instant.x, instant.e))]
    target = v  # of flow matching
    if name == "meanflow" or setting == "derivative":
        target = v - gap * along((v, *still), params)[1]
    elif name == "improved_meanflow":
        target = v - gap * along((u(params, z, t, t), *still), params)[1]
    elif name == "alpha_flow":
        a = SETTINGS[setting]["alpha_start"]
        s = t - a * (t - r)
        target = a * v + (1 - a) * u(teacher, z - per_row(t - s, z) * v, r, s)
    elif name in ("split_meanflow", "shortcut"):
        s = (r + t) / 2 if name == "shortcut" else r + interval.fraction * (t - r)
        first = u(teacher, z, s, t)
        second = u(teacher, z - per_row(t - s, z) * first, r, s)
        target = (per_row(t - s, z) * first + per_row(s - r, z) * second) / gap
    elif name == "terminal_velocity":
        end = z - gap * u(params, z, r, t)
        moves = (jnp.zeros_like(z), jnp.ones_like(r), jnp.zeros_like(t))

        def side(p):
            value, derivative = along(moves, p)
            return value - gap * derivative

        return [*pairs, (side, u(teacher, end, r, r))]
    return [*pairs, (lambda p: u(p, z, r, t), target)]


BENT = [(name, "") for name in ("flow_matching", "meanflow", "terminal_velocity")]
BENT += [("alpha_flow", "derivative"), ("alpha_flow", "step"), ("split_meanflow", "uniform")]
BENT += [("shortcut", "unclipped"), ("improved_meanflow", "boundary")]
TEACHER_PARAMS = np.array([-0.1, 0.3, 0.2, -0.3])


def _departure(module, name, setting, *, with_teacher=False):
    """Return how far the gradient, off the truth, is from the one with constant targets."""
    field, draws = gaussian_field(_guided_mean(PLAIN)), _exact_draws(None)
    interval = draws.interval.replace(dropped=jnp.zeros(3, bool), x=draws.interval.x + 0.3)
    if name == "flow_matching":
        interval = interval.replace(r=interval.t)
    draws = draws.replace(interval=interval)
    objective = _make(module, name, PLAIN, setting, p=0.75)
    params = jnp.asarray(BENT_PARAMS)
    teacher = jnp.asarray(TEACHER_PARAMS) if with_teacher else params
    scale = SETTINGS[setting]["alpha_start"] if setting == "step" else 1.0
    pairs = _constant_targets(name, setting, field, params, draws, teacher)

    def plain(p):
        total = 0.0
        for i, (predict, target) in enumerate(pairs):
            a = scale if i > 0 else 1.0
            error = jnp.sum((predict(p) - target) ** 2, axis=1) / a**2
            weight = jax.lax.stop_gradient((error + objective.weight.c) ** -0.75)
            rows = len(error) if name == "terminal_velocity" else 9  # its terms are two means
            total += a * jnp.sum(error * weight) / rows
        return total

    given = (0, teacher) if with_teacher else ()
    ours = jax.grad(lambda p: objective.loss(field, p, draws, *given)[0])(params)
    theirs = jax.grad(plain)(params)
    return float(jnp.abs(ours - theirs).max() / jnp.abs(theirs).max())


@pytest.mark.parametrize(("name", "setting"), BENT)
def test_gradient_is_that_of_constant_targets_by_the_teachers_parameters(name, setting):
    assert _departure(_module(name), name, setting) < 1e-6
    if name in ("split_meanflow", "shortcut", "terminal_velocity") or setting == "step":
        assert _departure(_module(name), name, setting, with_teacher=True) < 1e-6


TERMS, PATHS, GUIDANCE = "objectives.terms", "flow.paths", "flow.guidance"
ROWS, DERIVATIVE = "flow.rows", "flow.derivative"
_STOPS = [
    (TERMS, "jax.lax.stop_gradient((error", "((error"),
    (TERMS, "jax.lax.stop_gradient(target)", "(target)"),
]
MUTATIONS = {
    **{(name, setting, PLAIN, None): _STOPS for name, setting in BENT if name != "flow_matching"},
    ("flow_matching", "", PLAIN, None): [
        _STOPS[0],
        ("", "velocity_of(rows))", "-velocity_of(rows))"),
        (ROWS, "rows.e, t=rows.t)", "rows.e, t=rows.r)"),
    ],
    ("meanflow", "", GUIDED, None): [
        (GUIDANCE, "1 - self.omega - self.kappa", "1 - self.omega + self.kappa"),
        (GUIDANCE, "guidance.kappa * v_class", "guidance.omega * v_class"),
        (GUIDANCE, "| ~rows.dropped", "| rows.dropped"),
        (GUIDANCE, "unconditional(rows) if is_null", "rows if is_null"),
        (ROWS, "jnp.ones_like(rows.dropped)", "rows.dropped"),
        (GUIDANCE, "[_taught(interval)]", "[_taught(interval, is_null=True)]"),
        (PATHS, "(1 - t) * x", "(1 + t) * x"),
        (PATHS, "return e - x", "return x - e"),
        ("", "v.interval - ramp", "v.interval + ramp"),
        ("", "rows.t - rows.r", "rows.t + rows.r"),
        ("", '"v01": (1.0, 0.0, 1.0)', '"v01": (1.0, 1.0, 1.0)'),
        ("", '"v01": (1.0, 0.0, 1.0)', '"v01": (1.0, 0.0, 0.0)'),
        ("", "rows, v.tangent, tangent", "rows, rows.e, tangent"),
        (ROWS, "r=rows.t, t=rows.t", "r=rows.t * 0, t=rows.t"),
        (DERIVATIVE, "dz * velocity", "dr * velocity"),
    ],
    ("improved_meanflow", "head", PLAIN, 3.0): [
        (GUIDANCE, "1 - 1 / drawn.omega", "1 + 1 / drawn.omega"),
        (GUIDANCE, "(v_class - v_null)", "(v_class + v_null)"),
        (GUIDANCE, "guidance), rows.guidance.omega, 1)", "guidance), 1, rows.guidance.omega)"),
    ],
    ("improved_meanflow", "boundary", GUIDED, None): [
        ("", "v.interval - per_row(", "v.interval + per_row("),
        ("", "rows, v.own,", "rows, v.interval,"),
    ],
    ("improved_meanflow", "head", PLAIN, None): [
        ("", "(own, v.instant)", "(own, v.instant * 2)"),
        ("", "(read(at_r), v.interval)", "(read(at_r), v.interval * 2)"),
        ("", "(at_r.u, target)", "(at_r.v, target)"),
    ],
    ("pixel_meanflow", "clipped", PLAIN, None): [
        ("", "(z - rows.x) /", "(z + rows.x) /"),
        ("", "jnp.maximum(rows.t, self.t_clip)", "jnp.minimum(rows.t, self.t_clip)"),
        ("", "x=z - per_row(", "x=z + per_row("),
        ("", "per_row(1 - rows.t", "per_row(1 + rows.t"),
    ],
    ("alpha_flow", "derivative", GUIDED, None): [
        ("", "v.interval - per_row(", "v.interval + per_row("),
        ("", "< self.derivative_below\n            u", "> self.derivative_below\n            u"),
        ("", "jnp.where(is_short, 1.0, a)", "jnp.where(is_short, 2.0, a)"),
    ],
    ("alpha_flow", "step", GUIDED, None): [
        ("", "rows.t - a * (rows.t - rows.r)", "rows.t - a * (rows.t + rows.r)"),
        ("", "+ (1 - share) * u_s", "+ (1 + share) * u_s"),
        ("", "z_s, r=rows.r, t=s)", "z_s, r=rows.r, t=rows.t)"),
        ("", "u_error = error / a**2", "u_error = error"),
        ("", "self.interval_factor * a *", "self.interval_factor *"),
    ],
    ("split_meanflow", "uniform", SCALED, None): [
        ("", "t - share * (t - r)", "t - share * (t + r)"),
        ("", "weight * first + (1 - weight)", "weight * first + (1 + weight)"),
        ("", "z, r=s, t=t", "z, r=r, t=t"),
        ("", "advance(z, first, r=s", "advance(z, first, r=r"),
    ],
    ("shortcut", "unclipped", PLAIN, None): [
        ("", "(r + t) / 2, point", "(r + t) / 3, point"),
        ("", "first + second) / 2", "first + second) / 3"),
        ("", "advance(z, first, r=s", "advance(z, first, r=t"),
        ("", "velocity_of(draws.instant)", "-velocity_of(draws.instant)"),
    ],
    ("terminal_velocity", "", GUIDED, None): [
        ("", "squared_error(u - per_row(", "squared_error(u + per_row("),
        ("", "(0.0, 1.0, 0.0)", "(0.0, 1.0, 1.0)"),
        ("", "at_time(interval, interval.r)", "at_time(interval, interval.t)"),
        ("", "squared_error(u_instant, v)", "squared_error(u_instant, v * 2)"),
    ],
}


def _load_mutated(monkeypatch, name, target, old, new):
    """Return the objective's module, on copies of modules, one with a token replaced."""
    chain = [PATHS, ROWS, DERIVATIVE, GUIDANCE, TERMS]
    chain += ["objectives.improved_meanflow"] * (name == "pixel_meanflow")
    chain.append(f"objectives.{name}")
    for short in chain:
        full = f"mf_jax.{short}"
        source = inspect.getsource(importlib.import_module(full))
        if short == target:
            assert old in source, f"{full} does not contain {old!r} any more: update the mutation"
            source = source.replace(old, new)
        module = types.ModuleType(full)
        monkeypatch.setitem(sys.modules, full, module)
        if short == TERMS:
            monkeypatch.setattr(mf_jax.objectives, "terms", module)
        exec(compile(source, full, "exec"), module.__dict__)
    return sys.modules[f"mf_jax.objectives.{name}"]


def _worst(module, name, setting, guidance, drawn_omega):
    """Return the worst of the measures, cheap ones first, up to the first that sees a fault."""
    objective = _make(module, name, guidance, setting)
    exact = setting != "step"  # which is exact only where the step vanishes
    measures = [lambda: _residual(objective, guidance, drawn_omega)] * exact
    if (name, setting) in BENT:
        measures.append(lambda: _departure(module, name, setting))
    measures += [lambda: _mean_gradient(objective, guidance, drawn_omega)] * exact
    worst = 0.0
    for measure in measures:
        worst = max(worst, float(np.nan_to_num(measure(), nan=np.inf)))
        if worst > 1e-4:
            break
    return worst


@pytest.mark.parametrize("case", MUTATIONS, ids=lambda case: "-".join(map(str, case[:2])))
def test_oracle_catches_mutations(case):
    name, *settings = case
    # copies without a mutation are exact: one case tells, since all are made alike
    whole = [("none", "", "")] * (name == "pixel_meanflow")
    for target, old, new in [*whole, *MUTATIONS[case]]:
        with pytest.MonkeyPatch.context() as patch:
            module = _load_mutated(patch, name, target or f"objectives.{name}", old, new)
            worst = _worst(module, name, *settings)
        assert (worst > 1e-4) == bool(old), f"{old!r} -> {new!r} in {target or name}: {worst:.1e}"


def test_wrong_tangents_have_a_residual():
    for tangent in set(TANGENTS) - {"v01"}:
        objective = MeanFlow(weight=AdaptiveWeight(p=0.0), tangent=tangent)
        assert _residual(objective, PLAIN) > 1e-3, tangent


FIELD = gaussian_field(_guided_mean(PLAIN))


def _off_draws(*sizes):
    instant, interval = (draws := exact_draws(1, *sizes)).instant, draws.interval
    return Draws(instant.replace(x=instant.x + 0.3), interval.replace(x=interval.x - 0.2))


def test_intervals_too_short_for_floats_and_parts_without_rows_are_no_divergence():
    """SoFlow's step is a share of one, and may end where it began."""
    draws, params = _off_draws(2, 3), jnp.array(BENT_PARAMS)
    rows, t = draws.interval, draws.interval.t
    short = [draws.replace(interval=rows.replace(r=r)) for r in (t, jnp.nextafter(t, 0 * t))]

    def field(params, z, **told):
        assert len(z), "a field is asked of no rows"
        return FIELD(params, z, **told)

    assert {name for name, *_ in CASES} == set(OBJECTIVES)
    for name, setting in dict.fromkeys([*(case[:2] for case in CASES), ("alpha_flow", "step")]):
        objective = _make(_module(name), name, PLAIN, setting)
        loss = jax.value_and_grad(functools.partial(objective.loss, field), has_aux=True)
        for each in (*short, _off_draws(2, 0), _off_draws(0, 3)):
            (value, metrics), gradient = loss(params, each)
            totals = [metric.total for metric in metrics.values()]
            assert np.isfinite(jnp.stack([value, *totals])).all(), name
            assert np.isfinite(gradient).all(), name


def test_adaptive_weight_scales_the_gradient_without_being_differentiated():
    error = jnp.array([0.5, 2.0, 7.0])
    for p in (0.0, 0.75, 1.0, 2.0):
        weight = AdaptiveWeight(p=p, c=0.1)
        gradient = jax.grad(lambda e, w=weight: w.mean(_off_draws(2, 1), e[:2], e[2:]))(error)
        np.testing.assert_allclose(gradient, (error + 0.1) ** -p / 3, rtol=1e-12)
    rows = _off_draws(2, 2).interval
    weighted = AdaptiveWeight(p=0.0, of_interval=2.0)(error[:2], rows)
    np.testing.assert_allclose(weighted, error[:2] * (rows.t - rows.r) ** 2, rtol=1e-6)


def test_metrics_are_unweighted_and_apart():
    draws, params = _off_draws(6, 2), jnp.array(BENT_PARAMS)
    _, metrics = MeanFlow().loss(FIELD, params, draws)
    rows = draws.instant
    u = at_instant(FIELD, params, rows).u
    error, t = np.mean((u - velocity(rows.x, rows.e)) ** 2, axis=1), np.asarray(rows.t)
    np.testing.assert_allclose(metrics["v_error"].compute(), error.mean(), rtol=1e-5)
    for i in range(4):
        inside, metric = (t >= i / 4) & (t < (i + 1) / 4), metrics[f"v_error_t{i}"]
        assert metric.count == inside.sum()
        np.testing.assert_allclose(metric.total, error[inside].sum(), rtol=1e-5, atol=1e-12)
    assert metrics["u_error"].count == 2
    assert metrics["du_dt"].compute() > 0
