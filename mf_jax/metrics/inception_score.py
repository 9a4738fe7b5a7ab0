"""Inception Score of samples that come batch by batch: exp of the mean of KL(p(y|x) | p(y)).

It is the mean over parts of nearly equal size, cut in the order of the samples' numbers. It means
little for samples sorted by class, where a part holds few classes.

Source: Salimans et al., arXiv 1606.03498, section 4.
"""

import numpy as np
from jaxtyping import Int, Shaped
from scipy.special import softmax, xlogy

from mf_jax.flow.errors import BadInput


class InceptionScore:
    """Sums over the samples of each of `splits` parts; num_samples: of all parts."""

    def __init__(self, num_samples: int, num_classes: int, splits: int = 10) -> None:
        self._starts = np.arange(splits) * num_samples // splits
        self._counts, self._is_enough = np.zeros(splits), num_samples >= splits
        self._classes = np.zeros((splits, num_classes))
        self._certainty = np.zeros(splits)

    def add(self, logits: Shaped[np.ndarray, "b k"], index: Int[np.ndarray, "b"]) -> None:
        """Add the samples of these numbers."""
        p = softmax(logits.astype(np.float64), axis=1)
        part = np.searchsorted(self._starts, index, side="right") - 1
        np.add.at(self._counts, part, 1)
        np.add.at(self._classes, part, p)
        np.add.at(self._certainty, part, xlogy(p, p).sum(axis=1))

    def result(self) -> tuple[float | None, float | None]:
        """Return the mean of the score over the parts, and its (biased) standard deviation.

        Both are None if there are fewer samples than parts.
        """
        if not self._is_enough:
            return None, None
        if not self._counts.all():
            raise BadInput("Inception Score has a part without samples; add all samples first")
        marginal = self._classes / self._counts[:, None]
        scores = np.exp(self._certainty / self._counts - xlogy(marginal, marginal).sum(axis=1))
        if not np.isfinite(scores).all():
            raise BadInput("logits hold NaN or infinite values: look for a diverged network")
        return float(scores.mean()), float(scores.std())
