"""What takes long to read is kept in the user's folder: the next start reads one file."""

import contextlib
from collections.abc import Callable, Iterable, Mapping

import numpy as np
from etils import epath

from mf_jax.data.picture_list import digest
from mf_jax.runtime.archives import UNREADABLE, read_npz, write_npz
from mf_jax.runtime.compile_cache import cache_folder

_MOST_KEPT = 8
Arrays = Mapping[str, np.ndarray]


def kept(made_from: Iterable[str], make: Callable[[], Arrays]) -> Arrays:
    """Return what `make` returns, which texts decide, from the folder if it holds it whole."""
    cache = None
    with contextlib.suppress(RuntimeError):  # there is no home folder
        cache = cache_folder()
    if cache is None:
        return make()
    folder = epath.Path(cache) / "data"
    file = folder / f"{digest(made_from)}.npz"
    with contextlib.suppress(*UNREADABLE):
        return read_npz(file)
    arrays = make()
    with contextlib.suppress(OSError):  # no folder, no space: no matter
        folder.mkdir(parents=True, exist_ok=True)
        write_npz(file, arrays)
        files = sorted(folder.glob("*.npz"), key=lambda each: -each.stat().mtime)
        for old in files[_MOST_KEPT:]:
            old.unlink(missing_ok=True)
    return arrays
