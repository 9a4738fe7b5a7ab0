"""Precision, recall and kernel distance (KID) from all pairs of feature rows, on the device.

The manifold of a set is the union of balls around its rows, each up to the k-th nearest other row.
Precision is the share of generated rows inside the reference manifold, recall the share of
reference rows inside the generated one. The kernel distance is the unbiased squared MMD with
(x·y / d + 1)^3 over all rows; published means over random subsets have the same expectation.

Products are in float32, of rows minus a common centre. Rounding leaves about 1e-7 of |a|^2 + |b|^2
between a row and its copy. Such a distance counts as 0: a copy lies inside every ball around its
original.

Source: Kynkäänniemi et al. 2019 (arXiv:1904.06991), equations 1 and 2; Bińkowski et al. 2018
(arXiv:1801.01401), equation 4 and section 3; Gretton et al. 2012, equation 3.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Float32

NEIGHBOURS = 3
"""The k of the balls, as published."""
LEAST_ROWS = NEIGHBOURS + 1
_ROWS_AT_ONCE = 512
_NOISE = 4 * np.finfo(np.float32).eps
"""Times the root of the width: below this share of |a|^2 + |b|^2 a squared distance is rounding."""


class PairScores(NamedTuple):
    """Two shares in [0, 1], and a distance that may be below 0."""

    precision: float
    recall: float
    kernel_distance: float


class _Rows(NamedTuple):
    """Rows x minus a centre c, their squared norms, and x·c - |c|^2 / 2: these add to x·y."""

    shifted: Float32[Array, "n d"]
    norms: Float32[Array, "n"]
    offsets: Float32[Array, "n"]


def own_pairs(rows: Float[np.ndarray, "n d"]) -> tuple[Float32[np.ndarray, "n"], float]:
    """Compare the rows of a set, finite and at least `LEAST_ROWS`, with one another.

    Returns:
      The squared distance of each row to its k-th nearest other one, and the mean of
      (x·y / d + 1)^3 - 1 over pairs of different rows.
    """
    n = len(rows)
    radii, kernels = _own(_shifted(rows, rows.mean(axis=0, dtype=np.float64)))
    return np.asarray(radii), _sum(kernels) / (n * (n - 1))


def pair_scores(
    generated: Float[np.ndarray, "n d"],
    reference: Float[np.ndarray, "m d"],
    *,
    own: tuple[Float32[np.ndarray, "n"], float] | None = None,
) -> PairScores:
    """Compare finite rows, `LEAST_ROWS` or more of each; published values take as many of both.

    Args:
      own: `own_pairs(generated)`, where it is known.
    """
    (radii_a, kernel_a), (radii_b, kernel_b) = own or own_pairs(generated), own_pairs(reference)
    centre = reference.mean(axis=0, dtype=np.float64)
    a, b = _shifted(generated, centre), _shifted(reference, centre)
    inside_a, kernels = _cross(a, b, radii_b)
    inside_b, _ = _cross(b, a, radii_a)
    between = _sum(kernels) / (len(generated) * len(reference))
    precision, recall = (float(np.asarray(inside).mean()) for inside in (inside_a, inside_b))
    return PairScores(precision, recall, kernel_a + kernel_b - 2 * between)


def _shifted(rows: Float[np.ndarray, "n d"], centre: Float[np.ndarray, "d"]) -> _Rows:
    shifted = (rows - centre.astype(rows.dtype)).astype(np.float32)
    offsets = (shifted @ centre + centre @ centre / 2).astype(np.float32)
    return _Rows(*map(jnp.asarray, (shifted, np.square(shifted).sum(axis=1), offsets)))


def _sum(rows: Float32[Array, "n"]) -> float:
    return float(np.asarray(rows).sum(dtype=np.float64))


def _pairs(a: _Rows, b: _Rows) -> tuple[Float32[Array, "n"], Float32[Array, "n"]]:
    """Return the squared distances and kernels of one row a with rows b.

    Kernels are (a·b / d + 1)^3 - 1: the 1 cancels in the kernel distance, and would round the rest.
    """
    products = jnp.matmul(b.shifted, a.shifted, precision="highest")
    norms, width = a.norms + b.norms, a.shifted.size
    distances = norms - 2 * products
    x = (products + a.offsets + b.offsets) / width
    is_noise = distances <= _NOISE * width**0.5 * norms
    return jnp.where(is_noise, 0, distances), x * (x * (x + 3) + 3)


@jax.jit
def _own(rows: _Rows) -> tuple[Float32[Array, "n"], Float32[Array, "n"]]:
    """Return the squared radius of each row's ball, and the sum of its kernels."""
    places = jnp.arange(len(rows.norms))

    def one(row_and_place: tuple[_Rows, Array]) -> tuple[Array, Array]:
        row, place = row_and_place
        distances, kernels = _pairs(row, rows)
        distances = jnp.where(places == place, jnp.inf, distances)
        nearest = -jax.lax.top_k(-distances, NEIGHBOURS)[0]
        return nearest[-1], jnp.sum(jnp.where(places == place, 0, kernels))

    return jax.lax.map(one, (rows, places), batch_size=_ROWS_AT_ONCE)


@jax.jit
def _cross(
    rows: _Rows, others: _Rows, radii: Float32[Array, "m"]
) -> tuple[Bool[Array, "n"], Float32[Array, "n"]]:
    """Return whether each row lies in a ball around another, and the sum of its kernels."""

    def one(row: _Rows) -> tuple[Array, Array]:
        distances, kernels = _pairs(row, others)
        return jnp.any(distances <= radii), jnp.sum(kernels)

    return jax.lax.map(one, rows, batch_size=_ROWS_AT_ONCE)
