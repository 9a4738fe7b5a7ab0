"""The paper's ablations in miniature on the digits, and all objectives at equal training FLOPs.

1. `GROUPS` is the table of what is run: a setting is a label, the published figure and what it changes in the
   paper's settings. Settings that name the same run share it.
2. Every run is trained and evaluated in this process, one after another, in runs/ablations/NAME; `result.json` there
   marks it as finished. A run that diverges is recorded as such.
3. The document is made from the `result.json` files alone, its sentences too, so that it is true of any rerun.
4. Settings that the method says must fail are checked to fail; if one does not, the exit code is 1.

Usage: bash launch/ablations.sh [--only=GROUP] [--document]
"""

import argparse
import contextlib
import dataclasses
import gc
import itertools
import json
import math
import os
import platform
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from ml_collections import ConfigDict
from scipy.stats import spearmanr

from configs.digits import get_config as digits
from mf_jax import evaluate, train
from mf_jax.checkpoint import Checkpoints
from mf_jax.config import SECTIONS_OF_A_RUN, as_json, validate
from mf_jax.report import replace_file
from mf_jax.state import initial_state, make_train_step
from mf_jax.types import BadInput, nearest

RUNS = Path("runs/ablations")
DOCUMENT, PICTURES = Path("docs/ablations.md"), Path("docs/ablations")
NUM_STEPS = 1000  # of every run but those of `objectives`, which get what these cost
Overrides = Mapping[str, Any]

# the paper's settings, of all groups but `objectives`
PAPER: Overrides = {
    "times.t_mean": -0.4,
    "times.t_std": 1.0,
    "times.r_mean": -0.4,
    "times.r_std": 1.0,
    "draws.instant_share": 0.75,
    "draws.label_drop_share": 0.1,
    "weight.p": 1.0,
}
# what makes a run short, of all groups
SHORT: Overrides = {
    "model.depth": 2,
    "model.width": 96,
    "model.num_heads": 2,
    "ema.decays": (0.99,),
    "log.sample_every_steps": 0,
    "log.progress": False,
    "checkpoint.every_steps": 250,
    "checkpoint.keep": 1,
    "eval.steps": (1, 2),
}
# what the comparison of objectives adds
EQUAL_FLOPS: Overrides = {"eval.steps": (1, 2, 8)}


@dataclasses.dataclass(frozen=True)
class Setting:
    """One row of a table.

    label: in the table. published: FID of one step, None where there is none. run: folder of its run, shared by
    settings that coincide. overrides: what it changes, by dotted name.
    """

    label: str
    published: float | None
    run: str
    overrides: Overrides = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Group:
    """One table.

    name: of `--only` and of the picture. title: of its section. settings: its rows. equal_flops: whether each run has
    as many steps as the FLOPs of its first setting's `NUM_STEPS` pay for; the base is then configs/digits.py, and not
    the paper's settings.
    """

    name: str
    title: str
    settings: tuple[Setting, ...]
    equal_flops: bool = False


def _times(name: str, mean: float = 0.0, std: float = 1.0) -> Overrides:
    if name == "uniform":
        return {"times.name": name}
    return {"times.t_mean": mean, "times.r_mean": mean, "times.t_std": std, "times.r_std": std}


def _guidance(omega: float, kappa: float) -> Overrides:
    return {"guidance.omega": omega, "guidance.kappa": kappa}


_IN_CONTEXT: Overrides = {"model.name": "in_context_dit", "model.head_depth": 1}
_SPLIT: Overrides = {"objective.name": "split_meanflow"}
_SHORTCUT: Overrides = {**_SPLIT, "objective.split": "midpoint", "times.name": "dyadic"}
_TERMINAL: Overrides = {"objective.name": "terminal_velocity", "objective.target_ema": 0.99}
_PLAIN: Overrides = {"weight.p": 0.0}
BASELINE = "baseline"
SEEDS = (BASELINE, "baseline_seed_1", "baseline_seed_2")
"""Runs that differ in nothing but the seed."""
_ANY_ROW: Overrides = {"draws.label_drop": "any_row"}  # where no row has r = t, others must lose their label

# In the order in which they are run; published: MeanFlow (arXiv 2505.13447) table 1, B/4, 80 epochs, 1-NFE.
GROUPS: tuple[Group, ...] = (
    Group(
        "tangent",
        "Direction of the derivative (dz, dr, dt)",
        (
            Setting("(v, 0, 1)", 61.06, BASELINE),
            Setting("(v, 0, 0)", 268.06, "tangent_v00", {"objective.tangent": "v00"}),
            Setting("(v, 1, 0)", 329.22, "tangent_v10", {"objective.tangent": "v10"}),
            Setting("(v, 1, 1)", 137.96, "tangent_v11", {"objective.tangent": "v11"}),
        ),
    ),
    Group(
        "share",
        "Share of rows with r < t",
        (
            Setting("0 %", 328.9, "share_0", {"draws.instant_share": 1.0}),
            Setting("25 %", 61.06, BASELINE),
            Setting("50 %", 63.14, "share_50", {"draws.instant_share": 0.5}),
            Setting("100 %", 67.32, "share_100", {"draws.instant_share": 0.0, **_ANY_ROW}),
        ),
    ),
    Group(
        "objectives",
        "All objectives at equal training FLOPs",
        (
            Setting("MeanFlow", 3.43, "objective_meanflow"),
            Setting(
                "flow matching",
                None,
                "objective_flow_matching",
                {"objective.name": "flow_matching", "draws.instant_share": 1.0},
            ),
            Setting(
                "improved MeanFlow",
                2.99,
                "objective_improved",
                {"objective.name": "improved_meanflow", "objective.velocity": "boundary"},
            ),
            Setting("alpha-Flow", 2.95, "objective_alpha_flow", {"objective.name": "alpha_flow"}),
            Setting(
                "SoFlow",
                2.96,
                "objective_soflow",
                {
                    "objective.name": "alpha_flow",
                    "objective.annealing": "exponential",
                    "objective.alpha_start": 0.1,
                    "objective.alpha_end": 0.002,
                    "objective.derivative_below": 0.0,
                },
            ),
            Setting("SplitMeanFlow, p = 0", None, "objective_split_plain", {**_SPLIT, **_PLAIN}),
            Setting("SplitMeanFlow", None, "objective_split", _SPLIT),
            Setting("Shortcut, p = 0", 10.60, "objective_shortcut_plain", {**_SHORTCUT, **_PLAIN}),
            Setting("Shortcut", None, "objective_shortcut", _SHORTCUT),
            Setting("terminal velocity, p = 0", 3.29, "objective_terminal_plain", {**_TERMINAL, **_PLAIN}),
            Setting("terminal velocity", None, "objective_terminal", _TERMINAL),
            Setting("consistency", None, "objective_consistency", {"times.name": "consistency"}),
            Setting(
                "improved MeanFlow, own network",
                1.72,
                "objective_improved_own",
                {"objective.name": "improved_meanflow", **_IN_CONTEXT},
            ),
            Setting(
                "pixel MeanFlow, own network",
                None,
                "objective_pixel",
                {"objective.name": "pixel_meanflow", "model.prediction": "data", **_IN_CONTEXT},
            ),
        ),
        equal_flops=True,
    ),
    Group(
        "conditioning",
        "What the network is told of the times",
        (
            Setting("t, r", 61.75, "conditioning_t_r", {"model.time_conditioning": "t,r"}),
            Setting("t, t-r", 61.06, BASELINE),
            Setting("t, r, t-r", 63.98, "conditioning_t_r_h", {"model.time_conditioning": "t,r,t-r"}),
            Setting("t-r", 63.13, "conditioning_h", {"model.time_conditioning": "t-r"}),
        ),
    ),
    Group(
        "times",
        "Distribution of the times",
        (
            Setting("uniform", 65.90, "times_uniform", _times("uniform")),
            Setting("logit-normal(-0.2, 1.0)", 63.83, "times_m02_10", _times("logit_normal", -0.2, 1.0)),
            Setting("logit-normal(-0.2, 1.2)", 64.72, "times_m02_12", _times("logit_normal", -0.2, 1.2)),
            Setting("logit-normal(-0.4, 1.0)", 61.06, BASELINE),
            Setting("logit-normal(-0.4, 1.2)", 61.79, "times_m04_12", _times("logit_normal", -0.4, 1.2)),
        ),
    ),
    Group(
        "weight",
        "Power p of the adaptive weight",
        (
            Setting("p = 0", 79.75, "weight_0", {"weight.p": 0.0}),
            Setting("p = 0.5", 63.98, "weight_05", {"weight.p": 0.5}),
            Setting("p = 1", 61.06, BASELINE),
            Setting("p = 1.5", 66.57, "weight_15", {"weight.p": 1.5}),
            Setting("p = 2", 69.19, "weight_2", {"weight.p": 2.0}),
        ),
    ),
    Group(
        "omega",
        "Scale omega of the guidance in the target",
        (
            Setting("omega = 1", 61.06, BASELINE),
            Setting("omega = 1.5", 33.33, "omega_15", _guidance(1.5, 0.0)),
            Setting("omega = 2", 20.15, "omega_2", _guidance(2.0, 0.0)),
            Setting("omega = 3", 15.53, "omega_3", _guidance(3.0, 0.0)),
            Setting("omega = 5", 20.75, "omega_5", _guidance(5.0, 0.0)),
        ),
    ),
    Group(
        "kappa",
        "Factor kappa at the effective scale omega / (1 - kappa) = 2",
        (
            Setting("kappa = 0", 20.15, "omega_2", _guidance(2.0, 0.0)),
            Setting("kappa = 0.5", 19.15, "kappa_05", _guidance(1.0, 0.5)),
            Setting("kappa = 0.9", 18.63, "kappa_09", _guidance(0.2, 0.9)),
        ),
    ),
)


@dataclasses.dataclass(frozen=True)
class Run:
    """One training run and its evaluation.

    name: of its folder. overrides: of configs/digits.py, by dotted name. equal_flops: as `Group` has it.
    """

    name: str
    overrides: Overrides
    equal_flops: bool = False


def all_runs(only: str = "") -> list[Run]:
    """Return the runs of all groups, or of one, each once, the most important first.

    Args:
      only: name of a group; "" = all.

    Raises:
      BadInput: if there is no such group.
    """
    names = [group.name for group in GROUPS]
    if only and only not in names:
        raise BadInput(f"--only={only}: must be one of {', '.join(names)}{nearest(only, names)}")
    runs = {} if only else {name: Run(name, {**PAPER, "seed": i}) for i, name in enumerate(SEEDS)}
    for group in GROUPS:
        if only in ("", group.name):
            for setting in group.settings:
                base: Overrides = EQUAL_FLOPS if group.equal_flops else PAPER
                overrides = {**base, **setting.overrides}
                run = Run(setting.run, overrides, group.equal_flops)
                runs.setdefault(setting.run, run)
    return list(runs.values())


def make_config(run: Run, num_steps: int = NUM_STEPS) -> ConfigDict:
    """Return the config of a run of so many steps."""
    config = digits()
    steps = {
        "train.num_steps": num_steps,
        "optim.warmup_steps": num_steps // 10,
        "objective.anneal_to": num_steps,  # a curriculum over the whole run
    }
    for key, value in {**SHORT, **steps, **run.overrides}.items():
        section, _, name = key.rpartition(".")
        (config[section] if section else config)[name] = value
    return config


def step_flops(config: ConfigDict) -> float:
    """Return the FLOPs of a config's compiled training step, as XLA counts them."""
    source = validate(config, num_devices=1)
    parts = train.step_parts(config, source)
    state = jax.eval_shape(lambda: initial_state(parts))
    x = jax.ShapeDtypeStruct((parts.batch_size, *source.shape), jnp.float32)
    labels = jax.ShapeDtypeStruct((parts.batch_size,), jnp.int32)
    compiled = jax.jit(make_train_step(parts), donate_argnums=0).lower(state, x, labels).compile()
    return float(compiled.cost_analysis()["flops"])


def affordable_steps(budget: float, flops: float) -> int:
    """Return how many steps of so many FLOPs a budget of FLOPs pays for, at least 1."""
    return max(1, round(budget / flops))


class Flops:
    """The FLOPs of a step of each run, kept in a file since every count is a compilation.

    Args:
      path: of the file.
      count: FLOPs of a config's step.
    """

    def __init__(self, path: Path, count: Callable[[ConfigDict], float] = step_flops) -> None:
        self._path, self._count = path, count

    def of(self, run: Run) -> float:
        """Return the FLOPs of a step of a run."""
        config = make_config(run)
        key = json.dumps({"run": run.name, "config": _of_a_run(config)}, sort_keys=True)
        known = json.loads(self._path.read_text()) if self._path.exists() else {}
        if key not in known:
            known[key] = self._count(config)
            self._path.parent.mkdir(parents=True, exist_ok=True)
            replace_file(self._path, json.dumps(known, indent=1).encode())
        return known[key]


def planned_steps(run: Run, flops: Flops) -> int:
    """Return the number of steps of a run: `NUM_STEPS`, or what the budget of the comparison pays for."""
    if not run.equal_flops:
        return NUM_STEPS
    first = next(group for group in GROUPS if group.equal_flops).settings[0]
    budget = NUM_STEPS * flops.of(Run(first.run, {**EQUAL_FLOPS, **first.overrides}, equal_flops=True))
    return affordable_steps(budget, flops.of(run))


def _of_a_run(config: ConfigDict) -> dict[str, Any]:
    """Return what decides a run's numbers, as JSON keeps it."""
    return {
        name: section for name, section in json.loads(as_json(config)).items() if name in SECTIONS_OF_A_RUN
    }


class Stopped(Exception):
    """The process was told to stop; the run at hand is saved."""


def finished(run: Run, folder: Path, num_steps: int | None = None) -> dict[str, Any] | None:
    """Return the result of a run, or None where it is not finished.

    Args:
      run: to look up.
      folder: of all runs.
      num_steps: that it must have; None = any.

    Raises:
      BadInput: if the result is of another config.
    """
    path = folder / run.name / "result.json"
    if not path.exists():
        return None
    result = json.loads(path.read_text())
    config = make_config(run, result["num_steps"] if num_steps is None else num_steps)
    if result["config"] != _of_a_run(config):
        raise BadInput(f"{path.parent}: its result is of another config; move the folder away")
    return result


def execute(run: Run, folder: Path, flops: Flops) -> dict[str, Any]:
    """Train and evaluate a run, or continue it, and return its result.

    Raises:
      BadInput: if its folder holds another run.
      Stopped: if the process was told to stop.
    """
    start = time.monotonic()
    num_steps = planned_steps(run, flops)
    config = make_config(run, num_steps)
    known = finished(run, folder, num_steps)
    if known is not None:
        return known
    workdir = folder / run.name
    workdir.mkdir(parents=True, exist_ok=True)
    result = {"config": _of_a_run(config), "num_steps": num_steps, "diverged": False, "machine": machine()}
    with (workdir / "log.txt").open("a") as log, contextlib.redirect_stdout(log):
        try:
            train.run(config, workdir)
            with contextlib.closing(Checkpoints(workdir, read_only=True)) as checkpoints:
                if checkpoints.steps[-1] < num_steps:
                    raise Stopped(f"{run.name} at step {checkpoints.steps[-1]}")
            evaluate.run(config, workdir)
            rows = json.loads((workdir / "eval.json").read_text())["rows"]
        except FloatingPointError as error:
            result |= {"diverged": True, "why": str(error)}
            rows = []
    if run.equal_flops:
        result["step_flops"] = flops.of(run)
    result |= {"rows": rows, "seconds": time.monotonic() - start}
    replace_file(workdir / "result.json", json.dumps(result, indent=1).encode())
    jax.clear_caches()  # the next run compiles its own step, and 40 of them do not fit
    gc.collect()
    return result


def run_all(runs: Sequence[Run], folder: Path, flops: Flops) -> None:
    """Execute runs one after another, with a line about each."""
    seconds = []
    for i, run in enumerate(runs):
        known = (folder / run.name / "result.json").exists()
        left = np.mean(seconds) * (len(runs) - i) / 60 if seconds else math.nan
        about = "already finished" if known else f"about {left:.0f} minutes left" if seconds else "starts"
        print(f"[{i + 1}/{len(runs)}] {run.name}: {about}", flush=True)
        result = execute(run, folder, flops)
        if not known:
            seconds.append(result["seconds"])
            scores = (
                "diverged"
                if result["diverged"]
                else ", ".join(f"{row['name']} {row['frechet_distance']:.2f}" for row in result["rows"])
            )
            print(f"    {result['num_steps']} steps, {result['seconds']:.0f} s: {scores}", flush=True)


def machine() -> str:
    """Return what this process runs on, hardware and versions, in words."""
    device = jax.devices()[0]
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "")
    kind = f"{os.cpu_count()} CPU cores ({model or platform.machine()})"
    if device.platform != "cpu":
        kind = f"{device.device_kind}, {kind}"
    return f"{kind}; Python {platform.python_version()}, JAX {jax.__version__}, NumPy {np.__version__}"


# ---------------------------------------------------------------------------------------------------------------------
# From results to the document. A score is a number, infinite where the run diverged; runs that are not finished have
# no result, and their settings no score.

Results = Mapping[str, Mapping[str, Any]]
"""Name of a run -> its `result.json`."""


def read_results(folder: Path) -> Results:
    """Return the results of all finished runs.

    Raises:
      BadInput: if a result is of another config than the table's, or no run is finished.
    """
    found = {run.name: finished(run, folder) for run in all_runs()}
    results = {name: result for name, result in found.items() if result is not None}
    if not results:
        raise BadInput(f"{folder} holds no finished run; run launch/ablations.sh without --document first")
    return results


def score(results: Results, run: str, steps: int = 1, column: str = "frechet_distance") -> float | None:
    """Return a score of a run's samples; None where the run is not finished or the score was not computed."""
    result = results.get(run)
    if result is None:
        return None
    if result["diverged"]:
        return math.inf if column == "frechet_distance" else None
    return next((row[column] for row in result["rows"] if row.get("steps") == steps), None)


def real_data(results: Results) -> float | None:
    """Return the Fréchet distance of held-out real data, or None where no run has been evaluated."""
    rows = (row for result in results.values() for row in result["rows"] if "steps" not in row)
    return next((row["frechet_distance"] for row in rows), None)


@dataclasses.dataclass(frozen=True)
class Noise:
    """How much the Fréchet distance at one step moves with the seed alone.

    values: of runs that differ in their seed, finite.
    """

    values: tuple[float, ...]

    @property
    def deviation(self) -> float:
        """The standard deviation of the logarithm of a distance, i.e. the relative one of a distance."""
        return float(np.std(np.log(self.values), ddof=1)) if len(self.values) > 1 else 0.0

    @property
    def ratio(self) -> float:
        """Two distances closer than by this factor are not told apart: two deviations of their difference."""
        return math.exp(2 * math.sqrt(2) * self.deviation)

    def tells_apart(self, a: float, b: float) -> bool:
        """Return whether two distances, perhaps infinite, differ by more than the seed explains."""
        return a != b and (math.isinf(a) or math.isinf(b) or max(a, b) > self.ratio * min(a, b))


def noise_of(results: Results) -> Noise:
    """Return the noise that the repeated baseline shows."""
    values = (score(results, run) for run in SEEDS)
    return Noise(tuple(value for value in values if value is not None and math.isfinite(value)))


Compared = Sequence[tuple[str, float, float]]
"""Settings with both figures: (label, published, ours)."""


def compared(group: Group, results: Results) -> Compared:
    """Return the settings of a group that have a published figure and one of ours."""
    pairs = ((setting.label, setting.published, score(results, setting.run)) for setting in group.settings)
    return [(label, theirs, ours) for label, theirs, ours in pairs if theirs is not None and ours is not None]


def _best(rows: Compared, column: int) -> str:
    return min(rows, key=lambda row: row[column])[0]


def _number(value: float | None, form: str = ".2f") -> str:
    if value is None:
        return "–"
    return format(value, form) if math.isfinite(value) else "diverged"


def pairs_of(rows: Compared, noise: Noise) -> tuple[int, list[tuple], int]:
    """Compare the order of every two settings with the published one.

    Returns:
      (number of pairs in the published order, pairs (better here, worse here) in the other order, number of pairs that
      the noise does not tell apart).
    """
    same, reversed_pairs, unclear = 0, [], 0
    for a, b in itertools.combinations(rows, 2):
        better, worse = sorted((a, b), key=lambda row: row[2])
        if not noise.tells_apart(a[2], b[2]):
            unclear += 1
        elif better[1] > worse[1]:
            reversed_pairs.append((better, worse))
        else:
            same += 1
    return same, reversed_pairs, unclear


def agreement(rows: Compared, noise: Noise) -> str:
    """Return sentences about how a group's order agrees with the published one."""
    if len(rows) < 2:
        return "Too few settings are finished to compare."
    here, published = _best(rows, 2), _best(rows, 1)
    value = {label: ours for label, _, ours in rows}
    if here == published:
        first = f"The best setting is the published one, {here}."
    else:
        clear = noise.tells_apart(value[here], value[published])
        how = "by more than the seed explains" if clear else "by no more than the seed explains"
        first = (
            f"The best setting here is {here} ({_number(value[here])}), the published best is {published} "
            f"({_number(value[published])} here): they differ {how}."
        )
    same, reversed_pairs, unclear = pairs_of(rows, noise)
    second = (
        f"Pairs of settings: {same} in the published order, {len(reversed_pairs)} in the opposite one, {unclear} too "
        "close to tell apart here."
    )
    theirs, ours = ([row[column] for row in rows] for column in (1, 2))
    if len(rows) < 3 or len(set(theirs)) == 1 or len(set(ours)) == 1:
        return f"{first} {second}"
    correlation = spearmanr(theirs, ours).statistic
    return f"{first} {second} Rank correlation (Spearman) {correlation:.2f} over {len(rows)} settings."


def disagreements(rows: Compared, noise: Noise) -> str:
    """Return what in a group contradicts the published order by more than the noise; "" if nothing does."""
    _, reversed_pairs, _ = pairs_of(rows, noise)
    return "; ".join(
        f"{better[0]} beats {worse[0]} ({_number(better[2])} to {_number(worse[2])}; published {better[1]:g} to "
        f"{worse[1]:g})"
        for better, worse in reversed_pairs
    )


def ranking(group: Group, results: Results, noise: Noise) -> str:
    """Return a group's settings in the order of their distance at one step, and which may share the first place."""
    known = [(score(results, setting.run), setting.label) for setting in group.settings]
    order = sorted(pair for pair in known if pair[0] is not None)
    if not order:
        return "No setting is finished."
    text = ", ".join(f"{label} ({_number(value)})" for value, label in order)
    close = [label for value, label in order[1:] if not noise.tells_apart(order[0][0], value)]
    last = f" Too close to the first to tell apart: {', '.join(close)}." if close else ""
    return f"Order here, at one step: {text}.{last}"


VISIBLY = 2.0
"""A setting that must fail has at least this many times the baseline's distance at one step."""
MUST_FAIL = {
    "tangent_v00": "tangent (v, 0, 0)",
    "tangent_v10": "tangent (v, 1, 0)",
    "tangent_v11": "tangent (v, 1, 1)",
    "share_0": "no rows with r < t",
}


@dataclasses.dataclass(frozen=True)
class Check:
    """What was expected of a run, in words, and whether it holds."""

    text: str
    passed: bool


def checks(results: Results) -> list[Check]:
    """Return the checks of the runs that are finished: what must fail fails visibly at one step."""
    baseline = score(results, BASELINE)
    if baseline is None:
        return []
    found = []
    for run, what in MUST_FAIL.items():
        value = score(results, run)
        if value is not None:
            passed = math.isfinite(baseline) and value >= VISIBLY * baseline
            text = (
                f"{what}: {_number(value)} at one step is {'' if passed else 'not '}at least {VISIBLY:g} times "
                f"the baseline's {_number(baseline)}"
            )
            found.append(Check(text, passed))
    return found


def table(group: Group, results: Results) -> list[str]:
    """Return the lines of a group's table, the best of each column in bold."""
    header = "published FID (1-NFE, XL/2)" if group.equal_flops else "published FID (1-NFE, B/4, 80 epochs)"
    columns = [(header, [setting.published for setting in group.settings], "g", min)]
    if group.equal_flops:
        found = [results.get(setting.run, {}) for setting in group.settings]
        mega = [result["step_flops"] / 1e6 if "step_flops" in result else None for result in found]
        columns.append(("MFLOPs a step", mega, ",.0f", None))
        columns.append(("steps", [result.get("num_steps") for result in found], ",d", None))
    for steps in (1, 2, 8) if group.equal_flops else (1, 2):
        values = [score(results, setting.run, steps) for setting in group.settings]
        prefix = "Fréchet distance, " if steps == 1 else ""
        columns.append((f"{prefix}{steps} step{'s' * (steps > 1)}", values, ".2f", min))
    accuracy = [score(results, setting.run, 1, "class_accuracy") for setting in group.settings]
    columns.append(("class accuracy, 1 step", accuracy, ".1%", max))
    lines = [
        "| setting | " + " | ".join(name for name, *_ in columns) + " |",
        "|---" * (len(columns) + 1) + "|",
    ]
    for i, setting in enumerate(group.settings):
        cells = [_cell(values, i, form, best) for _, values, form, best in columns]
        missing = "" if setting.run in results else " (not run)"
        lines.append(f"| {setting.label}{missing} | " + " | ".join(cells) + " |")
    return lines


def _cell(values: Sequence[float | None], i: int, form: str, best: Callable | None) -> str:
    known = [value for value in values if value is not None]
    text = _number(values[i], form)
    return f"**{text}**" if best and len(known) > 1 and values[i] == best(known) else text


_INK, _MUTED, _FAINT, _BLUE, _PALE = "#1f2933", "#66727f", "#d9dee4", "#2563eb", "#bfdbfe"


def save_plot(path: Path, group: Group, results: Results) -> None:
    """Save a group's distances at one step beside the published ones, each panel with its own scale."""
    labels = [setting.label for setting in group.settings]
    ours = [score(results, setting.run) for setting in group.settings]
    figure = Figure(figsize=(9.2, 1.35 + 0.34 * len(labels)), layout="constrained")
    figure.suptitle(f"{group.title}: one step", fontsize=11, color=_INK)
    left, right = figure.subplots(1, 2, sharey=True)
    _bars(left, labels, ours)
    left.set_title("8x8 digits, Fréchet distance", fontsize=9.5, color=_MUTED)
    seeds = noise_of(results).values
    for i, setting in enumerate(group.settings):
        if setting.run == BASELINE:
            left.plot(seeds, [i] * len(seeds), "|", color=_INK, markersize=9, label=f"{len(seeds)} seeds")
    floor = real_data(results)
    if floor is not None and any(value is not None for value in ours):
        left.axvline(floor, color=_INK, linewidth=1, linestyle=(0, (3, 3)), label="held-out real data")
    if left.get_legend_handles_labels()[0]:
        figure.legend(loc="outside lower left", fontsize=8, frameon=False, ncols=2, labelcolor=_MUTED)
    _bars(right, labels, [setting.published for setting in group.settings])
    what = "XL/2, own recipes" if group.equal_flops else "B/4, 80 epochs"
    right.set_title(f"published FID, ImageNet, {what}", fontsize=9.5, color=_MUTED)
    FigureCanvasAgg(figure)
    figure.savefig(path, format="png", dpi=110, facecolor="white")


def _bars(ax: Axes, labels: Sequence[str], values: Sequence[float | None]) -> None:
    known = [value for value in values if value is not None and math.isfinite(value)]
    top = max(known, default=1.0)
    for i, value in enumerate(values):
        is_number = value is not None and math.isfinite(value)
        length = value if is_number else 0.0
        ax.barh(i, length, height=0.66, color=_BLUE if known and value == min(known) else _PALE)
        text = "" if value is None else _number(value, ".4g")
        ax.text(length + 0.02 * top, i, text, va="center", fontsize=8.5, color=_INK)
    ax.set(xlim=(0, 1.16 * top), ylim=(len(labels) - 0.4, -0.6))
    ax.set_yticks(range(len(labels)), labels, fontsize=9, color=_INK)
    ax.tick_params(length=0, labelcolor=_INK)
    ax.tick_params(axis="x", labelsize=8, labelcolor=_MUTED)
    ax.xaxis.set_major_locator(MaxNLocator(5))
    ax.grid(axis="x", color=_FAINT, linewidth=0.6)
    ax.set_axisbelow(True)
    ax.spines[["left", "right", "top"]].set_visible(False)
    ax.spines["bottom"].set_color(_FAINT)


def document(results: Results) -> str:
    """Return the whole document, in Markdown."""
    noise = noise_of(results)
    lines = _introduction(results, noise)
    for group in GROUPS:
        rows = compared(group, results)
        lines += [
            "",
            f"## {group.title}",
            "",
            *_note(group),
            *table(group, results),
            "",
            agreement(rows, noise),
        ]
        if group.equal_flops:
            lines += ["", ranking(group, results, noise)]
        lines += ["", f"![{group.title}]({PICTURES.name}/{group.name}.png)"]
    lines += ["", "## Where digits do not agree with the paper", "", *_contradictions(results, noise)]
    return "\n".join(lines) + "\n"


def _introduction(results: Results, noise: Noise) -> list[str]:
    config = make_config(all_runs()[0])
    total = len(all_runs())
    minutes = sum(result["seconds"] for result in results.values()) / 60
    machines = sorted({result["machine"] for result in results.values()})
    diverged = [name for name, result in results.items() if result["diverged"]]
    model, optim, times = config.model, config.optim, config.times
    values = " / ".join(f"{value:.2f}" for value in noise.values)
    spread = (
        f"The baseline with {len(noise.values)} seeds gives {values}, a standard deviation of {noise.deviation:.1%}. "
        f"Two settings whose distances differ by less than a factor of {noise.ratio:.2f} (two standard deviations of "
        "a difference) are called too close to tell apart. With so few seeds this is a rough yardstick, and it is "
        "taken to be the same, in per cent, for every setting."
        if len(noise.values) > 1
        else "The baseline has not been run with several seeds, so nothing here says which differences mean something."
    )
    lines = [
        "# The paper's ablations in miniature",
        "",
        "Written by `bash launch/ablations.sh`, sentences included, from the runs in `runs/ablations`; do not edit. "
        "`bash launch/ablations.sh --document` writes it again without training.",
        "",
        f"- Runs: {len(results)} of {total} finished"
        + (f"; diverged: {', '.join(diverged)}" if diverged else "; none diverged")
        + f". Wall time: {minutes:.0f} minutes for all of them, one after another.",
        *(f"- Machine: {machine}." for machine in machines),
        f"- Data: the 1,797 real 8x8 digits. Network: DiT, {model.depth} blocks of width {model.width}, "
        f"{model.num_heads} heads, patches of {model.patch_size} pixels. Training: {config.train.num_steps:,} steps of "
        f"{config.train.batch_size} rows, adam {optim.lr:g} ({optim.schedule}, {optim.warmup_steps} steps of warm-up), "
        f"average {config.ema.decays[0]}.",
        f"- Baseline: the paper's settings: {1 - config.draws.instant_share:.0%} rows with r < t, tangent (v, 0, 1), "
        f"conditioning on {model.time_conditioning}, {times.name}({times.t_mean:g}, {times.t_std:g}), "
        f"p = {config.weight.p:g}, no guidance, {config.draws.label_drop_share:.0%} of the labels dropped. Each table "
        "but that of the objectives changes one of them.",
        "- Score: the Fréchet distance of 2,000 samples to the training images, in the features of a small classifier "
        f"(the smaller the better; held-out real images score {_number(real_data(results))}), and the share of "
        "samples in their class, which the average picture of a class passes too, so that it counts only with a small "
        "distance. Best in bold.",
        "- Published: MeanFlow (arXiv 2505.13447), table 1: FID of one step, ImageNet 256x256, DiT-B/4, 80 epochs. "
        "The numbers themselves cannot be compared with ours; the order of settings can.",
        f"- Noise: every setting is one run with one seed. {spread}",
        "",
        "## What must fail",
        "",
        "Only the total derivative in t, tangent (v, 0, 1), makes the identity true, and without rows with r < t the "
        "network is never taught a long step. The other tangents and that share must fail visibly at one step:",
        "",
    ]
    found = checks(results)
    lines += [f"- {'passed' if check.passed else '**FAILED**'}: {check.text}" for check in found]
    return lines if found else [*lines, "Not checked: the baseline or these runs are not finished."]


def _note(group: Group) -> list[str]:
    """Return what a reader of a group's table has to know, and an empty line."""
    if not group.equal_flops:
        return []
    config = make_config(Run("", EQUAL_FLOPS))
    times, draws = config.times, config.draws
    return [
        f"Recipe of all rows: that of configs/digits.py, which leans towards long intervals: logit t ~ "
        f"N({times.t_mean:g}, {times.t_std:g}), logit r ~ N({times.r_mean:g}, {times.r_std:g}), "
        f"{draws.instant_share:.0%} of the rows with r = t, p = {config.weight.p:g}, no labels dropped. Flow matching "
        "has r = t in all rows, Shortcut takes dyadic times, consistency r = 0. alpha-Flow's and SoFlow's curricula "
        "last the whole run. SplitMeanFlow, Shortcut and terminal velocity are also run with p = 0: the target of "
        "their rows with r < t comes from the network alone, so that their error can be small while the network is "
        "wrong, and the adaptive weight raises the weight of a small error. The last two rows are on the in-context "
        "transformer of improved MeanFlow, of the same depth and width (a head of 1 block for each output), whose "
        "class and time tokens make the sequence several times as long as the 4 patches; all others share the DiT.",
        "",
        f"FLOPs: the same for all rows, those of {NUM_STEPS:,} steps of MeanFlow, as XLA counts them in each compiled "
        "training step; the schedule of the learning rate shrinks with the number of steps. alpha-Flow's step holds "
        "both of its forms under a condition, of which XLA counts the dearer one, which is what a step executes at "
        "most.",
        "",
        "Published, where there is a figure: one step, ImageNet 256x256, guided, XL/2 networks, each with its "
        "authors' recipe; improved MeanFlow's is its objective alone on MeanFlow's network. They are not at equal "
        "FLOPs.",
        "",
    ]


def _contradictions(results: Results, noise: Noise) -> list[str]:
    rows = {group.title: compared(group, results) for group in GROUPS}
    found = {title: disagreements(pairs, noise) for title, pairs in rows.items() if len(pairs) > 1}
    lines = [f"- **{title}**: {text}." for title, text in found.items() if text]
    rest = [title for title, text in found.items() if not text]
    if lines:
        lines = ["Pairs of settings in the opposite order, by more than the seed explains:", "", *lines, ""]
    if rest:
        lines.append("No pair of settings is in the opposite order by more than the seed explains in: ")
        lines[-1] += "; ".join(rest) + "."
    return lines or ["Too few settings are finished to compare."]


def write_document(results: Results, path: Path, pictures: Path) -> list[Check]:
    """Write the document and its pictures, and return the checks that failed."""
    pictures.mkdir(parents=True, exist_ok=True)
    for group in GROUPS:
        save_plot(pictures / f"{group.name}.png", group, results)
    replace_file(path, document(results).encode())
    return [check for check in checks(results) if not check.passed]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code: 0 done, 1 a check failed, 2 bad input."""
    parser = argparse.ArgumentParser(prog="launch/ablations.sh", description=__doc__.split("\n")[0])
    names = ", ".join(group.name for group in GROUPS)
    parser.add_argument("--only", default="", metavar="GROUP", help=f"the runs of one group: {names}")
    parser.add_argument("--document", action="store_true", help="write the document alone")
    arguments = parser.parse_args(argv)
    try:
        runs = all_runs(arguments.only)
        if not arguments.document:
            run_all(runs, RUNS, Flops(RUNS / "flops.json"))
        failed = write_document(read_results(RUNS), DOCUMENT, PICTURES)
    except Stopped as stop:
        print(f"told to stop: saved {stop}; the same command continues")
        return 0
    except BadInput as error:
        print(f"ablations: {error}", file=sys.stderr)
        return 2
    print(f"wrote {DOCUMENT} and {PICTURES}/*.png")
    if failed:
        print(f"ablations: failed: {'; '.join(check.text for check in failed)}", file=sys.stderr)
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
