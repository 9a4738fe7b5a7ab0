"""What bad input is, and how it is told."""

import contextlib
import difflib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any


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
def refused(
    kinds: type | tuple[type, ...], problem: str, fix: str, told: type[Exception] = BadInput
) -> Iterator[None]:
    """Turn errors of these kinds into one that tells a problem, their reason and a fix."""
    try:
        yield
    except BadInput:
        raise
    except kinds as error:
        raise told(f"{problem} ({reason_of(error)}): {fix}") from error


def reason_of(error: Exception) -> str:
    """Return the text of an error in one line, with its type where the text is a word or none."""
    text = " ".join(str(error).split())[:200]
    return text if " " in text else f"{type(error).__name__}: {text}".removesuffix(": ")


def nearest(name: str, known: Iterable[str]) -> str:
    """Return " (did you mean X?)" for the known name nearest to an unknown one, or nothing."""
    match = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f" (did you mean {match[0]}?)" if match else ""


@contextlib.contextmanager
def collected(problems: list[str]) -> Iterator[None]:
    """Add what a BadInput of the body says to a list: one error will tell all of them."""
    try:
        yield
    except BadInput as problem:
        problems.append(str(problem))


@contextlib.contextmanager
def in_section(name: object, then: str = ".") -> Iterator[None]:
    """Put the config section, or a path, in front of what a BadInput of the body says."""
    try:
        yield
    except BadInput as problem:
        raise BadInput(f"{name}{then}{problem}") from problem


def check_known(key: str, name: str, known: Iterable[str]) -> None:
    """Raise BadInput, which lists the known names and the nearest, unless a key's name is known."""
    if name not in (known := list(known)):
        raise BadInput(f"{key}={name!r}: must be one of {', '.join(known)}{nearest(name, known)}")


def check_within(key: str, value: Any, interval: str, fix: str = "") -> None:
    """Raise BadInput unless a value, or each of a tuple, is in an interval "[0, 1)"; nan is not."""
    low, high = map(float, interval[1:-1].split(","))
    for each in value if isinstance(value, tuple) else (value,):
        is_above = each >= low if interval[0] == "[" else each > low
        if not (is_above and (each <= high if interval[-1] == "]" else each < high)):
            raise BadInput(f"{key}={value}: must be within {interval}" + f"; {fix}" * bool(fix))


def check_allowed(key: str, value: Any, allowed: str | Iterable[str]) -> None:
    """Raise BadInput unless a value is in an interval (`check_within`), or one of some names."""
    (check_within if isinstance(allowed, str) else check_known)(key, value, allowed)


def check_fields(section: str, record: Any, **allowed: str | Iterable[str]) -> None:
    """Raise BadInput unless fields of a record are `check_allowed`."""
    for name, which in allowed.items():
        check_allowed(f"{section}.{name}".lstrip("."), getattr(record, name), which)


def check_fit(
    problem: str, there: Mapping[str, Any], wanted: Mapping[str, Any], fix: str, **more: list[str]
) -> None:
    """Raise BadInput that lists all misfits unless arrays, or shapes, are the wanted ones by name.

    Args:
      more: names that are wrong in another way, by what is wrong.
    """
    sides = there.items(), wanted.items()
    own, ours = ({name: list(getattr(x, "shape", x)) for name, x in side} for side in sides)
    both = [name for name in own if name in ours]
    found = {
        "missing": [name for name in ours if name not in own],
        "left over": [name for name in own if name not in ours],
        "misshapen": [f"{k} is {own[k]}, must be {ours[k]}" for k in both if own[k] != ours[k]],
    }
    if wrong := [f"{what}: {listed(names)}" for what, names in (found | more).items() if names]:
        raise BadInput(f"{problem}; {'; '.join(wrong)}; {fix}")


def listed(names: list[str], most: int = 8) -> str:
    """Return names separated by commas, of many only the first and how many more there are."""
    more = f" and {len(names) - most} more" * (len(names) > most)
    return ", ".join(names[:most]) + more
