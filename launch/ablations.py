"""The paper's ablations in miniature on the digits: a study, see runner.py.

Runs that the method says must fail are checked to fail; if one does not, the exit code is 1.
"""

import math
import sys
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure
from ml_collections import ConfigDict

from configs.digits import get_config as digits
from launch import runner
from launch.runner import QUIET, Result, Results, as_table, score, whole_run

RUNS, NUM_STEPS = Path("runs/ablations"), 1000
MUST_FAIL = ("tangent_v00", "tangent_v10", "tangent_v11", "share_0")
VISIBLY = 2.0  # what must fail has at least so many times the baseline's distance at one step
Overrides = Mapping[str, Any]


class Row(NamedTuple):
    """A row of a table: the published FID of one step, its run, and what the run changes."""

    group: str
    label: str
    published: float
    run: str
    overrides: Overrides = MappingProxyType({})


def _times(mean: float, std: float) -> Overrides:
    return {"times.t_mean": mean, "times.r_mean": mean, "times.t_std": std, "times.r_std": std}


def _guidance(omega: float, kappa: float) -> Overrides:
    return {"guidance.omega": omega, "guidance.kappa": kappa}


BASELINE: Overrides = {
    **QUIET,
    **_times(-0.4, 1.0),
    "eval.steps": (1, 2),
    "model.depth": 2,
    "model.width": 96,
    "model.num_heads": 2,
    "model.prediction": "velocity",
    "coupling.name": "independent",
    "optim.lr": 2e-3,
    "ema.decays": (0.99,),
    "draws.instant_share": 0.75,
    "draws.label_drop_share": 0.1,
    "weight.p": 1.0,
}
_TOLD = "model.time_conditioning"
# where no row has r = t, other rows must lose their label
_LONG = {"draws.instant_share": 0.0, "draws.label_drop": "any_row"}
BASE, NONE = "baseline", math.nan
GROUPS = {
    "seed": "Seed",
    "tangent": "Direction of the derivative (dz, dr, dt)",
    "share": "Share of rows with r < t",
    "conditioning": "Times that the network is told",
    "times": "Distribution of the times",
    "weight": "Power p of the adaptive weight",
    "omega": "Scale omega of the guidance in the target",
    "kappa": "Factor kappa at the effective scale omega / (1 - kappa) = 2",
}
ROWS = (  # published: MeanFlow (arXiv 2505.13447), table 1, B/4, 80 epochs
    Row("seed", "0", NONE, BASE),
    Row("seed", "1", NONE, "baseline_seed_1", {"seed": 1}),
    Row("seed", "2", NONE, "baseline_seed_2", {"seed": 2}),
    Row("tangent", "(v, 0, 1)", 61.06, BASE),
    Row("tangent", "(v, 0, 0)", 268.06, "tangent_v00", {"objective.tangent": "v00"}),
    Row("tangent", "(v, 1, 0)", 329.22, "tangent_v10", {"objective.tangent": "v10"}),
    Row("tangent", "(v, 1, 1)", 137.96, "tangent_v11", {"objective.tangent": "v11"}),
    Row("share", "0 %", 328.9, "share_0", {"draws.instant_share": 1.0}),
    Row("share", "25 %", 61.06, BASE),
    Row("share", "50 %", 63.14, "share_50", {"draws.instant_share": 0.5}),
    Row("share", "100 %", 67.32, "share_100", _LONG),
    Row("conditioning", "t, r", 61.75, "conditioning_t_r", {_TOLD: "t,r"}),
    Row("conditioning", "t, t-r", 61.06, BASE),
    Row("conditioning", "t, r, t-r", 63.98, "conditioning_t_r_h", {_TOLD: "t,r,t-r"}),
    Row("conditioning", "t-r", 63.13, "conditioning_h", {_TOLD: "t-r"}),
    Row("times", "uniform", 65.90, "times_uniform", {"times.name": "uniform"}),
    Row("times", "logit-normal(-0.2, 1.0)", 63.83, "times_m02_10", _times(-0.2, 1.0)),
    Row("times", "logit-normal(-0.2, 1.2)", 64.72, "times_m02_12", _times(-0.2, 1.2)),
    Row("times", "logit-normal(-0.4, 1.0)", 61.06, BASE),
    Row("times", "logit-normal(-0.4, 1.2)", 61.79, "times_m04_12", _times(-0.4, 1.2)),
    Row("weight", "p = 0", 79.75, "weight_0", {"weight.p": 0.0}),
    Row("weight", "p = 0.5", 63.98, "weight_05", {"weight.p": 0.5}),
    Row("weight", "p = 1", 61.06, BASE),
    Row("weight", "p = 1.5", 66.57, "weight_15", {"weight.p": 1.5}),
    Row("weight", "p = 2", 69.19, "weight_2", {"weight.p": 2.0}),
    Row("omega", "omega = 1", 61.06, BASE),
    Row("omega", "omega = 1.5", 33.33, "omega_15", _guidance(1.5, 0.0)),
    Row("omega", "omega = 2", 20.15, "omega_2", _guidance(2.0, 0.0)),
    Row("omega", "omega = 3", 15.53, "omega_3", _guidance(3.0, 0.0)),
    Row("omega", "omega = 5", 20.75, "omega_5", _guidance(5.0, 0.0)),
    Row("kappa", "kappa = 0", 20.15, "omega_2", _guidance(2.0, 0.0)),
    Row("kappa", "kappa = 0.5", 19.15, "kappa_05", _guidance(1.0, 0.5)),
    Row("kappa", "kappa = 0.9", 18.63, "kappa_09", _guidance(0.2, 0.9)),
)


def make_config(row: Row, num_steps: int = NUM_STEPS) -> ConfigDict:
    """Return the config of a row's run of so many steps."""
    steps = {"train.num_steps": num_steps, "optim.warmup_steps": num_steps // 10}
    config = digits()
    config.update_from_flattened_dict({**BASELINE, **row.overrides, **steps})
    return config


def execute(row: Row) -> Result | None:
    """Train and evaluate a run, or continue it; None if it was told to stop."""
    return whole_run(make_config(row), RUNS / row.run)


def table(group: str, results: Results) -> str:
    """Return a group's table in Markdown, the best of each column in bold."""
    rows = [row for row in ROWS if row.group == group]
    accuracy = [score(results, row.run, key="class_accuracy") for row in rows]
    columns = {
        "published FID, 1 step": ([row.published for row in rows], "g", min),
        "Fréchet distance, 1 step": ([score(results, row.run) for row in rows], ".2f", min),
        "2 steps": ([score(results, row.run, 2) for row in rows], ".2f", min),
        "class accuracy, 1 step": (accuracy, ".1%", max),
    }
    return as_table([row.label for row in rows], columns)


def save_picture(path: Path, group: str, results: Results) -> None:
    """Save a group's distances at one step beside the published ones, a panel each."""
    rows = [row for row in ROWS if row.group == group]
    panels = {
        "8x8 digits, Fréchet distance": [score(results, row.run) for row in rows],
        "published FID, ImageNet": [row.published for row in rows],
    }
    figure = Figure(figsize=(9.2, 1.35 + 0.3 * len(rows)), layout="constrained")
    figure.suptitle(f"{GROUPS[group]}: one step")
    both = figure.subplots(1, 2, sharey=True)
    for axes, (title, values) in zip(both, panels.items(), strict=True):
        known = [value for value in values if math.isfinite(value)]
        lengths = np.nan_to_num(values, posinf=0)
        bars = axes.barh([row.label for row in rows], lengths)
        axes.bar_label(bars, [f"{x:.4g}" if x else "" for x in lengths], padding=3, fontsize=8.5)
        axes.set_title(title, fontsize=9.5)
        axes.set_ylim(len(rows) - 0.4, -0.6)  # the first at the top
        if known and max(known) > 25 * min(known):  # else the smaller half would look alike
            axes.set_xscale("log")
        axes.margins(x=0.2)
        axes.spines[["right", "top"]].set_visible(False)
    figure.savefig(path, dpi=80, facecolor="white")


def unexpected(results: Results) -> list[str]:
    """Return what did not fail but must."""
    failed = [run for run in MUST_FAIL if score(results, run) < VISIBLY * score(results, BASE)]
    return [f"{run} must fail and does not" for run in failed]


if __name__ == "__main__":
    sys.exit(runner.main(sys.modules[__name__]))
