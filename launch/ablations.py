"""The paper's ablations in miniature on the digits, and all objectives at equal training FLOPs.

1. `ROWS` is the table of what runs. Rows that name the same run share it.
2. Each run is trained and evaluated in this process, in runs/ablations/NAME. Its result.json marks
   it as finished; a run that diverges is finished too.
3. The tables of docs/ablations.md and its plots are written from the result.json files.
4. Runs that the method says must fail are checked to fail; if one does not, the exit code is 1.

Usage: bash launch/ablations.sh [--only=GROUP] [--document]
"""

import contextlib
import functools
import gc
import json
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
from etils import epath
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from ml_collections import ConfigDict

from configs.digits import get_config as digits
from configs.rows import soflow
from launch import runner
from launch.runner import Result, Results, Study, as_table, write_tables
from mf_jax import evaluate, train
from mf_jax.bench.step import placed_step
from mf_jax.runtime.json_files import read_json
from mf_jax.runtime.sharding import make_mesh
from mf_jax.runtime.workdir import SECTIONS_OF_A_RUN, as_json
from mf_jax.validation import validate

RUNS, DOCUMENT, PLOTS = Path("runs/ablations"), Path("docs/ablations.md"), Path("docs/ablations")
NUM_STEPS = 1000  # of a run; those at equal FLOPs get what so many steps of MeanFlow take
MUST_FAIL = ("tangent_v00", "tangent_v10", "tangent_v11", "share_0")
VISIBLY = 2.0
"""What must fail has at least this many times the baseline's distance at one step."""
Overrides = Mapping[str, Any]


class Row(NamedTuple):
    """A row of a table: the published FID of one step, its run, and what the run changes."""

    group: str
    label: str
    published: float
    run: str
    overrides: Overrides = MappingProxyType({})


SHORT: Overrides = {
    "model.depth": 2,
    "model.width": 96,
    "model.num_heads": 2,
    "ema.decays": (0.99,),
    "log.sample_every_steps": 0,
    "log.progress": False,
    "checkpoint.every_steps": 250,
    "checkpoint.keep": 1,
    "eval.steps": (1, 2, 8),
    "job.stopped_exit_code": 75,
}


def _times(mean: float, std: float) -> Overrides:
    return {"times.t_mean": mean, "times.r_mean": mean, "times.t_std": std, "times.r_std": std}


def _guidance(omega: float, kappa: float) -> Overrides:
    return {"guidance.omega": omega, "guidance.kappa": kappa}


PAPER: Overrides = {
    **_times(-0.4, 1.0),
    "draws.instant_share": 0.75,
    "draws.label_drop_share": 0.1,
    "weight.p": 1.0,
}
"""The paper's settings; the group at equal FLOPs has the recipe of digits.py."""
_TOLD = "model.time_conditioning"
_INSTANT = {"draws.instant_share": 1.0}
# where no row has r = t, other rows must lose their label
_LONG = {"draws.instant_share": 0.0, "draws.label_drop": "any_row"}
_OWN = {"model.name": "in_context_dit", "model.head_depth": 1}
_FLOW = {"objective.name": "flow_matching", **_INSTANT}
_IMPROVED = {"objective.name": "improved_meanflow"}
_BOUNDARY = {**_IMPROVED, "objective.velocity": "boundary"}
_PIXEL = {"objective.name": "pixel_meanflow", "model.prediction": "data", **_OWN}
_ALPHA = {"objective.name": "alpha_flow"}
_SPLIT = {"objective.name": "split_meanflow"}
_SHORTCUT = {**_SPLIT, "objective.split": "midpoint", "times.name": "dyadic"}
_TERMINAL = {"objective.name": "terminal_velocity", "objective.target_ema": 0.99}
_UNIFORM, _PLAIN = {"times.name": "uniform"}, {"weight.p": 0.0}
_TVM = _TERMINAL | _PLAIN | _UNIFORM
BASE, EQUAL, NONE = "baseline", "objectives", math.nan
TITLES = {
    "seed": "Seed",
    "tangent": "Direction of the derivative (dz, dr, dt)",
    "share": "Share of rows with r < t",
    EQUAL: "All objectives at equal training FLOPs",
    "conditioning": "Times that the network is told",
    "times": "Distribution of the times",
    "weight": "Power p of the adaptive weight",
    "omega": "Scale omega of the guidance in the target",
    "kappa": "Factor kappa at the effective scale omega / (1 - kappa) = 2",
}
ROWS = (  # published: MeanFlow (arXiv 2505.13447), table 1, B/4, 80 epochs; at equal FLOPs XL/2
    Row("seed", "0", NONE, BASE),
    Row("seed", "1", NONE, "baseline_seed_1", {"seed": 1}),
    Row("seed", "2", NONE, "baseline_seed_2", {"seed": 2}),
    Row("tangent", "(v, 0, 1)", 61.06, BASE),
    Row("tangent", "(v, 0, 0)", 268.06, "tangent_v00", {"objective.tangent": "v00"}),
    Row("tangent", "(v, 1, 0)", 329.22, "tangent_v10", {"objective.tangent": "v10"}),
    Row("tangent", "(v, 1, 1)", 137.96, "tangent_v11", {"objective.tangent": "v11"}),
    Row("share", "0 %", 328.9, "share_0", _INSTANT),
    Row("share", "25 %", 61.06, BASE),
    Row("share", "50 %", 63.14, "share_50", {"draws.instant_share": 0.5}),
    Row("share", "100 %", 67.32, "share_100", _LONG),
    Row(EQUAL, "MeanFlow", 3.43, "objective_meanflow"),
    Row(EQUAL, "flow matching", NONE, "objective_flow_matching", _FLOW),
    Row(EQUAL, "improved MeanFlow", 2.99, "objective_improved", _BOUNDARY),
    Row(EQUAL, "alpha-Flow", 2.95, "objective_alpha_flow", _ALPHA),
    Row(EQUAL, "SoFlow", 2.96, "objective_soflow", soflow(NUM_STEPS)),
    Row(EQUAL, "SplitMeanFlow, p = 0", NONE, "objective_split_plain", _SPLIT | _PLAIN),
    Row(EQUAL, "SplitMeanFlow", NONE, "objective_split", _SPLIT),
    Row(EQUAL, "Shortcut, p = 0", 10.60, "objective_shortcut_plain", _SHORTCUT | _PLAIN),
    Row(EQUAL, "Shortcut", NONE, "objective_shortcut", _SHORTCUT),
    Row(EQUAL, "terminal velocity, p = 0, uniform times", 3.29, "objective_terminal_uniform", _TVM),
    Row(EQUAL, "terminal velocity, p = 0", NONE, "objective_terminal_plain", _TERMINAL | _PLAIN),
    Row(EQUAL, "terminal velocity", NONE, "objective_terminal", _TERMINAL),
    Row(EQUAL, "consistency", NONE, "objective_consistency", {"times.name": "consistency"}),
    Row(EQUAL, "improved MeanFlow, own network", NONE, "objective_improved_own", _IMPROVED | _OWN),
    Row(EQUAL, "pixel MeanFlow, own network", NONE, "objective_pixel", _PIXEL),
    Row("conditioning", "t, r", 61.75, "conditioning_t_r", {_TOLD: "t,r"}),
    Row("conditioning", "t, t-r", 61.06, BASE),
    Row("conditioning", "t, r, t-r", 63.98, "conditioning_t_r_h", {_TOLD: "t,r,t-r"}),
    Row("conditioning", "t-r", 63.13, "conditioning_h", {_TOLD: "t-r"}),
    Row("times", "uniform", 65.90, "times_uniform", _UNIFORM),
    Row("times", "logit-normal(-0.2, 1.0)", 63.83, "times_m02_10", _times(-0.2, 1.0)),
    Row("times", "logit-normal(-0.2, 1.2)", 64.72, "times_m02_12", _times(-0.2, 1.2)),
    Row("times", "logit-normal(-0.4, 1.0)", 61.06, BASE),
    Row("times", "logit-normal(-0.4, 1.2)", 61.79, "times_m04_12", _times(-0.4, 1.2)),
    Row("weight", "p = 0", 79.75, "weight_0", _PLAIN),
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


def all_runs(only: str = "") -> list[Row]:
    """Return the first row of each run, of all groups or of one."""
    runs: dict[str, Row] = {}
    for row in ROWS:
        if only in ("", row.group):
            runs.setdefault(row.run, row)
    return list(runs.values())


def make_config(row: Row, num_steps: int = NUM_STEPS) -> ConfigDict:
    """Return the config of a row's run of so many steps; its curriculum lasts the whole run."""
    base = {} if row.group == EQUAL else PAPER
    steps = {
        "train.num_steps": num_steps,
        "optim.warmup_steps": num_steps // 10,
        "objective.anneal_to": num_steps,
    }
    config = digits()
    config.update_from_flattened_dict({**SHORT, **base, **row.overrides, **steps})
    return config


def decisive(config: ConfigDict) -> dict[str, Any]:
    """Return the sections that decide a run's numbers, as JSON keeps them."""
    return {k: v for k, v in json.loads(as_json(config)).items() if k in SECTIONS_OF_A_RUN}


def step_flops(config: ConfigDict) -> float:
    """Return the FLOPs of a config's compiled training step, as XLA counts them."""
    parts = train.step_parts(config, validate(config, num_devices=1))
    step, *shapes = placed_step(parts, make_mesh(data=0, fsdp=1))
    return float(step.lower(*shapes).compile().cost_analysis()["flops"])


@functools.cache
def budget() -> float:
    """Return the FLOPs of each run at equal FLOPs."""
    return NUM_STEPS * step_flops(make_config(next(row for row in ROWS if row.group == EQUAL)))


def execute(row: Row, folder: Path) -> Result | None:
    """Train and evaluate a run, or continue it; return its result, None if it was told to stop."""
    num_steps, result = NUM_STEPS, {}
    if row.group == EQUAL:
        result["step_flops"] = step_flops(make_config(row))
        num_steps = max(1, round(budget() / result["step_flops"]))
    config, workdir = make_config(row, num_steps), epath.Path(folder / row.run)
    result |= {"config": decisive(config), "num_steps": num_steps, "rows": []}
    workdir.mkdir(parents=True, exist_ok=True)
    with (workdir / "log.txt").open("a") as log, contextlib.redirect_stdout(log):
        try:
            if train.run(config, workdir):
                return None
            evaluate.run(config, workdir)
            result["rows"] = read_json(workdir / "eval.json", {"rows": [{}]})["rows"]
        except FloatingPointError as error:
            result["diverged"] = str(error)
    jax.clear_caches()  # 40 compiled steps do not fit
    gc.collect()
    return result


def score(results: Results, run: str, steps: int = 1, key: str = "frechet_distance") -> float:
    """Return a score of a run: infinite where it diverged, NaN where it is not there."""
    if "diverged" in results.get(run, {}):
        return math.inf if key == "frechet_distance" else NONE
    rows = results.get(run, {}).get("rows", [])
    return next((row[key] for row in rows if row.get("steps") == steps), NONE)


def table(group: str, results: Results) -> str:
    """Return a group's table in Markdown, the best of each column in bold."""
    rows = [row for row in ROWS if row.group == group]
    found = [results.get(row.run, {}) for row in rows]
    columns = {"published FID, 1 step": ([row.published for row in rows], "g", min)}
    if group == EQUAL:
        flops = [result.get("step_flops", NONE) / 1e6 for result in found]
        columns["MFLOPs a step"] = flops, ",.0f", None
        columns["steps"] = [result.get("num_steps", NONE) for result in found], ",.0f", None
    columns["Fréchet distance, 1 step"] = [score(results, row.run) for row in rows], ".2f", min
    for steps in (2, 8) if group == EQUAL else (2,):
        columns[f"{steps} steps"] = [score(results, row.run, steps) for row in rows], ".2f", min
    accuracy = [score(results, row.run, key="class_accuracy") for row in rows]
    columns["class accuracy, 1 step"] = accuracy, ".1%", max
    return as_table([row.label for row in rows], columns)


def save_plot(path: Path, group: str, results: Results) -> None:
    """Save a group's distances at one step beside the published ones, a panel each."""
    rows = [row for row in ROWS if row.group == group]
    figure = Figure(figsize=(9.2, 1.35 + 0.3 * len(rows)), layout="constrained")
    figure.suptitle(f"{TITLES[group]}: one step")
    left, right = figure.subplots(1, 2, sharey=True)
    left.set_title("8x8 digits, Fréchet distance", fontsize=9.5)
    _bars(left, rows, [score(results, row.run) for row in rows])
    right.set_title("published FID, ImageNet", fontsize=9.5)
    _bars(right, rows, [row.published for row in rows])
    figure.savefig(path, dpi=80, facecolor="white")


def _bars(axes: Axes, rows: Sequence[Row], values: Sequence[float]) -> None:
    known = [value for value in values if math.isfinite(value)]
    bars = axes.barh([row.label for row in rows], [v if math.isfinite(v) else 0 for v in values])
    texts = [f"{value:.4g}" if math.isfinite(value) else "" for value in values]
    axes.bar_label(bars, texts, padding=3, fontsize=8.5)
    axes.set_ylim(len(rows) - 0.4, -0.6)  # the first at the top
    if known and max(known) > 25 * min(known):  # else the smaller half would look alike
        axes.set_xscale("log")
    axes.margins(x=0.2)
    axes.spines[["right", "top"]].set_visible(False)


def write_document(results: Results, document: Path, plots: Path) -> list[str]:
    """Write the tables between their marks and the plots; return what did not fail but must."""
    write_tables(document, {group: table(group, results) for group in TITLES})
    plots.mkdir(parents=True, exist_ok=True)
    for group in TITLES:
        save_plot(plots / f"{group}.png", group, results)
    failed = [run for run in MUST_FAIL if score(results, run) < VISIBLY * score(results, BASE)]
    return [f"{run} must fail and does not" for run in failed]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    study = Study(
        name="ablations",
        about=__doc__,
        groups=tuple(TITLES),
        folder=RUNS,
        document=DOCUMENT,
        runs_of=all_runs,
        config_of=lambda row, num_steps: decisive(make_config(row, num_steps)),
        execute=lambda row: execute(row, RUNS),
        write=lambda results: write_document(results, DOCUMENT, PLOTS),
    )
    return runner.main(study, argv)


if __name__ == "__main__":
    sys.exit(main())
