"""What two processes of two devices live through, in one job: a script, see test_processes.py.

The argument is a folder, in which `run` is a finished run of one process. Each process writes
{scenario: [exit code, output, errors]} to lived_INDEX.json there.
"""

import contextlib
import gc
import json
import os
import resource
import signal
import sys
from pathlib import Path
from unittest import mock

import jax
import numpy as np
from jobs import ROOT, TINY, here, keys
from test_prepare import TOGETHER

from mf_jax.main import main as command_line
from mf_jax.runtime import processes
from mf_jax.runtime.checkpoint import Checkpoints, UnreadableCheckpoint
from mf_jax.runtime.sharding import batch_sharding, make_mesh, per_device, placed, state_sharding
from mf_jax.step import TrainState

POINTS = f"--config={ROOT}/configs/toy2d.py", *TINY
POINTS += (*keys("data.toy=checkerboard model.width=128 eval.steps=(1,)"),)
"""A run of points, compiled soon, without scikit-learn, wide enough for parameters to be split."""


def put(tree, places):
    """Return arrays that all processes hold, on the devices."""
    one = lambda x, place: jax.make_array_from_callback(x.shape, place, lambda i: x[i])  # noqa: E731
    return jax.tree.map(one, tree, places)


def state(mesh, step):
    """Return a state that depends on the step alone, split over a mesh."""
    rng = np.random.default_rng(step)
    wide = {name: rng.standard_normal((256, 64)).astype(np.float32) for name in ("a", "b")}
    whole = TrainState(np.int32(step), wide, {"0.9": wide}, {"mu": wide}, {}, np.int32(-1))
    return put(jax.tree.map(np.asarray, whole), state_sharding(mesh, whole))


def save(folder, mesh, step):
    """Save the state of a step."""
    with contextlib.closing(Checkpoints(folder, keep=9)) as checkpoints:
        checkpoints.save(state(mesh, step))


def restore(folder, mesh):
    """Return the step of the newest whole checkpoint; restored to a mesh, it must be `state`."""
    whole = state(mesh, 0)
    like = placed(whole, jax.tree.map(lambda x: x.sharding, whole))
    found = Checkpoints(folder).restore_state(like)
    step = int(found.step)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(state(mesh, step)), strict=True):
        assert a.sharding == b.sharding
        for ours, theirs in zip(a.addressable_shards, b.addressable_shards, strict=True):
            np.testing.assert_array_equal(ours.data, theirs.data)
    return step


def move(folder):
    """Checkpoints go from one device of another process to four, and to two pairs."""
    for step, fsdp in ((1, 4), (2, 2)):
        mesh = make_mesh(data=0, fsdp=fsdp)
        assert restore(folder, mesh) == step
        save(folder, mesh, step + 1)


def damage(folder):
    """Lose a part that the second process alone reads, then a step that it alone cannot see."""
    mesh, first = make_mesh(data=0, fsdp=2), processes.is_first()
    part = folder / "checkpoints" / "3" / "params" / "ocdbt.process_1" / "d"
    if first:
        # a small file may be an earlier version's, which no one reads
        path = max(part.iterdir(), key=lambda file: file.stat().st_size)
        path.write_bytes(path.read_bytes()[:100])
    processes.from_first(None)
    shapes = {name: jax.ShapeDtypeStruct((256, 64), np.float32) for name in "ab"}
    like = placed(shapes, state_sharding(mesh, shapes))
    refused = []
    for step in (3, 2):
        checkpoints = Checkpoints(folder, read_only=True)
        # as where the run drops a step between two listings
        hidden = step == 2 and not first
        with mock.patch.object(Checkpoints, "steps", [] if hidden else checkpoints.steps):
            try:
                checkpoints.restore({"params": like}, step)
            except UnreadableCheckpoint as error:
                refused.append(str(error))
    return refused, restore(folder, mesh)


def reduce_without_scattering():
    """Sums of gradients between CPUs of a job must not be those that gloo scatters."""
    mesh = make_mesh(data=2, fsdp=2)
    params = (np.arange(2**15, dtype=np.float32).reshape(2**13, 4) % 7,)
    rows = np.arange(8.0, dtype=np.float32)[:, None]
    given = put(params, state_sharding(mesh, params)), put(rows, batch_sharding(mesh))
    gradient_of = lambda p, x: (p[0] * x.mean(), x.sum())  # noqa: E731
    compiled = jax.jit(lambda p, x: per_device(gradient_of, mesh, p, x)).lower(*given).compile()
    gradient, total = compiled(*given)
    assert gradient.sharding.spec == given[0][0].sharding.spec
    assert "all-reduce" in compiled.as_text()
    assert "reduce-scatter" not in compiled.as_text()
    whole = processes.on_host(gradient)
    np.testing.assert_allclose(whole, params[0] * 3.5, rtol=1e-6)
    assert total == 28


def main():
    """Live through everything."""
    folder = Path(sys.argv[1])
    processes.start(start_timeout=60, heartbeat_timeout=20, stops_together=True)
    index, lived = jax.process_index(), {}

    def command(name, *more, workdir=folder / "none", config=POINTS):
        # a job is left once, at the end
        with mock.patch.object(processes, "leave", lambda code: code):
            lived[name] = here(*config, f"--workdir={workdir}", *more)

    reduce_without_scattering()
    move(folder / "moved")
    lived["damage"] = damage(folder / "moved")
    gc.collect()  # what Orbax leaves of a damaged read complains when it goes
    command("seeds", f"--config.seed={index}")
    command("batch", "--config.train.batch_size=10")
    command("mesh", "--config.mesh.fsdp=3")
    command("eval", "--mode=eval", workdir=folder / "run")
    places = f"prepare.input={folder}/pictures data.path={folder}/latents"
    command("prepare", *keys(places), config=TOGETHER)
    host = folder / f"host{index}"
    host.mkdir()
    if index == 0:
        os.rename(folder / "weights.npz", host / "weights.npz")
    os.chdir(host)
    command("apart", workdir="apart")
    weights = keys("init.path=weights.npz init.kind=meanflow")
    digits = (f"--config={ROOT}/configs/digits.py", *TINY)
    command("weights", "--mode=sample", *weights, config=digits)
    # a signal of the parent stops this one
    split = keys("mesh.fsdp=2 job.stopped_exit_code=9")
    sys.argv[1:] = [*POINTS, *split, f"--workdir={folder / 'split'}"]
    with mock.patch.object(processes, "leave", lambda code: code):
        lived["stopped"] = command_line()
    (folder / f"lived_{index}.json").write_text(json.dumps(lived))
    if index == 1:  # its disk is full: it can write no file above 4 KB, nor all of its errors
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
    return command_line()


if __name__ == "__main__":
    sys.exit(main())
