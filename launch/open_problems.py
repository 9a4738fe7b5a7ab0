"""Five experiments on the open problems of the method, on toys, Gaussians and the 8x8 digits.

A study, see runner.py. Each run trains some seeds, with the FLOPs of its group's first run.
"""

import dataclasses
import functools
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
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


def _real(group: str, data: str) -> Row:
    return Row(group, f"{data}, held-out", "held-out data", None, f"real {data}", None)


def _stability(group: str, data: str, sources: Sequence[str], shares: Sequence[float], **size: Any):
    yield _real(group, data)
    for target, source, share in product(("sample", "exact"), sources, shares):
        told = f"target {target}, tangent"
        label = f"{told} {share:g} {source}" if share else f"{told} sample"
        first = source if share else sources[-1]
        names, numbers = ("target exact", f"tangent {first}"), (float(target == "exact"), share)
        how = Training(data, Tuned(PLAIN, names, numbers, data), **size)
        yield Row(group, label, f"{told} {source}", share, f"{group} {label}", how)


def _derivative(group: str):
    yield _real(group, "eight_gaussians")
    for dtype, kind in product(("float32", "bfloat16"), ("jvp", "backward", "central")):
        deltas = (1e-4, 1e-3, 5e-3, 1e-2, 5e-2) if dtype == "float32" else (1e-3, 5e-3, 5e-2)
        for delta in deltas if kind != "jvp" else (None,):
            series = f"{kind}, {dtype}"
            label = series if delta is None else f"{series}, {delta:g}"
            objective = dataclasses.replace(USUAL, derivative=Derivative(kind, delta or 0.0))
            how = Training("eight_gaussians", Tuned(objective), dtype=dtype)
            yield Row(group, label, series, delta, f"{group} {label}", how)


def _hybrid(group: str):
    yield _real(group, "eight_gaussians")
    for factor, kind, steps in product((0.0, 0.1, 1.0), ("composed", "renoised"), (1, 2, 4, 8)):
        how = Training("eight_gaussians", Tuned(USUAL, ("mmd",), (factor,)))
        series, part = f"MMD {factor:g}, {kind}", f"{kind}_{steps}_"
        yield Row(group, f"{series}, {steps}", series, f"{steps}", f"{group} {factor:g}", how, part)


def _coupling(group: str):
    yield _real(group, "eight_gaussians")
    pairs = ("independent", "dealt 64", "dealt 256", "dealt 1024", "reflow 0", "reflow 0.1")
    for data, each in product(("eight_gaussians", "tilted"), pairs):
        place = each.replace("dealt", "OT")
        how = Training(data, Tuned(USUAL), pairs=each)
        yield Row(group, f"{data}, {place}", data, place, f"{group} {data} {each}", how)


def _control(group: str):
    controls, factors = ("lipschitz", "monotone", "non_expansive"), (0.0, 0.1, 1.0)
    for data, control, factor in product(("narrow", "wide", "eight_gaussians"), controls, factors):
        numbers = tuple(factor * (control == each) for each in controls)
        label = f"{data}, {control} {factor:g}" if factor else f"{data}, none"
        how = Training(data, Tuned(USUAL, controls, numbers), lr=1e-2, steps=2000)
        yield Row(group, label, f"{data}, {control}", f"{factor:g}", f"{group} {label}", how)


_LARGE = {"steps": 1000, "width": 256, "batch_size": 128}
_SOURCES = ("network", "average", "exact")
ROWS = (
    *_stability("stability", "two_moons 128", _SOURCES, (0.0, 0.5, 0.94, 1.0)),
    *_stability("digits", "digits", _SOURCES[::2], (0.0, 1.0), **_LARGE),
    *_derivative("derivative"),
    *_hybrid("hybrid"),
    *_coupling("coupling"),
    *_control("control"),
)


@functools.cache
def budget(group: str) -> float:
    """Return the FLOPs of each run of a group: those of its first setting."""
    how = next(row.how for row in ROWS if row.group == group and row.how)
    return how.steps * training.step_flops(how)


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
    flops, rows = training.step_flops(row.how), []
    num_steps = max(1, round(budget(row.group) / flops))
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
    names = {}
    for nth, key in enumerate(keys, start=1):
        panel = figure.add_subplot(tall, wide, nth)
        panel.set_title(SCORES[key][0], fontsize=9.5)
        panel.set_xlabel(GROUPS[group].axis)
        panel.spines[["right", "top"]].set_visible(False)
        for i, series in enumerate(dict.fromkeys(row.series for row in rows)):
            own = {row.place: values_of(row, results, key) for row in rows if row.series == series}
            known = {place: each for place, each in own.items() if np.isfinite(each).all()}
            if known:
                names[series] = _draw(panel, known, f"C{i}")
        if group == "derivative":
            panel.set_xscale("log")
    figure.legend(names.values(), names, loc="outside lower center", ncols=3, fontsize=8)
    figure.savefig(path, dpi=80, facecolor="white")


def _draw(panel: Axes, values: Mapping[Any, Sequence[float]], color: str) -> Any:
    """Draw a series: {place: numbers of its seeds}, with their standard deviations."""
    places, means = list(values), [float(np.mean(each)) for each in values.values()]
    if places == [None]:
        return panel.axhline(means[0], color=color, linestyle="--")
    is_long = isinstance(places[0], str) and max(map(len, places)) > 4
    panel.tick_params("x", rotation=40 if is_long else 0, labelsize=8)
    spreads = [float(np.std(each, ddof=len(each) > 1)) for each in values.values()]
    return panel.errorbar(places, means, spreads, color=color, marker="o", markersize=3, capsize=2)


if __name__ == "__main__":
    sys.exit(runner.main(sys.modules[__name__]))
