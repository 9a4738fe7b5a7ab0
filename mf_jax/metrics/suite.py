"""All scores of samples from their Inception features, which come batch by batch."""

import functools
import itertools
from collections.abc import Mapping

import numpy as np
from jaxtyping import Array, Float, Shaped
from scipy.special import softmax, xlogy

from mf_jax.flow.errors import BadInput, check_within
from mf_jax.metrics.frechet import Moments, frechet_distance, frechet_with_error
from mf_jax.metrics.reference_file import Statistics
from mf_jax.metrics.row_pairs import LEAST_ROWS, own_pairs, pair_scores
from mf_jax.runtime.processes import is_first, on_host

POOLED, SPATIAL, LOGITS = "2048", "spatial", "logits_unbiased"


class SampleScores:
    """Take the features of samples batch by batch and score them against any number of references.

    Over several processes features are global arrays and every process calls `add`. Process 0 alone
    keeps pooled rows, logits and sums, and so has the scores.
    All batches together have num_samples, and at least `least`: 0 = one more than a row's features.
    """

    def __init__(self, num_samples: int, *, least: int = 0) -> None:
        self._num_samples, self._least = num_samples, least
        self._rows: dict[str, np.ndarray] = {}
        self._moments: dict[str, Moments] = {}

    def add(
        self,
        features: Mapping[str, Shaped[Array | np.ndarray, "b _"]],
        index: Shaped[Array | np.ndarray, "b"],
    ) -> None:
        """Add `inception_features` of a batch; numbers from `num_samples` on are padding."""
        num, numbers = self._num_samples, on_host(index)
        keep = numbers < num
        rows = {name: on_host(features[name])[keep] for name in (POOLED, SPATIAL, LOGITS)}
        widths = {name: array.shape[1] for name, array in rows.items()}
        least = self._least or 1 + max(widths[POOLED], widths[SPATIAL])
        fix = f"covariances of {widths[POOLED]} features are singular below; published is 50000"
        check_within("eval.num_samples", num, f"[{least}, inf)", fix)
        if not is_first():
            return
        for name in (POOLED, LOGITS):
            if name not in self._rows:
                # NaN until its sample has come: scores of samples that lack one are refused
                self._rows[name] = np.full((num, widths[name]), np.nan, np.float32)
            self._rows[name][numbers[keep]] = rows[name]
        for name in (POOLED, SPATIAL):
            sums = self._moments.get(name, Moments.none(widths[name]))
            self._moments[name] = sums + Moments.of(rows[name])

    def inception_score(self) -> tuple[float | None, float | None]:
        """See `inception_score`."""
        return inception_score(self._rows[LOGITS])

    def against(self, reference: Statistics) -> dict[str, float | None]:
        """Return all scores that the reference has statistics for."""
        rows = self._rows[POOLED]
        if missing := np.flatnonzero(np.isnan(rows).any(axis=1)).tolist():
            lost = f"{len(missing)} of {self._num_samples} samples are missing or hold NaN"
            raise BadInput(f"{lost}, the first is {missing[0]}: look for a diverged network")
        fid, error = frechet_with_error(self._moments[POOLED].gaussian, reference.pooled, rows)
        scores = {"fid": fid, "fid_standard_error": error}
        if reference.spatial is not None:
            spatial = self._moments[SPATIAL].gaussian
            scores["sfid"] = frechet_distance(spatial, reference.spatial)
        if reference.features is not None:
            pairs: tuple[float | None, ...] = (None, None, None)
            if len(rows) >= LEAST_ROWS:
                pairs = pair_scores(rows, reference.features, own=self._own_pairs)
            scores |= dict(zip(("precision", "recall", "kid"), pairs, strict=True))
        return scores

    @functools.cached_property
    def _own_pairs(self) -> tuple[np.ndarray, float]:
        return own_pairs(self._rows[POOLED])


def check_widths(reference: Statistics, pooled: int, spatial: int) -> None:
    """Raise BadInput unless a reference has as many features as samples have."""
    kinds = ("mu", reference.pooled, pooled), ("mu_s", reference.spatial, spatial)
    for key, gaussian, wanted in kinds:
        if gaussian is not None and gaussian.mean.size != wanted:
            problem = f"{key} has {gaussian.mean.size} features; must have {wanted}, as samples do"
            raise BadInput(f"eval.references: {reference.path}: {problem}")


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
