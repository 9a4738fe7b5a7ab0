"""Inception Score of samples that arrive batch by batch: exp of the mean of KL(p(y|x) | p(y)), in parts of the samples.

The samples are cut, in the order of their numbers, into parts of nearly equal size; the score is the mean over parts.
It means little for samples sorted by class, where a part holds few classes.
"""

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32, Int32, Shaped
from scipy.special import xlogy

from mf_jax.errors import BadInput
from mf_jax.metrics.moments import accumulate, two_sum


@flax.struct.dataclass
class ScoreSums:
    """Sums over the rows of each part so far; the same on every device.

    starts: number of the first sample of each part `[parts]`. counts: rows so far. classes: sum of the probabilities
    of the classes `[parts, K]`. certainty: sum of sum_k p_k log p_k. The `_rest` are what to add to these.
    """

    starts: Int32[Array, "parts"]
    counts: Int32[Array, "parts"]
    classes: Float32[Array, "parts k"]
    classes_rest: Float32[Array, "parts k"]
    certainty: Float32[Array, "parts"]
    certainty_rest: Float32[Array, "parts"]


def start_scores(num_samples: int, num_classes: int, splits: int = 10) -> ScoreSums:
    """Return the sums over no rows.

    Args:
      num_samples: how many there will be, at least 1 for each part.
      num_classes: width of the logits.
      splits: parts.

    Raises:
      BadInput: fewer samples than parts.
    """
    if not 1 <= splits <= num_samples:
        raise BadInput(
            f"eval.num_samples={num_samples}: must be at least {splits}, the parts of Inception Score; use more samples"
        )
    starts = jnp.asarray(np.arange(splits) * num_samples // splits, jnp.int32)
    classes, certainty = (
        (jnp.zeros((splits, num_classes)) for _ in range(2)),
        (jnp.zeros(splits) for _ in range(2)),
    )
    return ScoreSums(starts, jnp.zeros(splits, jnp.int32), *classes, *certainty)


def add_logits(
    sums: ScoreSums,
    logits: Shaped[Array | np.ndarray, "b k"],
    index: Shaped[Array | np.ndarray, "b"],
    weights: Shaped[Array | np.ndarray, "b"],
) -> ScoreSums:
    """Return the sums with more rows in them; compiled, and the sums given are used up.

    Args:
      sums: over the rows before.
      logits: `[B, K]`, which may be split over the devices of a mesh.
      index: `[B]`, the number of each sample, from 0.
      weights: `[B]`: 1 counts a row, 0 leaves it out, whatever is in it.
    """
    return accumulate(_add, sums, logits, index, weights)


def inception_score(sums: ScoreSums) -> tuple[float, float]:
    """Return the mean of the score over the parts, and its standard deviation (divided by their number).

    Raises:
      BadInput: a part without rows, or logits that are not finite.

    Source: Salimans et al., arXiv 1606.03498, section 4.
    """
    counts = np.asarray(sums.counts, np.float64)
    if not counts.all():
        raise BadInput(
            "Inception Score has a part without samples; every part must have some: add all samples first"
        )
    marginal = _exact(sums.classes, sums.classes_rest) / counts[:, None]
    certainty = _exact(sums.certainty, sums.certainty_rest) / counts
    scores = np.exp(certainty - xlogy(marginal, marginal).sum(1))
    if not np.isfinite(scores).all():
        raise BadInput(
            "logits hold NaN or infinite values; all must be finite: look for a diverged network"
        )
    return float(scores.mean()), float(scores.std())


def _exact(rounded: Array, rest: Array) -> np.ndarray:
    return np.asarray(rounded, np.float64) + np.asarray(rest)


def _add(
    sums: ScoreSums,
    logits: Shaped[Array, "b k"],
    index: Shaped[Array, "b"],
    weights: Shaped[Array, "b"],
    devices: int,
) -> ScoreSums:
    keep = weights != 0
    log_p = jax.nn.log_softmax(jnp.where(keep[:, None], logits.astype(jnp.float32), 0))
    p = jnp.exp(log_p)
    part = jnp.searchsorted(sums.starts, index.astype(jnp.int32), side="right") - 1
    member = (part[:, None] == jnp.arange(len(sums.starts))) & keep[:, None]
    chosen = member.astype(jnp.float32).T
    classes, classes_left = two_sum(sums.classes, jnp.matmul(chosen, p, precision="highest"))
    # p log p of a logit of minus infinity is 0
    own = jnp.sum(jnp.where(p > 0, p * log_p, 0), 1)
    certainty, certainty_left = two_sum(
        sums.certainty, jnp.matmul(chosen, own, precision="highest")
    )
    return ScoreSums(
        sums.starts,
        sums.counts + jnp.sum(member, 0, dtype=jnp.int32),
        classes,
        sums.classes_rest + classes_left,
        certainty,
        sums.certainty_rest + certainty_left,
    )
