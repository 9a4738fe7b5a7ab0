"""The optimiser, its schedule, and moving averages of the parameters."""

from collections.abc import Sequence

import jax
import optax
from jaxtyping import PyTree

SCHEDULES = ("constant", "cosine")


def learning_rate(*, lr: float, warmup_steps: int, schedule: str, num_steps: int) -> optax.Schedule:
    """Return the learning rate as a function of the step.

    Args:
      lr: peak value.
      warmup_steps: steps of linear warm-up from 0 to the peak.
      schedule: `constant`, or `cosine` to 0 at the last step.
      num_steps: of the whole run, warm-up included.

    Returns:
      step -> learning rate.
    """
    after = (
        optax.constant_schedule(lr)
        if schedule == "constant"
        else optax.cosine_decay_schedule(lr, max(num_steps - warmup_steps, 1))
    )
    if not warmup_steps:
        return after
    # the first step moves: step k of the warm-up uses (k + 1) / warmup_steps of the peak
    warmup = optax.linear_schedule(lr / warmup_steps, lr, max(warmup_steps - 1, 1))
    return optax.join_schedules([warmup, after], [warmup_steps])


def make_optimizer(
    rate: optax.Schedule, *, b1: float, b2: float, weight_decay: float, clip_norm: float
) -> optax.GradientTransformation:
    """Return adamw with optional clipping.

    Args:
      rate: the learning rate as a function of the step.
      b1, b2: decay of adam's first and second moment, in [0, 1).
      weight_decay: decoupled weight decay, at least 0.
      clip_norm: clip gradients to this global norm first; 0 = off.
    """
    adamw = optax.adamw(rate, b1=b1, b2=b2, weight_decay=weight_decay)
    return optax.chain(optax.clip_by_global_norm(clip_norm), adamw) if clip_norm else adamw


def average_name(decay: float) -> str:
    """Return the name of the moving average with this decay: the decay as written, e.g. "0.9999"."""
    return repr(float(decay))


def start_averages(params: PyTree, names: Sequence[str]) -> dict[str, PyTree]:
    """Return one copy of the parameters for each moving average."""
    return {name: jax.tree.map(lambda p: p.copy(), params) for name in names}


def update_averages(averages: dict[str, PyTree], params: PyTree) -> dict[str, PyTree]:
    """Move each average towards the parameters: a <- d a + (1 - d) p, where d is the float that its name spells."""
    return {
        name: optax.incremental_update(params, average, 1 - float(name)) for name, average in averages.items()
    }
