"""alpha-Flow: a curriculum from flow matching to MeanFlow, by a finite step along the path.

1. The average velocity is additive: for s = t - a (t - r), with a in (0, 1],
   u(z_t, r, t) = a u(z_t, s, t) + (1 - a) u(z_s, r, s).
2. Over the short first part u is nearly the velocity v, and z_s = z_t - (t - s) v. Hence the target

    loss = a w(l) l,   l = |u(z_t, r, t) - sg[a v_g + (1 - a) u(z_s, r, s)]|^2 / a^2,
                       z_s = z_t - (t - s) v_g

3. With a = 1 this is flow matching on every pair (r, t). As a -> 0, (u - target) / a becomes
   MeanFlow's residual; below a = `derivative_below` MeanFlow's form takes over.

alpha-Flow's published code does not divide l by a^2. SoFlow is the exponential schedule without
derivative.

FLOPs of a step in forward-equivalents of the whole batch, with a share q of rows with r < t: 3 + q,
in either form; guidance adds what it adds to MeanFlow.

Source: alpha-Flow, arXiv 2510.20771, equation 9 and algorithm 1; SoFlow, arXiv 2512.15657.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from mf_jax.flow.derivative import Derivative
from mf_jax.flow.errors import BadInput, check_fields
from mf_jax.flow.guidance import Guidance, guided_velocities
from mf_jax.flow.paths import advance, per_row, quotient
from mf_jax.flow.records import Step
from mf_jax.flow.rows import point_of, predict
from mf_jax.objectives import terms

ANNEALINGS = ("sigmoid", "exponential")
ERRORS = ("velocity", "step")


@dataclasses.dataclass(frozen=True)
class AlphaFlow(terms.Objective):
    """Regress the average velocity on a finite step along the path, whose length is annealed."""

    guidance: Guidance = Guidance()
    weight: terms.AdaptiveWeight = terms.AdaptiveWeight()
    annealing: str = "sigmoid"  # schedule of a, a key of `ANNEALINGS`
    alpha_start: float = 1.0  # ends of a
    alpha_end: float = 0.0
    anneal_from: int = 0  # steps between which a changes
    anneal_to: int = 10_000
    sharpness: float = 25.0  # of `sigmoid`
    # where a is below it, the derivative is used, of `sigmoid` with a = 0; where 1 - a of `sigmoid`
    # is below it, a is 1; 0 = never
    derivative_below: float = 5e-3
    min_gap: float = 0.0  # t - s is at least this, but at most t - r
    target_clip: float = 4.0  # largest size of an entry of a finite step's target; inf = no bound
    error_of: str = "velocity"  # l is divided by a^2; or not, an error of the `step`
    interval_factor: float = 1.0  # of the rows with r < t in the loss
    target_ema: float = 0.0
    derivative: Derivative = Derivative()

    def __post_init__(self) -> None:
        factors = dict.fromkeys(("alpha_start", "alpha_end", "derivative_below"), "[0, 1]")
        above_0 = dict.fromkeys(("sharpness", "interval_factor"), "(0, inf)")
        check_fields("objective", self, annealing=ANNEALINGS, error_of=ERRORS, **factors, **above_0)
        check_fields("objective", self, target_clip="(0, inf]", min_gap="[0, 1)")
        check_fields("objective", self, target_ema="[0, 1)", anneal_from=f"[0, {self.anneal_to})")
        ends = self.alpha_start, self.alpha_end
        if min(ends) == 0 and (self.annealing == "exponential" or self.derivative_below == 0):
            fix = "must be above 0 with annealing=exponential or derivative_below=0; try 0.1, 0.002"
            raise BadInput(f"objective.alpha_start, alpha_end={ends}: {fix}")

    def alpha(self, step: Step) -> Float[Array, ""]:
        """Return a at a training step."""
        start, end = self.alpha_start, self.alpha_end
        progress = jnp.asarray(step - self.anneal_from) / (self.anneal_to - self.anneal_from)
        if self.annealing == "exponential":
            return start * (end / start) ** jnp.clip(progress, 0, 1)
        alpha = start + (end - start) * jax.nn.sigmoid(self.sharpness * (progress - 0.5))
        alpha = jnp.where(alpha < self.derivative_below, 0, alpha)
        return jnp.where(alpha > 1 - self.derivative_below, 1, alpha)

    def loss(self, field, params, draws, step=0, target_params=None) -> terms.Loss:
        """See `Objective.loss`."""
        rows = draws.interval
        u_instant = terms.at_instant(field, params, draws.instant).u
        v = guided_velocities(self.guidance, field, params, draws, own_instant=u_instant)
        alpha = self.alpha(step)
        a = jnp.broadcast_to(alpha, rows.t.shape)
        if self.min_gap:
            a = jnp.clip(self.min_gap / (rows.t - rows.r), a, 1)

        def by_step() -> tuple[Array, Array, Array]:
            teacher = params if target_params is None else target_params
            s = rows.t - a * (rows.t - rows.r)
            z = point_of(rows)
            z_s = advance(z, v.tangent, r=s, t=rows.t)
            u = predict(field, params, rows, z, r=rows.r, t=rows.t).u
            u_s = predict(field, teacher, rows, z_s, r=rows.r, t=s).u
            share = per_row(a, u)
            target = share * v.interval + (1 - share) * u_s
            target = jnp.clip(target, -self.target_clip, self.target_clip)
            return u, target, quotient(u - u_s, rows.t - s)

        def by_derivative() -> tuple[Array, Array, Array]:
            how = self.derivative
            (u, _), du_dt = terms.with_derivative(field, params, rows, v.tangent, how=how)
            return u, v.interval - per_row(rows.t - rows.r, u) * du_dt, du_dt

        if self.derivative_below == 0:
            u, target, du_dt = by_step()
        else:
            is_short = alpha < self.derivative_below
            u, target, du_dt = jax.lax.cond(is_short, by_derivative, by_step)
            a = jnp.where(is_short, 1.0, a)
        v_error, error = terms.squared_error(u_instant, v.instant), terms.squared_error(u, target)
        u_error = error / a**2
        weighted = self.weight(u_error if self.error_of == "velocity" else error, rows)
        v_loss = self.weight(v_error, draws.instant)
        loss = terms.row_mean(v_loss, self.interval_factor * a * weighted)
        metrics = terms.step_metrics(draws, v_error=v_error, u_error=u_error, du_dt=du_dt)
        return loss, metrics | {"alpha": terms.average_over(alpha, draws)}
