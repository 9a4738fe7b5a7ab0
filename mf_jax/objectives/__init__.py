"""One small file per method behind one interface: `loss(field, params, draws, step) -> (loss, metrics)`.

An objective is a frozen record, deterministic given the draws: it sees no module, no key and no mesh.
`learns_average` says whether its network knows u(z, r, t) for r < t, or the velocity u(z, t, t) alone.
"""

from typing import ClassVar, Protocol, runtime_checkable

from jaxtyping import Array, Float, Int, PyTree

from mf_jax.objectives.errors import Metrics
from mf_jax.objectives.flow_matching import FlowMatching
from mf_jax.objectives.meanflow import MeanFlow
from mf_jax.types import Draws, Field


@runtime_checkable
class Objective(Protocol):
    """What training needs of a method."""

    learns_average: ClassVar[bool]

    def loss(
        self, field: Field, params: PyTree, draws: Draws, step: Int[Array, ""]
    ) -> tuple[Float[Array, ""], Metrics]:
        """Return the scalar loss and the metrics of one step."""
        ...


OBJECTIVES = {"flow_matching": FlowMatching, "meanflow": MeanFlow}
