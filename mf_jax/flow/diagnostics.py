"""How well a network obeys the identities of an average velocity, on real draws.

Each figure is a root mean square per counted number, in units of the velocity.

Source: MeanFlow, arXiv 2505.13447, equation 6 and section 4.1 (consistency).
"""

import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from mf_jax.flow.derivative import Derivative
from mf_jax.flow.paths import Points, advance, per_row, velocity
from mf_jax.flow.records import Field, Rows
from mf_jax.flow.rows import point_of, predict

ALONG_THE_PATH = (1.0, 0.0, 1.0)
"""Tangent of (z, r, t), in units of the velocity and of 1, that du/dt is taken along."""


def rms(a: Points, rows: Rows) -> Float[Array, ""]:
    """Return the root mean square of an array like x, which is 0 where a mask hides."""
    if rows.mask is None:
        return jnp.sqrt(jnp.mean(a**2))
    return jnp.sqrt(jnp.sum(a**2) / jnp.maximum(jnp.sum(rows.mask), 1))


def velocity_error(field: Field, params: PyTree, rows: Rows) -> Float[Array, ""]:
    """Return the size of u(z, t, t) - v; the spread of v given z keeps it above 0."""
    u = predict(field, params, rows, point_of(rows), r=rows.t, t=rows.t).u
    return rms(u - velocity(rows.x, rows.e), rows)


def derivative_at(
    field: Field,
    params: PyTree,
    rows: Rows,
    *,
    how: Derivative = Derivative(),
    along: tuple[float, float, float] = ALONG_THE_PATH,
) -> tuple[Points, Points, Points]:
    """Return v = u(z, t, t), u(z, r, t), and du/dt with v the velocity of z."""

    def u(z: Array, r: Array, t: Array) -> tuple[Array, Array]:
        value = predict(field, params, rows, z, r=r, t=t, forward_mode=how.is_jvp).u
        return value, value

    z = point_of(rows)
    v, one = u(z, rows.t, rows.t)[0], jnp.ones_like(rows.t)
    dz, dr, dt = along
    return v, *how.along(u, u, (z, rows.r, rows.t), (dz * v, dr * one, dt * one))


def identity_residual(field: Field, params: PyTree, rows: Rows) -> Float[Array, ""]:
    """Return the size of u - (v - (t - r) du/dt) with the network's own velocity v = u(z, t, t)."""
    return residual_of(rows, *derivative_at(field, params, rows))


def residual_of(rows: Rows, v: Array, u: Array, du_dt: Array) -> Float[Array, ""]:
    """Return the size of the same from its terms."""
    return rms(u - (v - per_row(rows.t - rows.r, u) * du_dt), rows)


def additivity_gap(field: Field, params: PyTree, rows: Rows) -> Float[Array, ""]:
    """Return how far one step from t to r ends from two steps by way of the middle."""

    def step(z: Array, *, r: Array, t: Array) -> Array:
        return advance(z, predict(field, params, rows, z, r=r, t=t).u, r=r, t=t)

    z = point_of(rows)
    s = (rows.r + rows.t) / 2
    return rms(step(z, r=rows.r, t=rows.t) - step(step(z, r=s, t=rows.t), r=rows.r, t=s), rows)
