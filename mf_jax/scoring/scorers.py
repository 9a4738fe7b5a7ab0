"""Scores of batches of pictures: Inception features, and the statistics of many pictures without holding them."""

import contextlib
import dataclasses
import functools
import itertools
import tempfile
from collections.abc import Iterator, Sequence

import jax.numpy as jnp
import numpy as np
from etils import epath
from jaxtyping import Array, Int, UInt8
from rich.progress import track

from mf_jax.metrics.inception import FEATURES, Inception, inception_features
from mf_jax.metrics.moments import add_rows, mean_and_covariance, start_sums
from mf_jax.metrics.reference_file import Reference, Statistics, read_pictures, read_reference
from mf_jax.metrics.row_store import RowArray
from mf_jax.metrics.suite import SampleScores, check_widths
from mf_jax.runtime import processes

_KEPT_FEATURES, _BLOCK = 10_000, 250
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

    def __call__(
        self, batches: Batches, num: int, *, batch_size: int, what: str
    ) -> list[dict[str, float]]:
        """Return the scores of samples, a record for each reference.

        Args:
          batches: the samples.
          num: samples in all.
          batch_size: of a batch.
          what: is scored, for the progress bar.

        Returns:
          The records; empty ones on all processes of a job but the first.
        """
        with (
            tempfile.TemporaryDirectory() as spool,
            contextlib.closing(SampleScores(num, spool, least=self.least_samples)) as samples,
        ):
            for pixels, index in track(
                batches, what, -(-num // batch_size), disable=not self.show_progress
            ):
                samples.add(
                    inception_features(self.inception.params, _in_colour(pixels)),
                    index,
                    index < num,
                )
            if (
                not processes.is_first()
            ):  # what was added is on all processes of a job, and one has the rows
                return [{} for _ in self.references]
            mean, std = samples.inception_score()
            shared = {"inception_score": mean, "inception_score_std": std}
            return [samples.against(reference) | shared for reference in self.references]


def load_reference(path: epath.PathLike, inception: Inception) -> Reference:
    """Read reference statistics; what a file of pictures does not say is computed from them.

    Args:
      path: of the `.npz`.
      inception: the network of features.

    Raises:
      BadInput: as `read_reference`, or if it is of other features.
    """
    reference = read_reference(path, functools.partial(_statistics, inception))
    check_widths(reference, FEATURES["2048"], FEATURES["spatial"])  # before any sample is made
    if (
        reference.features is None and reference.num_pictures
    ):  # as the evaluation of ADM has its files
        blocks = (_features(inception, block)["2048"] for block in read_pictures(path, _BLOCK))
        rows = np.concatenate(
            [np.asarray(rows) for rows in itertools.islice(blocks, _KEPT_FEATURES // _BLOCK)]
        )
        return dataclasses.replace(reference, features=RowArray(rows))
    return reference


def _statistics(inception: Inception, blocks: Iterator[UInt8[np.ndarray, "n h w c"]]) -> Statistics:
    """Return the statistics of pictures, and the features of the first."""
    sums = {name: start_sums(FEATURES[name]) for name in ("2048", "spatial")}
    rows, left = [], _KEPT_FEATURES
    for block in blocks:
        features = _features(inception, block)
        for name in sums:
            sums[name] = add_rows(sums[name], features[name], np.ones(len(block), bool))
        rows.append(np.asarray(features["2048"][:left]))
        left -= len(rows[-1])
    count, *pooled = mean_and_covariance(sums["2048"])
    _, *spatial = mean_and_covariance(sums["spatial"])
    return Statistics(count, *pooled, *spatial, np.concatenate(rows))


def _features(inception: Inception, block: UInt8[np.ndarray, "n h w c"]) -> dict[str, Array]:
    return inception_features(inception.params, _in_colour(jnp.asarray(block)))


def _in_colour(pixels: UInt8[Array, "b h w c"]) -> UInt8[Array, "b h w 3"]:
    return jnp.repeat(pixels, 3, axis=-1) if pixels.shape[-1] == 1 else pixels
