"""Pictures in a folder, whatever their size and mode; sub-folders are classes.

Also what every source of pictures shares: `Pictures`, which decodes them on all cores and keeps them in memory.
"""

import hashlib
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from absl import logging
from jaxtyping import Int
from PIL import Image
from rich.console import Console
from rich.progress import track

from mf_jax.data.crop import adm_crop, as_rgb
from mf_jax.data.pipeline import SPLITS, Batch, check_at_least
from mf_jax.errors import BadInput, check_known
from mf_jax.flow.records import NO_LABEL
from mf_jax.runtime import processes

SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
CACHE_BYTES = 2**30
"""Pictures that take at most this many bytes as uint8, all together, are decoded once and kept in memory."""
_THREADS = max(16, len(os.sched_getaffinity(0)))  # also where there are fewer cores: reading waits
_NAMED_BROKEN = 5
_SHOWN_FROM = 10_000  # pictures; fewer are checked in seconds


class Pictures:
    """Decoded pictures and labels by index, kept as uint8 if all of them fit into `CACHE_BYTES`."""

    def __init__(
        self, decode: Callable[[int], tuple[np.ndarray, int]], shape: tuple[int, ...]
    ) -> None:
        """Wrap a decoder.

        Args:
          decode: maps an index to a uint8 picture `[H, W, C]` and its label; called from several threads.
          shape: `(count, H, W, C)`.
        """
        self._decode_one, self._shape = decode, shape
        self._pool = ThreadPoolExecutor(_THREADS)
        self._keep = int(np.prod(shape)) <= CACHE_BYTES
        if self._keep:
            self._pixels, self._labels = np.empty(shape, np.uint8), np.empty(shape[0], np.int32)
            self._kept = np.zeros(shape[0], bool)

    def gather(self, indices: Int[np.ndarray, "n"]) -> Batch:
        """Return the pictures `[n, H, W, C]` at these indices, scaled to [-1, 1], and their labels."""
        pixels, labels = self._gather_kept(indices) if self._keep else self._decode(indices)
        return Batch(pixels.astype(np.float32) / 127.5 - 1, labels)

    def _gather_kept(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        missing = np.unique(indices[~self._kept[indices]])
        if missing.size:
            # Two threads may decode the same picture; they write the same values. The mark comes last.
            self._pixels[missing], self._labels[missing] = self._decode(missing)
            self._kept[missing] = True
        return self._pixels[indices], self._labels[indices]

    def _decode(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        pixels, labels = (
            np.empty((len(indices), *self._shape[1:]), np.uint8),
            np.empty(len(indices), np.int32),
        )
        for row, decoded in enumerate(self._pool.map(self._decode_one, indices.tolist())):
            pixels[row], labels[row] = decoded
        return pixels, labels


class ImageFolder:
    """The pictures of a folder as `[image_size, image_size, 3]`.

    Sub-folders are classes, in the order of their names; a folder without sub-folders is unconditional. Broken pictures
    are skipped with one warning and listed in `broken`.
    """

    def __init__(self, *, path: str, image_size: int, held_out_share: float, split: str) -> None:
        """List one split and decode each of its pictures once, to find the broken ones.

        Args:
          path: the folder.
          image_size: height and width in pixels.
          held_out_share: share of each class kept for evaluation, in (0, 1). At least one picture of a class that has
            two is held out, and at least one is left to train on. Which ones depends on their file names alone.
          split: `train` or `held_out`.

        Raises:
          BadInput: if an argument is out of range, or the folder is missing, empty, ambiguous or unreadable.
        """
        check_known("split", split, SPLITS)
        check_at_least("image_size", image_size, 1)
        if not 0 < held_out_share < 1:
            raise BadInput(
                f"held_out_share={held_out_share!r} must lie between 0 and 1, exclusive: try 0.1"
            )
        if not path:  # Path("") would be the current directory
            raise BadInput("path='' is not set: set path to a folder of pictures")
        if "://" in path:
            raise BadInput(
                f"path={path!r} is in a bucket: copy the folder to a disk of each host, and set path to that"
            )
        self._root = Path(path).expanduser()
        classes = _list_classes(self._root)
        self.class_names = () if list(classes) == [""] else tuple(classes)
        self.num_classes = len(self.class_names)
        self.shape = (image_size, image_size, 3)
        self.stored = None
        listed = [
            (name, label if self.num_classes else NO_LABEL)
            for label, names in enumerate(classes.values())
            for name in _part(names, held_out_share, split)
        ]
        self._items, self.broken = self._check(listed, split)
        self._pictures = Pictures(self._decode, (len(self._items), *self.shape))

    def __len__(self) -> int:
        return len(self._items)

    def gather(self, indices: Int[np.ndarray, "n"]) -> Batch:
        """Return the pictures `[n, H, W, 3]` at these indices, and their labels."""
        return self._pictures.gather(indices)

    def _check(
        self, listed: list[tuple[str, int]], split: str
    ) -> tuple[list[tuple[str, int]], tuple[str, ...]]:
        if not listed:
            raise BadInput(
                f"path={str(self._root)!r} has no picture for split={split!r}: add a second picture"
            )
        Image.init()  # once, before the threads: a race in Pillow's own call would reject a good picture
        quiet = len(listed) < _SHOWN_FROM or not processes.is_first()
        with ThreadPoolExecutor(_THREADS) as pool:
            checked = pool.map(_is_readable, [self._root / name for name, _ in listed])
            about = {"total": len(listed), "console": Console(stderr=True), "transient": True}
            readable = list(track(checked, f"checking {split} pictures", disable=quiet, **about))
        items = [item for item, good in zip(listed, readable, strict=True) if good]
        broken = tuple(name for (name, _), good in zip(listed, readable, strict=True) if not good)
        named = ", ".join(broken[:_NAMED_BROKEN]) + (", ..." if len(broken) > _NAMED_BROKEN else "")
        if not items:
            raise BadInput(
                f"path={str(self._root)!r}: none of {len(broken)} pictures is readable: replace {named}"
            )
        if broken:
            logging.warning(
                "%s: skipped %d broken of %d pictures: %s",
                self._root,
                len(broken),
                len(listed),
                named,
            )
        return items, broken

    def _decode(self, index: int) -> tuple[np.ndarray, int]:
        name, label = self._items[index]
        with Image.open(self._root / name) as image:
            return adm_crop(as_rgb(image), self.shape[0]), label


def _scan(folder: Path) -> tuple[list[str], list[str]]:
    # Sorted, because the order of a listing differs between hosts and file systems.
    with os.scandir(folder) as listing:
        entries = sorted(
            (e for e in listing if not e.name.startswith(".")), key=lambda entry: entry.name
        )
    folders = [entry.name for entry in entries if entry.is_dir()]
    pictures = [e.name for e in entries if e.name.lower().endswith(SUFFIXES) and not e.is_dir()]
    return pictures, folders


def _list_classes(root: Path) -> dict[str, list[str]]:
    # From class name to file names relative to the root; one class named "" for a flat folder.
    if not root.is_dir():
        state = "is not a folder" if root.exists() else "does not exist"
        raise BadInput(f"path={str(root)!r} {state}: set path to a folder of pictures")
    pictures, folders = _scan(root)
    classes = {
        folder: [f"{folder}/{name}" for name in _scan(root / folder)[0]] for folder in folders
    }
    if pictures and any(classes.values()):
        raise BadInput(
            f"path={str(root)!r} holds pictures both directly and in sub-folders, which are classes: "
            "move the direct ones into a sub-folder, or the sub-folders elsewhere"
        )
    if pictures:
        return {"": pictures}
    if not any(classes.values()):
        raise BadInput(
            f"path={str(root)!r} holds no pictures ({' '.join(SUFFIXES)}), nor do its direct sub-folders: "
            "set path to the folder whose sub-folders are the classes"
        )
    for name, names in classes.items():
        if not names:
            raise BadInput(
                f"path={str(root)!r}: sub-folder {name!r} would be a class but holds no pictures: remove it"
            )
    return classes


def _part(names: list[str], held_out_share: float, split: str) -> list[str]:
    # Ranked by a hash of the name: stable, and unrelated to the order in which pictures were taken or numbered.
    ranked = sorted(names, key=lambda name: hashlib.blake2b(os.fsencode(name)).digest())
    held_out = min(max(round(held_out_share * len(names)), 1), len(names) - 1)
    return sorted(ranked[:held_out] if split == "held_out" else ranked[held_out:])


def _is_readable(path: Path) -> bool:
    try:
        with Image.open(path) as image:
            # A JPEG is decoded at an eighth of its size: cheaper, and it still reads the file to its end.
            image.draft(None, (1, 1))
            as_rgb(image)
    except MemoryError:
        raise
    except Exception:
        # The decoders of Pillow raise anything: OSError, SyntaxError, ValueError, struct.error, ...
        return False
    return True
