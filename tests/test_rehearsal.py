"""ImageNet in small, from pictures to FID, by the command line: the real networks with random weights.

300 pictures -> latents on two processes -> 20 steps of a latent DiT -> FID -> more steps -> FID again; and that the
numbers depend neither on the size of a batch nor on the number of processes.
"""

import json
import os
import shutil
import socket
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT
from PIL import Image
from recorded import FOLDER, inception_weights
from safetensors.numpy import save_file

CLASSES = ("n01440764", "n02084071", "n03000134")
SMALL = (
    "--config.data.image_size=32",
    f"--config.data.autoencoder={FOLDER / 'vae'}",
    "--config.model.depth=1",
    "--config.model.width=32",
    "--config.model.num_heads=2",
    "--config.model.dtype=float32",
    "--config.model.scan=False",
    "--config.model.remat=none",
    "--config.train.batch_size=16",
    "--config.train.log_every_steps=5",
    "--config.checkpoint.every_steps=10",
    "--config.eval.num_samples=18",
    "--config.eval.least_samples=18",
    "--config.eval.steps=1,",
    "--config.eval.batch_size=8",  # as pictures are prepared: what is compiled for Inception serves both
    "--config.log.progress=False",
)
IN_PROCESSES = """
import sys, jax
address, count, index = sys.argv.pop(1), int(sys.argv.pop(1)), int(sys.argv.pop(1))
jax.distributed.initialize(address, count, index)
from mf_jax.main import main
sys.exit(main())
"""


def _draw_pictures(folder, num):
    """Write some pictures of each class: blobs of the class's own colour, of many sizes."""
    rng = np.random.default_rng(0)
    for label, name in enumerate(CLASSES):
        (folder / "train" / name).mkdir(parents=True)
        for i in range(num):
            height, width = rng.integers(40, 90, 2)
            coarse = rng.uniform(0, 120, (5, 5, 3))
            coarse[..., label] += 130
            picture = Image.fromarray(coarse.astype(np.uint8)).resize(
                (int(width), int(height)), Image.BICUBIC
            )
            picture.save(folder / "train" / name / f"{name}_{i}.JPEG", quality=95)


class Rehearsal:
    """The command line, on the small data."""

    def __init__(self, folder):
        self.folder, self.latents, self.workdir = folder, folder / "latents", folder / "run"
        self.reference = folder / "reference.npz"
        self.common = (
            "--config=configs/imagenet_b2.py",
            *SMALL,
            f"--config.data.path={self.latents}",
            f"--config.eval.inception={folder / 'inception.safetensors'}",
            f"--config.eval.references=('{self.reference}',)",
        )

    def start(self, *arguments, workdir=None, script=()):
        command = [sys.executable, *(script or ["-m", "mf_jax.main"])]
        return subprocess.Popen(
            [*command, *self.common, f"--workdir={workdir or self.workdir}", *map(str, arguments)],
            cwd=ROOT,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def finish(self, *processes):
        outputs = [process.communicate(timeout=600) for process in processes]
        for process, (_, errors) in zip(processes, outputs, strict=True):
            assert process.returncode == 0, errors
        return [out for out, _ in outputs]

    def __call__(self, *arguments, **more):
        return self.finish(self.start(*arguments, **more))[0]

    def refused(self, *arguments):
        process = self.start(*arguments)
        _, errors = process.communicate(timeout=600)
        return process.returncode, errors

    def prepare(self, pictures, *arguments, count=2):
        arguments += (
            "--mode=prepare",
            f"--config.prepare.input={self.folder / pictures}",
            "--config.prepare.shards=4",
            "--config.prepare.batch_size=8",
            f"--config.prepare.process_count={count}",
        )
        all_of = (
            self.start(*arguments, f"--config.prepare.process_index={index}")
            for index in range(count)
        )
        return self.finish(*all_of)

    def rows(self, workdir=None):
        return [
            json.loads(line)
            for line in ((workdir or self.workdir) / "eval.jsonl").read_text().splitlines()
        ]


@pytest.fixture(scope="module")
def rehearsal(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rehearsal")
    _draw_pictures(folder / "imagenet", 100)
    _draw_pictures(folder / "few", 10)  # Inception takes a second for a few pictures
    save_file(inception_weights(), folder / "inception.safetensors")
    return Rehearsal(folder)


def _scores(row):
    return {key: value for key, value in row.items() if isinstance(value, float)}


def test_from_pictures_to_fid(rehearsal, tmp_path):
    rehearsal.prepare("imagenet")
    assert json.loads((rehearsal.latents / "manifest.json").read_text())["num_pictures"] == 300
    alone = ("--config.prepare.latents=False", f"--config.prepare.reference={rehearsal.reference}")
    rehearsal.prepare("few", *alone, count=1)  # two would compile Inception twice
    assert np.load(rehearsal.reference)["num_images"] == 30

    rehearsal("--mode=train", "--config.train.num_steps=10")
    rehearsal("--mode=eval", "--config.train.num_steps=10")
    rehearsal("--mode=train", "--config.train.num_steps=20")
    told = rehearsal("--mode=eval", "--config.train.num_steps=20")
    first, second = rehearsal.rows()
    assert [row["protocol"]["checkpoint"] for row in (first, second)] == [10, 20]
    assert first["fid"] != second["fid"]
    assert f"{second['fid']:.4g}" in told

    code, errors = rehearsal.refused(
        "--mode=eval", "--config.train.num_steps=20", "--config.data.latent_std=2.0,"
    )
    assert (code, errors.count("\n")) == (2, 1)
    assert "data.latent_std" in errors  # a checkpoint of another normalisation
    assert rehearsal.rows() == [first, second]

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    other = tmp_path / "processes"
    shutil.copytree(rehearsal.workdir, other)
    (other / "eval.jsonl").unlink()
    script = tmp_path / "in_processes.py"
    script.write_text(IN_PROCESSES)
    rehearsal.finish(
        *(
            rehearsal.start(
                "--mode=eval",
                "--config.train.num_steps=20",
                "--config.eval.batch_size=18",
                workdir=other,
                script=[str(script), address, "2", str(index)],
            )
            for index in range(2)
        )
    )
    assert _scores(rehearsal.rows(other)[0]) == pytest.approx(_scores(second), rel=1e-3, abs=1e-5)
