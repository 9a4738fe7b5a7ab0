"""Pictures in a folder, whatever their size and mode: decoded on all cores, once where they fit."""

import hashlib
import math
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import PIL
from absl import logging
from etils import epath
from jaxtyping import Int, UInt8
from PIL import Image, ImageColor

from mf_jax.data import crop
from mf_jax.data.arrays import Rows
from mf_jax.data.kept import kept
from mf_jax.data.picture_list import Listed, digest, list_files
from mf_jax.data.pipeline import Batch, count_held_out
from mf_jax.data.pixels import from_pixels
from mf_jax.data.tfds_source import TfdsPictures
from mf_jax.flow.errors import BadInput, listed, reason_of, refused
from mf_jax.flow.records import DataSpec
from mf_jax.reporting.progress import track
from mf_jax.runtime import processes
from mf_jax.runtime.files import in_bucket, sha256_of
from mf_jax.runtime.json_files import tell_once

CACHE_BYTES = 2**30  # pictures that take no more together are decoded once and kept
THREADS = max(16, processes.cpu_count())  # also where there are fewer cores: reading waits
_SHOWN_FROM = 10_000  # pictures; fewer are read in seconds
_LOOKED_AT, _COLOUR = 256, "has colour"
_UNREADABLE = (crop.Broken, OSError, BadInput)
_DECODERS = (PIL.__version__, sha256_of(epath.Path(crop.__file__)))
Decode = Callable[[int], tuple[UInt8[np.ndarray, "h w c"], int]]
MODES = {1: "L", 3: "RGB"}
"""Pillow's modes, by the number of channels."""


class Pictures:
    """Pictures and labels that `decode` gives by index in several threads, each time anew."""

    stored = None

    def __init__(self, spec: DataSpec, count: int, decode: Decode, digest: str = "") -> None:
        self.spec, self.digest, self._count, self._decode = spec, digest, count, decode

    def __len__(self) -> int:
        return self._count

    def gather(self, indices: Int[np.ndarray, "n"]) -> Batch:
        """See `Source.gather`."""
        found = _decode_all(self._decode, indices.tolist(), self.spec.shape)
        return Batch(from_pixels(found["x"]), found["label"])


def _decode_all(
    decode: Decode, indices: Sequence[int], shape: tuple[int, ...]
) -> dict[str, np.ndarray]:
    """Return the arrays `Rows` takes."""
    pixels, labels = np.empty((len(indices), *shape), np.uint8), np.empty(len(indices), np.int32)
    with ThreadPoolExecutor(THREADS) as pool:
        for row, found in enumerate(pool.map(decode, indices)):
            pixels[row], labels[row] = found
    return {"x": pixels, "label": labels}


def _fit_in_memory(shape: tuple[int, ...], count: int) -> bool:
    return count * math.prod(shape) <= CACHE_BYTES


def of_tfds(
    *, path: str, image_size: int, dataset: str, split_train: str, split_held_out: str, split: str
) -> Rows | Pictures:
    """Open a split of a prepared set as `[image_size, image_size, C]`; grey sets have C = 1."""
    tfds_split = split_train if split == "train" else split_held_out
    found = TfdsPictures(dataset, tfds_split, path, encoded=False)
    names, shape = found.class_names, (image_size, image_size, found.channels)

    def decode(index: int) -> tuple[np.ndarray, int]:
        pixels, label = found.read(index)
        image = Image.fromarray(pixels[..., 0] if found.channels == 1 else pixels)
        return crop.adm_crop(crop.as_rgb(image).convert(MODES[found.channels]), image_size), label

    if not _fit_in_memory(shape, len(found)):
        return Pictures(DataSpec(shape, len(names), names), len(found), decode)
    made_from = [str(shape), *_DECODERS, *found.versions()]
    arrays = kept(made_from, lambda: _decode_all(decode, range(len(found)), shape))
    return Rows(arrays, np.arange(len(found)), names)


def of_folder(
    *,
    path: str,
    image_size: int,
    held_out_share: float,
    split: str,
    class_order: str = "name",
    channels: int = 3,
    background: str = "white",
) -> Rows | Pictures:
    """Open a split of a folder or of tar files, of which each picture is decoded once at first.

    Broken pictures are named and left out. Digest: of the names and classes of the others.

    Args:
      path, class_order: see `list_files`.
      held_out_share: share of each class, in (0, 1), chosen by file names alone.
      channels: 1 is grey, 3 colour; 0 grey where pictures from all over the folder are grey.
      background: colour behind transparent pixels.
    """
    with refused(ValueError, f"background={background!r}", "use a colour, as white or #8080ff"):
        ImageColor.getrgb(background)
    if channels not in (0, *MODES):
        raise BadInput(f"channels={channels}: must be 1 for grey, 3 for colour, 0 to find out")
    if in_bucket(epath.Path(path)):
        raise BadInput(f"path={path!r} is in a bucket: copy it to each host, and set path to that")
    found = list_files(path, key="path", class_order=class_order)
    chosen = _of_split(found, held_out_share, split)
    if not chosen:
        raise BadInput(f"path={path!r} has no picture for split={split!r}: add a second one")
    channels = channels or (1 if _are_grey(found, background) else 3)
    shape, mode = (image_size, image_size, channels), MODES[channels]
    fit = _fit_in_memory(shape, len(chosen))
    pixels = np.empty((len(chosen) * fit, *shape), np.uint8)

    def decode(index: int, size: int = image_size) -> np.ndarray:
        return crop.decoded(found.read(index)[0], size, mode, background)

    def look(row: int) -> None:
        picture = decode(chosen[row], image_size * fit)
        if fit:
            pixels[row] = picture

    def look_at_all() -> dict[str, np.ndarray]:
        problems = np.array(_tried(look, range(len(chosen))))
        return {"pixels": pixels[problems[: len(pixels)] == ""], "problems": problems}

    recipe = [split, *map(str, (held_out_share, shape, fit, background))]
    whole = kept([*recipe, *_DECODERS, *found.versions()], look_at_all)
    problems = zip(chosen, whole["problems"].tolist(), strict=True)
    bad = {index: text for index, text in problems if text}
    good = [index for index in chosen if index not in bad]
    if bad:
        _tell_broken(found, bad, good, f"path={path!r}", split)

    def decode_good(row: int) -> tuple[np.ndarray, int]:
        problem = f"data.path={path!r}: {found.name(good[row])} has gone or changed"
        with refused(_UNREADABLE, problem, "put any picture in its place, and run this again"):
            return decode(good[row]), found.labels[good[row]]

    lines, names = list(found.lines()), found.class_names
    own = digest(lines[index] for index in good)
    if not fit:
        return Pictures(DataSpec(shape, len(names), names), len(good), decode_good, own)
    arrays = {"x": whole["pixels"], "label": np.array(found.labels)[good]}
    return Rows(arrays, np.arange(len(good)), names, own)


def _tell_broken(
    found: Listed, bad: dict[int, str], good: list[int], where: str, split: str
) -> None:
    """Warn of broken pictures; BadInput if a class, or everything, is lost with them."""
    total = len(bad) + len(good)
    named = listed([f"{found.name(index)} ({why})" for index, why in bad.items()], 4)
    if not good:
        raise BadInput(f"{where}: none of {total} pictures is readable: replace {named}")
    of_bad, of_good = ({found.labels[index] for index in each} for each in (bad, good))
    if (lost := sorted(of_bad - of_good)) and split == "train":
        told = f"class {listed([found.class_names[label] for label in lost])} are broken"
        raise BadInput(f"{where}: all pictures of {told}: replace {named}, or remove the class")
    logging.warning("%s: skipped %d broken of %d pictures: %s", where, len(bad), total, named)


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
        pixels = crop.decoded(pictures.read(index)[0], 0, background=background)
        if (pixels != pixels[..., :1]).any():
            raise crop.Broken(_COLOUR)

    is_grey = _COLOUR not in _tried(has_colour, chosen)
    if is_grey and len(chosen) < len(pictures):
        seen = f"{len(chosen)} of {len(pictures)} pictures are grey: all are read as grey"
        tell_once(f"{seen}; data.channels=3 keeps colour")
    return is_grey


def _tried(look: Callable[[int], None], indices: Sequence[int]) -> list[str]:
    """Return why `look` fails at each picture, or nothing."""

    def problem(index: int) -> str:
        try:
            look(index)
        except _UNREADABLE as error:
            return reason_of(error)
        return ""

    is_long = len(indices) >= _SHOWN_FROM and processes.is_first()
    with ThreadPoolExecutor(THREADS) as pool:
        found = pool.map(problem, indices)
        return list(track(found, "reading pictures", len(indices), is_wanted=is_long))
