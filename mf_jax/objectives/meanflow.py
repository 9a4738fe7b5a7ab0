"""MeanFlow: learn the average velocity from its own identity.

1. By definition (t - r) u(z_t, r, t) is the integral of v from r to t.
2. Differentiating by t gives the MeanFlow identity  u = v - (t - r) du/dt.
3. The total derivative du/dt = v . du/dz + du/dt|_{z,r} is the JVP of u along (v, 0, 1).
4. The identity's right-hand side, without gradient, is the target:

    loss = w |u - sg[v_g - (t - r) JVP]|^2,   tangent (v_g, 0, 1)

Here sg is stop_gradient, which `squared_error` applies to every target, and v_g is v = e - x or its
guided form (mf_jax/flow/guidance.py). On rows with r = t the target is v_g, without derivative.

FLOPs of a step in forward-equivalents of the whole batch, with a share q of rows with r < t: 3 + q
without guidance (forward, backward, and the tangent of the rows with r < t). Guidance adds 1 where
its unconditional factor 1 - omega - kappa is not 0, and q where kappa is not 0.

Source: MeanFlow, arXiv 2505.13447, equations 6 to 11 and algorithm 1.
"""

import dataclasses

import jax.numpy as jnp

from mf_jax.flow.derivative import Derivative
from mf_jax.flow.errors import check_fields
from mf_jax.flow.guidance import Guidance, guided_velocities
from mf_jax.flow.paths import per_row
from mf_jax.objectives import terms

TANGENTS = {
    "v01": (1.0, 0.0, 1.0),
    "v00": (1.0, 0.0, 0.0),
    "v10": (1.0, 1.0, 0.0),
    "v11": (1.0, 1.0, 1.0),
}
"""Tangents (dz, dr, dt) in units of (v, 1, 1); all but `v01` are wrong, for the ablation."""


@dataclasses.dataclass(frozen=True)
class MeanFlow(terms.Objective):
    """Regress the average velocity on the MeanFlow identity.

    Source of the last two fields: ESC, arXiv 2512.11831.
    """

    guidance: Guidance = Guidance()
    weight: terms.AdaptiveWeight = terms.AdaptiveWeight()
    tangent: str = "v01"  # direction of du/dt, a key of `TANGENTS`
    derivative: Derivative = Derivative()
    # over so many first steps the factor of du/dt in the target rises from 0 to 1
    ramp_steps: int = 0
    # over so many first steps the share arccos(step / to_data_steps) / (pi / 2) of the rows with
    # r < t, falling from 1 to 0, has r = 0 instead
    to_data_steps: int = 0

    def __post_init__(self) -> None:
        check_fields("objective", self, tangent=TANGENTS)
        check_fields("objective", self, ramp_steps="[0, inf)", to_data_steps="[0, inf)")

    def loss(self, field, params, draws, step=0, target_params=None) -> terms.Loss:
        """See `Objective.loss`."""
        rows, ramp = draws.interval, 1.0
        if self.ramp_steps:
            ramp = jnp.minimum(step / self.ramp_steps, 1.0)
        if self.to_data_steps:
            share = jnp.arccos(jnp.minimum(step / self.to_data_steps, 1.0)) / (jnp.pi / 2)
            rows = rows.replace(r=jnp.where(rows.fraction < share, 0, rows.r))
            draws = draws.replace(interval=rows)
        u_instant = terms.at_instant(field, params, draws.instant).u
        v = guided_velocities(self.guidance, field, params, draws, own_instant=u_instant)
        (u, _), du_dt = terms.with_derivative(
            field, params, rows, v.tangent, tangent=TANGENTS[self.tangent], how=self.derivative
        )
        target = v.interval - ramp * per_row(rows.t - rows.r, u) * du_dt
        return self.weight.regression(draws, (u_instant, v.instant), (u, target), du_dt)
