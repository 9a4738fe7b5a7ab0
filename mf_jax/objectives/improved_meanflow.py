"""Improved MeanFlow: the MeanFlow identity as a regression of the velocity.

1. The MeanFlow identity, read for v, says that V = u + (t - r) du/dt is the velocity.
2. The derivative du/dt is along the marginal velocity. A sample's v = e - x is not it, so the
   network's own velocity v_hat takes its place:

    loss = w |V - v_g|^2 + w |v_head - v_g|^2,   V = u + (t - r) sg[JVP of u along (v_hat, 0, 1)]

3. v_hat is a second head of the network (`velocity="head"`, trained by the second term), or
   u(z, t, t) (`velocity="boundary"`, without the second term).

The gradient passes through u alone, so |V - v_g|^2 is computed as |u - sg[v_g - (t - r) JVP]|^2.

FLOPs of a step in forward-equivalents of the whole batch, with a share q of rows r < t: 3 + 2 q;
guidance adds 1. Only the 3 includes the blocks of a second head.

Source: improved MeanFlow, arXiv 2512.02012, equations 12 to 16.
"""

import dataclasses
import operator
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from mf_jax.flow.derivative import Derivative
from mf_jax.flow.errors import BadInput, check_fields
from mf_jax.flow.guidance import Guidance, guided_velocities
from mf_jax.flow.paths import Points, per_row
from mf_jax.flow.records import Draws, Field, Prediction
from mf_jax.flow.rows import num_counted
from mf_jax.objectives import terms


def _head_velocity(prediction: Prediction) -> Points:
    if prediction.v is None:
        raise BadInput("objective.velocity='head': no second head; use boundary, Prediction(u, v)")
    return prediction.v


VELOCITIES = {"head": _head_velocity, "boundary": operator.attrgetter("u")}
"""Where the network's own velocity comes from."""


@dataclasses.dataclass(frozen=True)
class ImprovedMeanFlow(terms.Objective):
    """Regress the velocity that u and its derivative make; each term has its own weight."""

    guidance: Guidance = Guidance()
    weight: terms.AdaptiveWeight = terms.AdaptiveWeight()
    velocity: str = "head"  # a key of VELOCITIES
    derivative: Derivative = Derivative()
    has_tangent: ClassVar[bool] = False  # it takes the network's own velocity

    def __post_init__(self) -> None:
        check_fields("objective", self, velocity=VELOCITIES)

    @property
    def needs_second_head(self) -> bool:
        """See `Objective`."""
        return self.velocity == "head"

    def loss(self, field, params, draws, step=0, target_params=None) -> terms.Loss:
        """See `Objective.loss`."""
        return self.with_predictions(field, params, draws)[:2]

    def with_predictions(
        self, field: Field, params: PyTree, draws: Draws
    ) -> tuple[Float[Array, ""], terms.Metrics, tuple[Float[Array, "_ ..."], ...]]:
        """Return loss, metrics, and u of the rows with r = t and with r < t, with its gradient."""
        read, rows = VELOCITIES[self.velocity], draws.interval
        at_t = terms.at_instant(field, params, draws.instant)
        own = read(at_t)
        v = guided_velocities(
            self.guidance, field, params, draws, own_instant=own, with_own=True, read=read
        )
        at_r, du_dt = terms.with_derivative(field, params, rows, v.own, how=self.derivative)
        target = v.interval - per_row(rows.t - rows.r, du_dt) * du_dt
        pairs = (at_t.u, v.instant), (at_r.u, target)
        loss, metrics = self.weight.regression(draws, *pairs, du_dt)
        if self.needs_second_head:
            pairs = (own, v.instant), (read(at_r), v.interval)
            errors = [terms.squared_error(*pair) for pair in pairs]
            loss += self.weight.mean(draws, *errors)
            both = jax.tree.map(lambda *a: jnp.concatenate(a), draws.instant, draws.interval)
            error = jnp.concatenate(errors) / num_counted(both)
            metrics |= {"head_error": terms.average(error, rows=both)}
        return loss, metrics, (at_t.u, at_r.u)
