"""Training: results, exact resume, stopping, damage, divergence, runs of earlier versions."""

import contextlib
import dataclasses
import functools
import json
import os
import re
import shutil
import signal
from pathlib import Path
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ROOT, TINY
from etils import epath
from jobs import PICTURES, edit, here, tiny_config, works
from networks import draw
from steps import parts_of

import mf_jax
from configs.digits import get_config
from mf_jax import step as state_module
from mf_jax import train
from mf_jax.data import Stored
from mf_jax.flow.errors import BadInput
from mf_jax.models import MLP
from mf_jax.objectives.meanflow import MeanFlow
from mf_jax.reporting.run_log import read_metrics
from mf_jax.runtime import earlier
from mf_jax.runtime import workdir as run_folder
from mf_jax.runtime.checkpoint import Checkpoints, index_of
from mf_jax.scoring.rows import read_rows
from mf_jax.validation import validate


def _args(workdir, *more):
    return (f"--config={ROOT}/configs/digits.py", f"--workdir={workdir}", *TINY, *more)


@pytest.fixture(scope="module")
def parts():
    config = tiny_config()
    return train.step_parts(config, validate(config, num_devices=1))


@pytest.fixture(scope="module")
def shapes(parts):
    return jax.eval_shape(lambda: state_module.initial_state(parts))


def _arrays(workdir, step):
    """Return the index of a checkpoint, which names every bit of its state."""
    with Path(workdir, "checkpoints", str(step), "index", "metadata").open() as file:
        return json.load(file)


def results(workdir):
    """Return what a run of 12 steps ends with, bit for bit."""
    pictures = {path.name: path.read_bytes() for path in (workdir / "samples").iterdir()}
    return (workdir / "metrics.jsonl").read_text(), _arrays(workdir, 12), pictures


def test_a_run_leaves_what_it_says(trained):
    rows = read_metrics(trained)
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


def test_sigterm_saves_the_step_at_hand_and_exits_0(trained, tmp_path):
    workdir = tmp_path / "run"
    arguments = _args(workdir, "--config.checkpoint.every_steps=1000", PICTURES)
    advance = train.RunLog.advance

    def stop_at_7(log, step):
        if step == 7:
            os.kill(os.getpid(), signal.SIGTERM)
        advance(log, step)

    with mock.patch.object(train.RunLog, "advance", stop_at_7):
        ended = here(*arguments)
    (step,) = Checkpoints(workdir, read_only=True).steps
    assert (ended.code, step in (7, 8)) == (0, True)
    assert f"stopping after step {step}; the checkpoint of step {step} will be" in ended.output
    assert f"stopped at step {step}" in ended.output
    edit(workdir / "config.json", checkpoint={"keep": 7})
    output = works(*arguments)
    assert f"continuing at step {step}" in output
    assert "the run keeps 7, as it began" in output
    assert run_folder.stored_config(epath.Path(workdir)).checkpoint.keep == 7
    assert results(workdir) == results(trained)


def test_a_run_of_an_earlier_version_is_read_and_continued(tmp_path):
    """Its schedule is constant, so that it may go on for more steps than it was made for."""
    old = shutil.copytree(ROOT / "tests" / "reference" / "old_run", tmp_path / "old_run")
    expected = np.load(old / "expected.npz")
    stored = json.loads((old / "config.json").read_text())
    kept = {*earlier.ALWAYS, *earlier.RENAMED}
    for section in run_folder.SECTIONS_OF_A_RUN:  # runs of still earlier versions have no more
        if isinstance(keys := stored.get(section), dict):
            stored[section] = {k: v for k, v in keys.items() if f"{section}.{k}" in kept}
    stored["init"]["from"] = ""
    (old / "config.json").write_text(json.dumps(stored))
    config = run_folder.stored_config(epath.Path(old))
    ours, theirs = run_folder.flat(get_config()), run_folder.flat(config)
    assert {key: theirs[key] for key in earlier.BEFORE} == earlier.BEFORE
    flags = [
        f"--config.{key}={tuple(value) if isinstance(value, list) else value}"
        for key, value in theirs.items()
        if key in ours and value != ours[key]
    ]
    for step in (6, 9):
        if step == 9:
            flags += ["--config.train.num_steps=9", f"--workdir={old}"]
            flags.remove("--config.ema.rampup=0.0")
            output = works(f"--config={ROOT}/configs/digits.py", *flags)
            assert "ema.rampup=0.0: what this run has done since" in output
        generator = mf_jax.load(old)
        samples = generator.sample_raw([0, 1, 2, 3], steps=1, seed=3)
        assert generator.step == step
        np.testing.assert_allclose(samples, expected[f"samples_of_step_{step}"], atol=1e-5)


def test_a_run_without_moving_averages_whose_pictures_cannot_be_drawn(tmp_path):
    """All that only shows a run fails, each in one line."""
    keys = ("ema.decays=()", "train.num_steps=2", "optim.warmup_steps=2", "train.log_every_steps=1")
    arguments = _args(tmp_path / "run", *(f"--config.{key}" for key in keys))
    broken = mock.Mock(side_effect=OSError("no font"))
    with (
        mock.patch.object(train, "draw_progress", broken),
        mock.patch("mf_jax.reporting.page.draw_curves", broken),
        mock.patch("mf_jax.reporting.run_log.EventsWriter", broken),
    ):
        output = works(*arguments)
    for what in ("TensorBoard", "the picture of step 2", "report.html"):
        assert f"{what} is left out: OSError: no font" in output
    assert Checkpoints(tmp_path / "run", read_only=True).steps == [2]
    assert "ema none" in works(*arguments, "--mode=sample")
    first, second = [row["learning_rate"] for row in read_metrics(tmp_path / "run")]
    assert first == second / 2


def test_vectors_of_any_length_and_parts_of_ones_own(tmp_path):
    """The page on own parts registers them by a config, and names none of our traits."""
    workdir = tmp_path / "run"
    text = (ROOT / "docs" / "own_parts.md").read_text()
    file = tmp_path / "clouds.py"
    file.write_text(re.search(r"```python\n(.*?)```", text, re.DOTALL)[1])
    config = (f"--config={file}", f"--workdir={workdir}", *TINY)
    with contextlib.ExitStack() as stack:
        for table in ("data.SOURCES", "models.NETWORKS", "objectives.OBJECTIVES"):
            stack.enter_context(mock.patch.dict(f"mf_jax.{table}"))
        works(*config)
        works(*config, "--mode=sample", "--config.sample.num=6")
        works(*config, "--mode=eval")
        rows = len(read_rows(epath.Path(workdir)))
        works(*config, "--mode=eval")
        assert len(read_rows(epath.Path(workdir))) == rows
        file.write_text(file.read_text() + "# of another version\n")
        works(*config, "--mode=eval")
        assert len(read_rows(epath.Path(workdir))) > rows
    with pytest.raises(BadInput, match=r"^data.name='clouds': is registered by .*/clouds.py"):
        mf_jax.load(workdir)  # and nobody has imported it
    assert np.load(workdir / "samples.npz")["arr_0"].shape == (6, 16)
    assert (workdir / "scatter.png").exists()
    arrays = _arrays(workdir, 12)
    assert [*arrays["ema"].values()] != [*arrays["params"].values()], "the ramp counts steps"
    assert "sliced_wasserstein" in json.loads((workdir / "eval.json").read_text())["rows"][0]
    page = (workdir / "report.html").read_text()
    shown = "step 12 of 12", "average 0.9999", "examples/s", "Squared error of the velocity v"
    assert all(text in page for text in shown)
    assert "<h3>loss</h3>" not in page


def _damage(checkpoint, how):
    """Damage a checkpoint; its largest file is of arrays, others may be left from writing."""
    files = (path for path in checkpoint.rglob("*") if path.is_file())
    largest = max(files, key=lambda path: (path.stat().st_size, path))
    index = checkpoint / "index" / "metadata"
    content, entries = bytearray(largest.read_bytes()), json.loads(index.read_text())
    content[(half := len(content) // 2)] ^= 4
    if how in ("cut short", "a bit flipped"):
        largest.write_bytes(content[:half] if how == "cut short" else content)
    elif how == "an item lost":
        shutil.rmtree(checkpoint / "ema")
    elif how == "no index":
        index.write_text("")
    else:  # every file is sound, the state is not what was saved
        next(iter(entries["params"].values()))[2] ^= 1
        index.write_text(json.dumps(entries))


def test_damaged_checkpoints_are_told_and_passed_over(trained, copy_of_trained, shapes, capsys):
    """Each kind is found by what reads the state; then the run goes on from step 8 to its end."""
    assert "12 steps" in works(*_args(copy_of_trained))
    assert results(copy_of_trained) == results(trained), "a finished run is left as it is"
    first, second = (index_of({"a": np.float32(a)}) for a in ([1, 2], [2, 1]))
    assert first != second, "fingerprints depend on the order of numbers"
    whole, newest = _arrays(copy_of_trained, 12), copy_of_trained / "checkpoints" / "12"
    shutil.copytree(newest, copy_of_trained / "kept")
    for how in ("cut short", "a bit flipped", "no index", "an item lost", "other numbers"):
        shutil.rmtree(newest)
        shutil.copytree(copy_of_trained / "kept", newest)
        _damage(newest, how)
        restored = Checkpoints(copy_of_trained, read_only=True).restore_state(shapes)
        assert int(restored.step) == 8, how
    assert "12 is damaged (fingerprints of params differ)" in capsys.readouterr().out
    output = works(*_args(copy_of_trained))
    assert "checkpoint 12 is damaged" in output
    assert "continuing at step 8" in output
    assert _arrays(copy_of_trained, 12) == whole
    assert (copy_of_trained / "damaged_checkpoints" / "12").exists(), "nothing is lost"
    metrics = (copy_of_trained / "metrics.jsonl").read_bytes()
    for checkpoint in (copy_of_trained / "checkpoints").iterdir():
        _damage(checkpoint, "an item lost")
    code, _, errors = here(*_args(copy_of_trained))
    assert (code, "every checkpoint is damaged" in errors) == (2, True), "no fresh start"
    assert (copy_of_trained / "metrics.jsonl").read_bytes() == metrics


def test_one_compilation_and_divergence_that_names_step_and_metric(tmp_path, monkeypatch):
    """The last good checkpoint stays; the loss is traced once, for the names of metrics too."""
    make, traced, loss, losses = train.make_train_step, [], MeanFlow.loss, []

    def poisoned(parts, mesh):
        step = make(parts, mesh)

        def train_step(state, x, *more):
            traced.append(1)
            return step(state, jax.numpy.where(state.step == 5, jax.numpy.nan, x), *more)

        return train_step

    monkeypatch.setattr(train, "make_train_step", poisoned)
    monkeypatch.setattr(MeanFlow, "loss", lambda *a: losses.append(1) or loss(*a))
    code, _, errors = here(*_args(tmp_path / "run"))
    assert (code, len(traced), len(losses)) == (1, 1, 1)
    for text in ("step 6: ", "loss", "v_error", "checkpoint of step 4 is intact"):
        assert text in errors
    assert Checkpoints(tmp_path / "run", read_only=True).steps == [4]
    assert [row["step"] for row in read_metrics(tmp_path / "run")] == [3]


def test_metrics_that_stand_still_name_the_first_bad_metric_only(parts, shapes):
    """A gradient that overflows makes everything bad a step later; the report names it alone."""
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


def test_every_visit_draws_anew_and_the_step_sees_what_was_drawn():
    """A far mean gives a large error; the deviation counts too."""

    def noisy(key, rows):
        mean, deviation = jnp.split(rows.astype(jnp.float32), 2, axis=-1)
        return mean + deviation * jax.random.normal(key, mean.shape)

    parts = parts_of(MLP(depth=1, width=16, num_classes=0), MeanFlow(), shape=(4, 4, 1), batch=8)
    stored = Stored(jax.ShapeDtypeStruct((4, 4, 2), jnp.float16), noisy)
    parts = dataclasses.replace(parts, stored=stored)
    state = jax.jit(lambda: state_module.initial_state(parts))()
    train_step = jax.jit(state_module.make_train_step(parts))

    def error(rows, step=0):
        after = train_step(state.replace(step=state.step + step), rows, np.zeros(8, np.int32))
        return float(after.metrics["u_error"].compute())

    rows = np.ones((8, 4, 4, 2), np.float16)
    assert parts.batch[0].shape == rows.shape
    assert error(rows) == error(rows) != error(rows, step=1)
    mean, deviation = np.zeros((2, *rows.shape), np.float16)
    mean[..., 0], deviation[..., 1] = 100, 100
    assert min(error(mean), error(deviation)) > 100 * error(0 * rows)


def test_a_batch_in_parts_has_the_gradient_and_the_metrics_of_the_whole():
    parts = parts_of(MLP(depth=1, width=8, num_classes=3), MeanFlow(), shape=(3,), batch=16)
    state = state_module.initial_state(parts, draw(parts.network, (3,)))
    batch = jax.random.normal(jax.random.key(0), (16, 3)), jnp.arange(16) % 3

    def gradient(microbatch):
        split = dataclasses.replace(parts, microbatch=microbatch)
        return jax.jit(lambda: state_module._gradient(split, state, batch))()

    close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)
    jax.tree.map(close, gradient(4), gradient(0))
