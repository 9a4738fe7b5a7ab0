"""Bad input: one line on stderr, exit code 2, nothing lost; and what a command line means."""

import functools
import json
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, TINY
from etils import epath

from mf_jax import models
from mf_jax.arguments import MODES, last_of_each, parse
from mf_jax.runtime.files import locked

DIGITS, TOY = "--config=configs/digits.py", "--config=configs/toy2d.py"


def _assert_refused(result, *words):
    code, _, errors = result
    assert code == 2, errors
    assert errors.count("\n") == 1, f"not one line: {errors}"
    assert "Traceback" not in errors
    for word in words:
        assert word in errors, f"{word!r} is not in: {errors}"


REFUSED_BY_THE_PARSER = {
    # an override, and what its error must say
    "optim.lrr=1": ("has no key 'lrr'", "did you mean lr?"),
    "optm.lr=1": ("has no key 'optm'", "did you mean optim?"),
    "optim.lr=abc": ("optim.lr", "float"),
    "seed=1.5": ("seed",),
    "sample.labels=cat": ("sample.labels", "cat"),
    "ema.decays=": ("ema.decays",),
}
ROUNDS = (
    # overrides that one command refuses all at once, and what its line must say of each
    {
        "optim.lr=-1": "optim.lr=-1.0: must be above 0",
        "optim.schedule=cosin": "optim.schedule='cosin': must be one of constant, cosine",
        "optim.name=moun": "did you mean muon?",
        "optim.warmup_steps=13": "optim.warmup_steps=13: must be within [0, 12]",
        "optim.b1=1.0": "optim.b1=1.0: must be within [0, 1)",
        "optim.b2=-0.1": "optim.b2=-0.1",
        "optim.momentum=1.0": "optim.momentum=1.0",
        "optim.clip_norm=-1.0": "optim.clip_norm=-1.0: must be at least 0",
        "optim.weight_decay=inf": "optim.weight_decay=inf",
        "mesh.gather=blocks": "did you mean block?",
        "seed=-1": "seed=-1",
        "data.image_size=16": "image_size",
        "objective.name=mean_flow": "did you mean meanflow?",
        "times.name=normal": "times.name='normal'",
        "ema.decays=(1.0,)": "ema.decays=(1.0,)",
        "ema.halflives_kimg=(2.0,2.0)": "ema.halflives_kimg=(2.0, 2.0): must be different",
        "train.log_every_steps=0": "train.log_every_steps=0",
        "checkpoint.every_steps=0": "checkpoint.every_steps=0",
        "checkpoint.keep=0": "checkpoint.keep=0: must be at least 1",
        "log.sample_every_steps=-1": "log.sample_every_steps=-1",
        "sample.steps=0": "sample.steps=0",
        "sample.num=0": "sample.num=0",
        "eval.num_samples=0": "eval.num_samples=0",
        "eval.labels=randon": "did you mean random?",
        "eval.seed=-1": "eval.seed=-1",
    },
    {
        "model.name=resnet": "model.name='resnet': must be one of dit, in_context_dit, unet, mlp",
        "model.dtype=float16": "model.dtype='float16'",
        "objective.tangent=v12": "tangent='v12'",
        "times.t_std=0.0": "times.t_std=0.0",
        "train.num_steps=0": "train.num_steps=0",
        "ema.decays=(0.9,0.9)": "must be different",
        "optim.lr=nan": "optim.lr=nan",
        "sample.times=(0.0,1.0)": "sample.times",
        "sample.labels=(3,10)": "10 is not a class",
    },
    {
        "model.name=mlp": "use one of dit",
        "weight.c=0.0": "weight.c=0.0",
        "times.t_mean=nan": "times.t_mean=nan",
        "sample.times=(1.0,0.2,0.5,0.0)": "must fall strictly",
        "sample.labels=(-1,)": "-1",
    },
    {
        "model.size=XXL": "model.size='XXL'",
        "draws.instant_share=1.5": "draws.instant_share=1.5",
        "eval.emas=('0.5',)": "eval.emas='0.5'",
    },
    {
        "model.patch_size=3": "model.patch_size=3: must divide the image size 8x8",
        "guidance.kappa=1.0": "kappa=1.0",
        "times.r_std=inf": "times.r_std=inf",
    },
    {
        "model.width=18": "model.width=18",
        "model.time_conditioning=t": "not told r",
        "objective.name=improved_meanflow": "no second head",
        "draws.label_drop_share=2.0": "draws.label_drop_share=2.0",
        "eval.omegas=(2.0,)": "told no guidance",
    },
    {
        "model.time_conditioning=r,t": "time_conditioning='r,t'",
        "objective.name=pixel_meanflow": "needs a network that predicts data",
        "train.batch_size=7": "train.batch_size=7: must be a multiple of 2",
    },
    {
        "objective.name=flow_matching": "flow_matching has no guidance",
        "guidance.omega=2.0": "guidance.omega=2.0",
        "draws.omega_max=2.0": "cannot be told guidance; use in_context_dit",
        "draws.label_drop_share=0.0": "use draws.label_drop_share=0.1",
        "train.batch_size=0": "train.batch_size=0",
        "sample.ema=0.5": "sample.ema='0.5': this run has 0.9, none",
        "eval.steps=(1,0)": "eval.steps=0",
    },
    {"model.depth=-1": "model.depth=-1", "weight.p=-1.0": "weight.p=-1.0"},
    {"guidance.omega=-1.0": "omega=-1.0"},
    {"guidance.t_min=0.9": "t_min=0.9", "guidance.t_max=0.1": "t_max=0.1"},
    {"objective.name=terminal_velocity": "fused", "model.attention=fused": "model.attention="},
    {"controls.monotone=1.0": "fused", "model.attention=fused": "model.attention="},
    {"data.name=digit": "must be one of digits, toy2d, image_folder, tfds"},
    {"data.name=image_folder": "data.path"},
    {"data.name=image_folder": "picturs", "data.path=picturs": "data.path"},
    {"mesh.data=3": "mesh.data=3"},
    {"model.attention=fussed": "did you mean fused?"},
    {"model.remat=blok": "model.remat='blok'"},
    {"sample.labels=(1.5,)": "sample.labels: 1.5 is not a class"},
    {"sample.times=(1.0,'a',0.0)": "sample.times: 'a' is not a number"},
    {"eval.steps=(1.5,)": "eval.steps: 1.5"},
    {"eval.references=(1,)": "eval.references: 1 is not a text"},
    {"eval.intervals=(0.4,0.6)": "eval.intervals: 0.4 is not (t_min, t_max)"},
    {"eval.steps=()": "eval.steps=()"},
)
ROUNDS_OF_TOY = (
    {
        "guidance.kappa=0.5": "no labels to guide by",
        "sample.labels=(1,)": "no classes",
        "data.flip=True": "data.flip=True",
        "model.width=0": "model.width=0: mlp needs it above 0",
    },
    {"data.toy=moons": "two_moons"},
)


def test_bad_keys_are_refused_together_before_anything_is_written(command, tmp_path, monkeypatch):
    shapes = functools.cache(models.parameter_shapes)  # of few networks
    monkeypatch.setattr("mf_jax.config.parameter_shapes", shapes)
    run = f"--workdir={tmp_path}/run"
    for override, words in REFUSED_BY_THE_PARSER.items():
        _assert_refused(command(DIGITS, run, *TINY, f"--config.{override}"), *words)
    for config, rounds in ((DIGITS, ROUNDS), (TOY, ROUNDS_OF_TOY)):
        for bad in rounds:
            overrides = [f"--config.{override}" for override in bad]
            more = [] if config == TOY else ["--config.ema.decays=(0.9,)"]
            _assert_refused(command(config, run, *TINY, *more, *overrides), *bad.values())
    assert list(tmp_path.iterdir()) == []


def test_bad_arguments(command, tmp_path):
    broken, empty = tmp_path / "broken.py", tmp_path / "pictures"
    broken.write_text("def get_config():\n    return 1 / 0\n")
    empty.mkdir()
    pictures = (DIGITS, "--config.data.name=image_folder", f"--config.data.path={empty}")
    for arguments, *words in (
        ([], "--config is missing"),
        (["--config=configs/digit.py"], "configs/digit.py", "did you mean configs/digits.py?"),
        (["--config=nowhere/at_all.py"], "nowhere/at_all.py", "no such file"),
        (["--config=nowhere/at_all.py:row"], "--config=nowhere/at_all.py: no such file"),
        ([f"--config={broken}"], "division by zero"),
        ([DIGITS, "--mode=trian"], "trian", "did you mean train?"),
        ([DIGITS, "--wordir=x"], "wordir", "workdir"),
        ([DIGITS, "train"], "'train'", "--mode=train"),
        (["--config.seed=1", DIGITS], "--config.seed=1"),
        ([DIGITS, "--workdir=/dev/null/run"], "/dev/null/run", "cannot be written"),
        ([DIGITS, "--mode=eval", "--workdir=/nowhere/run"], "/nowhere/run", "train first"),
        ([DIGITS, "--mode=sample", "--workdir=/nowhere/run"], "/nowhere/run", "train first"),
        ([*pictures, f"--workdir={tmp_path}/run"], "pictures"),
    ):
        _assert_refused(command(*arguments), *words)


def _contents(folder):
    return sorted(path.name for path in folder.rglob("*"))


@pytest.mark.parametrize("mode", ["train", "eval", "sample"])
def test_workdir_of_another_run(mode, command, copy_of_trained):
    before = _contents(copy_of_trained)
    arguments = (DIGITS, f"--mode={mode}", f"--workdir={copy_of_trained}", *TINY)
    refused = command(*arguments, "--config.optim.lr=0.5")
    _assert_refused(refused, "another config", "optim.lr", "0.5")
    if mode == "train":
        with locked(epath.Path(copy_of_trained) / ".lock", wait=False):
            _assert_refused(command(*arguments), "another process is training")
        data = copy_of_trained / "data.json"
        stored = data.read_text()
        data.write_text(json.dumps(json.loads(stored) | {"size": 1436}))
        _assert_refused(command(*arguments), "other data", "1436", "1437")
        assert json.loads(data.read_text())["size"] == 1436
        data.write_text(stored)
    if mode == "sample":
        for seed in ("5000000000", "-1"):
            _assert_refused(command(*arguments, f"--config.sample.seed={seed}"), "seed")
    if mode == "eval":  # which reads checkpoints as --mode=sample does
        assert _contents(copy_of_trained) == before
        return
    stored = json.loads((copy_of_trained / "config.json").read_text())
    stored["model"]["width"] = 32
    (copy_of_trained / "config.json").write_text(json.dumps(stored))
    refused = command(*arguments, "--config.model.width=32")
    _assert_refused(refused, "another model", "checkpoint")
    assert _contents(copy_of_trained) == before


def test_workdir_that_is_damaged(command, copy_of_trained):
    checkpoints = copy_of_trained / "checkpoints"
    for checkpoint in checkpoints.iterdir():
        checkpoint.rename(copy_of_trained / f"elsewhere_{checkpoint.name}")
    arguments = (DIGITS, "--mode=sample", f"--workdir={copy_of_trained}", *TINY)
    _assert_refused(command(*arguments), "no checkpoint")
    arguments = (DIGITS, f"--workdir={copy_of_trained}", *TINY)
    checkpoints.rmdir()
    checkpoints.write_text("")
    _assert_refused(command(*arguments), "checkpoints")
    (copy_of_trained / "config.json").write_text("{")
    _assert_refused(command(*arguments), "config.json")


def test_a_misspelt_config_is_told_without_importing_jax():
    code = (
        "import sys; from mf_jax.main import main; sys.argv[1:] = ['--config=configs/digit.py']\n"
        "code = main(); sys.exit(9 if 'jax' in sys.modules else code)"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    _assert_refused((result.returncode, "", result.stderr), "mf_jax: --config=configs/digit.py")
    assert result.stdout == ""


def test_help_names_modes(command):
    code, out, _ = command("--help")
    assert code == 0
    assert all(f"\n  {mode} " in out for mode in MODES)
    assert "configs/digits.py  MeanFlow on the 1,797" in out
    assert "shortcut, terminal_velocity" in out


def test_config_is_printed_with_what_differs_marked(command):
    code, out, _ = command(
        "--config=configs/digits.py:shortcut", "--mode=config", "--config.seed=3"
    )
    assert code == 0
    lines = out.splitlines()
    assert "* seed = 3  (default 0)" in lines
    assert "* times.name = 'dyadic'  (default 'logit_normal')" in lines
    assert "  optim.b1 = 0.9" in lines


def test_workdir_and_mode_have_defaults(monkeypatch):
    for config, workdir in (
        (DIGITS, "runs/digits"),
        ("--config=configs/imagenet.py:imf_xl2", "runs/imagenet_imf_xl2"),
    ):
        arguments = ["mf_jax", config, "--config.optim.lr=0.5"]
        arguments += ["--config.sample.labels=3,3,7", "--config.eval.steps=(4,)"]
        monkeypatch.setattr(sys, "argv", arguments)
        config, mode, folder = parse(arguments)
        assert (mode, folder) == ("train", Path(workdir))
        assert (config.optim.lr, config.sample.labels, config.eval.steps) == (0.5, (3, 3, 7), (4,))


def test_the_last_of_several_settings_of_a_key_counts():
    """Not all of them, as the parser of tuples would have it."""
    first, *kept = ["--config.eval.steps=1,", "--mode=eval", "--config.seed=1"]
    kept = ["x", *kept, "--config.eval.steps=2,4"]
    assert last_of_each(["x", first, *kept[1:]]) == kept
