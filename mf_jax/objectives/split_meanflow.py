"""SplitMeanFlow: an interval is the sum of its two parts, without derivative.

For any s in (r, t) the displacement over [r, t] is that over [s, t] and then over [r, s]:

    (t - r) u(z_t, r, t) = (t - s) u(z_t, s, t) + (s - r) u(z_s, r, s),   z_s = z_t - (t - s) u(z_t, s, t)

    loss = w |u(z_t, r, t) - sg[(right-hand side) / (t - r)]|^2

With s the middle and dyadic times (`times.name=dyadic`) these are Shortcut models. Rows with r = t carry the data (and
guidance); rows with r < t learn from the network alone, and their error is so much smaller that an adaptive weight
(p > 0) makes them agree with one another before they agree with the data: use p = 0.

Cost of a step in forward-equivalents of the whole batch, with a share q of rows with r < t: 3 + 2 q; guidance adds
1 - q where its unconditional factor is not 0.

Source: SplitMeanFlow, arXiv 2507.16884, equation 8; Shortcut models, arXiv 2410.12557, equation 5.
"""

import dataclasses

import jax
from jaxtyping import Array, Float, Int, PyTree

from mf_jax.errors import BadInput
from mf_jax.flow.draws import condition_of
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
)

SPLITS = ("uniform", "midpoint")


@dataclasses.dataclass(frozen=True)
class SplitMeanFlow(Objective):
    """Regress the average velocity over an interval on those over its two parts.

    Args:
      guidance: guidance inside the target of the rows with r = t.
      weight: the weight of rows.
      split: `uniform` (s uniform between r and t) or `midpoint`.
      target_ema: decay of the moving average that the target uses, in [0, 1); 0 = the parameters themselves.

    Raises:
      BadInput: for an unknown split or a decay out of range.
    """

    guidance: Guidance = dataclasses.field(default_factory=Guidance)
    weight: AdaptiveWeight = dataclasses.field(default_factory=AdaptiveWeight)
    split: str = "uniform"
    target_ema: float = 0.0

    def __post_init__(self) -> None:
        if self.split not in SPLITS:
            raise BadInput(f"objective.split={self.split!r}: must be one of {', '.join(SPLITS)}")
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
          draws: everything random in the step, `fraction` among it for a uniform split.
          step: not used; the objective does not change over training.
          target_params: the parameters of the two parts; None = params.

        Returns:
          The scalar loss, and the metrics of `step_metrics`, du_dt a difference quotient.
        """
        del step
        instant, interval = over_whole_interval(draws.instant), draws.interval
        u_instant = at_instant(field, params, instant).u
        # only the rows with r = t look at the data
        data_rows = Draws(instant=instant, interval=jax.tree.map(lambda leaf: leaf[:0], interval))
        v = guided_velocities(self.guidance, field, params, data_rows, own_instant=u_instant)
        teacher = params if target_params is None else target_params
        u, target, du_dt = self._parts(field, params, teacher, interval)
        v_error, u_error = squared_error(u_instant, v.instant), squared_error(u, target)
        loss = self.weight.mean(v_error, u_error)
        return loss, step_metrics(draws, v_error=v_error, u_error=u_error, du_dt=du_dt)

    def _parts(
        self, field: Field, params: PyTree, teacher: PyTree, rows: Rows
    ) -> tuple[Float[Array, "b ..."], Float[Array, "b ..."], Float[Array, "b ..."]]:
        """Return u over the whole interval, over its parts together, and the difference quotient of u."""
        if rows.t.shape[0] == 0:
            return rows.x, rows.x, rows.x
        condition = condition_of(rows)
        share = (
            0.5 if self.split == "midpoint" else 1 - rows.fraction
        )  # in (0, 1]: the first part's
        s = rows.t - share * (rows.t - rows.r)
        z = interpolate(rows.x, rows.e, t=rows.t)
        first = field(teacher, z, r=s, t=rows.t, condition=condition).u
        second = field(
            teacher, advance(z, first, r=s, t=rows.t), r=rows.r, t=s, condition=condition
        ).u
        u = field(params, z, r=rows.r, t=rows.t, condition=condition).u
        weight = per_row((rows.t - s) / (rows.t - rows.r), z)
        return u, weight * first + (1 - weight) * second, (u - second) / per_row(rows.t - s, u)
