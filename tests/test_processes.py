"""Several processes as one job: the numbers of one, all tell a problem, and none waits for ever."""

import json
import re
import signal

import jax
import numpy as np
import pytest
from jobs import Job, assert_refused, free_port, here, tiny_config, works
from scenarios import POINTS, restore, save
from test_prepare import write_tree
from test_train import results

from mf_jax.config import make_network
from mf_jax.flow.records import DataSpec
from mf_jax.models import parameter_shapes
from mf_jax.published.checkpoints import write_published
from mf_jax.reporting.run_log import read_metrics
from mf_jax.runtime import processes
from mf_jax.runtime.checkpoint import Checkpoints
from mf_jax.runtime.sharding import make_mesh


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Return a folder with `run`, a finished run in one process, weights, and pictures."""
    folder = tmp_path_factory.mktemp("job")
    write_tree(folder / "pictures")
    works(*POINTS, f"--workdir={folder / 'run'}")
    digits = DataSpec((8, 8, 1), 10)
    shapes = parameter_shapes(make_network(tiny_config(), digits), digits.shape)
    zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes)
    write_published(folder / "weights.npz", "meanflow", zeros, patch_size=4)
    save(folder / "moved", make_mesh(data=0, fsdp=1), 1)
    return folder


@pytest.mark.slow
def test_a_run_killed_while_it_writes_checkpoints_ends_bit_identical(folder, tmp_path):
    """One is being written nearly all the time."""
    arguments = (*POINTS, "--config.checkpoint.every_steps=1", f"--workdir={tmp_path}")
    job = Job(1, *arguments)
    assert job.wait_for((tmp_path / "checkpoints" / "5").exists), job.finish()
    job.processes[0].send_signal(signal.SIGKILL)
    assert job.finish()[0].code == -signal.SIGKILL
    works(*arguments)
    assert results(tmp_path) == results(folder / "run")


@pytest.fixture(scope="module")
def lived(folder):
    """Return what two processes of two devices live through, and how a full disk ends both."""
    job = Job(2, folder, program=("tests/scenarios.py",), devices=2)
    assert job.wait_for(lambda: "parameters, " in job.output()), job.finish()
    job.processes[1].send_signal(signal.SIGTERM)
    ended = job.finish()
    assert 0 not in [process.code for process in ended], ended
    both = [json.loads((folder / f"lived_{index}.json").read_text()) for index in range(2)]
    return both, ended


def test_every_process_tells_bad_input_in_one_line(lived, folder):
    """Also where one host alone lacks the weights, or the hosts do not share the workdir."""
    for scenario, text in {
        "seeds": "process 1 has seed=1, process 0 0: start all processes of a job with the same",
        "batch": "train.batch_size=10: must be a multiple of 8",
        "mesh": "mesh.data=0, mesh.fsdp=3: must multiply to the 4 devices here",
        "apart": "--workdir=apart: does not show what process 0 writes",
        "weights": "weights.npz: no such file or folder",
    }.items():
        for index, scenarios in enumerate(lived[0]):
            code, _, errors = scenarios[scenario]
            assert (code, len(errors.splitlines())) == (2, 1), errors
            assert errors.startswith(f"mf_jax: process {index}: ")
            assert text in errors
    assert "process 0: process 1 has: " in lived[0][0]["weights"][2]
    assert not (folder / "none").exists()


def test_an_evaluation_on_two_processes_has_the_scores_of_one(lived, folder):
    assert [scenarios["eval"][0] for scenarios in lived[0]] == [0, 0], lived[0]
    run = folder / "run"
    ours = json.loads((run / "eval.json").read_text())
    (run / "eval.jsonl").unlink()
    works(*POINTS, f"--workdir={run}", "--mode=eval")
    theirs = json.loads((run / "eval.json").read_text())
    assert ours["protocol"] == theirs["protocol"]
    for a, b in zip(ours["rows"], theirs["rows"], strict=True):
        assert a.pop("name") == b.pop("name")
        assert a == pytest.approx(b, rel=1e-4)
    floor, row = theirs["rows"]
    assert "energy_distance" in floor
    assert row["sliced_wasserstein"] > floor["sliced_wasserstein"]


def test_checkpoints_move_and_damage_that_one_process_reads_is_damage_for_all(lived, folder):
    """From one device to two processes that split over four and over two, and back to one.

    The job uses the checkpoint before; a step that one process cannot have, none has.
    """
    assert restore(folder / "moved", make_mesh(data=0, fsdp=1)) == 2
    assert Checkpoints(folder / "moved", read_only=True).steps == [1, 2]
    for scenarios in lived[0]:
        (damaged, missing), step = scenarios["damage"]
        assert "is damaged" in damaged
        assert "no checkpoint of step 2" in missing
        assert step == 2
    assert (folder / "moved" / "damaged_checkpoints" / "3").exists()


def stopped_at(output):
    return int(re.search(r"stopped at step (\d+); the same command continues", output)[1])


def test_two_processes_prepare_and_stop_as_one_and_the_first_alone_talks(lived):
    (first, second), ended = lived
    assert (first["prepare"][0], second["prepare"][0]) == (0, 0), (first, second)
    # it has waited for the other
    assert "12 pictures in 3 shards, 0 skipped" in first["prepare"][1]
    assert (first["stopped"], second["stopped"]) == (9, 9), lived
    assert 0 < stopped_at(ended[0].output) < 12
    assert re.search("4 cpu devices.* in 2 processes", ended[0].output)
    assert "parameters, " not in ended[1].output
    assert "eval.json" in first["eval"][1]
    assert second["eval"][1] == ""


@pytest.mark.slow
def test_a_full_disk_and_a_kill_lose_no_checkpoint_and_the_run_goes_on(lived, folder):
    """Each befalls the second of two processes; here one device each continues a run of four.

    At last comes a signal when nothing is left to stop: no step follows that all could agree on.
    """
    workdir, before = folder / "split", stopped_at(lived[1][0].output)
    assert f"continuing at step {before}" in lived[1][0].output, "else it is no full disk that ends"
    assert Checkpoints(workdir, read_only=True).steps == [before]
    arguments = (*POINTS, "--config.job.heartbeat_timeout_seconds=10", f"--workdir={workdir}")
    job = Job(2, *arguments)
    assert job.wait_for(lambda: "continuing at step" in job.output()), job.finish()
    job.processes[1].send_signal(signal.SIGKILL)
    (code, _, errors), _ = job.finish(timeout=120)
    assert code not in (0, 2)
    # ours, or JAX's as it aborts
    assert "another process" in errors or "another task died" in errors
    job = Job(2, *arguments)
    assert job.wait_for((workdir / "checkpoints" / "12").exists), job.finish()
    job.processes[0].send_signal(signal.SIGTERM)
    ended = job.finish()
    assert [process.code for process in ended] == [0, 0], ended
    assert f"continuing at step {before}" in ended[0].output
    for a, b in zip(read_metrics(workdir), read_metrics(folder / "run"), strict=True):
        assert a == pytest.approx(b, rel=1e-5, abs=1e-7)


def test_a_job_described_wrongly_and_a_coordinator_that_does_not_answer(monkeypatch):
    config, address = "--config=configs/digits.py", f"127.0.0.1:{free_port()}"
    words = "must be host:port", "0 <= JAX_PROCESS_ID < JAX_NUM_PROCESSES; set all three or none"
    for values in "//0", "host/2/0", "host:1/2/2", "host:1/two/0", f"{address}/2/1":
        described = dict(zip(processes._VARIABLES, values.split("/"), strict=True))
        for name, value in described.items():
            monkeypatch.setenv(name, value)
        if address not in values:
            told = ", ".join(map("=".join, described.items()))
            assert_refused(here(config), told, *words)
    (ended,) = Job(1, config, "--config.job.start_timeout_seconds=0.5").finish()
    assert_refused(ended, f"mf_jax: {address}: 2 processes have not met there within 0.5 s; ")
