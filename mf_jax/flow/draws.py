"""Everything random in a training step, drawn once, from one key that is a pure function of (seed, step).

Rows with r = t and rows with r < t are sub-batches of static size, because only the second kind needs the
derivative du/dt. Which rows are which depends on the row's number alone: rows are dealt in groups, and the
last rows of each group have r < t (a share of 3/4 makes groups of four, whose fourth row has r < t). A group
never crosses from one device to the next, so splitting and joining are local reshapes on any number of devices.
"""

import dataclasses
import math
from collections.abc import Sequence
from fractions import Fraction

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray, Shaped

from mf_jax.errors import BadInput
from mf_jax.flow.records import NO_LABEL, Condition, Draws, GuidanceScale, Rows
from mf_jax.flow.times import Times

LABEL_DROP_ROWS = ("instant_rows", "any_row", "fixed_rows")
_LARGEST_GROUP = 64
_SHARE_TOLERANCE = 1e-3


def condition_of(rows: Rows) -> Condition:
    """Return what the network is told while it trains on these rows: dropped labels become `NO_LABEL`."""
    labels = jnp.where(rows.dropped, NO_LABEL, rows.labels)
    return Condition(labels=labels, guidance=rows.guidance, dropout=rows.dropout)


def split_rows(
    array: Shaped[Array, "b ..."], sizes: Sequence[int], *, groups: int
) -> list[Shaped[Array, "_ ..."]]:
    """Deal the rows of an array into parts, group by group.

    Args:
      array: `[groups * sum(sizes), ...]`.
      sizes: rows that each part takes from every group.
      groups: number of groups.

    Returns:
      One array `[groups * size, ...]` for each size.
    """
    grouped = array.reshape((groups, sum(sizes), *array.shape[1:]))
    ends = [sum(sizes[:i]) for i in range(1, len(sizes))]
    return [part.reshape((-1, *array.shape[1:])) for part in jnp.split(grouped, ends, axis=1)]


def join_rows(parts: Sequence[Shaped[Array, "_ ..."]], *, groups: int) -> Shaped[Array, "b ..."]:
    """Undo `split_rows`: interleave the parts group by group.

    Args:
      parts: arrays `[groups * size_i, ...]`.
      groups: number of groups.

    Returns:
      One array `[groups * sum(size_i), ...]`.
    """
    shape = parts[0].shape[1:]
    grouped = [part.reshape((groups, part.shape[0] // groups, *shape)) for part in parts]
    return jnp.concatenate(grouped, axis=1).reshape((-1, *shape))


def join_all(draws: Draws) -> Rows:
    """Return all rows of a step in their original order."""
    groups = num_groups(draws)
    return jax.tree.map(
        lambda *parts: join_rows(parts, groups=groups), draws.instant, draws.interval
    )


def num_groups(draws: Draws) -> int:
    """Return the number of groups that the rows of a step were dealt in."""
    return math.gcd(draws.instant.t.shape[0], draws.interval.t.shape[0])


def guidable_rows(draws: Draws) -> Rows:
    """Return the rows with r = t that may have a label: all but those of `drop_sizes` that never do."""
    if not draws.drop_sizes[1]:
        return draws.instant
    groups = draws.instant.t.shape[0] // sum(draws.drop_sizes)
    return jax.tree.map(
        lambda leaf: split_rows(leaf, draws.drop_sizes, groups=groups)[0], draws.instant
    )


def with_other_rows(values: Float[Array, "_ ..."], draws: Draws) -> Float[Array, "b1 ..."]:
    """Return values of `guidable_rows` as values of all rows with r = t, 0 for the others.

    Args:
      values: `[guidable rows, ...]`.
      draws: the step's draws.
    """
    unlabelled = draws.drop_sizes[1]
    if not unlabelled:
        return values
    groups = draws.instant.t.shape[0] // sum(draws.drop_sizes)
    zeros = jnp.zeros((groups * unlabelled, *values.shape[1:]), values.dtype)
    return join_rows([values, zeros], groups=groups)


def group_sizes(instant_share: float) -> tuple[int, int]:
    """Return how many rows of each group have r = t, and how many r < t.

    Args:
      instant_share: share of rows with r = t, in [0, 1]; a fraction whose denominator is at most 64.

    Returns:
      (rows with r = t, rows with r < t) of one group, without a common factor.

    Raises:
      BadInput: if the share lies outside [0, 1] or is not such a fraction to within 0.001.
    """
    if not 0 <= instant_share <= 1:
        raise BadInput(
            f"draws.instant_share={instant_share}: must be within [0, 1]; MeanFlow uses 0.75"
        )
    share = _fraction(instant_share, f"draws.instant_share={instant_share}")
    return share.numerator, share.denominator - share.numerator


def drop_sizes(instant_share: float, label_drop_share: float) -> tuple[int, int]:
    """Return how many of each group of rows with r = t may keep their label, and how many lose it for certain.

    Args:
      instant_share: share of rows with r = t, in (0, 1].
      label_drop_share: share of all rows that lose their label, at most instant_share; the quotient of both is a
        fraction whose denominator is at most 64.

    Returns:
      (labelled, unlabelled) rows of one group, without a common factor.

    Raises:
      BadInput: if the quotient is not such a fraction to within 0.001.
    """
    if not label_drop_share:
        return 1, 0
    named = f"draws.label_drop_share={label_drop_share} of draws.instant_share={instant_share}"
    share = _fraction(label_drop_share / instant_share, named, unit=instant_share)
    return share.denominator - share.numerator, share.numerator


def _fraction(value: float, named: str, *, unit: float = 1.0) -> Fraction:
    """Return a share as a fraction; the error suggests another, in units of which the user gave it."""
    share = Fraction(value).limit_denominator(_LARGEST_GROUP)
    if abs(share - Fraction(value)) > _SHARE_TOLERANCE:
        fix = share * Fraction(unit).limit_denominator(_LARGEST_GROUP)
        raise BadInput(
            f"{named}: rows are split in groups of at most {_LARGEST_GROUP}; "
            f"use {fix} = {float(fix):.6g} or another such fraction"
        )
    return share


@dataclasses.dataclass(frozen=True)
class DrawScheme:
    """How a step's random numbers are drawn.

    Args:
      times: the distribution of (r, t).
      instant_share: share of rows with r = t, in [0, 1].
      label_drop_share: share of all rows trained without their label, in [0, 1).
      label_drop: which rows lose it: `instant_rows` (any with r = t, as published), `any_row`, or `fixed_rows`: of the
        rows with r = t every so many-th, for which guidance then costs nothing.
      omega_max: the network is told a guidance scale in [1, omega_max], drawn with density omega^-omega_power, and an
        interval [t_min, t_max], t_min uniform in [0, 1/2], t_max in [1/2, 1]; 1 = it is told none.
      omega_power: of that density; at least 0.

    Raises:
      BadInput: for shares out of range, an unknown `label_drop`, more dropped rows than there are rows
        that may lose their label, or a guidance scale below 1.

    Source: of the drawn guidance, improved MeanFlow, arXiv 2512.02012, section 4.2.
    """

    times: Times
    instant_share: float = 0.75
    label_drop_share: float = 0.1
    label_drop: str = "instant_rows"
    omega_max: float = 1.0
    omega_power: float = 1.0

    def __post_init__(self) -> None:
        group_sizes(self.instant_share)
        if self.label_drop not in LABEL_DROP_ROWS:
            raise BadInput(
                f"draws.label_drop={self.label_drop!r}: must be one of {', '.join(LABEL_DROP_ROWS)}"
            )
        if not 0 <= self.label_drop_share < 1:
            raise BadInput(f"draws.label_drop_share={self.label_drop_share}: must be within [0, 1)")
        if self.label_drop != "any_row" and self.label_drop_share > self.instant_share:
            raise BadInput(
                f"draws.label_drop_share={self.label_drop_share}: only the {self.instant_share:g} of rows with r = t "
                "may lose their label; lower it or set draws.label_drop=any_row"
            )
        self._drop_sizes()
        if not 1 <= self.omega_max < math.inf:
            raise BadInput(
                f"draws.omega_max={self.omega_max}: must be at least 1, which tells the network none"
            )
        if not 0 <= self.omega_power < math.inf:
            raise BadInput(
                f"draws.omega_power={self.omega_power}: must be at least 0; improved MeanFlow uses 1.0"
            )

    def draw(self, key: PRNGKeyArray, x: Float[Array, "b ..."], labels: Int[Array, "b"]) -> Draws:
        """Draw one step.

        Args:
          key: the step's key.
          x: data rows `[B, ...]`; B divisible by the size of a group of `group_sizes`.
          labels: `[B]`, classes or `NO_LABEL`.

        Returns:
          The step's `Draws`, a function of the key and the rows alone.
        """
        noise_key, times_key, drop_key, guidance_key, *more_keys = jax.random.split(key, 7)
        sizes = group_sizes(self.instant_share)
        groups = x.shape[0] // sum(sizes)
        r, t = self.times.sample(times_key, x.shape[0])
        everything = Rows(
            x=x,
            e=jax.random.normal(noise_key, x.shape, x.dtype),
            t=t,
            r=r,
            labels=labels,
            dropped=jax.random.uniform(drop_key, labels.shape) < self._drop_probability,
            guidance=self._guidance(guidance_key, x.shape[0]),
            fraction=jax.random.uniform(more_keys[0], labels.shape),
            dropout=jax.random.bits(more_keys[1], labels.shape, jnp.uint32),
            direction=jax.random.normal(more_keys[2], x.shape, x.dtype),
        )
        leaves, record = jax.tree.flatten(everything)
        parts = zip(*(split_rows(leaf, sizes, groups=groups) for leaf in leaves), strict=True)
        instant, interval = (jax.tree.unflatten(record, part) for part in parts)
        if self.label_drop != "any_row":
            interval = interval.replace(dropped=jnp.zeros_like(interval.dropped))
        if self.label_drop == "fixed_rows":
            labelled, unlabelled = self._drop_sizes()
            group = [False] * labelled + [True] * unlabelled
            dropped = jnp.tile(jnp.asarray(group), instant.t.shape[0] // len(group))
            instant = instant.replace(dropped=dropped)
        return Draws(instant.replace(r=instant.t), interval, self._drop_sizes())

    def _drop_sizes(self) -> tuple[int, int]:
        fixed = self.label_drop == "fixed_rows"
        return drop_sizes(self.instant_share, self.label_drop_share) if fixed else (1, 0)

    @property
    def group(self) -> int:
        """Rows of a device's share must be a multiple of this many."""
        instant, interval = group_sizes(self.instant_share)
        dealt = sum(self._drop_sizes())
        return (instant + interval) * (dealt // math.gcd(dealt, instant))

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

    @property
    def _drop_probability(self) -> float:
        if self.label_drop_share == 0 or self.label_drop == "any_row":
            return self.label_drop_share
        return self.label_drop_share / self.instant_share
