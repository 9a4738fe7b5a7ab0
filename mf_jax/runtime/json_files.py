"""JSON files whose content is checked: its types, and its damage by a checksum."""

import functools
import hashlib
import itertools
import json
import math
from collections.abc import Callable, Mapping
from typing import Any

from etils import epath

from mf_jax.flow.errors import BadInput, refused
from mf_jax.runtime.files import opened, replace_file, to_json

CHECKSUM = "checksum"
_LARGEST_JSON, _LONGEST_INTEGER = 2**28, 19


def sealed(value: Mapping[str, Any], **options: Any) -> str:
    """Return an object as JSON, with a checksum of all that it says, which `parse_json` checks."""
    return to_json({CHECKSUM: _checksum(value), **value}, **options)


def _checksum(value: Mapping[str, Any]) -> str:
    return hashlib.sha256(to_json(value, sort_keys=True).encode()).hexdigest()[:16]


def write_json(path: epath.PathLike, value: Mapping[str, Any], **options: Any) -> None:
    """Write an object with its checksum as a whole JSON file."""
    replace_file(path, sealed(value, **options).encode())


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
        tell_once(f"{folder}: has files without a checksum: damage in them cannot be noticed")
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
    with refused((OSError, ValueError), f"{path}: cannot be used", fix), opened(path) as file:
        return parse_json(file.read(_LARGEST_JSON), like, path.parent)


def read_lines(
    path: epath.Path, like: Any, check: Callable[[dict], str], *, note: str, only_last: bool = False
) -> list[dict[str, Any]]:
    """Return the objects of a file, one a line; bad ones are left out, with a note.

    Args:
      like: see `parse_json`.
      check: returns what else is wrong with an object, or nothing.
      only_last: whether no line before the last may be bad.
    """
    rows = []
    with refused(OSError, f"{path}: cannot be read", "move it away"):
        lines = path.read_bytes().splitlines() if path.exists() else []
    for number, line in enumerate(lines, start=1):
        try:
            row = parse_json(line, like, path.parent)
            if wrong := check(row):
                raise ValueError(wrong)
            rows.append(row)
        except ValueError as error:
            problem = f"{path} line {number} is {line[:80]!r}: {error}"
            if only_last and number < len(lines):
                raise BadInput(f"{problem}; delete that line") from None
            tell_once(f"{problem}; it is left out, {note}")
    return rows


@functools.cache
def tell_once(text: str) -> None:
    """Print a line, the first time that it is told."""
    print(text, flush=True)
