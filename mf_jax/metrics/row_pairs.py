"""Precision, recall and kernel distance from all pairs of many feature rows, block by block, on the device.

The same numbers as `precision_recall` and `kernel_distance` give in float64, in memory that does not grow with the
number of rows. Distances are |a|^2 + |b|^2 - 2ab in float32, of rows minus a point near their mean. Rounding leaves
about 1e-7 of |a|^2 + |b|^2 of the distance of a row to its copy; what is below such noise is counted as 0, so that a
copy lies inside every ball around its original, and other rows are compared without any slack.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Float32, Int

from mf_jax.errors import BadInput
from mf_jax.metrics.row_store import RowSource

_BLOCK = 1024
_NOISE = 4 * np.finfo(np.float32).eps
"""Times the root of the width: below this share of |a|^2 + |b|^2 a squared distance is rounding."""


class OwnPairs(NamedTuple):
    """What the pairs within one set say.

    radii: squared distance of each row to its k-th nearest other one `[n]`. kernel: mean of (x·y / d + 1)^3 - 1 over
    pairs of different rows.
    """

    radii: Float32[np.ndarray, "n"]
    kernel: float


class PairScores(NamedTuple):
    """Scores of generated rows against reference rows, as `precision_recall` and `kernel_distance` define them."""

    precision: float
    recall: float
    kernel_distance: float


def own_pairs(rows: RowSource, centre: Float[np.ndarray, "d"], *, k: int = 3) -> OwnPairs:
    """Compare all rows of a set with one another.

    Args:
      rows: more than k.
      centre: a point near their mean, `[d]`.
      k: which neighbour sets the radius of a ball, at least 1.

    Raises:
      BadInput: too few rows.
    """
    n = len(rows)
    if n <= k:
        raise BadInput(
            f"{n} rows have no {k} nearest neighbours; there must be at least {k + 1}: use more samples"
        )
    nearest, kernel = np.full((_padded(n), k), np.inf, np.float32), 0.0
    middle = jnp.asarray(centre, jnp.float32)
    for i in range(0, n, _BLOCK):
        a = _block(rows, i)
        for j in range(i, n, _BLOCK):
            b = a if i == j else _block(rows, j)
            own, other = slice(i, i + _BLOCK), slice(j, j + _BLOCK)
            near_a, near_b, sums = _own(
                a, b, middle, nearest[own], nearest[other], n - i, n - j, i == j
            )
            nearest[other] = near_b
            nearest[own] = near_a
            kernel += (1 if i == j else 2) * float(np.asarray(sums).sum(dtype=np.float64))
    return OwnPairs(nearest[:n, k - 1].copy(), kernel / (n * (n - 1)))


def compare(
    generated: RowSource,
    reference: RowSource,
    centre: Float[np.ndarray, "d"],
    own_generated: OwnPairs,
    own_reference: OwnPairs,
) -> PairScores:
    """Compare the rows of two sets.

    Args:
      generated, reference: the sets, of one width.
      centre: a point near the means, `[d]`.
      own_generated, own_reference: of `own_pairs`.

    Source: as `precision_recall` and `kernel_distance`.
    """
    n, m = len(generated), len(reference)
    radii_a, radii_b = (_filled(own.radii) for own in (own_generated, own_reference))
    inside_a, inside_b = np.zeros(len(radii_a), bool), np.zeros(len(radii_b), bool)
    middle, kernel = jnp.asarray(centre, jnp.float32), 0.0
    for i in range(0, n, _BLOCK):
        a, rows = _block(generated, i), slice(i, i + _BLOCK)
        for j in range(0, m, _BLOCK):
            others = slice(j, j + _BLOCK)
            in_a, in_b, sums = _cross(
                a, _block(reference, j), middle, radii_a[rows], radii_b[others]
            )
            inside_a[rows] |= np.asarray(in_a)
            inside_b[others] |= np.asarray(in_b)
            kernel += float(np.asarray(sums).sum(dtype=np.float64))
    distance = own_generated.kernel + own_reference.kernel - 2 * kernel / (n * m)
    return PairScores(float(inside_a[:n].mean()), float(inside_b[:m].mean()), distance)


def _padded(n: int) -> int:
    return -(-n // _BLOCK) * _BLOCK


def _block(rows: RowSource, start: int) -> Float32[Array, "block d"]:
    """Return a block on the device, filled up with zeros, whose kernel minus 1 is 0: one shape, one compilation."""
    block = rows.read(start, start + _BLOCK)
    return jnp.asarray(
        np.pad(block, ((0, _BLOCK - len(block)), (0, 0))) if len(block) < _BLOCK else block
    )


def _filled(radii: Float32[np.ndarray, "n"]) -> Float32[np.ndarray, "padded"]:
    """Return radii filled up with balls that hold nothing."""
    return np.pad(radii, (0, _padded(len(radii)) - len(radii)), constant_values=-1)


def _squared_distances(
    a: Float32[Array, "block d"], b: Float32[Array, "block d"], centre: Float32[Array, "d"]
) -> Float32[Array, "block block"]:
    a, b = a - centre, b - centre
    norms = jnp.sum(a * a, 1)[:, None] + jnp.sum(b * b, 1)
    distances = norms - 2 * jnp.matmul(a, b.T, precision="highest")
    return jnp.where(distances <= _NOISE * a.shape[1] ** 0.5 * norms, 0, distances)


def _kernel(
    a: Float32[Array, "block d"], b: Float32[Array, "block d"]
) -> Float32[Array, "block block"]:
    """Return (a·b / d + 1)^3 - 1: the 1 cancels in the kernel distance, and would round the rest."""
    x = jnp.matmul(a, b.T, precision="highest") / a.shape[1]
    return x * (x * (x + 3) + 3)


@functools.partial(jax.jit, static_argnames="same")
def _own(
    a: Float32[Array, "block d"],
    b: Float32[Array, "block d"],
    centre: Float32[Array, "d"],
    nearest_a: Float32[Array, "block k"],
    nearest_b: Float32[Array, "block k"],
    left_a: Int[Array, ""],
    left_b: Int[Array, ""],
    same: bool,
) -> tuple[Float32[Array, "block k"], Float32[Array, "block k"], Float32[Array, "block"]]:
    """Return the smallest distances of both blocks so far, and the row sums of the kernel."""
    place = jnp.arange(_BLOCK)
    counted = (place < left_a)[:, None] & (place < left_b)
    if same:
        counted &= place[:, None] != place
    distances = jnp.where(counted, _squared_distances(a, b, centre), jnp.inf)
    kernel = jnp.sum(jnp.where(counted, _kernel(a, b), 0), 1)
    near_a = _smallest(nearest_a, distances)
    return near_a, near_a if same else _smallest(nearest_b, distances.T), kernel


def _smallest(
    known: Float32[Array, "block k"], more: Float32[Array, "block n"]
) -> Float32[Array, "block k"]:
    return -jax.lax.top_k(-jnp.concatenate([known, more], 1), known.shape[1])[0]


@jax.jit
def _cross(
    a: Float32[Array, "block d"],
    b: Float32[Array, "block d"],
    centre: Float32[Array, "d"],
    radii_a: Float32[Array, "block"],
    radii_b: Float32[Array, "block"],
) -> tuple[Bool[Array, "block"], Bool[Array, "block"], Float32[Array, "block"]]:
    """Return which rows of each block lie in a ball of the other, and the row sums of the kernel."""
    distances = _squared_distances(a, b, centre)
    return (
        jnp.any(distances <= radii_b, 1),
        jnp.any(distances <= radii_a[:, None], 0),
        jnp.sum(_kernel(a, b), 1),
    )
