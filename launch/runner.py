"""What studies of many trainings share: results that are kept, tables and the page.

Each run is trained in this process. Its result.json marks it as finished, also where it diverged;
the page is written from these files. A study is a module with the names:
  RUNS: folder of the runs, runs/NAME; the page is docs/NAME.md, its pictures are in docs/NAME.
  GROUPS: of rows, in the page's order.
  ROWS: what runs, each with its group and its run, which some may share.
  make_config(row, num_steps): a row's config, or a dict of what else decides its result.
  execute(row): train a row's run, return its result, None if told to stop.
  table(group, results): a group's text in the page.
  save_picture(path, group, results): its picture.
  unexpected(results): what must not be; left out where nothing must fail.
"""

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
from types import ModuleType
from typing import Any

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


def runs_of(rows: Sequence[Any], only: str = "") -> list[Any]:
    """Return a row of each run, of all groups or of one."""
    return list({row.run: row for row in rows if only in ("", row.group)}.values())


def decisive(config: ConfigDict | dict[str, Any]) -> dict[str, Any]:
    """Return the sections of a config that decide a run's numbers, as JSON keeps them."""
    if isinstance(config, dict):  # of a study without our configs
        return config
    return {k: v for k, v in json.loads(as_json(config)).items() if k in SECTIONS_OF_A_RUN}


def whole_run(config: ConfigDict, folder: Path) -> Result | None:
    """Train and evaluate, or continue; return the result, None if it was told to stop."""
    result = {"num_steps": config.train.num_steps, "rows": []}
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


def kept(study: ModuleType, row: Any) -> Result | None:
    """Return the result of a row's run, or None where it is not finished."""
    path = study.RUNS / row.run / "result.json"
    if not path.exists():
        return None
    result = read_json(path, {"config": {}, "num_steps": 1, "rows": [{}]}, "move it away")
    if result["config"] != decisive(study.make_config(row, result["num_steps"])):
        raise BadInput(f"{path.parent}: its result is of another config; move the folder away")
    return result


def main(study: ModuleType, argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code: 0 done, 1 a check failed, 2 bad input."""
    name, document = study.RUNS.name, Path("docs", f"{study.RUNS.name}.md")
    parser = argparse.ArgumentParser(prog=f"launch/{name}.sh", description=study.__doc__)
    parser.add_argument("--only", default="", choices=study.GROUPS, help="the runs of one group")
    parser.add_argument("--document", action="store_true", help="write the document alone")
    arguments = parser.parse_args(argv)
    runs = [] if arguments.document else runs_of(study.ROWS, arguments.only)
    keep_programs()  # most of which the runs share
    try:
        for i, row in enumerate(runs, start=1):
            if kept(study, row) is None:
                print(f"[{i}/{len(runs)}] {row.run}", flush=True)
                start = time.monotonic()
                if (result := study.execute(row)) is None:
                    print("told to stop; the same command continues")
                    return 0
                config = decisive(study.make_config(row, result["num_steps"]))
                result = {"config": config, **result, "seconds": time.monotonic() - start}
                (study.RUNS / row.run).mkdir(parents=True, exist_ok=True)
                write_json(study.RUNS / row.run / "result.json", result, indent=1)
                print(f"    {result['seconds']:.0f} s", flush=True)
        found = {row.run: kept(study, row) for row in runs_of(study.ROWS)}
        if not (results := {run: result for run, result in found.items() if result}):
            raise BadInput(f"{study.RUNS} holds no finished run; leave --document out")
        _write_page(study, document, results)
    except BadInput as error:
        print(f"{name}: {error}", file=sys.stderr)
        return 2
    print(f"wrote {document} and {document.with_suffix('')}/*.png")
    wrong = getattr(study, "unexpected", lambda _: [])(results)
    for line in wrong:
        print(f"{name}: {line}", file=sys.stderr)
    return int(bool(wrong))


def _write_page(study: ModuleType, document: Path, results: Results) -> None:
    """Write tables between their marks, and pictures; leave groups without runs and all else."""
    text, pictures = document.read_text("utf-8"), document.with_suffix("")
    pictures.mkdir(exist_ok=True)
    there = {row.group for row in study.ROWS if row.run in results}
    for group in filter(there.__contains__, study.GROUPS):
        start = text.index(mark := f"<!-- {group} -->\n") + len(mark)
        text = text[:start] + study.table(group, results) + text[text.index("<!-- end", start) :]
        study.save_picture(pictures / f"{group}.png", group, results)
    replace_file(document, text.encode())


def score(results: Results, run: str, steps: Any = 1, key: str = "frechet_distance") -> float:
    """Return a score, of real data where steps is None; inf if diverged, NaN if not there."""
    if "diverged" in results.get(run, {}):
        return math.nan if key == "class_accuracy" else math.inf
    rows = results.get(run, {}).get("rows", [])
    return next((row.get(key, math.nan) for row in rows if row.get("steps") == steps), math.nan)


def as_table(labels: Sequence[str], columns: Mapping[str, Column], first: str = "setting") -> str:
    """Return a table in Markdown, the best of each column in bold."""
    rows = zip(labels, *(_cells(*column) for column in columns.values()), strict=True)
    lines = [[first, *columns], ["---"] * (len(columns) + 1), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _cells(values: Sequence[Any], form: str, best: Callable | None) -> list[str]:
    means = [math.nan if isinstance(value, str) else float(np.mean(value)) for value in values]
    known = [mean for mean in means if math.isfinite(mean)]
    winner = best(known) if best and len(known) > 1 else None

    def cell(value: Any, mean: float) -> str:
        if isinstance(value, str):
            return value
        if not math.isfinite(mean):
            return "–" if math.isnan(mean) else "diverged"
        text = format(mean, form)
        if np.ptp(value) > 0:
            spread = format(float(np.std(value, ddof=1)), form)
            text += f" ± {spread}" * (spread != "0")  # a count that does not depend on the seed
        return f"**{text}**" if mean == winner else text

    return [cell(*each) for each in zip(values, means, strict=True)]
