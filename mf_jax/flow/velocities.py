"""Estimates of the flow's velocity, for targets and for the direction of du/dt.

A row's own v = e - x is one draw; the velocity of the flow is its mean over all rows that pass
through z_t. An estimate v_est of this mean takes the place of a share of v:

    v_a = v + target (v_est - v)      in the target
    v_b = v + tangent (v_est - v)     in the tangent (v_b, 0, 1), and along finite steps

The plug-in estimate knows some data x_j, of the row's condition where it was not dropped:

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
from jaxtyping import Array, Bool, Float, PyTree

from mf_jax.flow.errors import BadInput, check_known, check_within
from mf_jax.flow.paths import Points, per_row, velocity
from mf_jax.flow.records import Draws, Field, Rows
from mf_jax.flow.rows import point_of, predict

PLUG_INS = ("batch", "data")
"""Sums over data, for which noise and data must be independent."""
SOURCES = ("sample", *PLUG_INS, "network", "average")


@dataclasses.dataclass(frozen=True)
class VelocityEstimate:
    """Which estimate of the flow's velocity takes part, and where.

    Args:
      source: `sample` (v itself), `batch` or `data` (plug-in over the rows of a step, or over
        `data`), `network` or `average` (u(z, t, t) by its parameters or by those of targets).
      target, tangent: shares in [0, 1]; rows with r = t keep v where the network is its own source.
      of_rows: each row takes part whole or not at all, with the share as probability.
      noise_scale: of the draws, which a plug-in must know.
      data: of `data`, `[m, ...]` like x.
      labels: of `data`, a condition for each; None where rows have none.
    """

    source: str = "sample"
    target: float = 0.0
    tangent: float = 0.0
    of_rows: bool = False
    noise_scale: float = 1.0
    data: Any = dataclasses.field(default=None, repr=False, compare=False)
    labels: Any = dataclasses.field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        check_known("velocity.source", self.source, SOURCES)
        for name in ("target", "tangent"):
            check_within(f"velocity.{name}", getattr(self, name), 0, 1)

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

        def told(rows: Rows, *, is_interval: bool) -> Rows:
            v, has_target = velocity(rows.x, rows.e), is_interval or self.source != "network"
            if not rows.t.shape[0] or not (is_interval or (has_target and self.target)):
                return rows.replace(v=v, tangent=v)
            if self.source in ("network", "average"):
                away = predict(field, params, rows, point_of(rows), r=rows.t, t=rows.t).u - v
            else:
                away = _plug_in(rows, *self._known(draws), self.noise_scale)
            away = jax.lax.stop_gradient(away)
            shares = jnp.full_like(rows.t, self.target), jnp.full_like(rows.t, self.tangent)
            if self.of_rows:
                shares = ((rows.fraction < share).astype(rows.t.dtype) for share in shares)
            target, tangent = (v + per_row(share, v) * away for share in shares)
            return rows.replace(v=target if has_target else v, tangent=tangent)

        return Draws(told(draws.instant, is_interval=False), told(draws.interval, is_interval=True))

    def _known(self, draws: Draws) -> tuple[Float[Array, "m ..."], PyTree]:
        if self.source == "data":
            if self.data is None:
                raise BadInput("velocity.source='data': knows no data; give VelocityEstimate(data)")
            own, rows = (jnp.asarray(self.data), self.labels), draws.interval
            told, theirs = (jax.tree.map(_row_shape, x) for x in (own, (rows.x, rows.condition)))
            if told != theirs:
                problem = f"data and labels of shapes {told} for x and condition of {theirs}"
                raise BadInput(f"velocity.source='data': {problem}; give one of each for each row")
            return own
        both = jax.tree.map(lambda *a: jnp.concatenate(a), draws.instant, draws.interval)
        return both.x, both.condition


def _row_shape(array: Any) -> tuple[int, ...]:
    return jnp.shape(array)[1:]


def _plug_in(rows: Rows, x: Float[Array, "m ..."], condition: PyTree, noise_scale: float) -> Points:
    """Return v_est - v of the module's head, given data and their conditions."""
    z, one, axes = point_of(rows), rows.t[:, None], tuple(range(1, x.ndim))
    if rows.mask is not None:  # x and e are 0 where it hides them
        squares = jnp.tensordot(rows.mask.astype(x.dtype), x**2, (axes, axes), precision="highest")
    else:
        squares = jnp.sum(x**2, axis=axes)[None]
    products = jnp.tensordot(z, x, (axes, axes), precision="highest")
    distances = (1 - one) * ((1 - one) * squares - 2 * products)  # but for |z|^2, alike for all j
    tiny = jnp.finfo(x.dtype).tiny ** 0.5
    logits = -distances / (2 * jnp.maximum(noise_scale * one, tiny) ** 2)
    weights = jax.nn.softmax(logits, axis=1, where=_are_alike(rows, condition))
    mean = jnp.tensordot(weights, x, 1, precision="highest")
    return (rows.x - mean) / per_row(jnp.maximum(rows.t, tiny), mean)


def _are_alike(rows: Rows, condition: PyTree) -> Bool[Array, "b m"] | None:
    """Return which conditions are those of rows; rows without theirs are alike to all."""
    if condition is None or rows.condition is None:
        return None
    alike = rows.dropped[:, None]
    same = True
    for own, other in zip(jax.tree.leaves(rows.condition), jax.tree.leaves(condition), strict=True):
        pairs = own[:, None] == jnp.asarray(other)[None]
        same &= jnp.all(pairs.reshape(*pairs.shape[:2], -1), axis=2)
    return alike | same
