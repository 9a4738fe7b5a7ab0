"""JSON files whose content is checked: its types, and its damage by a checksum."""

import functools
import hashlib
import itertools
import json
import math
from collections.abc import Mapping
from typing import Any

from etils import epath

from mf_jax.flow.errors import BadInput, reason_of
from mf_jax.runtime.files import opened, replace_file, to_json

CHECKSUM = "checksum"
_LARGEST_JSON, _LONGEST_INTEGER = 2**28, 19


def sealed(value: Mapping[str, Any]) -> dict[str, Any]:
    """Return an object with a checksum of all that it says, which `parse_json` checks."""
    return {CHECKSUM: _checksum(value), **value}


def _checksum(value: Mapping[str, Any]) -> str:
    return hashlib.sha256(to_json(value, sort_keys=True).encode()).hexdigest()[:16]


def write_json(path: epath.PathLike, value: Mapping[str, Any], **options: Any) -> None:
    """Write an object with its checksum as a whole JSON file."""
    replace_file(path, to_json(sealed(value), **options).encode())


def parse_json(content: bytes, like: Any, folder: epath.Path | None = None) -> dict[str, Any]:
    """Return an object of finite numbers; ValueError for a misfit.

    Args:
      like: has the keys that must be there, those that end in ? may be missing. A whole number is
        the least one allowed, the first element of a list stands for all of them.
      folder: of our own files, where a line on the terminal tells of one without a checksum.
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
            fix = f"restore it, or delete its {CHECKSUM!r} if you have edited it"
            raise ValueError(f"its checksum says that it is damaged or edited: {fix}")
        if problem := misfit(value, like, "it"):
            raise ValueError(problem)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    if stored is None and folder is not None:
        tell_once(
            f"{folder}: has files without a checksum, of an earlier version or edited by hand: "
            "damage in them cannot be noticed"
        )
    return value


def misfit(value: Any, like: Any, name: str) -> str:
    """Return where a value of JSON is not like an example (`parse_json`), or nothing."""
    kinds = {dict: "an object", list: "a list", str: "a text", bool: "true or false"}
    kind = type(like)
    accepted = (int, float) if kind is float else kind
    if not isinstance(value, accepted) or (isinstance(value, bool) and kind is not bool):
        return f"{name} is {str(value)[:40]!r}, not {kinds.get(kind, 'a number')}"
    if kind is int and value < like:
        return f"{name} is {value}, and must be at least {like}"
    parts = []
    if kind is list and like:
        parts = [(each, like[0], f"an element of {name}") for each in value]
    elif kind is dict:
        wanted = {key.removesuffix("?"): key for key in like}
        if lacking := [key for key, full in wanted.items() if key == full and key not in value]:
            return f"{name} lacks {', '.join(lacking)}"
        parts = [(value[key], like[wanted[key]], key) for key in wanted if key in value]
    return next(filter(None, itertools.starmap(misfit, parts)), "")


def read_json(path: epath.PathLike, like: Any, fix: str = "restore it") -> dict[str, Any]:
    """Return the object of one of our JSON files; BadInput unless `parse_json` takes it."""
    path = epath.Path(path)
    try:
        with opened(path) as file:
            return parse_json(file.read(_LARGEST_JSON), like, path.parent)
    except FileNotFoundError:
        raise
    except (OSError, ValueError) as error:
        raise BadInput(f"{path}: cannot be used ({reason_of(error)}); {fix}") from error


def lines_of(path: epath.Path) -> list[bytes]:
    """Return the lines of a file, none where it is missing."""
    try:
        return path.read_bytes().splitlines() if path.exists() else []
    except OSError as error:
        raise BadInput(f"{path}: cannot be read ({error.strerror}); move it away") from error


@functools.cache
def tell_once(text: str) -> None:
    """Print a line, the first time that it is told."""
    print(text, flush=True)
