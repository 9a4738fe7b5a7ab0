"""Terminal velocity matching: where a step ends, it moves with the velocity of the flow.

1. A step from t to r ends at X(r) = z_t - (t - r) u(z_t, r, t).
2. As r changes, the end moves along the flow: dX/dr = v(X, r). In terms of u, with t and z_t held fixed,

    u - (t - r) du/dr = v(X, r)

3. The gradient passes through the left-hand side, derivative included; the right-hand side is the network's own
   velocity at r, of its moving average, and is trained by flow matching at the same times r:

    loss = w |u - (t - r) du/dr - sg[u_ema(X, r, r)]|^2 + w |u(z_r, r, r) - v_g|^2

Rows with r = t are rows of the flow-matching term. The first term looks at no data and its error is much smaller than
that of the second, so that an adaptive weight (p > 0) favours it: use p = 0.

Cost of a step in forward-equivalents of the whole batch, with a share q of rows with r < t: 3 + 7 q (the term with the
derivative 6, its target 1); guidance adds 1 where its unconditional factor is not 0.

Source: terminal velocity matching, arXiv 2511.19797.
"""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PyTree

from mf_jax.flow.draws import condition_of, join_all
from mf_jax.flow.guidance import Guidance, guided_velocities, over_whole_interval
from mf_jax.flow.paths import advance, interpolate, per_row
from mf_jax.flow.records import Draws, Field, Rows
from mf_jax.objectives.terms import (
    AdaptiveWeight,
    Metrics,
    Objective,
    at_instant,
    check_target_ema,
    squared_error,
    step_metrics,
    with_derivative,
)


@dataclasses.dataclass(frozen=True)
class TerminalVelocity(Objective):
    """Regress the velocity of a step's end on the flow's velocity there.

    Args:
      guidance: guidance inside the flow-matching term.
      weight: the weight of rows.
      target_ema: decay of the moving average that the target uses, in [0, 1); 0 = the parameters themselves.

    Raises:
      BadInput: for a decay out of range.
    """

    guidance: Guidance = dataclasses.field(default_factory=Guidance)
    weight: AdaptiveWeight = dataclasses.field(default_factory=AdaptiveWeight)
    target_ema: float = 0.99
    second_order: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_target_ema(self.target_ema)

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
          step: not used; the objective does not change over training.
          target_params: the parameters of the target's velocity; None = params.

        Returns:
          The scalar loss, and the metrics of `step_metrics`: v_error of the flow-matching term, all rows at r;
          u_error of the other; du_dt is the derivative in r.
        """
        del step
        interval = draws.interval
        at_r = draws.replace(interval=interval.replace(t=interval.r))
        rows = over_whole_interval(join_all(at_r))
        u_r = at_instant(field, params, rows).u
        no_rows = jax.tree.map(lambda leaf: leaf[:0], rows)
        v = guided_velocities(self.guidance, field, params, Draws(rows, no_rows), own_instant=u_r)
        v_error = squared_error(u_r, v.instant)
        (u, _), du_dr = with_derivative(
            field,
            params,
            interval,
            jnp.zeros_like(interval.x),
            tangent=(0.0, 1.0, 0.0),
            with_gradient=True,
        )
        gap = per_row(interval.t - interval.r, u)
        target = self._velocity_at_end(
            field, params if target_params is None else target_params, interval, u
        )
        u_error = squared_error(u - gap * du_dr, target)
        loss = (jnp.sum(self.weight(v_error)) + jnp.sum(self.weight(u_error))) / rows.t.shape[0]
        metrics = step_metrics(
            draws.replace(instant=rows), v_error=v_error, u_error=u_error, du_dt=du_dr
        )
        return loss, metrics

    def _velocity_at_end(
        self, field: Field, teacher: PyTree, rows: Rows, u: Float[Array, "b ..."]
    ) -> Float[Array, "b ..."]:
        """Return the network's velocity where its own step from t to r ends."""
        if rows.t.shape[0] == 0:
            return rows.x
        end = advance(interpolate(rows.x, rows.e, t=rows.t), u, r=rows.r, t=rows.t)
        told = condition_of(over_whole_interval(rows))
        return field(teacher, end, r=rows.r, t=rows.r, condition=told).u
