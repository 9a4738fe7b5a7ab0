"""Estimates of the flow's velocity, for targets and for the direction of du/dt.

A row's own v = e - x is one draw; the velocity of the flow is its mean over all rows that pass
through z_t. An estimate v_est of this mean takes the place of a share of v:

    v_a = v + target (v_est - v)      in the target
    v_b = v + tangent (v_est - v)     in the tangent (v_b, 0, 1), and along finite steps

The plug-in estimate knows some data x_j, of the row's mask and, where not dropped, its condition:

    v_est = v + sum_j w_j (x - x_j) / t,   w = softmax_j(-|z_t - (1 - t) x_j|^2 / (2 t^2))

Over all data it is the velocity of the flow that ends at them. Over a batch its mean is the
velocity too: among the data is the row's own x, which z_t came from. Without it few data would be
biased, since w is normalised by them.

FLOPs: `network` and `average` take one forward of the rows with r < t, and `average` one of the
others too where its share of the target is above 0.

Source: ESC, arXiv 2512.11831 (batch, both shares 0.2 of the rows); variance-reduced MeanFlow, arXiv
2605.09235 (tangent alone); improved MeanFlow, arXiv 2512.02012 (network, tangent 1).
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, PyTree

from mf_jax.flow.errors import BadInput, check_fields
from mf_jax.flow.paths import Points, per_row, velocity
from mf_jax.flow.records import Draws, Field, GuidanceScale, Rows
from mf_jax.flow.rows import at_instant, point_of

PLUG_INS = ("batch", "data")
"""Sums over data, for which noise and data must be independent."""
SOURCES = ("sample", *PLUG_INS, "network", "average")
Known = tuple[Array, PyTree, Array | None]
"""Data of a plug-in, their conditions and masks."""


@dataclasses.dataclass(frozen=True, eq=False)  # which data it knows is not to be forgotten
class VelocityEstimate:
    """Which estimate of the flow's velocity takes part, and where."""

    # `sample` (v itself), `batch` or `data` (plug-in over the rows that a device computes at once,
    # or over `data`), `network` or `average` (u(z, t, t) by its parameters or by those of targets,
    # told the scale 1 where guidance is drawn)
    source: str = "sample"
    target: float = 0.0  # share; rows with r = t keep v where the network is its own source
    tangent: float = 0.0
    of_rows: bool = False  # each row takes part whole or not at all, with the share as probability
    noise_scale: float = 1.0  # of the draws, which a plug-in must know
    # of the source `data`: `[m, ...]` like x, with a condition and a mask for each where rows have
    data: Any = dataclasses.field(default=None, repr=False)
    labels: Any = dataclasses.field(default=None, repr=False)
    mask: Any = dataclasses.field(default=None, repr=False)

    def __post_init__(self) -> None:
        check_fields("velocity", self, source=SOURCES, target="[0, 1]", tangent="[0, 1]")

    @property
    def is_off(self) -> bool:
        """Whether every row keeps its own v."""
        return self.source == "sample" or self.target == self.tangent == 0

    def estimated(
        self, field: Field, params: PyTree, draws: Draws, target_params: PyTree = None
    ) -> Draws:
        """Return draws whose rows know v_a and v_b, for the target and for the tangent."""
        if self.is_off:
            return draws
        params = target_params if self.source == "average" else params

        def told(rows: Rows, *, is_asked: bool = True) -> Rows:
            v = velocity(rows.x, rows.e)
            if not is_asked or len(v) == 0:
                return rows.replace(v=v, tangent=v)
            if self.source in PLUG_INS:
                away = _plug_in(rows, self._known(draws), self.noise_scale)
            else:
                plain = rows
                if rows.guidance is not None:  # v, of which the target makes the guided one
                    one = jnp.ones_like(rows.t)
                    plain = rows.replace(guidance=GuidanceScale(one, 0 * one, one))
                away = at_instant(field, params, plain).u - v
            away = jax.lax.stop_gradient(away)
            shares = jnp.full_like(rows.t, self.target), jnp.full_like(rows.t, self.tangent)
            if self.of_rows:
                own = rows.fraction * 1024 % 1  # independent of what the objective places by it
                shares = ((own < share).astype(rows.t.dtype) for share in shares)
            target, tangent = (v + per_row(share, v) * away for share in shares)
            return rows.replace(v=target, tangent=tangent)

        has_instant = self.target > 0 and self.source != "network"
        return Draws(told(draws.instant, is_asked=has_instant), told(draws.interval))

    def _known(self, draws: Draws) -> Known:
        if self.source == "batch":
            both = jax.tree.map(lambda *a: jnp.concatenate(a), draws.instant, draws.interval)
            return both.x, both.condition, both.mask
        if self.data is None:
            raise BadInput("velocity.source='data': knows no data; give VelocityEstimate(data)")
        rows, x = draws.interval, jnp.asarray(self.data)
        known = x, self.labels, self.mask
        both = (rows.x, rows.condition, rows.mask), known
        theirs, ours = (jax.tree.map(lambda a: jnp.shape(a)[1:], each) for each in both)
        if ours != theirs:
            shapes = f"{ours} for x, condition and mask of {theirs}; give one for each row"
            raise BadInput(f"velocity.source='data': data, labels and mask are of {shapes}")
        return known if self.mask is None else (jnp.where(self.mask, x, 0), *known[1:])


def _plug_in(rows: Rows, known: Known, noise_scale: float) -> Points:
    """Return v_est - v of the module's head; it is 0 for a row that no datum is like."""
    x, *others = known
    z, one, axes = point_of(rows), rows.t[:, None], tuple(range(1, x.ndim))
    squares = jnp.sum(x**2, axis=axes)[None]
    products = jnp.tensordot(z, x, (axes, axes), precision="highest")
    distances = (1 - one) * ((1 - one) * squares - 2 * products)  # but for |z|^2, alike for all j
    tiny = jnp.finfo(x.dtype).tiny ** 0.5
    logits = -distances / (2 * jnp.maximum(noise_scale * one, tiny) ** 2)
    alike = _are_alike(rows, *others)
    weights = jax.nn.softmax(logits, axis=1, where=alike)
    mean = jnp.tensordot(weights, x, 1, precision="highest")
    away = (rows.x - mean) / per_row(jnp.maximum(rows.t, tiny), mean)
    return jnp.where(per_row(alike.any(axis=1), away), away, 0)


def _are_alike(rows: Rows, condition: PyTree, mask: Array | None) -> Bool[Array, "b #m"]:
    """Return which data have a row's mask and condition; a row without its own fits them all."""
    alike = jnp.ones((len(rows.t), 1), bool)
    for own, other in zip(jax.tree.leaves(rows.condition), jax.tree.leaves(condition), strict=True):
        pairs = own[:, None] == jnp.asarray(other)[None]
        alike &= jnp.all(pairs.reshape(*pairs.shape[:2], -1), axis=2)
    alike |= rows.dropped[:, None]
    if mask is not None:
        ours, theirs = (m.reshape(len(m), -1).astype(rows.x.dtype) for m in (rows.mask, mask))
        alike &= ours @ theirs.T == jnp.maximum(ours.sum(1)[:, None], theirs.sum(1))
    return alike
