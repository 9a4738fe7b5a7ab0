"""Distributions of the time pair (r, t), 0 <= r <= t <= 1.

The larger of two drawn times is t, on rows with r = t too, as in MeanFlow's ImageNet recipe.

Source: MeanFlow, arXiv 2505.13447, section 4.3 and table 1d.
"""

import dataclasses
from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import PRNGKeyArray

from mf_jax.flow.errors import BadInput, check_fields
from mf_jax.flow.paths import Scalars

ORDERS = ("swap", "clip")
TimePair = tuple[Scalars, Scalars]
_ALLOWED = {
    **dict.fromkeys(("t_mean", "r_mean"), "(-inf, inf)"),
    **dict.fromkeys(("t_std", "r_std"), "(0, inf)"),
    "order": ORDERS,
    "min_gap": "[0, 1)",
    "uniform_share": "[0, 1]",
    "levels": "[1, 20]",
}


@runtime_checkable
class Times(Protocol):
    """A distribution of the time pair."""

    def sample(self, key: PRNGKeyArray, num_rows: int) -> TimePair:
        """Return r and t of each row, r <= t."""


class _Checked:
    def __post_init__(self) -> None:
        own = {name: allowed for name, allowed in _ALLOWED.items() if hasattr(self, name)}
        check_fields("", self, **own)


@dataclasses.dataclass(frozen=True)
class UniformTimes(_Checked):
    """Draw both times uniformly from [0, 1); order: see `LogitNormalTimes`."""

    order: str = "swap"

    def sample(self, key: PRNGKeyArray, num_rows: int) -> TimePair:
        """See `Times.sample`."""
        r, t = jax.random.uniform(key, (2, num_rows))
        return jnp.minimum(r, t), jnp.maximum(r, t) if self.order == "swap" else t


@dataclasses.dataclass(frozen=True)
class LogitNormalTimes(_Checked):
    """Draw each time as sigmoid(mean + std * n), n standard normal; equal ones are MeanFlow's."""

    t_mean: float = -0.4
    t_std: float = 1.0
    r_mean: float = -0.4
    r_std: float = 1.0
    order: str = "swap"  # where r > t, r and t change places; `clip` lowers r to t
    min_gap: float = 0.0  # `clip` keeps r at most t - min_gap, and at least 0
    uniform_share: float = 0.0  # of the rows, whose times are uniform instead

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.min_gap and self.order == "swap":
            raise BadInput(f"min_gap={self.min_gap}: must be 0 with order=swap; use order=clip")

    def sample(self, key: PRNGKeyArray, num_rows: int) -> TimePair:
        """See `Times.sample`."""
        normal = jax.random.normal(key, (2, num_rows))
        t = jax.nn.sigmoid(self.t_mean + self.t_std * normal[0])
        r = jax.nn.sigmoid(self.r_mean + self.r_std * normal[1])
        if self.uniform_share:
            which, *uniform = jax.random.uniform(jax.random.fold_in(key, 2), (3, num_rows))
            r, t = jnp.where(which < self.uniform_share, jnp.stack(uniform), jnp.stack([r, t]))
        if self.order == "swap":
            return jnp.minimum(r, t), jnp.maximum(r, t)
        return jnp.clip(r, 0, jnp.maximum(t - self.min_gap, 0)), t


@dataclasses.dataclass(frozen=True)
class ConsistencyTimes(_Checked):
    """Draw t as `LogitNormalTimes` does, and end every interval at r = 0: consistency training.

    Source: consistency models, arXiv 2303.01469; MeanFlow, arXiv 2505.13447, section 4.1.
    """

    t_mean: float = -0.4
    t_std: float = 1.0

    def sample(self, key: PRNGKeyArray, num_rows: int) -> TimePair:
        """See `Times.sample`."""
        t = jax.nn.sigmoid(self.t_mean + self.t_std * jax.random.normal(key, (num_rows,)))
        return jnp.zeros_like(t), t


@dataclasses.dataclass(frozen=True)
class DyadicTimes(_Checked):
    """Draw intervals [i / 2^k, (i + 1) / 2^k], equally many of each k < levels, i uniform.

    The first rows have the shortest intervals; rows over a multiple of levels have k = 0.

    Source: the published code of Shortcut models, arXiv 2410.12557 (levels 7: 128 steps).
    """

    levels: int = 7

    def sample(self, key: PRNGKeyArray, num_rows: int) -> TimePair:
        """See `Times.sample`."""
        level_key, place_key = jax.random.split(key)
        number, each = jnp.arange(num_rows), num_rows // self.levels
        if each:
            level = jnp.maximum(self.levels - 1 - number // each, 0)
        else:  # a few of the levels, others at each step
            level = jax.random.permutation(level_key, self.levels)[:num_rows]
        steps = 2.0**level
        place = jnp.floor(steps * jax.random.uniform(place_key, (num_rows,)))
        return place / steps, (place + 1) / steps


@dataclasses.dataclass(frozen=True)
class GridTimes(_Checked):
    """Draw intervals [i / 2^levels, (i + 1) / 2^levels], i uniform; t is never 0."""

    levels: int = 7

    def sample(self, key: PRNGKeyArray, num_rows: int) -> TimePair:
        """See `Times.sample`."""
        place = jax.random.randint(key, (num_rows,), 0, 2**self.levels)
        return place / 2**self.levels, (place + 1) / 2**self.levels


@dataclasses.dataclass(frozen=True)
class GapTimes(_Checked):
    """Draw t - r as `LogitNormalTimes` draws t, then r likewise, among those that leave t below 1.

    Source: the published code of terminal velocity matching, arXiv 2511.19797.
    """

    t_mean: float = -0.8
    t_std: float = 1.0
    r_mean: float = -0.4
    r_std: float = 1.0

    def sample(self, key: PRNGKeyArray, num_rows: int) -> TimePair:
        """See `Times.sample`."""
        gap_key, r_key = jax.random.split(key)
        gap = self.t_mean + self.t_std * jax.random.normal(gap_key, (num_rows,))
        most = (-gap - self.r_mean) / self.r_std  # logit of 1 - (t - r)
        normal = jax.random.truncated_normal(r_key, -jnp.inf, most)
        r = jax.nn.sigmoid(self.r_mean + self.r_std * normal)
        return r, jnp.minimum(r + jax.nn.sigmoid(gap), 1)


TIMES = {
    "uniform": UniformTimes,
    "logit_normal": LogitNormalTimes,
    "consistency": ConsistencyTimes,
    "dyadic": DyadicTimes,
    "grid": GridTimes,
    "gap": GapTimes,
}
