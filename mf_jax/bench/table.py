"""The printed form of a result: the machine, the notes, and a table of its numbers."""

import sys
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table

_HEAD = (
    "{what}: {network}, {num_parameters:,} parameters, {dtype}, batch {batch_size}, "
    "data {shape}, {num_classes} classes",
    "on {num_devices} x {device_kind} ({platform}), JAX {jax_version}, "
    "{repeats} repeats after {dropped} dropped",
    "measured matmul peak of a device: {matmul_peak_gflops:,.4g} GFLOP/s "
    "({matmul_peak_dtype}, side {matmul_peak_size})",
)
_UNITS = (
    ("_bytes", "MB", 1e-6),
    ("_seconds_median", "ms (quartiles)", 1e3),
    ("_seconds", "s", 1.0),
)


def show(result: Mapping[str, Any], shown: str) -> None:
    """Print a result with these keys of its rows; into a file in lines as long as need be."""
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 1000)
    columns, table = {key: _unit(key) for key in shown.split()}, Table()
    for key, (ending, unit, _) in columns.items():
        table.add_column(f"{key.removesuffix(ending)} {unit}".replace("_", " ").strip())
    for row in result["rows"]:
        table.add_row(*(cell(row, key, scale) for key, (*_, scale) in columns.items()))
    if "ratio" in result:
        table.add_row(*(cell(result["ratio"], key) for key in columns))
    head = _HEAD if "matmul_peak_gflops" in result else _HEAD[:2]
    for line in (*(line.format(**result) for line in head), *result["notes"]):
        console.print(line, markup=False, soft_wrap=True)
    console.print(table)


def _unit(key: str) -> tuple[str, str, float]:
    return next((each for each in _UNITS if key.endswith(each[0])), ("", "", 1.0))


def cell(row: Mapping[str, Any], key: str, scale: float = 1.0) -> str:
    """Return the text of a number of a row, a median with its quartiles, or a text."""
    value = row.get(key, "-")
    if isinstance(value, str):
        return value
    quartiles = row.get(key.replace("_median", "_quartiles"), []) if "_median" in key else []
    numbers = [scale * number for number in (value, *quartiles)]
    first, *more = [f"{x:,.0f}" if abs(x) >= 1000 else f"{x:.4g}" for x in numbers]
    return f"{first} ({' to '.join(more)})" if more else first
