"""Pixel MeanFlow: improved MeanFlow for a network that predicts the data, with optional perceptual terms.

The network's output is read as x_hat, and u = (z - x_hat) / max(t, t_clip) (`models.DataPrediction` does so, for
training and sampling alike). The sample's own velocity is clipped in the same way, v = (z - x) / max(t, t_clip), which
is e - x for t >= t_clip; everything else is improved MeanFlow. Since x_hat = z - max(t, t_clip) u is a picture, losses
that compare pictures can be added for t below their t_max.

Cost of a step: that of improved MeanFlow, and of the perceptual terms.

Source: pixel MeanFlow, arXiv 2601.22158.
"""

import dataclasses
from collections.abc import Callable
from typing import ClassVar

import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PyTree

from mf_jax.errors import BadInput
from mf_jax.flow.draws import join_rows, num_groups
from mf_jax.flow.guidance import Guidance
from mf_jax.flow.paths import interpolate, per_row
from mf_jax.flow.records import Draws, Field, Rows
from mf_jax.objectives.improved_meanflow import ImprovedMeanFlow
from mf_jax.objectives.terms import AdaptiveWeight, Metrics, Objective, average, row_mean


@dataclasses.dataclass(frozen=True)
class PerceptualTerm:
    """A distance between pictures, added to the loss.

    Args:
      name: of its metric.
      distance: takes predicted and real pictures `[B, H, W, C]`, returns `[B]`, not negative.
      factor: of the weighted distance in the loss, at least 0 (published: 0.4 for LPIPS, 0.1 for ConvNeXt-V2).
      t_max: only rows with t below it count, in [0, 1].
    """

    name: str
    distance: Callable[[Array, Array], Array]
    factor: float
    t_max: float = 1.0


@dataclasses.dataclass(frozen=True)
class PixelMeanFlow(Objective):
    """Improved MeanFlow with a clipped velocity and perceptual terms.

    Args:
      guidance, weight, velocity: as improved MeanFlow has them.
      t_clip: times below it count as it where something is divided by t; in (0, 1), the network's own.
      perceptual: terms that compare x_hat with x.

    Raises:
      BadInput: for an unknown velocity, or a t_clip out of range.
    """

    guidance: Guidance = dataclasses.field(default_factory=Guidance)
    weight: AdaptiveWeight = dataclasses.field(default_factory=AdaptiveWeight)
    velocity: str = "head"
    t_clip: float = 0.05
    perceptual: tuple[PerceptualTerm, ...] = ()
    predicts: ClassVar[str] = "data"

    def __post_init__(self) -> None:
        ImprovedMeanFlow(velocity=self.velocity)
        if not 0 < self.t_clip < 1:
            raise BadInput(
                f"model.t_clip={self.t_clip}: must be within (0, 1); pixel MeanFlow uses 0.05"
            )

    @property
    def needs_second_head(self) -> bool:
        """Whether the network's own velocity is a head of its own."""
        return self.velocity == "head"

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
          field, params: the network, in terms of u.
          draws: everything random in the step.
          step, target_params: not used; the target is the network's own, and does not change over training.

        Returns:
          The scalar loss, and the metrics of improved MeanFlow and one for each perceptual term.
        """
        del step, target_params
        improved = ImprovedMeanFlow(self.guidance, self.weight, self.velocity)
        loss, metrics, predictions = improved.loss_and_predictions(
            field, params, draws, self._given
        )
        pairs = list(zip((draws.instant, draws.interval), predictions, strict=True))
        for term in self.perceptual:
            groups = num_groups(draws)
            x_hat = join_rows([self._data(rows, u) for rows, (u, _) in pairs], groups=groups)
            x, t = (
                join_rows([getattr(rows, name) for rows, _ in pairs], groups=groups)
                for name in "xt"
            )
            distance = jnp.where(t < term.t_max, term.distance(x_hat, x), 0.0)
            loss += term.factor * row_mean(self.weight(distance))
            metrics |= {term.name: average(distance, t < term.t_max)}
        return loss, metrics

    def _clip(self, rows: Rows) -> Float[Array, "b ..."]:
        return per_row(jnp.maximum(rows.t, self.t_clip), rows.x)

    def _given(self, rows: Rows) -> Float[Array, "b ..."]:
        return (interpolate(rows.x, rows.e, t=rows.t) - rows.x) / self._clip(rows)

    def _data(self, rows: Rows, u: Float[Array, "b ..."]) -> Float[Array, "b ..."]:
        return interpolate(rows.x, rows.e, t=rows.t) - self._clip(rows) * u
