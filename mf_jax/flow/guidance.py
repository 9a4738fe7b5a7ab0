"""Classifier-free guidance inside the training target, so that one evaluation samples the guided field.

The guided velocity of a row is

    v_g = omega v + kappa v_hat(class) + (1 - omega - kappa) v_hat(no class)

for t in [t_min, t_max], and v elsewhere and for rows that train without their label, where v_hat is the network's own
velocity: u(z, t, t), or its second head. The effective scale is omega / (1 - kappa).

Where a scale w and an interval [t_min, t_max] were drawn for each row and are told to the network, improved MeanFlow's
v_g = v + (1 - 1/w) (v_hat(class, w) - v_hat(no class, 1)) is the same equation with omega = 1, kappa = 1 - 1/w inside
the interval of the row; rows with r = t use the whole of [0, 1].

What it costs: rows with r = t are their own conditional teacher, so a step needs at most one unconditional
forward for every row and one conditional forward for the rows with r < t, made as one batched call; a term
whose factor is zero costs nothing, nor does a row of which it is known beforehand that it has no label.

Source: MeanFlow, arXiv 2505.13447, section 4.2 and appendix (improved CFG, equation 21); improved MeanFlow,
arXiv 2512.02012, section 4.2.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PyTree

from mf_jax.errors import BadInput
from mf_jax.flow.draws import condition_of, guidable_rows, join_rows, split_rows, with_other_rows
from mf_jax.flow.paths import interpolate, per_row, velocity
from mf_jax.flow.records import NO_LABEL, Condition, Draws, Field, GuidanceScale, Prediction, Rows


@dataclasses.dataclass(frozen=True)
class Guidance:
    """The guidance of the target.

    Args:
      omega: factor of the sample's own velocity; finite. 1 with kappa 0 means no guidance.
      kappa: factor of the network's conditional velocity, in [0, 1).
      t_min, t_max: guide only for t in this window, 0 <= t_min <= t_max <= 1.

    Raises:
      BadInput: for values out of range.
    """

    omega: float = 1.0
    kappa: float = 0.0
    t_min: float = 0.0
    t_max: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.omega < float("inf"):
            raise BadInput(
                f"guidance.omega={self.omega}: must be finite and at least 0; 1 is no guidance"
            )
        if not 0 <= self.kappa < 1:
            raise BadInput(
                f"guidance.kappa={self.kappa}: must be within [0, 1), since the scale is omega / (1 - kappa)"
            )
        if not 0 <= self.t_min <= self.t_max <= 1:
            raise BadInput(
                f"guidance.t_min={self.t_min}, t_max={self.t_max}: must satisfy 0 <= t_min <= t_max <= 1"
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


class Velocities(NamedTuple):
    """Velocities of a step's rows, for targets, where gradients stop.

    instant, interval: the guided velocity v_g of `draws.instant` and `draws.interval`.
    own: the network's own velocity v_hat of the rows with r < t, or None where it was not asked for.
    """

    instant: Float[Array, "b1 ..."]
    interval: Float[Array, "b2 ..."]
    own: Float[Array, "b2 ..."] | None = None


def sample_velocity(rows: Rows) -> Float[Array, "b ..."]:
    """Return v = e - x of each row."""
    return velocity(rows.x, rows.e)


def boundary_velocity(prediction: Prediction) -> Float[Array, "b ..."]:
    """Return the velocity that a prediction at r = t holds: u(z, t, t)."""
    return prediction.u


def over_whole_interval(rows: Rows) -> Rows:
    """Return rows whose drawn guidance, where there is any, holds for all t in [0, 1]."""
    if rows.guidance is None:
        return rows
    t_min, t_max = jnp.zeros_like(rows.t), jnp.ones_like(rows.t)
    return rows.replace(guidance=rows.guidance.replace(t_min=t_min, t_max=t_max))


def guided_velocities(
    guidance: Guidance,
    field: Field,
    params: PyTree,
    draws: Draws,
    *,
    own_instant: Float[Array, "b1 ..."],
    with_own: bool = False,
    read: Callable[[Prediction], Array] = boundary_velocity,
    given: Callable[[Rows], Array] = sample_velocity,
) -> Velocities:
    """Return the guided velocities of a step, and the network's own where they are asked for.

    Args:
      guidance: the guidance of rows that no guidance was drawn for.
      field, params: the network.
      draws: the step's draws, the rows with r = t `over_whole_interval`.
      own_instant: the network's own velocity of the rows with r = t, their conditional teacher.
      with_own: whether to return the network's own velocity of the rows with r < t.
      read: takes the velocity from a prediction at r = t.
      given: the velocity of a row's own data and noise.

    Returns:
      The velocities.
    """
    instant, interval = draws.instant, draws.interval
    is_drawn = interval.guidance is not None
    needs_null = is_drawn or guidance.null_factor != 0
    needs_class = is_drawn or guidance.kappa != 0
    guidable = (guidable_rows(draws), interval)
    wanted = [(rows, _teacher_condition(rows, labelled=False)) for rows in guidable if needs_null]
    if needs_class or with_own:
        wanted.append((interval, _teacher_condition(interval, labelled=True)))
    taught = _teach(field, params, wanted, read)
    null = (with_other_rows(taught[0], draws), taught[1]) if needs_null else (0.0, 0.0)
    own = taught[-1] if needs_class or with_own else 0.0
    return Velocities(
        instant=_guide(guidance, instant, given(instant), own_instant, null[0]),
        interval=_guide(guidance, interval, given(interval), own, null[1]),
        own=own if with_own else None,
    )


def _inside(guidance: Guidance, rows: Rows) -> Bool[Array, "b"]:
    told = rows.guidance
    window = guidance if told is None else told
    return (rows.t >= window.t_min) & (rows.t <= window.t_max)


def _guide(
    guidance: Guidance,
    rows: Rows,
    v: Float[Array, "b ..."],
    v_class: Float[Array, "b ..."] | float,
    v_null: Float[Array, "b ..."] | float,
) -> Float[Array, "b ..."]:
    if rows.guidance is not None:
        guided = v + per_row(1 - 1 / rows.guidance.omega, v) * (v_class - v_null)
    elif guidance.is_off:
        return v
    else:
        guided = guidance.omega * v + guidance.kappa * v_class + guidance.null_factor * v_null
    return jnp.where(per_row(_inside(guidance, rows) & ~rows.dropped, v), guided, v)


def _teacher_condition(rows: Rows, *, labelled: bool) -> Condition:
    """Return what the network is told as a teacher: at r = t the interval is whole, and without class the scale 1."""
    own = condition_of(rows)
    if not labelled:
        own = own.replace(labels=jnp.full_like(rows.labels, NO_LABEL))
    if rows.guidance is None:
        return own
    told, one = rows.guidance, jnp.ones_like(rows.t)
    inside = (rows.t >= told.t_min) & (rows.t <= told.t_max)
    omega = jnp.where(inside, told.omega, 1) if labelled else one
    return own.replace(guidance=GuidanceScale(omega=omega, t_min=0 * one, t_max=one))


def _teach(
    field: Field,
    params: PyTree,
    wanted: list[tuple[Rows, Condition]],
    read: Callable[[Prediction], Array],
) -> list[Float[Array, "_ ..."]]:
    """Return the network's own velocity of each of the sub-batches, from one call for all of them."""
    if not any(rows.t.shape[0] for rows, _ in wanted):
        return [rows.x for rows, _ in wanted]
    groups = math.gcd(*(rows.t.shape[0] for rows, _ in wanted))
    inputs = [
        (interpolate(rows.x, rows.e, t=rows.t), rows.t, condition) for rows, condition in wanted
    ]
    z, t, condition = jax.tree.map(lambda *parts: join_rows(parts, groups=groups), *inputs)
    v = read(field(params, z, r=t, t=t, condition=condition))
    return split_rows(v, [rows.t.shape[0] // groups for rows, _ in wanted], groups=groups)
