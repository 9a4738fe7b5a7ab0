"""eval.jsonl: scores of samples, each with the whole protocol that it was computed under, oldest first.

Two scores are of the same thing exactly if their protocols are equal, in whatever order the jobs that append them run.
"""

import json
import re
from collections.abc import Sequence
from typing import Any

from etils.epath import Path

from mf_jax.errors import BadInput
from mf_jax.metrics.frechet_noise import noise_line
from mf_jax.runtime.files import locked, replace_file

ROWS_FILE = "eval.jsonl"
COLUMNS = ("fid", "fid_standard_error", "sfid", "inception_score", "precision", "recall", "kid")
_LOCK = ".eval.lock"
_SHOWN_DIGITS = 12  # of a checksum
Row = dict[str, Any]


def as_table(rows: Sequence[Row]) -> dict[str, Any]:
    """Return rows of eval.jsonl as a table, with what they have in common below it."""
    columns = [name for name in COLUMNS if any(name in row for row in rows)]
    protocols = [row["protocol"] for row in rows]
    keys = dict.fromkeys(key for protocol in protocols for key in protocol)
    shared = [key for key in keys if len({str(protocol.get(key)) for protocol in protocols}) == 1]
    said = [f"{key.replace('_', ' ')} {_shortened(protocols[0][key])}" for key in shared]
    if rows and "fid_standard_error" in rows[0]:
        said.append(noise_line(protocols[0]["num_samples"], rows[0]["fid_standard_error"]))
    several = "reference" not in shared
    named = [
        row | {"name": f"{row['name']}, {protocol['reference']}" if several else row["name"]}
        for row, protocol in zip(rows, protocols, strict=True)
    ]
    return {"columns": columns, "rows": named, "protocol": ", ".join(said), "diagnostics": {}}


def _shortened(value: Any) -> str:
    """Return a value of a protocol as people read it: of a checksum the first digits."""
    text = str(value)
    return text[:_SHOWN_DIGITS] if re.fullmatch("[0-9a-f]{64}", text) else text


def append(workdir: Path, new: dict[str, Row]) -> None:
    """Add rows to eval.jsonl, to which another job may have added some meanwhile; the file is whole at all times."""
    with locked(workdir / _LOCK, wait=True):
        rows = read_rows(workdir)
        there = {key_of(row["protocol"]) for row in rows}
        rows += [row for key, row in new.items() if key not in there]
        replace_file(workdir / ROWS_FILE, "".join(json.dumps(row) + "\n" for row in rows).encode())


def key_of(protocol: Row) -> str:
    """Return what is equal for equal protocols and for no others."""
    return json.dumps(protocol, sort_keys=True)


def read_rows(workdir: Path) -> list[Row]:
    """Return the rows of eval.jsonl, oldest first.

    Raises:
      BadInput: if a line is no row.
    """
    path = workdir / ROWS_FILE
    try:
        lines = path.read_text().splitlines() if path.exists() else []
        return [{"protocol": {}} | json.loads(line) for line in lines]
    except (OSError, ValueError, TypeError) as error:
        raise BadInput(f"{path}: has a line that is no row ({error}); remove the line") from error
