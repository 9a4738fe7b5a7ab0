"""Pictures in a folder, whatever their size and mode; sub-folders are classes."""

import hashlib
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from absl import logging
from etils import epath
from PIL import UnidentifiedImageError

from mf_jax.data.crop import adm_crop, as_rgb, formats, open_picture
from mf_jax.data.picture_list import Listed, digest, list_files
from mf_jax.data.pictures import THREADS, Pictures
from mf_jax.data.pipeline import check_at_least
from mf_jax.flow.errors import BadInput, listed
from mf_jax.flow.records import DataSpec
from mf_jax.reporting.progress import track
from mf_jax.runtime import processes
from mf_jax.runtime.files import in_bucket

_SHOWN_FROM = 10_000  # pictures; fewer are checked in seconds


class ImageFolder(Pictures):
    """The pictures of a folder, or of tar files, as `[image_size, image_size, 3]`.

    Broken pictures are skipped with one warning and listed in `broken`. Digest: of the names and
    classes of the others.
    """

    def __init__(
        self,
        *,
        path: str,
        image_size: int,
        held_out_share: float,
        split: str,
        class_order: str = "name",
    ) -> None:
        """List one split and decode each of its pictures once, to find the broken ones.

        Args:
          path: see `list_files`.
          held_out_share: share of each class, in (0, 1), chosen by file names alone; of two
            pictures or more, both splits get one.
          class_order: see `list_files`; the default is how earlier runs ordered them.
        """
        check_at_least("image_size", image_size, 1)
        if not 0 < held_out_share < 1:
            raise BadInput(
                f"held_out_share={held_out_share!r} must lie between 0 and 1, exclusive: try 0.1"
            )
        if in_bucket(epath.Path(path)):
            raise BadInput(
                f"path={path!r} is in a bucket: copy the folder to each host, and set path to that"
            )
        self._list = list_files(path, key="path", class_order=class_order)
        labels = np.array(self._list.labels)
        listed = [
            index
            for label in np.unique(labels)
            for index in _part(self._list, np.flatnonzero(labels == label), held_out_share, split)
        ]
        if not listed:
            raise BadInput(f"path={path!r} has no picture for split={split!r}: add a second one")
        self._path = path
        self._indices, self.broken = _readable(self._list, listed, path, split)
        self.digest = digest(self._list, self._indices)
        names = self._list.class_names
        super().__init__(
            DataSpec((image_size, image_size, 3), len(names), names), len(self._indices)
        )

    def _decode(self, index: int) -> tuple[np.ndarray, int]:
        try:
            content, label = self._list.read(self._indices[index])
            with open_picture(content) as image:
                return adm_crop(as_rgb(image), self.spec.shape[0]), label
        except MemoryError:
            raise
        except Exception as error:  # it was readable when it was listed
            raise BadInput(
                f"data.path={self._path!r}: {self._list.name(self._indices[index])} has gone or "
                f"changed and cannot be read ({error}): put any picture in its place, and run the "
                "same command again, which continues"
            ) from error


def _part(
    pictures: Listed, indices: np.ndarray, held_out_share: float, split: str
) -> Sequence[int]:
    """Return a split's part of a class, in order."""

    # a hash of the name is stable, and unrelated to the order in which pictures were taken
    def rank(index: int) -> bytes:
        return hashlib.blake2b(os.fsencode(pictures.name(index))).digest()

    ranked = sorted(indices.tolist(), key=rank)
    held_out = min(max(round(held_out_share * len(ranked)), 1), len(ranked) - 1)
    return sorted(ranked[:held_out] if split == "held_out" else ranked[held_out:])


def _readable(
    pictures: Listed, indices: list[int], path: str, split: str
) -> tuple[list[int], tuple[str, ...]]:
    """Return the indices of the pictures that can be decoded, and the names of the others."""
    formats()  # before the threads: a race in Pillow would reject a good picture
    is_long = len(indices) >= _SHOWN_FROM and processes.is_first()
    with ThreadPoolExecutor(THREADS) as pool:
        checked = pool.map(lambda index: _problem(pictures, index), indices)
        title = f"checking {split} pictures"
        problems = track(checked, title, len(indices), is_wanted=is_long)
        bad = {i: problem for i, problem in zip(indices, problems, strict=True) if problem}
    good = [index for index in indices if index not in bad]
    named = listed([f"{pictures.name(index)} ({problem})" for index, problem in bad.items()], 4)
    if not good:
        raise BadInput(f"path={path!r}: none of {len(bad)} pictures is readable: replace {named}")
    lost = {pictures.labels[index] for index in bad} - {pictures.labels[index] for index in good}
    if lost and split == "train":
        names = listed([pictures.class_names[label] for label in sorted(lost)])
        raise BadInput(
            f"path={path!r}: all {split} pictures of class {names} are broken: replace {named}, or "
            "remove the class"
        )
    if bad:
        share = f"{len(bad)} broken of {len(indices)} pictures"
        logging.warning("%s: skipped %s: %s", path, share, named)
    return good, tuple(pictures.name(index) for index in bad)


def _problem(pictures: Listed, index: int) -> str:
    """Return why a picture cannot be decoded, or nothing."""
    try:
        with open_picture(pictures.read(index)[0]) as image:
            # cheaper: a JPEG is read to its end, but decoded at an eighth of its size
            image.draft(None, (1, 1))
            as_rgb(image)
    except MemoryError:
        raise
    except UnidentifiedImageError:
        return "no picture"
    except Exception as error:  # the decoders of Pillow raise anything
        return " ".join(str(error).split())[:120] or type(error).__name__
    return ""
