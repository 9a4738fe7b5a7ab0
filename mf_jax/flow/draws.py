"""Everything random in a training step, drawn once, from one key.

Rows with r = t and rows with r < t are sub-batches of static size: only the second need du/dt. Rows
are dealt in groups, and the last rows of each group have r < t. A share of 3/4 makes groups of
four. A group never crosses devices, so splitting and joining are local reshapes.
"""

import dataclasses
from fractions import Fraction
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, PRNGKeyArray, PyTree, Shaped

from mf_jax.flow.couplings import Coupling
from mf_jax.flow.errors import BadInput, check_fields, check_within, refused
from mf_jax.flow.records import NO_LABEL, Draws, GuidanceScale, Rows
from mf_jax.flow.rows import at_time, mask_of, split_rows
from mf_jax.flow.times import Times

LABEL_DROP_ROWS = ("instant_rows", "any_row")
_LARGEST_GROUP = 64
_CROPS = 7  # folded into the key, whose split into 7 folds in 0 to 6
_SHARE_TOLERANCE = 1e-3
_AREA, _RATIO = (0.08, 1.0), (3 / 4, 4 / 3)
"""Of a box: its share of the picture, and its width over its height."""


def key_of(seed: Shaped[Array, ""] | int) -> PRNGKeyArray:
    """Return the random key of a seed, of one kind whatever JAX calls its default.

    Keys of other kinds would draw other numbers in batches of other sizes.
    """
    return jax.random.key(seed, impl="threefry2x32")


def group_sizes(instant_share: float) -> tuple[int, int]:
    """Return the rows of a group with r = t, and with r < t, without a common factor."""
    check_within("draws.instant_share", instant_share, "[0, 1]", "MeanFlow uses 0.75")
    share = Fraction(instant_share).limit_denominator(_LARGEST_GROUP)
    if abs(share - Fraction(instant_share)) > _SHARE_TOLERANCE:
        fix = f"must be a fraction of {_LARGEST_GROUP} or less; use {share} = {float(share):.6g}"
        raise BadInput(f"draws.instant_share={instant_share}: {fix}")
    return share.numerator, share.denominator - share.numerator


def draw_boxes(key: PRNGKeyArray, shape: tuple[int, ...]) -> Int[Array, "b 4"]:
    """Draw (top, left, height, width) of a box in each picture of a shape `(B, H, W, C)`.

    Source: Szegedy et al., arXiv 1409.4842, section 6 (area and ratio).
    """
    rows, height, width, _ = shape
    area, ratio, down, right = jax.random.uniform(key, (4, rows))
    area = (_AREA[0] + (_AREA[1] - _AREA[0]) * area) * height * width
    low, high = jnp.log(jnp.asarray(_RATIO))
    ratio = jnp.exp(low + (high - low) * ratio)
    box_height = jnp.clip(jnp.round(jnp.sqrt(area / ratio)), 1, height)
    box_width = jnp.clip(jnp.round(jnp.sqrt(area * ratio)), 1, width)
    top, left = down * (height - box_height + 1), right * (width - box_width + 1)
    return jnp.stack([top, left, box_height, box_width], axis=1).astype(jnp.int32)


@dataclasses.dataclass(frozen=True)
class DrawScheme:
    """How a step's random numbers are drawn.

    Source of the drawn guidance: improved MeanFlow, arXiv 2512.02012, section 4.2.
    """

    times: Times  # distribution of (r, t)
    instant_share: float = 0.75  # of rows with r = t, a fraction whose denominator is at most 64
    label_drop_share: float = 0.1  # of all rows, which train without their condition
    label_drop: str = "instant_rows"  # which rows lose it: r = t, as MeanFlow, or `any_row`
    label_drop_window: tuple[float, float] = (0.0, 1.0)  # only rows with t inside it lose it
    omega_max: float = 1.0  # largest scale of guidance that the network is told; 1 = it is not
    omega_power: float = 1.0  # the scale has density omega^-omega_power
    noise_scale: float = 1.0  # standard deviation of the noise that is drawn
    crops: bool = False  # draw boxes, for objectives that look at crops of pictures
    # the field is one of this project's networks, which are told a `Condition` with guidance and
    # dropout seeds; else it is told its own condition alone
    for_networks: bool = False
    # distribution whose t is drawn for rows with r = t, with order="clip" one draw; None = `times`
    instant_times: Times | None = None
    instant_of_every_row: bool = False  # all rows are in both sub-batches, with x, e and condition
    coupling: Coupling | None = None  # which e, given or drawn, belongs to which x; None = its own
    omega_min: float = 1.0  # smallest scale; equal to omega_max it is the only one
    omega_window: bool = True  # a window of t is drawn too, which the network is told; else all t

    def __post_init__(self) -> None:
        group_sizes(self.instant_share)
        low, high = self.label_drop_window
        if not 0 <= low <= high <= 1:
            raise BadInput(f"draws.label_drop_window={low, high}: must be in order within [0, 1]")
        check_fields("draws", self, label_drop=LABEL_DROP_ROWS, label_drop_share="[0, 1)")
        check_fields("draws", self, omega_max="[1, inf)", omega_min=f"[1, {self.omega_max}]")
        check_fields("draws", self, omega_power="[0, inf)", noise_scale="(0, inf)")
        most = 0.0 if self.instant_of_every_row else self.instant_share
        if self.label_drop != "any_row":  # only the rows with r = t alone lose it
            fix = "or use draws.label_drop=any_row"
            check_within("draws.label_drop_share", self.label_drop_share, f"[0, {most}]", fix)
        if self.omega_max > 1 and not self.for_networks:
            fix = "1 unless for_networks=True, whose field is told the scale"
            raise BadInput(f"draws.omega_max={self.omega_max}: must be {fix}")

    @property
    def group(self) -> int:
        """The number of rows whose multiple each device must have."""
        return 1 if self.instant_of_every_row else sum(group_sizes(self.instant_share))

    def draw(
        self,
        key: PRNGKeyArray,
        x: Shaped[Array, "b ..."],
        condition: PyTree = None,
        *,
        e: Array | None = None,
        mask: Array | None = None,
        null: PyTree = None,
        augment: Array | None = None,
    ) -> Draws:
        """Draw one step; raise BadInput at a batch that is no multiple of `group`.

        Args:
          x: data `[B, ...]` of any rank, floating point; half precision becomes float32.
          condition: any tree of arrays `[B, ...]`; classes are one int array `[B]`.
          e: like x, the noise that belongs to each row; drawn, normal, unless given.
          mask: bool that broadcasts to x, True where a number counts; what it hides may be NaN.
          null: a tree like condition without the axis B, or one array for all: what a row without
            its condition is told. Classes alone have a default, `NO_LABEL`.
          augment: how x was moved, which networks are told.
        """
        x = jnp.asarray(x)
        if not jnp.issubdtype(x.dtype, jnp.floating):
            raise BadInput(f"x: is {x.dtype}; must be floating point, of pictures x / 127.5 - 1")
        x = x.astype(jnp.promote_types(x.dtype, jnp.float32))  # as precise as times are
        num_rows = len(x)
        if num_rows == 0 or num_rows % self.group:
            needed = f"must be a multiple of {self.group} for instant_share={self.instant_share}"
            raise BadInput(f"a batch of {num_rows} rows: {needed}")
        null = _null_of(condition, null, num_rows, is_needed=self.label_drop_share > 0)
        noise_key, times_key, drop_key, guidance_key, *more_keys = jax.random.split(key, 7)
        r, t = _sample(self.times, times_key, x)
        direction = jax.random.normal(more_keys[2], x.shape, x.dtype)
        if e is None:
            e = self.noise_scale * jax.random.normal(noise_key, x.shape, x.dtype)
        e = jnp.asarray(e, x.dtype)
        if e.shape != x.shape:
            raise BadInput(f"e: has shape {e.shape} where x has {x.shape}; give a row for each row")
        mask = mask_of(mask, x)
        if self.coupling is not None:
            e = self.coupling.pair(x, e, condition, mask)
        if mask is not None:
            x, e, direction = (jnp.where(mask, each, 0) for each in (x, e, direction))
        drop = 0.0 if null is None else self.label_drop_share
        if drop and self.label_drop != "any_row":
            drop /= self.instant_share
        seeds = jax.random.bits(more_keys[1], (num_rows,), jnp.uint32)
        rows = Rows(
            x=x,
            e=e,
            t=t,
            r=r,
            dropped=jax.random.uniform(drop_key, (num_rows,)) < drop,
            condition=condition,
            null=null,
            mask=mask,
            guidance=self._guidance(guidance_key, num_rows),
            fraction=jax.random.uniform(more_keys[0], (num_rows,)).astype(x.dtype),
            dropout=seeds if self.for_networks else None,
            direction=direction,
            box=draw_boxes(jax.random.fold_in(key, _CROPS), x.shape) if self.crops else None,
            augment=augment,
            for_networks=self.for_networks,
        )
        return self._in_two(rows, times_key)

    def _in_two(self, rows: Rows, times_key: PRNGKeyArray) -> Draws:
        """Split rows into those with r = t and those with r < t, each with times of its own."""
        instant = interval = rows
        if not self.instant_of_every_row:
            groups = len(rows.t) // self.group
            sizes = [size * groups for size in group_sizes(self.instant_share)]
            instant, interval = split_rows(rows, sizes)
        instant = at_time(instant, instant.t)
        if self.instant_times is not None:
            times_key, own_key = jax.random.split(times_key)
            instant = at_time(instant, _sample(self.instant_times, own_key, instant.x)[1])
            r, t = _sample(self.times, times_key, interval.x)
            interval = interval.replace(r=r, t=t)
        low, high = self.label_drop_window

        def lose(rows: Rows, *, some: bool = True) -> Rows:
            return rows.replace(dropped=rows.dropped & some & (low <= rows.t) & (rows.t <= high))

        return Draws(lose(instant), lose(interval, some=self.label_drop == "any_row"))

    def _guidance(self, key: PRNGKeyArray, num_rows: int) -> GuidanceScale | None:
        if self.omega_max == 1:
            return None
        omega, low, high = jax.random.uniform(key, (3, num_rows))
        # inverse of the distribution function of the density omega^-power
        if self.omega_power == 1:
            omega = self.omega_min * (self.omega_max / self.omega_min) ** omega
        else:
            power = 1 - self.omega_power
            least, most = self.omega_min**power, self.omega_max**power
            omega = (least + omega * (most - least)) ** (1 / power)
        if not self.omega_window:
            low, high = jnp.zeros_like(low), jnp.ones_like(high)
        return GuidanceScale(omega=omega, t_min=low / 2, t_max=(1 + high) / 2)


def _sample(times: Times, key: PRNGKeyArray, x: Array) -> list[Array]:
    """Draw r and t for each row of x, in its type."""
    return [each.astype(x.dtype) for each in times.sample(key, len(x))]


def _null_of(condition: PyTree, null: PyTree, num_rows: int, *, is_needed: bool) -> PyTree:
    """Return `null` as a tree like the condition, with its axis B; None without a null."""
    leaves = jax.tree.leaves(condition)
    for shape in map(jnp.shape, leaves):
        if shape[:1] != (num_rows,):
            raise BadInput(f"condition: has shape {shape}; its first axis must be {num_rows} rows")
    if not leaves and null is not None:
        raise BadInput("null: is what a row without its condition is told; give a condition")
    if null is None and leaves and leaves[0] is condition and condition.ndim == 1:
        null = NO_LABEL if jnp.issubdtype(condition.dtype, jnp.signedinteger) else None
    fit = "give a tree like condition, without its first axis"
    if null is None:
        if leaves and is_needed:
            raise BadInput(f"null=None: tells rows without condition; {fit}, or label_drop_share=0")
        return None

    def spread(own: Array, to: Any) -> Array:
        is_known = not (isinstance(to, jax.core.Tracer) or jnp.issubdtype(own.dtype, jnp.inexact))
        with jax.ensure_compile_time_eval():
            given = jnp.asarray(to)
            cast = given.astype(own.dtype)
            if is_known and jnp.any(cast.astype(given.dtype) != given):
                raise ValueError(f"{to} is no {own.dtype}, as its condition is")
        return jnp.broadcast_to(cast, own.shape)

    with refused(ValueError, "null: is not like condition", fit):
        return jax.tree.map(spread, condition, jax.tree.broadcast(null, condition))
