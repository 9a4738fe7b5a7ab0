"""Five experiments on the open problems of the method, on toys, Gaussians and the 8x8 digits.

A study, see runner.py. Each run trains some seeds, with the FLOPs of its group's first run.
"""

import dataclasses
import math
import sys
from collections.abc import Callable, Sequence
from itertools import product
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib.figure import Figure

from launch import runner
from launch.runner import Result, Results
from launch.small import measures, training
from launch.small.data import data_of
from launch.small.training import Training, Tuned
from mf_jax import Derivative, MeanFlow
from mf_jax.objectives.terms import AdaptiveWeight

RUNS = Path("runs/open_problems")
PLAIN, USUAL = (MeanFlow(weight=AdaptiveWeight(p=p)) for p in (0.0, 0.25))


class Row(NamedTuple):
    """A row of a table and a point of a figure.

    series, place: its line in the figure, and where on it; no place is a level. run: its run; rows
    of one run share it. how: the run's setting; None = real data. part: prefix of its scores.
    """

    group: str
    label: str
    series: str
    place: float | str | None
    run: str
    how: Training | None
    part: str = ""


class Group(NamedTuple):
    """A table and its figure: title, name of the x axis, keys of `SCORES`, what measures them."""

    title: str
    axis: str
    scores: str
    measure: Callable[[training.Run], measures.Scores]


SCORES = {  # heading, format, what the best is
    "variance": ("gradient variance", ".3f", min),
    "u_error": ("error of u", ".3f", min),
    "w2": ("W2", ".3f", min),
    "recall": ("recall", ".3f", max),
    "nearest": ("nearest training row", ".3f", None),
    "residual": ("identity residual", ".3f", min),
    "mflops": ("MFLOPs a step", ".1f", None),
    "megabytes": ("MB", ".2f", None),
    "outside": ("outside of all modes", ".3f", min),
    "length": ("path length / distance", ".4f", min),
    "bend": ("bend of the paths", ".3f", min),
    "gap": ("additivity gap", ".3f", min),
    "map_error": ("error of the map", ".3f", min),
    "largest": ("largest du/dt", ".2f", None),
    "stable": ("steps before divergence", ",.0f", max),
}
_COSTS = ("mflops", "megabytes")  # in the table alone
_SHARE, _OF_ESTIMATES = "share of the estimate in the tangent", "variance u_error w2 recall nearest"
GROUPS = {
    "stability": Group("Two moons of 128 rows", _SHARE, _OF_ESTIMATES, measures.of_estimates),
    "digits": Group("8x8 digits", _SHARE, _OF_ESTIMATES, measures.of_estimates),
    "derivative": Group(
        "The derivative without a JVP: eight Gaussians",
        "step of the difference",
        "w2 residual mflops megabytes",
        measures.of_derivative,
    ),
    "hybrid": Group(
        "Samplers, and an MMD term: eight modes", "steps", "w2 outside", measures.of_hybrid
    ),
    "coupling": Group("Couplings", "", "length bend gap w2 map_error", measures.of_coupling),
    "control": Group(
        "Control of du/dz", "weight of the term", "map_error w2 largest stable", measures.of_control
    ),
}


_LARGE = {"steps": 1000, "width": 256, "batch_size": 128}
_SOURCES = ("network", "average", "exact")


def _of_estimates(group: str, data: str, sources: Sequence[str], shares: Sequence[float], **size):
    for target, source, share in product(("sample", "exact"), sources, shares):
        told = f"target {target}, tangent"
        label = f"{told} {share:g} {source}" if share else f"{told} sample"
        names = ("target exact", f"tangent {source if share else sources[-1]}")
        tuned = Tuned(PLAIN, names, (float(target == "exact"), share), data)
        how = Training(data, tuned, **size)
        yield Row(group, label, f"{told} {source}", share, f"{group} {label}", how)


def _rows():
    for group, data in REAL.items():
        yield Row(group, f"{data}, held-out", "held-out data", None, f"real {data}", None)
    yield from _of_estimates("stability", REAL["stability"], _SOURCES, (0.0, 0.5, 0.94, 1.0))
    yield from _of_estimates("digits", "digits", _SOURCES[::2], (0.0, 1.0), **_LARGE)
    for dtype, kind in product(("float32", "bfloat16"), ("jvp", "backward", "central")):
        deltas = (1e-4, 1e-3, 5e-3, 1e-2, 5e-2) if dtype == "float32" else (1e-3, 5e-3, 5e-2)
        for delta in deltas if kind != "jvp" else (None,):
            series = f"{kind}, {dtype}"
            label = f"{series}, {delta:g}" if delta else series
            tuned = Tuned(dataclasses.replace(USUAL, derivative=Derivative(kind, delta or 0.0)))
            how = Training("eight_gaussians", tuned, dtype=dtype)
            yield Row("derivative", label, series, delta, f"derivative {label}", how)
    for factor, kind, steps in product((0.0, 0.1, 1.0), ("composed", "renoised"), (1, 2, 4, 8)):
        how = Training("eight_gaussians", Tuned(USUAL, ("mmd",), (factor,)))
        series, run, part = f"MMD {factor:g}, {kind}", f"hybrid {factor:g}", f"{kind}_{steps}_"
        yield Row("hybrid", f"{series}, {steps}", series, f"{steps}", run, how, part)
    pairs = ("independent", "dealt 64", "dealt 256", "dealt 1024", "reflow 0", "reflow 0.1")
    for data, each in product(("eight_gaussians", "tilted"), pairs):
        how, place = Training(data, Tuned(USUAL), pairs=each), each.replace("dealt", "OT")
        yield Row("coupling", f"{data}, {place}", data, place, f"coupling {data} {each}", how)
    controls, factors = ("lipschitz", "monotone", "non_expansive"), (0.0, 0.1, 1.0)
    for data, control, factor in product(("narrow", "wide", "eight_gaussians"), controls, factors):
        numbers = tuple(factor * (control == each) for each in controls)
        label = f"{data}, {control} {factor:g}" if factor else f"{data}, none"
        how = Training(data, Tuned(USUAL, controls, numbers), lr=1e-2, steps=2000)
        series, run = f"{data}, {control}", f"control {label}"
        yield Row("control", label, series, f"{factor:g}", run, how)


REAL = {"stability": "two_moons 128", "digits": "digits"}
REAL |= dict.fromkeys(("derivative", "hybrid", "coupling"), "eight_gaussians")
"""Groups whose tables have a row of held-out data."""
ROWS = tuple(_rows())


def make_config(row: Row, _num_steps: int) -> dict[str, str]:
    """Return what decides a run's numbers, beside its steps."""
    return {"training": repr(row.how), "seeds": str(training.SEEDS)}


def execute(row: Row) -> Result:
    """Train and measure the seeds of a run; of real data compare other rows with the held-out."""
    if row.how is None:
        data = data_of(row.run.removeprefix("real "))
        apart = measures.sample_scores(data.held_out, data)["nearest"]
        scores = measures.sample_scores(data.other, data) | {"nearest": apart}
        return {"num_steps": 1, "rows": [scores]}
    first = next(each.how for each in ROWS if each.group == row.group and each.how)
    flops, rows = training.step_flops(row.how), []
    num_steps = max(1, round(first.steps * training.step_flops(first) / flops))
    for seed in range(training.SEEDS):
        run = training.run_of(row.how, num_steps, seed)
        scores = measures.scores_of(run) | GROUPS[row.group].measure(run)
        finite = {key: float(value) for key, value in scores.items() if math.isfinite(value)}
        rows.append({"mflops": flops / 1e6, **finite})
    return {"num_steps": num_steps, "rows": rows}


def values_of(row: Row, results: Results, key: str) -> list[float]:
    """Return a row's score by seed: infinite where a seed has none, NaN where none has it."""
    seeds = results.get(row.run, {}).get("rows", [])
    found = [each.get(row.part + key, math.inf) for each in seeds]
    return found if np.isfinite(found).any() else [math.nan]


def table(group: str, results: Results) -> str:
    """Return a group's table in Markdown."""
    rows = list({row.label: row for row in ROWS if row.group == group}.values())
    trained = [results.get(row.run, {}) if row.how else {} for row in rows]
    columns = {"steps": ([each.get("num_steps", math.nan) for each in trained], ",.0f", None)}
    for key in GROUPS[group].scores.split():
        heading, form, best = SCORES[key]
        values = [values_of(row, results, key) for row in rows]
        for i, row in enumerate(rows):  # real data compete with no setting
            if row.how is None and math.isfinite(values[i][0]):
                values[i] = format(values[i][0], form)
        columns[heading] = values, form, best
    return runner.as_table([row.label for row in rows], columns)


def save_picture(path: Path, group: str, results: Results) -> None:
    """Save a panel for each score but costs, with a line for each series."""
    rows = [row for row in ROWS if row.group == group]
    keys = [key for key in GROUPS[group].scores.split() if key not in _COSTS]
    wide = 2 if len(keys) == 4 else min(3, len(keys))
    tall = math.ceil(len(keys) / wide)
    figure = Figure(figsize=(4.4 * wide, 3.2 * tall + 1), layout="constrained")
    figure.suptitle(GROUPS[group].title)
    lines = {}
    for nth, key in enumerate(keys, start=1):
        panel = figure.add_subplot(tall, wide, nth)
        panel.set_title(SCORES[key][0], fontsize=9.5)
        panel.set_xlabel(GROUPS[group].axis)
        panel.spines[["right", "top"]].set_visible(False)
        for i, series in enumerate(dict.fromkeys(row.series for row in rows)):
            own = {row.place: values_of(row, results, key) for row in rows if row.series == series}
            own = {place: each for place, each in own.items() if np.isfinite(each).all()}
            places, means = list(own), [np.mean(each) for each in own.values()]
            spreads = [np.std(each, ddof=len(each) > 1) for each in own.values()]
            if places == [None]:
                lines[series] = panel.axhline(means[0], color=f"C{i}", linestyle="--")
            elif places:
                look = {"color": f"C{i}", "marker": "o", "markersize": 3, "capsize": 2}
                lines[series] = panel.errorbar(places, means, spreads, **look)
        panel.tick_params("x", rotation=40 if group == "coupling" else 0, labelsize=8)
        if group == "derivative":
            panel.set_xscale("log")
    figure.legend(lines.values(), lines, loc="outside lower center", ncols=3, fontsize=8)
    figure.savefig(path, dpi=80, facecolor="white")


if __name__ == "__main__":
    sys.exit(runner.main(sys.modules[__name__]))
