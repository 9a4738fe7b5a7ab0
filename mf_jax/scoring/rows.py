"""The grid of an evaluation, and eval.jsonl: its scores with their whole protocol, oldest first.

Two rows score the same samples in the same way exactly if their protocols are equal.
"""

import dataclasses
import hashlib
import itertools
import json
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
from etils.epath import Path
from jaxtyping import Int
from ml_collections import ConfigDict
from rich.console import Console
from rich.table import Table

from mf_jax.flow.sampler import SamplePlan
from mf_jax.metrics.frechet import noise_line
from mf_jax.runtime.files import locked, replace_file
from mf_jax.runtime.json_files import misfit, read_lines, sealed
from mf_jax.validation import eval_plans

NEWEST = -1
ROWS_FILE = "eval.jsonl"
Row = dict[str, Any]
_SPREADS = {"frechet_distance": "frechet_distance_std"}
_ROW = {"protocol?": {"samples?": "", "reference?": ""}, "name?": "", "diagnostics?": {}}
_OF_A_MODEL = {"ema": "", "checkpoint": 0, "steps": 1, "omega": 0.0, "t_min": 0.0, "t_max": 0.0}
_OF_A_MODEL |= {"renoise?": False}
"""What rows are like, and the protocols of models; see `parse_json`."""
_PARTS = ("samples", "checkpoint", "ema", "steps", "guidance", "reference")
"""Of a name, in their order."""


@dataclasses.dataclass(frozen=True)
class Cell:
    """One model, sampled in one way.

    checkpoint: its step, or `NEWEST`. ema: a moving average of the run, or `none`.
    """

    checkpoint: int
    ema: str
    plan: SamplePlan

    @property
    def protocol(self) -> Row:
        """Return the settings that decide its samples; the size of a batch decides nothing."""
        guidance = zip(("omega", "t_min", "t_max"), self.plan.guidance, strict=True)
        plan = {"steps": self.plan.steps, **dict(guidance), "seed": self.plan.seed}
        plan |= {"renoise": True} if self.plan.renoise else {}  # rows without the key have none
        return {"checkpoint": self.checkpoint, "ema": self.ema, **plan}


def cells(config: ConfigDict) -> list[Cell]:
    """Return the cells that `eval` asks for, one model after the other; each once."""
    every = itertools.product(config.eval.checkpoints or (NEWEST,), eval_plans(config))
    return list(dict.fromkeys(Cell(checkpoint, *model) for checkpoint, model in every))


def in_shares(labels: Int[np.ndarray, "n"], num: int, seed: int) -> Int[np.ndarray, "num"]:
    """Return num labels in random order, each as often as it is among these."""
    spread = np.sort(labels)[np.arange(num) * len(labels) // num]
    return np.random.default_rng(seed).permutation(spread)


def _words(protocol: Row) -> dict[str, str]:
    """Return the words for each setting in a name; samples of no model bring their own name."""
    words = {part: protocol.get(part, "") for part in ("samples", "reference")}
    if "ema" not in protocol:
        return words
    ema, steps, omega = (protocol[key] for key in ("ema", "steps", "omega"))
    interval = f"[{protocol['t_min']:g}, {protocol['t_max']:g}]"
    return words | {
        "checkpoint": f"checkpoint {protocol['checkpoint']}",
        "ema": {"init": "init.path", "none": "raw parameters"}.get(ema, f"EMA {ema}"),
        "steps": f"{steps} step{'s' * (steps > 1)}" + ", renoised" * protocol.get("renoise", False),
        "guidance": f"omega {omega:g} in {interval}" if omega != 1 else "",
    }


def name_of(protocol: Row, parts: Sequence[str] = _PARTS) -> str:
    """Return a name of samples, by default the full one."""
    return ", ".join(filter(None, map(_words(protocol).get, parts)))


def words_of(row: Row) -> str:
    """Return the numbers of a row, in words; there is none where samples are too few."""
    numbers = {name: x for name, x in row.items() if isinstance(x, float | None)}
    words = {name: "none" if x is None else f"{x:.4g}" for name, x in numbers.items()}
    return "  ".join(f"{name.replace('_', ' ')} {word}" for name, word in words.items())


def as_table(rows: Sequence[Row]) -> dict[str, Any]:
    """Return rows of eval.jsonl as a table, with the last model's diagnostics.

    A row's name has its number of steps, and whatever else is not the same in all rows.
    """
    words, named = [_words(row["protocol"]) for row in rows], []
    differ = [part for part in _PARTS if len({each[part] for each in words if part in each}) > 1]
    parts = [part for part in _PARTS if part in ("samples", "steps", *differ)]
    for row in rows:
        protocol = row["protocol"]
        counts = {"steps": protocol.get("steps"), "samples": protocol.get("num_samples")}
        counts = {key: count for key, count in counts.items() if count}
        scores = {key: value for key, value in row.items() if not isinstance(value, dict)}
        named.append(scores | counts | {"name": name_of(protocol, parts) or row["name"]})
    columns = [key for key in ("steps", "samples") if any(key in row for row in named)]
    numbers = [key for row in rows for key, x in row.items() if isinstance(x, float | None)]
    columns += [name for name in dict.fromkeys(numbers) if name not in _SPREADS.values()]
    diagnostics = rows[-1].get("diagnostics", {}) if rows else {}
    shared = _shared(rows) if rows else ""
    return {"columns": columns, "rows": named, "protocol": shared, "diagnostics": diagnostics}


def _shared(rows: Sequence[Row]) -> str:
    """Return the settings that all models of a table share, or else all samples, as words."""
    of_models = [row for row in rows if "ema" in row["protocol"]] or rows
    protocols = [row["protocol"] for row in of_models]
    keys = dict.fromkeys(key for protocol in protocols for key in protocol)
    shared = [key for key in keys if len({str(protocol.get(key)) for protocol in protocols}) == 1]
    words = [f"{key.replace('_', ' ')} {protocols[0][key]}" for key in shared]
    words = [re.sub("([0-9a-f]{12})[0-9a-f]{52}$", r"\1", text) for text in words]  # of checksums
    if (error := of_models[0].get("fid_standard_error")) is not None:
        words.append(noise_line(protocols[0]["num_samples"], error))
    return ", ".join(words)


def show(table: Row) -> None:
    """Print a table of `as_table`."""
    columns, console = table["columns"], Console()
    if not console.is_terminal:
        console = Console(width=120)
    shown = Table("", *(name.replace("_", " ") for name in columns), caption=table["protocol"])
    for row in table["rows"]:
        shown.add_row(row["name"], *(_cell(row, name) for name in columns))
    console.print(shown)
    console.print(words_of(table["diagnostics"]))


def _cell(row: Row, name: str) -> str:
    """Return a number in words, with its spread where it has one."""
    number, spread = row.get(name), row.get(_SPREADS.get(name, ""))
    if number is None:
        return "–"
    words = f"{number:.4g}" if isinstance(number, float) else str(number)
    return words if spread is None else f"{words} ± {spread:.2g}"


def key_of(protocol: Row) -> str:
    """Return a text that is equal for equal protocols and for no others."""
    return json.dumps(protocol, sort_keys=True)


def digest(*parts: np.ndarray | bytes) -> str:
    """Return the SHA-256 of arrays and bytes, one after the other."""
    total = hashlib.sha256()
    for part in parts:
        total.update(np.ascontiguousarray(part) if isinstance(part, np.ndarray) else part)
    return total.hexdigest()


def append(workdir: Path, new: Sequence[Row]) -> None:
    """Add rows to eval.jsonl, which is whole at all times; another job may add some meanwhile."""
    with locked(workdir / ".eval.lock", wait=True):
        rows = read_rows(workdir)
        there = {key_of(row["protocol"]) for row in rows}
        rows += [row for row in new if key_of(row["protocol"]) not in there]
        replace_file(workdir / ROWS_FILE, "".join(sealed(row) + "\n" for row in rows).encode())


def read_rows(workdir: Path) -> list[Row]:
    """Return the rows of eval.jsonl, oldest first; damaged ones are left out, in a line each."""

    def check(row: Row) -> str:
        protocol = row.get("protocol", {})
        return misfit(protocol, _OF_A_MODEL, "protocol") if "ema" in protocol else ""

    rows = read_lines(workdir / ROWS_FILE, _ROW, check, note="and computed again if asked")
    return [{"name": "", "protocol": {}} | row for row in rows]
