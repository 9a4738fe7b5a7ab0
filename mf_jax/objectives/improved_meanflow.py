"""Improved MeanFlow: the MeanFlow identity as a regression of the velocity, whose tangent the network predicts itself.

1. The MeanFlow identity, read for v, says that V = u + (t - r) du/dt is the velocity.
2. The derivative du/dt is along the marginal velocity, which a sample's own v = e - x is not; the network's own
   velocity v_hat takes its place:

    loss = w |V - v_g|^2 + w |v_head - v_g|^2,   V = u + (t - r) sg[JVP of u along (v_hat, 0, 1)]

3. v_hat is a second head of the network (`velocity="head"`, which the second term trains), or u(z, t, t)
   (`velocity="boundary"`, without the second term).

The gradient passes through u alone, so |V - v_g|^2 is computed as |u - sg[v_g - (t - r) JVP]|^2. Guidance v_g, where
its scale is drawn for each row and told to the network, is chosen at sampling time (mf_jax/flow/guidance.py).

Cost of a step in forward-equivalents of the whole batch, with a share q of rows with r < t: 3 + 2 q; guidance adds 1.
With a second head, a forward-equivalent of the 3 is one of the whole network, and of the others one of the blocks that
lead to a single head.

Source: improved MeanFlow, arXiv 2512.02012, equations 12 to 16.
"""

import dataclasses
import math
from collections.abc import Callable

import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PyTree

from mf_jax.errors import BadInput
from mf_jax.flow.guidance import (
    Guidance,
    boundary_velocity,
    guided_velocities,
    over_whole_interval,
    sample_velocity,
)
from mf_jax.flow.paths import per_row
from mf_jax.flow.records import Draws, Field, Prediction, Rows
from mf_jax.objectives.terms import (
    AdaptiveWeight,
    Metrics,
    Objective,
    at_instant,
    average,
    squared_error,
    step_metrics,
    with_derivative,
)


def _head_velocity(prediction: Prediction) -> Float[Array, "b ..."]:
    if prediction.v is None:
        raise BadInput(
            "objective.velocity='head': the network has no second head; use model.name=in_context_dit with "
            "model.second_head=True, or objective.velocity=boundary"
        )
    return prediction.v


VELOCITIES = {"head": _head_velocity, "boundary": boundary_velocity}
"""Where the network's own velocity comes from."""


@dataclasses.dataclass(frozen=True)
class ImprovedMeanFlow(Objective):
    """Regress the velocity that the network's average velocity and its derivative make.

    Args:
      guidance: guidance inside the target, for rows that none was drawn for.
      weight: the weight of rows, of either term by itself.
      velocity: a key of `VELOCITIES`.

    Raises:
      BadInput: for an unknown velocity.
    """

    guidance: Guidance = dataclasses.field(default_factory=Guidance)
    weight: AdaptiveWeight = dataclasses.field(default_factory=AdaptiveWeight)
    velocity: str = "head"

    def __post_init__(self) -> None:
        if self.velocity not in VELOCITIES:
            raise BadInput(
                f"objective.velocity={self.velocity!r}: must be one of {', '.join(VELOCITIES)}"
            )

    @property
    def needs_second_head(self) -> bool:
        """Whether the network's own velocity is a head of its own."""
        return self.velocity == "head"

    def loss(
        self,
        field: Field,
        params: PyTree,
        draws: Draws,
        step: Int[Array, ""],
        target_params: PyTree | None = None,
    ) -> tuple[Float[Array, ""], Metrics]:
        """Return the loss of one step.

        Args:
          field, params: the network.
          draws: everything random in the step.
          step, target_params: not used; the target is the network's own, and does not change over training.

        Returns:
          The scalar loss, and the metrics of `step_metrics`; with a second head also head_error, its mean squared
          error per number.
        """
        del step, target_params
        loss, metrics, _ = self.loss_and_predictions(field, params, draws)
        return loss, metrics

    def loss_and_predictions(
        self,
        field: Field,
        params: PyTree,
        draws: Draws,
        given: Callable[[Rows], Array] = sample_velocity,
    ) -> tuple[Float[Array, ""], Metrics, tuple[Prediction, Prediction]]:
        """Return the loss, the metrics, and the predictions for the rows with r = t and with r < t.

        Args:
          field, params: the network.
          draws: everything random in the step.
          given: the velocity of a row's own data and noise.
        """
        read = VELOCITIES[self.velocity]
        draws = draws.replace(instant=over_whole_interval(draws.instant))
        at_t = at_instant(field, params, draws.instant)
        v = guided_velocities(
            self.guidance,
            field,
            params,
            draws,
            own_instant=read(at_t),
            with_own=True,
            read=read,
            given=given,
        )
        at_r, du_dt = with_derivative(field, params, draws.interval, v.own)
        target = v.interval - per_row(draws.interval.t - draws.interval.r, du_dt) * du_dt
        v_error = squared_error(at_t.u, v.instant)
        u_error = squared_error(at_r.u, target)
        loss = self.weight.mean(v_error, u_error)
        metrics = step_metrics(draws, v_error=v_error, u_error=u_error, du_dt=du_dt)
        if self.velocity == "head":
            errors = squared_error(read(at_t), v.instant), squared_error(read(at_r), v.interval)
            loss += self.weight.mean(*errors)
            per_number = jnp.concatenate(errors) / math.prod(draws.instant.x.shape[1:])
            metrics |= {"head_error": average(per_number)}
        return loss, metrics, (at_t, at_r)
