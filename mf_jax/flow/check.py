"""A self-check of a caller's own network: which usual mistake does it look like?

A mistake often makes a field obey a rule of the average velocity read wrongly, so rules are
measured both ways. Which reading fits better names the mistake:

    direction, time_reversed   -u(z, t, t) or -u(z, 1 - t, 1 - t) is nearer to v = e - x
    exchanged                  u(z, t, r) adds up; a u fitted at z_r does the same
    partial_derivative         u obeys the identity with du/dt at fixed z

Source: MeanFlow, arXiv 2505.13447, equations 3 to 6; the mistakes are ones of public codes.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from mf_jax.flow.derivative import Derivative
from mf_jax.flow.diagnostics import additivity_gap, derivative_at, residual_of, rms, velocity_error
from mf_jax.flow.errors import BadInput
from mf_jax.flow.paths import velocity
from mf_jax.flow.records import Draws, Field, Rows
from mf_jax.flow.rows import join_rows, point_of, predict

_FLOOR = 0.01
"""Share of |v| below which a figure is as good as 0."""
_INF = float("inf")
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


class Findings(dict[str, float]):
    """Figures by name; a printed line has a figure, and what a large (or small) one means."""

    @property
    def problems(self) -> dict[str, str]:
        """Return the meaning of each figure that is outside its bounds."""
        bounds = {name: ITEMS[name][:2] for name in self}
        fine = {name for name, (low, high) in bounds.items() if low <= self[name] <= high}
        return {name: ITEMS[name][2] for name in self if name not in fine}

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
    if rows.t.shape[0] == 0:
        raise BadInput("draws: check needs rows with r < t; draw with instant_share below 1")
    field = jax.jit(field)
    both = join_rows([draws.instant, rows])
    size = rms(velocity(both.x, both.e), both)
    how, jvp_error = _derivative(field, params, rows)
    v, u, du_dt = derivative_at(field, params, rows, how=how)
    *_, at_fixed_z = derivative_at(field, params, rows, how=how, along=(0.0, 0.0, 1.0))
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

    floor, axes = _FLOOR * size, tuple(range(1, u.ndim))
    found["exchanged"] = gap / (additivity_gap(exchanged, params, rows) + floor)
    found["partial_derivative"] = residual / (residual_of(rows, v, u, at_fixed_z) + floor)
    norms = (jnp.sqrt(jnp.mean(a**2, axis=axes)) for a in (at_fixed_z, u))
    found["time_scale"] = jnp.median(next(norms) / (next(norms) + floor))
    found |= _condition_effect(field, params, rows)
    return Findings({name: float(value) for name, value in found.items()})


def _derivative(field: Field, params: PyTree, rows: Rows) -> tuple[Derivative, float | Array]:
    """Return the JVP and its relative error, or differences if there is no JVP."""
    jvp, central = Derivative("jvp"), Derivative("central")
    *_, difference = derivative_at(field, params, rows, how=central)
    try:
        *_, derivative = derivative_at(field, params, rows, how=jvp)
    except (TypeError, NotImplementedError):  # as JAX tells that there is no forward mode
        return central, jnp.inf
    size = jnp.maximum(rms(difference, rows), jnp.finfo(difference.dtype).tiny)
    return jvp, rms(derivative - difference, rows) / size


def _directions(field: Field, params: PyTree, rows: Rows) -> dict[str, Array]:
    """Return the cosine of u(z, t, t) and v, and how much better the reversed reading fits v."""
    z, v = point_of(rows), velocity(rows.x, rows.e)
    u, backward = (predict(field, params, rows, z, r=t, t=t).u for t in (rows.t, 1 - rows.t))
    *others, error = (jnp.sum((guess - v) ** 2) for guess in (u, -u, 0 * u, -backward))
    squares, tiny = jnp.sum(v**2), jnp.finfo(v.dtype).tiny
    return {
        "direction": jnp.sum(u * v) / jnp.sqrt(jnp.maximum(jnp.sum(u**2) * squares, tiny)),
        "time_reversed": (jnp.min(jnp.stack(others)) - error) / squares,
    }


def _condition_effect(field: Field, params: PyTree, rows: Rows) -> dict[str, Array]:
    """Return how much u changes under other rows' conditions or under none, relative to u."""
    rows = rows.replace(dropped=jnp.zeros_like(rows.dropped))
    own, other = rows.condition, jax.tree.map(lambda a: jnp.roll(a, 1, 0), rows.condition)
    differ = jax.tree.map(lambda a, b: bool(jnp.any(a != b)), own, other)
    others = [rows.replace(condition=other)] * any(jax.tree.leaves(differ))
    others += [rows.replace(dropped=~rows.dropped)] * (rows.null is not None)
    if not others:
        return {}
    z = point_of(rows)
    u, *changed = (
        predict(field, params, each, z, r=rows.r, t=rows.t).u for each in (rows, *others)
    )
    most = max(rms(change - u, rows) for change in changed)
    return {"condition_effect": most / jnp.maximum(rms(u, rows), jnp.finfo(u.dtype).tiny)}
