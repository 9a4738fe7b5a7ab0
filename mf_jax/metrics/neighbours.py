"""Improved precision and recall: how many samples lie within the k-nearest-neighbour balls of the other set.

The manifold of a set is the union of balls around its rows, each reaching to the row's k-th nearest neighbour in the
same set. Precision (fidelity) is the share of generated rows inside the reference manifold, recall (coverage) the share
of reference rows inside the generated one.
"""

import numpy as np
from jaxtyping import Float
from sklearn.metrics import pairwise_distances_chunked

from mf_jax.errors import BadInput
from mf_jax.metrics.frechet import checked_features

_CHUNK_MIB = 256  # memory for one chunk of distances
# Distances come from |a|^2 + |b|^2 - 2ab, exact to about 1e-8 of the rows' norms: copies must still count as inside.
_SLACK = 1e-7


def precision_recall(
    generated: Float[np.ndarray, "n d"], reference: Float[np.ndarray, "m d"], *, k: int = 3
) -> tuple[float, float]:
    """Return improved precision and recall of generated rows against reference rows.

    Args:
        generated: feature rows `[n, d]`, n > k, finite.
        reference: feature rows `[m, d]`, m > k, finite. Use m = n to compare with published values.
        k: which neighbour sets the radius, >= 1.

    Returns:
        Precision and recall, each in [0, 1].

    Raises:
        BadInput: k < 1, no more than k rows, unequal d, or values that are not finite.

    Source:
        Kynkäänniemi et al. 2019 (arXiv:1904.06991), equations 1 and 2.
    """
    if k < 1:
        raise BadInput(f"k is {k}; it must be at least 1: use k=3, as published")
    generated = checked_features(generated, "generated", at_least=k + 1)
    reference = checked_features(reference, "reference", at_least=k + 1, width=generated.shape[1])
    # Distances do not change with the origin, their rounding errors do.
    centre = reference.mean(axis=0)
    generated, reference = generated - centre, reference - centre
    return _share_inside(generated, reference, k), _share_inside(reference, generated, k)


def _share_inside(rows: np.ndarray, manifold: np.ndarray, k: int) -> float:
    slack = _SLACK * max(np.linalg.norm(rows, axis=1).max(), np.linalg.norm(manifold, axis=1).max())
    # Entry 0 of a sorted row is the distance of a point to itself.
    radii = _reduce_distances(manifold, None, lambda block, _: np.partition(block, k, axis=1)[:, k])
    inside = _reduce_distances(
        rows, manifold, lambda block, _: (block <= radii + slack).any(axis=1)
    )
    return float(inside.mean())


def _reduce_distances(rows: np.ndarray, others: np.ndarray | None, reduce_func) -> np.ndarray:
    chunks = pairwise_distances_chunked(
        rows, others, reduce_func=reduce_func, working_memory=_CHUNK_MIB
    )
    return np.concatenate(list(chunks))
