"""The command line of launch/ablations.sh."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from launch.ablations.analysis import read_results
from launch.ablations.document import write_document
from launch.ablations.runs import Flops, Stopped, run_all
from launch.ablations.settings import GROUPS, all_runs
from mf_jax.errors import BadInput

RUNS = Path("runs/ablations")
DOCUMENT, PICTURES = Path("docs/ablations.md"), Path("docs/ablations")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code: 0 done, 1 a check failed, 2 bad input."""
    parser = argparse.ArgumentParser(
        prog="launch/ablations.sh",
        description="The paper's ablations in miniature on the digits, and all objectives at equal training FLOPs.",
    )
    names = ", ".join(group.name for group in GROUPS)
    parser.add_argument(
        "--only", default="", metavar="GROUP", help=f"the runs of one group: {names}"
    )
    parser.add_argument("--document", action="store_true", help="write the document alone")
    arguments = parser.parse_args(argv)
    try:
        runs = all_runs(arguments.only)
        if not arguments.document:
            run_all(runs, RUNS, Flops(RUNS / "flops.json"))
        failed = write_document(read_results(RUNS), DOCUMENT, PICTURES)
    except Stopped as stop:
        print(f"told to stop: saved {stop}; the same command continues")
        return 0
    except BadInput as error:
        print(f"ablations: {error}", file=sys.stderr)
        return 2
    print(f"wrote {DOCUMENT} and {PICTURES}/*.png")
    if failed:
        print(f"ablations: failed: {'; '.join(check.text for check in failed)}", file=sys.stderr)
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
