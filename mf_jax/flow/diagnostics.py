"""How well a network obeys the identities of an average velocity, on real draws.

Each figure is a root mean square per number, in units of the velocity.

Source: MeanFlow, arXiv 2505.13447, equation 6 and section 4.1 (consistency).
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from mf_jax.flow.draws import condition_of
from mf_jax.flow.paths import advance, interpolate, per_row, velocity
from mf_jax.flow.records import Field, Rows


def _rms(a: Float[Array, "b ..."]) -> Float[Array, ""]:
    return jnp.sqrt(jnp.mean(a**2))


def velocity_error(field: Field, params: PyTree, rows: Rows) -> Float[Array, ""]:
    """Return the size of u(z, t, t) - v; the spread of v given z keeps it above 0."""
    z = interpolate(rows.x, rows.e, t=rows.t)
    u = field(params, z, r=rows.t, t=rows.t, condition=condition_of(rows)).u
    return _rms(u - velocity(rows.x, rows.e))


def identity_residual(field: Field, params: PyTree, rows: Rows) -> Float[Array, ""]:
    """Return the size of u - (v - (t - r) du/dt) with the network's own velocity v = u(z, t, t)."""
    condition = condition_of(rows).replace(forward_mode=True)

    def u(z: Array, r: Array, t: Array) -> Array:
        return field(params, z, r=r, t=t, condition=condition).u

    z = interpolate(rows.x, rows.e, t=rows.t)
    v = u(z, rows.t, rows.t)
    tangent = (v, jnp.zeros_like(rows.r), jnp.ones_like(rows.t))
    value, derivative = jax.jvp(u, (z, rows.r, rows.t), tangent)
    return _rms(value - (v - per_row(rows.t - rows.r, z) * derivative))


def additivity_gap(field: Field, params: PyTree, rows: Rows) -> Float[Array, ""]:
    """Return how far one step from t to r ends from two steps by way of the middle."""
    condition = condition_of(rows)

    def step(z: Array, *, r: Array, t: Array) -> Array:
        return advance(z, field(params, z, r=r, t=t, condition=condition).u, r=r, t=t)

    z = interpolate(rows.x, rows.e, t=rows.t)
    s = (rows.r + rows.t) / 2
    return _rms(step(z, r=rows.r, t=rows.t) - step(step(z, r=s, t=rows.t), r=rows.r, t=s))
