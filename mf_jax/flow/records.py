"""Records shared by every part: a data element, training rows, a network's inputs and outputs."""

import dataclasses
import numbers
from collections.abc import Iterable
from typing import NamedTuple, Protocol, runtime_checkable

import flax.struct
from jaxtyping import Array, Bool, Float, Int, PyTree, UInt32

from mf_jax.flow.errors import BadInput, check_fields, listed, nearest
from mf_jax.flow.paths import Points, Scalars

Step = Int[Array, ""] | int
NO_LABEL = -1
"""The label of a row without a class; a network maps it to its null embedding."""


@dataclasses.dataclass(frozen=True)
class DataSpec:
    """One element of the data."""

    shape: tuple[int, ...]  # `(H, W, C)` of a picture, `(D,)` of a vector
    num_classes: int = 0  # 0 without labels
    class_names: tuple[str, ...] = ()  # in the order of the labels
    origin: str = ""  # SHA-256 of the autoencoder behind latents, "" if unknown
    condition_size: int = 0  # numbers of a row's condition, 0 without one
    has_pairs: bool = False  # rows bring their own e
    has_mask: bool = False

    def __post_init__(self) -> None:
        if not self.shape or min(self.shape) < 1:
            raise BadInput(f"shape={self.shape}: must be whole numbers above 0, e.g. (8, 8, 1)")
        check_fields("", self, num_classes="[0, inf)")

    @property
    def is_picture(self) -> bool:
        """Whether an element is a picture, or the latent of one."""
        return len(self.shape) == 3

    @property
    def more(self) -> dict[str, tuple[tuple[int, ...], str]]:
        """The shape and type of what a row brings besides x and its label, by `Batch`'s names."""
        every = (
            (self.condition_size, "condition", (self.condition_size,), "float32"),
            (self.has_pairs, "e", self.shape, "float32"),
            (self.has_mask, "mask", self.shape, "bool"),
        )
        return {name: (shape, dtype) for has, name, shape, dtype in every if has}

    def label_of(self, label: int | str) -> int:
        """Return the number of a class, which may be given by its name."""
        if isinstance(label, numbers.Real) and int(label) == label:
            return int(label)
        if label in self.class_names:
            return self.class_names.index(label)
        known = f"{listed([*self.class_names]) or 'none'}{nearest(str(label), self.class_names)}"
        raise BadInput(f"labels: {label!r} is no number or name of a class; the names are {known}")

    def check_asked(self, labels: Iterable[int | str]) -> None:
        """Raise BadInput at a number that looks like the name of another class."""
        by_name = {name: i for i, name in enumerate(self.class_names[: self.num_classes])}
        for label in labels:
            if not isinstance(label, str) and by_name.get(str(label), label) != label:
                raise BadInput(f"labels: {label} is a name, not that class's number; use '{label}'")

    def check_labels(self, labels: Iterable[int | str], *, has_null: bool) -> None:
        """Raise BadInput unless all labels are classes, or `NO_LABEL` if the network has it."""
        null = "and -1, none, of runs with draws.label_drop=any_row"
        known = f"use 0 to {self.num_classes - 1}, {null}"
        known = known if self.num_classes else "this model has no classes; leave labels out"
        for label in map(self.label_of, labels):
            is_null = label == NO_LABEL and (has_null or not self.num_classes)
            if not (is_null or 0 <= label < self.num_classes):
                raise BadInput(f"labels: {label} is not a class; {known}")


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
    """What this project's networks are told besides z, r and t."""

    labels: PyTree  # classes or `NO_LABEL`, a `Told`, or a caller's own tree
    guidance: GuidanceScale | None = None  # for networks that learn a range of scales
    dropout: UInt32[Array, "b"] | None = None  # a seed for each row's masks; None = no dropout
    augment: Float[Array, "b k"] | None = None  # tells how x was changed; None = not at all
    # whether `jax.jvp` follows, without a gradient of the derivative; fused attention must know
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
    """A sub-batch of training rows: data x, noise e, times 0 <= r <= t <= 1."""

    x: Points
    e: Points
    t: Scalars
    r: Scalars
    dropped: Bool[Array, "b"]  # whether a row trains without its condition
    condition: PyTree = None  # the caller's tree of arrays `[B, ...]`
    null: PyTree = None  # the same tree of what a dropped row is told; None = nothing is dropped
    mask: Bool[Array, "b ..."] | None = None  # where x counts; elsewhere x, e and direction are 0
    guidance: GuidanceScale | None = None  # see `Condition`
    fraction: Scalars | None = None  # in [0, 1), places a time between r and t
    dropout: UInt32[Array, "b"] | None = None
    direction: Points | None = None  # standard normal, for derivatives along it
    v: Points | None = None  # estimate in the place of e - x in targets; None = e - x
    tangent: Points | None = None  # the same along du/dt
    augment: Float[Array, "b k"] | None = None
    box: Int[Array, "b 4"] | None = None  # (top, left, height, width) of a crop
    for_networks: bool = flax.struct.field(pytree_node=False, default=False)  # tell a `Condition`
    forward_mode: bool = flax.struct.field(pytree_node=False, default=False)


@flax.struct.dataclass
class Draws:
    """Everything random in one step: rows with r = t, and rows with r < t, the ones with du/dt.

    Guidance of the first holds for all t. Either may have zero rows, not both.
    """

    instant: Rows
    interval: Rows
