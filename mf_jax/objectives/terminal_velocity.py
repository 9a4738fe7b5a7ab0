"""Terminal velocity matching: where a step ends, it moves with the velocity of the flow.

1. A step from t to r ends at X(r) = z_t - (t - r) u(z_t, r, t).
2. As r changes, the end moves along the flow: dX/dr = v(X, r). With t and z_t fixed this reads
   u - (t - r) du/dr = v(X, r).
3. The gradient passes through the left-hand side, derivative included. The right-hand side is the
   averaged network's velocity at r. Flow matching trains it, at times s of its own:

    loss = w |u - (t - r) du/dr - sg[u_ema(X, r, r)]|^2 + w |u(z_s, s, s) - v_g|^2

4. The unconditional velocity in v_g is the averaged network's. A drawn scale omega, which the
   network is told (`model.told_guidance`), makes v_g = omega v + (1 - omega) u_ema,null. Errors are
   divided by it: they are those of u / omega. Rows without their condition are told 1.

Rows with r = t are rows of the flow-matching term, whose mean is added to the mean of the other. As
published, every row is in both (`draws.instant_of_every_row`). The first term looks at no data and
is much smaller; an adaptive weight (p > 0) favours it: use p = 0.

FLOPs of a step in forward-equivalents of the whole batch, with a share q of rows r < t: 3 + 4 q (3
for r = t, 6 + 1 with the target for r < t); guidance adds 1 - q where its unconditional factor is
not 0. With every row in both terms it is 10, and 1 more.

Source: terminal velocity matching, arXiv 2511.19797, and its published code.
"""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from mf_jax.flow.errors import check_fields
from mf_jax.flow.guidance import Guidance, guided_velocities
from mf_jax.flow.paths import Points, Scalars, advance, per_row
from mf_jax.flow.records import Draws, Field, Rows
from mf_jax.flow.rows import at_time, point_of
from mf_jax.objectives import terms


@dataclasses.dataclass(frozen=True)
class TerminalVelocity(terms.Objective):
    """Regress the velocity of a step's end on the flow's velocity there."""

    guidance: Guidance = Guidance()
    weight: terms.AdaptiveWeight = terms.AdaptiveWeight()
    target_ema: float = 0.99
    interval_data: ClassVar[bool] = False
    second_order: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_fields("objective", self, target_ema="[0, 1)")

    def loss(self, field, params, draws, step=0, target_params=None) -> terms.Loss:
        """See `Objective.loss`; the metric du_dt is the derivative in r."""
        instant, interval = (_told(rows) for rows in (draws.instant, draws.interval))
        teacher = params if target_params is None else target_params
        u_instant = terms.at_instant(field, params, instant).u
        v = self._velocity(field, teacher, instant, u_instant)
        along_r = {"tangent": (0.0, 1.0, 0.0), "with_gradient": True}
        still = jnp.zeros_like(interval.x)
        (u, _), du_dr = terms.with_derivative(field, params, interval, still, **along_r)
        end = advance(point_of(interval), u, r=interval.r, t=interval.t)
        target = terms.at_instant(field, teacher, at_time(interval, interval.r), end).u
        v_error = terms.squared_error(u_instant, v)
        u_error = terms.squared_error(u - per_row(interval.t - interval.r, u) * du_dr, target)
        loss = self._mean(v_error, instant) + self._mean(u_error, interval)
        return loss, terms.step_metrics(draws, v_error=v_error, u_error=u_error, du_dt=du_dr)

    def _velocity(self, field: Field, teacher: PyTree, rows: Rows, own: Points) -> Points:
        """Return v_g of rows with r = t."""
        alone, drawn = Draws(rows, jax.tree.map(lambda leaf: leaf[:0], rows)), rows.guidance
        # drawn guidance with 0 as u(class) is v - (1 - 1 / omega) u_null, which is v_g / omega
        own = own if drawn is None else jnp.zeros_like(own)
        v = guided_velocities(self.guidance, field, teacher, alone, own_instant=own).instant
        return v if drawn is None else per_row(drawn.omega, v) * v

    def _mean(self, error: Scalars, rows: Rows) -> Float[Array, ""]:
        """Return the weighted mean over rows, of which there may be none."""
        if rows.guidance is not None:
            error = error / rows.guidance.omega**2
        return jnp.sum(self.weight(error, rows)) / max(len(error), 1)


def _told(rows: Rows) -> Rows:
    """Return rows whose drawn scale is 1 where they lose their condition."""
    if rows.guidance is None:
        return rows
    omega = jnp.where(rows.dropped, 1, rows.guidance.omega)
    return rows.replace(guidance=rows.guidance.replace(omega=omega))
