"""The diagnostics vanish on the closed form and measure what they claim off it."""

import jax.numpy as jnp
import numpy as np
from oracle import exact_rows, gaussian_field

from mf_jax.flow.diagnostics import additivity_gap, identity_residual, velocity_error


def _case():
    rng = np.random.default_rng(0)
    times = np.sort(rng.uniform(0.05, 0.95, (2, 64)), axis=0).astype(np.float32)
    labels, none = jnp.zeros(64, jnp.int32), jnp.zeros(64, bool)
    z = jnp.asarray(rng.normal(size=(64, 2)), jnp.float32)
    rows = exact_rows(
        z, jnp.asarray(times[0]), jnp.asarray(times[1]), labels, none, jnp.full(64, 0.3)
    )
    return gaussian_field(lambda condition: jnp.full(condition.labels.shape, 0.3)), rows


def test_zero_on_the_closed_form():
    field, rows = _case()
    for measure in (velocity_error, identity_residual, additivity_gap):
        assert measure(field, jnp.zeros(4), rows) < 1e-4, measure.__name__


def test_each_notices_a_bent_field():
    field, rows = _case()
    for measure in (velocity_error, identity_residual, additivity_gap):
        assert measure(field, jnp.array([0.1, 0.0, 0.1, 0.0]), rows) > 5e-3, measure.__name__


def test_velocity_error_is_the_root_mean_square():
    field, rows = _case()
    bend = 0.25 * (1 + 2 * rows.t)  # the fourth parameter adds (1 + r + t) at r = t
    expected = np.sqrt(np.mean(np.asarray(bend) ** 2))
    np.testing.assert_allclose(
        velocity_error(field, jnp.array([0, 0, 0, 0.25]), rows), expected, rtol=1e-3
    )
