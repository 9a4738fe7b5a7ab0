"""Decode and crop pictures in threads, ahead of the device, and pack the good ones into batches."""

import itertools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import grain
import jax
import numpy as np
from absl import logging
from jaxtyping import Int, UInt8
from ml_collections import ConfigDict

from mf_jax.data.crop import Broken, decoded
from mf_jax.data.picture_list import PicturesIn
from mf_jax.flow.errors import BadInput, listed, refused
from mf_jax.reporting.progress import ProgressBar
from mf_jax.runtime import processes

_FIX = "see to its permissions, the connection, or prepare.batch_size, and run this again"


class Pixels(NamedTuple):
    """A batch of cropped pictures, repeated up to its fixed size B; n of them are not repeated."""

    images: UInt8[np.ndarray, "B s s 3"]
    labels: Int[np.ndarray, "n"]
    indices: Int[np.ndarray, "n"]


class PictureStream:
    """Pictures in the order of their indices, decoded ahead; `bar` shows how far they are.

    Args:
      max_bad: unreadable pictures to skip; one more is an error.
      bad: names of pictures that an earlier run has skipped.
    """

    def __init__(
        self,
        config: ConfigDict,
        pictures: PicturesIn,
        indices: Int[np.ndarray, "n"],
        *,
        max_bad: int,
        bad: Sequence[str] = (),
    ) -> None:
        self._pictures, self._image_size = pictures, config.data.image_size
        self._batch_size = config.prepare.batch_size * jax.local_device_count()
        self._max_bad, self._bad = max_bad, list(bad)
        threads = processes.cpu_count() + 1
        ahead = max(threads, 2 * self._batch_size)  # two batches of pictures wait for the device
        options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=ahead)
        tried = grain.MapDataset.source(indices.tolist()).map(self._decode)
        self._tried = iter(tried.to_iter_dataset(options))
        self.bar = ProgressBar("pictures", len(indices), is_wanted=config.log.progress)

    def take(self, count: int, skipped: list[str]) -> Iterator[Pixels]:
        """Yield the next `count` pictures in batches; put the names of broken ones into a list."""
        tried = itertools.islice(self._tried, count)
        good = (each for each in tried if not self._is_bad(*each, skipped))
        while batch := list(itertools.islice(good, self._batch_size)):
            images, labels, indices = map(np.array, zip(*batch, strict=True))
            yield Pixels(np.resize(images, (self._batch_size, *images.shape[1:])), labels, indices)
            self.bar.advance(len(batch))

    def _decode(self, index: int) -> tuple[np.ndarray | str, int, int]:
        """Return a picture, or why there is none, its label and its index."""
        problem = f"prepare.input: {self._pictures.name(index)} cannot be opened"
        # the way to a picture is broken, or memory is short: a second try may find it
        with refused(Exception, problem, _FIX):
            content, label = self._pictures.read(index)
            try:
                return decoded(content, self._image_size), label, index
            except Broken as why:
                return str(why), label, index

    def _is_bad(self, image: np.ndarray | str, label: int, index: int, skipped: list[str]) -> bool:
        """Return whether a picture is broken; note its name, or raise BadInput for too many."""
        if not isinstance(image, str):
            return False
        name = self._pictures.name(index)
        logging.warning("%s is broken and skipped: %s", name, image)
        skipped.append(name)
        self._bad.append(name)
        self.bar.advance()
        if len(self._bad) > self._max_bad:
            named = f"{len(self._bad)} pictures are broken ({listed(self._bad)})"
            raise BadInput(f"prepare.max_bad={self._max_bad}: {named}: replace them, or raise it")
        return True
