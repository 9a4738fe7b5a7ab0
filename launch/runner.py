"""What the scripts that run many trainings share: results that are kept, tables and the page."""

import argparse
import contextlib
import gc
import json
import math
import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath
from ml_collections import ConfigDict

from mf_jax import evaluate, train
from mf_jax.flow.errors import BadInput
from mf_jax.runtime.compile_cache import keep_programs
from mf_jax.runtime.files import replace_file
from mf_jax.runtime.json_files import read_json, write_json
from mf_jax.runtime.workdir import SECTIONS_OF_A_RUN, as_json
from mf_jax.scoring.rows import append, read_rows

Result = dict[str, Any]
Results = Mapping[str, Result]
"""Name of a run -> its result.json."""
Column = tuple[Sequence[Any], str, Callable | None]
"""Numbers, numbers of some seeds, or text; their format; what the best is: min, max or None."""
QUIET = {"log.sample_every_steps": 0, "log.progress": False, "job.stopped_exit_code": 75}
QUIET |= {"checkpoint.every_steps": 250, "checkpoint.keep": 1}
"""Settings of a run of many."""


class Study(NamedTuple):
    """A table of runs and the page that they make.

    name: of the script. about: its help. groups: of the rows, in the page's order. folder: of the
    runs. rows: each with its group and its run, which some may share. config_of: what decides a
    row's result, given its number of steps. execute: trains a row's run, returns its result, None
    if told to stop. table: of a group. save_picture: of a group. wrong: what must not be.
    """

    name: str
    about: str
    groups: Sequence[str]
    folder: Path
    document: Path
    rows: Sequence[Any]
    config_of: Callable[[Any, int], Any]
    execute: Callable[[Any], Result | None]
    table: Callable[[str, Results], str]
    save_picture: Callable[[Path, str, Results], None]
    wrong: Callable[[Results], Sequence[str]] = lambda results: ()


def runs_of(rows: Sequence[Any], only: str = "") -> list[Any]:
    """Return the first row of each run, of all groups or of one."""
    rows = [row for row in rows if only in ("", row.group)]
    return [row for i, row in enumerate(rows) if row.run not in {r.run for r in rows[:i]}]


def decisive(config: ConfigDict) -> dict[str, Any]:
    """Return the sections that decide a run's numbers, as JSON keeps them."""
    return {k: v for k, v in json.loads(as_json(config)).items() if k in SECTIONS_OF_A_RUN}


def whole_run(config: ConfigDict, folder: Path) -> Result | None:
    """Train and evaluate, or continue; return the result, None if it was told to stop."""
    result = {"config": decisive(config), "num_steps": config.train.num_steps, "rows": []}
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "log.txt").open("a", encoding="utf-8") as log, contextlib.redirect_stdout(log):
        try:
            if train.run(config, epath.Path(folder)):
                return None
            borrow_classifier(folder)
            evaluate.run(config, epath.Path(folder))
            result["rows"] = read_json(folder / "eval.json", {"rows": [{}]})["rows"]
        except FloatingPointError as error:
            result["diverged"] = str(error)
    jax.clear_caches()  # the compiled steps of many runs do not fit
    gc.collect()
    return result


def borrow_classifier(folder: Path) -> None:
    """Copy the classifier of a run of the same data, which the score of real data vouches for."""
    for file in folder.parent.glob("*/classifier-*.npz"):
        rows = [row for row in read_rows(epath.Path(file.parent)) if "samples" in row["protocol"]]
        if rows and file.parent != folder and not (folder / file.name).exists():
            append(epath.Path(folder), rows)
            shutil.copy(file, folder)


def finished(folder: Path, config_of: Callable[[int], Any]) -> Result | None:
    """Return the result of a run, or None where it is not finished."""
    path = folder / "result.json"
    if not path.exists():
        return None
    result = read_json(path, {"config": {}, "num_steps": 1, "rows": [{}]}, "move it away")
    if result["config"] != config_of(result["num_steps"]):
        raise BadInput(f"{folder}: its result is of another config; move the folder away")
    return result


def main(study: Study, argv: Sequence[str] | None) -> int:
    """Run the command line; return the exit code: 0 done, 1 a check failed, 2 bad input."""
    parser = argparse.ArgumentParser(prog=f"launch/{study.name}.sh", description=study.about)
    parser.add_argument("--only", default="", choices=study.groups, help="the runs of one group")
    parser.add_argument("--document", action="store_true", help="write the document alone")
    arguments = parser.parse_args(argv)

    def result_of(row: Any) -> Result | None:
        return finished(study.folder / row.run, lambda steps: study.config_of(row, steps))

    runs = [] if arguments.document else runs_of(study.rows, arguments.only)
    keep_programs()  # most of which the runs share
    try:
        for i, row in enumerate(runs):
            if result_of(row) is None:
                print(f"[{i + 1}/{len(runs)}] {row.run}", flush=True)
                start = time.monotonic()
                if (result := study.execute(row)) is None:
                    print("told to stop; the same command continues")
                    return 0
                result["seconds"] = time.monotonic() - start
                (study.folder / row.run).mkdir(parents=True, exist_ok=True)
                write_json(study.folder / row.run / "result.json", result, indent=1)
                print(f"    {result['seconds']:.0f} s", flush=True)
        results = {row.run: result_of(row) for row in runs_of(study.rows)}
        results = {name: result for name, result in results.items() if result}
        if not results:
            raise BadInput(f"{study.folder} holds no finished run; leave --document out")
        _write_page(study, results)
    except BadInput as error:
        print(f"{study.name}: {error}", file=sys.stderr)
        return 2
    print(f"wrote {study.document} and {study.document.with_suffix('')}/*.png")
    for line in (wrong := study.wrong(results)):
        print(f"{study.name}: {line}", file=sys.stderr)
    return int(bool(wrong))


def _write_page(study: Study, results: Results) -> None:
    """Write tables between their marks, and pictures; leave groups without runs and all else."""
    text, pictures = study.document.read_text("utf-8"), study.document.with_suffix("")
    there = {row.group for row in study.rows if row.run in results}
    groups = [group for group in study.groups if group in there]
    for group in groups:
        start = text.index(mark := f"<!-- {group} -->\n") + len(mark)
        text = text[:start] + study.table(group, results) + text[text.index("<!-- end", start) :]
    replace_file(study.document, text.encode())
    pictures.mkdir(parents=True, exist_ok=True)
    for group in groups:
        study.save_picture(pictures / f"{group}.png", group, results)


def score(results: Results, run: str, steps: Any = 1, key: str = "frechet_distance") -> float:
    """Return a score, of real data where steps is None; inf if diverged, NaN if not there."""
    if "diverged" in results.get(run, {}):
        return math.nan if key == "class_accuracy" else math.inf
    rows = results.get(run, {}).get("rows", [])
    return next((row.get(key, math.nan) for row in rows if row.get("steps") == steps), math.nan)


def as_table(labels: Sequence[str], columns: Mapping[str, Column], first: str = "setting") -> str:
    """Return a table in Markdown, the best of each column in bold."""
    lines = [[first, *columns], ["---"] * (len(columns) + 1)]
    for i, label in enumerate(labels):
        lines.append([label, *(_cell(*column, i) for column in columns.values())])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _cell(values: Sequence[Any], form: str, best: Callable | None, i: int) -> str:
    if isinstance(values[i], str):
        return values[i]
    means = [math.nan if isinstance(value, str) else float(np.mean(value)) for value in values]
    known = [mean for mean in means if math.isfinite(mean)]
    if math.isnan(means[i]):
        return "–"
    text = format(means[i], form) if math.isfinite(means[i]) else "diverged"
    if math.isfinite(means[i]) and np.ptp(values[i]) > 0:
        spread = format(float(np.std(values[i], ddof=1)), form)
        text += f" ± {spread}" * (spread != "0")  # a count that does not depend on the seed
    return f"**{text}**" if best and len(known) > 1 and means[i] == best(known) else text
