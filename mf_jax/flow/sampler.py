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

from mf_jax.flow.errors import BadInput, check_fields
from mf_jax.flow.paths import advance, interpolate
from mf_jax.flow.records import Field
from mf_jax.flow.rows import call, mask_of

NO_GUIDANCE = (1.0, 0.0, 1.0)


@dataclasses.dataclass(frozen=True)
class SamplePlan:
    """How samples are drawn."""

    steps: int = 1  # network evaluations of a sample, equally spaced from t = 1 to 0
    times: Sequence[float] = ()  # the grid itself, from 1.0 to 0.0; replaces `steps` unless empty
    guidance: Sequence[float] = NO_GUIDANCE  # (omega, t_min, t_max), see `GuidanceScale`
    renoise: bool = False  # go to the data and back to fresh noise in each step; see `sample`
    seed: int = 0  # of the noise
    batch_size: int = 256  # samples computed at once

    def __post_init__(self) -> None:
        for name in ("times", "guidance"):
            object.__setattr__(self, name, tuple(map(float, getattr(self, name))))
        grid = self.times
        falls = all(a > b for a, b in itertools.pairwise(grid))
        if grid and not (len(grid) > 1 and grid[0] == 1 and grid[-1] == 0 and falls):
            raise BadInput(f"times={grid}: must fall strictly from 1.0 to 0.0, as (1.0, 0.5, 0.0)")
        if not isinstance(self.steps, numbers.Integral):
            raise BadInput(f"steps={self.steps!r}: must be a whole number")
        check_fields("", self, steps=f"[{0 if grid else 1}, 1000000]")
        check_fields("", self, batch_size="[1, inf)", seed=f"[0, {2**31})")
        omega, *window = self.guidance or (0.0,)
        if not (len(window) == 2 and 1 <= omega < math.inf and 0 <= window[0] <= window[1] <= 1):
            needed = "(omega, t_min, t_max), 1 <= omega < inf, 0 <= t_min <= t_max <= 1"
            raise BadInput(f"guidance={self.guidance}: must be {needed}")

    @property
    def grid(self) -> tuple[float, ...]:
        """Return the times visited, one more than there are evaluations."""
        return self.times or tuple(1 - i / self.steps for i in range(self.steps + 1))

    @property
    def padded_grid(self) -> tuple[tuple[float, ...], int]:
        """Return the grid, with zeros up to a multiple of 64 times, and its number of intervals."""
        return self.grid + (0.0,) * (-len(self.grid) % 64), len(self.grid) - 1

    def replace(self, **changes: Any) -> "SamplePlan":
        """Return the plan with other values."""
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
        (omega, *window), whole = self.guidance, NO_GUIDANCE[1:]
        told = ""
        # published samples have larger scales than were drawn, if several were
        if omega < omega_min or (omega > omega_min == omega_max):
            scales = f"scales from {omega_min} to {omega_max}"
            told = "no guidance (draws.omega_max=1)" if omega_max == 1 else scales
            omega = omega_min
        elif omega != 1 and not has_window and tuple(window) != whole:
            told = "no window of t"
        if told:
            fix = f"this run's network was told {told}; use {omega, *whole}"
            raise BadInput(f"guidance={self.guidance}: {fix}")
        if only_to_data and len(self.grid) > 2 and not self.renoise:
            fix = "use one step, or renoise=True"
            raise BadInput(f"renoise=False: this run's intervals all end at the data; {fix}")


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
    if not isinstance(times, jax.core.Tracer):
        times = SamplePlan(steps, tuple(map(float, times))).grid
    wide = jnp.promote_types(e.dtype, jnp.float32)  # small steps vanish in half precision
    grid = jnp.asarray(times, wide)
    last = len(grid) - 1 if num_intervals is None else num_intervals

    def hidden(z: Float[Array, "b ..."]) -> Float[Array, "b ..."]:
        return z if mask is None else jnp.where(mask, z, 0)

    def step(i: Int[Array, ""], z: Float[Array, "b ..."]) -> Float[Array, "b ..."]:
        t, r = (jnp.full(z.shape[:1], time) for time in (grid[i], grid[i + 1]))
        to = r if renoise is None else jnp.zeros_like(r)
        told = to if learns_average else t
        u = call(field, params, z, mask, r=told, t=t, condition=condition).u
        moved = advance(z, u, r=to, t=t)
        if renoise is not None:
            moved = interpolate(moved, hidden(renoise(i)), t=r)
        return moved.astype(wide)

    return jax.lax.fori_loop(0, last, step, hidden(e).astype(wide)).astype(e.dtype)
