"""How a result of `bench` is printed: what was measured where, and a table that shows numbers of the JSON alone."""

import sys
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table

from mf_jax.models.attention import ATTENTIONS


class Column(NamedTuple):
    """A column of a table: its title, the keys of a row that it shows, and what their numbers are multiplied by."""

    title: str
    keys: tuple[str, ...]
    scale: float = 1.0
    between: str = " "

    def cell(self, row: Mapping[str, Any], *, scaled: bool = True) -> str:
        """Return the text of a row's cell."""
        scale = self.scale if scaled else 1.0
        return self.between.join(_text(row[key], scale) for key in self.keys if key in row) or "-"


def _text(value: str | int | float | Sequence[float], scale: float = 1.0) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, Sequence):
        return f"({' to '.join(_text(x, scale) for x in value)})"
    if isinstance(value, bool):
        return "yes" if value else "no"
    value *= scale
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def _timing(name: str) -> Column:
    return Column(
        f"{name} ms (quartiles)", (f"{name}_seconds_median", f"{name}_seconds_quartiles"), 1e3
    )


def _attention_columns() -> tuple[Column, ...]:
    times = [_timing(kind) for kind in ATTENTIONS]
    memory = [Column(f"{kind} temp MB", (f"{kind}_temp_bytes",), 1e-6) for kind in ATTENTIONS]
    ratio = (Column("ratio", ("seconds_ratio",)), Column("ratio", ("temp_ratio",)))
    return (
        Column("tokens", ("tokens",)),
        Column("pass", ("pass",)),
        *times,
        ratio[0],
        *memory,
        ratio[1],
    )


COLUMNS = {
    "step": (
        Column("objective", ("objective",)),
        Column("GFLOP", ("gflop",)),
        Column("temp MB", ("temp_bytes",), 1e-6),
        Column("arguments MB", ("argument_bytes",), 1e-6),
        _timing("step"),
        Column("images/s", ("images_per_second",)),
        Column("trace + compile s", ("trace_seconds", "compile_seconds"), between=" + "),
        Column("share of peak", ("peak_share",)),
    ),
    "sample": (
        Column("evaluations", ("evaluations",)),
        Column("GFLOP per image", ("gflop_per_image",)),
        _timing("batch"),
        Column("images/s", ("images_per_second",)),
        Column("share of peak", ("peak_share",)),
    ),
    "input": (
        Column("into", ("into",)),
        Column("batches", ("batches",)),
        _timing("batch"),
        Column("batches/s", ("batches_per_second",)),
        Column("images/s", ("images_per_second",)),
    ),
    "attention": _attention_columns(),
    "plan": (
        Column("settings", ("settings",)),
        Column("parameters GB", ("params_bytes",), 1e-9),
        Column("averages GB", ("ema_bytes",), 1e-9),
        Column("optimiser GB", ("opt_state_bytes",), 1e-9),
        Column("rest GB", ("rest_bytes",), 1e-9),
        Column("batch GB", ("batch_bytes",), 1e-9),
        Column("temporaries GB", ("temporary_bytes",), 1e-9),
        Column("total GB", ("total_bytes",), 1e-9),
        Column("left GB", ("left_bytes",), 1e-9),
        Column("fits", ("fits",)),
        Column("GFLOP", ("gflop",)),
        Column("computing ms, at the peak", ("compute_seconds", "floor_seconds"), 1e3, ", "),
        Column("collectives ms", ("collective_seconds",), 1e3),
        Column("efficiency, at the peak", ("efficiency", "efficiency_at_peak"), 1.0, ", "),
    ),
    "collectives": (
        Column("collective", ("kind",)),
        Column("over", ("axis",)),
        Column("devices", ("devices",)),
        Column("times a step", ("count",)),
        Column("GB", ("payload_bytes",), 1e-9),
        Column("share passed on", ("passed_on",)),
        Column("GB/s", ("rate",), 1e-9),
        Column("ms", ("seconds",), 1e3),
    ),
    "scores": (
        Column("samples", ("samples",)),
        Column("reference rows", ("reference_rows",)),
        Column("peak MB", ("peak_bytes",), 1e-6),
        Column("adding s", ("adding_seconds",)),
        Column("comparing s", ("comparing_seconds",)),
    ),
}


def show(result: Mapping[str, Any]) -> None:
    """Print a result; where stdout is no terminal, in lines as long as need be.

    Args:
      result: of `bench`.
    """
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 1000)
    lines = [
        f"{result['what']}: {result['network']}, {result['num_parameters']:,} parameters, {result['dtype']}, "
        f"batch {result['batch_size']}, data {tuple(result['shape'])}, {result['num_classes']} classes",
        f"on {result['num_devices']} x {result['device_kind']} ({result['platform']}), JAX {result['jax_version']}, "
        + _how(result),
    ]
    if "matmul_peak_gflops" in result:
        lines.append(
            f"measured matmul peak of a device: {_text(result['matmul_peak_gflops'])} GFLOP/s "
            f"({result['matmul_peak_dtype']}, side {result['matmul_peak_size']})"
        )
    columns = COLUMNS[result["what"]]
    table = _table(columns, result["rows"])
    if "ratio" in result:
        table.add_row(*(column.cell(result["ratio"], scaled=False) for column in columns))
    for line in (*lines, *result["notes"]):
        console.print(line, markup=False, soft_wrap=True)
    console.print(table)
    if result.get("collectives"):
        console.print(f"collectives of a device, {result['rows'][-1]['settings']}", markup=False)
        console.print(_table(COLUMNS["collectives"], result["collectives"]))


def _how(result: Mapping[str, Any]) -> str:
    if "topology" not in result:
        return f"{result['repeats']} repeats after {result['dropped']} dropped"
    limits = (
        (result[key], unit)
        for key, unit in (("memory", "GB"), ("peak", "GFLOP/s"), ("link", "GB/s"))
    )
    return "a device: " + ", ".join(f"{_text(value, 1e-9)} {unit}" for value, unit in limits)


def _table(columns: Sequence[Column], rows: Sequence[Mapping[str, Any]]) -> Table:
    table = Table(*(column.title for column in columns))
    for row in rows:
        table.add_row(*(column.cell(row) for column in columns))
    return table
