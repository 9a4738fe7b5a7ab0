"""Turn a source of elements into an endless stream of batches, as a pure function of (seed, step).

The stream is the source in a fresh order every epoch, without end. Its positions are 0, 1, 2, ...;
with n elements,

    position p  ->  epoch p // n, place p % n  ->  element permutation(seed, epoch)[place],

and the batch of step k holds positions [k * batch_size, (k + 1) * batch_size). Nothing else decides
what a batch holds: neither processes, nor threads, nor a stop. A batch may straddle epochs, so no
element is ever dropped.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple, Protocol, runtime_checkable

import jax
import numpy as np
from jaxtyping import Array, Bool, Float, Float32, Int, Int32, PRNGKeyArray

from mf_jax.flow.errors import check_within
from mf_jax.flow.records import DataSpec

SPLITS = ("train", "held_out")

_ORDER, _FLIP = 0, 1  # streams of one seed: the flips must not follow the order
_STEPS = 2**40  # "endless": Grain wants a length, and step * batch_size must fit in 64 bits
_THREADS, _PREFETCH = 4, 4  # batches prepared at the same time, and held ready in memory
MORE = ("condition", "e", "mask")


class Batch(NamedTuple):
    """Some elements of a source.

    x: `[n, *shape]`, pictures in [-1, 1], or stored rows. labels: classes or `NO_LABEL`. Others, if
    any, are as `DrawScheme.draw` takes them, and named in `DataSpec.more`.
    """

    x: Float[np.ndarray, "n ..."]
    labels: Int32[np.ndarray, "n"]
    condition: Float32[np.ndarray, "n k"] | None = None
    e: Float32[np.ndarray, "n ..."] | None = None
    mask: Bool[np.ndarray, "n ..."] | None = None

    @property
    def more(self) -> dict[str, np.ndarray]:
        """What there is besides x and labels, by name."""
        return {key: getattr(self, key) for key in MORE if getattr(self, key) is not None}


class Stored(NamedTuple):
    """What a source gathers where its elements are drawn anew at every visit, on the device.

    `gather` takes len(source) + i for the mirror image of element i. rows: shape and type of one
    stored element. draw: from a key and stored rows to elements, row by row.
    """

    rows: jax.ShapeDtypeStruct
    draw: Callable[[PRNGKeyArray, Array], Float32[Array, "n ..."]]


@runtime_checkable
class Source(Protocol):
    """A fixed, ordered collection of elements with random access.

    stored: None where `gather` returns the elements themselves. A source whose elements may be
    replaced has a `digest` too, of their names.
    """

    spec: DataSpec
    stored: Stored | None

    def __len__(self) -> int: ...

    def gather(self, indices: Int[np.ndarray, "n"]) -> Batch:
        """Return the elements at these indices and their labels; safe in several threads."""


def count_held_out(held_out_share: float, num: int) -> int:
    """Return how many of `num` elements are held out: of two or more neither none nor all."""
    check_within("held_out_share", held_out_share, "(0, 1)", "try 0.1")
    return min(max(round(held_out_share * num), 1), num - 1)


def stream_indices(
    positions: Int[np.ndarray, "n"], *, length: int, seed: int
) -> Int[np.ndarray, "n"]:
    """Map positions of the endless stream to elements; an epoch holds each exactly once."""
    from grain.experimental import index_shuffle

    epochs, places = np.divmod(positions, length)
    seeds = {
        epoch: int(np.random.SeedSequence(seed, spawn_key=(_ORDER, epoch)).generate_state(1)[0])
        for epoch in np.unique(epochs).tolist()
    }
    shuffled = (
        index_shuffle(place, length - 1, seeds[epoch], rounds=4)  # as in Grain's own shuffle
        for epoch, place in zip(epochs.tolist(), places.tolist(), strict=True)
    )
    return np.fromiter(shuffled, dtype=np.int64, count=len(positions))


def stream_flips(first: int, count: int, *, seed: int) -> Bool[np.ndarray, "n"]:
    """Return which of the positions first, first + 1, ... are mirrored, with probability 1/2."""
    # position p owns counter p, which yields four words; the first decides
    generator = np.random.Philox(np.random.SeedSequence(seed, spawn_key=(_FLIP,)))
    words = generator.advance(first).random_raw(4 * count)[::4]
    return words >> np.uint64(63) == 1


def make_batches(
    source: Source,
    *,
    batch_size: int,
    seed: int,
    start_step: int = 0,
    flip: bool = False,
    process_index: int = 0,
    process_count: int = 1,
) -> Iterator[Batch]:
    """Iterate over this process's share of the batches from a step on, without end.

    Args:
      batch_size: rows of the global batch, which process_count contiguous shares divide.
      flip: mirror each picture left to right with probability 1/2.
    """
    import grain  # takes a second, which modes without a stream need not pay

    share = batch_size // process_count

    # Grain runs Python for each element, which costs more than a small picture does: a batch is one
    def batch_of(step: int) -> Batch:
        first = step * batch_size + process_index * share
        indices = stream_indices(np.arange(first, first + share), length=len(source), seed=seed)
        flips = stream_flips(first, share, seed=seed) if flip else np.zeros(share, bool)
        if source.stored:
            return source.gather(indices + len(source) * flips)
        batch = source.gather(indices)
        return _mirrored(batch, flips) if flip else batch

    options = grain.ReadOptions(num_threads=_THREADS, prefetch_buffer_size=_PREFETCH)
    batches = grain.MapDataset.range(start_step, _STEPS).map(batch_of)
    return iter(batches.to_iter_dataset(options))


def _mirrored(batch: Batch, flips: Bool[np.ndarray, "n"]) -> Batch:
    pictures = {"x": batch.x, **batch.more, "condition": None}
    of_rows = flips[:, None, None, None]
    changed = {k: np.where(of_rows, x[:, :, ::-1], x) for k, x in pictures.items() if x is not None}
    return batch._replace(**changed)


def read(source: Source, n: int = 0) -> Batch:
    """Read n elements from all over a source, stored ones as they are; 0 means all."""
    n = n or len(source)
    return source.gather(np.arange(n) * len(source) // n)  # sources may be sorted by class


def in_turn(source: Source, n: int) -> Batch:
    """Return n elements from all over a source; all of them again and again if it has fewer."""
    return read(source, n) if n < len(source) else source.gather(np.arange(n) % len(source))
