"""The grid of an evaluation: all checkpoints, moving averages, numbers of steps and guidances."""

import dataclasses
import itertools
from typing import Any

import numpy as np
from jaxtyping import Int
from ml_collections import ConfigDict

from mf_jax.flow.sampler import SamplePlan
from mf_jax.validation import eval_plans

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


def in_shares(labels: Int[np.ndarray, "n"], num: int, seed: int) -> Int[np.ndarray, "num"]:
    """Return num labels in random order, each as often as it is among these."""
    spread = np.sort(labels)[np.arange(num) * len(labels) // num]
    return np.random.default_rng(seed).permutation(spread)


def cells(config: ConfigDict) -> list[Cell]:
    """Return the cells that `eval` asks for, one model after the other; each once."""
    every = itertools.product(config.eval.checkpoints or (NEWEST,), eval_plans(config))
    return list(dict.fromkeys(Cell(checkpoint, *model) for checkpoint, model in every))
