"""Checkpoints that go from one set of devices and processes to another, and damage that one process of a job sees."""

import os
import subprocess
import sys

import jax
import numpy as np
import pytest
from conftest import ROOT

from launch.faults.job import free_port
from mf_jax.runtime.checkpoint import FOLDER, Checkpoints

HEAD = """
import os, sys
import jax
from mf_jax.runtime import processes
from mf_jax.runtime.checkpoint import Checkpoints, DamagedCheckpoint, UnreadableCheckpoint
from mf_jax.runtime.sharding import make_mesh
sys.path.insert(0, "tests")
from test_checkpoints_of_jobs import restored, saved
folder = sys.argv[1]
if len(sys.argv) > 2:
    jax.distributed.initialize(sys.argv[2], 2, int(sys.argv[3]), initialization_timeout=60)
"""


def _state(mesh, step):
    """Return a state that depends on the step alone, split over a mesh."""
    from mf_jax.runtime.sharding import state_sharding
    from mf_jax.step import TrainState

    rng = np.random.default_rng(step)
    wide = {name: rng.standard_normal((256, 64)).astype(np.float32) for name in ("a", "b")}
    state = TrainState(np.int32(step), wide, {"0.9": wide}, {"mu": wide}, {}, np.int32(-1))
    return jax.tree.map(
        lambda x, where: jax.make_array_from_callback(
            np.shape(x), where, lambda part: np.asarray(x)[part]
        ),
        state,
        state_sharding(mesh, state),
    )


def saved(folder, mesh, step):
    """Save the state of a step."""
    checkpoints = Checkpoints(folder, keep=5)
    checkpoints.save(_state(mesh, step))
    checkpoints.close()


def restored(folder, mesh):
    """Return the step of the newest checkpoint that is whole, restored to a mesh; it must be the state of that step."""
    like = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), _state(mesh, 0)
    )
    found = Checkpoints(folder).restore_state(like)
    step = int(found.step)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(_state(mesh, step)), strict=True):
        assert a.sharding == b.sharding
        for ours, theirs in zip(a.addressable_shards, b.addressable_shards, strict=True):
            np.testing.assert_array_equal(ours.data, theirs.data)
    return step


def _started(body, folder, *, devices=1, processes=1):
    """Start a program in processes of some devices each."""
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}"
    job = (f"127.0.0.1:{free_port()}",) if processes > 1 else ()
    return [
        subprocess.Popen(
            [
                sys.executable,
                "-c",
                HEAD + body,
                str(folder),
                *job,
                *([str(index)] * (processes > 1)),
            ],
            cwd=ROOT,
            env=os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index in range(processes)
    ]


def _run(body, folder, **how):
    """Run a program in processes of some devices each; return what they print."""
    started = _started(body, folder, **how)
    said = [process.communicate(timeout=120) for process in started]
    assert not any(process.returncode for process in started), said
    return [[line for line in out.splitlines() if "[Gloo]" not in line] for out, _ in said]


DEVICES = """
for step, (devices, fsdp) in enumerate([(8, 8), (2, 1), (8, 2), (1, 1)]):
    mesh = make_mesh(data=0, fsdp=fsdp, devices=jax.devices()[:devices])
    assert step == 0 or restored(folder, mesh) == step
    saved(folder, mesh, step + 1)
"""
PROCESSES = """
mesh = make_mesh(data=0, fsdp=2)
assert restored(folder, mesh) == 4
saved(folder, mesh, 5)
"""
DAMAGE = """
mesh = make_mesh(data=0, fsdp=2)
first = processes.is_first()
theirs = next(path for path in (Checkpoints(folder)._folder / "5" / "params" / "ocdbt.process_1" / "d").iterdir())
if first:
    theirs.write_bytes(theirs.read_bytes()[:100])
processes.from_first(None)
for step, lost in ((5, "is damaged"), (4, "no checkpoint of step 4")):
    checkpoints = Checkpoints(folder, read_only=True)
    if step == 4 and not first:
        type(checkpoints).steps = []  # as where the run drops it between two listings
    try:
        like = jax.eval_shape(lambda: {name: jax.numpy.zeros((256, 64)) for name in "ab"})
        where = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("fsdp"))
        like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), like)
        checkpoints.restore_params(like, ema="none", names=(), step=step)
    except UnreadableCheckpoint as error:
        assert lost in str(error), error
    else:
        raise AssertionError(step)
print(restored(folder, mesh))
"""


FULL = """
import resource, signal
mesh = make_mesh(data=0, fsdp=2)
saved(folder, mesh, 1)
if not processes.is_first():
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
    try:
        saved(folder, mesh, 2)
    except ValueError as error:
        os._exit(27 if "File too large" in str(error) else 1)
saved(folder, mesh, 2)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Return a workdir whose five checkpoints went from 8 devices to 2, 8, 1, and to 2 processes."""
    folder = tmp_path_factory.mktemp("run")
    _run(DEVICES, folder, devices=8)
    _run(PROCESSES, folder, processes=2)
    return folder


def test_checkpoints_move_between_devices_and_processes(folder):
    from mf_jax.runtime.sharding import make_mesh

    assert restored(folder, make_mesh(data=0, fsdp=1)) == 5
    assert Checkpoints(folder, read_only=True).steps == [1, 2, 3, 4, 5]


def test_damage_that_one_process_reads_is_damage_for_all(folder):
    """The job goes on from the checkpoint before; a step that one process cannot have, none of them has."""
    said = _run(DAMAGE, folder, processes=2)
    assert [lines[-1] for lines in said] == ["4", "4"]
    assert all("checkpoint 5 is damaged" in lines[0] for lines in said)
    assert (folder / "damaged_checkpoints" / "5").exists()
    assert not (folder / FOLDER / "5").exists()


def test_a_process_that_cannot_write_its_part_does_not_wait_for_the_others(tmp_path):
    """Its file system takes no file above 4 KB; the checkpoint before stays the newest."""
    first, second = _started(FULL, tmp_path, processes=2)
    try:
        assert second.wait(timeout=60) == 27, second.communicate()
    finally:
        for process in (first, second):
            process.kill()
            process.communicate()
    assert Checkpoints(tmp_path, read_only=True).steps == [1]
