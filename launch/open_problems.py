"""Five experiments on the open problems of the method, on toys, Gaussians and the 8x8 digits.

1. `rows_of` is the table of what runs; rows that name the same run share it.
2. Each run trains some seeds in this process, with the FLOPs of its group's first run. Its
   result.json in runs/open_problems/NAME marks it as finished.
3. The tables and figures of docs/open_problems.md are written from the result.json files.

Usage: bash launch/open_problems.sh [--only=GROUP] [--document]
"""

import dataclasses
import functools
import itertools
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure

from launch import runner, small_runs
from launch.runner import Result, Results, Study
from launch.small_runs import (
    MAPS,
    Data,
    Fitted,
    Mixed,
    Training,
    WithDiscrepancy,
    assignment,
    data_of,
    draws_of,
    noise_like,
    sample_scores,
    sampled,
)
from mf_jax import Controlled, Controls, Derivative, MeanFlow, VelocityEstimate
from mf_jax.objectives.terms import AdaptiveWeight

RUNS, DOCUMENT = Path("runs/open_problems"), Path("docs/open_problems.md")
Scores = dict[str, float]


class Row(NamedTuple):
    """A row of a table and a point of a figure.

    series, place: its line in the figure, and where on it; no place is a level. how: its run's
    setting; None = real data, whose name the run has. part: prefix of its scores.
    """

    group: str
    label: str
    series: str
    place: float | str | None
    run: str
    how: Training | None
    part: str = ""


class Group(NamedTuple):
    """A table and its figure: name of the x axis, whether it is logarithmic, scores and headings.

    Scores are (heading, format, what is best); those of `drawn` are panels.
    """

    title: str
    axis: str
    is_log: bool
    scores: dict[str, tuple]
    drawn: tuple[str, ...]


W2 = ("W2 to held-out rows", ".3f", min)
_STABILITY = {
    "variance": ("gradient variance", ".3g", min),
    "u_error": ("error of u", ".3f", min),
    "w2": W2,
    "recall": ("recall", ".3f", max),
    "nearest": ("nearest training row", ".3f", None),
}
GROUPS = {
    "stability": Group(
        "Velocity estimates: two moons of 128 rows",
        "share of the estimate in the tangent",
        False,
        _STABILITY,
        tuple(_STABILITY),
    ),
    "digits": Group(
        "Velocity estimates: 8x8 digits",
        "share of the estimate in the tangent",
        False,
        _STABILITY,
        tuple(_STABILITY),
    ),
    "derivative": Group(
        "The derivative without a JVP: eight Gaussians",
        "step of the difference",
        True,
        {
            "w2": W2,
            "residual": ("identity residual", ".3f", min),
            "milliseconds": ("ms a step", ".2f", None),
            "megabytes": ("MB", ".1f", None),
        },
        ("w2", "residual"),
    ),
    "hybrid": Group(
        "Composition, re-noising and a one-step MMD term: eight Gaussians",
        "steps",
        True,
        {"w2": W2, "outside": ("samples outside of all modes", ".3f", min)},
        ("w2", "outside"),
    ),
    "coupling": Group(
        "Couplings",
        "",
        False,
        {
            "length": ("path length / distance", ".4f", min),
            "bend": ("bend of the paths", ".3f", min),
            "gap": ("additivity gap", ".3f", min),
            "w2": W2,
            "map_error": ("error against the transport map", ".3f", min),
        },
        ("length", "bend", "gap", "w2", "map_error"),
    ),
    "control": Group(
        "Control of du/dz",
        "weight of the term",
        True,
        {
            "w2": W2,
            "map_error": ("error against the transport map", ".3f", min),
            "largest": ("largest du/dt", ".2f", min),
            "stable": ("share of steps before divergence, 4 x rate", ".2f", max),
        },
        ("w2", "map_error", "largest", "stable"),
    ),
}
PLAIN = MeanFlow(weight=AdaptiveWeight(p=0.0))
USUAL = MeanFlow(weight=AdaptiveWeight(p=0.25))


def _exact(data: str, **shares: float) -> VelocityEstimate:
    return VelocityEstimate("data", data=data_of(data).x, **shares)


def _stability() -> list[Row]:
    rows = []
    for group, data, size in (
        ("stability", "two_moons 128", {}),
        ("digits", "digits", {"width": 256, "steps": 1500, "batch_size": 128}),
    ):
        rows.append(Row(group, "held-out data", "held-out data", None, f"real {data}", None))
        for target, tangent, share in itertools.product(
            ("sample", "exact"), ("network", "average", "exact"), (0.0, 0.5, 0.94, 1.0)
        ):
            if group == "digits" and (
                tangent == "average" or share == 0.5 or (target, tangent) == ("exact", "network")
            ):
                continue
            source = {"exact": "data"}.get(tangent, tangent)
            estimates = (
                _exact(data, target=1.0) if target == "exact" else VelocityEstimate(),
                VelocityEstimate(),
            )
            told = f"target {target}, tangent "
            if share:
                own = (
                    _exact(data, tangent=share)
                    if tangent == "exact"
                    else VelocityEstimate(source, tangent=share)
                )
                estimates = estimates[0], own
            label = told + (f"{share:g} {tangent}" if share else "sample")
            how = Training(data, Mixed(PLAIN, *estimates), **size)
            rows.append(Row(group, label, told + tangent, share, f"{group} {label}", how))
    return rows


def _derivative() -> list[Row]:
    rows = [Row("derivative", "held-out data", "held-out data", None, "real eight_gaussians", None)]
    for dtype, kind in itertools.product(("float32", "bfloat16"), ("jvp", "backward", "central")):
        for delta in (1e-4, 1e-3, 5e-3, 1e-2, 5e-2) if kind != "jvp" else (None,):
            series = f"{kind}, {dtype}"
            label = series if delta is None else f"{series}, {delta:g}"
            objective = dataclasses.replace(USUAL, derivative=Derivative(kind, delta or 0.0))
            how = Training("eight_gaussians", objective, dtype=dtype)
            rows.append(Row("derivative", label, series, delta, f"derivative {label}", how))
    return rows


def _hybrid() -> list[Row]:
    rows = [Row("hybrid", "held-out data", "held-out data", None, "real eight_gaussians", None)]
    for factor, kind, steps in itertools.product(
        (0.0, 0.1, 1.0), ("composed", "renoised"), (1, 2, 4, 8)
    ):
        if (kind, steps) == ("renoised", 1):
            continue
        how = Training("eight_gaussians", WithDiscrepancy(USUAL, factor) if factor else USUAL)
        series = f"{kind}, MMD {factor:g}"
        rows.append(
            Row(
                "hybrid",
                f"{series}, {steps} steps",
                series,
                steps,
                f"hybrid {factor:g}",
                how,
                f"{kind}_{steps}_",
            )
        )
    return rows


def _coupling() -> list[Row]:
    rows = []
    for data, pairs in itertools.product(
        ("eight_gaussians", "tilted"),
        ("independent", "dealt 64", "dealt 256", "dealt 1024", "reflow 0", "reflow 0.1"),
    ):
        place = pairs.replace("dealt", "OT")
        name = f"{data.replace('_', ' ')}, {place}"
        rows.append(
            Row(
                "coupling",
                name,
                data,
                place,
                f"coupling {name}",
                Training(data, USUAL, pairs=pairs),
            )
        )
    return [
        Row(
            "coupling",
            "eight gaussians, held-out data",
            "held-out data",
            None,
            "real eight_gaussians",
            None,
        ),
        *rows,
    ]


def _control() -> list[Row]:
    rows = []
    for data, control, factor in itertools.product(
        ("narrow", "wide", "eight_gaussians"),
        ("lipschitz", "monotone", "non_expansive"),
        (0.0, 0.1, 1.0),
    ):
        name = f"{data}, {control} {factor:g}" if factor else f"{data}, none"
        objective = Controlled(USUAL, Controls(**{control: factor})) if factor else USUAL
        how = Training(data, objective, lr=1e-2, steps=2000)
        rows.append(
            Row("control", name, f"{data}, {control}", factor or 0.01, f"control {name}", how)
        )
    return rows


@functools.cache
def rows_of() -> tuple[Row, ...]:
    """Return all rows, in the order of the groups."""
    return tuple(
        row for make in (_stability, _derivative, _hybrid, _coupling, _control) for row in make()
    )


def runs_of(only: str = "") -> list[Row]:
    """Return the first row of each run, of all groups or of one."""
    runs: dict[str, Row] = {}
    for row in rows_of():
        if only in ("", row.group):
            runs.setdefault(row.run, row)
    return list(runs.values())


def _measured(row: Row, data: Data, fitted: Fitted, seed: int, num_steps: int) -> Scores:
    """Return a seed's scores; each group has its own beside those of one-step samples."""
    e = noise_like(data.held_out, seed)
    real = data_of(row.how.data)
    scores = sample_scores(made := sampled(fitted.average, e, 1), real)
    if row.how.data in MAPS:
        scores["map_error"] = float(np.sqrt(np.mean(np.square(made - e @ MAPS[row.how.data]))))
    return scores | MEASURES[row.group](row.how, data, fitted, seed, num_steps, e)


def _of_estimates(how: Training, data: Data, fitted: Fitted, seed: int, *_: Any) -> Scores:
    rows = draws_of(how, data, rows=512).interval
    z = (1 - rows.t.reshape(-1, *[1] * (rows.x.ndim - 1))) * rows.x
    z += rows.t.reshape(-1, *[1] * (rows.x.ndim - 1)) * rows.e
    exact = small_runs.exact_average(data.x, z, rows.r, rows.t)
    u = small_runs.field(fitted.average, z, r=rows.r, t=rows.t, condition=None)
    error = float(np.sqrt(np.mean(np.square(u - exact))))
    return {"variance": small_runs.gradient_variance(how, frozen_of(how, seed)), "u_error": error}


@functools.lru_cache(8)
def _frozen(data: str, seed: int, settings: Training) -> Fitted:
    del data
    return small_runs.fit(settings, settings.steps // 4, seed, data_of(settings.data))


def frozen_of(how: Training, seed: int) -> Fitted:
    """Return the parameters at which all settings of a group have their gradients compared."""
    plain = dataclasses.replace(how, objective=PLAIN)
    return _frozen(how.data, seed, plain)


def _of_derivative(how: Training, data: Data, fitted: Fitted, *_: Any) -> Scores:
    residual = small_runs.identities(fitted.average, draws_of(how, data))[0]
    return {
        "residual": float(residual),
        "milliseconds": fitted.milliseconds,
        "megabytes": fitted.megabytes,
    }


def _of_hybrid(
    how: Training, data: Data, fitted: Fitted, seed: int, num_steps: int, e: np.ndarray
) -> Scores:
    angles = np.arange(8) * np.pi / 4
    centers = np.stack([np.cos(angles), np.sin(angles)], axis=1) / np.sqrt(0.51)
    scores = {}
    for kind, steps in itertools.product(("composed", "renoised"), (1, 2, 4, 8)):
        x = np.asarray(sampled(fitted.average, e, steps, renoised=kind == "renoised"))
        away = np.linalg.norm(x[:, None] - centers, axis=2).min(axis=1)
        scores[f"{kind}_{steps}_w2"] = assignment(x, data.held_out)[0]
        scores[f"{kind}_{steps}_outside"] = float(np.mean(away > 3 * 0.1 / np.sqrt(0.51)))
    return scores


def _of_coupling(
    how: Training, data: Data, fitted: Fitted, seed: int, num_steps: int, e: np.ndarray
) -> Scores:
    path = np.asarray(small_runs.path_of(fitted.average, e))
    moves, straight = np.diff(path, axis=0), path[-1] - path[0]
    length = (
        np.linalg.norm(moves, axis=2).sum(axis=0).mean() / np.linalg.norm(straight, axis=1).mean()
    )
    bend = np.square(len(moves) * moves - straight).sum(axis=2).mean()
    gap = small_runs.identities(fitted.average, draws_of(how, data))[1]
    return {"length": float(length), "bend": float(bend), "gap": float(gap)}


def _of_control(
    how: Training, data: Data, fitted: Fitted, seed: int, num_steps: int, e: np.ndarray
) -> Scores:
    errors = small_runs.fit(how, num_steps, seed, data, factor=4.0).errors
    usual = np.median(fitted.errors[:100])
    wrong = np.flatnonzero(~(errors < 10 * usual))
    wrong = wrong[wrong > 100]
    largest = float(small_runs.identities(fitted.average, draws_of(how, data))[2])
    return {"largest": largest, "stable": (wrong[0] if wrong.size else num_steps) / num_steps}


MEASURES = {
    "stability": _of_estimates,
    "digits": _of_estimates,
    "derivative": _of_derivative,
    "hybrid": _of_hybrid,
    "coupling": _of_coupling,
    "control": _of_control,
}


@functools.cache
def budget(group: str) -> float:
    """Return the FLOPs of each run of a group: those of its first setting."""
    how = next(row.how for row in rows_of() if row.group == group and row.how)
    return how.steps * small_runs.step_flops(how)


def config_of(row: Row, num_steps: int) -> dict[str, str]:
    """Return what decides a run's numbers."""
    del num_steps
    return {"training": repr(row.how), "seeds": str(small_runs.SEEDS)}


def execute(row: Row) -> Result:
    """Train and measure a run's seeds."""
    if row.how is None:
        data = data_of(row.run.removeprefix("real "))
        halves = np.array_split(np.random.default_rng(0).permutation(data.held_out), 2)
        scores = [sample_scores(halves[0], data._replace(held_out=halves[1]))]
        return {"config": config_of(row, 1), "num_steps": 1, "rows": scores}
    flops = small_runs.step_flops(row.how)
    num_steps, scores = max(1, round(budget(row.group) / flops)), []
    for seed in range(small_runs.SEEDS):
        data, left = small_runs.paired(row.how, num_steps, seed)
        fitted = small_runs.fit(row.how, left, seed, data)
        scores.append(_measured(row, data, fitted, seed, left))
    scores = [{k: float(v) for k, v in each.items() if math.isfinite(v)} for each in scores]
    return {
        "config": config_of(row, num_steps),
        "num_steps": num_steps,
        "step_flops": flops,
        "rows": scores,
    }


def values_of(row: Row, results: Results, key: str) -> list[float]:
    """Return a row's score by seed: infinite where it is none, NaN where it was not measured."""
    found = results.get(row.run, {}).get("rows", [])
    name = row.part + key
    known = [name in each or key in each for each in found]
    if not any(known):
        return [math.nan]
    return [each.get(name, each.get(key, math.inf)) for each in found]


def table(group: str, results: Results) -> str:
    """Return a group's table in Markdown."""
    rows = list({row.label: row for row in rows_of() if row.group == group}.values())
    steps = [
        results.get(row.run, {}).get("num_steps", math.nan) if row.how else math.nan for row in rows
    ]
    columns = {"training steps": (steps, ",.0f", None)}
    for key, (heading, form, best) in GROUPS[group].scores.items():
        columns[heading] = [values_of(row, results, key) for row in rows], form, best
    return runner.as_table([row.label for row in rows], columns)


def save_plot(path: Path, group: str, results: Results) -> None:
    """Save a panel for each of a group's scores, a line for each series."""
    of_group = GROUPS[group]
    rows = [row for row in rows_of() if row.group == group]
    columns = min(3, len(of_group.drawn))
    lines = math.ceil(len(of_group.drawn) / columns)
    figure = Figure(figsize=(4.2 * columns, 3.2 * lines + 0.9), layout="constrained")
    figure.suptitle(of_group.title)
    panels = np.ravel(figure.subplots(lines, columns, squeeze=False))
    names = {}
    for panel, key in zip(panels, of_group.drawn, strict=False):
        panel.set_title(of_group.scores[key][0], fontsize=9.5)
        panel.set_xlabel(of_group.axis)
        if of_group.is_log:
            panel.set_xscale("log")
        for i, series in enumerate(dict.fromkeys(row.series for row in rows)):
            names |= _draw(
                panel, [row for row in rows if row.series == series], results, key, f"C{i}"
            )
        panel.spines[["right", "top"]].set_visible(False)
    for panel in panels[len(of_group.drawn) :]:
        panel.axis("off")
    figure.legend(names.values(), names, loc="outside lower center", ncols=3, fontsize=8)
    figure.savefig(path, dpi=80, facecolor="white")


def _draw(panel: Any, rows: Sequence[Row], results: Results, key: str, color: str) -> dict:
    values = [values_of(row, results, key) for row in rows]
    known = [i for i, each in enumerate(values) if np.isfinite(each).all()]
    means, stds = ([f(values[i]) for i in known] for f in (np.mean, np.std))
    if not known:
        return {}
    if rows[0].place is None:
        return {rows[0].series: panel.axhline(means[0], color=color, linestyle="--")}
    places = [rows[i].place for i in known]
    line = panel.errorbar(places, means, stds, color=color, marker="o", markersize=3, capsize=2)
    if isinstance(places[0], str):
        panel.tick_params("x", rotation=40, labelsize=8)
    return {rows[0].series: line}


def write(results: Results) -> list[str]:
    """Write the page's tables and figures."""
    runner.write_tables(DOCUMENT, {group: table(group, results) for group in GROUPS})
    plots = DOCUMENT.with_suffix("")
    plots.mkdir(exist_ok=True)
    for group in GROUPS:
        save_plot(plots / f"{group}.png", group, results)
    return []


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    study = Study(
        "open_problems", __doc__, tuple(GROUPS), RUNS, DOCUMENT, runs_of, config_of, execute, write
    )
    return runner.main(study, argv)


if __name__ == "__main__":
    sys.exit(main())
