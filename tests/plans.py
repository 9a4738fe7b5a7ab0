"""Plan, as the command line does, for 8 virtual devices; print each outcome as JSON: a script, as it starts JAX."""

import contextlib
import io
import json
import sys
from pathlib import Path

from mf_jax.bench.topologies import TOPOLOGIES
from mf_jax.main import main

WIDTH, AVERAGES = 128, (0.5, 0.6, 0.7, 0.8, 0.9, 0.99)
FLAGS = (
    "--config=configs/toy2d.py",
    "--mode=bench",
    "--config.bench.what=plan",
    "--config.model.depth=1",
    f"--config.model.width={WIDTH}",
    "--config.train.batch_size=64",
    "--config.log.progress=False",
    "--config.objective.name=flow_matching",
    f"--config.ema.decays={AVERAGES}",
)
MEMORY = {"tight": 2e6, "nothing": 1e3}
RUNS = {
    "data": ("cpu-8",),
    "both": ("cpu-8", "--config.mesh.data=4", "--config.mesh.fsdp=2"),
    "fsdp": ("tight",),
    "nothing": ("nothing",),
    "batch": ("cpu-8", "--config.train.batch_size=12"),
    "mesh": ("cpu-8", "--config.mesh.fsdp=3"),
    "started": ("v5e-16",),
}


def outcome(folder: Path, flags: list[str]) -> dict:
    """Return what a command line prints, exits with and writes."""
    out, errors = io.StringIO(), io.StringIO()
    sys.argv[:] = ["mf_jax", *FLAGS, f"--workdir={folder}", *flags]
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(errors):
        code = main()
    path = folder / "bench_plan.json"
    result = json.loads(path.read_text()) if path.exists() else None
    said = {"code": code, "out": out.getvalue(), "errors": errors.getvalue()}
    return {**said, "result": result, "made": folder.exists()}


def run_all(folder: Path) -> dict:
    """Return all outcomes by name, on machines of which one holds the step only where all devices split it."""
    for name, memory in MEMORY.items():
        TOPOLOGIES[name] = TOPOLOGIES["cpu-8"]._replace(memory=memory)
    return {
        name: outcome(folder / name, [f"--config.bench.topology={topology}", *flags])
        for name, (topology, *flags) in RUNS.items()
    }


if __name__ == "__main__":
    print(json.dumps(run_all(Path(sys.argv[1]))))
