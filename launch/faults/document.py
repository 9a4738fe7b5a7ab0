"""docs/reliability.md: its tables, from the rows of what was tried."""

import re
from collections.abc import Sequence
from pathlib import Path

from launch.faults.injuries import INJURIES

TABLES = ("faults", "topologies", "scaling")
TOLERANCE = 1e-5


def write_document(
    faults: Sequence[dict], topologies: Sequence[dict], scaling: Sequence[dict], path: Path
) -> list[str]:
    """Put the tables between their marks in the document; return what is not as it should be."""
    text = path.read_text()
    writers = ((_faults, faults), (_topologies, topologies), (_scaling, scaling))
    for name, (write, rows) in zip(TABLES, writers, strict=True):
        table = (
            write(rows) if rows else f"Not measured yet: `bash launch/faults.sh --only={name}`\n"
        )
        mark = re.compile(rf"(<!-- {name} -->\n).*?(<!-- end of {name} -->)", re.DOTALL)
        text = mark.sub(lambda found, table=table: f"{found[1]}{table}{found[2]}", text)
    path.write_text(text)
    wrong = [
        f"run {row['run']}, {row['name']}: {'hangs' if row.get('hung') else 'is not identical'}"
        for row in faults
        if not row["identical"]
    ]
    for row in topologies:
        if row["difference"] > TOLERANCE or not row["batches"]:
            wrong.append(
                f"{row['shape']}: losses differ by {row['difference']:.1e}, batches {row['batches']}"
            )
    return wrong


def _faults(rows: Sequence[dict]) -> str:
    lines = [
        "| what happened | runs | exit codes of the processes | resumed at step | found damaged | identical |",
        "|---|---|---|---|---|---|",
    ]
    for name in INJURIES:
        own = [row for row in rows if row["name"] == name]
        codes = ", ".join(sorted({"/".join(map(str, row["codes"])) for row in own}))
        steps = sorted(row["resumed_at"] for row in own)
        span = f"{steps[0]} to {steps[-1]}" if steps else ""
        same = sum(row["identical"] for row in own)
        damaged = sum(row["damaged"] for row in own)
        lines.append(
            f"| {name} | {len(own)} | {codes} | {span} | {damaged} | {same} of {len(own)} |"
        )
    return "\n".join(lines) + "\n"


def _topologies(rows: Sequence[dict]) -> str:
    lines = [
        "| processes | devices of each | parameters split over | largest difference of a loss | same batches |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        processes, devices, fsdp = row["shape"]
        same = "yes" if row["batches"] else "NO"
        lines.append(f"| {processes} | {devices} | {fsdp} | {row['difference']:.1e} | {same} |")
    return "\n".join(lines) + "\n"


def _scaling(rows: Sequence[dict]) -> str:
    lines = ["| processes | images/s together | of the first times as many |", "|---|---|---|"]
    for row in rows:
        share = row["images_per_second"] / (rows[0]["images_per_second"] * row["processes"])
        lines.append(f"| {row['processes']} | {row['images_per_second']:,.0f} | {share:.2f} |")
    return "\n".join(lines) + "\n"
