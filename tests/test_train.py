"""Training: what a run leaves, exact resume, stopping, damage, divergence."""

import json
import random
import shutil
import signal

import jax
import numpy as np
import pytest
from conftest import TINY
from etils import epath

from mf_jax import step as state_module
from mf_jax import train
from mf_jax.main import parse
from mf_jax.runtime.checkpoint import Checkpoints, DamagedCheckpoint

EVERY_STEP = (
    *TINY,
    "--config.train.num_steps=30",
    "--config.train.log_every_steps=2",
    "--config.log.sample_every_steps=7",
    "--config.checkpoint.every_steps=1",
)


def _args(workdir, *more):
    return ("--config=configs/digits.py", f"--workdir={workdir}", *more)


def _arrays(workdir, step):
    """Return every bit of a checkpoint's state by name."""
    index = (workdir / "checkpoints" / str(step) / "index").rglob("*")
    texts = [path.read_text() for path in index if path.is_file() and path.name == "metadata"]
    assert len(texts) == 1, "the index of a checkpoint is one JSON file"
    return json.loads(texts[0])


def _assert_same_run(a, b, step):
    assert (a / "metrics.jsonl").read_bytes() == (b / "metrics.jsonl").read_bytes()
    assert _arrays(a, step) == _arrays(b, step)
    pictures = sorted(path.name for path in (a / "samples").iterdir())
    assert pictures == sorted(path.name for path in (b / "samples").iterdir())
    for name in pictures:
        assert (a / "samples" / name).read_bytes() == (b / "samples" / name).read_bytes()


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, spawn):
    workdir = tmp_path_factory.mktemp("undisturbed") / "run"
    process = spawn(*_args(workdir, *EVERY_STEP))
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    return workdir


def test_a_run_leaves_what_it_says(trained):
    rows = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [3, 6, 9, 12]
    assert {"loss", "u_error", "v_error", "du_dt", "grad_norm", "learning_rate"} <= set(rows[0])
    assert any(name.startswith("u_error_t") for name in rows[0])
    assert sorted(path.name for path in (trained / "samples").iterdir()) == [
        "step_00000005.png",
        "step_00000010.png",
        "step_00000012.png",
    ]
    assert Checkpoints(trained, read_only=True).steps == [4, 8, 12]
    assert "data:image/png" in (trained / "report.html").read_text()
    assert any((trained / "tensorboard").iterdir())
    assert "block_0/attention/qkv/kernel" in (trained / "parameters.txt").read_text()
    assert json.loads((trained / "config.json").read_text())["train"]["num_steps"] == 12


def test_killed_at_random_moments_ends_bit_identical(undisturbed, tmp_path, spawn):
    """A checkpoint is being written nearly all the time, so the kills fall into writes too."""
    rng, workdir, kills = random.Random(0), tmp_path / "run", 0
    while True:
        process = spawn(*_args(workdir, *EVERY_STEP))
        lines_to_see = rng.randint(1, 4) if kills < 5 else 10_000
        seen = [line for _, line in zip(range(lines_to_see + 1), process.stdout, strict=False)]
        if len(seen) == lines_to_see + 1:
            process.send_signal(signal.SIGKILL)
            kills += 1
        _, errors = process.communicate(timeout=300)
        if process.returncode != -signal.SIGKILL:
            break
    assert process.returncode == 0, errors
    assert kills == 5
    _assert_same_run(undisturbed, workdir, 30)


def test_sigterm_saves_the_step_at_hand_and_exits_0(undisturbed, tmp_path, spawn):
    workdir = tmp_path / "run"
    seldom = [a for a in EVERY_STEP if "checkpoint" not in a] + [
        "--config.checkpoint.every_steps=1000"
    ]
    process = spawn(*_args(workdir, *seldom))
    assert "parameters" in process.stdout.readline()
    assert "step 2/30" in process.stdout.readline()
    process.send_signal(signal.SIGTERM)
    out, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    (step,) = Checkpoints(workdir, read_only=True).steps
    assert 2 <= step < 30
    assert f"stopped at step {step}" in out
    process = spawn(*_args(workdir, *seldom))
    out, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    assert f"continuing at step {step}" in out
    _assert_same_run(undisturbed, workdir, 30)


def test_a_run_without_moving_averages(tmp_path, command):
    assert command(*_args(tmp_path / "run", *TINY, "--config.ema.decays=()"))[0] == 0
    code, out, _ = command(
        *_args(tmp_path / "run", *TINY, "--config.ema.decays=()", "--mode=sample")
    )
    assert (code, "ema none" in out) == (0, True)


def test_a_finished_run_is_left_as_it_is(copy_of_trained, command):
    before = (copy_of_trained / "metrics.jsonl").read_bytes(), _arrays(copy_of_trained, 12)
    code, out, _ = command(*_args(copy_of_trained, *TINY))
    assert (code, "12 steps" in out) == (0, True)
    assert before == (
        (copy_of_trained / "metrics.jsonl").read_bytes(),
        _arrays(copy_of_trained, 12),
    )


def _array_files(folder):
    return sorted(
        path for path in folder.rglob("*") if path.is_file() and path.stat().st_size > 2000
    )


def _cut_short(checkpoint):
    path = max(
        _array_files(checkpoint), key=lambda path: path.stat().st_size
    )  # others may be left from writing
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _flip_a_bit(checkpoint):
    path = _array_files(checkpoint / "rest")[0]
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


def _lose_an_item(checkpoint):
    shutil.rmtree(checkpoint / "ema")


def _empty_index(checkpoint):
    for path in (checkpoint / "index").rglob("metadata"):
        path.write_text("")


@pytest.mark.parametrize("damage", [_cut_short, _flip_a_bit, _lose_an_item, _empty_index])
def test_damaged_newest_checkpoint_is_reported_and_the_one_before_used(
    copy_of_trained, command, damage
):
    """The run goes on from step 8 and ends where it ended before."""
    whole = _arrays(copy_of_trained, 12)
    damage(copy_of_trained / "checkpoints" / "12")
    code, out, errors = command(*_args(copy_of_trained, *TINY))
    assert code == 0, errors
    assert "checkpoint 12 is damaged" in out
    assert "continuing at step 8" in out
    assert _arrays(copy_of_trained, 12) == whole
    assert (copy_of_trained / "damaged_checkpoints" / "12").exists(), "nothing is lost"


def test_fingerprints_notice_what_the_format_does_not(copy_of_trained, monkeypatch):
    """Exchange two arrays of one shape: every file is sound, the state is not."""
    config, _, _ = _parsed(monkeypatch, copy_of_trained)
    checkpoints = Checkpoints(copy_of_trained)
    parts = train.step_parts(config, train.validate(config, num_devices=1))
    like = jax.eval_shape(lambda: state_module.initial_state(parts))
    state = checkpoints.restore_state(like)
    first, second = (
        state.ema.values() if len(state.ema) > 1 else (state.params, next(iter(state.ema.values())))
    )
    assert any(
        bool((a != b).any())
        for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True)
    )
    index = copy_of_trained / "checkpoints" / "12" / "index" / "metadata"
    entries = json.loads(index.read_text())
    name = next(iter(entries["params"]))
    entries["params"][name][2] ^= 1
    index.write_text(json.dumps(entries))
    with pytest.raises(DamagedCheckpoint, match="fingerprints of params"):
        checkpoints._restore_step(12, {"params": like.params})


def test_all_checkpoints_damaged_is_an_error_not_a_fresh_start(copy_of_trained, command):
    metrics = (copy_of_trained / "metrics.jsonl").read_bytes()
    for checkpoint in (copy_of_trained / "checkpoints").iterdir():
        _lose_an_item(checkpoint)
    code, _, errors = command(*_args(copy_of_trained, *TINY))
    assert code == 2
    assert "every checkpoint is damaged" in errors
    assert (copy_of_trained / "metrics.jsonl").read_bytes() == metrics


def _parsed(monkeypatch, workdir, *more):
    arguments = ["mf_jax", *_args(workdir, *TINY, *more)]
    monkeypatch.setattr("sys.argv", arguments)
    return parse(arguments)


def test_one_compilation_per_run(tmp_path, monkeypatch):
    config, _, workdir = _parsed(monkeypatch, tmp_path / "run")
    traced = []
    make = train.make_train_step

    def counting(parts, mesh):
        step = make(parts, mesh)

        def train_step(*arguments):
            traced.append(1)
            return step(*arguments)

        return train_step

    monkeypatch.setattr(train, "make_train_step", counting)
    train.run(config, epath.Path(workdir))
    assert len(traced) == 1


def test_divergence_names_step_and_metric_and_keeps_the_last_good_checkpoint(
    tmp_path, command, monkeypatch
):
    make = train.make_train_step

    def poisoned(parts, mesh):
        step = make(parts, mesh)

        def train_step(state, x, labels):
            return step(state, jax.numpy.where(state.step == 5, jax.numpy.nan, x), labels)

        return train_step

    monkeypatch.setattr(train, "make_train_step", poisoned)
    code, _, errors = command(*_args(tmp_path / "run", *TINY))
    assert code == 1
    assert "step 6: " in errors
    assert "loss" in errors
    assert "v_error" in errors
    assert "checkpoint of step 4 is intact" in errors
    assert Checkpoints(tmp_path / "run", read_only=True).steps == [4]
    assert all(
        np.isfinite(json.loads(line)["loss"])
        for line in (tmp_path / "run" / "metrics.jsonl").open()
    )


def test_metrics_that_stand_still_name_the_first_bad_metric_only(monkeypatch, tmp_path):
    """A gradient that overflows makes everything bad one step later; the report must not list everything."""
    config, _, _ = _parsed(monkeypatch, tmp_path)
    parts = train.step_parts(config, train.validate(config, num_devices=1))
    state = jax.jit(lambda: state_module.initial_state(parts))()
    good = jax.tree.map(lambda a: a + 1, state.metrics)
    bad = good | {"grad_norm": jax.tree.map(lambda a: a * np.inf, good["grad_norm"])}
    collected, first = state_module._collect(parts, state, bad)
    worse = jax.tree.map(lambda a: a * np.nan, good)
    after = state.replace(metrics=collected, first_bad_step=first, step=state.step + 1)
    collected, first = state_module._collect(parts, after, worse)
    assert int(first) == 1
    assert [name for name, metric in collected.items() if not np.isfinite(metric.total)] == [
        "grad_norm"
    ]


def test_constant_schedule_may_be_continued_for_more_steps(tmp_path, command):
    constant = "--config.optim.schedule=constant"
    short, long = _args(tmp_path / "a", *TINY, constant), _args(tmp_path / "b", *TINY, constant)
    more = "--config.train.num_steps=15"
    assert command(*short)[0] == 0
    assert command(*short, more)[0] == 0
    assert command(*long, more)[0] == 0
    assert _arrays(tmp_path / "a", 15)["params"] == _arrays(tmp_path / "b", 15)["params"]
