"""Terminal velocity matching: where a step ends, it moves with the velocity of the flow.

1. A step from t to r ends at X(r) = z_t - (t - r) u(z_t, r, t).
2. As r changes, the end moves along the flow: dX/dr = v(X, r). With t and z_t fixed this reads
   u - (t - r) du/dr = v(X, r).
3. The gradient passes through the left-hand side, derivative included. The right-hand side is the
   averaged network's velocity at r, which flow matching trains at the same times r:

    loss = w |u - (t - r) du/dr - sg[u_ema(X, r, r)]|^2 + w |u(z_r, r, r) - v_g|^2

Rows with r = t are rows of the flow-matching term. The first term looks at no data and is much
smaller; an adaptive weight (p > 0) favours it: use p = 0.

FLOPs of a step in forward-equivalents of the whole batch, with a share q of rows r < t: 3 + 7 q
(the term with the derivative 6, its target 1); guidance adds 1 where its unconditional factor is
not 0.

Source: terminal velocity matching, arXiv 2511.19797.
"""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from mf_jax.flow.guidance import Guidance, guided_velocities
from mf_jax.flow.paths import advance, interpolate, per_row
from mf_jax.flow.records import Draws, Field, Step
from mf_jax.flow.rows import at_time, join_rows
from mf_jax.objectives import terms


@dataclasses.dataclass(frozen=True)
class TerminalVelocity(terms.Objective):
    """Regress the velocity of a step's end on the flow's velocity there."""

    guidance: Guidance = Guidance()
    weight: terms.AdaptiveWeight = terms.AdaptiveWeight()
    target_ema: float = 0.99
    second_order: ClassVar[bool] = True

    def __post_init__(self) -> None:
        terms.check_target_ema(self.target_ema)

    def loss(
        self, field: Field, params: PyTree, draws: Draws, step: Step = 0, target_params: Any = None
    ) -> terms.Loss:
        """See `Objective.loss`; the metric du_dt is the derivative in r."""
        interval, still = draws.interval, jnp.zeros_like(draws.interval.x)
        at_r = at_time(interval, interval.r)
        rows = join_rows([draws.instant, at_r])
        u_r = terms.at_instant(field, params, rows).u
        alone = Draws(rows, jax.tree.map(lambda leaf: leaf[:0], rows))
        v = guided_velocities(self.guidance, field, params, alone, own_instant=u_r)
        (u, _), du_dr = terms.with_derivative(
            field, params, interval, still, tangent=(0.0, 1.0, 0.0), with_gradient=True
        )
        teacher = params if target_params is None else target_params
        z = interpolate(interval.x, interval.e, t=interval.t)
        end = advance(z, u, r=interval.r, t=interval.t)
        target = terms.at_instant(field, teacher, at_r, end).u
        v_error = terms.squared_error(u_r, v.instant)
        u_error = terms.squared_error(u - per_row(interval.t - interval.r, u) * du_dr, target)
        draws = draws.replace(instant=rows)
        loss = jnp.sum(self.weight(v_error, rows)) + jnp.sum(self.weight(u_error, interval))
        loss /= rows.t.shape[0]
        return loss, terms.step_metrics(draws, v_error=v_error, u_error=u_error, du_dt=du_dr)
