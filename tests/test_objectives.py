"""Objectives against closed forms: the Gaussian oracle, the plain reading of the equations, and mutations."""

import importlib
import inspect
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracle import STD, exact_rows, gaussian_field

from mf_jax.draws import condition_of
from mf_jax.guidance import Guidance
from mf_jax.models import DiT, as_field, initial_params
from mf_jax.objectives import OBJECTIVES
from mf_jax.objectives.flow_matching import FlowMatching
from mf_jax.objectives.meanflow import TANGENTS, MeanFlow
from mf_jax.objectives.weighting import AdaptiveWeight
from mf_jax.paths import interpolate, per_row, velocity
from mf_jax.types import NO_LABEL, BadInput, Condition, Draws, Rows

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

    v* = omega v + kappa v* + (1 - omega - kappa) v_null is linear in the mean.
    """
    omega, kappa = guidance.omega, guidance.kappa

    def mean(labels):
        null = _class_mean(jnp.full_like(labels, NO_LABEL))
        guided = (omega * _class_mean(labels) + (1 - omega - kappa) * null) / (1 - kappa)
        return jnp.where(labels == NO_LABEL, null, guided)

    return mean


def _exact_draws(seed=0, num_instant=6, num_interval=3):
    """Return draws on which the objectives must have no residual at all."""
    rng = np.random.default_rng(seed)

    def rows(num, instant):
        z, labels = jnp.asarray(rng.normal(size=(num, 5))), jnp.asarray(rng.integers(0, 4, num))
        times = np.sort(rng.uniform(0.02, 0.98, (2, num)), axis=0)
        r, t = jnp.asarray(times[1] if instant else times[0]), jnp.asarray(times[1])
        dropped = jnp.asarray(np.arange(num) % 3 == 0)
        return exact_rows(z, r, t, labels, dropped, _class_mean(jnp.where(dropped, NO_LABEL, labels)))

    return Draws(instant=rows(num_instant, True), interval=rows(num_interval, False))


def _residual(objective, guidance):
    field = gaussian_field(_guided_mean(guidance))
    _, metrics = objective.loss(field, jnp.zeros(4), _exact_draws(), STEP)
    return max(abs(float(m.compute())) for name, m in metrics.items() if name in ("u_error", "v_error"))


def _mean_gradient(objective, guidance, label=2):
    """Return the gradient at the truth, averaged exactly over data and noise by Gauss-Hermite quadrature."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(48)
    x, e = (a.ravel() for a in np.meshgrid(nodes, nodes))
    mass = np.outer(weights, weights).ravel() / weights.sum() ** 2
    x = STD * x + float(_class_mean(jnp.int32(label)))
    field = gaussian_field(_guided_mean(guidance))

    def loss(params, x, e, r, t):
        def row(r):
            return Rows(
                x[None, None], e[None, None], t[None], r[None], jnp.int32([label]), jnp.array([False])
            )

        return objective.loss(field, params, Draws(instant=row(t), interval=row(r)), STEP)[0]

    gradient = jax.jit(jax.vmap(jax.grad(loss), in_axes=(None, 0, 0, None, None)))
    pairs = [(0.1, 0.7), (0.0, 1.0), (0.45, 0.5)]
    means = [
        mass @ np.asarray(gradient(jnp.zeros(4), x, e, jnp.float64(r), jnp.float64(t))) for r, t in pairs
    ]
    return float(np.abs(means).max())


def _make(module, name, guidance):
    weight = module.AdaptiveWeight(p=0.0)
    if name == "flow_matching":
        return module.FlowMatching(weight)
    return module.MeanFlow(module.Guidance(guidance.omega, guidance.kappa), weight)


CASES = [("flow_matching", PLAIN), ("meanflow", PLAIN), ("meanflow", GUIDED), ("meanflow", SCALED)]


@pytest.mark.parametrize(("name", "guidance"), CASES)
def test_no_residual_at_the_truth(name, guidance):
    assert _residual(_make(sys.modules[OBJECTIVES[name].__module__], name, guidance), guidance) < 1e-12


@pytest.mark.parametrize(("name", "guidance"), CASES)
def test_no_mean_gradient_at_the_truth(name, guidance):
    assert _mean_gradient(_make(sys.modules[OBJECTIVES[name].__module__], name, guidance), guidance) < 1e-9


MUTATIONS = [
    ("meanflow", "paths", "(1 - t) * x", "(1 + t) * x"),
    ("meanflow", "paths", "return e - x", "return x - e"),
    ("meanflow", "objectives.meanflow", "v_interval - per_row(", "v_interval + per_row("),
    ("meanflow", "objectives.meanflow", "interval.t - interval.r", "interval.t + interval.r"),
    ("meanflow", "objectives.meanflow", '"v01": (1.0, 0.0, 1.0)', '"v01": (1.0, 1.0, 1.0)'),
    ("meanflow", "objectives.meanflow", '"v01": (1.0, 0.0, 1.0)', '"v01": (1.0, 0.0, 0.0)'),
    ("meanflow", "objectives.meanflow", "r=rows.t, t=rows.t", "r=rows.t * 0, t=rows.t"),
    (
        "meanflow",
        "objectives.meanflow",
        "interval, v_interval)",
        "interval, velocity(interval.x, interval.e))",
    ),
    ("meanflow", "objectives.weighting", "jax.lax.stop_gradient(target)", "(target)"),
    ("meanflow", "guidance", "1 - self.omega - self.kappa", "1 - self.omega + self.kappa"),
    ("meanflow", "guidance", "guidance.kappa * u_class", "guidance.omega * u_class"),
    ("meanflow", "guidance", "& ~rows.dropped", "& rows.dropped"),
    ("meanflow", "guidance", "jnp.full_like(rows.labels, NO_LABEL)", "jnp.full_like(rows.labels, 1)"),
    (
        "meanflow",
        "guidance",
        "(draws.interval, draws.interval.labels)",
        "(draws.interval, -draws.interval.labels)",
    ),
    ("flow_matching", "objectives.flow_matching", "r=rows.t, t=rows.t", "r=rows.r, t=rows.t"),
    ("flow_matching", "objectives.flow_matching", "velocity(rows.x, rows.e)", "velocity(rows.e, rows.x)"),
    ("flow_matching", "objectives.flow_matching", "t=rows.t)\n        u", "t=rows.r)\n        u"),
]


def _load_mutated(monkeypatch, name, target, old, new):
    """Return the objective's module, built on a copy of one module in which a token is replaced."""
    chain = ("paths", "guidance", "objectives.weighting", f"objectives.{name}")
    for short in chain:
        full = f"mf_jax.{short}"
        source = inspect.getsource(importlib.import_module(full))
        if short == target:
            assert old in source, f"{full} does not contain {old!r} any more: update the mutation"
            source = source.replace(old, new)
        module = types.ModuleType(full)
        module.__dict__["velocity"] = (
            velocity  # for mutations that name it where the module does not import it
        )
        monkeypatch.setitem(sys.modules, full, module)
        exec(compile(source, full, "exec"), module.__dict__)
    return sys.modules[f"mf_jax.objectives.{name}"]


@pytest.mark.parametrize(("name", "target", "old", "new"), MUTATIONS, ids=lambda v: str(v).replace(" ", ""))
def test_oracle_catches_mutation(monkeypatch, name, target, old, new):
    module = _load_mutated(monkeypatch, name, target, old, new)
    guidances = (GUIDED,) if name == "meanflow" else (PLAIN,)
    worst = max(
        measure(_make(module, name, guidance), guidance)
        for guidance in guidances
        for measure in (_residual, _mean_gradient)
    )
    assert not worst < 1e-4, f"{old!r} -> {new!r} in {target} goes unnoticed: {worst:.1e}"


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
        0.3 * jax.random.normal(k, leaf.shape, jnp.float64) for k, leaf in zip(keys, leaves, strict=True)
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
    guided = guidance.omega * v + guidance.kappa * u_class + (1 - guidance.omega - guidance.kappa) * u_null
    inside = (t >= guidance.t_start) & (t <= guidance.t_end) & ~rows.dropped
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
    ours = jax.jit(jax.value_and_grad(lambda p: MeanFlow(guidance, weight).loss(field, p, draws, STEP)[0]))(
        params
    )
    plain = jax.jit(jax.value_and_grad(lambda p: _plain_reading(field, p, draws, guidance, weight)))(params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6), ours, plain)


def test_flow_matching_is_meanflow_where_all_rows_have_r_equal_t():
    field, params = _dit()
    draws, weight = _image_draws(4, 0), AdaptiveWeight()
    losses = [o.loss(field, params, draws, STEP)[0] for o in (FlowMatching(weight), MeanFlow(weight=weight))]
    np.testing.assert_allclose(*losses, rtol=1e-12)


@pytest.mark.parametrize("time_conditioning", ["t,r", "t,t-r", "t,r,t-r", "t-r"])
def test_jvp_equals_central_differences(time_conditioning):
    field, params = _dit(time_conditioning=time_conditioning)
    rows, step = _image_draws(0, 3).interval, 1e-5
    z, v = interpolate(rows.x, rows.e, t=rows.t), velocity(rows.x, rows.e)

    def u(shift):
        return field(params, z + shift * v, r=rows.r, t=rows.t + shift, condition=Condition(rows.labels)).u

    _, derivative = MeanFlow()._derivative(field, params, rows.replace(dropped=rows.dropped & False), v)
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
        np.testing.assert_allclose(metrics[f"v_error_t{i}"].total, error[inside].sum(), rtol=1e-5, atol=1e-12)
    assert metrics["u_error"].count == 2
    assert metrics["du_dt"].compute() > 0


@pytest.mark.parametrize(
    ("build", "named"),
    [
        (lambda: MeanFlow(tangent="v99"), "tangent"),
        (lambda: Guidance(kappa=1.0), "kappa"),
        (lambda: Guidance(omega=float("nan")), "omega"),
        (lambda: Guidance(t_start=0.8, t_end=0.2), "t_start"),
        (lambda: AdaptiveWeight(p=-1.0), "weight.p"),
        (lambda: AdaptiveWeight(c=0.0), "weight.c"),
    ],
)
def test_bad_arguments_are_named(build, named):
    with pytest.raises(BadInput, match=named):
        build()
