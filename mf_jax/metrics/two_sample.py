"""Distances between two sets of rows that need no Gaussian assumption.

For points in a few dimensions: the energy distance and the sliced Wasserstein distance. For feature rows: the kernel
distance (KID). Each is 0 in expectation (in the limit, for the Wasserstein distance) if and only if both sets come from
one distribution; for the kernel distance, if and only if their first three moments agree.
"""

from collections.abc import Callable, Iterator

import numpy as np
from jaxtyping import Float, Float64
from scipy.spatial.distance import cdist
from sklearn.metrics.pairwise import polynomial_kernel
from sklearn.utils import gen_batches

from mf_jax.errors import BadInput
from mf_jax.metrics.frechet import checked_features

_CHUNK_ENTRIES = 2**24  # 128 MiB of float64
_Pairs = Callable[[np.ndarray, np.ndarray], np.ndarray]


def energy_distance(a: Float[np.ndarray, "n d"], b: Float[np.ndarray, "m d"]) -> float:
    """Return the energy distance 2 E|a - b| - E|a - a'| - E|b - b'|, estimated without bias.

    The U-statistic: pairs of a row with itself are left out, so that the mean over draws is exactly 0 for equal
    distributions and a single value may be negative. No square root is taken.

    Args:
        a: rows `[n, d]`, n >= 2, finite.
        b: rows `[m, d]`, m >= 2, finite.

    Returns:
        The distance, in the unit of the rows.

    Raises:
        BadInput: fewer than 2 rows, unequal d, or values that are not finite.

    Source:
        Székely and Rizzo 2013, "Energy statistics", equation 2.1; Euclidean norm, exponent 1.
    """
    a, b = _checked_pair(a, b)
    own = _sum_of_pairs(cdist, a, a) / _ordered_pairs(a) + _sum_of_pairs(
        cdist, b, b
    ) / _ordered_pairs(b)
    return 2 * _sum_of_pairs(cdist, a, b) / (len(a) * len(b)) - own


def kernel_distance(a: Float[np.ndarray, "n d"], b: Float[np.ndarray, "m d"]) -> float:
    """Return the kernel inception distance: the unbiased squared MMD with the kernel (x·y / d + 1)^3.

    Over all rows at once: published values are means over random subsets, which have the same expectation.

    Args:
        a: feature rows `[n, d]`, n >= 2, finite.
        b: feature rows `[m, d]`, m >= 2, finite.

    Returns:
        The distance; negative values occur for equal distributions.

    Raises:
        BadInput: fewer than 2 rows, unequal d, or values that are not finite.

    Source:
        Bińkowski et al. 2018 (arXiv:1801.01401), equation 4 and section 3; Gretton et al. 2012, equation 3.
    """
    a, b = _checked_pair(a, b)
    own = sum(
        (_sum_of_pairs(_kernel, x, x) - _kernel_with_self(x)) / _ordered_pairs(x) for x in (a, b)
    )
    return own - 2 * _sum_of_pairs(_kernel, a, b) / (len(a) * len(b))


def sliced_wasserstein(
    a: Float[np.ndarray, "n d"],
    b: Float[np.ndarray, "m d"],
    *,
    num_projections: int = 128,
    seed: int = 0,
) -> float:
    """Return the sliced 2-Wasserstein distance: the root mean square of W2 over random directions.

    Directions come in orthonormal sets, each uniform on the sphere. With num_projections a multiple of d, a
    translation by s therefore measures |s| / sqrt(d) without any error from the draw.

    Args:
        a: rows `[n, d]`, n >= 2, finite.
        b: rows `[m, d]`, m >= 2, finite; n and m may differ.
        num_projections: number of directions, >= 1.
        seed: of the directions, >= 0.

    Returns:
        The distance, >= 0, in the unit of the rows. Biased upwards for few rows.

    Raises:
        BadInput: fewer than 2 rows, unequal d, values that are not finite, or num_projections < 1.

    Source:
        Bonneel et al. 2015, "Sliced and Radon Wasserstein barycenters of measures", section 2.
    """
    if num_projections < 1:
        raise BadInput(f"num_projections is {num_projections}; it must be at least 1: use 128")
    a, b = _checked_pair(a, b)
    blocks = _directions(a.shape[1], num_projections, seed)
    total = sum(_squared_wasserstein(a @ block, b @ block).sum() for block in blocks)
    return float(np.sqrt(total / num_projections))


def _checked_pair(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    a = checked_features(a, "a", at_least=2)
    return a, checked_features(b, "b", at_least=2, width=a.shape[1])


def _sum_of_pairs(pairs: _Pairs, a: np.ndarray, b: np.ndarray) -> float:
    chunks = gen_batches(len(a), max(1, _CHUNK_ENTRIES // len(b)))
    return float(sum(pairs(a[chunk], b).sum() for chunk in chunks))


def _ordered_pairs(rows: np.ndarray) -> int:
    return len(rows) * (len(rows) - 1)


def _kernel(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return polynomial_kernel(a, b, degree=3, gamma=1 / a.shape[1], coef0=1)


def _kernel_with_self(rows: np.ndarray) -> float:
    return float(((np.square(rows).mean(axis=1) + 1) ** 3).sum())


def _directions(width: int, count: int, seed: int) -> Iterator[Float64[np.ndarray, "d p"]]:
    generator = np.random.default_rng(seed)
    for chunk in gen_batches(count, min(width, count)):
        yield np.linalg.qr(generator.standard_normal((width, chunk.stop - chunk.start)))[0]


def _squared_wasserstein(
    a: Float64[np.ndarray, "n p"], b: Float64[np.ndarray, "m p"]
) -> np.ndarray:
    """Integrate the squared difference of the quantile functions, column by column: exact for any n and m."""
    n, m = len(a), len(b)
    # Both quantile functions are constant between these levels, counted in steps of 1 / (n m).
    levels = np.union1d(np.arange(n + 1) * m, np.arange(m + 1) * n)
    left, weight = levels[:-1], np.diff(levels) / (n * m)
    return weight @ (np.sort(a, axis=0)[left // m] - np.sort(b, axis=0)[left // n]) ** 2
