"""ImageNet in small, from pictures to FID, by the command line: narrow networks, random weights.

Pictures -> latents and statistics -> 20 steps of a latent DiT -> FID of two checkpoints; and the
numbers depend neither on the size of a batch nor on the number of processes.
"""

import json
import shutil

import jax
import numpy as np
import pytest
from jobs import Job, assert_refused, here
from PIL import Image
from recorded import FOLDER, inception_weights
from safetensors.numpy import save_file

from mf_jax.metrics import inception
from mf_jax.metrics.inception import FEATURES

CLASSES = ("n01440764", "n02084071", "n03000134")
_KEYS = (
    "data.image_size=32 model.depth=1 model.width=32 model.num_heads=2 model.dtype=float32 "
    "model.scan=False model.remat=none train.batch_size=16 train.num_steps=20 "
    "train.log_every_steps=5 checkpoint.every_steps=10 log.sample_every_steps=0 log.progress=False "
    "eval.num_samples=18 eval.least_samples=18 eval.steps=1, eval.batch_size=8 prepare.shards=4 "
    "prepare.batch_size=8"
)
"""Pictures are scored as many at once as they are prepared: Inception is compiled once."""
SMALL = "--config=configs/imagenet_b2.py", *(f"--config.{key}" for key in _KEYS.split())
SMALL += (f"--config.data.autoencoder={FOLDER / 'vae'}",)

NARROWER = 16
PROGRAM = """
import os, sys, jax, pytest
# by the caller of main, which must then join
jax.distributed.initialize(num_processes=2, process_id=int(os.environ["JAX_PROCESS_ID"]))
sys.path.insert(0, "tests")
from mf_jax.main import main
from test_rehearsal import shrink_inception
shrink_inception(pytest.MonkeyPatch())
sys.exit(main())
"""


def shrink_inception(patch):
    """Give Inception fewer channels, and pictures of the smallest side that passes its pools."""
    branch, resized = inception._branch, inception._resized.__wrapped__

    def narrow(x, name, layers, **options):
        layers = tuple((num // NARROWER, size) for num, size in layers)
        return branch(x, name, layers, **options)

    patch.setattr(inception, "_branch", narrow)
    patch.setattr(inception, "_SIDE", 75)
    patch.setattr(inception, "_resized", jax.jit(lambda images: resized(images)))
    for name, width in FEATURES.items():
        patch.setitem(FEATURES, name, 3 * 3 * 7 if name == "spatial" else width // NARROWER)


def _draw_pictures(folder):
    """Write 40 pictures of each class: blobs of the class's own colour, of many sizes."""
    rng = np.random.default_rng(0)
    for label, name in enumerate(CLASSES):
        (folder / "train" / name).mkdir(parents=True)
        for i in range(40):
            size = rng.integers(40, 90, 2).tolist()
            coarse = rng.uniform(0, 120, (5, 5, 3))
            coarse[..., label] += 130
            picture = Image.fromarray(coarse.astype(np.uint8)).resize(size, Image.BICUBIC)
            picture.save(folder / "train" / name / f"{name}_{i}.JPEG", quality=95)


def _rows(workdir):
    return [json.loads(line) for line in (workdir / "eval.jsonl").read_text().splitlines()]


def _scores(row):
    return {key: value for key, value in row.items() if isinstance(value, float)}


@pytest.mark.slow
def test_from_pictures_to_fid(tmp_path, monkeypatch):
    shrink_inception(monkeypatch)
    latents, workdir, reference = tmp_path / "latents", tmp_path / "run", tmp_path / "reference.npz"
    _draw_pictures(tmp_path / "imagenet")
    save_file(inception_weights(divisor=NARROWER), tmp_path / "inception.safetensors")
    common = *SMALL, f"--config.data.path={latents}", f"--config.eval.references=('{reference}',)"
    common += (f"--config.eval.inception={tmp_path / 'inception.safetensors'}",)

    def start(*arguments):
        code, out, errors = here(*common, f"--workdir={workdir}", *arguments)
        assert code == 0, errors
        return out

    prepare = ("--mode=prepare", f"--config.prepare.input={tmp_path / 'imagenet'}")
    start(*prepare, f"--config.prepare.reference={reference}")
    assert json.loads((latents / "manifest.json").read_text())["num_pictures"] == 120
    assert np.load(reference)["num_images"] == 120

    start("--mode=train")
    assert (workdir / "real.png").stat().st_size > 1000  # latents are decoded
    told = start("--mode=eval", "--config.eval.checkpoints=10,20")
    first, second = _rows(workdir)
    assert [row["protocol"]["checkpoint"] for row in (first, second)] == [10, 20]
    assert first["fid"] != second["fid"]
    assert f"{second['fid']:.4g}" in told
    of_another_normalisation = ("--mode=eval", "--config.data.latent_std=2.0,")
    ended = here(*common, f"--workdir={workdir}", *of_another_normalisation)
    assert_refused(ended, "data.latent_std")
    assert _rows(workdir) == [first, second]

    other = tmp_path / "processes"
    shutil.copytree(workdir, other, ignore=shutil.ignore_patterns("eval.jsonl"))
    arguments = "--config.eval.batch_size=18", f"--workdir={other}", "--mode=eval"
    job = Job(2, *common, *arguments, program=("-c", PROGRAM))
    ended = job.finish()
    assert [process.code for process in ended] == [0, 0], ended
    (theirs,) = _rows(other)
    assert _scores(theirs) == pytest.approx(_scores(second), rel=1e-3, abs=1e-5)
