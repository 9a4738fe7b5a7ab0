"""From noise to data: steps z_r = z_t - (t - r) u(z_t, r, t) down a grid of times.

Source: MeanFlow, arXiv 2505.13447, equation 12.
"""

import itertools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from mf_jax.errors import BadInput
from mf_jax.flow.paths import advance
from mf_jax.flow.records import Condition, Field


def time_grid(steps: int, times: Sequence[float] = (), *, key: str = "sample") -> tuple[float, ...]:
    """Return the times that a sampler visits.

    Args:
      steps: number of equal steps from 1 to 0, at least 1; not used where times are given.
      times: the grid itself, strictly falling from 1 to 0.
      key: the config section that the error names.

    Returns:
      The grid, one longer than the number of steps.

    Raises:
      BadInput: if steps is below 1, or the times do not fall from 1 to 0.
    """
    if not times:
        if steps < 1:
            raise BadInput(f"{key}.steps={steps}: must be at least 1")
        return tuple(1 - i / steps for i in range(steps + 1))
    grid = tuple(float(time) for time in times)
    falls = all(a > b for a, b in itertools.pairwise(grid))
    if len(grid) < 2 or grid[0] != 1 or grid[-1] != 0 or not falls:
        raise BadInput(
            f"sample.times={grid}: must fall strictly from 1.0 to 0.0, for example (1.0, 0.5, 0.0)"
        )
    return grid


def sample(
    field: Field,
    params: PyTree,
    e: Float[Array, "b ..."],
    condition: Condition,
    *,
    times: Sequence[float] | Float[Array, "n"],
    learns_average: bool,
) -> Float[Array, "b ..."]:
    """Carry noise to data in len(times) - 1 network evaluations.

    Args:
      field, params: the network.
      e: noise `[B, ...]`.
      condition: what the network is told.
      times: a grid of `time_grid`.
      learns_average: whether to step with u(z, r, t), or (Euler's method) with the velocity u(z, t, t) of a network
        that never saw r < t.

    Returns:
      Data like e.
    """

    def step(z: Float[Array, "b ..."], interval: tuple) -> tuple[Float[Array, "b ..."], None]:
        t, r = (jnp.full(z.shape[:1], time) for time in interval)
        u = field(params, z, r=r if learns_average else t, t=t, condition=condition).u
        return advance(z, u, r=r, t=t), None

    grid = jnp.asarray(times, jnp.float32)
    return jax.lax.scan(step, e, (grid[:-1], grid[1:]))[0]
