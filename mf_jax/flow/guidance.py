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
import operator
from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, PyTree

from mf_jax.flow.errors import BadInput, check_fields
from mf_jax.flow.paths import Points, per_row
from mf_jax.flow.records import Draws, Field, GuidanceScale, Prediction, Rows
from mf_jax.flow.rows import at_instant, join_rows, point_of, split_rows, unconditional, velocity_of


@dataclasses.dataclass(frozen=True)
class Guidance:
    """The guidance of the target."""

    omega: float = 1.0  # factor of the sample's own velocity; 1 with kappa 0 is no guidance
    kappa: float = 0.0  # factor of the network's conditional velocity
    t_min: float = 0.0  # window of t that is guided
    t_max: float = 1.0
    of_dropped: bool = False  # guide rows without condition too; both v_hat are unconditional then
    fade: bool = False  # fade from t_max to t = 1; kappa's share holds at every t, and t_min is 0

    def __post_init__(self) -> None:
        check_fields("guidance", self, omega="[0, inf)", kappa="[0, 1)", t_max="[0, 1]")
        check_fields("guidance", self, t_min=f"[0, {self.t_max}]")
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
    """Guided velocities v_g of both sub-batches."""

    instant: Array
    interval: Array
    tangent: Array  # of the rows with r < t too, along which du/dt is taken
    own: Array | float  # v_hat of these rows, 0 where nobody asks for it


def guided_velocities(
    guidance: Guidance,
    field: Field,
    params: PyTree,
    draws: Draws,
    *,
    own_instant: Points,
    with_own: bool = False,
    read: Callable[[Prediction], Array] = operator.attrgetter("u"),
) -> Velocities:
    """Return the guided velocities of a step, for targets.

    Args:
      guidance: for rows whose own guidance was not drawn.
      own_instant: v_hat of the rows with r = t.
      with_own: whether v_hat of the rows with r < t is asked for.
      read: takes v_hat from a prediction at r = t.
    """
    instant, interval = draws.instant, draws.interval
    is_drawn = interval.guidance is not None
    needs_null = is_drawn or guidance.null_factor != 0
    needs_own = is_drawn or guidance.kappa != 0 or with_own
    asked = [_taught(rows, is_null=True) for rows in (instant, interval)] if needs_null else []
    asked += [_taught(interval)] * needs_own
    taught = []
    if asked:  # in one call
        z = join_rows([point_of(rows) for rows in asked])
        v_hat = read(at_instant(field, params, join_rows(asked), z))
        taught = split_rows(v_hat, [len(rows.t) for rows in asked])
    nulls = taught[:2] if needs_null else (0.0, 0.0)
    own = taught[-1] if needs_own else 0.0
    target = tangent = _guide(guidance, interval, own, nulls[1])
    if interval.tangent is not None:
        tangent = _guide(guidance, interval.replace(v=interval.tangent), own, nulls[1])
    return Velocities(_guide(guidance, instant, own_instant, nulls[0]), target, tangent, own)


def _is_inside(rows: Rows, window: Guidance | GuidanceScale) -> Bool[Array, "b"]:
    return (rows.t >= window.t_min) & (rows.t <= window.t_max)


def _guide(guidance: Guidance, rows: Rows, v_class: Array | float, v_null: Array | float) -> Array:
    v, drawn = velocity_of(rows), rows.guidance
    if drawn is None and guidance.is_off:
        return v
    inside = _is_inside(rows, drawn or guidance)
    if drawn is not None:
        guided = v + per_row(1 - 1 / drawn.omega, v) * (v_class - v_null)
    elif guidance.fade:
        inside = True
        left = jnp.clip((1 - rows.t) / max(1 - guidance.t_max, 1e-9), 0, 1 - 1e-6)
        fading = jnp.where(rows.t <= guidance.t_max, 1, 1 - jnp.exp(-0.025 * left / (1 - left)))
        against = per_row(fading, v) * guidance.null_factor
        guided = (1 - guidance.kappa) * v + guidance.kappa * v_class - against * (v - v_null)
    else:
        guided = guidance.omega * v + guidance.kappa * v_class + guidance.null_factor * v_null
    return jnp.where(per_row(inside & (guidance.of_dropped | ~rows.dropped), v), guided, v)


def _taught(rows: Rows, *, is_null: bool = False) -> Rows:
    """Return rows as a teacher sees them: the window is whole, without class the scale is 1."""
    if rows.guidance is not None:
        one = jnp.ones_like(rows.t)
        scale = jnp.where(_is_inside(rows, rows.guidance), rows.guidance.omega, 1)
        scale = one if is_null else scale
        rows = rows.replace(guidance=GuidanceScale(omega=scale, t_min=0 * one, t_max=one))
    return unconditional(rows) if is_null else rows
