"""How well a network obeys the identities of an average velocity, and a self-check of one.

Figures are root mean squares per counted number, in units of the velocity.

A usual mistake makes a field obey a rule of the average velocity read wrongly. So `check` measures
rules both ways, and which reading fits better names the mistake:

    direction, time_reversed   -u(z, t, t) or -u(z, 1 - t, 1 - t) is nearer to v = e - x
    exchanged                  u(z, t, r) adds up; a u fitted at z_r does the same
    partial_derivative         u obeys the identity with du/dt at fixed z

Source: MeanFlow, arXiv 2505.13447, section 4.1 and equations 3 to 6; the mistakes are ones of
public codes.
"""

import contextlib

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from mf_jax.flow.derivative import Derivative, with_derivative
from mf_jax.flow.errors import BadInput
from mf_jax.flow.paths import Points, advance, per_row, velocity
from mf_jax.flow.records import Draws, Field, Rows
from mf_jax.flow.rows import at_instant, join_rows, point_of, predict

_FLOOR = 0.01  # share of |v| below which a figure is as good as 0
_INF, _TINY = float("inf"), float(jnp.finfo(jnp.float32).tiny)
ITEMS = {
    "boundary_error": (0, 1.0, "u(z, t, t) is further from e - x than 0 is"),
    "identity_residual": (0, 0.5, "u is not v - (t - r) du/dt: untrained, or a mistake below"),
    "additivity_gap": (0, 0.5, "one step is not two: untrained, or a mistake below"),
    "exact_error": (0, 0.5, "u is far from the exact field"),
    "jvp_error": (0, 0.1, "JVP is no central difference: wrong or no derivative rule, or bfloat16"),
    "direction": (-0.1, _INF, "flipped end: u goes from noise to data, x - e; see time_reversed"),
    "time_reversed": (-_INF, 0.1, "flipped end: t = 0 is noise to the network; tell it 1 - t, -u"),
    "exchanged": (0, 2.0, "r and t are exchanged, or u was fitted at z_r and is used at z_t"),
    "partial_derivative": (0, 2.0, "fitted with du/dt at fixed z: v . du/dz was left out"),
    "time_scale": (0, 50.0, "|du/dt| far above |u|: t is scaled, by 1000 in many embeddings"),
    "condition_effect": (1e-3, _INF, "another condition changes nothing: not used, or untrained"),
}
"""What a figure is within where all is well, and what another one means."""


def rms(a: Points, rows: Rows) -> Float[Array, ""]:
    """Return the root mean square of an array like x, which is 0 where a mask hides."""
    if rows.mask is None:
        return jnp.sqrt(jnp.mean(a**2))
    return jnp.sqrt(jnp.sum(a**2) / jnp.maximum(jnp.sum(rows.mask), 1))


def velocity_error(field: Field, params: PyTree, rows: Rows) -> Float[Array, ""]:
    """Return the size of u(z, t, t) - v; the spread of v given z keeps it above 0."""
    return rms(at_instant(field, params, rows).u - velocity(rows.x, rows.e), rows)


def derivative_at(
    field: Field, params: PyTree, rows: Rows, *, how: Derivative = Derivative(), dz: float = 1.0
) -> tuple[Points, Points, Points]:
    """Return v = u(z, t, t), u(z, r, t), and du/dt with dz v the velocity of z."""
    v = at_instant(field, params, rows).u
    prediction, du_dt = with_derivative(field, params, rows, v, tangent=(dz, 0.0, 1.0), how=how)
    return v, prediction.u, du_dt


def identity_residual(field: Field, params: PyTree, rows: Rows) -> Float[Array, ""]:
    """Return the size of u - (v - (t - r) du/dt) with the network's own velocity v = u(z, t, t)."""
    return residual_of(rows, *derivative_at(field, params, rows))


def residual_of(rows: Rows, v: Array, u: Array, du_dt: Array) -> Float[Array, ""]:
    """Return the size of the same from its terms."""
    return rms(u - (v - per_row(rows.t - rows.r, u) * du_dt), rows)


def additivity_gap(field: Field, params: PyTree, rows: Rows) -> Float[Array, ""]:
    """Return how far one step from t to r ends from two steps by way of the middle."""

    def step(z: Array, *, r: Array, t: Array) -> Array:
        return advance(z, predict(field, params, rows, z, r=r, t=t).u, r=r, t=t)

    z = point_of(rows)
    s = (rows.r + rows.t) / 2
    return rms(step(z, r=rows.r, t=rows.t) - step(step(z, r=s, t=rows.t), r=rows.r, t=s), rows)


class Findings(dict[str, float]):
    """Figures by name; a printed line has a figure, and what a large (or small) one means."""

    @property
    def problems(self) -> dict[str, str]:
        """Return the meaning of each figure that is outside its bounds."""
        bounds = {name: ITEMS[name] for name in self}
        return {k: told for k, (low, high, told) in bounds.items() if not low <= self[k] <= high}

    def __str__(self) -> str:
        lines = [
            f"{'!' if name in self.problems else ' '} {name:<19}{value:>10.4g}   "
            f"{'large' if ITEMS[name][1] < _INF else 'small'}: {ITEMS[name][2]}"
            for name, value in self.items()
        ]
        return "\n".join([*lines, f"{len(self.problems)} of {len(lines)} look wrong (marked !)"])

    __repr__ = __str__


def check(field: Field, params: PyTree, draws: Draws, *, exact: Field | None = None) -> Findings:
    """Return figures of a network as floats; `print` them to read what is wrong.

    The first four are relative to |e - x|. jvp_error and condition_effect are relative to du/dt and
    u, direction is a cosine, time_reversed a share of |e - x|^2. exchanged and partial_derivative
    say how many times better the wrong reading fits. time_scale is |du/dt| / |u| at fixed z.

    Args:
      field: trained, for all but jvp_error and time_scale; as an objective takes it.
      draws: of `DrawScheme.draw`, 256 rows or more; BadInput without rows of r < t.
      exact: a right field, such as a closed form or a teacher, called with the same arguments.
    """
    rows = draws.interval
    if len(rows.t) == 0:
        raise BadInput("draws: check needs rows with r < t; draw with instant_share below 1")
    field = jax.jit(field)
    both = join_rows([draws.instant, rows])
    size = rms(velocity(both.x, both.e), both)
    how, jvp_error = Derivative("central"), jnp.inf
    v, u, du_dt = derivative_at(field, params, rows, how=how)
    with contextlib.suppress(TypeError, NotImplementedError):  # of a field without forward mode
        *_, derivative = derivative_at(field, params, rows)
        jvp_error = rms(derivative - du_dt, rows) / jnp.maximum(rms(du_dt, rows), _TINY)
        how, du_dt = Derivative("jvp"), derivative
    residual, gap = residual_of(rows, v, u, du_dt), additivity_gap(field, params, rows)
    found = {
        "boundary_error": velocity_error(field, params, both) / size,
        "identity_residual": residual / size,
        "additivity_gap": gap / size,
    }
    if exact is not None:
        truth = predict(exact, params, rows, point_of(rows), r=rows.r, t=rows.t).u
        found["exact_error"] = rms(u - truth, rows) / size
    found |= {"jvp_error": jvp_error, **_directions(field, params, both)}

    def exchanged(params: PyTree, z: Array, *, r: Array, t: Array, condition: PyTree) -> Array:
        return field(params, z, r=t, t=r, condition=condition)

    *_, at_fixed_z = derivative_at(field, params, rows, how=how, dz=0.0)
    floor, axes = _FLOOR * size, tuple(range(1, u.ndim))
    found["exchanged"] = gap / (additivity_gap(exchanged, params, rows) + floor)
    found["partial_derivative"] = residual / (residual_of(rows, v, u, at_fixed_z) + floor)
    slope, norm = (jnp.sqrt(jnp.mean(a**2, axis=axes)) for a in (at_fixed_z, u))
    found["time_scale"] = jnp.median(slope / (norm + floor))
    found |= _condition_effect(field, params, rows)
    return Findings({name: float(value) for name, value in found.items()})


def _directions(field: Field, params: PyTree, rows: Rows) -> dict[str, Array]:
    """Return the cosine of u(z, t, t) and v, and how much better the reversed reading fits v."""
    z, v = point_of(rows), velocity(rows.x, rows.e)
    u, backward = (predict(field, params, rows, z, r=t, t=t).u for t in (rows.t, 1 - rows.t))
    *others, error = (jnp.sum((guess - v) ** 2) for guess in (u, -u, 0 * u, -backward))
    squares = jnp.sum(v**2)
    return {
        "direction": jnp.sum(u * v) / jnp.sqrt(jnp.maximum(jnp.sum(u**2) * squares, _TINY)),
        "time_reversed": (jnp.min(jnp.stack(others)) - error) / squares,
    }


def _condition_effect(field: Field, params: PyTree, rows: Rows) -> dict[str, Array]:
    """Return how much u changes under other rows' conditions or under none, relative to u."""
    rows = rows.replace(dropped=jnp.zeros_like(rows.dropped))
    other = jax.tree.map(lambda a: jnp.roll(a, 1, 0), rows.condition)
    differ = jax.tree.map(lambda a, b: bool(jnp.any(a != b)), rows.condition, other)
    others = [rows.replace(condition=other)] * any(jax.tree.leaves(differ))
    others += [rows.replace(dropped=~rows.dropped)] * (rows.null is not None)
    if not others:
        return {}
    u, *changed = (
        predict(field, params, each, point_of(rows), r=rows.r, t=rows.t).u
        for each in (rows, *others)
    )
    most = max(rms(change - u, rows) for change in changed)
    return {"condition_effect": most / jnp.maximum(rms(u, rows), _TINY)}
