"""The path between data and noise, and the conventions that every other module follows.

1. t = 0 is data, t = 1 is noise, and 0 <= r <= t <= 1.
2. The path is z_t = (1 - t) x + t e, with x data and e standard normal noise.
3. The velocity along it is v = dz_t/dt = e - x.
4. The average velocity u(z_t, r, t) is the integral of v from r to t over t - r; u(z_t, t, t) = v.
5. A step down to r is z_r = z_t - (t - r) u(z_t, r, t); in one step from noise, x = e - u(e, 0, 1).

Arrays are `[B, ...]` (images `[B, H, W, C]`), times are `[B]` and keyword-only.

Source: MeanFlow, arXiv 2505.13447, section 4.1.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped

Points = Float[Array, "b ..."]
"""x, e, z, u or v of each row."""
Scalars = Float[Array, "b"]
"""A number of each row."""


def per_row(t: Shaped[Array, "b"], z: Shaped[Array, "b ..."]) -> Shaped[Array, "b ..."]:
    """Return one number per row as `[B, 1, ...]`, with the number of axes of z."""
    return t.reshape(t.shape + (1,) * (z.ndim - 1))


def quotient(change: Points, dt: Scalars) -> Points:
    """Return a change over the time that it takes; 0 where the float of that time is 0."""
    return change / per_row(jnp.where(dt > 0, dt, jnp.inf), change)


def interpolate(x: Points, e: Points, *, t: Scalars) -> Points:
    """Return the point z_t = (1 - t) x + t e between data x and noise e."""
    t = per_row(t, x)
    return (1 - t) * x + t * e


def velocity(x: Points, e: Points) -> Points:
    """Return the velocity v = e - x of the straight path through data x and noise e."""
    return e - x


def advance(z: Points, u: Points, *, r: Scalars, t: Scalars) -> Points:
    """Move from time t down to time r with the average velocity u: z_r = z_t - (t - r) u."""
    return z - per_row(t - r, z) * u
