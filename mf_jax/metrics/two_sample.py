"""Distances between two sets of points in a few dimensions, without a Gaussian assumption.

Both vanish if and only if the sets come from one distribution: the energy distance in expectation,
the sliced Wasserstein distance in the limit of many rows.

Source: Székely and Rizzo 2013, "Energy statistics", equation 2.1 (Euclidean norm, exponent 1);
Bonneel et al. 2015, "Sliced and Radon Wasserstein barycenters of measures", section 2.
"""

from collections.abc import Iterator

import numpy as np
from jaxtyping import Float, Float64
from scipy.spatial.distance import cdist

_CHUNK_ENTRIES = 2**24  # 128 MiB of float64
_PROJECTIONS = 128


def energy_distance(a: Float[np.ndarray, "n d"], b: Float[np.ndarray, "m d"]) -> float:
    """Return the energy distance 2 E|a - b| - E|a - a'| - E|b - b'|, estimated without bias.

    The U-statistic: pairs of a row with itself are left out. The mean over draws is 0 for equal
    distributions, and a single value may be negative. No square root is taken.
    """
    own = sum(_sum_of_distances(x, x) / (len(x) * (len(x) - 1)) for x in (a, b))
    return 2 * _sum_of_distances(a, b) / (len(a) * len(b)) - own


def sliced_wasserstein(a: Float[np.ndarray, "n d"], b: Float[np.ndarray, "m d"]) -> float:
    """Return the sliced 2-Wasserstein distance: the root mean square of W2 over random directions.

    Directions come in orthonormal sets, each uniform on the sphere. Where d divides their number, a
    translation by s therefore measures |s| / sqrt(d) without any error from the draw. Biased
    upwards for few rows.
    """
    blocks = _directions(a.shape[1])
    total = sum(_squared_wasserstein(a @ block, b @ block).sum() for block in blocks)
    return float(np.sqrt(total / _PROJECTIONS))


def nearest_distances(
    a: Float[np.ndarray, "n ..."], b: Float[np.ndarray, "m ..."]
) -> Float[np.ndarray, "n"]:
    """Return the root mean squared difference of each a from the b nearest to it, per number."""
    a, b = (x.reshape(len(x), -1).astype(np.float32) for x in (a, b))
    size, nearest = max(1, _CHUNK_ENTRIES // len(a)), np.full(len(a), np.inf)
    for rows in (b[i : i + size] for i in range(0, len(b), size)):
        squares = np.square(rows).sum(axis=1) - 2 * a @ rows.T
        nearest = np.minimum(nearest, squares.min(axis=1))
    nearest += np.square(a).sum(axis=1)
    return np.sqrt(np.maximum(nearest, 0) / a.shape[1])


def _sum_of_distances(a: np.ndarray, b: np.ndarray) -> float:
    size = max(1, _CHUNK_ENTRIES // len(b))
    return sum(float(cdist(a[i : i + size], b).sum()) for i in range(0, len(a), size))


def _directions(width: int) -> Iterator[Float64[np.ndarray, "d p"]]:
    generator = np.random.default_rng(0)
    for start in range(0, _PROJECTIONS, width):
        yield np.linalg.qr(generator.standard_normal((width, min(width, _PROJECTIONS - start))))[0]


def _squared_wasserstein(
    a: Float64[np.ndarray, "n p"], b: Float[np.ndarray, "m p"]
) -> Float64[np.ndarray, "p"]:
    """Integrate the squared difference of quantile functions, exactly, for any n and m."""
    n, m = len(a), len(b)
    # Both quantile functions are constant between these levels, counted in steps of 1 / (n m).
    levels = np.union1d(np.arange(n + 1) * m, np.arange(m + 1) * n)
    left, weight = levels[:-1], np.diff(levels) / (n * m)
    return weight @ (np.sort(a, axis=0)[left // m] - np.sort(b, axis=0)[left // n]) ** 2
