"""What objectives ask of a network: its prediction at r = t, and u(z, r, t) with its total derivative in t."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from mf_jax.flow.draws import condition_of
from mf_jax.flow.paths import interpolate
from mf_jax.flow.records import Field, Prediction, Rows


def at_instant(field: Field, params: PyTree, rows: Rows) -> Prediction:
    """Return the prediction at (z_t, t, t), where u is a velocity; of no rows, no rows.

    Args:
      field, params: the network.
      rows: a sub-batch.
    """
    if rows.t.shape[0] == 0:
        return Prediction(u=rows.x, v=rows.x)
    z = interpolate(rows.x, rows.e, t=rows.t)
    return field(params, z, r=rows.t, t=rows.t, condition=condition_of(rows))


def with_derivative(
    field: Field,
    params: PyTree,
    rows: Rows,
    velocity: Float[Array, "b ..."],
    *,
    tangent: tuple[float, float, float] = (1.0, 0.0, 1.0),
    with_gradient: bool = False,
) -> tuple[Prediction, Float[Array, "b ..."]]:
    """Return the prediction at (z_t, r, t), and du/dt along a path of the given velocity.

    Args:
      field, params: the network.
      rows: a sub-batch.
      velocity: dz_t/dt, like z.
      tangent: of (z, r, t), in units of (velocity, 1, 1); the total derivative in t is (1, 0, 1).
      with_gradient: whether a gradient of the derivative will be taken, which a network with fused attention refuses.

    Returns:
      The prediction, and the derivative like z. Only u is differentiated, not a second head.
    """
    if rows.t.shape[0] == 0:
        return Prediction(u=rows.x, v=rows.x), rows.x
    condition = condition_of(rows).replace(forward_mode=not with_gradient)

    def u(z: Array, r: Array, t: Array) -> tuple[Array, Prediction]:
        prediction = field(params, z, r=r, t=t, condition=condition)
        return prediction.u, prediction

    dz, dr, dt = tangent
    point = interpolate(rows.x, rows.e, t=rows.t), rows.r, rows.t
    direction = dz * velocity, dr * jnp.ones_like(rows.r), dt * jnp.ones_like(rows.t)
    _, derivative, prediction = jax.jvp(u, point, direction, has_aux=True)
    return prediction, derivative
