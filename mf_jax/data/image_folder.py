"""Pictures in a folder, whatever their size and mode; sub-folders are classes."""

import hashlib
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import PIL
from absl import logging
from etils import epath
from PIL import Image, ImageColor, UnidentifiedImageError

from mf_jax.data import crop as decoding
from mf_jax.data.crop import adm_crop, as_rgb, formats, open_picture
from mf_jax.data.kept import kept
from mf_jax.data.picture_list import Listed, digest, list_files
from mf_jax.data.pictures import THREADS, Pictures, fit_in_memory
from mf_jax.data.pipeline import count_held_out
from mf_jax.flow.errors import BadInput, listed, reason_of
from mf_jax.flow.records import DataSpec
from mf_jax.reporting.progress import track
from mf_jax.runtime import processes
from mf_jax.runtime.files import in_bucket, sha256_of
from mf_jax.runtime.json_files import tell_once

_SHOWN_FROM = 10_000  # pictures; fewer are read in seconds
_LOOKED_AT, _COLOUR = 256, "colour"


class ImageFolder(Pictures):
    """The pictures of a folder, or of tar files, as `[image_size, image_size, channels]`.

    Broken pictures are listed in `broken`. Digest: of the names and classes of the others.
    """

    def __init__(
        self,
        *,
        path: str,
        image_size: int,
        held_out_share: float,
        split: str,
        class_order: str = "name",
        channels: int = 3,
        background: str = "white",
    ) -> None:
        """List one split and decode each of its pictures once, to find the broken ones.

        Args:
          path, class_order: see `list_files`.
          held_out_share: share of each class, in (0, 1), chosen by file names alone.
          channels: 1 is grey, 3 colour; 0 grey where pictures from all over the folder are grey.
          background: colour behind transparent pixels.
        """
        try:
            ImageColor.getrgb(background)
        except ValueError as error:
            fix = "must be a colour, as white, black or #8080ff"
            raise BadInput(f"background={background!r}: {fix}") from error
        if channels not in (0, 1, 3):
            raise BadInput(f"channels={channels}: must be 1 for grey, 3 for colour, 0 to find out")
        if in_bucket(epath.Path(path)):
            raise BadInput(
                f"path={path!r} is in a bucket: copy the folder to each host, and set path to that"
            )
        formats()  # before the threads: a race in Pillow would reject a good picture
        self._list = list_files(path, key="path", class_order=class_order)
        chosen = _of_split(self._list, held_out_share, split)
        if not chosen:
            raise BadInput(f"path={path!r} has no picture for split={split!r}: add a second one")
        channels = channels or (1 if _are_grey(self._list, background) else 3)
        names = self._list.class_names
        spec = DataSpec((image_size, image_size, channels), len(names), names)
        self._path, self._background, pixels = path, background, None
        if fit_in_memory(spec, len(chosen)):
            recipe = [path, split, *map(str, (held_out_share, spec.shape, background))]
            recipe += [PIL.__version__, sha256_of(epath.Path(decoding.__file__))]  # the decoders
            whole = kept(
                [*recipe, *self._list.versions()],
                ("pixels", "problems"),
                lambda: self._crop_all(chosen, spec),
            )
            pixels, problems = whole["pixels"], whole["problems"].tolist()
        else:
            problems = _tried(lambda index: _look(self._list, index, background), chosen)
        bad = {index: text for index, text in zip(chosen, problems, strict=True) if text}
        self._indices = [index for index in chosen if index not in bad]
        self.broken = tuple(map(self._list.name, bad))
        if bad:
            self._tell_broken(bad, split)
        lines = list(self._list.lines())
        self.digest = digest(lines[index] for index in self._indices)
        super().__init__(spec, len(self._indices))
        if pixels is not None:
            self._pixels, self._kept[:] = pixels, True
            self._labels[:] = [self._list.labels[index] for index in self._indices]

    def _tell_broken(self, bad: dict[int, str], split: str) -> None:
        """Warn of broken pictures; BadInput if a class, or everything, is lost with them."""
        path, total = self._path, len(bad) + len(self._indices)
        named = listed([f"{self._list.name(index)} ({why})" for index, why in bad.items()], 4)
        if not self._indices:
            raise BadInput(f"path={path!r}: none of {total} pictures is readable: replace {named}")
        of_bad, of_good = ({self._list.labels[i] for i in each} for each in (bad, self._indices))
        if (lost := sorted(of_bad - of_good)) and split == "train":
            names = listed([self._list.class_names[label] for label in lost])
            problem = f"path={path!r}: all {split} pictures of class {names} are broken"
            raise BadInput(f"{problem}: replace {named}, or remove the class")
        text = "%s: skipped %d broken of %d pictures: %s"
        logging.warning(text, path, len(bad), total, named)

    def _crop_all(self, chosen: list[int], spec: DataSpec) -> dict[str, np.ndarray]:
        """Return the pictures that can be decoded, and for all chosen why not, or nothing."""
        pixels = np.empty((len(chosen), *spec.shape), np.uint8)

        def crop(row: int) -> None:
            pixels[row] = self._crop(chosen[row], spec)

        problems = np.array(_tried(crop, range(len(chosen))))
        return {"pixels": pixels[problems == ""], "problems": problems}

    def _crop(self, index: int, spec: DataSpec) -> np.ndarray:
        with open_picture(self._list.read(index)[0]) as image:
            mode = "L" if spec.shape[-1] == 1 else "RGB"
            return adm_crop(as_rgb(image, self._background).convert(mode), spec.shape[0])

    def _decode(self, index: int) -> tuple[np.ndarray, int]:
        index = self._indices[index]
        try:
            return self._crop(index, self.spec), self._list.labels[index]
        except MemoryError:
            raise
        except Exception as error:  # it was readable when it was listed
            raise BadInput(
                f"data.path={self._path!r}: {self._list.name(index)} has gone or changed and "
                f"cannot be read ({error}): put any picture in its place, and run the same command "
                "again, which continues"
            ) from error


def _of_split(pictures: Listed, held_out_share: float, split: str) -> list[int]:
    """Return the indices of a split's part of each class, in order."""

    # a hash of the name is stable, and unrelated to the order in which pictures were taken
    def rank(index: int) -> bytes:
        return hashlib.blake2b(os.fsencode(pictures.name(index))).digest()

    chosen, labels = [], np.array(pictures.labels)
    for label in np.unique(labels):
        ranked = sorted(np.flatnonzero(labels == label).tolist(), key=rank)
        held_out = count_held_out(held_out_share, len(ranked))
        chosen += sorted(ranked[:held_out] if split == "held_out" else ranked[held_out:])
    return chosen


def _are_grey(pictures: Listed, background: str) -> bool:
    """Return whether some pictures, from all over the list, have no colour."""
    chosen = np.unique(np.linspace(0, len(pictures) - 1, _LOOKED_AT).astype(int)).tolist()

    def has_colour(index: int) -> None:
        pixels = np.asarray(_look(pictures, index, background))
        if (pixels != pixels[..., :1]).any():
            raise ValueError(_COLOUR)

    is_grey = _COLOUR not in _tried(has_colour, chosen)
    if is_grey and len(chosen) < len(pictures):
        seen = f"{len(chosen)} of {len(pictures)} pictures are grey: all are read as grey"
        tell_once(f"{seen}; data.channels=3 keeps colour")
    return is_grey


def _look(pictures: Listed, index: int, background: str) -> Image.Image:
    """Decode a picture, a JPEG at an eighth of its size: it is read to its end all the same."""
    with open_picture(pictures.read(index)[0]) as image:
        image.draft(None, (1, 1))
        return as_rgb(image, background)


def _tried(look: Callable[[int], object], indices: Sequence[int]) -> list[str]:
    """Return why `look` fails at each picture, or nothing."""

    def problem(index: int) -> str:
        try:
            look(index)
        except MemoryError:
            raise
        except UnidentifiedImageError:
            return "no picture"
        except Exception as error:  # the decoders of Pillow raise anything
            return reason_of(error)
        return ""

    is_long = len(indices) >= _SHOWN_FROM and processes.is_first()
    with ThreadPoolExecutor(THREADS) as pool:
        found = pool.map(problem, indices)
        return list(track(found, "reading pictures", len(indices), is_wanted=is_long))
