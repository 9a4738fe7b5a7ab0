"""Distributions of the time pair (r, t), 0 <= r <= t <= 1.

Both times are drawn, and the larger one is called t. Rows that are to have r = t take this t too, as the
published recipes do, so their times lean towards noise.

Source: MeanFlow, arXiv 2505.13447, section 4.3 and table 1d.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from mf_jax.types import BadInput

TimePair = tuple[Float[Array, "b"], Float[Array, "b"]]


def _ordered(a: Float[Array, "b"], b: Float[Array, "b"]) -> TimePair:
    return jnp.minimum(a, b), jnp.maximum(a, b)


@dataclasses.dataclass(frozen=True)
class UniformTimes:
    """Draw both times uniformly from [0, 1)."""

    def sample(self, key: PRNGKeyArray, num_rows: int) -> TimePair:
        """Return r and t, each `[num_rows]`, r <= t."""
        return _ordered(*jax.random.uniform(key, (2, num_rows)))


@dataclasses.dataclass(frozen=True)
class LogitNormalTimes:
    """Draw each time as sigmoid(mean + std * n), n standard normal.

    Args:
      t_mean, t_std: of the draw that is usually t; std > 0.
      r_mean, r_std: of the draw that is usually r. The two change places where they come out in the wrong
        order. Equal parameters give the published MeanFlow scheme.
    """

    t_mean: float = -0.4
    t_std: float = 1.0
    r_mean: float = -0.4
    r_std: float = 1.0

    def __post_init__(self) -> None:
        for name in ("t_mean", "t_std", "r_mean", "r_std"):
            value = getattr(self, name)
            if not math.isfinite(value) or (name.endswith("std") and value <= 0):
                raise BadInput(f"times.{name}={value}: must be finite, a standard deviation above 0; try 1.0")

    def sample(self, key: PRNGKeyArray, num_rows: int) -> TimePair:
        """Return r and t, each `[num_rows]`, r <= t."""
        normal = jax.random.normal(key, (2, num_rows))
        t = jax.nn.sigmoid(self.t_mean + self.t_std * normal[0])
        r = jax.nn.sigmoid(self.r_mean + self.r_std * normal[1])
        return _ordered(r, t)


TIMES = {"uniform": UniformTimes, "logit_normal": LogitNormalTimes}
