"""Data of the small experiments: digits, toys, Gaussians with a known transport map, and pairs."""

import functools
from typing import NamedTuple

import numpy as np
from scipy.optimize import linear_sum_assignment

from mf_jax.data.digits import of_digits
from mf_jax.data.pipeline import read
from mf_jax.data.toy2d import TOYS

POOL, COMPARED = 2**15, 1000
MAPS = {  # optimal transport from N(0, I) to N(0, A^2), A symmetric and positive, is A
    "narrow": 0.5 * np.eye(2),
    "wide": 2.0 * np.eye(2),
    "tilted": np.array([[1.2, 0.6], [0.6, 0.7]]),
}


class Data(NamedTuple):
    """Training rows, held-out rows, as many to compare them with, and each x's noise, or None."""

    x: np.ndarray
    held_out: np.ndarray
    other: np.ndarray
    e: np.ndarray | None = None


@functools.cache
def data_of(name: str) -> Data:
    """Return `digits`, a Gaussian of `MAPS`, or `TOY` with many rows or `TOY ROWS`."""
    if name == "digits":
        x, held_out = (read(of_digits(image_size=8, split=s)).x for s in ("train", "held_out"))
        return Data(x, held_out, np.random.default_rng(0).permutation(x)[: len(held_out)])
    toy, _, rows = name.partition(" ")
    make = TOYS.get(toy, lambda n, seed: normal((n, 2), seed) @ MAPS[toy])
    sizes = int(rows or POOL), COMPARED, COMPARED
    return Data(*(np.float32(make(n, seed)) for seed, n in enumerate(sizes)))


def normal(shape: tuple[int, ...], seed: int) -> np.ndarray:
    """Return standard normal numbers."""
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@functools.cache
def dealt(name: str, rows: int) -> np.ndarray:
    """Return noise dealt to the data as `OptimalTransport` does, by scipy, which is faster."""
    x = data_of(name).x
    e = normal(x.shape, 3)
    for i in range(0, len(x), rows):
        block = slice(i, i + rows)
        e[block] = e[block][assignment(x[block], e[block])[1]]
    return e


def assignment(a: np.ndarray, b: np.ndarray) -> tuple[float, np.ndarray]:
    """Return the root mean square of the cheapest assignment, and the place in b of each a."""
    a, b = (each.reshape(len(each), -1).astype(np.float64) for each in (a, b))
    cost = np.square(a).sum(axis=1)[:, None] + np.square(b).sum(axis=1)[None] - 2 * a @ b.T
    rows, places = linear_sum_assignment(cost)
    return float(np.sqrt(np.maximum(cost[rows, places].mean(), 0))), places
