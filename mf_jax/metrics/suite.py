"""All scores of samples from their Inception features, which come batch by batch."""

import itertools
from collections.abc import Mapping

import numpy as np
from jaxtyping import Array, Float, Shaped
from scipy.special import softmax, xlogy

from mf_jax.flow.errors import BadInput
from mf_jax.metrics.frechet import Moments, frechet_distance, frechet_with_error
from mf_jax.metrics.reference_file import Reference
from mf_jax.metrics.row_pairs import LEAST_ROWS, OwnPairs, own_pairs, pair_scores
from mf_jax.runtime.processes import is_first, on_host

POOLED, SPATIAL, LOGITS = "2048", "spatial", "logits_unbiased"
_NETWORKS = {
    64: "the first pool of Inception",
    192: "the second pool of Inception",
    768: "an earlier layer of Inception, or CLIP",
    1024: "DINOv2 ViT-L",
    2023: "the spatial features of Inception",
    2048: "the last pool of Inception",
    4096: "VGG-16",
}


class SampleScores:
    """Take the features of samples batch by batch and score them against any number of references.

    Over several processes features are global arrays and every process calls `add`. Process 0 alone
    keeps pooled rows, logits and sums, and so has the scores.
    All batches together have num_samples, and at least `least`: 0 = one more than a row's features.
    """

    def __init__(self, num_samples: int, *, least: int = 0) -> None:
        self._num_samples, self._least = num_samples, least
        self._rows: np.ndarray | None = None
        self._own: OwnPairs | None = None

    def add(
        self,
        features: Mapping[str, Shaped[Array | np.ndarray, "b _"]],
        index: Shaped[Array | np.ndarray, "b"],
    ) -> None:
        """Add `inception_features` of a batch; numbers from `num_samples` on are padding."""
        numbers = on_host(index)
        keep = numbers < self._num_samples
        rows = {name: on_host(features[name]) for name in (POOLED, SPATIAL, LOGITS)}
        widths = {name: array.shape[1] for name, array in rows.items()}
        least = self._least or 1 + max(widths[POOLED], widths[SPATIAL])
        if self._num_samples < least:
            raise BadInput(
                f"eval.num_samples={self._num_samples}: must be at least {least}, as covariances "
                f"of {widths[POOLED]} features are singular below; use 50000, as published"
            )
        if not is_first():
            return
        if self._rows is None:
            # NaN until its sample has come: scores of samples that lack one are refused
            self._rows, self._logits = (
                np.full((self._num_samples, widths[name]), np.nan, np.float32)
                for name in (POOLED, LOGITS)
            )
            self._pooled, self._spatial = (Moments.none(widths[k]) for k in (POOLED, SPATIAL))
        self._rows[numbers[keep]] = rows[POOLED][keep]
        self._logits[numbers[keep]] = rows[LOGITS][keep]
        self._pooled += Moments.of(rows[POOLED][keep])
        self._spatial += Moments.of(rows[SPATIAL][keep])

    def inception_score(self) -> tuple[float | None, float | None]:
        """See `inception_score`."""
        return inception_score(self._logits)

    def against(self, reference: Reference) -> dict[str, float | None]:
        """Return all scores that the reference has statistics for."""
        if missing := np.flatnonzero(np.isnan(self._rows).any(axis=1)).tolist():
            raise BadInput(
                f"{len(missing)} of {self._num_samples} samples are missing or hold NaN, the "
                f"first is {missing[0]}: look for a diverged network"
            )
        real = reference.statistics
        fid, error = frechet_with_error(self._pooled.gaussian, real.pooled, self._rows)
        scores = {"fid": fid, "fid_standard_error": error}
        if real.spatial is not None:
            scores["sfid"] = frechet_distance(self._spatial.gaussian, real.spatial)
        if real.features is not None:
            pairs: tuple[float | None, ...] = (None, None, None)
            if self._num_samples >= LEAST_ROWS:
                self._own = self._own or own_pairs(self._rows)
                pairs = pair_scores(self._rows, real.features, own=self._own)
            scores |= dict(zip(("precision", "recall", "kid"), pairs, strict=True))
        return scores


def check_widths(reference: Reference, pooled: int, spatial: int) -> None:
    """Raise BadInput unless a reference has as many features as samples have."""
    real = reference.statistics
    for key, gaussian, wanted in (("mu", real.pooled, pooled), ("mu_s", real.spatial, spatial)):
        if gaussian is not None and (width := gaussian.mean.size) != wanted:
            maker = f", as of {_NETWORKS[width]}" if width in _NETWORKS else ""
            raise BadInput(
                f"eval.references: {reference.path}: {key} has {width} features{maker}; must have "
                f"{wanted} like the samples: use statistics of the same network and layer"
            )


def inception_score(
    logits: Float[np.ndarray, "n k"], splits: int = 10
) -> tuple[float, float] | tuple[None, None]:
    """Return mean and (biased) deviation over parts of exp of the mean of KL(p(y|x) | p(y)).

    Both are None if there are fewer samples than parts, which are cut in the order of the samples.
    The score means little for samples sorted by class, where a part holds few classes.

    Source: Salimans et al., arXiv 1606.03498, section 4.
    """
    if len(logits) < splits:
        return None, None
    scores = []
    ends = np.arange(splits + 1) * len(logits) // splits
    for start, end in itertools.pairwise(ends):
        p = softmax(logits[start:end].astype(np.float64), axis=1)
        marginal = p.mean(axis=0)
        certainty = xlogy(p, p).sum(axis=1).mean()
        scores.append(np.exp(certainty - xlogy(marginal, marginal).sum()))
    return float(np.mean(scores)), float(np.std(scores))
