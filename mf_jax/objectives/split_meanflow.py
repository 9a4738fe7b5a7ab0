"""SplitMeanFlow: an interval is the sum of its two parts, without derivative.

For any s in (r, t), with z_s = z_t - (t - s) u(z_t, s, t), displacements add up:

    (t - r) u(z_t, r, t) = (t - s) u(z_t, s, t) + (s - r) u(z_s, r, s)

    loss = w |u(z_t, r, t) - sg[(right-hand side) / (t - r)]|^2

With s the middle and dyadic times (`times.name=dyadic`) these are Shortcut models. Rows with r = t
carry the data and guidance; rows with r < t learn from the network alone. Their error is so small
that an adaptive weight (p > 0) favours agreement with one another over the data: use p = 0.

FLOPs of a step in forward-equivalents of the whole batch, with a share q of rows r < t: 3 + 2 q;
guidance adds 1 - q where its unconditional factor is not 0.

Source: SplitMeanFlow, arXiv 2507.16884, equation 8; Shortcut models, arXiv 2410.12557, equation 5.
"""

import dataclasses
from typing import ClassVar

import jax
from jaxtyping import PyTree

from mf_jax.flow.errors import check_fields
from mf_jax.flow.guidance import Guidance, guided_velocities
from mf_jax.flow.paths import Points, advance, per_row, quotient
from mf_jax.flow.records import Field, Rows
from mf_jax.flow.rows import point_of, predict
from mf_jax.objectives import terms

SPLITS = ("uniform", "midpoint")


@dataclasses.dataclass(frozen=True)
class SplitMeanFlow(terms.Objective):
    """Regress the average velocity over an interval on those over its two parts."""

    guidance: Guidance = Guidance()
    weight: terms.AdaptiveWeight = terms.AdaptiveWeight()
    split: str = "uniform"  # where s lies between r and t
    target_ema: float = 0.0
    interval_data: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_fields("objective", self, split=SPLITS, target_ema="[0, 1)")

    def loss(self, field, params, draws, step=0, target_params=None) -> terms.Loss:
        """See `Objective.loss`."""
        u_instant = terms.at_instant(field, params, draws.instant).u
        # only the rows with r = t look at the data
        data_rows = draws.replace(interval=jax.tree.map(lambda leaf: leaf[:0], draws.interval))
        v = guided_velocities(self.guidance, field, params, data_rows, own_instant=u_instant)
        teacher = params if target_params is None else target_params
        u, target, du_dt = self._parts(field, params, teacher, draws.interval)
        return self.weight.regression(draws, (u_instant, v.instant), (u, target), du_dt)

    def _parts(
        self, field: Field, params: PyTree, teacher: PyTree, rows: Rows
    ) -> tuple[Points, Points, Points]:
        """Return u over the interval, over its two parts, and the difference quotient of u."""
        r, t = rows.r, rows.t
        share = 0.5 if self.split == "midpoint" else 1 - rows.fraction  # of the first part, > 0
        s = t - share * (t - r)
        z = point_of(rows)
        first = predict(field, teacher, rows, z, r=s, t=t).u
        second = predict(field, teacher, rows, advance(z, first, r=s, t=t), r=r, t=s).u
        u = predict(field, params, rows, z, r=r, t=t).u
        weight = per_row(quotient(t - s, t - r), z)
        return u, weight * first + (1 - weight) * second, quotient(u - second, t - s)
