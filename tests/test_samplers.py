"""Samplers on fields whose answer is known, and diagnostics of the closed form."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from conftest import refuses
from oracle import STD, class_mean, exact_draws, gaussian_field

from mf_jax.flow.diagnostics import additivity_gap, identity_residual, velocity_error
from mf_jax.flow.records import Condition, Prediction
from mf_jax.flow.sampler import SamplePlan, sample

FIELD = gaussian_field(lambda condition: class_mean(condition.labels))


def test_average_velocity_lands_on_the_data_in_any_number_of_steps_and_euler_in_many():
    e, told = jnp.linspace(-2, 2, 9)[:, None], Condition(jnp.full(9, 2))
    run = functools.partial(sample, FIELD, jnp.zeros(4), e, told)
    truth = class_mean(2) + STD * e
    for grid in ({"steps": 1}, {"steps": 8}, {"times": (1.0, 0.9, 0.2, 0.0)}):
        np.testing.assert_allclose(run(**grid), truth, rtol=1e-5, atol=1e-5)
    coarse, fine = (run(steps=steps, learns_average=False) for steps in (2, 2000))
    assert np.abs(coarse - truth).max() > 0.05
    np.testing.assert_allclose(fine, truth, atol=2e-3)


def test_as_many_evaluations_as_steps_each_over_its_own_interval():
    seen, steps = [], 3

    def field(params, z, *, r, t, condition):
        jax.debug.callback(lambda r, t: seen.append((float(r), float(t))), r[0], t[0], ordered=True)
        return Prediction(u=jnp.ones_like(z))

    x = sample(field, {}, jnp.zeros((2, 1)), steps=steps)
    jax.effects_barrier()
    edges = [1 - i / steps for i in range(steps + 1)]
    np.testing.assert_allclose(seen, list(zip(edges[1:], edges[:-1], strict=True)), atol=1e-6)
    np.testing.assert_allclose(x, -1.0, rtol=1e-6)


def test_small_steps_do_not_vanish_in_half_precision_and_bad_grids_are_refused():
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

    grids = (1.0,), (0.9, 0.0), (1.0, 0.1), (1.0, 0.2, 0.5, 0.0), (1.0, 1.0, 0.0)
    for steps, times in ((0, ()), (-2, ()), *((1, grid) for grid in grids)):
        refuses(r"(steps|times)=", SamplePlan, steps, times)


def test_what_a_network_has_not_learnt_is_refused():
    every = {"has_window": True, "only_to_data": False}
    windowless, to_data = {"has_window": False}, {"only_to_data": True}
    for plan, scales, learnt, problem in (
        ({}, (1.0, 1.0), {}, ""),
        ({"guidance": (2.0, 0.0, 1.0)}, (1.0, 1.0), {}, r"no guidance.*use \(1.0, 0.0, 1.0\)"),
        ({}, (1.75, 1.75), {}, r"scales from 1.75 to 1.75; use \(1.75, 0.0, 1.0\)"),
        ({"guidance": (2.0, 0.0, 1.0)}, (1.75, 1.75), {}, "scales from 1.75"),
        ({"guidance": (9.0, 0.0, 0.5)}, (1.0, 8.0), {}, ""),  # as is published
        ({"guidance": (2.0, 0.0, 0.5)}, (1.0, 8.0), windowless, r"no window.*\(2.0, 0.0"),
        ({"guidance": (1.0, 0.0, 0.5)}, (1.0, 8.0), windowless, ""),
        ({"steps": 2}, (1.0, 1.0), to_data, "end at the data"),
        ({"steps": 2, "renoise": True}, (1.0, 1.0), to_data, ""),
        ({}, (1.0, 1.0), to_data, ""),
    ):
        check = functools.partial(SamplePlan(**plan).check_learnt, *scales, **every | learnt)
        refuses(problem, check) if problem else check()


def test_diagnostics_are_zero_on_the_closed_form_and_each_notices_a_bent_field():
    rows, bent = exact_draws(0, 0, 64, some_dropped=False).interval, jnp.array([0.1, 0, 0.1, 0])
    for measure in (velocity_error, identity_residual, additivity_gap):
        assert measure(FIELD, jnp.zeros(4), rows) < 1e-4, measure.__name__
        assert measure(FIELD, bent, rows) > 5e-3, measure.__name__
    bend = 0.25 * (1 + 2 * rows.t)  # the fourth parameter adds (1 + r + t) at r = t
    error = velocity_error(FIELD, jnp.array([0, 0, 0, 0.25]), rows)
    np.testing.assert_allclose(error, np.sqrt(np.mean(np.square(bend))), rtol=1e-3)
