"""Several processes as one job: the numbers of one process, stopping together, and what each says when one fails."""

import json
import shutil
import signal

import numpy as np
import pytest
from conftest import ROOT, TINY

import mf_jax
from launch.faults.job import Job, free_port
from mf_jax.errors import BadInput
from mf_jax.runtime import processes

VARIABLES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
SHARDED = (
    "--config=configs/digits.py",
    *TINY,
    "--config.model.width=128",
    "--config.log.sample_every_steps=6",
)
"""Wide enough for parameters that are worth splitting."""
SPLIT = ("--config.mesh.fsdp=2", "--config.mesh.gather=block")


def _rows(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def _assert_alike(ours, theirs, tolerance=1e-5):
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        assert a.keys() == b.keys()
        np.testing.assert_allclose([*a.values()], [*b.values()], rtol=tolerance, atol=1e-7)


@pytest.fixture(scope="module")
def alone(tmp_path_factory, spawn):
    """Return the workdir of a run in one process on one device."""
    workdir = tmp_path_factory.mktemp("alone") / "run"
    process = spawn(*SHARDED, f"--workdir={workdir}")
    _, errors = process.communicate(timeout=240)
    assert process.returncode == 0, errors
    return workdir


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """Return the workdir of a job that was stopped by a signal to the second of two processes, and what they said."""
    workdir = tmp_path_factory.mktemp("job") / "run"
    job = Job(2, *SHARDED, f"--workdir={workdir}", *SPLIT, devices=2)
    assert job.wait_for(lambda: "parameters, " in job.output())
    job.send(signal.SIGTERM, 1)
    said = job.finish()
    shutil.copytree(workdir, workdir.parent / "as_stopped")
    return workdir, said


@pytest.fixture(scope="module")
def continued(stopped):
    """Return the workdir after the same command on other devices, to the end, and what the processes said.

    The first one is told to stop when there is nothing left to stop: no step follows that all could agree on.
    """
    workdir, _ = stopped
    job = Job(2, *SHARDED, f"--workdir={workdir}")
    assert job.wait_for((workdir / "checkpoints" / "12").exists)
    job.send(signal.SIGTERM, 0)
    return workdir, job.finish(60)


def test_a_signal_to_one_process_stops_all_at_one_step(stopped):
    workdir, said = stopped
    assert [code for code, _, _ in said] == [0, 0], said
    (checkpoint,) = (workdir.parent / "as_stopped" / "checkpoints").iterdir()
    assert 0 < int(checkpoint.name) < 12
    assert f"stopped at step {checkpoint.name}; the same command continues" in said[0][1]


def test_the_first_process_alone_talks(stopped):
    _, ((_, first, _), (_, second, _)) = stopped
    assert "4 cpu devices in 2 processes" in first
    assert [line for line in second.splitlines() if line and "[Gloo]" not in line] == []


def test_a_run_on_other_processes_and_devices_has_the_same_numbers(alone, continued):
    """Begun on two processes of two devices that gather split parameters by block, continued on two of one."""
    workdir, said = continued
    assert [code for code, _, _ in said] == [0, 0], said
    assert "continuing at step" in said[0][1]
    _assert_alike(_rows(workdir), _rows(alone))


def test_an_evaluation_on_two_processes_has_the_scores_of_one(continued, command):
    workdir, _ = continued
    arguments = (*SHARDED, f"--workdir={workdir}", "--mode=eval")
    said = Job(2, *arguments).finish()
    assert [code for code, _, _ in said] == [0, 0], said
    ours = json.loads((workdir / "eval.json").read_text())
    assert command(*arguments)[0] == 0
    theirs = json.loads((workdir / "eval.json").read_text())
    assert ours["protocol"] == theirs["protocol"]
    for a, b in zip(ours["rows"], theirs["rows"], strict=True):
        assert a.pop("name") == b.pop("name")
        assert a == pytest.approx(b, rel=1e-4)


def test_the_others_end_when_a_process_dies(tmp_path):
    longer = ("--config.train.num_steps=100000", "--config.job.heartbeat_timeout_seconds=10")
    job = Job(2, *SHARDED, f"--workdir={tmp_path / 'run'}", *longer)
    assert job.wait_for(lambda: "step 6/" in job.output())
    job.send(signal.SIGKILL, 1)
    (code, _, errors), _ = job.finish(timeout=60)
    assert code not in (0, 2)
    assert (
        "another process" in errors or "another task died" in errors
    )  # ours, or what JAX says as it aborts


def test_processes_with_other_settings_are_named(tmp_path):
    said = Job(
        2, *SHARDED, f"--workdir={tmp_path / 'run'}", own=lambda i: [f"--config.seed={i}"]
    ).finish()
    for index, (code, _, errors) in enumerate(said):
        assert (code, errors) == (
            2,
            f"mf_jax: process {index}: process 1 has seed=1, process 0 0: start all processes of a job with the same "
            "command\n",
        )
    assert not (tmp_path / "run").exists()


def test_a_workdir_that_the_hosts_do_not_share(tmp_path):
    for index in range(2):
        (tmp_path / f"host{index}").mkdir()
    config = f"--config={ROOT}/configs/digits.py"
    hosts = lambda index: tmp_path / f"host{index}"  # noqa: E731
    said = Job(2, config, *SHARDED[1:], "--workdir=run", cwd=hosts).finish()
    for index, (code, _, errors) in enumerate(said):
        assert code == 2
        assert f"mf_jax: process {index}: " in errors
        assert "--workdir=run: does not show what process 0 writes there" in errors
        assert len(errors.splitlines()) == 1


@pytest.mark.parametrize(
    ("flag", "told"),
    [
        ("--config.train.batch_size=10", "train.batch_size=10: must be a multiple of 4"),
        ("--config.mesh.fsdp=4", "mesh.data=0, mesh.fsdp=4: must multiply to the 2 devices here"),
    ],
)
def test_bad_input_is_told_by_every_process(tmp_path, flag, told):
    said = Job(2, *SHARDED, f"--workdir={tmp_path / 'run'}", flag).finish()
    for index, (code, _, errors) in enumerate(said):
        assert code == 2
        assert errors.startswith(f"mf_jax: process {index}: ")
        assert told in errors
        assert len(errors.splitlines()) == 1
    assert not (tmp_path / "run").exists()


def test_what_one_host_lacks_is_told_by_every_process(continued, tmp_path):
    """Weights to start from, on the first of two hosts alone."""
    workdir, _ = continued
    hosts = lambda index: tmp_path / f"host{index}"  # noqa: E731
    for index in range(2):
        hosts(index).mkdir()
    mf_jax.load(workdir).export(hosts(0) / "weights.npz", kind="meanflow")
    start = ("--config.init.path=weights.npz", "--config.init.kind=meanflow")
    config = f"--config={ROOT}/configs/digits.py"
    said = Job(
        2, config, *SHARDED[1:], "--workdir=run", "--mode=sample", *start, cwd=hosts
    ).finish()
    assert [code for code, _, _ in said] == [2, 2], said
    lacks = f"{hosts(1) / 'weights.npz'}: no such file or folder"
    assert said[1][2].startswith(f"mf_jax: process 1: {lacks}")
    assert said[0][2].startswith(f"mf_jax: process 0: process 1 has: {lacks}")


def test_a_coordinator_that_does_not_answer(spawn):
    address = f"127.0.0.1:{free_port()}"
    job = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "1"}
    process = spawn("--config=configs/digits.py", "--config.job.start_timeout_seconds=0.5", **job)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 2
    assert errors.startswith(
        f"mf_jax: {address}: 2 processes have not met there within 0.5 s; check that each was"
    )
    assert len(errors.splitlines()) == 1


@pytest.mark.parametrize(
    ("job", "message"),
    [
        ({"JAX_PROCESS_ID": "0"}, "JAX_COORDINATOR_ADDRESS and JAX_NUM_PROCESSES must be set too"),
        (
            dict(zip(VARIABLES, ("host", "2", "0"), strict=True)),
            "JAX_COORDINATOR_ADDRESS=host: must be host:port",
        ),
        (
            dict(zip(VARIABLES, ("host:1", "2", "2"), strict=True)),
            "0 <= JAX_PROCESS_ID < JAX_NUM_PROCESSES",
        ),
        (dict(zip(VARIABLES, ("host:1", "two", "0"), strict=True)), "must be whole numbers"),
    ],
)
def test_a_job_described_wrongly(job, message, command, monkeypatch):
    for name, value in job.items():
        monkeypatch.setenv(name, value)
    code, _, errors = command("--config=configs/digits.py")
    assert code == 2
    assert message in errors
    assert len(errors.splitlines()) == 1


def test_alone_everything_is_the_process_itself():
    assert processes.is_first()
    assert not processes.are_several()
    assert processes.from_all({"a": 1}) == [{"a": 1}]
    assert processes.name() == ""
    processes.check_alike({"seed": 1})
    with pytest.raises(BadInput, match="broken"), processes.together():
        raise BadInput("broken")
    assert processes.leave(1) == 1
