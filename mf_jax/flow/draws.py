"""Everything random in a training step, drawn once, from one key.

Rows with r = t and rows with r < t are sub-batches of static size: only the second need du/dt. Rows
are dealt in groups, and the last rows of each group have r < t. A share of 3/4 makes groups of
four. A group never crosses devices, so splitting and joining are local reshapes.
"""

import dataclasses
import itertools
import math
from collections.abc import Sequence
from fractions import Fraction

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray, PyTree

from mf_jax.errors import BadInput, check_known
from mf_jax.flow.records import NO_LABEL, Condition, Draws, GuidanceScale, Rows
from mf_jax.flow.times import Times

LABEL_DROP_ROWS = ("instant_rows", "any_row")
_LARGEST_GROUP = 64
_SHARE_TOLERANCE = 1e-3


def condition_of(rows: Rows) -> Condition:
    """Return the inputs of the network for these rows: dropped labels become `NO_LABEL`."""
    labels = jnp.where(rows.dropped, NO_LABEL, rows.labels)
    return Condition(labels=labels, guidance=rows.guidance, dropout=rows.dropout)


def at_time(rows: Rows, t: Float[Array, "b"]) -> Rows:
    """Return rows with r = t at the given times, whose guidance holds for all t."""
    guidance = rows.guidance
    if guidance is not None:
        guidance = guidance.replace(t_min=jnp.zeros_like(t), t_max=jnp.ones_like(t))
    return rows.replace(r=t, t=t, guidance=guidance)


def split_rows(rows: PyTree, sizes: Sequence[int]) -> list[PyTree]:
    """Deal the rows of a tree into parts of these sizes, group by group."""
    groups = math.gcd(*sizes)
    ends = list(itertools.accumulate(size // groups for size in sizes))[:-1]

    def split(leaf: Array) -> list[Array]:
        grouped = leaf.reshape(groups, -1, *leaf.shape[1:])
        return [part.reshape(-1, *leaf.shape[1:]) for part in jnp.split(grouped, ends, axis=1)]

    leaves, tree = jax.tree.flatten(rows)
    return [tree.unflatten(part) for part in zip(*map(split, leaves), strict=True)]


def join_rows(parts: Sequence[PyTree]) -> PyTree:
    """Undo `split_rows`: interleave the rows of alike trees group by group."""
    groups = math.gcd(*(jax.tree.leaves(part)[0].shape[0] for part in parts))

    def join(*leaves: Array) -> Array:
        shape = leaves[0].shape[1:]
        grouped = [leaf.reshape(groups, leaf.shape[0] // groups, *shape) for leaf in leaves]
        return jnp.concatenate(grouped, axis=1).reshape(-1, *shape)

    return jax.tree.map(join, *parts)


def group_sizes(instant_share: float) -> tuple[int, int]:
    """Return the rows of a group with r = t, and with r < t, without a common factor."""
    named = f"draws.instant_share={instant_share}"
    if not 0 <= instant_share <= 1:
        raise BadInput(f"{named}: must be within [0, 1]; MeanFlow uses 0.75")
    share = Fraction(instant_share).limit_denominator(_LARGEST_GROUP)
    if abs(share - Fraction(instant_share)) > _SHARE_TOLERANCE:
        raise BadInput(
            f"{named}: rows are split in groups of at most {_LARGEST_GROUP}; "
            f"use {share} = {float(share):.6g} or another such fraction"
        )
    return share.numerator, share.denominator - share.numerator


@dataclasses.dataclass(frozen=True)
class DrawScheme:
    """How a step's random numbers are drawn.

    Args:
      instant_share: share of rows with r = t, a fraction whose denominator is at most 64.
      label_drop_share: share of all rows trained without their label, in [0, 1).
      label_drop: which rows lose it: `instant_rows` (r = t, as published) or `any_row`.
      omega_max: largest scale of guidance as an input of the network; 1 = no such input.
      omega_power: the scale has density omega^-omega_power on [1, omega_max]; at least 0.

    Source of the drawn guidance: improved MeanFlow, arXiv 2512.02012, section 4.2.
    """

    times: Times
    instant_share: float = 0.75
    label_drop_share: float = 0.1
    label_drop: str = "instant_rows"
    omega_max: float = 1.0
    omega_power: float = 1.0

    def __post_init__(self) -> None:
        group_sizes(self.instant_share)
        check_known("draws.label_drop", self.label_drop, LABEL_DROP_ROWS)
        if not 0 <= self.label_drop_share < 1:
            raise BadInput(f"draws.label_drop_share={self.label_drop_share}: must be within [0, 1)")
        if self.label_drop != "any_row" and self.label_drop_share > self.instant_share:
            raise BadInput(
                f"draws.label_drop_share={self.label_drop_share}: only the {self.instant_share:g} "
                "of rows with r = t may lose their label; lower it or set draws.label_drop=any_row"
            )
        if not 1 <= self.omega_max < math.inf:
            raise BadInput(f"draws.omega_max={self.omega_max}: must be at least 1; 1 = no guidance")
        if not 0 <= self.omega_power < math.inf:
            raise BadInput(f"draws.omega_power={self.omega_power}: must be at least 0; try 1.0")

    @property
    def group(self) -> int:
        """The number of rows whose multiple each device must have."""
        return sum(group_sizes(self.instant_share))

    def draw(self, key: PRNGKeyArray, x: Float[Array, "b ..."], labels: Int[Array, "b"]) -> Draws:
        """Draw one step for a multiple of `group` rows; labels are classes or `NO_LABEL`."""
        if x.shape[0] == 0 or x.shape[0] % self.group:
            raise BadInput(f"a batch of {x.shape[0]} rows: must be a multiple of {self.group}")
        noise_key, times_key, drop_key, guidance_key, *more_keys = jax.random.split(key, 7)
        r, t = self.times.sample(times_key, x.shape[0])
        drop = self.label_drop_share
        if drop and self.label_drop != "any_row":
            drop /= self.instant_share
        rows = Rows(
            x=x,
            e=jax.random.normal(noise_key, x.shape, x.dtype),
            t=t,
            r=r,
            labels=labels,
            dropped=jax.random.uniform(drop_key, labels.shape) < drop,
            guidance=self._guidance(guidance_key, x.shape[0]),
            fraction=jax.random.uniform(more_keys[0], labels.shape),
            dropout=jax.random.bits(more_keys[1], labels.shape, jnp.uint32),
            direction=jax.random.normal(more_keys[2], x.shape, x.dtype),
        )
        sizes = [size * (x.shape[0] // self.group) for size in group_sizes(self.instant_share)]
        instant, interval = split_rows(rows, sizes)
        if self.label_drop != "any_row":
            interval = interval.replace(dropped=jnp.zeros_like(interval.dropped))
        return Draws(at_time(instant, instant.t), interval)

    def _guidance(self, key: PRNGKeyArray, num_rows: int) -> GuidanceScale | None:
        if self.omega_max == 1:
            return None
        omega, low, high = jax.random.uniform(key, (3, num_rows))
        # inverse of the distribution function of the density omega^-power on [1, omega_max]
        if self.omega_power == 1:
            omega = self.omega_max**omega
        else:
            power = 1 - self.omega_power
            omega = (1 + omega * (self.omega_max**power - 1)) ** (1 / power)
        return GuidanceScale(omega=omega, t_min=low / 2, t_max=(1 + high) / 2)
