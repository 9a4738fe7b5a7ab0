"""Pixel MeanFlow: improved MeanFlow for a network that predicts the data.

`models.DataPrediction` reads the network's output as x_hat: u = (z - x_hat) / max(t, t_clip). A
sample's own velocity is clipped alike: v = (z - x) / max(t, t_clip). The rest is improved MeanFlow
on the straight path through z with this velocity, from z - t v to z + (1 - t) v.

FLOPs of a step: as improved MeanFlow; see `perceptual` for the terms that its figures need.

Source: pixel MeanFlow, arXiv 2601.22158.
"""

import dataclasses
from typing import ClassVar

import jax.numpy as jnp

from mf_jax.flow.errors import check_fields
from mf_jax.flow.paths import per_row
from mf_jax.flow.records import Draws, Rows
from mf_jax.flow.rows import point_of
from mf_jax.objectives import terms
from mf_jax.objectives.improved_meanflow import ImprovedMeanFlow
from mf_jax.objectives.perceptual import Perceptual


@dataclasses.dataclass(frozen=True)
class PixelMeanFlow(ImprovedMeanFlow):
    """Improved MeanFlow with a clipped velocity, and perhaps perceptual terms."""

    t_clip: float = 0.05  # smallest time divided by, the network's own
    perceptual: Perceptual = dataclasses.field(default_factory=Perceptual)
    predicts: ClassVar[str] = "data"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_fields("model", self, t_clip="(0, 1)")

    def loss(self, field, params, draws, step=0, target_params=None) -> terms.Loss:
        """See `Objective.loss`."""
        clipped = Draws(self._clip(draws.instant), self._clip(draws.interval))
        loss, metrics, u = self.with_predictions(field, params, clipped)
        if self.perceptual.distances:
            more, distances = self.perceptual.loss(draws, u, self.weight)
            loss, metrics = loss + more, metrics | distances
        return loss, metrics

    @property
    def frozen(self) -> Perceptual:
        """See `Objective`."""
        return self.perceptual

    def with_frozen(self, frozen: Perceptual) -> "PixelMeanFlow":
        """See `Objective`."""
        return dataclasses.replace(self, perceptual=frozen)

    def _clip(self, rows: Rows) -> Rows:
        z = point_of(rows)
        v = (z - rows.x) / per_row(jnp.maximum(rows.t, self.t_clip), z)
        return rows.replace(x=z - per_row(rows.t, z) * v, e=z + per_row(1 - rows.t, z) * v)
