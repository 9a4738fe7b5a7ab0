"""MeanFlow: learn the average velocity from its own identity.

1. By definition (t - r) u(z_t, r, t) is the integral of v from r to t.
2. Differentiating by t gives the MeanFlow identity  u = v - (t - r) du/dt.
3. The total derivative du/dt = v . du/dz + du/dt|_{z,r} is the JVP of u along (v, 0, 1) in (z, r, t).
4. The identity's right-hand side, without gradient, is the target:

    loss = w |u - sg[v_g - (t - r) JVP]|^2,   tangent (v_g, 0, 1)

where sg is stop_gradient (`squared_error` applies it to every target, and nothing else has to) and
v_g is v = e - x or its guided form (mf_jax/flow/guidance.py). On rows with r = t the target is v_g and needs
no derivative, so only the rows with r < t pay for one.

Cost of a step in forward-equivalents of the whole batch, with a share q of rows with r < t: 3 + q without
guidance (forward, backward, and the tangent of the rows with r < t); guidance adds 1 where its unconditional
factor 1 - omega - kappa is not 0, and q where kappa is not 0.

Source: MeanFlow, arXiv 2505.13447, equations 6 to 11 and algorithm 1.
"""

import dataclasses

from jaxtyping import Array, Float, Int, PyTree

from mf_jax.errors import BadInput
from mf_jax.flow.guidance import Guidance, guided_velocities, over_whole_interval
from mf_jax.flow.paths import per_row
from mf_jax.flow.records import Draws, Field
from mf_jax.objectives.terms import (
    AdaptiveWeight,
    Metrics,
    Objective,
    at_instant,
    squared_error,
    step_metrics,
    with_derivative,
)

TANGENTS = {
    "v01": (1.0, 0.0, 1.0),
    "v00": (1.0, 0.0, 0.0),
    "v10": (1.0, 1.0, 0.0),
    "v11": (1.0, 1.0, 1.0),
}
"""Tangents (dz, dr, dt) in units of (v, 1, 1). All but `v01` are wrong, for table 1b of the paper."""


@dataclasses.dataclass(frozen=True)
class MeanFlow(Objective):
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

    def __post_init__(self) -> None:
        if self.tangent not in TANGENTS:
            raise BadInput(
                f"objective.tangent={self.tangent!r}: must be one of {', '.join(TANGENTS)}"
            )

    def loss(
        self,
        field: Field,
        params: PyTree,
        draws: Draws,
        step: Int[Array, ""],
        target_params: PyTree | None = None,
    ) -> tuple[Float[Array, ""], Metrics]:
        """Return the loss of one step.

        Args:
          field, params: the network.
          draws: everything random in the step.
          step, target_params: not used; the target is the network's own, and does not change over training.

        Returns:
          The scalar loss, and the metrics of `step_metrics`.
        """
        del step, target_params
        draws = draws.replace(instant=over_whole_interval(draws.instant))
        u_instant = at_instant(field, params, draws.instant).u
        v = guided_velocities(self.guidance, field, params, draws, own_instant=u_instant)
        tangent = TANGENTS[self.tangent]
        (u, _), du_dt = with_derivative(field, params, draws.interval, v.interval, tangent=tangent)
        target = v.interval - per_row(draws.interval.t - draws.interval.r, u) * du_dt
        v_error = squared_error(u_instant, v.instant)
        u_error = squared_error(u, target)
        loss = self.weight.mean(v_error, u_error)
        return loss, step_metrics(draws, v_error=v_error, u_error=u_error, du_dt=du_dt)
