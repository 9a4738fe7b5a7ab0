"""What the scripts that run many trainings share: results that are kept, tables and the page."""

import argparse
import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mf_jax.flow.errors import BadInput
from mf_jax.runtime.compile_cache import keep_programs
from mf_jax.runtime.files import replace_file
from mf_jax.runtime.json_files import read_json, write_json

Result = dict[str, Any]
Results = Mapping[str, Result]
"""Name of a run -> its result.json."""
Column = tuple[Sequence[Any], str, Callable | None]
"""Numbers, numbers of some seeds, or text; their format; what the best is: min, max or None."""


class Study(NamedTuple):
    """A table of runs and the page that they make.

    name: of the script. about: its help. groups: of the rows, in the page's order. folder: of the
    runs. runs_of: the first row of each run of a group, "" = of all. config_of: what decides a
    row's result, given its number of steps. execute: trains a row's run, returns its result, None
    if told to stop. write: writes the page and returns what is wrong with the results.
    """

    name: str
    about: str
    groups: Sequence[str]
    folder: Path
    document: Path
    runs_of: Callable[[str], Sequence[Any]]
    config_of: Callable[[Any, int], Any]
    execute: Callable[[Any], Result | None]
    write: Callable[[Results], Sequence[str]]


def finished(folder: Path, config_of: Callable[[int], Any]) -> Result | None:
    """Return the result of a run, or None where it is not finished."""
    path = folder / "result.json"
    if not path.exists():
        return None
    like = {"config": {}, "num_steps": 1, "rows": [{}]}
    result = read_json(path, like, "move it away")
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

    runs = [] if arguments.document else study.runs_of(arguments.only)
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
        results = {row.run: result_of(row) for row in study.runs_of("")}
        results = {name: result for name, result in results.items() if result}
        if not results:
            raise BadInput(f"{study.folder} holds no finished run; leave --document out")
        wrong = study.write(results)
    except BadInput as error:
        print(f"{study.name}: {error}", file=sys.stderr)
        return 2
    print(f"wrote {study.document} and {study.document.with_suffix('')}/*.png")
    for line in wrong:
        print(f"{study.name}: {line}", file=sys.stderr)
    return int(bool(wrong))


def write_tables(document: Path, tables: Mapping[str, str]) -> None:
    """Write each table between its mark and the next end, and leave all else alone."""
    text = document.read_text()
    for name, table in tables.items():
        start = text.index(mark := f"<!-- {name} -->\n") + len(mark)
        text = text[:start] + table + text[text.index("<!-- end -->", start) :]
    replace_file(document, text.encode())


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
    known = [mean for mean in means if not math.isnan(mean)]
    if math.isnan(means[i]):
        return "–"
    text = format(means[i], form) if math.isfinite(means[i]) else "diverged"
    if math.isfinite(means[i]) and np.ptp(values[i]) > 0:
        text += f" ± {format(float(np.std(values[i], ddof=1)), form)}"
    return f"**{text}**" if best and len(known) > 1 and means[i] == best(known) else text
