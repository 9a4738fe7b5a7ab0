"""Optional terms on any objective, on how the network's field depends on z: Lipschitz and monotone control.

Both look along one random direction n, |n| = 1, of each row, by the JVP du/dz n, through which the
gradient passes:

    lipschitz * relu(|du/dz n| - bound)^2            the field changes by at most `bound` per unit of z
    monotone * relu(-(1 - (t - r) n . du/dz n))^2    the step z - (t - r) u is monotone in z

FLOPs of a step in forward-equivalents of the whole batch, with a share q of rows with r < t: 6 q more
(6 where no row has r < t).

Source: the Lipschitz and monotone controls named beside MeanFlow's baselines in the overview of the
method.
"""

import dataclasses
import math
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from mf_jax.errors import BadInput
from mf_jax.flow.draws import condition_of
from mf_jax.flow.paths import interpolate, per_row
from mf_jax.flow.records import Draws, Field, Rows, Step
from mf_jax.objectives import terms


@dataclasses.dataclass(frozen=True)
class Controls:
    """Factors of the terms.

    Args:
      lipschitz: factor of the Lipschitz term, at least 0; 0 = off.
      lipschitz_bound: the bound, above 0.
      monotone: factor of the monotone term, at least 0; 0 = off.
    """

    lipschitz: float = 0.0
    lipschitz_bound: float = 1.0
    monotone: float = 0.0

    def __post_init__(self) -> None:
        for name in ("lipschitz", "monotone"):
            if not 0 <= getattr(self, name) < math.inf:
                raise BadInput(
                    f"controls.{name}={getattr(self, name)}: must be at least 0; 0 = off"
                )
        if not 0 < self.lipschitz_bound < math.inf:
            raise BadInput(
                f"controls.lipschitz_bound={self.lipschitz_bound}: must be above 0; try 1.0"
            )

    @property
    def are_off(self) -> bool:
        """Whether neither term is used."""
        return self.lipschitz == 0 and self.monotone == 0

    def penalty(
        self, field: Field, params: PyTree, draws: Draws
    ) -> tuple[Float[Array, ""], terms.Metrics]:
        """Return the sum of the terms, over the rows with r < t (over all, where there are none)."""
        rows = draws.interval if draws.interval.t.shape[0] else draws.instant
        n, slope = _slope(field, params, rows)
        axes = tuple(range(1, n.ndim))
        rate = jnp.sqrt(jnp.sum(slope**2, axis=axes) + jnp.finfo(slope.dtype).tiny)
        gain = 1 - (rows.t - rows.r) * jnp.sum(n * slope, axis=axes)
        steep = jax.nn.relu(rate - self.lipschitz_bound) ** 2
        folded = jax.nn.relu(-gain) ** 2
        metrics = {
            "lipschitz_penalty": terms.average(steep),
            "monotone_penalty": terms.average(folded),
        }
        return self.lipschitz * jnp.mean(steep) + self.monotone * jnp.mean(folded), metrics


def _slope(
    field: Field, params: PyTree, rows: Rows
) -> tuple[Float[Array, "b ..."], Float[Array, "b ..."]]:
    """Return a unit direction n of each row, and du/dz n."""
    axes = tuple(range(1, rows.x.ndim))
    n = rows.direction / per_row(jnp.sqrt(jnp.sum(rows.direction**2, axis=axes)), rows.x)
    condition = condition_of(rows)

    def u(z: Array) -> Array:
        return field(params, z, r=rows.r, t=rows.t, condition=condition).u

    return n, jax.jvp(u, (interpolate(rows.x, rows.e, t=rows.t),), (n,))[1]


@dataclasses.dataclass(frozen=True)
class Controlled(terms.Objective):
    """An objective with control terms added to its loss."""

    objective: terms.Objective
    controls: Controls
    second_order: ClassVar[bool] = True

    def loss(
        self, field: Field, params: PyTree, draws: Draws, step: Step = 0, target_params: Any = None
    ) -> terms.Loss:
        """See `Objective.loss`."""
        loss, metrics = self.objective.loss(field, params, draws, step, target_params)
        penalty, more = self.controls.penalty(field, params, draws)
        return loss + penalty, metrics | more


def _asks_the_objective(name: str) -> property:
    return property(lambda self: getattr(self.objective, name), doc="See `Objective`.")


for _name in ("learns_average", "needs_second_head", "predicts", "guidable", "target_ema"):
    setattr(Controlled, _name, _asks_the_objective(_name))
