"""Scores of batches of pictures: Inception features, and the statistics of many pictures without holding them."""

import contextlib
import dataclasses
import tempfile
from collections.abc import Iterator, Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, UInt8
from rich.progress import track

from mf_jax.metrics.inception import FEATURES, Inception, inception_features
from mf_jax.metrics.moments import add_rows, mean_and_covariance, start_sums
from mf_jax.metrics.reference_file import Reference, Statistics
from mf_jax.metrics.suite import SampleScores

_KEPT_FEATURES = 10_000
Batches = Iterator[tuple[UInt8[Array, "b h w c"], Int[np.ndarray, "b"]]]
"""Pictures on the devices, and their numbers; in the last batch there may be padding, with numbers beyond the last."""


@dataclasses.dataclass(frozen=True)
class Judge:
    """What samples are compared with, and in whose features.

    references: to compare with. inception: the network of features. least_samples: of `SampleScores`. show_progress:
    while samples are made.
    """

    references: Sequence[Reference]
    inception: Inception
    least_samples: int
    show_progress: bool

    def __call__(self, batches: Batches, num: int, *, batch_size: int, what: str) -> list[dict[str, float]]:
        """Return the scores of samples, a record for each reference.

        Args:
          batches: the samples.
          num: samples in all.
          batch_size: of a batch.
          what: is scored, for the progress bar.
        """
        with (
            tempfile.TemporaryDirectory() as spool,
            contextlib.closing(SampleScores(num, spool, least=self.least_samples)) as samples,
        ):
            for pixels, index in track(batches, what, -(-num // batch_size), disable=not self.show_progress):
                samples.add(inception_features(self.inception.params, _in_colour(pixels)), index, index < num)
            mean, std = samples.inception_score()
            shared = {"inception_score": mean, "inception_score_std": std}
            return [samples.against(reference) | shared for reference in self.references]


def picture_statistics(inception: Inception, blocks: Iterator[UInt8[np.ndarray, "n h w c"]]) -> Statistics:
    """Return the statistics of pictures, for a reference file that has nothing else; some feature rows are kept.

    Args:
      inception: the network of features.
      blocks: of the pictures.
    """
    sums = {name: start_sums(FEATURES[name]) for name in ("2048", "spatial")}
    rows, left = [], _KEPT_FEATURES
    for block in blocks:
        features = inception_features(inception.params, _in_colour(jnp.asarray(block)))
        for name in sums:
            sums[name] = add_rows(sums[name], features[name], np.ones(len(block), bool))
        rows.append(np.asarray(features["2048"][:left]))
        left -= len(rows[-1])
    count, *pooled = mean_and_covariance(sums["2048"])
    _, *spatial = mean_and_covariance(sums["spatial"])
    return Statistics(count, *pooled, *spatial, np.concatenate(rows))


def _in_colour(pixels: UInt8[Array, "b h w c"]) -> UInt8[Array, "b h w 3"]:
    return jnp.repeat(pixels, 3, axis=-1) if pixels.shape[-1] == 1 else pixels
