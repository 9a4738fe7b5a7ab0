"""The grid of an evaluation: all checkpoints, moving averages, numbers of steps and guidances."""

import dataclasses
import itertools
from typing import Any

from ml_collections import ConfigDict

from mf_jax.config import averages
from mf_jax.flow.sampler import NO_GUIDANCE, SamplePlan
from mf_jax.optim import choose_ema
from mf_jax.validation import check_grid

NEWEST = -1


@dataclasses.dataclass(frozen=True)
class Cell:
    """One model, sampled in one way.

    checkpoint: its step, or `NEWEST`. ema: a moving average of the run, or `none`.
    """

    checkpoint: int
    ema: str
    plan: SamplePlan

    @property
    def protocol(self) -> dict[str, Any]:
        """Return the settings that decide its samples; the size of a batch decides nothing."""
        keys = ("steps", "omega", "t_min", "t_max", "seed")
        plan = {key: getattr(self.plan, key) for key in keys}
        plan |= {"renoise": True} if self.plan.renoise else {}  # rows without the key have none
        return {"checkpoint": self.checkpoint, "ema": self.ema, **plan}


def cells(config: ConfigDict) -> list[Cell]:
    """Return the cells that `eval` asks for, one model after the other; each once."""
    check_grid(config)
    section, known = config.eval, averages(config)
    emas = [choose_ema("eval.emas", name, known) for name in section.emas]
    guidances = [
        (omega, *interval) if omega != 1 else NO_GUIDANCE  # no guidance has no interval
        for omega, interval in itertools.product(section.omegas, section.intervals)
    ]
    more = {key: section[key] for key in ("renoise", "seed", "batch_size")}
    base = SamplePlan(**more)
    combined = itertools.product(section.checkpoints or (NEWEST,), emas, section.steps, guidances)
    every = (
        Cell(checkpoint, ema, base.replace(steps=steps, guidance=guidance))
        for checkpoint, ema, steps, guidance in combined
    )
    return list(dict.fromkeys(every))
