"""Squared errors of rows against targets without gradient, and their adaptive weight."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from mf_jax.errors import BadInput


def squared_error(
    prediction: Float[Array, "b ..."], target: Float[Array, "b ..."]
) -> Float[Array, "b"]:
    """Return each row's |prediction - stop_gradient(target)|^2, summed over its axes.

    Args:
      prediction, target: `[B, ...]`.

    Returns:
      `[B]`, not negative.
    """
    error = prediction - jax.lax.stop_gradient(target)
    return jnp.sum(error**2, axis=tuple(range(1, error.ndim)))


@dataclasses.dataclass(frozen=True)
class AdaptiveWeight:
    """Weight a row's squared error l by stop_gradient((l + c)^-p).

    Args:
      p: power, at least 0; 0 weights all rows alike, 1 makes the loss nearly scale-free.
      c: added to l before the power, above 0.

    Raises:
      BadInput: for values out of range.

    Source: MeanFlow, arXiv 2505.13447, equation 22.
    """

    p: float = 1.0
    c: float = 0.01

    def __post_init__(self) -> None:
        if not 0 <= self.p < float("inf"):
            raise BadInput(f"weight.p={self.p}: must be at least 0; MeanFlow uses 1.0")
        if not 0 < self.c < float("inf"):
            raise BadInput(f"weight.c={self.c}: must be above 0; MeanFlow uses 0.01")

    def __call__(self, error: Float[Array, "_"]) -> Float[Array, "_"]:
        """Return the weighted squared error of each row, `[rows]`."""
        return error * jax.lax.stop_gradient((error + self.c) ** -self.p)

    def mean(self, *errors: Float[Array, "_"]) -> Float[Array, ""]:
        """Return the mean of the weighted errors over the rows of all sub-batches together.

        Args:
          errors: squared errors of sub-batches, each `[rows]`; some may have no rows, not all.

        Returns:
          The scalar loss.
        """
        return row_mean(*(self(error) for error in errors))


def row_mean(*values: Float[Array, "_"]) -> Float[Array, ""]:
    """Return the mean of values over the rows of all sub-batches together; some may have no rows, not all."""
    return sum(jnp.sum(value) for value in values) / sum(value.shape[0] for value in values)


def check_target_ema(decay: float) -> None:
    """Raise BadInput unless a decay of the target's moving average is within [0, 1)."""
    if not 0 <= decay < 1:
        raise BadInput(
            f"objective.target_ema={decay}: must be within [0, 1); 0 = the parameters themselves"
        )
