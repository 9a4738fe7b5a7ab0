"""Training and evaluating the runs one after another, resumably, and the steps that equal FLOPs pay for."""

import contextlib
import gc
import json
import math
import os
import platform
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from ml_collections import ConfigDict

from launch.ablations.settings import EQUAL_FLOPS, GROUPS, NUM_STEPS, Run, make_config
from mf_jax import evaluate, train
from mf_jax.config import validate
from mf_jax.errors import BadInput
from mf_jax.runtime.checkpoint import Checkpoints
from mf_jax.runtime.files import replace_file
from mf_jax.runtime.workdir import SECTIONS_OF_A_RUN, as_json
from mf_jax.step import initial_state, make_train_step


def step_flops(config: ConfigDict) -> float:
    """Return the FLOPs of a config's compiled training step, as XLA counts them."""
    source = validate(config, num_devices=1)
    parts = train.step_parts(config, source)
    state = jax.eval_shape(lambda: initial_state(parts))
    x = jax.ShapeDtypeStruct((parts.batch_size, *source.spec.shape), jnp.float32)
    labels = jax.ShapeDtypeStruct((parts.batch_size,), jnp.int32)
    compiled = jax.jit(make_train_step(parts), donate_argnums=0).lower(state, x, labels).compile()
    return float(compiled.cost_analysis()["flops"])


def affordable_steps(budget: float, flops: float) -> int:
    """Return how many steps of so many FLOPs a budget of FLOPs pays for, at least 1."""
    return max(1, round(budget / flops))


class Flops:
    """The FLOPs of a step of each run, kept in a file since every count is a compilation.

    Args:
      path: of the file.
      count: FLOPs of a config's step.
    """

    def __init__(self, path: Path, count: Callable[[ConfigDict], float] = step_flops) -> None:
        self._path, self._count = path, count

    def of(self, run: Run) -> float:
        """Return the FLOPs of a step of a run."""
        config = make_config(run)
        key = json.dumps({"run": run.name, "config": decisive_sections(config)}, sort_keys=True)
        known = json.loads(self._path.read_text()) if self._path.exists() else {}
        if key not in known:
            known[key] = self._count(config)
            self._path.parent.mkdir(parents=True, exist_ok=True)
            replace_file(self._path, json.dumps(known, indent=1).encode())
        return known[key]


def planned_steps(run: Run, flops: Flops) -> int:
    """Return the number of steps of a run: `NUM_STEPS`, or what the budget of the comparison pays for."""
    if not run.equal_flops:
        return NUM_STEPS
    first = next(group for group in GROUPS if group.equal_flops).settings[0]
    budget = NUM_STEPS * flops.of(
        Run(first.run, {**EQUAL_FLOPS, **first.overrides}, equal_flops=True)
    )
    return affordable_steps(budget, flops.of(run))


def decisive_sections(config: ConfigDict) -> dict[str, Any]:
    """Return what decides a run's numbers, as JSON keeps it."""
    return {
        name: section
        for name, section in json.loads(as_json(config)).items()
        if name in SECTIONS_OF_A_RUN
    }


class Stopped(Exception):
    """The process was told to stop; the run at hand is saved."""


def finished(run: Run, folder: Path, num_steps: int | None = None) -> dict[str, Any] | None:
    """Return the result of a run, or None where it is not finished.

    Args:
      run: to look up.
      folder: of all runs.
      num_steps: that it must have; None = any.

    Raises:
      BadInput: if the result is of another config.
    """
    path = folder / run.name / "result.json"
    if not path.exists():
        return None
    result = json.loads(path.read_text())
    config = make_config(run, result["num_steps"] if num_steps is None else num_steps)
    if result["config"] != decisive_sections(config):
        raise BadInput(f"{path.parent}: its result is of another config; move the folder away")
    return result


def execute(run: Run, folder: Path, flops: Flops) -> dict[str, Any]:
    """Train and evaluate a run, or continue it, and return its result.

    Raises:
      BadInput: if its folder holds another run.
      Stopped: if the process was told to stop.
    """
    start = time.monotonic()
    num_steps = planned_steps(run, flops)
    config = make_config(run, num_steps)
    known = finished(run, folder, num_steps)
    if known is not None:
        return known
    workdir = epath.Path(folder / run.name)
    workdir.mkdir(parents=True, exist_ok=True)
    result = {
        "config": decisive_sections(config),
        "num_steps": num_steps,
        "diverged": False,
        "machine": machine(),
    }
    with (workdir / "log.txt").open("a") as log, contextlib.redirect_stdout(log):
        try:
            train.run(config, workdir)
            with contextlib.closing(Checkpoints(workdir, read_only=True)) as checkpoints:
                if checkpoints.steps[-1] < num_steps:
                    raise Stopped(f"{run.name} at step {checkpoints.steps[-1]}")
            evaluate.run(config, workdir)
            rows = json.loads((workdir / "eval.json").read_text())["rows"]
        except FloatingPointError as error:
            result |= {"diverged": True, "why": str(error)}
            rows = []
    if run.equal_flops:
        result["step_flops"] = flops.of(run)
    result |= {"rows": rows, "seconds": time.monotonic() - start}
    replace_file(workdir / "result.json", json.dumps(result, indent=1).encode())
    jax.clear_caches()  # the next run compiles its own step, and 40 of them do not fit
    gc.collect()
    return result


def run_all(runs: Sequence[Run], folder: Path, flops: Flops) -> None:
    """Execute runs one after another, with a line about each."""
    seconds = []
    for i, run in enumerate(runs):
        done = [(folder / later.name / "result.json").exists() for later in runs[i:]]
        known = done[0]
        left = np.mean(seconds) * done.count(False) / 60 if seconds else math.nan
        about = (
            "already finished"
            if known
            else f"about {left:.0f} minutes left"
            if seconds
            else "starts"
        )
        print(f"[{i + 1}/{len(runs)}] {run.name}: {about}", flush=True)
        result = execute(run, folder, flops)
        if not known:
            seconds.append(result["seconds"])
            scores = (
                "diverged"
                if result["diverged"]
                else ", ".join(
                    f"{row['name']} {row['frechet_distance']:.2f}" for row in result["rows"]
                )
            )
            print(
                f"    {result['num_steps']} steps, {result['seconds']:.0f} s: {scores}", flush=True
            )


def machine() -> str:
    """Return what this process runs on, hardware and versions, in words."""
    device = jax.devices()[0]
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    model = next(
        (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), ""
    )
    kind = f"{os.cpu_count()} CPU cores ({model or platform.machine()})"
    if device.platform != "cpu":
        kind = f"{device.device_kind}, {kind}"
    return (
        f"{kind}; Python {platform.python_version()}, JAX {jax.__version__}, NumPy {np.__version__}"
    )
