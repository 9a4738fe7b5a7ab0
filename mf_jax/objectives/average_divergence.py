"""Average divergence: the likelihood of a sample drawn in one step.

1. Along the flow, d log p_t(z_t)/dt = -div v(z_t, t).
2. With q(z_t, r, t) the average of div v from r to t,  log p_r(z_r) = log p_t(z_t) + (t - r) q.
3. As in MeanFlow, differentiating (t - r) q by t gives  q = div v - (t - r) dq/dt. Hence

    loss = w |q - sg[div u(z_t, t, t) - (t - r) dq/dt]|^2,   dq/dt along (u(z_t, t, t), 0, 1)

The divergence is n . (du/dz n), n random of length sqrt(D), D the counted entries of a row: exact
where du/dz is a multiple of the identity.

FLOPs of a step: a forward, a backward and a tangent of q, a forward and a tangent of u.

Source: MFPO, arXiv 2604.14698; the estimate of the divergence, FFJORD, arXiv 1810.01367.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from mf_jax.flow.derivative import Derivative
from mf_jax.flow.errors import BadInput
from mf_jax.flow.paths import Points, Scalars, advance, per_row
from mf_jax.flow.records import Draws, Field
from mf_jax.flow.rows import call, condition_of, join_rows, mask_of, num_counted, point_of, predict
from mf_jax.objectives import terms


@dataclasses.dataclass(frozen=True)
class AverageDivergence:
    """Regress `q(params, z, *, r, t, condition) -> [B]`, the average divergence of a trained u."""

    weight: terms.AdaptiveWeight = terms.AdaptiveWeight(p=0.0)
    derivative: Derivative = Derivative()  # of dq/dt; the divergence is always a JVP of u

    def loss(
        self, q: Any, params: PyTree, draws: Draws, *, flow: Field, flow_params: PyTree
    ) -> terms.Loss:
        """Return loss and metrics of one step of q's parameters; `flow`, u, gets no gradient."""
        rows = join_rows([draws.instant, draws.interval])
        axes, tiny = tuple(range(1, rows.x.ndim)), jnp.finfo(rows.x.dtype).tiny
        scale = num_counted(rows) / (jnp.sum(rows.direction**2, axis=axes) + tiny)
        n = rows.direction * per_row(jnp.sqrt(scale), rows.x)
        forward = rows.replace(forward_mode=True)

        def velocity(z: Array) -> Array:
            return predict(flow, flow_params, forward, z, r=rows.t, t=rows.t).u

        v, du_dn = jax.lax.stop_gradient(jax.jvp(velocity, (point_of(rows),), (n,)))
        divergence = jnp.sum(n * du_dn, axis=axes)
        condition, one = condition_of(rows), jnp.ones_like(rows.t)

        def of_point(params: PyTree, z: Array, r: Array, t: Array) -> tuple[Array, Array]:
            value = _checked(q(params, z, r=r, t=t, condition=condition), t)
            return value, value

        point = point_of(rows), rows.r, rows.t
        value, slope = self.derivative.along(of_point, params, point, (v, 0 * one, one))
        error = terms.squared_error(value, divergence - (rows.t - rows.r) * slope)
        numbers = rows.replace(x=value[:, None], mask=None)  # a row is its q alone
        loss = terms.row_mean(self.weight(error, numbers))
        return loss, terms.binned_errors("q_error", error, numbers)

    def log_likelihood(
        self,
        q: Any,
        params: PyTree,
        e: Points,
        condition: PyTree = None,
        *,
        flow: Field,
        flow_params: PyTree,
        mask: Array | None = None,
    ) -> tuple[Points, Scalars]:
        """Return samples x = e - u(e, 0, 1) of standard normal e, and log p(x) in nats.

        A mask, bool that broadcasts to e, says which numbers count.
        """
        e = e.astype(jnp.promote_types(e.dtype, jnp.float32))
        shown = mask_of(mask, e)
        shown = jnp.ones(e.shape, bool) if shown is None else shown
        e = jnp.where(shown, e, 0)
        t = jnp.ones(e.shape[:1], e.dtype)
        told = {"r": 0 * t, "t": t, "condition": condition}
        x = advance(e, call(flow, flow_params, e, shown, **told).u, r=0 * t, t=t)
        of_numbers = jnp.where(shown, jax.scipy.stats.norm.logpdf(e), 0)
        of_noise = jnp.sum(of_numbers, axis=tuple(range(1, e.ndim)))
        return x, of_noise + _checked(q(params, e, **told), t)


def _checked(value: Array, t: Scalars) -> Scalars:
    if value.shape != t.shape:
        raise BadInput(f"q: is {value.shape}; return a number for each row {t.shape}")
    return value
