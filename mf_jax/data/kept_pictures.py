"""Decoded pictures in a folder of the user's, so that the next start reads one file, not thousands.

A file's name is the digest of what it was made from. Nothing is lost with it: pictures are decoded
anew where it is missing or damaged, which its own checksums tell.
"""

import contextlib
from collections.abc import Callable, Iterable

import numpy as np
from etils import epath

from mf_jax.data.picture_list import digest
from mf_jax.runtime.archives import UNREADABLE, read_npz, write_npz
from mf_jax.runtime.compile_cache import cache_folder

_FOLDER, _MOST_FILES = "pictures", 4
Arrays = dict[str, np.ndarray]


def kept(made_from: Iterable[str], make: Callable[[], Arrays]) -> Arrays:
    """Return the arrays that `make` returns, from the folder where it holds them."""
    cache = None
    with contextlib.suppress(RuntimeError):
        cache = cache_folder()
    if cache is None:
        return make()
    folder = epath.Path(cache) / _FOLDER
    file = folder / f"{digest(made_from)}.npz"
    with contextlib.suppress(*UNREADABLE):
        return read_npz(file, ("pixels", "problems"))
    arrays = make()
    with contextlib.suppress(OSError):  # no folder, no space: no matter
        folder.mkdir(parents=True, exist_ok=True)
        write_npz(file, arrays)
        files = sorted(folder.glob("*.npz"), key=lambda each: -each.stat().mtime)
        for old in files[_MOST_FILES:]:
            old.unlink(missing_ok=True)
    return arrays
