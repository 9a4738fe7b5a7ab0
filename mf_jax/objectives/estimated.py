"""Any objective with an estimate of the flow's velocity in the place of a row's own v = e - x.

See mf_jax/flow/velocities.py. A frozen teacher is the average of decay 1: it stays at the first
parameters, which `init.path` may bring.

Source: beside those of the estimates, AYF, arXiv 2506.14603 (a teacher in target and tangent).
"""

import dataclasses

from mf_jax.flow.errors import BadInput
from mf_jax.flow.velocities import VelocityEstimate
from mf_jax.objectives import terms


@dataclasses.dataclass(frozen=True)
class Estimated(terms.Around):
    """An objective whose rows know an estimate of the velocity.

    Args:
      ema: decay of the average of parameters that `average` takes, in [0, 1]; 1 = a frozen teacher,
        0 = the objective's own average.
    """

    velocity: VelocityEstimate
    ema: float = 0.0

    def __post_init__(self) -> None:
        if self.objective.predicts == "data":  # whose target is made of x, not of v
            raise BadInput("velocity.source: pixel_meanflow takes no estimate; use source=sample")
        name, source = type(self.objective).__name__, self.velocity.source
        has_tangent = self.objective.has_tangent and self.objective.interval_data
        if self.velocity.tangent and not has_tangent:
            problem = f"{name} has no direction that an estimate could change"
            raise BadInput(f"velocity.tangent={self.velocity.tangent}: {problem}; use 0.0")
        if source == "network" and not self.objective.interval_data:
            problem = f"of {name} the rows with r < t see no velocity, and the others keep theirs"
            raise BadInput(f"velocity.source='network': {problem}; use another source")
        guidance = getattr(self.objective, "guidance", None)
        is_own = source in ("network", "average") and self.ema < 1
        if is_own and guidance is not None and not guidance.is_off:
            problem = "the network learns a guided velocity, which would be guided again"
            raise BadInput(f"velocity.source={source!r}: {problem}; use batch or data")
        own, is_needed = self.objective.target_ema, self.velocity.source == "average"
        if not 0 <= self.ema <= 1 or (self.ema > 0) != (is_needed and not own):
            raise BadInput(
                f"velocity.ema={self.ema}: must be above 0, up to 1 for a frozen teacher, with "
                f"source=average and an objective without target_ema, else 0; source is "
                f"{self.velocity.source}, target_ema {own}"
            )

    @property
    def target_ema(self) -> float:
        """See `Objective`."""
        return self.objective.target_ema or self.ema

    def loss(self, field, params, draws, step=0, target_params=None) -> terms.Loss:
        """See `Objective.loss`."""
        known = params if target_params is None else target_params
        draws = self.velocity.estimated(field, params, draws, known)
        own = target_params if self.objective.target_ema else None
        return self.objective.loss(field, params, draws, step, own)
