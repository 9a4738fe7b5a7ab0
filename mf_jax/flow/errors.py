"""What bad input is, and how it is told."""

import contextlib
import difflib
import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

Number = int | float


class BadInput(ValueError):
    """Tell a user's mistake: the argument, its value, what is allowed, and the fix.

    To a caller from Python it is a `ValueError`. At the command line it is one line and code 2.
    """


class Failure(Exception):
    """Tell in one line why a command failed though its input was right; exit code 1."""


@contextlib.contextmanager
def left_out(what: str) -> Iterator[None]:
    """Turn an error of the body into one line: nothing that only shows a run may end it."""
    try:
        yield
    except Exception as error:  # of drawing, of a disk, of a library: whatever it is
        print(f"{what} is left out: {type(error).__name__}: {reason_of(error)}", flush=True)


@contextlib.contextmanager
def refused(kinds: type | tuple[type, ...], problem: str, fix: str) -> Iterator[None]:
    """Turn errors of these kinds into BadInput that tells a problem, their reason and a fix."""
    try:
        yield
    except BadInput:
        raise
    except kinds as error:
        raise BadInput(f"{problem} ({reason_of(error)}): {fix}") from error


def reason_of(error: Exception) -> str:
    """Return the text of an error in one line, or its type where it has none."""
    return " ".join(str(error).split())[:200] or type(error).__name__


def nearest(name: str, known: Iterable[str]) -> str:
    """Return " (did you mean X?)" for the known name nearest to an unknown one, or nothing."""
    match = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f" (did you mean {match[0]}?)" if match else ""


@contextlib.contextmanager
def in_section(name: str) -> Iterator[None]:
    """Put the config section in front of the argument that a BadInput of the body names."""
    try:
        yield
    except BadInput as problem:
        raise BadInput(f"{name}.{problem}") from problem


def check_known(key: str, name: str, known: Iterable[str]) -> None:
    """Raise BadInput, which lists the known names and the nearest, unless a key's name is known."""
    if name not in (known := list(known)):
        raise BadInput(f"{key}={name!r}: must be one of {', '.join(known)}{nearest(name, known)}")


def is_within(value: Number, low: Number, high: Number, ends: str) -> bool:
    """Return whether a number lies between two others; [ or ] says that this end belongs to it."""
    above = value >= low if ends[0] == "[" else value > low
    return above and (value <= high if ends[1] == "]" else value < high)


def limits(low: Number, high: Number, ends: str) -> str:
    """Return what `is_within` allows, e.g. "at least 1"."""
    if high == math.inf:
        return f"{'at least' if ends[0] == '[' else 'above'} {low}"
    return f"within {ends[0]}{low}, {high}{ends[1]}"


def check_within(
    key: str, value: Number, low: Number, high: Number, ends: str = "[]", fix: str = ""
) -> None:
    """Raise BadInput unless a key's value `is_within`; nan never is."""
    if not is_within(value, low, high, ends):
        raise BadInput(f"{key}={value}: must be {limits(low, high, ends)}" + f"; {fix}" * bool(fix))


def check_fields(section: str, record: Any, **allowed: str | Iterable[str]) -> None:
    """Raise BadInput unless fields of a record are allowed: in an interval "[0, 1)", or known."""
    for name, which in allowed.items():
        key, value = f"{section}.{name}".lstrip("."), getattr(record, name)
        if not isinstance(which, str):
            check_known(key, value, which)
        elif not is_within(value, *map(float, which[1:-1].split(",")), which[0] + which[-1]):
            raise BadInput(f"{key}={value}: must be within {which}")


def list_problems(names_of: Mapping[str, list[str]]) -> str:
    """Return "missing: a, b; left over: c" of names by problem, of many names only the first."""
    return "; ".join(f"{problem}: {listed(names)}" for problem, names in names_of.items() if names)


def listed(names: list[str], most: int = 8) -> str:
    """Return names separated by commas, of many only the first and how many more there are."""
    more = f" and {len(names) - most} more" * (len(names) > most)
    return ", ".join(names[:most]) + more
