"""Classifier-free guidance inside the training target: one evaluation samples the guided field.

The guided velocity of a row is

    v_g = omega v + kappa v_hat(class) + (1 - omega - kappa) v_hat(no class)

for t in [t_min, t_max]; elsewhere, and for rows without their label, it is v. Here v_hat is the
network's own velocity: u(z, t, t), or its second head. The effective scale is omega / (1 - kappa).
alpha-Flow guides rows without label too, and SoFlow lets the guidance fade beyond t_max:

    v_g = (1 - kappa) v + kappa v_hat(class) + d(t) (omega + kappa - 1) (v - v_hat(no class))
    d(t) = 1 - exp(-k / (40 (1 - k))),  k = (1 - t) / (1 - t_max);  d(t) = 1 for t <= t_max

A row's scale w and window may be drawn, as inputs of the network. Then improved MeanFlow's
v_g = v + (1 - 1/w) (v_hat(class, w) - v_hat(no class, 1)) is this with omega = 1, kappa = 1 - 1/w.

FLOPs: rows with r = t are their own conditional teacher. A step needs at most one unconditional
forward for every row and one conditional forward for the rows with r < t, in one batched call.

Source: MeanFlow, arXiv 2505.13447, section 4.2 and equation 21; improved MeanFlow, arXiv
2512.02012, section 4.2; SoFlow, arXiv 2512.15657, published code.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PyTree

from mf_jax.flow.errors import BadInput, check_within
from mf_jax.flow.paths import Points, Scalars, per_row
from mf_jax.flow.records import Draws, Field, GuidanceScale, Prediction, Rows
from mf_jax.flow.rows import call, condition_of, join_rows, point_of, split_rows, velocity_of


@dataclasses.dataclass(frozen=True)
class Guidance:
    """The guidance of the target.

    Args:
      omega: factor of the sample's own velocity, at least 0; 1 with kappa 0 is no guidance.
      kappa: factor of the network's conditional velocity, in [0, 1).
      t_min, t_max: the window of t that is guided, 0 <= t_min <= t_max <= 1.
      of_dropped: guide rows without their condition too; both v_hat are the unconditional one.
      fade: let guidance fade from t_max to t = 1; kappa's share holds at every t, t_min is 0.
    """

    omega: float = 1.0
    kappa: float = 0.0
    t_min: float = 0.0
    t_max: float = 1.0
    of_dropped: bool = False
    fade: bool = False

    def __post_init__(self) -> None:
        check_within("guidance.omega", self.omega, 0, math.inf, "[)", "1 is no guidance")
        check_within("guidance.kappa", self.kappa, 0, 1, "[)", "0 is no such term")
        check_within("guidance.t_max", self.t_max, 0, 1)
        check_within("guidance.t_min", self.t_min, 0, self.t_max, fix="see guidance.t_max")
        if self.fade and self.t_min:
            raise BadInput(f"guidance.t_min={self.t_min}: must be 0 with guidance.fade=True")

    @property
    def is_off(self) -> bool:
        """Whether the target is plain v for every row."""
        return self.omega == 1 and self.kappa == 0

    @property
    def null_factor(self) -> float:
        """The factor of the unconditional velocity, 0 where only rounding keeps it from 0."""
        factor = 1 - self.omega - self.kappa
        return 0.0 if abs(factor) < 1e-9 else factor


class Velocities(NamedTuple):
    """Guided velocities v_g of both sub-batches, and v_hat of the rows with r < t if wanted.

    tangent: v_g of the rows with r < t along which du/dt is taken.
    """

    instant: Float[Array, "b1 ..."]
    interval: Float[Array, "b2 ..."]
    tangent: Float[Array, "b2 ..."]
    own: Float[Array, "b2 ..."] | None = None


def boundary_velocity(prediction: Prediction) -> Points:
    """Return u(z, t, t), the velocity in a prediction at r = t."""
    return prediction.u


def guided_velocities(
    guidance: Guidance,
    field: Field,
    params: PyTree,
    draws: Draws,
    *,
    own_instant: Float[Array, "b1 ..."],
    with_own: bool = False,
    read: Callable[[Prediction], Array] = boundary_velocity,
) -> Velocities:
    """Return the guided velocities of a step, for targets.

    Args:
      guidance: for rows whose own guidance was not drawn.
      own_instant: v_hat of the rows with r = t.
      with_own: whether to return v_hat of the rows with r < t.
      read: takes v_hat from a prediction at r = t.
    """
    instant, interval = draws.instant, draws.interval
    is_drawn = interval.guidance is not None
    needs_null = is_drawn or guidance.null_factor != 0
    needs_own = is_drawn or guidance.kappa != 0 or with_own
    wanted = []
    if needs_null:
        wanted += [(rows, _teacher_condition(rows, labelled=False)) for rows in (instant, interval)]
    if needs_own:
        wanted.append((interval, _teacher_condition(interval, labelled=True)))
    taught = _teach(field, params, wanted, read)
    null_instant, null_interval = taught[:2] if needs_null else (0.0, 0.0)
    own = taught[-1] if needs_own else 0.0
    target = _guide(guidance, interval, own, null_interval)
    tangent = target
    if interval.tangent is not None:
        tangent = _guide(guidance, interval.replace(v=interval.tangent), own, null_interval)
    return Velocities(
        instant=_guide(guidance, instant, own_instant, null_instant),
        interval=target,
        tangent=tangent,
        own=own if with_own else None,
    )


def _is_inside(rows: Rows, window: Guidance | GuidanceScale) -> Bool[Array, "b"]:
    return (rows.t >= window.t_min) & (rows.t <= window.t_max)


def _guide(
    guidance: Guidance, rows: Rows, v_class: Points | float, v_null: Points | float
) -> Points:
    v, drawn = velocity_of(rows), rows.guidance
    if drawn is not None:
        guided = v + per_row(1 - 1 / drawn.omega, v) * (v_class - v_null)
    elif guidance.is_off:
        return v
    elif guidance.fade:
        against = per_row(_faded(guidance.t_max, rows.t), v) * guidance.null_factor
        guided = (1 - guidance.kappa) * v + guidance.kappa * v_class - against * (v - v_null)
    else:
        guided = guidance.omega * v + guidance.kappa * v_class + guidance.null_factor * v_null
    is_whole = drawn is None and guidance.fade
    inside = is_whole or _is_inside(rows, guidance if drawn is None else drawn)
    return jnp.where(per_row(inside & (guidance.of_dropped | ~rows.dropped), v), guided, v)


def _faded(t_max: float, t: Scalars) -> Scalars:
    """Return d(t) of the module's head."""
    if t_max == 1:
        return jnp.ones_like(t)
    left = jnp.clip((1 - t) / (1 - t_max), 0, 1 - 1e-6)
    return jnp.where(t <= t_max, 1, 1 - jnp.exp(-0.025 * left / (1 - left)))


def _teacher_condition(rows: Rows, *, labelled: bool) -> PyTree:
    """Return a teacher's inputs: at r = t the window is whole, without class the scale is 1."""
    if rows.guidance is not None:
        one = jnp.ones_like(rows.t)
        scale = jnp.where(_is_inside(rows, rows.guidance), rows.guidance.omega, 1)
        scale = scale if labelled else one
        rows = rows.replace(guidance=GuidanceScale(omega=scale, t_min=0 * one, t_max=one))
    return condition_of(rows, is_null=not labelled)


def _teach(
    field: Field,
    params: PyTree,
    wanted: list[tuple[Rows, PyTree]],
    read: Callable[[Prediction], Array],
) -> list[Float[Array, "_ ..."]]:
    """Return v_hat of each sub-batch, from one call for all of them."""
    sizes = [rows.t.shape[0] for rows, _ in wanted]
    if not any(sizes):
        return [rows.x for rows, _ in wanted]
    z, t, condition, mask = join_rows(
        [(point_of(rows), rows.t, told, rows.mask) for rows, told in wanted]
    )
    taught = call(field, params, z, r=t, t=t, condition=condition, mask=mask)
    return split_rows(read(taught), sizes)
