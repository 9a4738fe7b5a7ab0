"""Flow matching: u(z, t, t) = v, the boundary that every other objective shares.

    loss = w |u(z_t, t, t) - v|^2,   v = e - x

A network trained this way knows the velocity alone: it is sampled in many steps, and is the multi-step baseline.
Cost of a step in forward-equivalents of the whole batch: 3 (forward and backward).

Source: Lipman et al., arXiv 2210.02747; rectified flow, arXiv 2209.03003.
"""

import dataclasses
from typing import ClassVar

from jaxtyping import Array, Float, Int, PyTree

from mf_jax.flow.draws import join_all
from mf_jax.flow.paths import velocity
from mf_jax.flow.records import Draws, Field
from mf_jax.objectives.terms import (
    AdaptiveWeight,
    Metrics,
    Objective,
    at_instant,
    binned_errors,
    squared_error,
)


@dataclasses.dataclass(frozen=True)
class FlowMatching(Objective):
    """Regress the velocity at r = t on every row, whichever sub-batch it was drawn for.

    Args:
      weight: the weight of rows.
    """

    weight: AdaptiveWeight = dataclasses.field(default_factory=AdaptiveWeight)
    learns_average: ClassVar[bool] = False
    guidable: ClassVar[bool] = False

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
          step, target_params: not used; the target is the data's, and does not change over training.

        Returns:
          The scalar loss, and metrics: loss and v_error (by bins of t).
        """
        del step, target_params
        rows = join_all(draws)
        error = squared_error(at_instant(field, params, rows).u, velocity(rows.x, rows.e))
        loss = self.weight.mean(error)
        return loss, binned_errors("v_error", error, rows)
