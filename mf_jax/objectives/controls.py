"""Optional terms on any objective: Lipschitz, monotone and non-expansive control of du/dz.

All use the JVP du/dz n along a random direction n, |n| = 1, of each row:

    lipschitz * relu(|du/dz n| - bound)^2                u changes by at most `bound` per unit of z
    monotone * relu(-(1 - (t - r) n . du/dz n))^2        the step z - (t - r) u is monotone in z
    non_expansive * relu(|n - (t - r) du/dz n| - 1)^2    a step brings no two points farther apart

The last one is biased where the true step expands, as from N(0, 1) to a wider Gaussian.

FLOPs of a step in forward-equivalents of the whole batch, with a share q of rows r < t: 6 q more (6
where no row has r < t).

Source: controls named beside MeanFlow's baselines in the overview of the method; Stable MeanFlow
for the last, the limit of its differences.
"""

import dataclasses
import math
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from mf_jax.flow.errors import check_within
from mf_jax.flow.paths import per_row
from mf_jax.flow.records import Draws, Field
from mf_jax.flow.rows import at_time, point_of, predict
from mf_jax.objectives import terms


@dataclasses.dataclass(frozen=True)
class Controls:
    """Factors of the terms, 0 = off, and the bound of the first."""

    lipschitz: float = 0.0
    lipschitz_bound: float = 1.0
    monotone: float = 0.0
    non_expansive: float = 0.0

    def __post_init__(self) -> None:
        for name in ("lipschitz", "monotone", "non_expansive"):
            check_within(f"controls.{name}", getattr(self, name), 0, math.inf, "[)")
        check_within("controls.lipschitz_bound", self.lipschitz_bound, 0, math.inf, "()")

    @property
    def is_on(self) -> bool:
        """Whether any term has a factor."""
        return any((self.lipschitz, self.monotone, self.non_expansive))

    def penalty(
        self, field: Field, params: PyTree, draws: Draws, *, is_map: bool = True
    ) -> terms.Loss:
        """Return the sum of the terms, over the rows with r < t (over all if there are none).

        is_map: whether u(z, r, t) is learnt for r < t; else it is looked at where r = t.
        """
        rows = draws.interval if draws.interval.t.shape[0] else draws.instant
        rows = rows if is_map else at_time(rows, rows.t)
        axes, tiny = tuple(range(1, rows.x.ndim)), jnp.finfo(rows.x.dtype).tiny
        length = jnp.sqrt(jnp.sum(rows.direction**2, axis=axes) + tiny)
        n = rows.direction / per_row(length, rows.x)

        def u(z: Array) -> Array:
            return predict(field, params, rows, z, r=rows.r, t=rows.t).u

        _, slope = jax.jvp(u, (point_of(rows),), (n,))
        rate = jnp.sqrt(jnp.sum(slope**2, axis=axes) + tiny)
        moved = n - per_row(rows.t - rows.r, n) * slope
        length = jnp.sqrt(jnp.sum(moved**2, axis=axes) + tiny)
        gain = jnp.sum(n * moved, axis=axes)
        steep = jax.nn.relu(rate - self.lipschitz_bound) ** 2
        folded = jax.nn.relu(-gain) ** 2
        apart = jax.nn.relu(length - 1) ** 2
        penalties = {"lipschitz": steep, "monotone": folded, "non_expansive": apart}
        total = sum(getattr(self, name) * jnp.mean(each) for name, each in penalties.items())
        return total, {f"{name}_penalty": terms.average(each) for name, each in penalties.items()}


@dataclasses.dataclass(frozen=True)
class Controlled(terms.Around):
    """An objective with control terms added to its loss."""

    controls: Controls
    second_order: ClassVar[bool] = True

    def loss(self, field, params, draws, step=0, target_params=None) -> terms.Loss:
        """See `Objective.loss`."""
        loss, metrics = self.objective.loss(field, params, draws, step, target_params)
        is_map = self.objective.learns_average
        penalty, more = self.controls.penalty(field, params, draws, is_map=is_map)
        return loss + penalty, metrics | more
