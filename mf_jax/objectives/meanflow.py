"""MeanFlow: learn the average velocity from its own identity.

1. By definition (t - r) u(z_t, r, t) is the integral of v from r to t.
2. Differentiating by t gives the MeanFlow identity  u = v - (t - r) du/dt.
3. The total derivative du/dt = v . du/dz + du/dt|_{z,r} is the JVP of u along (v, 0, 1) in (z, r, t).
4. The identity's right-hand side, without gradient, is the target:

    loss = w |u - sg[v_g - (t - r) JVP]|^2,   tangent (v_g, 0, 1)

where sg is stop_gradient (`squared_error` applies it to every target, and nothing else has to) and
v_g is v = e - x or its guided form (mf_jax/guidance.py). On rows with r = t the target is v_g and needs
no derivative, so only the rows with r < t pay for one.

Cost of a step in forward-equivalents of the whole batch, with a share q of rows with r < t: 3 + q without
guidance (forward, backward, and the tangent of the rows with r < t); guidance adds 1 where its unconditional
factor 1 - omega - kappa is not 0, and q where kappa is not 0.

Source: MeanFlow, arXiv 2505.13447, equations 6 to 11 and algorithm 1.
"""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PyTree

from mf_jax.draws import condition_of
from mf_jax.guidance import Guidance, guided_velocities
from mf_jax.objectives.errors import Metrics, average, binned_errors
from mf_jax.objectives.weighting import AdaptiveWeight, squared_error
from mf_jax.paths import interpolate, per_row
from mf_jax.types import BadInput, Draws, Field, Rows

TANGENTS = {"v01": (1.0, 0.0, 1.0), "v00": (1.0, 0.0, 0.0), "v10": (1.0, 1.0, 0.0), "v11": (1.0, 1.0, 1.0)}
"""Tangents (dz, dr, dt) in units of (v, 1, 1). All but `v01` are wrong, for table 1b of the paper."""


@dataclasses.dataclass(frozen=True)
class MeanFlow:
    """Regress the average velocity on the MeanFlow identity.

    Args:
      guidance: guidance inside the target.
      weight: the weight of rows.
      tangent: direction of du/dt, a key of `TANGENTS`; `v01` is right, the others reproduce the ablation.

    Raises:
      BadInput: for an unknown tangent.
    """

    guidance: Guidance = dataclasses.field(default_factory=Guidance)
    weight: AdaptiveWeight = dataclasses.field(default_factory=AdaptiveWeight)
    tangent: str = "v01"
    learns_average: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.tangent not in TANGENTS:
            raise BadInput(f"objective.tangent={self.tangent!r}: must be one of {', '.join(TANGENTS)}")

    def loss(
        self, field: Field, params: PyTree, draws: Draws, step: Int[Array, ""]
    ) -> tuple[Float[Array, ""], Metrics]:
        """Return the loss of one step.

        Args:
          field, params: the network.
          draws: everything random in the step.
          step: not used; the objective does not change over training.

        Returns:
          The scalar loss, and metrics: loss, u_error (rows with r < t) and v_error (rows with r = t), both by
          bins of t, and du_dt, the root mean square of the derivative.
        """
        del step
        instant, interval = draws.instant, draws.interval
        u_instant = _velocity_of(field, params, instant)
        v_instant, v_interval = guided_velocities(self.guidance, field, params, draws, u_instant=u_instant)
        u_interval, du_dt = self._derivative(field, params, interval, v_interval)
        target = v_interval - per_row(interval.t - interval.r, du_dt) * du_dt
        v_error = squared_error(u_instant, v_instant)
        u_error = squared_error(u_interval, target)
        loss = self.weight.mean(v_error, u_error)
        return loss, {
            "loss": average(loss[None]),
            **binned_errors("u_error", u_error, interval),
            **binned_errors("v_error", v_error, instant),
            "du_dt": average(jnp.sqrt(jnp.mean(du_dt**2, axis=tuple(range(1, du_dt.ndim))))),
        }

    def _derivative(
        self, field: Field, params: PyTree, rows: Rows, v: Float[Array, "b ..."]
    ) -> tuple[Float[Array, "b ..."], Float[Array, "b ..."]]:
        """Return u(z_t, r, t), and du/dt along the tangent."""
        if rows.t.shape[0] == 0:
            return rows.x, rows.x
        condition = condition_of(rows)

        def u(z, r, t):
            return field(params, z, r=r, t=t, condition=condition).u

        dz, dr, dt = TANGENTS[self.tangent]
        point = interpolate(rows.x, rows.e, t=rows.t), rows.r, rows.t
        direction = dz * v, dr * jnp.ones_like(rows.r), dt * jnp.ones_like(rows.t)
        return jax.jvp(u, point, direction)


def _velocity_of(field: Field, params: PyTree, rows: Rows) -> Float[Array, "b ..."]:
    """Return u(z_t, t, t), the velocity that the network predicts for rows with r = t."""
    if rows.t.shape[0] == 0:
        return rows.x
    z = interpolate(rows.x, rows.e, t=rows.t)
    return field(params, z, r=rows.t, t=rows.t, condition=condition_of(rows)).u
