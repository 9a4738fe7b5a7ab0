"""Files that are written whole or not at all, on a file system or in a bucket."""

import contextlib
import errno
import glob
import hashlib
import json
import os
import re
import shutil
import stat
import tempfile
import time
from collections.abc import Callable, Iterator
from operator import attrgetter
from pathlib import Path
from typing import Any, BinaryIO

from etils import epath
from ml_collections import ConfigDict

from mf_jax.flow.errors import BadInput

try:
    import fcntl
except ImportError:  # Windows, where nothing keeps two trainings apart
    fcntl = None

STORES = {"gs": "etils[epath-gcs]", "s3": "etils[epath-s3]"}
"""The package that a path in a store of objects needs, by its scheme."""
PATHS = ("data.path", "data.autoencoder", "data.copy_to", "prepare.input", "prepare.reference")
PATHS += ("init.path", "eval.references", "eval.samples", "eval.inception", "weights_dir")
PATHS += ("perceptual.lpips_weights", "perceptual.convnext_weights")
"""Keys of a config that hold a path, or a name where a path may stand."""
_PathOfEtils = type(epath.Path())
_glob_of_etils = _PathOfEtils.glob


def _glob(folder: epath.Path, pattern: str) -> Iterator[epath.Path]:
    """Yield what a pattern finds in a folder, whose own name may hold brackets.

    etils takes them for a part of the pattern: Orbax would save a checkpoint without its arrays.
    """
    if in_bucket(folder):
        return _glob_of_etils(folder, pattern)
    return (folder / name for name in glob.glob(pattern, root_dir=folder))


_PathOfEtils.glob = _glob


def place(path: epath.PathLike, key: str) -> epath.Path:
    """Return the path that a key holds, `~` expanded; BadInput where nothing here can reach it."""
    text = os.path.expanduser(os.fspath(path))
    scheme = re.match(r"([A-Za-z][\w+.-]+):/", text)
    if scheme and scheme[1] not in STORES:
        raise BadInput(f"{key}={text}: cannot be reached; use a path here, or gs://, s3://")
    if scheme and re.search(r"[*?\[\]]", text):
        raise BadInput(f"{key}={text}: a name in a store must be without * ? [ ]; choose another")
    return epath.Path(text)


def in_bucket(path: epath.Path) -> bool:
    """Return whether a path is in a bucket, where only epath writes and nothing is renamed."""
    return "://" in str(path)


def absolute(path: epath.PathLike) -> epath.Path:
    """Return a path that the current folder does not change, which etils puts before gs:// too."""
    path = epath.Path(path).expanduser()
    return path if in_bucket(path) else path.absolute()


def opened(path: epath.PathLike, flags: int = os.O_RDONLY) -> BinaryIO:
    """Open a regular file to read; BadInput for a pipe, which waits, and a device, without end."""
    path = epath.Path(path)
    if in_bucket(path):
        return path.open("rb")
    waits_for_no_writer = getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    file = os.fdopen(os.open(path, flags | waits_for_no_writer, 0o666), "rb")
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise BadInput(f"{path}: is no regular file, but a pipe or a device; must be a file")
    return file


def sha256_of(path: epath.PathLike) -> str:
    """Return the SHA-256 of the bytes of a file, in hex digits."""
    with opened(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def to_json(value: Any, **options: Any) -> str:
    """Return a value as JSON, in which a number that is not finite is null."""
    finite = json.loads(json.dumps(value), parse_constant=lambda name: None)
    return json.dumps(finite, **options)


def replace_file(path: epath.PathLike, content: bytes) -> None:
    """Write a whole file, in an existing folder, or nothing."""
    with written_aside(epath.Path(path)) as aside:
        Path(aside).write_bytes(content)


def change_paths(config: ConfigDict, change: Callable[[str, str], str]) -> None:
    """Set each path in a config, unless it is empty, to change(path, key)."""

    def changed(value: Any, key: str) -> Any:
        if isinstance(value, tuple):
            return tuple(changed(each, key) for each in value)
        return change(value, key) if value and isinstance(value, str) else value

    config.update_from_flattened_dict({k: changed(attrgetter(k)(config), k) for k in PATHS})


@contextlib.contextmanager
def on_disk(path: epath.Path) -> Iterator[str]:
    """Yield a path of the local file system where a file can be read, a copy's for a bucket."""
    if not in_bucket(path):
        yield str(path)
        return
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / path.name
        copy.write_bytes(path.read_bytes())
        yield str(copy)


@contextlib.contextmanager
def written_aside(path: epath.Path) -> Iterator[str]:
    """Yield a path of the local file system to write to, which becomes the file at the end."""
    is_local = not in_bucket(path)
    # nobody else can put a link into a folder of this process under a name that none can guess
    with tempfile.TemporaryDirectory(
        ".part", f".{path.name}.", os.fspath(path.parent) if is_local else None
    ) as folder:
        aside = Path(folder) / path.name
        yield str(aside)
        if not is_local:
            path.write_bytes(aside.read_bytes())  # an object of a bucket appears as a whole
            return
        aside.replace(path)
    for left in Path(path).parent.glob(f".{glob.escape(path.name)}.*.part"):  # by killed processes
        with contextlib.suppress(FileNotFoundError):  # another process has tidied up
            if time.time() - left.lstat().st_mtime > 24 * 60 * 60:
                shutil.rmtree(left, ignore_errors=True)
                left.unlink(missing_ok=True)  # where it is no folder


@contextlib.contextmanager
def locked(path: epath.Path, *, wait: bool) -> Iterator[None]:
    """Hold a file, made if missing, against other processes; buckets and Windows know no locks.

    Where another process holds it, wait or raise BlockingIOError.
    """
    if in_bucket(path) or fcntl is None:
        yield
        return
    try:
        file = opened(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW)
    except OSError as error:
        if error.errno != errno.ELOOP:
            raise
        raise BadInput(f"{path}: is a link, which another may have put there: remove it") from error
    with file:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        yield
