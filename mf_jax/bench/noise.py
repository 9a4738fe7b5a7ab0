"""Data for benchmarks: noise of any shape."""

import dataclasses
import itertools
from collections.abc import Iterator

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Int
from ml_collections import ConfigDict

from mf_jax.data import Batch, Source, Stored
from mf_jax.flow.records import NO_LABEL, DataSpec
from mf_jax.runtime.sharding import put_batch


@dataclasses.dataclass(frozen=True)
class Noise:
    """A source of random elements with random labels.

    Args:
      spec: of one element.
      stored: the form in which the data keep their rows; its rows are noise then.
    """

    spec: DataSpec
    stored: Stored | None = None

    def __len__(self) -> int:
        return 2**31

    def gather(self, indices: Int[np.ndarray, "n"]) -> Batch:
        """Return elements, a function of all the indices together."""
        rng = np.random.default_rng(indices)
        row = self.stored.rows if self.stored else jax.ShapeDtypeStruct(self.spec.shape, np.float32)
        x = rng.standard_normal((len(indices), *row.shape), np.float32).astype(row.dtype)
        if not self.spec.num_classes:
            return Batch(x, np.full(len(indices), NO_LABEL, np.int32))
        return Batch(x, rng.integers(self.spec.num_classes, size=len(indices), dtype=np.int32))


def fresh_batches(config: ConfigDict, source: Source, mesh: Mesh) -> Iterator[tuple[Array, Array]]:
    """Yield batches (x, labels) of noise on the devices, no two alike, in the form of a source."""
    noise = Noise(source.spec, source.stored)
    num = config.train.batch_size // jax.process_count()
    for step in itertools.count():
        batch = noise.gather(np.arange(step * num, (step + 1) * num))
        yield jax.block_until_ready(put_batch(mesh, tuple(batch)))
