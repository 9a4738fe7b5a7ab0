"""alpha-Flow: a curriculum from flow matching to MeanFlow, by a finite step along the path.

1. The average velocity is additive: for s = t - a (t - r), with a in (0, 1],
   u(z_t, r, t) = a u(z_t, s, t) + (1 - a) u(z_s, r, s).
2. Over the short first part u is nearly the velocity v, and z_s = z_t - (t - s) v. Hence the target

    loss = a^-1 w |u(z_t, r, t) - sg[a v_g + (1 - a) u(z_s, r, s)]|^2,   z_s = z_t - (t - s) v_g

3. With a = 1 this is flow matching on every pair (r, t). As a -> 0, (u - target) / a becomes
   MeanFlow's residual; below a = `derivative_below` MeanFlow's form takes over.

The weight w is of the error in units of the velocity, |u - target|^2 / a^2. SoFlow is the
exponential schedule from 0.1 to 0.002 without derivative.

FLOPs of a step in forward-equivalents of the whole batch, with a share q of rows with r < t: 3 + q,
in either form; guidance adds what it adds to MeanFlow.

Source: alpha-Flow, arXiv 2510.20771, equation 9 and algorithm 1; SoFlow, arXiv 2512.15657.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from mf_jax.flow.derivative import Derivative
from mf_jax.flow.errors import BadInput, check_known
from mf_jax.flow.guidance import Guidance, guided_velocities
from mf_jax.flow.paths import advance, interpolate, per_row
from mf_jax.flow.records import Draws, Field, Step
from mf_jax.flow.rows import predict
from mf_jax.objectives import terms

ANNEALINGS = ("sigmoid", "exponential")


@dataclasses.dataclass(frozen=True)
class AlphaFlow(terms.Objective):
    """Regress the average velocity on a finite step along the path, whose length is annealed.

    Args:
      annealing: schedule of a, a key of `ANNEALINGS`.
      alpha_start, alpha_end: ends of a, in [0, 1].
      anneal_from, anneal_to: steps between which a changes.
      sharpness: of `sigmoid`.
      derivative_below: use the derivative where a is below it; 0 = never.
      target_clip: largest size of an entry of the target of rows with r < t.
      derivative: how it is taken, below `derivative_below`.
    """

    guidance: Guidance = Guidance()
    weight: terms.AdaptiveWeight = terms.AdaptiveWeight()
    annealing: str = "sigmoid"
    alpha_start: float = 1.0
    alpha_end: float = 0.0
    anneal_from: int = 0
    anneal_to: int = 10_000
    sharpness: float = 25.0
    derivative_below: float = 5e-3
    target_clip: float = 4.0
    target_ema: float = 0.0
    derivative: Derivative = Derivative()

    def __post_init__(self) -> None:
        check_known("objective.annealing", self.annealing, ANNEALINGS)
        for name in ("alpha_start", "alpha_end", "derivative_below"):
            if not 0 <= getattr(self, name) <= 1:
                raise BadInput(f"objective.{name}={getattr(self, name)}: must be within [0, 1]")
        smallest = min(self.alpha_start, self.alpha_end)
        if smallest == 0 and (self.annealing == "exponential" or self.derivative_below == 0):
            raise BadInput(
                f"objective.alpha_start={self.alpha_start}, alpha_end={self.alpha_end}: must be "
                "above 0 with annealing=exponential or derivative_below=0; try 0.1 and 0.002"
            )
        if not 0 <= self.anneal_from < self.anneal_to:
            raise BadInput(
                f"objective.anneal_from={self.anneal_from}, anneal_to={self.anneal_to}: must obey "
                "0 <= anneal_from < anneal_to"
            )
        for name in ("sharpness", "target_clip"):
            if not 0 < getattr(self, name) < math.inf:
                raise BadInput(f"objective.{name}={getattr(self, name)}: must be above 0")
        terms.check_target_ema(self.target_ema)

    def alpha(self, step: Step) -> Float[Array, ""]:
        """Return a at a training step."""
        start, end = self.alpha_start, self.alpha_end
        progress = jnp.asarray(step - self.anneal_from) / (self.anneal_to - self.anneal_from)
        if self.annealing == "exponential":
            return start * (end / start) ** jnp.clip(progress, 0, 1)
        return start + (end - start) * jax.nn.sigmoid(self.sharpness * (progress - 0.5))

    def loss(
        self, field: Field, params: PyTree, draws: Draws, step: Step = 0, target_params: Any = None
    ) -> terms.Loss:
        """See `Objective.loss`."""
        rows = draws.interval
        u_instant = terms.at_instant(field, params, draws.instant).u
        v = guided_velocities(self.guidance, field, params, draws, own_instant=u_instant)
        alpha = a = self.alpha(step)

        def by_step() -> tuple[Array, Array, Array]:
            if rows.t.shape[0] == 0:
                return rows.x, rows.x, rows.x
            teacher = params if target_params is None else target_params
            s = rows.t - alpha * (rows.t - rows.r)
            z = interpolate(rows.x, rows.e, t=rows.t)
            z_s = advance(z, v.interval, r=s, t=rows.t)
            u = predict(field, params, rows, z, r=rows.r, t=rows.t).u
            u_s = predict(field, teacher, rows, z_s, r=rows.r, t=s).u
            return u, alpha * v.interval + (1 - alpha) * u_s, (u - u_s) / per_row(rows.t - s, u)

        def by_derivative() -> tuple[Array, Array, Array]:
            how = self.derivative
            (u, _), du_dt = terms.with_derivative(field, params, rows, v.interval, how=how)
            return u, v.interval - per_row(rows.t - rows.r, u) * du_dt, du_dt

        if self.derivative_below == 0:
            u, target, du_dt = by_step()
        else:
            is_short = a < self.derivative_below
            u, target, du_dt = jax.lax.cond(is_short, by_derivative, by_step)
            a = jnp.where(is_short, 1.0, a)
        v_error = terms.squared_error(u_instant, v.instant)
        clipped = jnp.clip(target, -self.target_clip, self.target_clip)
        u_error = terms.squared_error(u, clipped) / a**2
        loss = terms.row_mean(self.weight(v_error, draws.instant), a * self.weight(u_error, rows))
        metrics = terms.step_metrics(draws, v_error=v_error, u_error=u_error, du_dt=du_dt)
        return loss, metrics | {"alpha": terms.average_over(alpha, draws)}
