"""Records shared by every part: a data element, training rows, a network's inputs and outputs."""

import dataclasses
import math
import numbers
from collections.abc import Iterable
from typing import NamedTuple, Protocol, runtime_checkable

import flax.struct
from jaxtyping import Array, Bool, Float, Int, PyTree, UInt32

from mf_jax.flow.errors import BadInput, check_within, listed, nearest
from mf_jax.flow.paths import Points, Scalars

Step = Int[Array, ""] | int
NO_LABEL = -1
"""The label of a row without a class; a network maps it to its null embedding."""


@dataclasses.dataclass(frozen=True)
class DataSpec:
    """One element of the data.

    shape: `(H, W, C)` of a picture, `(D,)` of a vector. num_classes: 0 without labels. class_names:
    in the order of the labels. origin: SHA-256 of the autoencoder behind latents, "" if unknown.
    condition_size: numbers of a row's condition, 0 without one. has_pairs, has_mask: whether rows
    bring their own e, and a mask.
    """

    shape: tuple[int, ...]
    num_classes: int = 0
    class_names: tuple[str, ...] = ()
    origin: str = ""
    condition_size: int = 0
    has_pairs: bool = False
    has_mask: bool = False

    def __post_init__(self) -> None:
        if not self.shape or min(self.shape) < 1:
            raise BadInput(f"shape={self.shape}: must be whole numbers above 0, e.g. (8, 8, 1)")
        check_within("num_classes", self.num_classes, 0, math.inf, "[)", "0 is no classes")

    @property
    def is_picture(self) -> bool:
        """Whether an element is a picture, or the latent of one."""
        return len(self.shape) == 3

    @property
    def more(self) -> dict[str, tuple[tuple[int, ...], str]]:
        """The shape and type of what a row brings besides x and its label, by `Batch`'s names."""
        every = {
            "condition": (self.condition_size, (self.condition_size,), "float32"),
            "e": (self.has_pairs, self.shape, "float32"),
            "mask": (self.has_mask, self.shape, "bool"),
        }
        return {key: (shape, dtype) for key, (has, shape, dtype) in every.items() if has}

    def label_of(self, label: int | str) -> int:
        """Return the number of a class, which may be given by its name."""
        if not isinstance(label, str):
            if not isinstance(label, numbers.Real) or int(label) != label:
                raise BadInput(f"{label!r} is not a class: must be a whole number")
            return int(label)
        if label not in self.class_names:
            known = f"{listed(list(self.class_names)) or 'none'}{nearest(label, self.class_names)}"
            raise BadInput(f"labels: {label!r} is no name of a class; the names are {known}")
        return self.class_names.index(label)

    def check_asked(self, labels: Iterable[int | str]) -> None:
        """Raise BadInput at a number that looks like the name of another class."""
        names = self.class_names[: self.num_classes]
        for label in labels:
            if str(label) in names and label not in (str(label), names.index(str(label))):
                fix = f"write ('{label}',) for that class, and others by their names"
                raise BadInput(f"labels: {label} is a class by its name, not by its number; {fix}")

    def check_labels(self, labels: Iterable[int | str], *, has_null: bool) -> None:
        """Raise BadInput unless all labels are classes, or `NO_LABEL` if the network has it."""
        labels = list(map(self.label_of, labels))
        lowest = NO_LABEL if has_null or not self.num_classes else 0
        wrong = [label for label in labels if not lowest <= label < self.num_classes]
        if wrong and not self.num_classes:
            raise BadInput(f"labels={wrong[0]}: this model has no classes; leave labels out")
        if wrong:
            unlearnt = "and -1, none, of runs with draws.label_drop=any_row"
            null = "-1 for none" if has_null else unlearnt
            most = self.num_classes - 1
            raise BadInput(f"labels: {wrong[0]} is not a class; use 0 to {most}, {null}")


@flax.struct.dataclass
class GuidanceScale:
    """Guidance as an input of the network: its scale, at least 1, and its window [t_min, t_max]."""

    omega: Scalars
    t_min: Scalars
    t_max: Scalars


class Told(NamedTuple):
    """Classes or `NO_LABEL`, and numbers, where a row has both; a row of NaN has no numbers."""

    labels: Int[Array, "b"] | int
    numbers: Float[Array, "b k"] | float


NOTHING_TOLD = Told(NO_LABEL, float("nan"))


@flax.struct.dataclass
class Condition:
    """What this project's networks are told besides z, r and t.

    labels: classes or `NO_LABEL`, a `Told`, or a caller's own tree. guidance: for networks that
    learn a range of scales. dropout: a seed for each row's masks; None = no dropout. augment: tells
    how x was changed; None = not at all. forward_mode: whether `jax.jvp` follows, without a
    gradient of the derivative; fused attention must know.
    """

    labels: PyTree
    guidance: GuidanceScale | None = None
    dropout: UInt32[Array, "b"] | None = None
    augment: Float[Array, "b k"] | None = None
    forward_mode: bool = flax.struct.field(pytree_node=False, default=False)


class Prediction(NamedTuple):
    """Outputs of a network like z: average velocity u and, from a second head, velocity v."""

    u: Points
    v: Points | None = None


@runtime_checkable
class Field(Protocol):
    """A pure function from parameters and points on the path to u, or to a `Prediction`.

    It sees z of any rank and times 0 <= r <= t <= 1, of which central differences go beyond by
    their delta. The condition is the caller's own tree, or a `Condition` where
    `DrawScheme.for_networks` is set.
    """

    def __call__(
        self, params: PyTree, z: Points, *, r: Scalars, t: Scalars, condition: PyTree
    ) -> Points | Prediction: ...


@flax.struct.dataclass
class Rows:
    """A sub-batch of training rows: data x, noise e, times 0 <= r <= t <= 1.

    condition: the caller's tree of arrays `[B, ...]`. null: the same tree of what a dropped row is
    told; None = nothing is dropped. dropped: whether a row trains without its condition. mask:
    where x counts; elsewhere x, e and direction are 0. fraction: in [0, 1), places a time between r
    and t. v, tangent: estimates in the place of e - x, in targets and along du/dt; None = e - x.
    direction: standard normal, for derivatives along it. guidance, dropout, augment: see
    `Condition`. box: (top, left, height, width) of a crop. for_networks: whether the field gets a
    `Condition`.
    """

    x: Points
    e: Points
    t: Scalars
    r: Scalars
    dropped: Bool[Array, "b"]
    condition: PyTree = None
    null: PyTree = None
    mask: Bool[Array, "b ..."] | None = None
    guidance: GuidanceScale | None = None
    fraction: Scalars | None = None
    dropout: UInt32[Array, "b"] | None = None
    direction: Points | None = None
    v: Points | None = None
    tangent: Points | None = None
    augment: Float[Array, "b k"] | None = None
    box: Int[Array, "b 4"] | None = None
    for_networks: bool = flax.struct.field(pytree_node=False, default=False)


@flax.struct.dataclass
class Draws:
    """Everything random in one step: rows with r = t, and rows with r < t, the ones with du/dt.

    Guidance of the first holds for all t. Either may have zero rows, not both.
    """

    instant: Rows
    interval: Rows
