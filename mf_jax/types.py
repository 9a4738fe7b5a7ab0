"""Records shared by every part: what one training row holds, what a network predicts, what bad input is."""

import difflib
from collections.abc import Iterable
from typing import NamedTuple, Protocol, runtime_checkable

import flax.struct
from jaxtyping import Array, Bool, Float, Int, PyTree

NO_LABEL = -1
"""The label of a row without a class; a network maps it to its null embedding."""


class BadInput(ValueError):
    """Raise for anything a user can get wrong: names the argument, its value, what is allowed, and the fix.

    A `ValueError` to a caller from Python; one line on stderr and exit code 2 at the command line.
    """


def nearest(name: str, known: Iterable[str]) -> str:
    """Return " (did you mean X?)" for the known name nearest to an unknown one, or nothing."""
    match = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f" (did you mean {match[0]}?)" if match else ""


def check_known(key: str, name: str, known: Iterable[str]) -> None:
    """Raise BadInput unless a name is one of the known ones; the error lists them and the nearest.

    Args:
      key: what the user sets to the name, for the error.
      name: the name given.
      known: the names there are.
    """
    if name not in known:
        raise BadInput(f"{key}={name!r}: must be one of {', '.join(known)}{nearest(name, known)}")


@flax.struct.dataclass
class Condition:
    """What a network is told besides z, r and t.

    labels: int `[B]`, a class in [0, num_classes) or `NO_LABEL`.
    """

    labels: Int[Array, "b"]


class Prediction(NamedTuple):
    """What a network returns: the average velocity `u` and, where it has a second head, the velocity `v`.

    u: `[B, ...]` like z. v: `[B, ...]` like z, or None for a network with one head.
    """

    u: Float[Array, "b ..."]
    v: Float[Array, "b ..."] | None = None


@runtime_checkable
class Field(Protocol):
    """A pure function from parameters and a point on the path to a `Prediction`."""

    def __call__(
        self,
        params: PyTree,
        z: Float[Array, "b ..."],
        *,
        r: Float[Array, "b"],
        t: Float[Array, "b"],
        condition: Condition,
    ) -> Prediction: ...


@flax.struct.dataclass
class Rows:
    """A sub-batch of training rows.

    x: data `[B, ...]`. e: noise like x. t, r: times `[B]`, 0 <= r <= t <= 1.
    labels: int `[B]`, the true class or `NO_LABEL`. dropped: bool `[B]`, rows trained without their label.
    """

    x: Float[Array, "b ..."]
    e: Float[Array, "b ..."]
    t: Float[Array, "b"]
    r: Float[Array, "b"]
    labels: Int[Array, "b"]
    dropped: Bool[Array, "b"]


@flax.struct.dataclass
class Draws:
    """Everything random in one training step, split by what the step does with a row.

    instant: the rows with r = t. interval: the rows with r < t, the only ones that need du/dt.
    Either may have zero rows, not both.
    """

    instant: Rows
    interval: Rows
