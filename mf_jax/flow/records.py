"""Records shared by every part: what one training row holds, and what a network is told and predicts."""

import dataclasses
from collections.abc import Iterable
from typing import NamedTuple, Protocol, runtime_checkable

import flax.struct
from jaxtyping import Array, Bool, Float, Int, PyTree, UInt32

from mf_jax.errors import BadInput

NO_LABEL = -1
"""The label of a row without a class; a network maps it to its null embedding."""


@dataclasses.dataclass(frozen=True)
class DataSpec:
    """What one element of the data is.

    shape: `(H, W, C)` of a picture, `(D,)` of a vector. num_classes: 0 without labels. class_names: in the order of
    the labels, where they have names. origin: SHA-256 of the autoencoder behind latents, "" where it is not known.
    """

    shape: tuple[int, ...]
    num_classes: int = 0
    class_names: tuple[str, ...] = ()
    origin: str = ""

    def __post_init__(self) -> None:
        if not self.shape or min(self.shape) < 1:
            raise BadInput(
                f"shape={self.shape}: must be whole numbers of at least 1, e.g. (8, 8, 1)"
            )
        if self.num_classes < 0:
            raise BadInput(f"num_classes={self.num_classes}: must be at least 0; 0 is no classes")

    @property
    def is_picture(self) -> bool:
        """Whether an element is a picture, or the latent of one."""
        return len(self.shape) == 3

    def check_labels(self, labels: Iterable[int], *, has_null: bool) -> None:
        """Raise BadInput unless all labels are classes, or `NO_LABEL`.

        Args:
          labels: wanted.
          has_null: whether `NO_LABEL` means something to the network.
        """
        lowest = NO_LABEL if has_null or not self.num_classes else 0
        wrong = [label for label in labels if not lowest <= label < self.num_classes]
        if wrong and not self.num_classes:
            raise BadInput(f"labels={wrong[0]}: this model has no classes; leave labels out")
        if wrong:
            null = "-1 for none" if has_null else "-1 means nothing: draws.label_drop_share was 0"
            raise BadInput(
                f"labels: {wrong[0]} is not a class; they go from 0 to {self.num_classes - 1}, {null}"
            )


@flax.struct.dataclass
class GuidanceScale:
    """The guidance that a network is told, for networks whose guidance is chosen at sampling time.

    omega: scale `[B]`, at least 1; 1 is no guidance. t_min, t_max: guidance holds for t in [t_min, t_max], `[B]`,
    0 <= t_min <= t_max <= 1.

    Source: improved MeanFlow, arXiv 2512.02012, section 4.2.
    """

    omega: Float[Array, "b"]
    t_min: Float[Array, "b"]
    t_max: Float[Array, "b"]


@flax.struct.dataclass
class Condition:
    """What a network is told besides z, r and t.

    labels: int `[B]`, a class in [0, num_classes) or `NO_LABEL`.
    guidance: the guidance to apply; None is no guidance. Only networks that learn a range of scales look at it.
    dropout: `[B]`, a seed for each row's dropout masks; None is no dropout. Only networks with dropout look at it.
    forward_mode: that the prediction will be differentiated forward (`jax.jvp`), and no gradient taken of that
    derivative. Not told to the network, but to its attention: a fused one cannot be differentiated forward otherwise.
    """

    labels: Int[Array, "b"]
    guidance: GuidanceScale | None = None
    dropout: UInt32[Array, "b"] | None = None
    forward_mode: bool = flax.struct.field(pytree_node=False, default=False)


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
    guidance: the guidance that the network is told; None where it is told none.
    fraction: `[B]` in [0, 1), chooses a time between r and t for objectives that need one.
    dropout: `[B]`, a seed for each row's dropout masks. direction: standard normal like x, for random-direction
    derivatives. The last three may be None where nothing needs them.
    """

    x: Float[Array, "b ..."]
    e: Float[Array, "b ..."]
    t: Float[Array, "b"]
    r: Float[Array, "b"]
    labels: Int[Array, "b"]
    dropped: Bool[Array, "b"]
    guidance: GuidanceScale | None = None
    fraction: Float[Array, "b"] | None = None
    dropout: UInt32[Array, "b"] | None = None
    direction: Float[Array, "b ..."] | None = None


@flax.struct.dataclass
class Draws:
    """Everything random in one training step, split by what the step does with a row.

    instant: the rows with r = t. interval: the rows with r < t, the only ones that need du/dt.
    Either may have zero rows, not both.
    drop_sizes: of each group of rows with r = t, how many come first that may keep their label, and how many then that
    never do: a static number, known before any draw.
    """

    instant: Rows
    interval: Rows
    drop_sizes: tuple[int, int] = flax.struct.field(pytree_node=False, default=(1, 0))
