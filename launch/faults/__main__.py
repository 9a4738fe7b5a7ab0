"""The command line of launch/faults.sh."""

import argparse
import json
import random
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from rich.progress import track

from launch.faults.document import TABLES, write_document
from launch.faults.injuries import INJURIES, heal, remove, undisturbed
from launch.faults.scaling import COUNTS, images_per_second
from launch.faults.topologies import SHAPES, batches_are_alike, digits, largest_difference, losses

FOLDER = Path("runs/faults")
DOCUMENT = Path("docs/reliability.md")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code: 0 done, 1 something is not as it should be."""
    parser = argparse.ArgumentParser(prog="launch/faults.sh", description=__doc__)
    parser.add_argument(
        "--runs", type=int, default=50, help="runs that something happens to; default %(default)s"
    )
    parser.add_argument("--only", choices=(*TABLES, "document"), help="one part alone")
    arguments = parser.parse_args(argv)
    FOLDER.mkdir(parents=True, exist_ok=True)
    if arguments.only in (None, "topologies"):
        _topologies(FOLDER / "topologies.jsonl")
    if arguments.only in (None, "faults"):
        _faults(FOLDER / "faults.jsonl", arguments.runs)
    if arguments.only in (None, "scaling"):
        _scaling(FOLDER / "scaling.jsonl")
    failed = write_document(*(_read(FOLDER / f"{name}.jsonl") for name in TABLES), DOCUMENT)
    print(f"wrote {DOCUMENT}")
    for line in failed:
        print(f"faults: {line}", file=sys.stderr)
    return int(bool(failed))


def _topologies(path: Path) -> None:
    """Train on each topology that has no row yet."""
    done, source = {tuple(row["shape"]) for row in _read(path)}, digits()
    first = losses(FOLDER / "topology_1_1_1", *SHAPES[0])
    for shape in track([shape for shape in SHAPES if shape not in done], "topologies"):
        folder = FOLDER / f"topology_{'_'.join(map(str, shape))}"
        difference = largest_difference(losses(folder, *shape), first)
        _append(
            path,
            {
                "shape": shape,
                "difference": difference,
                "batches": batches_are_alike(source, shape[0], 32),
            },
        )
        remove(folder)


def _faults(path: Path, num: int) -> None:
    """Disturb as many runs as are missing, the kinds in turn; what happens to run i depends on i alone."""
    done = {row["run"] for row in _read(path)}
    missing = [run for run in range(num) if run not in done]
    if not missing:
        return
    calm = FOLDER / "undisturbed"
    remove(calm)
    before = undisturbed(calm)
    for run in track(missing, "runs disturbed"):
        name, strike = list(INJURIES.items())[run % len(INJURIES)]
        folder, chance = FOLDER / f"run_{run}", random.Random(run)
        remove(folder)
        start, codes = time.monotonic(), []
        try:
            codes = [process.code for process in strike(folder, chance, before)]
            came = heal(folder, before)
        except subprocess.TimeoutExpired:
            came = {"resumed_at": 0, "identical": False, "damaged": 0, "hung": True}
        row = {"run": run, "name": name, "codes": codes, "seconds": time.monotonic() - start}
        _append(path, row | came)
        remove(folder)


def _scaling(path: Path) -> None:
    """Measure the throughput of each number of processes that has no row yet."""
    done = {row["processes"] for row in _read(path)}
    for processes in track([count for count in COUNTS if count not in done], "weak scaling"):
        folder = FOLDER / f"scaling_{processes}"
        remove(folder)
        _append(
            path,
            {"processes": processes, "images_per_second": images_per_second(folder, processes)},
        )
        remove(folder)


def _read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def _append(path: Path, row: dict) -> None:
    with path.open("a") as file:
        file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    sys.exit(main())
