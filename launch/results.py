"""Every objective on the digits and on MNIST at equal training FLOPs, three seeds of each.

A study, see runner.py. `METHODS` says what each changes in a data set's config. MeanFlow has
`NUM_STEPS`; the others have as many steps as take the same FLOPs.
"""

import math
import os
import sys
from functools import cache, partial
from itertools import product
from pathlib import Path
from typing import NamedTuple

import numpy as np
from ml_collections import ConfigDict

import mf_jax
from configs import digits, mnist
from configs.rows import join
from launch import runner
from launch.runner import QUIET, Result, Results, as_table, score, whole_run
from mf_jax.bench.step import compile_step
from mf_jax.data import make_source, read
from mf_jax.data.pixels import to_pixels
from mf_jax.reporting.run_log import TIMING, TIMING_FILE
from mf_jax.reporting.sample_grid import save_rows
from mf_jax.runtime.json_files import read_json
from mf_jax.runtime.sharding import make_mesh
from mf_jax.validation import validate

RUNS, PICTURES = Path("runs/results"), "one_step.npy"
GROUPS = {"digits": digits.get_config, "mnist": partial(mnist.get_config, "meanflow")}
NUM_STEPS = {"digits": 1200, "mnist": 800}
SEEDS, STEPS, SHOWN = 3, (1, 2, 4, 8), 20
METHODS = {
    "MeanFlow": digits.ROWS[""],
    "improved MeanFlow": dict(objective=dict(name="improved_meanflow", velocity="boundary")),
    "alpha-Flow": digits.ROWS["alpha_flow"],
    "SoFlow": digits.ROWS["soflow"],
    "SplitMeanFlow": digits.ROWS["split_meanflow"],
    "Shortcut": digits.ROWS["shortcut"],
    "terminal velocity": digits.ROWS["terminal_velocity"],
    "consistency": join(digits.ROWS["consistency"], dict(eval=dict(renoise=True))),
    # it has no target for guidance
    "flow matching": join(digits.ROWS["flow_matching"], dict(guidance=dict(omega=1.0))),
}
SCORES = {  # heading, format, what the best is
    "class_accuracy": ("share in its class", ".1%", max),
    "frechet_distance": ("Fréchet distance", ".2f", min),
    "kernel_distance": ("kernel distance (KID)", ".1f", min),
    "nearest_training": ("nearest training picture", ".3f", None),
}


class Row(NamedTuple):
    """A run: its data set, method, seed and folder."""

    group: str
    method: str
    seed: int
    run: str


ROWS = tuple(
    Row(group, method, seed, f"{group}/{method.replace(' ', '_')}_{seed}")
    for group, seed, method in product(GROUPS, range(SEEDS), METHODS)  # a table after one seed
)


def make_config(row: Row, num_steps: int) -> ConfigDict:
    """Return the config of a row's run of so many steps; its curriculum lasts the whole run."""
    file, config = os.environ.get("MF_MNIST", ""), GROUPS[row.group]()
    data = {"data.name": "arrays", "data.path": file} if file and row.group == "mnist" else {}
    steps = {"train.num_steps": num_steps, "objective.anneal_to": num_steps, "eval.steps": STEPS}
    config.update(METHODS[row.method])
    config.update_from_flattened_dict({**QUIET, **data, **steps, "seed": row.seed})
    return config


@cache
def cost_of(group: str, method: str) -> dict[str, float]:
    """Return the costs of a training step."""
    config = make_config(Row(group, method, 0, ""), NUM_STEPS[group])
    placed = validate(config, num_devices=1), make_mesh(data=0, fsdp=1)
    cost, _ = compile_step(config, *placed, lambda line: None)
    num_bytes = cost["temp_bytes"] + cost["argument_bytes"]
    return {"MFLOPs a step": 1e3 * cost["gflop"], "MB of memory": num_bytes / 1e6}


def execute(row: Row) -> Result | None:
    """Train, evaluate and sample a run, or continue it; None if it was told to stop."""
    cost, (most, *_) = cost_of(*row[:2]), cost_of(row.group, "MeanFlow").values()
    each, folder = cost["MFLOPs a step"], RUNS / row.run
    num_steps = max(1, round(NUM_STEPS[row.group] * most / each))
    config = make_config(row, num_steps)
    if (result := whole_run(config, folder)) is None:
        return None
    if result["rows"]:
        samples = mf_jax.load(folder).sample(num=SHOWN, seed=0)  # the classes in turn
        real = read(make_source(config.data, split="held_out"))
        nth = [np.flatnonzero(real.labels == i % 10)[i // 10] for i in range(SHOWN)]
        np.save(folder / PICTURES, np.stack([to_pixels(real.x[nth]), samples]))
    seconds = read_json(folder / TIMING_FILE, TIMING)["wall_seconds"]
    amounts = {"steps": num_steps, "GFLOPs": each * num_steps / 1e3, "seconds": seconds}
    return result | {"costs": amounts | cost}


def table(group: str, results: Results) -> str:
    """Return a data set's tables in Markdown, and the link to its picture."""
    done = [row for row in ROWS if row.group == group and row.run in results]
    runs = [[row.run for row in done if row.method == method] for method in METHODS]

    def costs(name: str) -> list[list[float]]:
        return [[results[run]["costs"][name] for run in each] or [math.nan] for each in runs]

    columns = {name: (costs(name), ",.0f", None) for name in results[done[0].run]["costs"]}
    texts = [as_table(list(METHODS), columns, "training")]
    whole = max((row.run for row in done), key=lambda run: len(results[run]["rows"]))
    for key, (heading, form, best) in SCORES.items():
        real = [score(results, whole, None, each) for each in (key, f"{key}_std")]
        text = " ± ".join(format(each, form) for each in real if not math.isnan(each))
        columns = {}
        for k in STEPS:
            found = [[score(results, run, k, key) for run in each] or [math.nan] for each in runs]
            columns[f"{k} step{'s' * (k > 1)}"] = [text, *found], form, best
        texts.append(as_table(["real data, held out", *METHODS], columns, heading))
    return "\n".join([*texts, f"![One-step samples](results/{group}.png)\n"])


def save_picture(path: Path, group: str, results: Results) -> None:
    """Save one-step samples of the first seed of each method below real pictures."""
    whole = [r for r in ROWS if r[::2] == (group, 0) and results.get(r.run, {}).get("rows")]
    shown = [(row.method, *np.load(RUNS / row.run / PICTURES)) for row in whole]
    rows = [("real data", real) for _, real, _ in shown[:1]] + [(name, x) for name, _, x in shown]
    if rows:
        save_rows(path, rows, caption="one network evaluation a sample, the first seed, not chosen")


if __name__ == "__main__":
    sys.exit(runner.main(sys.modules[__name__]))
