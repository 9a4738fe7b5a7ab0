"""Optional terms on any objective: Lipschitz and monotone control of du/dz.

Both use the JVP du/dz n along a random direction n, |n| = 1, of each row:

    lipschitz * relu(|du/dz n| - bound)^2            u changes by at most `bound` per unit of z
    monotone * relu(-(1 - (t - r) n . du/dz n))^2    the step z - (t - r) u is monotone in z

FLOPs of a step in forward-equivalents of the whole batch, with a share q of rows r < t: 6 q more (6
where no row has r < t).

Source: controls named beside MeanFlow's baselines in the overview of the method.
"""

import dataclasses
import math
import operator
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from mf_jax.flow.errors import BadInput
from mf_jax.flow.paths import interpolate, per_row
from mf_jax.flow.records import Draws, Field, Step
from mf_jax.flow.rows import predict
from mf_jax.objectives import terms


@dataclasses.dataclass(frozen=True)
class Controls:
    """Factors of the terms, 0 = off, and the bound of the first."""

    lipschitz: float = 0.0
    lipschitz_bound: float = 1.0
    monotone: float = 0.0

    def __post_init__(self) -> None:
        for name in ("lipschitz", "monotone"):
            if not 0 <= getattr(self, name) < math.inf:
                raise BadInput(f"controls.{name}={getattr(self, name)}: must be at least 0")
        if not 0 < self.lipschitz_bound < math.inf:
            raise BadInput(f"controls.lipschitz_bound={self.lipschitz_bound}: must be above 0")

    def penalty(
        self, field: Field, params: PyTree, draws: Draws
    ) -> tuple[Float[Array, ""], terms.Metrics]:
        """Return the sum of the terms, over the rows with r < t (over all if there are none)."""
        rows = draws.interval if draws.interval.t.shape[0] else draws.instant
        axes, tiny = tuple(range(1, rows.x.ndim)), jnp.finfo(rows.x.dtype).tiny
        length = jnp.sqrt(jnp.sum(rows.direction**2, axis=axes) + tiny)
        n = rows.direction / per_row(length, rows.x)

        def u(z: Array) -> Array:
            return predict(field, params, rows, z, r=rows.r, t=rows.t).u

        _, slope = jax.jvp(u, (interpolate(rows.x, rows.e, t=rows.t),), (n,))
        rate = jnp.sqrt(jnp.sum(slope**2, axis=axes) + tiny)
        gain = 1 - (rows.t - rows.r) * jnp.sum(n * slope, axis=axes)
        steep = jax.nn.relu(rate - self.lipschitz_bound) ** 2
        folded = jax.nn.relu(-gain) ** 2
        penalties = {"lipschitz_penalty": steep, "monotone_penalty": folded}
        total = self.lipschitz * jnp.mean(steep) + self.monotone * jnp.mean(folded)
        return total, {name: terms.average(penalty) for name, penalty in penalties.items()}


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


for _name in ("learns_average", "needs_second_head", "predicts", "guidable", "target_ema"):
    setattr(Controlled, _name, property(operator.attrgetter(f"objective.{_name}")))
