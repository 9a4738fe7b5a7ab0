"""Bad input: one line on stderr, exit code 2, nothing lost. And what the command line understands."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, TINY
from PIL import Image

from mf_jax.main import _last_of_each

DIGITS, TOY = "--config=configs/digits.py", "--config=configs/toy2d.py"


def _assert_refused(result, *words):
    code, _, errors = result
    assert code == 2, errors
    assert errors.count("\n") == 1, f"not one line: {errors}"
    assert "Traceback" not in errors
    for word in words:
        assert word in errors, f"{word!r} is not in: {errors}"


BAD_KEYS = [
    # a bad override, and words that its error must contain
    ("optim.lrr=1", "lrr", "lr"),
    ("optm.lr=1", "optm", "optim"),
    ("optim.lr=abc", "optim.lr", "float"),
    ("optim.lr=-1", "optim.lr=-1.0", "above 0"),
    ("optim.lr=nan", "optim.lr=nan"),
    ("optim.schedule=cosin", "optim.schedule", "cosine"),
    ("mesh.gather=blocks", "mesh.gather", "block"),
    ("optim.warmup_steps=13", "optim.warmup_steps=13", "num_steps=12"),
    ("optim.b2=1.0", "optim.b2"),
    ("optim.clip_norm=-1.0", "optim.clip_norm"),
    ("optim.weight_decay=-1.0", "optim.weight_decay"),
    ("seed=1.5", "seed"),
    ("seed=-1", "seed=-1"),
    ("data.name=digit", "digit", "digits, toy2d, image_folder, tfds"),
    ("data.image_size=16", "image_size", "8"),
    ("data.name=image_folder", "path"),
    ("model.name=resnet", "model.name", "dit, in_context_dit, unet, mlp"),
    ("model.name=mlp", "model.name", "dit"),
    ("model.size=XXL", "model.size", "XL"),
    ("model.patch_size=3", "patch_size=3", "8x8"),
    ("model.width=18", "width=18", "divisible"),
    ("model.depth=-1", "depth=-1"),
    ("model.time_conditioning=r,t", "time_conditioning", "t,t-r"),
    ("model.dtype=float16", "model.dtype", "bfloat16"),
    ("objective.name=mean_flow", "objective.name", "did you mean meanflow?"),
    ("objective.tangent=v12", "tangent", "v01"),
    ("times.name=normal", "times.name", "logit_normal"),
    ("times.t_std=0.0", "times.t_std"),
    ("times.r_std=-1.0", "times.r_std"),
    ("draws.instant_share=1.5", "instant_share=1.5", "[0, 1]"),
    ("draws.instant_share=-0.5", "instant_share=-0.5"),
    ("draws.label_drop_share=2.0", "label_drop_share"),
    ("draws.label_drop=none", "label_drop", "any_row"),
    ("train.batch_size=7", "batch_size=7", "multiple of 2"),
    ("train.batch_size=1", "batch_size=1", "multiple of 2"),
    ("train.batch_size=0", "batch_size=0"),
    ("train.num_steps=0", "num_steps=0"),
    ("guidance.omega=-1.0", "omega"),
    ("guidance.kappa=1.0", "kappa"),
    ("guidance.t_min=0.9 --config.guidance.t_max=0.1", "t_min=0.9", "t_max=0.1"),
    ("weight.c=0.0", "weight.c"),
    ("weight.p=-1.0", "weight.p"),
    ("ema.decays=(1.0,)", "ema.decays"),
    ("ema.decays=(0.9,0.9)", "ema.decays", "different"),
    ("train.log_every_steps=0", "train.log_every_steps=0"),
    ("checkpoint.every_steps=0", "checkpoint.every_steps"),
    ("checkpoint.keep=0", "checkpoint.keep"),
    ("mesh.data=3", "mesh.data=3"),
    ("sample.steps=0", "sample.steps=0"),
    ("sample.times=(0.0,1.0)", "sample.times", "fall"),
    ("sample.times=(1.0,-0.5,0.0)", "sample.times"),
    ("sample.times=(1.0,0.2,0.5,0.0)", "sample.times"),
    ("sample.labels=(3,10)", "sample.labels", "10 is not a class"),
    ("sample.num=0", "sample.num=0"),
    ("sample.labels=cat", "sample.labels", "cat"),
    ("sample.labels=(1.5,)", "sample.labels", "1.5", "whole number"),
    ("sample.times=(1.0,'a',0.0)", "sample.times", "'a'"),
    ("eval.steps=(1.5,)", "eval.steps", "1.5"),
    ("ema.decays=(0.9,'x')", "ema.decays", "'x'"),
    ("ema.decays=", "ema.decays"),
    ("times.t_mean=nan", "times.t_mean=nan"),
    ("times.t_std=inf", "times.t_std=inf"),
    ("objective.name=flow_matching --config.guidance.omega=2.0", "flow_matching has no guidance"),
    ("sample.ema=0.5", "sample.ema", "this run has"),
    ("eval.steps=(1,0)", "eval.steps=0"),
    ("eval.num_samples=0", "eval.num_samples"),
]


@pytest.mark.parametrize("case", BAD_KEYS, ids=lambda case: case[0])
def test_bad_key_is_refused_before_anything_is_written(case, command, tmp_path):
    override, *words = case
    workdir = tmp_path / "run"
    bad = [f"--config.{override.split()[0]}", *override.split()[1:]]
    _assert_refused(command(DIGITS, f"--workdir={workdir}", *TINY, *bad), *words)
    assert not workdir.exists()


def test_all_problems_in_one_line(command, tmp_path):
    bad = (
        "--config.optim.lr=-1",
        "--config.model.patch_size=3",
        "--config.data.image_size=9",
        "--config.weight.c=0.0",
    )
    _assert_refused(
        command(DIGITS, f"--workdir={tmp_path}/run", *bad), "optim.lr", "image_size", "weight.c"
    )


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], ["--config is missing"]),
        (["--config=configs/digit.py"], ["configs/digit.py", "did you mean configs/digits.py?"]),
        (["--config=nowhere/at_all.py"], ["nowhere/at_all.py", "no such file"]),
        ([DIGITS, "--mode=trian"], ["trian", "did you mean train?"]),
        ([DIGITS, "--wordir=x"], ["wordir", "workdir"]),
        ([DIGITS, "train"], ["'train'", "--mode=train"]),
        (["--config.seed=1", DIGITS], ["--config.seed=1"]),
        ([DIGITS, "--workdir=/dev/null/run"], ["/dev/null/run", "cannot be written"]),
        ([DIGITS, "--mode=eval", "--workdir=/nowhere/run"], ["/nowhere/run", "train first"]),
        ([DIGITS, "--mode=sample", "--workdir=/nowhere/run"], ["/nowhere/run", "train first"]),
    ],
    ids=str,
)
def test_bad_arguments(arguments, words, command):
    _assert_refused(command(*arguments), *words)


def test_config_file_that_raises(command, tmp_path):
    path = tmp_path / "broken.py"
    path.write_text("def get_config():\n    return 1 / 0\n")
    _assert_refused(command(f"--config={path}"), "division by zero")


@pytest.mark.parametrize(
    "more", [("--config.objective.name=terminal_velocity",), ("--config.controls.monotone=1.0",)]
)
def test_fused_attention_has_no_gradient_of_a_derivative(command, tmp_path, more):
    code, _, errors = command(
        "--config=configs/digits.py",
        f"--workdir={tmp_path}/run",
        "--config.model.attention=fused",
        *more,
    )
    assert code == 2
    assert "model.attention='fused'" in errors
    assert not (tmp_path / "run").exists()


def test_guidance_without_labels(command, tmp_path):
    _assert_refused(
        command(TOY, f"--workdir={tmp_path}/run", "--config.guidance.kappa=0.5"),
        "no labels to guide by",
    )


def test_guidance_without_rows_that_lose_their_label(command, tmp_path):
    bad = ("--config.guidance.kappa=0.5", "--config.draws.label_drop_share=0.0")
    _assert_refused(command(DIGITS, f"--workdir={tmp_path}/run", *bad), "label_drop_share=0.1")


def test_no_label_for_a_model_that_never_trained_without(command, tmp_path):
    bad = ("--config.sample.labels=(-1,)", "--config.draws.label_drop_share=0.0")
    _assert_refused(command(DIGITS, f"--workdir={tmp_path}/run", *bad), "-1 means nothing")


def test_labels_for_an_unconditional_model(command, tmp_path):
    _assert_refused(
        command(TOY, f"--workdir={tmp_path}/run", "--config.sample.labels=(1,)"), "no classes"
    )


def test_flipped_vectors(command, tmp_path):
    _assert_refused(
        command(TOY, f"--workdir={tmp_path}/run", "--config.data.flip=True"), "data.flip"
    )


def test_unknown_toy(command, tmp_path):
    _assert_refused(
        command(TOY, f"--workdir={tmp_path}/run", "--config.data.toy=moons"), "two_moons"
    )


@pytest.mark.parametrize("mode", ["train", "eval", "sample"])
def test_workdir_of_another_config(mode, command, copy_of_trained):
    before = sorted(path.name for path in copy_of_trained.rglob("*"))
    other = (
        DIGITS,
        f"--mode={mode}",
        f"--workdir={copy_of_trained}",
        *TINY,
        "--config.optim.lr=0.5",
    )
    _assert_refused(command(*other), "another config", "optim.lr", "0.5")
    assert before == sorted(path.name for path in copy_of_trained.rglob("*"))


@pytest.mark.parametrize("mode", ["train", "eval", "sample"])
def test_checkpoint_of_another_model(mode, command, copy_of_trained):
    stored = json.loads((copy_of_trained / "config.json").read_text())
    stored["model"]["width"] = 32
    (copy_of_trained / "config.json").write_text(json.dumps(stored))
    other = (
        DIGITS,
        f"--mode={mode}",
        f"--workdir={copy_of_trained}",
        *TINY,
        "--config.model.width=32",
    )
    _assert_refused(command(*other), "another model", "checkpoint")
    assert len(list((copy_of_trained / "checkpoints").iterdir())) == 3


@pytest.mark.parametrize("mode", ["eval", "sample"])
def test_run_without_checkpoint(mode, command, copy_of_trained):
    for checkpoint in (copy_of_trained / "checkpoints").iterdir():
        checkpoint.rename(copy_of_trained / f"elsewhere_{checkpoint.name}")
    _assert_refused(
        command(DIGITS, f"--mode={mode}", f"--workdir={copy_of_trained}", *TINY), "no checkpoint"
    )


def test_other_data_than_the_run_was_trained_on(command, copy_of_trained):
    stored = json.loads((copy_of_trained / "data.json").read_text())
    (copy_of_trained / "data.json").write_text(json.dumps(stored | {"size": 1436}))
    _assert_refused(
        command(DIGITS, f"--workdir={copy_of_trained}", *TINY), "other data", "1436", "1437"
    )
    assert json.loads((copy_of_trained / "data.json").read_text())["size"] == 1436


@pytest.mark.parametrize("seed", ["5000000000", "-1"])
def test_seed_out_of_range_when_sampling(command, copy_of_trained, seed):
    arguments = (
        DIGITS,
        "--mode=sample",
        f"--workdir={copy_of_trained}",
        *TINY,
        f"--config.sample.seed={seed}",
    )
    _assert_refused(command(*arguments), "seed")


def test_checkpoints_folder_that_is_a_file(command, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "checkpoints").write_text("")
    _assert_refused(command(DIGITS, f"--workdir={tmp_path}/run", *TINY), "checkpoints")


def test_unreadable_config_json(command, copy_of_trained):
    (copy_of_trained / "config.json").write_text("{")
    _assert_refused(command(DIGITS, f"--workdir={copy_of_trained}", *TINY), "config.json")


def test_two_runs_in_one_workdir(command, spawn, tmp_path):
    arguments = (DIGITS, f"--workdir={tmp_path}/run", *TINY, "--config.train.num_steps=100000")
    first = spawn(*arguments)
    try:
        assert "parameters" in first.stdout.readline()
        _assert_refused(command(*arguments), "another process is training")
    finally:
        first.kill()
        first.communicate()


def _picture_config(folder):
    return (
        DIGITS,
        "--config.data.name=image_folder",
        f"--config.data.path={folder}",
        "--config.data.image_size=8",
        *TINY,
    )


def test_empty_folder(command, tmp_path):
    (tmp_path / "pictures").mkdir()
    _assert_refused(
        command(*_picture_config(tmp_path / "pictures"), f"--workdir={tmp_path}/run"), "pictures"
    )


def test_folder_that_is_not_there(command, tmp_path):
    _assert_refused(
        command(*_picture_config(tmp_path / "picturs"), f"--workdir={tmp_path}/run"), "picturs"
    )


def test_broken_picture_is_skipped_named_and_counted(spawn, tmp_path):
    rng, folder = np.random.default_rng(0), tmp_path / "pictures"
    for name in ("cat", "dog"):
        (folder / name).mkdir(parents=True)
        for i in range(12):
            Image.fromarray(rng.integers(0, 255, (10, 14, 3), np.uint8)).save(
                folder / name / f"{i:02d}.png"
            )
    (folder / "dog" / "03.png").write_bytes(b"not a picture")
    config = [a for a in _picture_config(folder) if "num_steps" not in a]
    process = spawn(*config, "--config.train.num_steps=2", f"--workdir={tmp_path}/run")
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    assert "03.png" in errors
    assert " 1 " in errors
    assert json.loads((tmp_path / "run" / "data.json").read_text())["class_names"] == ["cat", "dog"]


def test_as_a_process_without_traceback():
    result = subprocess.run(
        [sys.executable, "-m", "mf_jax.main", "--config=configs/digit.py"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 2
    assert result.stdout == ""
    assert result.stderr.startswith("mf_jax: ")
    assert result.stderr.count("\n") == 1


def test_help_names_modes(command):
    code, out, _ = command("--help")
    assert code == 0
    assert "--mode=train|eval|sample" in out


def test_workdir_and_mode_have_defaults(monkeypatch):
    from mf_jax.main import parse

    arguments = [
        "mf_jax",
        DIGITS,
        "--config.optim.lr=0.5",
        "--config.sample.labels=3,3,7",
        "--config.eval.steps=(4,)",
    ]
    monkeypatch.setattr(sys, "argv", arguments)
    config, mode, workdir = parse(arguments)
    assert (mode, workdir) == ("train", Path("runs/digits"))
    assert (config.optim.lr, config.sample.labels, config.eval.steps) == (0.5, (3, 3, 7), (4,))


def test_the_last_of_several_settings_of_a_key_counts():
    """Not all of them, as the parser of tuples would have it."""
    arguments = [
        "x",
        "--config.eval.steps=1,",
        "--mode=eval",
        "--config.seed=1",
        "--config.eval.steps=2,4",
    ]
    assert _last_of_each(arguments) == [
        "x",
        "--mode=eval",
        "--config.seed=1",
        "--config.eval.steps=2,4",
    ]
