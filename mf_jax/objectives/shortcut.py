"""Shortcut models: a step is two steps of half its size, down to a smallest one that is the flow.

With s the middle of (r, t), where the averaged network's half step ends:

    z_s  = clip(z_t - (t - s) u_ema(z_t, s, t))
    loss = w |u(z_t, t, t) - v|^2
         + w |u(z_t, r, t) - sg[clip((u_ema(z_t, s, t) + u_ema(z_s, r, s)) / 2)]|^2

1. Rows with r = t regress the sample's own velocity. The network is told the smallest step there,
   2^-levels (`model.time_conditioning=t,log2`).
2. Rows with r < t learn from the averaged network alone. Their sizes are 2^-k with k < levels
   (`times.name=dyadic`).
3. Guidance, u_null + scale (u - u_null), is in both halves of the shortest of these steps, twice
   2^-levels. Longer ones inherit it.

FLOPs of a step in forward-equivalents of the whole batch, with a share q of rows r < t: 3 + 2 q;
guidance adds 2 q.

Source: Shortcut models, arXiv 2410.12557, equation 5, and their published code.
"""

import dataclasses
from typing import ClassVar

import jax.numpy as jnp
from jaxtyping import Array, PyTree

from mf_jax.flow.errors import BadInput, check_fields
from mf_jax.flow.guidance import Guidance
from mf_jax.flow.paths import Points, advance, per_row, quotient
from mf_jax.flow.records import Field, Rows
from mf_jax.flow.rows import point_of, predict, unconditional, velocity_of
from mf_jax.objectives import terms


@dataclasses.dataclass(frozen=True)
class Shortcut(terms.Objective):
    """Regress steps of dyadic sizes on two steps of half their size."""

    guidance: Guidance = Guidance()  # omega / (1 - kappa) is the scale of the smallest steps
    weight: terms.AdaptiveWeight = terms.AdaptiveWeight(p=0.0, of="mean")
    levels: int = 7  # the smallest step is 2^-levels
    target_clip: float = 4.0  # largest size of an entry of a middle point and of a target
    target_ema: float = 0.999
    interval_data: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_fields("objective", self, target_clip="(0, inf]", target_ema="[0, 1)")
        if self.guidance != Guidance(self.guidance.omega, self.guidance.kappa):
            raise BadInput("guidance: shortcuts are guided at every t; use omega and kappa alone")

    def loss(self, field, params, draws, step=0, target_params=None) -> terms.Loss:
        """See `Objective.loss`; the metric du_dt is the difference quotient of u."""
        u_instant = terms.at_instant(field, params, draws.instant).u
        teacher = params if target_params is None else target_params
        u, target, du_dt = self._parts(field, params, teacher, draws.interval)
        pairs = (u_instant, velocity_of(draws.instant)), (u, target)
        return self.weight.regression(draws, *pairs, du_dt)

    def _parts(
        self, field: Field, params: PyTree, teacher: PyTree, rows: Rows
    ) -> tuple[Points, Points, Points]:
        """Return u over the interval, its target, and the difference quotient of u."""
        r, t, clip = rows.r, rows.t, self.target_clip
        if rows.guidance is not None:
            raise BadInput("draws.omega_max: shortcut models have one scale of guidance; use 1.0")
        scale = self.guidance.omega / (1 - self.guidance.kappa)
        is_shortest = per_row((t - r) * 2.0**self.levels < 3, rows.x)  # 2, or 4 and more

        def half(z: Array, **times: Array) -> Array:
            own = predict(field, teacher, rows, z, **times).u
            if self.guidance.is_off:
                return own
            null = predict(field, teacher, unconditional(rows), z, **times).u
            return jnp.where(is_shortest, null + scale * (own - null), own)

        s, z = (r + t) / 2, point_of(rows)
        first = half(z, r=s, t=t)
        second = half(jnp.clip(advance(z, first, r=s, t=t), -clip, clip), r=r, t=s)
        u = predict(field, params, rows, z, r=r, t=t).u
        return u, jnp.clip((first + second) / 2, -clip, clip), quotient(u - second, t - s)
