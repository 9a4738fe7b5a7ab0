"""Five distributions in the plane, which a small network learns in seconds.

Every set but the Gaussian has mean 0 and standard deviation 1 in each coordinate. Its scale comes
from exact moments: moments of the sample would make the two splits differ.
"""

from collections.abc import Callable

import numpy as np
from etils import epy
from jaxtyping import Float

from mf_jax.data.arrays import Rows
from mf_jax.flow.errors import check_known

with epy.lazy_imports():  # takes a second
    import sklearn.datasets

SPLIT_SEEDS = {"train": 20250, "held_out": 20251}
GAUSSIAN_MEAN = (0.5, -0.25)
GAUSSIAN_STD = 0.5  # its average velocity is known in closed form


def checkerboard(n: int, seed: int) -> Float[np.ndarray, "n 2"]:
    """Draw points uniform on every other square of a 4x4 board."""
    rng = np.random.default_rng(seed)
    column, half = rng.integers(4, size=n), rng.integers(2, size=n)
    square = np.stack([column, 2 * half + column % 2], axis=1)
    # Each coordinate is uniform on [0, 4]: mean 2, variance 16 / 12.
    return (square + rng.random((n, 2)) - 2) / np.sqrt(16 / 12)


def two_moons(n: int, seed: int) -> Float[np.ndarray, "n 2"]:
    """Draw points near two interleaving half circles."""
    noise = 0.05
    points, _ = sklearn.datasets.make_moons(n, noise=noise, random_state=seed)
    # The arcs are (cos a, sin a) and (1 - cos a, 1/2 - sin a), a in [0, pi]: means 1/2 and 1/4,
    # variances 3/4 and 9/16 - 1/pi, plus that of the noise.
    return (points - [0.5, 0.25]) / np.sqrt([3 / 4 + noise**2, 9 / 16 - 1 / np.pi + noise**2])


def eight_gaussians(n: int, seed: int) -> Float[np.ndarray, "n 2"]:
    """Draw points from eight equal Gaussians around a circle."""
    std = 0.1
    angles = np.arange(8) * np.pi / 4
    centers = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    points, _ = sklearn.datasets.make_blobs(n, centers=centers, cluster_std=std, random_state=seed)
    # Eight equally spaced points of the unit circle have variance 1/2 in each coordinate.
    return points / np.sqrt(1 / 2 + std**2)


def spirals(n: int, seed: int) -> Float[np.ndarray, "n 2"]:
    """Draw points near two Archimedean spirals of 1.5 turns, reflections in the origin."""
    noise = 0.3
    rng = np.random.default_rng(seed)
    angle = 3 * np.pi * np.sqrt(rng.random(n))
    radius = angle * rng.choice([-1, 1], size=n)
    points = np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1)
    points += noise * rng.standard_normal((n, 2))
    # angle^2 is uniform on [0, 9 pi^2]: E[angle^2 cos^2 angle] = 9 pi^2 / 4 + 3/4; sine: - 3/4
    return points / np.sqrt(9 * np.pi**2 / 4 + np.array([3 / 4, -3 / 4]) + noise**2)


def gaussian(n: int, seed: int) -> Float[np.ndarray, "n 2"]:
    """Draw points from N(GAUSSIAN_MEAN, GAUSSIAN_STD^2 I)."""
    return np.random.default_rng(seed).normal(GAUSSIAN_MEAN, GAUSSIAN_STD, size=(n, 2))


TOYS: dict[str, Callable[[int, int], np.ndarray]] = {
    toy.__name__: toy for toy in (checkerboard, two_moons, eight_gaussians, spirals, gaussian)
}


def of_toy2d(*, toy: str, split: str) -> Rows:
    """Draw 2**16 unlabelled points `[2]` of one of `TOYS`; the splits are independent draws."""
    check_known("toy", toy, TOYS)
    x = TOYS[toy](2**16, SPLIT_SEEDS[split]).astype(np.float32)
    return Rows({"x": x}, np.arange(len(x)))
