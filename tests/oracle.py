"""The elementary average velocity of Gaussian data, and draws that go with it.

For x ~ N(m, s^2) and z_t = (1 - t) x + t e: mean_t = (1 - t) m and sigma_t^2 = (1 - t)^2 s^2 + t^2.
A point keeps its place in units of sigma, z_r = mean_r + (sigma_r / sigma_t) (z_t - mean_t), and
u = (z_t - z_r) / (t - r).
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from mf_jax.flow.paths import per_row
from mf_jax.flow.records import NO_LABEL, Draws, Prediction, Rows

STD = 0.6
BENT = np.array([0.3, -0.2, 0.1, 0.4])
"""Parameters of a field that is not exact."""


def moments(mean, t):
    """Return mean_t and sigma_t."""
    return (1 - t) * mean, jnp.sqrt((1 - t) ** 2 * STD**2 + t**2)


def gaussian_velocity(z, t, mean):
    """Return v(z, t) = d mean_t / dt + (sigma_t' / sigma_t) (z - mean_t)."""
    center, sigma = moments(mean, t)
    return -mean + (t - (1 - t) * STD**2) / sigma**2 * (z - center)


def gaussian_average(z, r, t, mean):
    """Return u(z, r, t), v where r = t."""
    (center_t, sigma_t), (center_r, sigma_r) = moments(mean, t), moments(mean, r)
    z_r = center_r + sigma_r / sigma_t * (z - center_t)
    gap = jnp.where(t == r, 1.0, t - r)
    return jnp.where(t == r, gaussian_velocity(z, t, mean), (z - z_r) / gap)


@functools.cache
def gaussian_field(mean_of):
    """Return a compiled field with two heads, exact at zero parameters, bent by each of its four.

    Args:
      mean_of: function from a Condition to the mean `[B]` of the data that the field describes.
    """

    @jax.jit
    def field(params, z, *, r, t, condition):
        mean = per_row(mean_of(condition), z)
        r, t = per_row(r, z), per_row(t, z)
        ones = jnp.ones_like(z)
        bend = jnp.stack([jnp.sin(2 * z), jnp.cos(3 * t) * z, r * z**2, (1 + r + t) * ones])
        return Prediction(
            u=gaussian_average(z, r, t, mean) + jnp.tensordot(params, bend, 1),
            v=gaussian_velocity(z, t, mean) + jnp.tensordot(params, bend[::-1], 1),
        )

    return field


@jax.jit
def exact_rows(z, r, t, labels, dropped, mean_of_data, **more):
    """Return rows that pass through z at time t, each with exactly the velocity of its Gaussian."""
    v = gaussian_velocity(z, per_row(t, z), per_row(mean_of_data, z))
    x, e = z - per_row(t, z) * v, z + per_row(1 - t, z) * v
    told = {"condition": labels, "null": jnp.full_like(labels, NO_LABEL), "for_networks": True}
    return Rows(x=x, e=e, t=t, r=r, dropped=dropped, **told | more)


def class_mean(labels):
    """Return the mean of a class's data."""
    return jnp.where(labels == NO_LABEL, 0.3, 0.5 * labels - 0.7)


def exact_draws(seed=0, num_instant=6, num_interval=3, *, some_dropped=True, **more):
    """Return draws that pass through their points with exactly the velocity of their class."""
    rng = np.random.default_rng(seed)

    def rows(num, is_instant):
        z, labels = jnp.asarray(rng.normal(size=(num, 5))), jnp.asarray(rng.integers(0, 4, num))
        times = jnp.asarray(np.sort(rng.uniform(0.06, 0.98, (2, num)), axis=0))
        drawn = {
            "fraction": jnp.asarray(rng.uniform(size=num)),
            "direction": jnp.asarray(rng.normal(size=(num, 5))),
        }
        drawn |= {name: make(num) for name, make in more.items()}
        dropped = jnp.asarray((np.arange(num) % 3 == 0) & some_dropped)
        mean = class_mean(jnp.where(dropped, NO_LABEL, labels))
        return exact_rows(z, times[int(is_instant)], times[1], labels, dropped, mean, **drawn)

    return Draws(instant=rows(num_instant, True), interval=rows(num_interval, False))


def joined(draws):
    """Return all rows of draws."""
    return jax.tree.map(lambda *a: jnp.concatenate(a), draws.instant, draws.interval)


def assert_same(ours, theirs, rtol=1e-9, atol=1e-12):
    """Assert that two trees have the same numbers."""
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(a, b, rtol=rtol, atol=atol)
