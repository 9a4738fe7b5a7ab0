"""From noise to data: steps z_r = z_t - (t - r) u(z_t, r, t) down a grid of times.

Source: MeanFlow, arXiv 2505.13447, equation 12.
"""

import dataclasses
import itertools
import math
import numbers
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PyTree

from mf_jax.flow.errors import BadInput, check_within
from mf_jax.flow.paths import advance, interpolate
from mf_jax.flow.records import Field
from mf_jax.flow.rows import call, mask_of

NO_GUIDANCE = (1.0, 0.0, 1.0)


@dataclasses.dataclass(frozen=True)
class SamplePlan:
    """How samples are drawn.

    Args:
      steps: network evaluations of a sample, equally spaced from t = 1 to 0.
      times: the grid itself, falling strictly from 1.0 to 0.0; replaces `steps` unless empty.
      omega, t_min, t_max: see `GuidanceScale`.
      renoise: go to the data and back to fresh noise in each step; see `sample`.
      seed: of the noise, in [0, 2^31).
      batch_size: samples computed at once.
    """

    steps: int = 1
    times: tuple[float, ...] = ()
    omega: float = 1.0
    t_min: float = 0.0
    t_max: float = 1.0
    renoise: bool = False
    seed: int = 0
    batch_size: int = 256

    def __post_init__(self) -> None:
        grid = self.times
        falls = all(a > b for a, b in itertools.pairwise(grid))
        if grid and not (len(grid) > 1 and grid[0] == 1 and grid[-1] == 0 and falls):
            raise BadInput(f"times={grid}: must fall strictly from 1.0 to 0.0, as (1.0, 0.5, 0.0)")
        if not isinstance(self.steps, numbers.Integral):
            raise BadInput(f"steps={self.steps!r}: must be a whole number")
        check_within("steps", self.steps, 0 if grid else 1, 10**6)
        check_within("batch_size", self.batch_size, 1, math.inf, "[)")
        check_within("seed", self.seed, 0, 2**31, "[)")
        if not 1 <= self.omega < math.inf or not 0 <= self.t_min <= self.t_max <= 1:
            raise BadInput(
                f"guidance={self.guidance}: must be (omega, t_min, t_max) with omega at least 1, "
                "0 <= t_min <= t_max <= 1"
            )

    @property
    def guidance(self) -> tuple[float, float, float]:
        """Return (omega, t_min, t_max)."""
        return self.omega, self.t_min, self.t_max

    @property
    def grid(self) -> tuple[float, ...]:
        """Return the times visited, one more than there are evaluations."""
        return self.times or tuple(1 - i / self.steps for i in range(self.steps + 1))

    @property
    def padded_grid(self) -> tuple[tuple[float, ...], int]:
        """Return the grid, with zeros up to a multiple of 64 times, and its number of intervals."""
        return self.grid + (0.0,) * (-len(self.grid) % 64), len(self.grid) - 1

    def replace(self, *, guidance: Sequence[float] | None = None, **changes: Any) -> "SamplePlan":
        """Return the plan with other values; guidance is (omega, t_min, t_max)."""
        if "times" in changes:
            changes["times"] = tuple(map(float, changes["times"]))
        if guidance is not None:
            if len(guidance) != 3:
                raise BadInput(f"guidance={tuple(guidance)}: must be (omega, t_min, t_max)")
            changes |= zip(("omega", "t_min", "t_max"), map(float, guidance), strict=True)
        return dataclasses.replace(self, **changes)

    def check_learnt(
        self, omega_min: float, omega_max: float, *, has_window: bool, only_to_data: bool
    ) -> None:
        """Raise BadInput unless a network has learnt to follow the plan.

        Args:
          omega_min, omega_max: scales of guidance that it was told; 1 and 1 = none.
          has_window: whether it was told windows of t.
          only_to_data: whether all intervals that it learnt end at r = 0.
        """
        # published samples have larger scales than were drawn, if several were
        if self.omega < omega_min or (self.omega > omega_min == omega_max):
            told = "no guidance (draws.omega_max=1)"
            told = told if omega_max == 1 else f"scales from {omega_min} to {omega_max}"
            fix = f"this run's network was told {told}; use {omega_min, *NO_GUIDANCE[1:]}"
            raise BadInput(f"guidance={self.guidance}: {fix}")
        if self.omega != 1 and not has_window and self.guidance[1:] != NO_GUIDANCE[1:]:
            fix = f"this run's network was told no window of t; use {self.omega, *NO_GUIDANCE[1:]}"
            raise BadInput(f"guidance={self.guidance}: {fix}")
        if only_to_data and len(self.grid) > 2 and not self.renoise:
            fix = "this run's intervals all end at the data; use one step, or renoise=True"
            raise BadInput(f"renoise=False: {fix}")


ONE_STEP = SamplePlan()


def sample(
    field: Field,
    params: PyTree,
    e: Float[Array, "b ..."],
    condition: PyTree = None,
    *,
    steps: int = 1,
    times: Sequence[float] | Float[Array, "n"] = (),
    num_intervals: Int[Array, ""] | None = None,
    renoise: Callable[[Int[Array, ""]], Float[Array, "b ..."]] | None = None,
    learns_average: bool = True,
    mask: Bool[Array, "..."] | None = None,
) -> Float[Array, "b ..."]:
    """Carry noise e `[B, ...]` to data like e, one evaluation of the field a step.

    The field sees half precision as float32, as in training.

    Args:
      condition: what the field is told, unchanged.
      steps, times: see `SamplePlan`; BadInput unless they are as it says.
      num_intervals: of traced times, so that one program serves all numbers of steps; what follows
        is padding. None = all, which can be differentiated in reverse.
      renoise: fresh noise e' like e, of the number of a step, which then goes to the data and back:
        x_hat = z - t u(z, 0, t), z_r = (1 - r) x_hat + r e'. None = from t to r along the flow.
      learns_average: step with u(z, r, t); else with u(z, t, t), by Euler's method, as networks of
        flow matching need.
      mask: bool that broadcasts to e. What it hides is 0 at all times, as in training.

    Source of renoising: consistency models, arXiv 2303.01469, algorithm 1; SoFlow.
    """
    if not jnp.issubdtype(e.dtype, jnp.floating):
        raise BadInput(f"e: is {e.dtype}; must be floating point")
    mask = mask_of(mask, e)
    is_traced = isinstance(times, jax.core.Tracer)
    grid = times if is_traced else SamplePlan(steps, tuple(map(float, times))).grid

    wide = jnp.promote_types(e.dtype, jnp.float32)  # small steps vanish in half precision
    grid = jnp.asarray(grid, wide)
    last = len(grid) - 1 if num_intervals is None else num_intervals

    def hidden(z: Float[Array, "b ..."]) -> Float[Array, "b ..."]:
        return z if mask is None else jnp.where(mask, z, 0)

    def step(i: Int[Array, ""], z: Float[Array, "b ..."]) -> Float[Array, "b ..."]:
        t, r = (jnp.full(z.shape[:1], time) for time in (grid[i], grid[i + 1]))
        to = r if renoise is None else jnp.zeros_like(r)
        told = to if learns_average else t
        u = call(field, params, z, r=told, t=t, condition=condition, mask=mask).u
        moved = advance(z, u, r=to, t=t)
        if renoise is not None:
            moved = interpolate(moved, hidden(renoise(i)), t=r)
        return moved.astype(wide)

    return jax.lax.fori_loop(0, last, step, hidden(e).astype(wide)).astype(e.dtype)
