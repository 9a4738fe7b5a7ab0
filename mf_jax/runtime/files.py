"""Files that are written whole or not at all, on a file system or in a bucket."""

import contextlib
import functools
import glob
import hashlib
import importlib.util
import itertools
import json
import math
import os
import re
import socket
import sys
import tempfile
import time
import types
from collections.abc import Callable, Iterator, Mapping
from operator import attrgetter
from pathlib import Path
from typing import Any

from etils import epath
from ml_collections import ConfigDict

from mf_jax.flow.errors import BadInput

try:
    import fcntl
except ImportError:  # Windows, where nothing keeps two trainings apart
    fcntl = None

_ABANDONED_SECONDS = 24 * 60 * 60
STORES = {"gs": "etils[epath-gcs]", "s3": "etils[epath-s3]"}
"""The package that a path in a store of objects needs, by its scheme."""
PATHS = ("data.path", "data.autoencoder", "data.copy_to", "prepare.input", "prepare.reference")
PATHS += ("init.path", "eval.references", "eval.samples", "eval.inception", "weights_dir")
"""Keys of a config that hold a path, or a name where a path may stand."""
_PathOfEtils = type(epath.Path())
_glob_of_etils = _PathOfEtils.glob


def _glob(folder: epath.Path, pattern: str) -> Iterator[epath.Path]:
    """Yield what a pattern finds in a folder, whatever its own name holds.

    etils takes brackets in the name of the folder for a part of the pattern. Orbax then finds
    nothing of what its processes have written, and leaves a checkpoint without its arrays.
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
        stores = " or ".join(f"{name}://" for name in STORES)
        raise BadInput(f"{key}={text}: cannot be reached; use a path of this machine, or {stores}")
    if scheme and re.search(r"[*?\[\]]", text):
        raise BadInput(f"{key}={text}: a name in a store must be without * ? [ ]; choose another")
    return epath.Path(text)


def in_bucket(path: epath.Path) -> bool:
    """Return whether a path is in a bucket, where only epath writes and nothing is renamed."""
    return "://" in str(path)


def sha256_of(path: epath.PathLike) -> str:
    """Return the SHA-256 of the bytes of a file, in hex digits."""
    with epath.Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def to_json(value: Any, **options: Any) -> str:
    """Return a value as JSON, in which a number that is not finite is null."""

    def finite(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: finite(each) for key, each in value.items()}
        if isinstance(value, list | tuple):
            return [finite(each) for each in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value

    return json.dumps(finite(value), allow_nan=False, **options)


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
    if in_bucket(path):
        with tempfile.TemporaryDirectory() as folder:
            aside = Path(folder) / path.name
            yield str(aside)
            path.write_bytes(aside.read_bytes())  # an object of a bucket appears as a whole
        return
    final = Path(path)
    aside = final.with_name(f".{final.name}.{socket.gethostname()}.{os.getpid()}.part")
    try:
        yield str(aside)
        aside.replace(final)
    except BaseException:
        aside.unlink(missing_ok=True)  # it may be what fills the disk
        raise
    for left in final.parent.glob(f".{glob.escape(final.name)}.*.part"):  # by killed processes
        with contextlib.suppress(FileNotFoundError):  # another process has tidied up
            if time.time() - left.stat().st_mtime > _ABANDONED_SECONDS:
                left.unlink()


@contextlib.contextmanager
def locked(path: epath.Path, *, wait: bool) -> Iterator[None]:
    """Hold a file, made if missing, against other processes; buckets and Windows know no locks.

    Where another process holds it, wait or raise BlockingIOError.
    """
    if in_bucket(path) or fcntl is None:
        yield
        return
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        yield


CHECKSUM = "checksum"
_LARGEST_JSON, _LONGEST_INTEGER = 2**28, 19


def sealed(value: Mapping[str, Any]) -> dict[str, Any]:
    """Return an object with a checksum of all that it says, which `parse_json` checks."""
    return {CHECKSUM: _checksum(value), **value}


def _checksum(value: Mapping[str, Any]) -> str:
    text = json.dumps(json.loads(to_json(value)), sort_keys=True)  # as it will be read
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def write_json(path: epath.PathLike, value: Mapping[str, Any], **options: Any) -> None:
    """Write an object with its checksum as a whole JSON file."""
    replace_file(path, to_json(sealed(value), **options).encode())


def parse_json(content: bytes, like: Any) -> tuple[dict[str, Any], bool]:
    """Return an object and whether it had a checksum; ValueError unless it fits an example.

    Args:
      content: JSON in UTF-8, whose numbers are finite.
      like: has the keys that must be there, those that end in ? may be missing. A whole number is
        the least one allowed, the first element of a list stands for all of them.
    """

    def number(text: str) -> float:
        if not math.isfinite(float(text)):
            raise ValueError(f"{text[:20]} is no finite number")
        return float(text)

    def integer(text: str) -> int:
        if len(text) > _LONGEST_INTEGER:
            raise ValueError(f"{text[:20]}... has too many digits")
        return int(text)

    try:
        value = json.loads(
            content.decode(), parse_float=number, parse_int=integer, parse_constant=number
        )
        stored = value.pop(CHECKSUM, None) if isinstance(value, dict) else None
        if stored is not None and stored != _checksum(value):
            raise ValueError(
                "its checksum says that it is damaged or edited: restore it, or delete its "
                f"{CHECKSUM!r} if you have edited it"
            )
        if problem := misfit(value, like, "it"):
            raise ValueError(problem)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    return value, stored is not None


def misfit(value: Any, like: Any, name: str) -> str:
    """Return where a value of JSON is not like an example (`parse_json`), or nothing."""
    kinds = {dict: "an object", list: "a list", str: "a text", bool: "true or false"}
    kind = type(like)
    accepted = (int, float) if kind is float else kind
    if not isinstance(value, accepted) or (isinstance(value, bool) and kind is not bool):
        return f"{name} is {str(value)[:40]!r}, not {kinds.get(kind, 'a number')}"
    if kind is int and value < like:
        return f"{name} is {value}, and must be at least {like}"
    if kind is list:
        parts = [(each, like[0], f"an element of {name}") for each in value] if like else []
    elif kind is dict:
        wanted = {key.removesuffix("?"): key for key in like}
        if lacking := [key for key, full in wanted.items() if key == full and key not in value]:
            return f"{name} lacks {', '.join(lacking)}"
        parts = [(value[key], like[wanted[key]], key) for key in wanted if key in value]
    else:
        parts = []
    return next(filter(None, itertools.starmap(misfit, parts)), "")


def read_json(path: epath.PathLike, like: Any, fix: str = "restore it") -> dict[str, Any]:
    """Return the object of a JSON file that is like an example (`parse_json`).

    BadInput says which file is none, and a line on the terminal that one has no checksum.
    """
    path = epath.Path(path)
    try:
        is_here = not in_bucket(path) and path.exists()
        if is_here and not (path.is_file() and path.stat().length < _LARGEST_JSON):
            raise ValueError("it is no regular file of a reasonable size")
        value, is_sealed = parse_json(path.read_bytes(), like)
    except FileNotFoundError:
        raise
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise BadInput(f"{path}: cannot be used ({reason}); {fix}") from error
    if not is_sealed:
        tell_unsealed(path.parent)
    return value


def tell_unsealed(folder: epath.Path) -> None:
    """Say that damage may pass in a folder's files that have no checksum."""
    tell_once(
        f"{folder}: has files without a checksum, of an earlier version or edited by hand: damage "
        "in them cannot be noticed"
    )


@functools.cache
def tell_once(text: str) -> None:
    """Print a line, the first time that it is told."""
    print(text, flush=True)


def defaults() -> ConfigDict:
    """Return the config of configs/default.py: every key, and its default."""
    configs()
    return importlib.import_module("configs.default").get_config()


def configs() -> Path:
    """Return the folder of the configs, in the package or beside it, and let `configs` be imported.

    A folder of that name in the caller's own project stays importable beside it.
    """
    home = Path(__file__).parents[1]
    folder = next(path for path in (home / "configs", home.parent / "configs") if path.exists())
    if "configs" not in sys.modules:
        spec, module = importlib.util.find_spec("configs"), types.ModuleType("configs")
        module.__path__ = [str(folder), *((spec and spec.submodule_search_locations) or ())]
        sys.modules["configs"] = module
    return folder
