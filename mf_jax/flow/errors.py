"""What bad input is, and how it is told."""

import contextlib
import difflib
from collections.abc import Iterable, Iterator, Mapping


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
    if name not in known:
        raise BadInput(f"{key}={name!r}: must be one of {', '.join(known)}{nearest(name, known)}")


def list_problems(names_of: Mapping[str, list[str]]) -> str:
    """Return "missing: a, b; left over: c" of names by problem, of many names only the first."""
    return "; ".join(f"{problem}: {listed(names)}" for problem, names in names_of.items() if names)


def listed(names: list[str], most: int = 8) -> str:
    """Return names separated by commas, of many only the first and how many more there are."""
    more = f" and {len(names) - most} more" * (len(names) > most)
    return ", ".join(names[:most]) + more
