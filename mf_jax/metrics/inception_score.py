"""Inception Score: exp of the mean of KL(p(y|x) | p(y)), a mean over parts of nearly equal size.

Parts are cut in the order of the samples. The score means little for samples sorted by class, where
a part holds few classes.

Source: Salimans et al., arXiv 1606.03498, section 4.
"""

import itertools

import numpy as np
from jaxtyping import Float
from scipy.special import softmax, xlogy


def inception_score(
    logits: Float[np.ndarray, "n k"], splits: int = 10
) -> tuple[float, float] | tuple[None, None]:
    """Return the mean of the score over the parts, and its (biased) standard deviation.

    Both are None if there are fewer samples than parts.
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
