"""A self-check of a caller's own network: which usual mistake does it look like?

Boundary, identity and additivity hold for every average velocity. A mistake often makes the field
obey the same rule read differently, so each rule is measured both ways:

    sign              -u(z, t, t) is nearer to v = e - x than u(z, t, t)
    time reversed     -u(z, 1 - t, 1 - t) is nearer
    r and t exchanged u(z, t, r) adds up, u(z, r, t) does not; u fitted at z_r does the same
    v . du/dz left out  u obeys the identity with the derivative in t alone

Source: MeanFlow, arXiv 2505.13447, equations 3 to 6; the mistakes are ones of public codes.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from mf_jax.errors import BadInput
from mf_jax.flow.derivative import Derivative
from mf_jax.flow.diagnostics import additivity_gap, derivative_at, residual_of, rms, velocity_error
from mf_jax.flow.paths import interpolate, velocity
from mf_jax.flow.records import Draws, Field, Rows
from mf_jax.flow.rows import join_rows, predict

_FLOOR = 0.01
"""Share of |v| below which a figure is as good as 0."""


class Item(NamedTuple):
    """What a figure means: the mistake where it is beyond a bound, above it unless `is_below`."""

    bound: float
    meaning: str
    is_below: bool = False


ITEMS = {
    "boundary_error": Item(1.0, "u(z, t, t) is further from e - x than 0 is, or untrained"),
    "identity_residual": Item(0.5, "u is not v - (t - r) du/dt: untrained, or one of those below"),
    "additivity_gap": Item(0.5, "one step is not two: untrained, or one of those below"),
    "exact_error": Item(0.5, "u is far from the exact field"),
    "jvp_error": Item(
        0.1, "JVP and central difference differ: a wrong or no derivative rule, or bfloat16"
    ),
    "direction": Item(
        -0.1,
        "flipped end: u points from noise to data, x - e; negate it, or see time_reversed",
        True,
    ),
    "time_reversed": Item(
        0.1, "flipped end: the network takes t = 0 for noise; tell it 1 - t, 1 - r, negate u"
    ),
    "exchanged": Item(2.0, "r and t are exchanged, or u was fitted at z_r and is used at z_t"),
    "partial_derivative": Item(2.0, "fitted with du/dt at fixed z: v . du/dz was left out"),
    "time_scale": Item(50.0, "|du/dt| far above |u|: t is scaled, by 1000 in many embeddings"),
    "condition_effect": Item(
        1e-3, "another condition changes nothing: not used, or untrained", True
    ),
}


class Findings(dict[str, float]):
    """Figures by name; `problems` are those that look like a mistake, with its meaning."""

    @property
    def problems(self) -> dict[str, str]:
        """Return the meaning of each figure beyond its bound, or not finite."""
        return {name: ITEMS[name].meaning for name, value in self.items() if _is_bad(name, value)}

    def __str__(self) -> str:
        problems = self.problems
        lines = [
            f"{'!' if name in problems else ' '} {name:<19}{value:>10.4g}   "
            f"{'small' if ITEMS[name].is_below else 'large'}: {ITEMS[name].meaning}"
            for name, value in self.items()
        ]
        return "\n".join([*lines, f"{len(problems)} of {len(lines)} look wrong (marked !)"])

    __repr__ = __str__


def _is_bad(name: str, value: float) -> bool:
    bound, _, is_below = ITEMS[name]
    return not (value >= bound if is_below else value <= bound)


def check(field: Field, params: PyTree, draws: Draws, *, exact: Field | None = None) -> Findings:
    """Return how a field stands to the rules of an average velocity; `print` says what is wrong.

    A trained network is needed for all but `jvp_error`, `time_scale` and `condition_effect`. Some
    256 rows or more make the figures steady. Times of the draws are the times that are checked.

    Args:
      field: as an objective takes it.
      draws: of `DrawScheme.draw`, with rows of r < t.
      exact: a field that is right, such as a closed form or a teacher, given the same arguments.

    Returns:
      A dict of floats. Figures are relative to the size of v = e - x: boundary_error,
      identity_residual, additivity_gap, exact_error. jvp_error and condition_effect are relative
      to du/dt and u. direction is a cosine, time_reversed a share of v's square, exchanged and
      partial_derivative say how many times better the wrong reading fits, time_scale is
      |du/dt| / |u| at fixed z, the median over rows.

    Raises:
      BadInput: without rows with r < t.
    """
    rows = draws.interval
    if rows.t.shape[0] == 0:
        raise BadInput("draws: check needs rows with r < t; draw with instant_share below 1")
    field = jax.jit(field)
    both = join_rows([draws.instant, rows])
    size = rms(velocity(both.x, both.e), both)
    found = {"boundary_error": velocity_error(field, params, both) / size}
    derivative, jvp_error = _derivative(field, params, rows)
    v, u, du_dt = derivative()
    _, _, at_fixed_z = derivative(along=(0.0, 0.0, 1.0))
    residual, gap = residual_of(rows, v, u, du_dt), additivity_gap(field, params, rows)
    found |= {"identity_residual": residual / size, "additivity_gap": gap / size}
    if exact is not None:
        z = interpolate(rows.x, rows.e, t=rows.t)
        truth = predict(exact, params, rows, z, r=rows.r, t=rows.t).u
        found["exact_error"] = rms(u - truth, rows) / size
    found["jvp_error"] = jvp_error
    found |= _directions(field, params, both)
    floor = _FLOOR * size
    exchanged = additivity_gap(_exchange(field), params, rows)
    partial = residual_of(rows, v, u, at_fixed_z)
    found["exchanged"] = gap / (exchanged + floor)
    found["partial_derivative"] = residual / (partial + floor)
    found["time_scale"] = jnp.median(_norms(at_fixed_z) / (_norms(u) + floor))
    found |= _condition_effect(field, params, rows)
    return Findings({name: float(value) for name, value in found.items()})


def _norms(a: Array) -> Array:
    return jnp.sqrt(jnp.mean(a.reshape(len(a), -1) ** 2, axis=1))


def _exchange(field: Field) -> Field:
    return lambda params, z, *, r, t, condition: field(params, z, r=t, t=r, condition=condition)


def _derivative(
    field: Field, params: PyTree, rows: Rows
) -> tuple[Callable[..., tuple[Array, Array, Array]], float | Array]:
    """Return how derivatives are taken, by JVP if there is one, and the JVP's relative error."""

    def by(kind: str) -> Callable[..., tuple[Array, Array, Array]]:
        return lambda **more: derivative_at(field, params, rows, how=Derivative(kind), **more)

    *_, difference = by("central")()
    try:
        *_, derivative = by("jvp")()
    except (TypeError, NotImplementedError):  # as JAX tells that there is no forward mode
        return by("central"), jnp.inf
    size = jnp.maximum(rms(difference, rows), jnp.finfo(difference.dtype).tiny)
    return by("jvp"), rms(derivative - difference, rows) / size


def _directions(field: Field, params: PyTree, rows: Rows) -> dict[str, Array]:
    """Return the cosine of u(z, t, t) and v, and how much better the reversed reading fits v."""
    z, v = interpolate(rows.x, rows.e, t=rows.t), velocity(rows.x, rows.e)
    back = 1 - rows.t
    u = predict(field, params, rows, z, r=rows.t, t=rows.t).u
    reversed_u = -predict(field, params, rows, z, r=back, t=back).u
    *others, error = (jnp.sum((guess - v) ** 2) for guess in (u, -u, 0 * u, reversed_u))
    more = (jnp.min(jnp.stack(others)) - error) / jnp.sum(v**2)
    tiny = jnp.finfo(v.dtype).tiny
    cosine = jnp.sum(u * v) / jnp.sqrt(jnp.maximum(jnp.sum(u**2) * jnp.sum(v**2), tiny))
    return {"direction": cosine, "time_reversed": more}


def _condition_effect(field: Field, params: PyTree, rows: Rows) -> dict[str, Array]:
    """Return how much u changes under other rows' conditions or under none, relative to u."""
    rows = rows.replace(dropped=jnp.zeros_like(rows.dropped))
    others = [rows.replace(condition=jax.tree.map(lambda a: jnp.roll(a, 1, 0), rows.condition))]
    if rows.null is not None:
        others.append(rows.replace(dropped=~rows.dropped))
    told = [jax.tree.leaves(other.condition) for other in (rows, others[0])]
    differ = any(bool(jnp.any(a != b)) for a, b in zip(*told, strict=True))
    if not told[0] or (not differ and rows.null is None):
        return {}
    z = interpolate(rows.x, rows.e, t=rows.t)
    u, *changed = (
        predict(field, params, each, z, r=rows.r, t=rows.t).u for each in (rows, *others)
    )
    most = max(rms(other - u, rows) for other in changed)
    return {"condition_effect": most / jnp.maximum(rms(u, rows), jnp.finfo(u.dtype).tiny)}
