"""What all sources of pictures share: they decode on all cores, and keep in memory what fits."""

import abc
import math
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from jaxtyping import Int, UInt8

from mf_jax.data.pipeline import Batch
from mf_jax.data.pixels import from_pixels
from mf_jax.flow.records import DataSpec
from mf_jax.runtime import processes

CACHE_BYTES = 2**30  # pictures that take no more together are decoded once and kept
THREADS = max(16, processes.cpu_count())  # also where there are fewer cores: reading waits


def fit_in_memory(spec: DataSpec, count: int) -> bool:
    """Return whether so many pictures are kept once they are decoded."""
    return count * math.prod(spec.shape) <= CACHE_BYTES


class Pictures(abc.ABC):
    """Decoded pictures and labels by index."""

    stored = None

    def __init__(self, spec: DataSpec, count: int) -> None:
        self.spec, self._count = spec, count
        self._pool = ThreadPoolExecutor(THREADS)
        self._keep = fit_in_memory(spec, count)
        if self._keep:
            self._pixels, self._labels = self._empty(count)
            self._kept = np.zeros(count, bool)

    def __len__(self) -> int:
        return self._count

    @abc.abstractmethod
    def _decode(self, index: int) -> tuple[UInt8[np.ndarray, "h w c"], int]:
        """Return a picture and its label; called from several threads."""

    def gather(self, indices: Int[np.ndarray, "n"]) -> Batch:
        """See `Source.gather`."""
        if not self._keep:
            pixels, labels = self._decode_all(indices)
            return Batch(from_pixels(pixels), labels)
        missing = np.unique(indices[~self._kept[indices]])
        if missing.size:
            # Two threads that decode the same picture write the same; the mark comes last.
            self._pixels[missing], self._labels[missing] = self._decode_all(missing)
            self._kept[missing] = True
        return Batch(from_pixels(self._pixels[indices]), self._labels[indices])

    def _decode_all(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        pixels, labels = self._empty(len(indices))
        for row, decoded in enumerate(self._pool.map(self._decode, indices.tolist())):
            pixels[row], labels[row] = decoded
        return pixels, labels

    def _empty(self, count: int) -> tuple[np.ndarray, np.ndarray]:
        return np.empty((count, *self.spec.shape), np.uint8), np.empty(count, np.int32)
