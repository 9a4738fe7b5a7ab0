"""Training: what a run leaves, exact resume, stopping, damage, divergence, runs of earlier versions."""

import json
import os
import random
import shutil
import signal
from pathlib import Path

import jax
import numpy as np
import pytest
from conftest import ROOT, TINY
from etils import epath
from jobs import Job, here

import mf_jax
from configs.digits import get_config
from mf_jax import step as state_module
from mf_jax import train
from mf_jax.config import validate
from mf_jax.runtime import workdir as run_folder
from mf_jax.runtime.checkpoint import Checkpoints, DamagedCheckpoint

EVERY_STEP = (
    *TINY,
    "--config.train.num_steps=30",
    "--config.train.log_every_steps=2",
    "--config.log.sample_every_steps=7",
    "--config.checkpoint.every_steps=1",
)


def _args(workdir, *more):
    return (f"--config={ROOT}/configs/digits.py", f"--workdir={workdir}", *more)


def _parts():
    """Return the parts of the step of a tiny run."""
    config = get_config()
    config.model.depth, config.model.width, config.train.batch_size = 1, 16, 16
    return train.step_parts(config, validate(config, num_devices=1))


def _arrays(workdir, step):
    """Return the index of a checkpoint, which names every bit of its state."""
    with Path(workdir, "checkpoints", str(step), "index", "metadata").open() as file:
        return json.load(file)


def _assert_same_run(a, b, step):
    assert (a / "metrics.jsonl").read_bytes() == (b / "metrics.jsonl").read_bytes()
    assert _arrays(a, step) == _arrays(b, step)
    pictures = [
        {path.name: path.read_bytes() for path in (run / "samples").iterdir()} for run in (a, b)
    ]
    assert pictures[0] == pictures[1]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("undisturbed") / "run"
    ended = here(*_args(workdir, *EVERY_STEP))
    assert ended.code == 0, ended
    return workdir


def test_a_run_leaves_what_it_says(trained):
    rows = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [3, 6, 9, 12]
    assert {"loss", "u_error", "v_error", "du_dt", "grad_norm", "learning_rate"} <= set(rows[0])
    assert any(name.startswith("u_error_t") for name in rows[0])
    pictures = sorted(path.name for path in (trained / "samples").iterdir())
    assert pictures == [f"step_{step:08d}.png" for step in (5, 10, 12)]
    assert Checkpoints(trained, read_only=True).steps == [4, 8, 12]
    assert "data:image/png" in (trained / "report.html").read_text()
    assert any((trained / "tensorboard").iterdir())
    assert "block_0/attention/qkv/kernel" in (trained / "parameters.txt").read_text()
    assert json.loads((trained / "config.json").read_text())["train"]["num_steps"] == 12


@pytest.mark.slow
def test_killed_at_random_moments_ends_bit_identical(undisturbed, tmp_path):
    """A checkpoint is being written nearly all the time, so the kills fall into writes too."""
    rng, workdir = random.Random(0), tmp_path / "run"
    for _ in range(3):
        job, lines = Job(1, *_args(workdir, *EVERY_STEP)), rng.randint(2, 5)
        assert job.wait_for(lambda job=job, lines=lines: job.output().count("\n") >= lines)
        job.send(signal.SIGKILL)
        job.finish()
    ended = here(*_args(workdir, *EVERY_STEP))
    assert ended.code == 0, ended
    _assert_same_run(undisturbed, workdir, 30)


def test_sigterm_saves_the_step_at_hand_and_exits_0(undisturbed, tmp_path, monkeypatch):
    workdir = tmp_path / "run"
    seldom = (*EVERY_STEP, "--config.checkpoint.every_steps=1000")
    advance = train.RunLog.advance

    def stop_at_7(log, step, **more):
        if step == 7:
            os.kill(os.getpid(), signal.SIGTERM)
        advance(log, step, **more)

    with monkeypatch.context() as patched:
        patched.setattr(train.RunLog, "advance", stop_at_7)
        code, output, _ = here(*_args(workdir, *seldom))
    (step,) = Checkpoints(workdir, read_only=True).steps
    assert (code, step in (7, 8)) == (0, True)
    assert f"stopped at step {step}" in output
    code, output, errors = here(*_args(workdir, *seldom))
    assert code == 0, errors
    assert f"continuing at step {step}" in output
    _assert_same_run(undisturbed, workdir, 30)


def test_a_run_of_an_earlier_version_is_read_and_continued(tmp_path):
    """Its schedule is constant, so that it may go on for more steps than it was made for."""
    old = shutil.copytree(ROOT / "tests" / "reference" / "old_run", tmp_path / "old_run")
    expected = np.load(old / "expected.npz")
    config = run_folder.stored_config(epath.Path(old))
    ours, theirs = run_folder.flat(get_config()), run_folder.flat(config)
    missing = {key for key in ours if key.split(".")[0] in run_folder.SECTIONS_OF_A_RUN}
    assert not missing - set(theirs), "give these a default in runtime/workdir.py"
    for step in (6, 9):
        if step == 9:
            assert here(*_args(old, *_flags(theirs), "--config.train.num_steps=9")).code == 0
        generator = mf_jax.load(old)
        samples = generator.sample_raw([0, 1, 2, 3], steps=1, seed=3)
        assert generator.step == step
        np.testing.assert_allclose(samples, expected[f"samples_of_step_{step}"], atol=1e-5)


def _flags(stored):
    """Return what sets today's config to a stored one."""
    default = run_folder.flat(get_config())
    return [
        f"--config.{key}={tuple(value) if isinstance(value, list) else value}"
        for key, value in stored.items()
        if key in default and value != default[key]
    ]


def test_a_run_without_moving_averages(tmp_path):
    arguments = _args(tmp_path / "run", *TINY, "--config.ema.decays=()")
    assert here(*arguments).code == 0
    code, output, _ = here(*arguments, "--mode=sample")
    assert (code, "ema none" in output) == (0, True)


def test_a_finished_run_is_left_as_it_is(copy_of_trained):
    before = (copy_of_trained / "metrics.jsonl").read_bytes(), _arrays(copy_of_trained, 12)
    code, output, _ = here(*_args(copy_of_trained, *TINY))
    assert (code, "12 steps" in output) == (0, True)
    after = (copy_of_trained / "metrics.jsonl").read_bytes(), _arrays(copy_of_trained, 12)
    assert before == after


def _array_files(folder):
    files = [path for path in folder.rglob("*") if path.is_file() and path.stat().st_size > 2000]
    return sorted(files, key=lambda path: (path.stat().st_size, path))


def _cut_short(checkpoint):
    path = _array_files(checkpoint)[-1]  # others may be left from writing
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _flip_a_bit(checkpoint):
    path = _array_files(checkpoint / "rest")[-1]
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


def _lose_an_item(checkpoint):
    shutil.rmtree(checkpoint / "ema")


def _empty_index(checkpoint):
    (checkpoint / "index" / "metadata").write_text("")


def test_damaged_newest_checkpoints_are_reported_and_the_one_before_used(copy_of_trained):
    """Damage of each kind, found by what reads the parameters; then the run goes on from step 8 to the same end."""
    whole = _arrays(copy_of_trained, 12)
    parts, newest = _parts(), copy_of_trained / "checkpoints" / "12"
    like = jax.eval_shape(lambda: state_module.initial_state(parts))
    shutil.copytree(newest, copy_of_trained / "kept")
    for damage in (_cut_short, _flip_a_bit, _empty_index, _lose_an_item):
        shutil.rmtree(newest)
        shutil.copytree(copy_of_trained / "kept", newest)
        damage(newest)
        restored = Checkpoints(copy_of_trained, read_only=True).restore_state(like)
        assert int(restored.step) == 8, damage
    code, output, errors = here(*_args(copy_of_trained, *TINY))
    assert code == 0, errors
    assert "checkpoint 12 is damaged" in output
    assert "continuing at step 8" in output
    assert _arrays(copy_of_trained, 12) == whole
    assert (copy_of_trained / "damaged_checkpoints" / "12").exists(), "nothing is lost"


def test_fingerprints_notice_what_the_format_does_not(copy_of_trained):
    """Every file is sound, the state is not."""
    parts, checkpoints = _parts(), Checkpoints(copy_of_trained)
    like = jax.eval_shape(lambda: state_module.initial_state(parts))
    index = copy_of_trained / "checkpoints" / "12" / "index" / "metadata"
    entries = json.loads(index.read_text())
    entries["params"][next(iter(entries["params"]))][2] ^= 1
    index.write_text(json.dumps(entries))
    with pytest.raises(DamagedCheckpoint, match="fingerprints of params"):
        checkpoints._restore(12, {"params": like.params})


def test_all_checkpoints_damaged_is_an_error_not_a_fresh_start(copy_of_trained):
    metrics = (copy_of_trained / "metrics.jsonl").read_bytes()
    for checkpoint in (copy_of_trained / "checkpoints").iterdir():
        _lose_an_item(checkpoint)
    code, _, errors = here(*_args(copy_of_trained, *TINY))
    assert code == 2
    assert "every checkpoint is damaged" in errors
    assert (copy_of_trained / "metrics.jsonl").read_bytes() == metrics


def test_one_compilation_and_divergence_that_names_step_and_metric(tmp_path, monkeypatch):
    """The last good checkpoint stays."""
    make, traced = train.make_train_step, []

    def poisoned(parts, mesh):
        step = make(parts, mesh)

        def train_step(state, x, labels):
            traced.append(1)
            return step(state, jax.numpy.where(state.step == 5, jax.numpy.nan, x), labels)

        return train_step

    monkeypatch.setattr(train, "make_train_step", poisoned)
    code, _, errors = here(*_args(tmp_path / "run", *TINY))
    assert (code, len(traced)) == (1, 1)
    for text in ("step 6: ", "loss", "v_error", "checkpoint of step 4 is intact"):
        assert text in errors
    assert Checkpoints(tmp_path / "run", read_only=True).steps == [4]
    rows = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(row)["step"] for row in rows] == [3]


def test_metrics_that_stand_still_name_the_first_bad_metric_only():
    """A gradient that overflows makes everything bad one step later; the report must not list everything."""
    parts = _parts()
    shapes = jax.eval_shape(lambda: state_module.initial_state(parts))
    zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes.metrics)
    state = shapes.replace(step=np.int32(0), metrics=zeros, first_bad_step=np.int32(-1))
    good = jax.tree.map(lambda a: a + 1, state.metrics)
    bad = good | {"grad_norm": jax.tree.map(lambda a: a * np.inf, good["grad_norm"])}
    collected, first = state_module._collect(parts, state, bad)
    worse = jax.tree.map(lambda a: a * np.nan, good)
    after = state.replace(metrics=collected, first_bad_step=first, step=state.step + 1)
    collected, first = state_module._collect(parts, after, worse)
    assert int(first) == 1
    wrong = [name for name, metric in collected.items() if not np.isfinite(metric.total)]
    assert wrong == ["grad_norm"]
