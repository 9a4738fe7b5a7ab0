"""The one interface of objectives."""

from typing import Protocol, runtime_checkable

from jaxtyping import Array, Float, Int, PyTree

from mf_jax.flow.records import Draws, Field
from mf_jax.objectives.errors import Metrics


@runtime_checkable
class Objective(Protocol):
    """What training needs of a method."""

    @property
    def learns_average(self) -> bool:
        """Whether the network knows u(z, r, t) for r < t, or the velocity u(z, t, t) alone."""
        ...

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
        """Return the scalar loss and the metrics of one step.

        The loss must be a mean over rows, and a metric a sum and a count over rows: each device computes those of its
        own rows, as many as every other, and the gradients are averaged, the sums added.
        """
        ...
