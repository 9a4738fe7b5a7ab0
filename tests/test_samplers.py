"""Samplers on fields whose answer is known, and diagnostics of the closed form."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from conftest import refuses
from oracle import STD, exact_rows, gaussian_field

from mf_jax.flow.diagnostics import additivity_gap, identity_residual, velocity_error
from mf_jax.flow.records import Condition, Prediction
from mf_jax.flow.sampler import SamplePlan, sample

MEAN = 0.3


def _run(times, learns_average=True):
    e = jnp.linspace(-2, 2, 9)[:, None]
    field = gaussian_field(lambda condition: jnp.full(condition.labels.shape, MEAN))
    condition = Condition(jnp.zeros(9, jnp.int32))
    return e, sample(field, jnp.zeros(4), e, condition, times=times, learns_average=learns_average)


def test_average_velocity_lands_on_the_data_in_any_number_of_steps():
    for plan in (SamplePlan(1), SamplePlan(8), SamplePlan(times=(1.0, 0.9, 0.2, 0.0))):
        e, x = _run(plan.grid)
        np.testing.assert_allclose(x, MEAN + STD * e, rtol=1e-5, atol=1e-5)


def test_euler_needs_many_steps():
    e, coarse = _run(SamplePlan(2).grid, learns_average=False)
    _, fine = _run(SamplePlan(2000).grid, learns_average=False)
    assert np.abs(coarse - (MEAN + STD * e)).max() > 0.05
    np.testing.assert_allclose(fine, MEAN + STD * e, atol=2e-3)


def test_as_many_evaluations_as_steps_each_over_its_own_interval():
    seen, steps = [], 3

    def field(params, z, *, r, t, condition):
        jax.debug.callback(lambda r, t: seen.append((float(r), float(t))), r[0], t[0], ordered=True)
        return Prediction(u=jnp.ones_like(z))

    e = jnp.zeros((2, 1))
    told = Condition(jnp.zeros(2, jnp.int32))
    x = sample(field, {}, e, told, times=SamplePlan(steps).grid, learns_average=True)
    jax.effects_barrier()
    edges = [1 - i / steps for i in range(steps + 1)]
    np.testing.assert_allclose(seen, list(zip(edges[1:], edges[:-1], strict=True)), atol=1e-6)
    np.testing.assert_allclose(x, -1.0, rtol=1e-6)


def test_small_steps_do_not_vanish_in_half_precision():
    def field(params, z, *, r, t, condition):
        return 0.9 * jnp.ones_like(z)

    for kind, error in {jnp.bfloat16: 1e-2, jnp.float16: 2e-3, jnp.float32: 1e-4}.items():
        x = sample(field, None, jnp.full((1, 1), 3, kind), steps=500)
        assert x.dtype == kind
        np.testing.assert_allclose(np.float32(x), 2.1, rtol=error)
    with jax.enable_x64(True):
        x = sample(field, None, jnp.full((1, 1), 3.0), times=(1.0, 0.7, 0.1, 0.0))
        np.testing.assert_allclose(x, 2.1, rtol=1e-15)
    of_rows = jnp.array([True, True, False, False])
    refuses("mask: is bool.*all axes", sample, field, None, jnp.ones((4, 4)), mask=of_rows)


def test_bad_grids_are_refused():
    grids = (1.0,), (0.9, 0.0), (1.0, 0.1), (1.0, 0.2, 0.5, 0.0), (1.0, 1.0, 0.0)
    for steps, times in ((0, ()), (-2, ()), *((1, grid) for grid in grids)):
        refuses(r"(steps|times)=", SamplePlan, steps, times)


def test_what_a_network_has_not_learnt_is_refused():
    every = {"has_window": True, "only_to_data": False}
    cases = (
        ({}, (1.0, 1.0), {}, ""),
        ({"omega": 2.0}, (1.0, 1.0), {}, r"no guidance.*use \(1.0, 0.0, 1.0\)"),
        ({}, (1.75, 1.75), {}, r"scales from 1.75 to 1.75; use \(1.75, 0.0, 1.0\)"),
        ({"omega": 2.0}, (1.75, 1.75), {}, "scales from 1.75"),
        ({"omega": 9.0, "t_max": 0.5}, (1.0, 8.0), {}, ""),  # as is published
        ({"omega": 2.0, "t_max": 0.5}, (1.0, 8.0), {"has_window": False}, r"no window.*\(2.0, 0.0"),
        ({"t_max": 0.5}, (1.0, 8.0), {"has_window": False}, ""),
        ({"steps": 2}, (1.0, 1.0), {"only_to_data": True}, "end at the data"),
        ({"steps": 2, "renoise": True}, (1.0, 1.0), {"only_to_data": True}, ""),
        ({}, (1.0, 1.0), {"only_to_data": True}, ""),
    )
    for plan, scales, learnt, problem in cases:
        check = functools.partial(SamplePlan(**plan).check_learnt, *scales, **every | learnt)
        refuses(problem, check) if problem else check()


def _case():
    rng = np.random.default_rng(0)
    times = np.sort(rng.uniform(0.05, 0.95, (2, 64)), axis=0).astype(np.float32)
    labels, none = jnp.zeros(64, jnp.int32), jnp.zeros(64, bool)
    z = jnp.asarray(rng.normal(size=(64, 2)), jnp.float32)
    rows = exact_rows(
        z, jnp.asarray(times[0]), jnp.asarray(times[1]), labels, none, jnp.full(64, 0.3)
    )
    return gaussian_field(lambda condition: jnp.full(condition.labels.shape, 0.3)), rows


def test_zero_on_the_closed_form_and_each_notices_a_bent_field():
    field, rows = _case()
    for measure in (velocity_error, identity_residual, additivity_gap):
        assert measure(field, jnp.zeros(4), rows) < 1e-4, measure.__name__
        assert measure(field, jnp.array([0.1, 0.0, 0.1, 0.0]), rows) > 5e-3, measure.__name__


def test_velocity_error_is_the_root_mean_square():
    field, rows = _case()
    bend = 0.25 * (1 + 2 * rows.t)  # the fourth parameter adds (1 + r + t) at r = t
    expected = np.sqrt(np.mean(np.asarray(bend) ** 2))
    np.testing.assert_allclose(
        velocity_error(field, jnp.array([0, 0, 0, 0.25]), rows), expected, rtol=1e-3
    )
