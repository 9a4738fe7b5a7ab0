"""Any objective with control terms, or with an estimate of the flow's velocity.

The controls are of du/dz, by the JVP du/dz n along a random direction n, |n| = 1, of each row:

    lipschitz * relu(|du/dz n| - bound)^2                u changes by at most `bound` per unit of z
    monotone * relu(-(1 - (t - r) n . du/dz n))^2        the step z - (t - r) u is monotone in z
    non_expansive * relu(|n - (t - r) du/dz n| - 1)^2    a step brings no two points farther apart

The last one is biased where the true step expands, as from N(0, 1) to a wider Gaussian.

FLOPs of a step in forward-equivalents of the whole batch, with a share q of rows r < t: 6 q more (6
where no row has r < t). Estimates: see mf_jax/flow/velocities.py.

Source: controls named beside MeanFlow's baselines in the overview of the method; Stable MeanFlow
for the last, the limit of its differences. Estimates: beside their own sources, AYF, arXiv
2506.14603 (a frozen teacher in target and tangent).
"""

import dataclasses
import operator
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from mf_jax.flow.errors import BadInput, check_fields
from mf_jax.flow.guidance import Guidance
from mf_jax.flow.paths import Points, Scalars, per_row
from mf_jax.flow.records import Draws, Field
from mf_jax.flow.rows import at_time, point_of, predict
from mf_jax.flow.velocities import VelocityEstimate
from mf_jax.objectives import terms


@dataclasses.dataclass(frozen=True)
class Around(terms.Objective):
    """An objective around another one, whose needs are its own."""

    objective: terms.Objective

    def with_frozen(self, frozen: PyTree) -> "Around":
        """See `Objective`."""
        return dataclasses.replace(self, objective=self.objective.with_frozen(frozen))


for _name in terms.Objective.__annotations__:
    setattr(Around, _name, property(operator.attrgetter(f"objective.{_name}")))


@dataclasses.dataclass(frozen=True)
class Controls:
    """Factors of the terms, 0 = off, and the bound of the first."""

    lipschitz: float = 0.0
    lipschitz_bound: float = 1.0
    monotone: float = 0.0
    non_expansive: float = 0.0

    def __post_init__(self) -> None:
        factors = dict.fromkeys(("lipschitz", "monotone", "non_expansive"), "[0, inf)")
        check_fields("controls", self, lipschitz_bound="(0, inf)", **factors)

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
        rows = draws.interval if len(draws.interval.t) else draws.instant
        rows = rows if is_map else at_time(rows, rows.t)
        axes, tiny = tuple(range(1, rows.x.ndim)), jnp.finfo(rows.x.dtype).tiny

        def length(a: Points) -> Scalars:
            return jnp.sqrt(jnp.sum(a**2, axis=axes) + tiny)

        def u(z: Points) -> Points:
            return predict(field, params, rows, z, r=rows.r, t=rows.t).u

        n = rows.direction / per_row(length(rows.direction), rows.x)
        _, slope = jax.jvp(u, (point_of(rows),), (n,))
        moved = n - per_row(rows.t - rows.r, n) * slope
        excess = {
            "lipschitz": length(slope) - self.lipschitz_bound,
            "monotone": -jnp.sum(n * moved, axis=axes),
            "non_expansive": length(moved) - 1,
        }
        penalties = {name: jax.nn.relu(each) ** 2 for name, each in excess.items()}
        total = sum(getattr(self, name) * jnp.mean(each) for name, each in penalties.items())
        return total, {f"{name}_penalty": terms.average(each) for name, each in penalties.items()}


@dataclasses.dataclass(frozen=True)
class Controlled(Around):
    """An objective with control terms added to its loss."""

    controls: Controls
    second_order: ClassVar[bool] = True

    def loss(self, field, params, draws, step=0, target_params=None) -> terms.Loss:
        """See `Objective.loss`."""
        loss, metrics = self.objective.loss(field, params, draws, step, target_params)
        is_map = self.objective.learns_average
        penalty, more = self.controls.penalty(field, params, draws, is_map=is_map)
        return loss + penalty, metrics | more


@dataclasses.dataclass(frozen=True)
class Estimated(Around):
    """An objective whose rows know an estimate of the velocity in the place of their own e - x."""

    velocity: VelocityEstimate
    # decay of the average of parameters that `average` takes, 0 = the objective's own average; with
    # 1 it is a frozen teacher: the first parameters, which `init.path` may bring
    ema: float = 0.0

    def __post_init__(self) -> None:
        own, source, tangent = self.objective, self.velocity.source, self.velocity.tangent
        name, guidance = type(own).__name__, getattr(own, "guidance", Guidance())
        has_ema, wrong = source == "average" and not own.target_ema, ""
        if own.predicts == "data":  # whose target is made of x, not of v
            wrong = "source: pixel_meanflow takes no estimate; use sample"
        elif tangent and not (own.has_tangent and own.interval_data):
            wrong = f"tangent={tangent}: {name} has no direction of du/dt to change; use 0.0"
        elif source == "network" and not own.interval_data:
            wrong = f"source='network': rows of {name} with r < t see no velocity; use another"
        elif source in ("network", "average") and self.ema < 1 and not guidance.is_off:
            wrong = f"source={source!r}: the network learns a guided velocity; use batch or data"
        elif not 0 <= self.ema <= 1 or (self.ema > 0) != has_ema:
            fix = "with source=average and no target_ema use 0.999, 1.0 for a frozen teacher"
            wrong = f"ema={self.ema}: {fix}; else 0.0"
        if wrong:
            raise BadInput(f"velocity.{wrong}")

    @property
    def target_ema(self) -> float:
        """See `Objective`."""
        return self.objective.target_ema or self.ema

    def loss(self, field, params, draws, step=0, target_params=None) -> terms.Loss:
        """See `Objective.loss`."""
        known = params if target_params is None else target_params
        draws = self.velocity.estimated(field, params, draws, known)
        own = target_params if self.objective.target_ema else None
        return self.objective.loss(field, params, draws, step, own)
