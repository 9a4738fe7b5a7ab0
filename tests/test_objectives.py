"""Objectives against closed forms: the Gaussian oracle, the plain reading of the equations, and mutations."""

import functools
import importlib
import inspect
import itertools
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracle import STD, exact_rows, gaussian_field

from mf_jax.errors import BadInput
from mf_jax.flow.draws import condition_of
from mf_jax.flow.guidance import Guidance
from mf_jax.flow.paths import interpolate, per_row, velocity
from mf_jax.flow.records import NO_LABEL, Condition, Draws, GuidanceScale, Rows
from mf_jax.models import DiT, as_field, initial_params
from mf_jax.objectives import OBJECTIVES
from mf_jax.objectives.alpha_flow import AlphaFlow
from mf_jax.objectives.flow_matching import FlowMatching
from mf_jax.objectives.meanflow import TANGENTS, MeanFlow
from mf_jax.objectives.terms import AdaptiveWeight, with_derivative

PLAIN, GUIDED, SCALED = Guidance(), Guidance(omega=1.5, kappa=0.5), Guidance(omega=2.0)
STEP = jnp.int32(0)


@pytest.fixture(autouse=True)
def _float64():
    with jax.enable_x64(True):
        yield


def _class_mean(labels):
    return jnp.where(labels == NO_LABEL, 0.3, 0.5 * labels - 0.7)


def _guided_mean(guidance):
    """Return the means that the network of a guided target describes: its velocity is a fixed point of guidance.

    v* = omega v + kappa v* + (1 - omega - kappa) v_null is linear in the mean; a drawn scale w is omega = 1,
    kappa = 1 - 1/w.
    """

    def mean(condition):
        labels, told = condition.labels, condition.guidance
        omega, kappa = (
            (guidance.omega, guidance.kappa) if told is None else (1.0, 1 - 1 / told.omega)
        )
        null = _class_mean(jnp.full_like(labels, NO_LABEL))
        guided = (omega * _class_mean(labels) + (1 - omega - kappa) * null) / (1 - kappa)
        return jnp.where(labels == NO_LABEL, null, guided)

    return mean


def _told(omega, num):
    """Return a drawn guidance scale for each row, over the whole interval; None for None."""
    if omega is None:
        return None
    return GuidanceScale(jnp.linspace(1.0, omega, num), jnp.zeros(num), jnp.ones(num))


def _exact_draws(seed=0, num_instant=6, num_interval=3, drawn_omega=None):
    """Return draws on which the objectives must have no residual at all."""
    rng = np.random.default_rng(seed)

    def rows(num, instant):
        z, labels = jnp.asarray(rng.normal(size=(num, 5))), jnp.asarray(rng.integers(0, 4, num))
        times = np.sort(rng.uniform(0.02, 0.98, (2, num)), axis=0)
        r, t = jnp.asarray(times[1] if instant else times[0]), jnp.asarray(times[1])
        dropped = jnp.asarray(np.arange(num) % 3 == 0)
        mean = _class_mean(jnp.where(dropped, NO_LABEL, labels))
        more = {"fraction": jnp.asarray(rng.uniform(size=num)), "guidance": _told(drawn_omega, num)}
        return exact_rows(z, r, t, labels, dropped, mean, **more)

    return Draws(instant=rows(num_instant, True), interval=rows(num_interval, False))


def _residual(objective, guidance, drawn_omega=None):
    field = gaussian_field(_guided_mean(guidance))
    _, metrics = objective.loss(field, jnp.zeros(4), _exact_draws(drawn_omega=drawn_omega), STEP)
    names = ["u_error", "v_error", "head_error"]
    if type(objective).__name__ == "TerminalVelocity":
        names = [
            "u_error"
        ]  # its flow-matching term looks at r, where the rows' own velocity is not the marginal one
    return max(abs(float(metrics[name].compute())) for name in names if name in metrics)


def _mean_gradient(objective, guidance, drawn_omega=None, label=2):
    """Return the gradient at the truth, averaged exactly over data and noise by Gauss-Hermite quadrature."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(32)
    x, e = (a.ravel() for a in np.meshgrid(nodes, nodes))
    mass = np.outer(weights, weights).ravel() / weights.sum() ** 2
    x = STD * x + float(_class_mean(jnp.int32(label)))
    field = gaussian_field(_guided_mean(guidance))

    def loss(params, x, e, r, t):
        def row(r):
            told = None if drawn_omega is None else _told(drawn_omega, 2)
            return Rows(
                x[None, None],
                e[None, None],
                t[None],
                r[None],
                jnp.int32([label]),
                jnp.array([False]),
                guidance=jax.tree.map(lambda leaf: leaf[1:], told),
                fraction=jnp.array([0.3]),
            )

        return objective.loss(field, params, Draws(instant=row(t), interval=row(r)), STEP)[0]

    gradient = jax.jit(jax.vmap(jax.grad(loss), in_axes=(None, 0, 0, None, None)))
    pairs = [(0.1, 0.7), (0.0, 1.0), (0.45, 0.5)]
    means = [
        mass @ np.asarray(gradient(jnp.zeros(4), x, e, jnp.float64(r), jnp.float64(t)))
        for r, t in pairs
    ]
    return float(np.abs(means).max())


SETTINGS = {
    "boundary": {"velocity": "boundary"},
    "head": {"velocity": "head"},
    "derivative": {"alpha_start": 0.0, "alpha_end": 0.0, "target_clip": 1e9},
    "step": {"alpha_start": 0.02, "alpha_end": 0.02, "derivative_below": 0.0, "target_clip": 1e9},
    "midpoint": {"split": "midpoint"},
    "uniform": {"split": "uniform"},
    "clipped": {"velocity": "head", "t_clip": 0.01},
    "": {},
}
NAMES = {name: record.__name__ for name, record in OBJECTIVES.items()}


def _make(module, name, guidance, setting="", p=0.0):
    record, weight = getattr(module, NAMES[name]), module.AdaptiveWeight(p=p)
    more = dict(SETTINGS[setting])
    if name != "flow_matching":
        more["guidance"] = module.Guidance(guidance.omega, guidance.kappa)  # of the mutated module
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
    ("terminal_velocity", "", GUIDED, None),
]


def test_every_objective_meets_the_oracle():
    assert {name for name, *_ in CASES} == set(OBJECTIVES)


@pytest.mark.parametrize(("name", "setting", "guidance", "drawn_omega"), CASES)
def test_no_residual_at_the_truth(name, setting, guidance, drawn_omega):
    objective = _make(_module(name), name, guidance, setting)
    assert _residual(objective, guidance, drawn_omega) < 1e-12


@pytest.mark.parametrize(("name", "setting", "guidance", "drawn_omega"), CASES)
def test_no_mean_gradient_at_the_truth(name, setting, guidance, drawn_omega):
    objective = _make(_module(name), name, guidance, setting)
    assert _mean_gradient(objective, guidance, drawn_omega) < 1e-8


def test_residual_of_alpha_flow_falls_linearly_with_alpha():
    """The target is exact up to the first order of the step, and u_error is (residual / alpha)^2."""

    def residual(alpha):
        objective = AlphaFlow(
            alpha_start=alpha, alpha_end=alpha, derivative_below=0.0, target_clip=1e9
        )
        return _residual(objective, PLAIN) ** 0.5

    residuals = [residual(alpha) for alpha in (0.08, 0.04, 0.02, 0.01)]
    ratios = [a / b for a, b in itertools.pairwise(residuals)]
    np.testing.assert_allclose(ratios, 2, rtol=0.1)


def _constant_targets(name, setting, field, params, draws, teacher):
    """Return what is compared with what: functions of the parameters, and targets away from any gradient."""
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
    elif name == "split_meanflow":
        s = r + interval.fraction * (t - r)
        first = u(teacher, z, s, t)
        second = u(teacher, z - per_row(t - s, z) * first, r, s)
        target = (per_row(t - s, z) * first + per_row(s - r, z) * second) / gap
    elif name == "terminal_velocity":
        end = z - gap * u(params, z, r, t)
        pairs += [(lambda p: at_t(p, interval, r), v)]
        moves = (jnp.zeros_like(z), jnp.ones_like(r), jnp.zeros_like(t))

        def side(p):
            value, derivative = along(moves, p)
            return value - gap * derivative

        return [*pairs, (side, u(teacher, end, r, r))]
    return [*pairs, (lambda p: u(p, z, r, t), target)]


BENT = [
    ("flow_matching", ""),
    ("meanflow", ""),
    ("improved_meanflow", "boundary"),
    ("alpha_flow", "derivative"),
    ("alpha_flow", "step"),
    ("split_meanflow", "uniform"),
    ("terminal_velocity", ""),
]
BENT_PARAMS, TEACHER_PARAMS = (np.array([0.3, -0.2, 0.1, 0.4]), np.array([-0.1, 0.3, 0.2, -0.3]))


def _departure(module, name, setting, *, with_teacher=False):
    """Return how far the gradient is, far from the truth, from that of the loss whose targets are constants."""
    field, draws = gaussian_field(_guided_mean(PLAIN)), _exact_draws(seed=3)
    interval = draws.interval.replace(dropped=jnp.zeros(3, bool), x=draws.interval.x + 0.3)
    instant = draws.instant
    if name == "flow_matching":
        interval = interval.replace(r=interval.t)
    draws = Draws(instant=instant, interval=interval)
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
            total += a * jnp.sum(
                error * jax.lax.stop_gradient((error + objective.weight.c) ** -0.75)
            )
        return total / 9

    ours = jax.grad(
        lambda p: objective.loss(field, p, draws, STEP, teacher if with_teacher else None)[0]
    )(params)
    theirs = jax.grad(plain)(params)
    return float(jnp.abs(ours - theirs).max() / jnp.abs(theirs).max())


@pytest.mark.parametrize(("name", "setting"), BENT)
def test_gradient_is_that_of_constant_targets(name, setting):
    assert _departure(_module(name), name, setting) < 1e-6


@pytest.mark.parametrize(
    ("name", "setting"),
    [("alpha_flow", "step"), ("split_meanflow", "uniform"), ("terminal_velocity", "")],
)
def test_targets_use_the_teachers_parameters(name, setting):
    assert _departure(_module(name), name, setting, with_teacher=True) < 1e-6


_STOP = ("objectives.terms", "jax.lax.stop_gradient(target)", "(target)")
_STOP_WEIGHT = ("objectives.terms", "jax.lax.stop_gradient((error", "((error")
_GUIDANCE = [
    ("flow.guidance", "1 - self.omega - self.kappa", "1 - self.omega + self.kappa"),
    ("flow.guidance", "guidance.kappa * v_class", "guidance.omega * v_class"),
    ("flow.guidance", "& ~rows.dropped", "& rows.dropped"),
    ("flow.guidance", "jnp.full_like(rows.labels, NO_LABEL)", "jnp.full_like(rows.labels, 1)"),
    (
        "flow.guidance",
        "_teacher_condition(interval, labelled=True)",
        "_teacher_condition(interval, labelled=False)",
    ),
]
_DRAWN = [
    ("flow.guidance", "1 - 1 / rows.guidance.omega", "1 + 1 / rows.guidance.omega"),
    ("flow.guidance", "(v_class - v_null)", "(v_class + v_null)"),
    ("flow.guidance", "jnp.where(inside, told.omega, 1)", "jnp.where(inside, 1, told.omega)"),
]
MUTATIONS = [
    *(("meanflow", "", GUIDED, None, *mutation) for mutation in _GUIDANCE),
    *(("improved_meanflow", "head", PLAIN, 3.0, *mutation) for mutation in _DRAWN),
    *((name, setting, PLAIN, None, *_STOP) for name, setting in BENT if name != "flow_matching"),
    *((name, setting, PLAIN, None, *_STOP_WEIGHT) for name, setting in BENT),
    *(
        ("meanflow", "", GUIDED, None, *mutation)
        for mutation in [
            ("flow.paths", "(1 - t) * x", "(1 + t) * x"),
            ("flow.paths", "return e - x", "return x - e"),
            ("objectives.meanflow", "v.interval - per_row(", "v.interval + per_row("),
            (
                "objectives.meanflow",
                "interval.t - draws.interval.r",
                "interval.t + draws.interval.r",
            ),
            ("objectives.meanflow", '"v01": (1.0, 0.0, 1.0)', '"v01": (1.0, 1.0, 1.0)'),
            ("objectives.meanflow", '"v01": (1.0, 0.0, 1.0)', '"v01": (1.0, 0.0, 0.0)'),
            (
                "objectives.meanflow",
                "interval, v.interval, tangent",
                "interval, draws.interval.e, tangent",
            ),
            ("objectives.terms", "r=rows.t, t=rows.t", "r=rows.t * 0, t=rows.t"),
            ("objectives.terms", "dz * velocity", "dr * velocity"),
        ]
    ),
    (
        "flow_matching",
        "",
        PLAIN,
        None,
        "objectives.flow_matching",
        "rows.x, rows.e",
        "rows.e, rows.x",
    ),
    (
        "flow_matching",
        "",
        PLAIN,
        None,
        "objectives.terms",
        "t=rows.t)\n    return",
        "t=rows.r)\n    return",
    ),
    *(
        ("improved_meanflow", setting, PLAIN, None, "objectives.improved_meanflow", old, new)
        for setting, old, new in [
            ("boundary", "v.interval - per_row(", "v.interval + per_row("),
            ("boundary", "interval, v.own)", "interval, v.interval)"),
            (
                "head",
                "squared_error(read(at_t), v.instant)",
                "squared_error(read(at_t), v.instant * 2)",
            ),
            (
                "head",
                "squared_error(read(at_r), v.interval)",
                "squared_error(read(at_r), v.interval * 2)",
            ),
            ("head", "squared_error(at_r.u, target)", "squared_error(at_r.v, target)"),
        ]
    ),
    *(
        ("pixel_meanflow", "clipped", PLAIN, None, "objectives.pixel_meanflow", old, new)
        for old, new in [
            ("- rows.x) / self._clip", "+ rows.x) / self._clip"),
            ("jnp.maximum(rows.t, self.t_clip)", "jnp.minimum(rows.t, self.t_clip)"),
        ]
    ),
    *(
        ("alpha_flow", setting, PLAIN, None, "objectives.alpha_flow", old, new)
        for setting, old, new in [
            ("derivative", "v.interval - per_row(", "v.interval + per_row("),
            ("derivative", "a < self.derivative_below", "a > self.derivative_below"),
            ("derivative", "jnp.where(is_short, 1.0, a)", "jnp.where(is_short, 2.0, a)"),
            ("step", "rows.t - a * (rows.t - rows.r)", "rows.t - a * (rows.t + rows.r)"),
            ("step", "a * v + (1 - a) * u_s", "a * v + (1 + a) * u_s"),
            ("step", "r=rows.r, t=s,", "r=rows.r, t=rows.t,"),
            (
                "step",
                "squared_error(u, jnp.clip(target, -self.target_clip, self.target_clip)) / a**2",
                "squared_error(u, target)",
            ),
            ("step", "a * self.weight(u_error)", "self.weight(u_error)"),
        ]
    ),
    *(
        ("split_meanflow", "uniform", SCALED, None, "objectives.split_meanflow", old, new)
        for old, new in [
            ("rows.t - share * (rows.t - rows.r)", "rows.t - share * (rows.t + rows.r)"),
            ("weight * first + (1 - weight) * second", "weight * first + (1 + weight) * second"),
            ("r=s, t=rows.t, condition", "r=rows.r, t=rows.t, condition"),
            ("advance(z, first, r=s", "advance(z, first, r=rows.r"),
        ]
    ),
    *(
        ("terminal_velocity", "", GUIDED, None, "objectives.terminal_velocity", old, new)
        for old, new in [
            ("u - gap * du_dr", "u + gap * du_dr"),
            ("(0.0, 1.0, 0.0)", "(0.0, 1.0, 1.0)"),
            ("r=rows.r, t=rows.r, condition", "r=rows.t, t=rows.t, condition"),
            ("interval.replace(t=interval.r)", "interval.replace(r=interval.t)"),
            ("squared_error(u_r, v.instant)", "squared_error(u_r, v.instant * 2)"),
        ]
    ),
]


def _load_mutated(monkeypatch, name, target, old, new):
    """Return the objective's module, built on copies of its modules, in one of which a token is replaced."""
    shared = (
        "flow.paths",
        "flow.draws",
        "flow.guidance",
        "objectives.terms",
    )
    chain = (
        *shared,
        *(("objectives.improved_meanflow",) if name == "pixel_meanflow" else ()),
        f"objectives.{name}",
    )
    for short in chain:
        full = f"mf_jax.{short}"
        source = inspect.getsource(importlib.import_module(full))
        if short == target:
            assert old in source, f"{full} does not contain {old!r} any more: update the mutation"
            source = source.replace(old, new)
        module = types.ModuleType(full)
        monkeypatch.setitem(sys.modules, full, module)
        exec(compile(source, full, "exec"), module.__dict__)
    return sys.modules[f"mf_jax.objectives.{name}"]


@pytest.mark.parametrize(
    ("name", "setting", "guidance", "drawn_omega", "target", "old", "new"),
    MUTATIONS,
    ids=lambda v: str(v).replace(" ", "") if isinstance(v, str) else "",
)
def test_oracle_catches_mutation(
    monkeypatch, name, setting, guidance, drawn_omega, target, old, new
):
    """The cheapest measure that sees it is enough."""
    module = _load_mutated(monkeypatch, name, target, old, new)
    objective = _make(module, name, guidance, setting)
    measures = [lambda: _departure(module, name, setting)] if (name, setting) in BENT else []
    if setting != "step":  # which is exact only where the step vanishes
        measures = [
            lambda: _residual(objective, guidance, drawn_omega),
            *measures,
            lambda: _mean_gradient(objective, guidance, drawn_omega),
        ]
    worst = 0.0
    for measure in measures:
        worst = max(worst, float(np.nan_to_num(measure(), nan=np.inf)))
        if worst > 1e-4:
            return
    pytest.fail(f"{old!r} -> {new!r} in {target} goes unnoticed: {worst:.1e}")


def test_unmutated_copy_passes(monkeypatch):
    module = _load_mutated(monkeypatch, "meanflow", "none", "", "")
    assert _residual(_make(module, "meanflow", GUIDED), GUIDED) < 1e-12


@pytest.mark.parametrize("tangent", sorted(set(TANGENTS) - {"v01"}))
def test_wrong_tangents_have_a_residual(tangent):
    assert _residual(MeanFlow(weight=AdaptiveWeight(p=0.0), tangent=tangent), PLAIN) > 1e-3


def _dit(time_conditioning="t,t-r"):
    """Return a small DiT with all parameters drawn, those that start at zero too."""
    sizes = {"patch_size": 2, "depth": 1, "width": 8, "num_heads": 2}
    network = DiT(**sizes, num_classes=4, time_conditioning=time_conditioning, dtype="float64")
    params = initial_params(network, (4, 4, 1), jax.random.key(0))
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    drawn = [
        0.3 * jax.random.normal(k, leaf.shape, jnp.float64)
        for k, leaf in zip(keys, leaves, strict=True)
    ]
    return as_field(network), jax.tree.unflatten(tree, drawn)


def _image_draws(num_instant, num_interval, seed=0):
    rng = np.random.default_rng(seed)

    def rows(num, instant):
        times = np.sort(rng.uniform(size=(2, num)), axis=0)
        return Rows(
            x=jnp.asarray(rng.normal(size=(num, 4, 4, 1))),
            e=jnp.asarray(rng.normal(size=(num, 4, 4, 1))),
            t=jnp.asarray(times[1]),
            r=jnp.asarray(times[1] if instant else times[0]),
            labels=jnp.asarray(rng.integers(0, 4, num)),
            dropped=jnp.asarray(np.arange(num) % 3 == 1),
        )

    return Draws(instant=rows(num_instant, True), interval=rows(num_interval, False))


def _plain_reading(field, params, draws, guidance, weight):
    """Compute the MeanFlow loss without splitting rows or sharing forwards: the JVP of every row, t - r times 0."""
    rows = jax.tree.map(lambda *a: jnp.concatenate(a), draws.instant, draws.interval)
    z, v, t, r = interpolate(rows.x, rows.e, t=rows.t), velocity(rows.x, rows.e), rows.t, rows.r
    u_class = field(params, z, r=t, t=t, condition=Condition(rows.labels)).u
    u_null = field(params, z, r=t, t=t, condition=Condition(jnp.full_like(rows.labels, NO_LABEL))).u
    guided = (
        guidance.omega * v
        + guidance.kappa * u_class
        + (1 - guidance.omega - guidance.kappa) * u_null
    )
    inside = (t >= guidance.t_min) & (t <= guidance.t_max) & ~rows.dropped
    v_g = jax.lax.stop_gradient(jnp.where(per_row(inside, v), guided, v))

    def u_of(z, r, t):
        return field(params, z, r=r, t=t, condition=condition_of(rows)).u

    u, du_dt = jax.jvp(u_of, (z, r, t), (v_g, jnp.zeros_like(r), jnp.ones_like(t)))
    target = jax.lax.stop_gradient(v_g - per_row(t - r, z) * du_dt)
    error = jnp.sum((u - target) ** 2, axis=(1, 2, 3))
    return jnp.mean(error / jax.lax.stop_gradient((error + weight.c) ** weight.p))


@pytest.mark.parametrize(
    ("sizes", "guidance"),
    [
        ((6, 2), PLAIN),
        ((6, 2), SCALED),
        ((6, 2), Guidance(0.5, 0.5)),
        ((6, 2), Guidance(0.2, 0.9, 0.3, 0.7)),
        ((2, 6), GUIDED),
        ((0, 4), GUIDED),
        ((4, 0), GUIDED),
    ],
    ids=["plain", "scale", "no-null", "window", "mostly-interval", "all-interval", "all-instant"],
)
def test_split_equals_plain_reading(sizes, guidance):
    field, params = _dit()
    draws, weight = _image_draws(*sizes), AdaptiveWeight(p=0.75, c=1e-3)
    ours = jax.jit(
        jax.value_and_grad(lambda p: MeanFlow(guidance, weight).loss(field, p, draws, STEP)[0])
    )(params)
    plain = jax.jit(
        jax.value_and_grad(lambda p: _plain_reading(field, p, draws, guidance, weight))
    )(params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6), ours, plain)


@pytest.mark.parametrize(("sizes", "drop_sizes"), [((12, 4), (2, 1)), ((6, 0), (0, 1))])
def test_rows_without_label_need_no_teacher(sizes, drop_sizes):
    """Guidance of fixed rows changes no number; a row that the teacher skips is seen by this in its target."""
    field, params = _dit()
    draws, weight = _image_draws(*sizes), AdaptiveWeight(p=0.75, c=1e-3)
    group = [False] * drop_sizes[0] + [True] * drop_sizes[1]
    dropped = jnp.tile(jnp.array(group), sizes[0] // len(group))
    draws = draws.replace(instant=draws.instant.replace(dropped=dropped))
    fixed = draws.replace(drop_sizes=drop_sizes)

    def loss(p, draws):
        return MeanFlow(GUIDED, weight).loss(field, p, draws, STEP)[0]

    ours, plain = (jax.jit(jax.value_and_grad(loss))(params, given) for given in (fixed, draws))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12), ours, plain)


def test_flow_matching_is_meanflow_where_all_rows_have_r_equal_t():
    field, params = _dit()
    draws, weight = _image_draws(4, 0), AdaptiveWeight()
    losses = [
        o.loss(field, params, draws, STEP)[0]
        for o in (FlowMatching(weight), MeanFlow(weight=weight))
    ]
    np.testing.assert_allclose(*losses, rtol=1e-12)


@pytest.mark.parametrize("time_conditioning", ["t,r", "t,t-r", "t,r,t-r", "t-r"])
def test_jvp_equals_central_differences(time_conditioning):
    field, params = _dit(time_conditioning=time_conditioning)
    rows, step = _image_draws(0, 3).interval, 1e-5
    z, v = interpolate(rows.x, rows.e, t=rows.t), velocity(rows.x, rows.e)

    def u(shift):
        return field(
            params, z + shift * v, r=rows.r, t=rows.t + shift, condition=Condition(rows.labels)
        ).u

    _, derivative = with_derivative(field, params, rows.replace(dropped=rows.dropped & False), v)
    np.testing.assert_allclose(derivative, (u(step) - u(-step)) / (2 * step), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("p", [0.0, 0.75, 1.0, 2.0])
def test_adaptive_weight_scales_the_gradient_without_being_differentiated(p):
    weight = AdaptiveWeight(p=p, c=0.1)
    error = jnp.array([0.5, 2.0, 7.0])
    gradient = jax.grad(lambda e: weight.mean(e[:2], e[2:]))(error)
    np.testing.assert_allclose(gradient, (error + 0.1) ** -p / 3, rtol=1e-12)


def test_metrics_are_unweighted_and_apart():
    field, params = _dit()
    draws = _image_draws(6, 2)
    _, metrics = MeanFlow().loss(field, params, draws, STEP)
    u = field(
        params,
        interpolate(draws.instant.x, draws.instant.e, t=draws.instant.t),
        r=draws.instant.t,
        t=draws.instant.t,
        condition=condition_of(draws.instant),
    ).u
    error = np.mean((u - velocity(draws.instant.x, draws.instant.e)) ** 2, axis=(1, 2, 3))
    np.testing.assert_allclose(metrics["v_error"].compute(), error.mean(), rtol=1e-5)
    t = np.asarray(draws.instant.t)
    for i in range(4):
        inside = (t >= i / 4) & (t < (i + 1) / 4)
        assert metrics[f"v_error_t{i}"].count == inside.sum()
        np.testing.assert_allclose(
            metrics[f"v_error_t{i}"].total, error[inside].sum(), rtol=1e-5, atol=1e-12
        )
    assert metrics["u_error"].count == 2
    assert metrics["du_dt"].compute() > 0


@pytest.mark.parametrize(
    ("build", "named"),
    [
        (lambda: MeanFlow(tangent="v99"), "tangent"),
        (lambda: Guidance(kappa=1.0), "kappa"),
        (lambda: Guidance(omega=float("nan")), "omega"),
        (lambda: Guidance(t_min=0.8, t_max=0.2), "t_min"),
        (lambda: AdaptiveWeight(p=-1.0), "weight.p"),
        (lambda: AdaptiveWeight(c=0.0), "weight.c"),
    ],
)
def test_bad_arguments_are_named(build, named):
    with pytest.raises(BadInput, match=named):
        build()
