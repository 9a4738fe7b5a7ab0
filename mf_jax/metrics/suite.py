"""All scores of samples from their Inception features, which come batch by batch and are not held in memory."""

import contextlib
import ctypes
from collections.abc import Mapping

import jax
import numpy as np
from etils import epath
from jaxtyping import Array, Float64, Shaped

from mf_jax.errors import BadInput
from mf_jax.metrics.frechet import frechet_distance
from mf_jax.metrics.frechet_noise import frechet_with_error
from mf_jax.metrics.inception_score import ScoreSums, add_logits, inception_score, start_scores
from mf_jax.metrics.moments import FeatureSums, add_rows, mean_and_covariance, start_sums
from mf_jax.metrics.reference_file import Reference
from mf_jax.metrics.row_pairs import OwnPairs, compare, own_pairs
from mf_jax.metrics.row_store import RowStore
from mf_jax.runtime.processes import is_first, on_host

_POOLED, _SPATIAL, _LOGITS = "2048", "spatial", "logits_unbiased"
_NETWORKS = {
    64: "the first pool of Inception",
    192: "the second pool of Inception",
    768: "an earlier layer of Inception, or CLIP",
    1024: "DINOv2 ViT-L",
    2023: "the spatial features of Inception",
    2048: "the last pool of Inception",
    4096: "VGG-16",
}
_MMAP_THRESHOLD = -3
"""M_MMAP_THRESHOLD of malloc.h."""
Moments = tuple[Float64[np.ndarray, "d"], Float64[np.ndarray, "d d"]]


class SampleScores:
    """Takes the features of samples batch by batch and scores them against any number of references.

    Over several processes features are global arrays, every process calls the same methods, and the rows are kept by
    process 0, which alone has the scores that need them.

    Args:
      num_samples: how many there will be, exactly.
      folder: on a local disk, for a file of the feature rows that vanishes with the process.
      with_rows: whether to keep them. Without, FID, sFID and Inception Score are all there is.
      least: fewest samples to score; 0 = one more than the features of a row, below which covariances are singular.
      splits: parts of Inception Score.
    """

    def __init__(
        self,
        num_samples: int,
        folder: epath.PathLike,
        with_rows: bool = True,
        *,
        least: int = 0,
        splits: int = 10,
    ):
        self._num_samples, self._folder, self._least, self._splits = (
            num_samples,
            folder,
            least,
            splits,
        )
        self._seen = np.zeros(num_samples, bool)
        self._with_rows = with_rows
        self._rows: RowStore | None = None
        self._widths: dict[str, int] = {}
        self._sums: dict[str, FeatureSums] = {}
        self._gaussians: dict[str, Moments] = {}
        self._scores: ScoreSums | None = None
        self._own: OwnPairs | None = None

    def add(
        self,
        features: Mapping[str, Shaped[Array | np.ndarray, "b _"]],
        index: Shaped[Array | np.ndarray, "b"],
        weights: Shaped[Array | np.ndarray, "b"],
    ) -> None:
        """Add a batch.

        Args:
          features: of `inception_features`: `2048`, `spatial` and `logits_unbiased` are used, each `[B, _]`.
          index: `[B]`, the number of each sample, from 0; each number is given once.
          weights: `[B]`: 1 counts a row, 0 leaves it out, whatever is in it.

        Raises:
          BadInput: fewer samples than can be scored.
          ValueError: a sample that there is not, or that has come before.
        """
        if self._scores is None:
            self._start({name: features[name].shape[1] for name in (_POOLED, _SPATIAL, _LOGITS)})
        jax.block_until_ready(self._scores)  # batches that wait to be added would each hold memory
        numbers, keep = on_host(index), on_host(weights) != 0
        self._check_new(numbers[keep])
        for name, sums in self._sums.items():
            self._sums[name] = add_rows(sums, features[name], weights)
        self._scores = add_logits(self._scores, features[_LOGITS], index, weights)
        rows = (
            on_host(features[_POOLED]) if self._with_rows else None
        )  # gathering takes every process
        if self._rows is not None:
            self._rows.write(numbers[keep], rows[keep])

    def against(self, reference: Reference) -> dict[str, float]:
        """Return the scores of all samples against a reference.

        Args:
          reference: of `read_reference`.

        Returns:
          fid; sfid if the reference has spatial statistics; where rows are kept, fid_standard_error and, if the
          reference has features, precision, recall and kid.

        Raises:
          BadInput: a reference of other features.
          ValueError: samples that have not been added.
        """
        self._require_all()
        check_widths(reference, self._widths[_POOLED], self._widths[_SPATIAL])
        scores = self._pooled(reference)
        if reference.mean_spatial is not None:
            spatial = reference.mean_spatial, reference.covariance_spatial
            scores["sfid"] = frechet_distance(*self._gaussian(_SPATIAL), *spatial)
        if self._rows is not None and reference.features is not None:
            scores |= self._pairs(reference)
        return scores

    def inception_score(self) -> tuple[float, float]:
        """Return the mean and the standard deviation of Inception Score over its parts.

        Raises:
          ValueError: samples that have not been added.
        """
        self._require_all()
        return inception_score(self._scores)

    def close(self) -> None:
        """Delete the rows."""
        if self._rows is not None:
            self._rows.close()

    def _start(self, widths: Mapping[str, int]) -> None:
        least = self._least or 1 + max(widths[_POOLED], widths[_SPATIAL])
        if self._num_samples < least:
            raise BadInput(
                f"eval.num_samples={self._num_samples}: must be at least {least}, as covariances of {widths[_POOLED]} "
                "features are singular below; use 50000, as published"
            )
        _return_freed_memory()
        self._widths = dict(widths)
        self._sums = {name: start_sums(widths[name]) for name in (_POOLED, _SPATIAL)}
        self._scores = start_scores(self._num_samples, widths[_LOGITS], self._splits)
        if self._with_rows and is_first():
            self._rows = RowStore(self._num_samples, widths[_POOLED], self._folder)

    def _check_new(self, index: Shaped[np.ndarray, "n"]) -> None:
        if not len(index):
            return
        if index.min() < 0 or index.max() >= self._num_samples:
            raise ValueError(
                f"samples {index.min()} to {index.max()} were added; numbers must be in [0, {self._num_samples})"
            )
        if self._seen[index].any() or len(np.unique(index)) < len(index):
            raise ValueError(
                f"a sample of {index.min()} to {index.max()} was added before; each counts once"
            )
        self._seen[index] = True

    def _require_all(self) -> None:
        missing = self._num_samples - int(self._seen.sum())
        if missing:
            raise ValueError(
                f"{missing} of {self._num_samples} samples were not added, the first is {int(self._seen.argmin())}; "
                "scores are of exactly that many: add them all"
            )

    def _gaussian(self, name: str) -> Moments:
        """Return mean and covariance, in the place of the sums."""
        if name not in self._gaussians:
            self._gaussians[name] = mean_and_covariance(self._sums.pop(name))[1:]
        return self._gaussians[name]

    def _pooled(self, reference: Reference) -> dict[str, float]:
        gaussians = *self._gaussian(_POOLED), reference.mean, reference.covariance
        if self._rows is None:
            return {"fid": frechet_distance(*gaussians)}
        return dict(
            zip(
                ("fid", "fid_standard_error"),
                frechet_with_error(*gaussians, self._rows),
                strict=True,
            )
        )

    def _pairs(self, reference: Reference) -> dict[str, float]:
        rows, others, centre = self._rows, reference.features, reference.mean
        if self._own is None:
            self._own = own_pairs(rows, centre)
        scores = compare(rows, others, centre, self._own, own_pairs(others, centre))
        return {
            "precision": scores.precision,
            "recall": scores.recall,
            "kid": scores.kernel_distance,
        }


def _return_freed_memory() -> None:
    """Let arrays above 1 MB go back to the system once freed, for this process: glibc would keep 100 MB of XLA's."""
    with contextlib.suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL(None).mallopt(_MMAP_THRESHOLD, 2**20)


def check_widths(reference: Reference, pooled: int, spatial: int) -> None:
    """Raise BadInput unless a reference is of as many features as samples have.

    Args:
      reference: to compare with.
      pooled, spatial: features of a sample.
    """
    found_spatial = spatial if reference.mean_spatial is None else reference.mean_spatial.size
    for key, found, wanted in (
        ("mu", reference.mean.size, pooled),
        ("mu_s", found_spatial, spatial),
    ):
        if found == wanted:
            continue
        maker = f", as of {_NETWORKS[found]}" if found in _NETWORKS else ""
        raise BadInput(
            f"eval.references: {reference.path}: {key} has {found} features{maker}; must have {wanted} like the "
            "samples: use statistics of the same network and layer"
        )
