"""Classifier-free guidance inside the training target, so that one evaluation samples the guided field.

The guided velocity of a row is

    v_g = omega v + kappa u(z, t, t | class) + (1 - omega - kappa) u(z, t, t | no class)

for t in [t_start, t_end], and v elsewhere and for rows that train without their label. The effective scale is
omega / (1 - kappa).

What it costs: rows with r = t are their own conditional teacher, so a step needs at most one unconditional
forward for every row and one conditional forward for the rows with r < t, made as one batched call; a term
whose factor is zero costs nothing.

Source: MeanFlow, arXiv 2505.13447, section 4.2 and appendix (improved CFG, equation 21).
"""

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from mf_jax.draws import join_rows, num_groups, split_rows
from mf_jax.paths import interpolate, per_row, velocity
from mf_jax.types import NO_LABEL, BadInput, Condition, Draws, Field, Rows


@dataclasses.dataclass(frozen=True)
class Guidance:
    """The guidance of the target.

    Args:
      omega: factor of the sample's own velocity; finite. 1 with kappa 0 means no guidance.
      kappa: factor of the network's conditional velocity, in [0, 1).
      t_start, t_end: guide only for t in this window, 0 <= t_start <= t_end <= 1.

    Raises:
      BadInput: for values out of range.
    """

    omega: float = 1.0
    kappa: float = 0.0
    t_start: float = 0.0
    t_end: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.omega < float("inf"):
            raise BadInput(f"guidance.omega={self.omega}: must be finite and at least 0; 1 is no guidance")
        if not 0 <= self.kappa < 1:
            raise BadInput(
                f"guidance.kappa={self.kappa}: must be within [0, 1), since the scale is omega / (1 - kappa)"
            )
        if not 0 <= self.t_start <= self.t_end <= 1:
            raise BadInput(
                f"guidance.t_start={self.t_start}, t_end={self.t_end}: must satisfy 0 <= t_start <= t_end <= 1"
            )

    @property
    def is_off(self) -> bool:
        """Whether the target is plain v for every row."""
        return self.omega == 1 and self.kappa == 0

    @property
    def null_factor(self) -> float:
        """The factor 1 - omega - kappa of the unconditional velocity, 0 where only rounding keeps it from 0."""
        factor = 1 - self.omega - self.kappa
        return 0.0 if abs(factor) < 1e-9 else factor


def guided_velocities(
    guidance: Guidance,
    field: Field,
    params: PyTree,
    draws: Draws,
    *,
    u_instant: Float[Array, "b1 ..."],
) -> tuple[Float[Array, "b1 ..."], Float[Array, "b2 ..."]]:
    """Return the guided velocity of the rows with r = t and of the rows with r < t.

    Args:
      guidance: the guidance.
      field, params: the network.
      draws: the step's draws.
      u_instant: the network's own u(z, t, t) of the rows with r = t, their conditional teacher.

    Returns:
      v_g of `draws.instant` and of `draws.interval`. They are for targets, where gradients stop.
    """
    v_instant, v_interval = (velocity(rows.x, rows.e) for rows in (draws.instant, draws.interval))
    if guidance.is_off:
        return v_instant, v_interval
    null_instant, null_interval, class_interval = _teacher(guidance, field, params, draws)
    return (
        _guide(guidance, draws.instant, v_instant, u_instant, null_instant),
        _guide(guidance, draws.interval, v_interval, class_interval, null_interval),
    )


def _guide(
    guidance: Guidance,
    rows: Rows,
    v: Float[Array, "b ..."],
    u_class: Float[Array, "b ..."] | float,
    u_null: Float[Array, "b ..."] | float,
) -> Float[Array, "b ..."]:
    guided = guidance.omega * v + guidance.kappa * u_class + guidance.null_factor * u_null
    inside = (rows.t >= guidance.t_start) & (rows.t <= guidance.t_end) & ~rows.dropped
    return jnp.where(per_row(inside, v), guided, v)


def _teacher(
    guidance: Guidance, field: Field, params: PyTree, draws: Draws
) -> tuple[Float[Array, "b1 ..."] | float, Float[Array, "b2 ..."] | float, Float[Array, "b2 ..."] | float]:
    """Evaluate u(z, t, t) without class for all rows and with class for the rows with r < t, in one call.

    A term whose factor is 0 is returned as 0.0 and not computed.
    """
    groups = num_groups(draws)
    wanted = []
    if guidance.null_factor != 0:
        wanted += [(rows, jnp.full_like(rows.labels, NO_LABEL)) for rows in (draws.instant, draws.interval)]
    if guidance.kappa != 0:
        wanted += [(draws.interval, draws.interval.labels)]
    if not wanted:
        return 0.0, 0.0, 0.0
    z, t, labels = (
        join_rows(parts, groups=groups)
        for parts in zip(
            *((interpolate(rows.x, rows.e, t=rows.t), rows.t, y) for rows, y in wanted), strict=True
        )
    )
    u = field(params, z, r=t, t=t, condition=Condition(labels=labels)).u
    parts = split_rows(u, [rows.t.shape[0] // groups for rows, _ in wanted], groups=groups)
    null = parts[:2] if guidance.null_factor != 0 else (0.0, 0.0)
    return null[0], null[1], parts[-1] if guidance.kappa != 0 else 0.0
