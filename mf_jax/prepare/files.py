"""Files that several processes write side by side: whole or not at all, and never two under one name."""

import contextlib
import json
import os
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from etils import epath

from mf_jax.data.latent_records import SETTINGS, read_json
from mf_jax.types import BadInput


def replace(path: epath.Path, content: bytes) -> None:
    """Write a whole file or nothing.

    Args:
      path: the file, in an existing folder, on a file system or in a bucket.
      content: its new bytes.
    """
    with written_aside(path) as aside:
        Path(aside).write_bytes(content)


def in_bucket(path: epath.Path) -> bool:
    """Return whether a path is in a bucket, where nothing is renamed and libraries of files do not write."""
    return "://" in str(path)


@contextlib.contextmanager
def written_aside(path: epath.Path) -> Iterator[str]:
    """Yield a path of the local file system to write to; what is there afterwards becomes the file.

    Args:
      path: the file, in an existing folder, on a file system or in a bucket.
    """
    if in_bucket(path):
        with tempfile.TemporaryDirectory() as folder:
            aside = Path(folder) / path.name
            yield str(aside)
            path.write_bytes(aside.read_bytes())  # an object of a bucket appears as a whole
        return
    final = Path(path)
    aside = final.with_name(f".{final.name}.{socket.gethostname()}.{os.getpid()}.part")
    yield str(aside)
    try:
        aside.replace(final)
    except FileNotFoundError:  # another process has made the same file, and tidied up
        if not final.exists():
            raise
    for left in final.parent.iterdir():  # by processes that were killed
        if left.name.startswith(f".{final.name}.") and left.suffix == ".part":
            left.unlink(missing_ok=True)


def claim(folder: epath.Path, settings: dict[str, Any], *, key: str) -> None:
    """Make a folder the place of files with these settings; the first process to come stores them.

    Args:
      folder: made if missing.
      settings: what decides the content of the files, as JSON keeps it.
      key: the config key that names the folder, for the error.

    Raises:
      BadInput: if the folder cannot be written, or holds files of other settings; names those.
    """
    path = folder / SETTINGS
    try:
        folder.mkdir(parents=True, exist_ok=True)
        present = {path.name for path in folder.iterdir() if not path.name.startswith(".")}
        if SETTINGS not in present:
            if present:
                raise BadInput(
                    f"{key}={str(folder)!r} holds other files; must be new or empty: choose another folder"
                )
            replace(path, json.dumps(settings, indent=1).encode())
    except OSError as error:
        raise BadInput(
            f"{key}={str(folder)!r} cannot be written ({error.strerror}): choose another folder"
        ) from error
    _check_same(folder, read_json(path, "settings file"), settings, key)


def _check_same(folder: epath.Path, stored: dict[str, Any], settings: dict[str, Any], key: str) -> None:
    differing = sorted(name for name in stored | settings if stored.get(name) != settings.get(name))
    if differing:
        told = ", ".join(f"{name} {stored.get(name)!r} -> {settings.get(name)!r}" for name in differing)
        raise BadInput(
            f"{key}={str(folder)!r} holds files of other settings ({told}): choose another folder, or set these back"
        )
