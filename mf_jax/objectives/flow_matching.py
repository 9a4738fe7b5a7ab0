"""Flow matching: u(z, t, t) = v, the boundary that every other objective shares.

    loss = w |u(z_t, t, t) - v|^2,   v = e - x

Such a network knows the velocity alone: it is the baseline, sampled in many steps.

FLOPs of a step in forward-equivalents of the whole batch: 3 (forward and backward).

Source: Lipman et al., arXiv 2210.02747; rectified flow, arXiv 2209.03003.
"""

import dataclasses
from typing import ClassVar

from mf_jax.flow.rows import join_rows, velocity_of
from mf_jax.objectives import terms


@dataclasses.dataclass(frozen=True)
class FlowMatching(terms.Objective):
    """Regress the velocity at r = t on every row of both sub-batches."""

    weight: terms.AdaptiveWeight = terms.AdaptiveWeight()
    learns_average: ClassVar[bool] = False
    guidable: ClassVar[bool] = False
    has_tangent: ClassVar[bool] = False

    def loss(self, field, params, draws, step=0, target_params=None) -> terms.Loss:
        """See `Objective.loss`."""
        rows = join_rows([draws.instant, draws.interval])
        u = terms.at_instant(field, params, rows).u
        error = terms.squared_error(u, velocity_of(rows))
        return terms.row_mean(self.weight(error, rows)), terms.binned_errors("v_error", error, rows)
