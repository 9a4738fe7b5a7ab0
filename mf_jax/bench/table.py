"""The printed form of a result: the machine, the notes, and a table of its numbers."""

import sys
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

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


class Column(NamedTuple):
    """A title, the keys of a row that it shows, and a factor for their numbers."""

    title: str
    keys: str
    scale: float = 1.0

    def cell(self, row: Mapping[str, Any], scale: float) -> str:
        """Return the text of a row's cell."""
        return " ".join(_text(row[key], scale) for key in self.keys.split() if key in row) or "-"


def timing(name: str) -> Column:
    """Return the column of a `measure.spread`."""
    quantiles = f"{name}_seconds_median {name}_seconds_quartiles"
    return Column(f"{name} ms (quartiles)", quantiles, 1e3)


def _text(value: str | int | float | Sequence[float], scale: float = 1.0) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, Sequence):
        return f"({' to '.join(_text(x, scale) for x in value)})"
    value *= scale
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def show(result: Mapping[str, Any], columns: Sequence[Column]) -> None:
    """Print a result; where stdout is no terminal, in lines as long as need be."""
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 1000)
    table = Table(*(column.title for column in columns))
    for row in result["rows"]:
        table.add_row(*(column.cell(row, column.scale) for column in columns))
    if "ratio" in result:
        table.add_row(*(column.cell(result["ratio"], 1.0) for column in columns))
    head = _HEAD if "matmul_peak_gflops" in result else _HEAD[:2]
    for line in (*(line.format(**result) for line in head), *result["notes"]):
        console.print(line, markup=False, soft_wrap=True)
    console.print(table)
