"""Records shared by every part: what one training row holds, and what a network is told and predicts."""

from typing import NamedTuple, Protocol, runtime_checkable

import flax.struct
from jaxtyping import Array, Bool, Float, Int, PyTree, UInt32

NO_LABEL = -1
"""The label of a row without a class; a network maps it to its null embedding."""


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
