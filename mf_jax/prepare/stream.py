"""Decode and crop pictures in threads, ahead of the device, and pack the good ones into batches."""

import itertools
from collections.abc import Iterator
from typing import NamedTuple

import grain
import numpy as np
from absl import logging
from jaxtyping import Int, UInt8

from mf_jax.data.crop import adm_crop, as_rgb, formats, open_picture
from mf_jax.data.picture_list import PicturesIn
from mf_jax.flow.errors import BadInput, listed, reason_of
from mf_jax.runtime import processes


class Pixels(NamedTuple):
    """A batch of cropped pictures, repeated up to its fixed size.

    images: `[B, S, S, 3]`. labels, indices: of the pictures. count: how many are not repeated.
    """

    images: UInt8[np.ndarray, "b s s 3"]
    labels: Int[np.ndarray, "b"]
    indices: Int[np.ndarray, "b"]
    count: int


class _Decoded(NamedTuple):
    image: np.ndarray
    label: int
    index: int
    problem: str = ""


class PictureStream:
    """The pictures of some shards, one shard after the other, decoded ahead across their borders.

    Args:
      indices: of the pictures, in order.
      max_bad: unreadable pictures to skip; one more is an error.
      skipped: names of pictures that an earlier run has skipped.
    """

    def __init__(
        self,
        pictures: PicturesIn,
        indices: Int[np.ndarray, "n"],
        *,
        image_size: int,
        batch_size: int,
        max_bad: int,
        skipped: tuple[str, ...] = (),
    ) -> None:
        formats()  # before the threads: a race in Pillow would reject a good picture
        threads = processes.cpu_count() + 1
        ahead = max(threads, 2 * batch_size)  # two batches of pictures wait for the device
        options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=ahead)
        self._pictures, self._image_size = pictures, image_size
        decoded = grain.MapDataset.source(indices.tolist()).map(self._decode)
        self._decoded = iter(decoded.to_iter_dataset(options))
        self._batch_size, self._max_bad = batch_size, max_bad
        self._bad, self.skipped = list(skipped), list[str]()

    def shard(self, count: int) -> Iterator[Pixels]:
        """Yield the next `count` pictures in batches; then `skipped` names the broken ones."""
        self.skipped = []
        good = filter(self._is_good, itertools.islice(self._decoded, count))
        while batch := list(itertools.islice(good, self._batch_size)):
            *columns, _ = map(np.array, zip(*batch, strict=True))
            whole = (np.resize(x, (self._batch_size, *x.shape[1:])) for x in columns)
            yield Pixels(*whole, len(batch))

    def _decode(self, index: int) -> _Decoded:
        name = self._pictures.name(index)
        try:
            content, label = self._pictures.read(index)
        except Exception as error:  # the way to the picture is broken: a second try may find it
            raise BadInput(
                f"prepare.input: {name} cannot be opened ({error}): see to its permissions or the "
                "connection, and run again, which continues"
            ) from error
        try:
            with open_picture(content) as image:
                return _Decoded(adm_crop(as_rgb(image), self._image_size), label, index)
        except MemoryError as error:
            raise BadInput(
                f"prepare.input: there is no memory to decode {name}: lower prepare.batch_size and "
                "run the same command again, which continues"
            ) from error
        except Exception as error:  # the decoders of Pillow raise anything
            return _Decoded(np.empty(0), label, index, reason_of(error))

    def _is_good(self, decoded: _Decoded) -> bool:
        """Return whether a picture is whole, and note its name if it is not."""
        if not decoded.problem:
            return True
        name = self._pictures.name(decoded.index)
        logging.warning("%s is broken and skipped: %s", name, decoded.problem)
        self.skipped.append(name)
        self._bad.append(name)
        if len(self._bad) > self._max_bad:
            named = f"{len(self._bad)} pictures are broken ({listed(self._bad)})"
            fix = "replace them, or raise prepare.max_bad; finished shards are kept"
            raise BadInput(f"prepare.max_bad={self._max_bad}: {named}: {fix}")
        return False
