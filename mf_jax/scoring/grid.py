"""The grid of an evaluation: every combination of checkpoint, moving average, number of steps and guidance."""

import dataclasses
import itertools
from collections.abc import Sequence

from ml_collections import ConfigDict

from mf_jax.config import averages, check_grid
from mf_jax.flow.sampler import NO_GUIDANCE, SamplePlan
from mf_jax.optim import choose_ema

NEWEST = -1


@dataclasses.dataclass(frozen=True)
class Cell:
    """One model, sampled in one way.

    checkpoint: its step, or `NEWEST`. ema: a moving average of the run, or `none`. steps: network evaluations a sample.
    omega, t_min, t_max: the guidance that the network is told.
    """

    checkpoint: int
    ema: str
    steps: int
    omega: float
    t_min: float
    t_max: float

    @property
    def guidance(self) -> tuple[float, float, float]:
        """Return (omega, t_min, t_max)."""
        return self.omega, self.t_min, self.t_max

    def plan(self, *, seed: int, batch_size: int) -> SamplePlan:
        """Return how samples of this cell are drawn."""
        return SamplePlan(self.steps, (), *self.guidance, seed, batch_size)


def cells(config: ConfigDict) -> list[Cell]:
    """Return the cells that `eval` asks for, one checkpoint after the other; each once.

    Args:
      config: of the command.

    Raises:
      BadInput: if a list is empty, or has an entry that this run cannot be sampled with.
    """
    check_grid(config)
    section, known = config.eval, averages(config)
    emas = [choose_ema("eval.emas", name, known) for name in section.emas]
    guidances = [
        # no guidance has no interval
        (float(omega), *map(float, interval)) if omega != 1 else NO_GUIDANCE
        for omega in section.omegas
        for interval in section.intervals
    ]
    checkpoints = section.checkpoints or (NEWEST,)
    every = itertools.product(checkpoints, emas, section.steps, guidances)
    found = (Cell(checkpoint, ema, steps, *guidance) for checkpoint, ema, steps, guidance in every)
    return list(dict.fromkeys(found))


def names(grid: Sequence[Cell]) -> list[str]:
    """Return what to call each cell in a table: the number of steps, and what else is not the same for all."""
    about = {
        "checkpoint": lambda cell: f"step {cell.checkpoint}",
        "ema": lambda cell: "raw parameters" if cell.ema == "none" else f"EMA {cell.ema}",
        "guidance": lambda cell: f"omega {cell.omega:g} in [{cell.t_min:g}, {cell.t_max:g}]",
    }
    differs = [key for key in about if len({getattr(cell, key) for cell in grid}) > 1]
    return [
        ", ".join(
            [f"{cell.steps} step{'s' * (cell.steps > 1)}", *(about[key](cell) for key in differs)]
        )
        for cell in grid
    ]
