"""One small file per method behind one interface: `loss(field, params, draws, step) -> (loss, metrics)`.

An objective is a frozen record, deterministic given the draws: it sees no module, no key and no mesh.
`learns_average` says whether its network knows u(z, r, t) for r < t, or the velocity u(z, t, t) alone. `target_ema` is
the decay of the moving average of the parameters that its targets use, handed over as `target_params`; 0 = none.
"""

from typing import ClassVar, Protocol, runtime_checkable

from jaxtyping import Array, Float, Int, PyTree

from mf_jax.objectives.alpha_flow import AlphaFlow
from mf_jax.objectives.errors import Metrics
from mf_jax.objectives.flow_matching import FlowMatching
from mf_jax.objectives.improved_meanflow import ImprovedMeanFlow
from mf_jax.objectives.meanflow import MeanFlow
from mf_jax.objectives.pixel_meanflow import PixelMeanFlow
from mf_jax.objectives.split_meanflow import SplitMeanFlow
from mf_jax.objectives.terminal_velocity import TerminalVelocity
from mf_jax.types import Draws, Field


@runtime_checkable
class Objective(Protocol):
    """What training needs of a method."""

    learns_average: ClassVar[bool]

    @property
    def target_ema(self) -> float:
        """Decay of the moving average that the targets use, in [0, 1); 0 = the parameters themselves."""
        ...

    def loss(
        self,
        field: Field,
        params: PyTree,
        draws: Draws,
        step: Int[Array, ""],
        target_params: PyTree | None = None,
    ) -> tuple[Float[Array, ""], Metrics]:
        """Return the scalar loss and the metrics of one step."""
        ...


OBJECTIVES = {
    "flow_matching": FlowMatching,
    "meanflow": MeanFlow,
    "improved_meanflow": ImprovedMeanFlow,
    "pixel_meanflow": PixelMeanFlow,
    "alpha_flow": AlphaFlow,
    "split_meanflow": SplitMeanFlow,
    "terminal_velocity": TerminalVelocity,
}
