"""Bad input: one line on stderr, exit code 2, nothing lost; and what a command line means."""

import json
import sys
from pathlib import Path

from conftest import ROOT, TINY, refuses
from etils import epath
from jobs import assert_refused, edit, here, keys, works

from configs import digits, imagenet
from mf_jax.arguments import MODES, parse
from mf_jax.data import make_source
from mf_jax.runtime import workdir as run_folder
from mf_jax.runtime.files import PATHS, locked
from mf_jax.validation.ranges import check_tuples, wrong_values

DIGITS, TOY = "--config=configs/digits.py", "--config=configs/toy2d.py"


REFUSED_BY_THE_PARSER = {
    # an override, and what its error must say
    "optim.lrr=1": ("has no key 'optim.lrr'", "did you mean optim.lr?"),
    "optm.lr=1": ("has no key 'optm.lr'", "did you mean optim.lr?"),
    "optim.lr=abc": ("optim.lr=abc: must be a number",),
    "seed=1.5": ("seed=1.5: must be a whole number",),
    "data.flip=2": ("data.flip=2: must be True or False",),
    "eval.steps=1, a": ("eval.steps=1, a: must be a tuple",),
    "data.path": ("data.path=True: must be a text",),
    "sample.labels=cat": ("sample.labels", "cat"),
    "ema.decays=": ("ema.decays",),
}
OUT_OF_RANGE = """
seed=-1 prepare.shards=0 prepare.batch_size=0 prepare.max_bad=-1 prepare.process_count=-1
data.image_size=0 data.class_order='size' model.depth=-1 model.head_depth=-1 model.r_blocks=-1
model.width=-1 model.num_heads=-1 model.bottleneck=-1 model.num_blocks=0 model.patch_size=0
model.channels=0 model.rank=0 model.channel_multipliers=(0,) model.attention_resolutions=(0,)
model.t_clip=1.0 model.dropout=1.0 model.dtype='float16' model.prediction='noise'
times.levels=0 train.num_steps=0
train.log_every_steps=0 optim.lr=0.0 optim.warmup_steps=10**9 optim.b1=1.0 optim.b2=-0.1
optim.momentum=1.0 optim.weight_decay=1e999 optim.clip_norm=-1.0 optim.name='moun'
optim.schedule='cosin' ema.decays=(0.9,0.9) ema.halflives_kimg=(0.0,) ema.rampup=-1.0
ema.every_steps=0 log.sample_every_steps=-1 checkpoint.every_steps=0 checkpoint.keep=0
job.start_timeout_seconds=0.0 job.heartbeat_timeout_seconds=0 job.stopped_exit_code=256
mesh.gather='blocks' sample.num=0 eval.num_samples=0
eval.labels='randon' eval.checkpoints=(-1,) eval.least_samples=-1 bench.repeats=-1 bench.dropped=-1
bench.tokens=(0,) bench.devices=0 bench.memory_gb=0.0
"""
OF_OTHER_TYPES = {
    "sample.labels=(1.5,)": "1.5 is not a class",
    "sample.times=(1.0,'a',0.0)": "'a' is not a number",
    "eval.steps=(1.5,)": "1.5 is not a whole number",
    "eval.references=(1,)": "1 is not a text",
    "eval.intervals=(0.4,0.6)": r"0.4 is not \(t_min, t_max\)",
}


def _digits(override):
    """Return a config with one key set, its checks left to the caller."""
    key, _, value = override.partition("=")
    config = digits.get_config()
    config.update_from_flattened_dict({key: eval(value)})
    return key, config


def test_every_key_with_a_range_is_checked_by_itself():
    for override in OUT_OF_RANGE.split():
        key, config = _digits(override)
        assert wrong_values(config)[0].startswith(f"{key}="), override
    for override, message in OF_OTHER_TYPES.items():
        key, config = _digits(override)
        refuses(f"^{key}: {message}", check_tuples, config)


ROUNDS = """
optim.lr=-1  optim.lr=-1.0: must be within (0, inf)
optim.warmup_steps=13  optim.warmup_steps=13: must be within [0, 12]
data.image_size=16  image_size
objective.name=mean_flow  did you mean meanflow?
times.name=normal  times.name='normal'
ema.halflives_kimg=(2.0,2.0)  ema.halflives_kimg=(2.0, 2.0): must be different
ema.decays=(1.0,) sample.steps=0

model.name=resnet  model.name='resnet': must be one of dit, in_context_dit, unet, mlp
objective.tangent=v12  tangent='v12'
sample.times=(0.0,1.0)  sample.times
sample.labels=(3,10)  10 is not a class
times.t_std=0.0 optim.lr=nan

model.name=mlp  use one of dit
sample.labels=(-1,)  -1
guidance.kappa=1.0 times.t_mean=nan

model.size=XXL  model.size='XXL'
eval.emas=('0.5',)  eval.emas='0.5'
draws.instant_share=1.5

model.time_conditioning=t  needs a network that is told r
objective.name=improved_meanflow  no second head
eval.omegas=(2.0,)  eval.omegas, eval.intervals: (2.0, 0.0, 1.0): this run's network
draws.label_drop_share=2.0

model.time_conditioning=r,t  time_conditioning='r,t'
model.prediction=velocity objective.name=pixel_meanflow  needs a network that predicts data
train.batch_size=7  train.batch_size=7: must be a multiple of 2

objective.name=flow_matching  flow_matching has no guidance
draws.omega_max=2.0  cannot be told guidance; use dit, in_context_dit, a dit
draws.label_drop_share=0.0  use draws.label_drop_share=0.1
sample.ema=0.5  sample.ema='0.5': this run has 0.9, none
eval.steps=(1,0)  eval.steps=0
guidance.omega=2.0 train.batch_size=0

model.depth=-1 train.microbatch=10  train.microbatch=10: must be a multiple of 2

objective.name=terminal_velocity model.attention=fused  model.attention='fused'
data.augment=edm  'dit': takes no augment_labels

controls.monotone=1.0 model.attention=fused  model.attention='fused'
times.r_std=inf

data.name=digit  must be one of digits, toy2d, image_folder, tfds
eval.steps=()  ()

data.name=image_folder data.path=picturs  data.path='picturs'

objective.name=split_meanflow times.name=consistency  'consistency': split_meanflow learns from
sample.steps=2  sample.renoise=False: this run's intervals
eval.steps=(2,)  eval.renoise=False: this run's intervals
weight.of_interval=1.0  weight.of_interval: split_meanflow learns
draws.instant_share=0.0  draws.instant_share=0.0: split_meanflow learns

velocity.target=0.5 data.flip=True velocity.source=data  velocity.source='data': needs unmoved

coupling.name=optimal_transport coupling.rows=7  coupling.rows=7: must divide the 16

model.dtype=bfloat16 objective.derivative=central  bfloat16 rounds differences away
guidance.omega=2.0 draws.label_drop_share=0.1 weight.of_interval=1.0  without label weigh 0
sample.labels=(-1,)  -1 is not a class; use 0 to 9, and -1, none, of runs with
coupling.name=optimal_transport data.augment=edm  noise must not tell how a picture was moved

objective.name=improved_meanflow objective.velocity=boundary times.name=consistency  no row trains u
draws.instant_share=0.0  with times.name=consistency

objective.name=shortcut guidance.omega=2.0 times.name=grid  times.name='grid': shortcut is guided

velocity.source=average velocity.target=1.0 velocity.ema=1.0  velocity.ema=1.0: a frozen teacher
"""
"""One command refuses a paragraph at once: overrides and, after two spaces, what its line must say.

Without words it must name the overrides as they are.
"""
ROUNDS_OF_TOY = """
guidance.kappa=0.5  no labels to guide by
sample.labels=(1,)  no classes
data.augment=edm  data.augment: only pictures that bring nothing
model.width=0  model.width=0: must be within [1, inf)
data.flip=True

data.toy=moons  two_moons
"""


def test_bad_keys_are_refused_together_before_anything_is_written(tmp_path):
    run = f"--workdir={tmp_path}/run"
    for override, words in REFUSED_BY_THE_PARSER.items():
        assert_refused(here(DIGITS, run, *TINY, f"--config.{override}"), *words)
    for config, rounds in ((DIGITS, ROUNDS), (TOY, ROUNDS_OF_TOY)):
        for lines in map(str.splitlines, rounds.strip().split("\n\n")):
            told = [line.partition("  ")[::2] for line in lines]
            bad = keys(" ".join(overrides for overrides, _ in told))
            words = [x for overrides, text in told for x in ([text] if text else overrides.split())]
            more = [] if config == TOY else keys("ema.decays=(0.9,)")
            assert_refused(here(config, run, *TINY, *more, *bad), *words)
    assert list(tmp_path.iterdir()) == []


REFUSED_IN_A_FILE = {
    # the end of a config file before `return config`, and what its error must say
    "config.optim.learning_rate = 3e-4": ("'learning_rate'", "there are name, lr"),
    "config.optm.lr = 1": ("'optm'", "did you mean optim?"),
    "config.update({'optim': {'lrr': 3}})": ("'lrr'", "did you mean lr?"),
    "config.train.num_steps = 1e5": ("line 5", "num_steps = 100000.0: must be a whole number"),
    "config.optim = ConfigDict({'lr': 3.0})": ("lacks optim.b1",),
    "return": ("NoneType", "return config"),
    "return {'seed': 3}": ("dict", "return config"),
    "return open('/nowhere/at_all')": ("No such file",),
}


def test_a_config_file_is_checked_as_the_command_line_is(tmp_path):
    path = tmp_path / "own.py"
    head = "from ml_collections import ConfigDict\nfrom configs.default import get_config as get\n"
    for body, words in REFUSED_IN_A_FILE.items():
        path.write_text(
            f"{head}def get_config():\n    config = get()\n    {body}\n    return config\n"
        )
        assert_refused(here(f"--config={path}"), *words)


def test_paths_are_expanded_or_refused_wherever_they_are_given(monkeypatch):
    """Before anything is read or written."""
    for key in (*(f"config.{key}" for key in PATHS), "workdir"):
        value = "('hdfs://a/b',)" if key == "config.eval.references" else "hdfs://a/b"
        refused = here(DIGITS, f"--{key}={value}")
        assert_refused(refused, f"{key.removeprefix('config.')}=hdfs://a/b", "gs://")
    assert_refused(here("--workdir=file:///x"), "--workdir=file:///x")
    assert_refused(here(DIGITS, "--workdir=s3://a/b[1]"), "--workdir=s3://a/b[1]", "* ? [ ]")
    monkeypatch.setenv("HOME", "/home/me")
    config, _, workdir = parse(["mf_jax", DIGITS, "--workdir=~/x", "--config.data.path=~/y/"])
    assert (str(workdir), config.data.path) == ("/home/me/x", "/home/me/y")


def test_a_run_needs_no_config(copy_of_trained):
    """Overrides apply to its own; whatever does not decide its numbers may change."""
    run = f"--workdir={copy_of_trained}"
    printed = works("--mode=config", run, "--config.sample.num=3").splitlines()
    assert {"* train.num_steps = 12  (default 10000)", "* sample.num = 3  (default 100)"} <= {
        *printed
    }
    assert_refused(here("--mode=sample", run, "--config.optim.lr=0.5"), "optim.lr", "init.path")
    assert_refused(here("--mode=sample", run, "--config.optm.lr=0.5"), "did you mean optim.lr?")
    assert_refused(here(run, "--config.train.num_steps=13"), "rates fall to 0 at")
    folder = epath.Path(copy_of_trained)
    config = run_folder.stored_config(folder)
    more = {"train.log_every_steps": 7, "log.progress": False, "data.path": "elsewhere"}
    more |= {"train.microbatch": 4}
    config.update_from_flattened_dict(more | {"model.remat": "block", "checkpoint.keep": 9})
    run_folder.check(folder, config)
    config.optim.schedule = "constant"
    changes = {"optim": {"schedule": "constant"}, "train": {"num_steps": 30}}
    edit(copy_of_trained / "config.json", **changes)
    for steps in (12, 20):
        config.train.num_steps = steps
        run_folder.check(folder, config)
    config.train.num_steps = 11
    refuses("12 steps are done", run_folder.check, folder, config)
    # below the first number of the default
    edit(copy_of_trained / "config.json", model={"channel_multipliers": [1, 3]})
    assert run_folder.stored_config(folder).model.channel_multipliers == (1, 3)
    edit(copy_of_trained / "config.json", model={"channel_multipliers": [2, 2, 2]})
    config.train.num_steps, config.velocity.source = 12, "batch"
    edit(copy_of_trained / "config.json", velocity={"source": "batch"})
    refuses(r"another config \(train.microbatch 0 -> 4\)", run_folder.check, folder, config)


def test_moved_data_are_known_by_their_digest_and_other_data_and_weights_noticed(copy_of_trained):
    folder = epath.Path(copy_of_trained)
    config = run_folder.stored_config(folder)
    config.data.path = "configs"
    data = make_source(config.data, split="train")
    stored = json.loads((copy_of_trained / "data.json").read_text())
    del stored["digest"], stored["checksum"]
    (copy_of_trained / "data.json").write_text(json.dumps(stored))
    data.digest = "a"  # none was stored before
    seen = "perceptual.lpips_weights"
    with run_folder.own(folder, config, data, {}, **{seen: "c"}):
        assert run_folder.stored_config(folder).data.path == str(ROOT / "configs")
    problem = f"began with {seen} of SHA-256 c, not d; restore"
    refuses(problem, run_folder.check_data, folder, data, **{seen: "d"})
    data.digest = "b"
    refuses(r"other data \(files\).*data\.path", run_folder.check_data, folder, data)


def test_sizes_that_no_machine_can_hold_are_refused_by_an_estimate(tmp_path):
    for line in (
        "sample sample.num=1000000000000",
        "sample sample.steps=1000000000",
        "train train.batch_size=1000000000 data.image_size=1000",
        "train model.depth=1000000 model.width=4096",
        "train train.num_steps=1000000000000000000",
        "eval eval.num_samples=1000000000000",
        "bench train.batch_size=1000000000 data.image_size=1000",
        "prepare prepare.batch_size=1000000000 data.image_size=1000",
    ):
        mode, named = line.split()[:2]
        flags = (f"--mode={mode}", f"--workdir={tmp_path}/run", *keys(line.removeprefix(mode)))
        word = "must be at most" if "num_steps" in named else "GB"
        assert_refused(here(DIGITS, *flags), named, word)
        assert not (tmp_path / "run").exists()


def test_bad_arguments(tmp_path):
    broken, empty = tmp_path / "broken.py", tmp_path / "pictures"
    broken.write_text("def get_config():\n    return 1 / 0\n")
    leaves = tmp_path / "leaves.py"
    leaves.write_text("raise SystemExit(3)\n")
    empty.mkdir()
    for arguments, *words in (
        ([], "--config is missing"),
        (["--config=configs/digit.py"], "configs/digit.py", "did you mean configs/digits.py?"),
        (["--config=elsewhere:row"], "--config=elsewhere: no such config", "imagenet_b2"),
        (["--config=nowhere/at_all.py:row"], "--config=nowhere/at_all.py: no such config"),
        (["--config=configs/imagenet.py:imf_xl"], "mean imf_xl2?", ", ".join(imagenet.ROWS)),
        (["--config=imagenet"], ", ".join(imagenet.ROWS)),
        (["--config=digits:imf"], "one of flow_matching, "),
        ([f"--config={broken}"], "division by zero"),
        ([f"--config={leaves}"], "the config file raises SystemExit"),
        ([DIGITS, "--mode=trian"], "trian", "did you mean train?"),
        ([f"--workdir={empty}"], str(empty), "holds no run", "--config"),
        ([DIGITS, "--wordir=x"], "wordir", "workdir"),
        ([DIGITS, "train"], "'train'", "--mode=train"),
        ([DIGITS, "--workdir"], "--workdir: needs a value"),
        ([DIGITS, "--workdir=/dev/null/run"], "/dev/null/run", "cannot be written"),
        ([DIGITS, "--mode=sample", "--workdir=/nowhere/run"], "/nowhere/run", "train first"),
    ):
        assert_refused(here(*arguments), *words)


def test_workdir_of_another_run_is_refused_and_stays_as_it_is(copy_of_trained):
    contents = lambda: sorted(path.name for path in copy_of_trained.rglob("*"))  # noqa: E731
    run, before = [DIGITS, f"--workdir={copy_of_trained}", *TINY], contents()
    for mode in ("train", "eval", "sample"):
        refused = here(*run, f"--mode={mode}", "--config.optim.lr=0.5")
        assert_refused(refused, "another config", "optim.lr", "0.5")
    for seed in ("5000000000", "-1"):
        assert_refused(here(*run, "--mode=sample", f"--config.sample.seed={seed}"), "seed")
    with locked(epath.Path(copy_of_trained) / ".lock", wait=False):
        assert_refused(here(*run), "another process is training")
    (copy_of_trained / ".lock").unlink()
    (copy_of_trained / ".lock").mkdir()
    assert_refused(here(*run), "cannot be written", "choose another")
    (copy_of_trained / ".lock").rmdir()
    data = copy_of_trained / "data.json"
    stored = data.read_text()
    data.write_text(json.dumps(json.loads(stored) | {"size": 1436, "checksum": None}))
    assert_refused(here(*run), "other data", "1436", "1437")
    assert json.loads(data.read_text())["size"] == 1436
    data.write_text(stored)
    edit(copy_of_trained / "config.json", model={"width": 32})
    for mode in ("train", "sample"):  # --mode=eval reads checkpoints as the second does
        refused = here(*run, f"--mode={mode}", "--config.model.width=32")
        assert_refused(refused, "another model", "checkpoint")
    assert contents() == before


def test_workdir_that_is_damaged(copy_of_trained):
    checkpoints, run = copy_of_trained / "checkpoints", f"--workdir={copy_of_trained}"
    checkpoints.rename(copy_of_trained / "elsewhere")
    checkpoints.mkdir()
    assert_refused(here(DIGITS, "--mode=sample", run, *TINY), "no checkpoint")
    checkpoints.rmdir()
    checkpoints.write_text("")
    assert_refused(here(DIGITS, run, *TINY), "checkpoints")
    (copy_of_trained / "config.json").write_text("{")
    assert_refused(here(DIGITS, run, *TINY), "config.json")


def test_help_names_modes():
    out = works("--help")
    assert all(f"\n  {mode} " in out for mode in MODES)
    assert "\n  digits  MeanFlow on the 1,797" in out
    assert "shortcut, terminal_velocity" in out


def test_a_config_is_printed_beside_a_folder_configs_of_the_caller(tmp_path, monkeypatch):
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "mine.py").write_text("SEED = 7\n")
    (tmp_path / "own.py").write_text(
        "from configs.digits import get_config as digits\n"
        "from configs.mine import SEED\n"
        "def get_config():\n"
        "    config = digits()\n"
        "    config.seed = SEED\n"
        "    return config\n"
    )
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    monkeypatch.delitem(sys.modules, "configs", raising=False)
    for config, line in (
        ("imagenet:xl2", "* model.size = 'XL'"),
        (tmp_path / "own.py", "* seed = 7  (default 0)"),
        ("configs/digits.py:shortcut", "* times.name = 'dyadic'  (default 'logit_normal')"),
    ):
        output = works(f"--config={config}", "--mode=config")
        assert [text for text in (line, "  optim.b1 = 0.9\n") if text not in output] == []


def test_workdir_and_mode_have_defaults_and_the_last_setting_of_a_key_counts():
    """With a space as with `=`, before the config or after it."""
    for flag, workdir in (
        (DIGITS, "runs/digits"),
        ("--config=configs/imagenet.py:imf_xl2", "runs/imagenet_imf_xl2"),
    ):
        config, mode, folder = parse(["mf_jax", "--config.data.flip", flag])
        assert (mode, folder, config.data.flip) == ("train", Path(workdir), True)
    text = "-config.eval.steps 1, --mode eval --config.sample.labels=3,'cat' --config.seed 7"
    more = "--noconfig.data.flip --config.optim.lr=0.5 --config.eval.steps=[2,4]"
    paths = "--config.eval.references=a.npz"
    config, mode, _ = parse(["mf_jax", flag, *f"{text} {more} {paths}".split()])
    assert (mode, config.data.flip, config.optim.lr, config.seed) == ("eval", False, 0.5, 7)
    assert (config.eval.steps, config.sample.labels) == ((2, 4), (3, "cat"))
    assert config.eval.references == ("a.npz",)
