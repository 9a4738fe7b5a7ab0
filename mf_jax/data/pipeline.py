"""Turn a source of elements into an endless stream of batches, as a pure function of (seed, step).

The stream is the source in a fresh order every epoch, without end. Its positions are 0, 1, 2, ...; with n elements,

    position p  ->  epoch p // n, place p % n  ->  element permutation(seed, epoch)[place],

and the batch of step k holds positions [k * batch_size, (k + 1) * batch_size). Nothing else decides what a batch holds:
not the number of processes or threads, and not whether the run was stopped and resumed. A batch may straddle two epochs
(or many, if it is larger than the source), so no element is ever dropped.
"""

import dataclasses
from collections.abc import Callable, Iterator
from typing import NamedTuple, Protocol, runtime_checkable

import grain
import jax
import numpy as np
from grain.experimental import index_shuffle
from jaxtyping import Array, Bool, Float, Float32, Int, Int32, PRNGKeyArray

from mf_jax.errors import BadInput
from mf_jax.flow.records import DataSpec

SPLITS = ("train", "held_out")

# Streams of random numbers drawn from one seed; distinct, so that the flips do not follow the order.
_ORDER, _FLIP = 0, 1
_SHUFFLE_ROUNDS = 4  # as in Grain's own shuffle
_STEPS = 2**40  # "endless": Grain wants a length, and step * batch_size must fit in 64 bits


class Batch(NamedTuple):
    """Some elements of a source.

    x: float32 `[n, *shape]`; pictures lie in [-1, 1]; or what the source stores. labels: int32 `[n]`, a class or
    `types.NO_LABEL`.
    """

    x: Float[np.ndarray, "n ..."]
    labels: Int32[np.ndarray, "n"]


class Stored(NamedTuple):
    """What a source gathers where its elements are drawn anew at every visit, on the device.

    rows: shape and type of one stored element. draw: from a key and stored rows `[n, *rows.shape]` to elements
    `[n, *source.shape]`, float32, row by row. has_mirrors: `gather` also takes the index len(source) + i, the mirror
    image of element i. origin: SHA-256 of what made the stored rows.
    """

    rows: jax.ShapeDtypeStruct
    draw: Callable[[PRNGKeyArray, Array], Float32[Array, "n ..."]]
    has_mirrors: bool
    origin: str = ""


@runtime_checkable
class Source(Protocol):
    """A fixed, ordered collection of elements with random access; `gather` is safe to call from several threads.

    shape: of one element, `(H, W, C)` for pictures, `(2,)` for points. num_classes: 0 if there are no labels.
    class_names: one for each class, in the order of the labels. stored: None where `gather` returns the elements.
    """

    shape: tuple[int, ...]
    num_classes: int
    class_names: tuple[str, ...]
    stored: Stored | None

    def __len__(self) -> int: ...

    def gather(self, indices: Int[np.ndarray, "n"]) -> Batch: ...


def spec_of(source: Source) -> DataSpec:
    """Return what one element of a source is."""
    origin = source.stored.origin if source.stored else ""
    return DataSpec(source.shape, source.num_classes, source.class_names, origin)


def check_at_least(argument: str, value: int, least: int) -> None:
    """Raise unless `value` is an integer of at least `least`.

    Raises:
      BadInput: names the argument and what is allowed.
    """
    if not isinstance(value, (int, np.integer)) or isinstance(value, bool) or value < least:
        raise BadInput(
            f"{argument}={value!r} must be an integer of at least {least}: set {argument}={least} or more"
        )


def stream_indices(
    positions: Int[np.ndarray, "n"], *, length: int, seed: int
) -> Int[np.ndarray, "n"]:
    """Map positions of the endless stream to elements; every epoch holds each element exactly once.

    Args:
      positions: `[n]`, at least 0.
      length: number of elements of the source, at least 1.
      seed: at least 0.

    Returns:
      `[n]` indices of elements in [0, length), a pure function of (seed, position, length).
    """
    epochs, places = np.divmod(positions, length)
    seeds = {epoch: _epoch_seed(seed, epoch) for epoch in np.unique(epochs).tolist()}
    shuffled = (
        index_shuffle(place, length - 1, seeds[epoch], _SHUFFLE_ROUNDS)
        for epoch, place in zip(epochs.tolist(), places.tolist(), strict=True)
    )
    return np.fromiter(shuffled, dtype=np.int64, count=len(positions))


def _epoch_seed(seed: int, epoch: int) -> int:
    return int(np.random.SeedSequence(seed, spawn_key=(_ORDER, epoch)).generate_state(1)[0])


def stream_flips(first: int, count: int, *, seed: int) -> Bool[np.ndarray, "n"]:
    """Decide which of the stream positions first, first + 1, ... are mirrored, each with probability 1/2.

    Args:
      first: the first position, at least 0.
      count: how many positions.
      seed: at least 0.

    Returns:
      `[count]`, True where the picture is mirrored; a pure function of (seed, position).
    """
    # A counter-based generator: position p owns counter p, which yields four words; the first one decides.
    generator = np.random.Philox(np.random.SeedSequence(seed, spawn_key=(_FLIP,)))
    words = generator.advance(first).random_raw(4 * count)[::4]
    return words >> np.uint64(63) == 1


@dataclasses.dataclass(frozen=True)
class _Steps:
    """Random access to the stream for Grain: element k is this process's share of the batch of step k.

    A whole batch is one Grain element, because Grain runs Python for each, which costs more than a small picture does.
    """

    source: Source
    batch_size: int
    seed: int
    flip: bool
    process_index: int
    process_count: int

    def __len__(self) -> int:
        return _STEPS

    def __getitem__(self, step: int) -> Batch:
        share = self.batch_size // self.process_count
        first = step * self.batch_size + self.process_index * share
        positions = np.arange(first, first + share)
        indices = stream_indices(positions, length=len(self.source), seed=self.seed)
        if not self.flip:
            return self.source.gather(indices)
        flips = stream_flips(first, share, seed=self.seed)
        if self.source.stored and self.source.stored.has_mirrors:
            return self.source.gather(indices + len(self.source) * flips)
        batch = self.source.gather(indices)
        return batch._replace(x=np.where(flips[:, None, None, None], batch.x[:, :, ::-1], batch.x))


def make_batches(
    source: Source,
    *,
    batch_size: int,
    seed: int,
    start_step: int = 0,
    flip: bool = False,
    process_index: int = 0,
    process_count: int = 1,
    threads: int = 4,
    prefetch: int = 4,
) -> Iterator[Batch]:
    """Iterate over this process's share of the batches of steps start_step, start_step + 1, ..., without end.

    Args:
      source: the elements.
      batch_size: rows of the global batch; a multiple of process_count.
      seed: at least 0; with the step it decides everything that a batch holds.
      start_step: the step of the first batch; k resumes a stream of which k batches were used.
      flip: mirror each picture left to right with probability 1/2.
      process_index: which contiguous share of each batch to return, in [0, process_count).
      process_count: number of processes that share a batch.
      threads: batches prepared at the same time; 0 prepares each in the caller's thread.
      prefetch: batches held ready in memory.

    Returns:
      An endless iterator over batches of batch_size / process_count rows.

    Raises:
      BadInput: if a number is out of range, the batch does not divide, or flip is asked for elements without width.
    """
    _check_stream(source, batch_size, start_step, flip, process_index, process_count)
    for argument, value in (("seed", seed), ("threads", threads), ("prefetch", prefetch)):
        check_at_least(argument, value, 0)
    steps = grain.MapDataset.source(
        _Steps(source, batch_size, seed, flip, process_index, process_count)
    )
    options = grain.ReadOptions(num_threads=min(threads, prefetch), prefetch_buffer_size=prefetch)
    return iter(steps[start_step:].to_iter_dataset(options))


def _check_stream(
    source: Source,
    batch_size: int,
    start_step: int,
    flip: bool,
    process_index: int,
    process_count: int,
) -> None:
    check_at_least("batch_size", batch_size, 1)
    check_at_least("start_step", start_step, 0)
    check_at_least("process_count", process_count, 1)
    if not 0 <= process_index < process_count:
        raise BadInput(
            f"process_index={process_index} must lie in [0, process_count={process_count})"
        )
    if batch_size % process_count:
        nearest = process_count * max(1, round(batch_size / process_count))
        raise BadInput(
            f"batch_size={batch_size} must be a multiple of process_count={process_count}: try {nearest}"
        )
    if flip and len(source.shape) != 3:
        raise BadInput(
            f"flip=True needs pictures (H, W, C), but elements have shape {source.shape}: set flip=False"
        )
    if flip and source.stored and not source.stored.has_mirrors:
        raise BadInput("flip=True: these data were stored without mirror images; set flip=False")


def read(source: Source, n: int = 0) -> Batch:
    """Read the first n elements in order, unshuffled and unflipped.

    Args:
      source: the elements; stored ones are read as they are.
      n: how many, at most len(source); 0 means all of them, in memory as float32.

    Returns:
      The first n elements of the source.

    Raises:
      BadInput: if the source has fewer than n elements.
    """
    check_at_least("n", n, 0)
    if n > len(source):
        raise BadInput(
            f"n={n} must be at most {len(source)}, the elements there are: lower it, or 0 for all"
        )
    return source.gather(np.arange(n or len(source)))
