"""--mode=prepare: the pictures that it finds, writes and refuses, however the work is split."""

import hashlib
import io
import json
import os
import re
import subprocess
import sys
import tarfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ROOT
from jobs import Job
from PIL import Image
from recorded import FOLDER
from test_data import write_tfds

from mf_jax import prepare
from mf_jax.data.crop import adm_crop
from mf_jax.data.latents import Latents
from mf_jax.data.picture_list import digest, list_pictures
from mf_jax.errors import BadInput
from mf_jax.flow.records import NO_LABEL
from mf_jax.metrics.inception import Inception
from mf_jax.metrics.reference_file import read_reference
from mf_jax.models.autoencoder import load_autoencoder
from mf_jax.prepare import latent_shards, statistics, stream

VAE = FOLDER / "vae"
SIZE = 16
CLASSES = {"n02": 3, "n01": 5, "n10": 4}
NAMES = sorted(f"{name}/{name}_{i}.JPEG" for name, count in CLASSES.items() for i in range(count))
SHARDS = 3
TOGETHER = (
    "--config=configs/digits.py",
    "--mode=prepare",
    f"--config.prepare.shards={SHARDS}",
    "--config.prepare.batch_size=2",
    f"--config.data.image_size={SIZE}",
    f"--config.data.autoencoder={VAE}",
    "--config.log.progress=False",
)


def picture(name):
    """Return noise that depends on a name, as its size does; the third of a class is grey."""
    rng = np.random.default_rng(list(name.encode()))
    height, width = rng.integers(SIZE, 5 * SIZE, 2)
    noise = Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))
    return noise.convert("L").convert("RGB") if is_grey(name) else noise


def is_grey(name):
    return name.endswith("_2.JPEG")


def encoded(name):
    content = io.BytesIO()
    stored = picture(name).convert("L" if is_grey(name) else "RGB")
    stored.save(content, "PNG")  # a decoder looks at the content, not at the name
    return content.getvalue()


CONTENTS = {name: encoded(name) for name in NAMES}


def write_tree(folder, names=NAMES):
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(CONTENTS[name])
    return folder


def write_tar(path, contents):
    with tarfile.open(path, "w") as tar:
        for name, content in contents.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def class_tars(folder):
    """Write one tar file a class, in no order, as they lie in ImageNet's."""
    for name in CLASSES:
        inside = {Path(n).name: CONTENTS[n] for n in reversed(NAMES) if n.startswith(name)}
        write_tar(folder / f"{name}.tar", inside)
    return folder


def tar_of_tars(folder):
    (folder / "inside").mkdir()
    tars = {path.name: path.read_bytes() for path in class_tars(folder / "inside").iterdir()}
    return write_tar(folder / "ILSVRC2012_img_train.tar", dict(sorted(tars.items(), reverse=True)))


INPUTS = {
    "class folders": lambda folder: write_tree(folder),
    "train above them": lambda folder: write_tree(folder / "train").parent,
    "tar files of classes": class_tars,
    "a tar file of tar files": tar_of_tars,
    "a tar file of folders": lambda folder: write_tar(
        folder / "some.tar", {f"train/{name}": CONTENTS[name] for name in reversed(NAMES)}
    ),
}


def listed(path):
    return list_pictures(str(path), key="input", tfds_split="train")


@pytest.fixture
def tree(tmp_path):
    return write_tree(tmp_path / "pictures")


@pytest.fixture
def prepared(command, tree, tmp_path):
    """Return a function that runs --mode=prepare into a folder: (exit code, stdout, stderr)."""

    def run(folder, *arguments, index=0, count=0, **more):
        return command(
            *TOGETHER,
            f"--config.prepare.input={tree}",
            f"--config.data.path={tmp_path / folder}",
            f"--config.prepare.process_index={index}",
            f"--config.prepare.process_count={count}",
            *(f"--config.{key}={value}" for key, value in more.items()),
            *arguments,
        )

    return run


def files(folder):
    """Return a digest of every file in a folder, hidden ones included."""
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


def open_latents(folder):
    settings = {"latent_mean": (0.0,), "latent_std": (1.0,), "copy_to": "", "split": "train"}
    return Latents(path=str(folder), image_size=SIZE, autoencoder=str(VAE), **settings)


# --- the input ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", INPUTS)
def test_every_kind_of_input_gives_the_same_pictures_in_the_same_order(tmp_path, kind):
    pictures = listed(INPUTS[kind](tmp_path))
    assert pictures.class_names == tuple(sorted(CLASSES))
    names = [pictures.name(i) for i in range(len(pictures))]
    assert [name.removeprefix("train/") for name in names] == NAMES
    for i, name in enumerate(NAMES):
        assert pictures.read(i) == (CONTENTS[name], sorted(CLASSES).index(name[:3]))


def test_a_class_called_train_is_a_class(tmp_path):
    for name in ("car", "train"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.jpg").write_bytes(b"")
    assert listed(tmp_path).class_names == ("car", "train")


def test_a_flat_folder_and_a_flat_tar_file_have_no_classes(tmp_path):
    contents = {"b.png": CONTENTS[NAMES[1]], "a.jpg": CONTENTS[NAMES[0]], "c.txt": b""}
    write_tar(tmp_path / "flat.tar", contents)
    (tmp_path / "flat").mkdir()
    for name, content in contents.items():
        (tmp_path / "flat" / name).write_bytes(content)
    for path in ("flat.tar", "flat"):
        pictures = listed(tmp_path / path)
        assert (len(pictures), pictures.class_names, pictures.name(0)) == (2, (), "a.jpg")
        assert pictures.read(1) == (contents["b.png"], NO_LABEL)


DIGEST = "34ef6547febf2a4c4d1c8b8bf692d673a09bb1a698f727768e64063007cc10d1"
"""Of these names, by an earlier version: its half-finished folders are continued."""


def test_the_order_is_that_of_names_and_the_digest_tells_lists_apart(tree, monkeypatch):
    digests = [digest(listed(tree))]
    with monkeypatch.context() as patch:
        patch.setattr(os, "listdir", lambda path, f=os.listdir: sorted(f(path), reverse=True))
        found = listed(tree)
    assert [found.name(i) for i in range(len(found))] == NAMES
    assert digest(found) == digests[0] == DIGEST
    for old, new in ((NAMES[0], "n01/other.JPEG"), ("n02", "n03")):
        (tree / old).rename(tree / new)
        digests.append(digest(listed(tree)))
    assert len(set(digests)) == 3


def test_a_tfds_set_is_read_as_it_is_stored(tmp_path, monkeypatch):
    examples = [(CONTENTS[NAMES[0]], 1), (CONTENTS[NAMES[1]], 0)]
    write_tfds(tmp_path, examples, 3)
    monkeypatch.setattr("tensorflow_datasets.core.constants.DATA_DIR", str(tmp_path))
    pictures = listed("tfds:tiny")
    assert (pictures.class_names, pictures.name(1)) == (("cat", "dog"), "train[1]")
    assert [pictures.read(i) for i in range(len(pictures))] == examples
    with pytest.raises(BadInput, match="dataset='tiny' split 'test'"):
        list_pictures("tfds:tiny", key="input", tfds_split="test")


def test_inputs_that_are_none_are_refused(tmp_path):
    tree, tars = write_tree(tmp_path / "a" / "pictures"), tmp_path / "tars"
    for folder in (tars / "empty", tars / "inside"):
        folder.mkdir(parents=True)
    whole = tar_of_tars(tars / "inside").read_bytes()
    (tars / "cut.tar").write_bytes(whole[:-20_000])
    (tars / "damaged.tar").write_bytes(b"nothing" * 1000)
    (tars / "a.zip").write_bytes(b"")
    write_tar(tars / "text.tar", {"n01/readme.txt": b""})
    write_tar(tars / "nested.tar", {"n01.tar": (tars / "text.tar").read_bytes()})
    write_tar(tars / "mixed.tar", {"n01/a.png": b"", "b.png": b""})
    for path, message in (
        ("", "input='' is not set"),
        (tmp_path / "nowhere", "does not exist"),
        (tmp_path / "a", r"pictures holds no pictures.*only folders \(n01, n02, n10\)"),
        (tars / "empty", "holds no pictures; must hold either class folders"),
        (tars / "a.zip", "is a file but no .tar"),
        (tars / "damaged.tar", "damaged.tar is cut short, or no uncompressed tar file"),
        (tars / "cut.tar", "is cut short"),
        (tars / "text.tar", "text.tar holds no pictures"),
        (tars / "nested.tar", "nested.tar:n01.tar holds no pictures"),
        (tars / "mixed.tar", "both directly and in folders"),
    ):
        with pytest.raises(BadInput, match=message) as error:
            listed(path)
        assert "\n" not in str(error.value)
    (tree / "n05").mkdir()
    with pytest.raises(BadInput, match=r"n05 holds no pictures.*a class must have one"):
        listed(tree)
    (tree / "a.png").write_bytes(b"")
    with pytest.raises(BadInput, match=r"holds pictures \(a.png\) and folders \(n01, n02, n10\)"):
        listed(tree)


# --- what is written ------------------------------------------------------------------------------


def test_latents_are_those_of_the_cropped_pictures_and_of_their_mirror_images(
    prepared, tree, tmp_path
):
    code, told, _ = prepared("latents")
    assert code == 0
    assert f"{len(NAMES)} pictures in {SHARDS} shards, 0 skipped" in told
    latents, autoencoder = open_latents(tmp_path / "latents"), load_autoencoder(VAE)
    assert (len(latents), latents.spec.shape) == (len(NAMES), (SIZE // 4, SIZE // 4, 4))
    stored = latents.gather(np.arange(2 * len(NAMES)))
    images = np.stack([adm_crop(picture(name), SIZE) for name in NAMES])
    both = np.concatenate([images, images[:, :, ::-1]]).astype(np.float32) / 127.5 - 1
    expected = np.stack(autoencoder.encode(jnp.asarray(both)), axis=1)
    np.testing.assert_allclose(stored.x, expected, rtol=2e-3, atol=2e-3)
    assert np.abs(expected[: len(NAMES)] - expected[len(NAMES) :]).max() > 0.1
    np.testing.assert_array_equal(
        stored.labels, [sorted(CLASSES).index(name[:3]) for name in NAMES] * 2
    )


def test_the_manifest_says_what_the_latents_are(prepared, tmp_path):
    prepared("latents")
    manifest = json.loads((tmp_path / "latents" / "manifest.json").read_text())
    assert manifest["image_size"] == SIZE
    assert manifest["crop"] == "adm"
    assert manifest["mirrors"] is True
    sha256 = hashlib.sha256((VAE / "diffusion_pytorch_model.safetensors").read_bytes()).hexdigest()
    assert manifest["autoencoder"] == {
        "name": str(VAE),
        "sha256": sha256,
        "scaling_factor": 0.18215,
    }
    assert manifest["classes"] == [
        {"name": name, "count": CLASSES[name]} for name in sorted(CLASSES)
    ]
    assert (
        sum(shard["count"] for shard in manifest["shards"])
        == manifest["num_pictures"]
        == len(NAMES)
    )
    assert manifest["skipped"] == []


def test_any_number_of_processes_writes_the_same_files(prepared, tmp_path):
    prepared("alone")
    alone = files(tmp_path / "alone")
    assert len(alone) == 2 * SHARDS + 2
    for count in (2, 3):
        for index in reversed(range(count)):
            code, told, _ = prepared(f"by {count}", index=index, count=count)
            assert code == 0
            assert ("manifest" in told) == (
                index > 0
            )  # the first process comes last, and finds all shards there
        assert files(tmp_path / f"by {count}") == alone


def test_the_processes_of_a_jax_job_share_the_work(prepared, tree, tmp_path):
    prepared("alone")
    arguments = [
        *TOGETHER,
        f"--config.prepare.input={tree}",
        f"--config.data.path={tmp_path / 'job'}",
    ]
    first, second = Job(2, *arguments).finish()
    assert (first.code, second.code) == (0, 0), (first, second)
    assert f"12 pictures in {SHARDS} shards" in first.output  # it has waited for the other
    assert files(tmp_path / "job") == files(tmp_path / "alone")


def test_a_bucket_gets_the_same_files(prepared, tmp_path, monkeypatch):
    prepared("alone")
    monkeypatch.setattr("mf_jax.runtime.files.in_bucket", lambda path: True)
    assert prepared("bucket")[0] == 0
    assert files(tmp_path / "bucket") == files(tmp_path / "alone")


def test_what_is_done_is_not_done_again_and_what_is_missing_or_cut_short_is(
    prepared, tmp_path, monkeypatch
):
    prepared("latents")
    folder = tmp_path / "latents"
    done = files(folder)
    first, second = sorted(folder.glob("*.array_record"))[:2]
    begun = []
    begin = prepare.LatentShards.begin
    monkeypatch.setattr(
        prepare.LatentShards, "begin", lambda s, i: (begun.append(i), begin(s, i))[1]
    )
    assert prepared("latents")[0] == 0
    assert begun == []
    first.unlink()
    second.write_bytes(second.read_bytes()[:-1])
    assert prepared("latents")[0] == 0
    assert begun == [0, 1]
    assert files(folder) == done


def test_a_killed_process_continues_with_the_same_bytes(prepared, tree, tmp_path):
    prepared("undisturbed")
    program = """
import os, signal, sys
from mf_jax.main import main
from mf_jax.prepare.latent_shards import LatentShards
add, calls = LatentShards.add, []
def until_the_second_shard(*arguments):
    add(*arguments)
    calls.append(1)
    if len(calls) == 4:
        os.kill(os.getpid(), signal.SIGKILL)
LatentShards.add = until_the_second_shard
sys.exit(main())
"""
    places = f"--config.prepare.input={tree}", f"--config.data.path={tmp_path / 'killed'}"
    process = subprocess.run(
        [sys.executable, "-c", program, *TOGETHER, *places], cwd=ROOT, capture_output=True
    )
    assert process.returncode == -9, process.stderr
    left = files(tmp_path / "killed")
    assert sum(name.endswith(".array_record") for name in left) == 1
    assert any(name.endswith(".part") for name in left)
    assert prepared("killed")[0] == 0
    whole = {name: made for name, made in files(tmp_path / "killed").items() if name[0] != "."}
    assert whole == files(tmp_path / "undisturbed")


# --- broken pictures ------------------------------------------------------------------------------


def test_broken_pictures_are_counted_named_and_skipped(prepared, tree, tmp_path, caplog):
    broken = [NAMES[0], NAMES[6]]
    (tree / broken[0]).write_bytes(CONTENTS[broken[0]][:-300])
    (tree / broken[1]).write_bytes(b"no picture")
    with caplog.at_level("WARNING"):
        code, told, _ = prepared("latents")
    assert code == 0
    assert "2 skipped" in told
    assert all(name in caplog.text for name in broken)
    manifest = json.loads((tmp_path / "latents" / "manifest.json").read_text())
    assert manifest["skipped"] == broken
    latents, good = (
        open_latents(tmp_path / "latents"),
        [name for name in NAMES if name not in broken],
    )
    labels = latents.gather(np.arange(len(latents))).labels
    np.testing.assert_array_equal(labels, [sorted(CLASSES).index(name[:3]) for name in good])
    assert manifest["classes"][0] == {"name": "n01", "count": CLASSES["n01"] - 1}
    assert manifest["num_pictures"] == len(good)


def test_too_many_broken_pictures_stop_a_process_even_over_restarts(prepared, tree, tmp_path):
    for name in (NAMES[0], NAMES[4], NAMES[11]):
        (tree / name).write_bytes(b"no picture")
    for _ in range(2):  # the second time the first shard is there already
        code, _, told = prepared("latents", **{"prepare.max_bad": 2})
        assert code == 2
        assert told.startswith("mf_jax: prepare.max_bad=2: 3 pictures are broken")
        assert told.count("\n") == 1
        assert all(name in told for name in (NAMES[0], NAMES[4], NAMES[11]))
    assert (tmp_path / "latents" / "latents-00000-of-00003.array_record").exists()
    assert prepared("latents", **{"prepare.max_bad": 3})[0] == 0


def test_a_picture_that_cannot_be_opened_is_not_taken_for_a_broken_one(prepared, tree, monkeypatch):
    read = listed(tree).read

    def fail_once(self, index):
        if index == 5:
            raise OSError("connection lost")
        return read(index)

    monkeypatch.setattr("mf_jax.data.picture_list.Listed.read", fail_once)
    code, _, told = prepared("latents")
    assert code == 2
    assert f"{NAMES[5]} cannot be opened (connection lost)" in told
    monkeypatch.undo()
    assert prepared("latents")[0] == 0


def test_a_full_disk_is_one_line_and_the_next_run_continues(prepared, tmp_path, monkeypatch):
    class Full(latent_shards.ArrayRecordWriter):
        def close(self):
            raise RuntimeError("write() failed:\nNo space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(latent_shards, "ArrayRecordWriter", Full)
        code, _, told = prepared("latents")
    assert code == 2
    assert "No space left on device" in told
    assert told.count("\n") == 1
    assert prepared("latents")[0] == 0
    assert not list((tmp_path / "latents").glob(".*.part"))


# --- bad settings ---------------------------------------------------------------------------------


def test_bad_settings_are_refused_in_one_line_before_anything_is_written(prepared, tmp_path):
    for changes, message in (
        ({"prepare.input": ""}, "prepare.input='' is not set"),
        ({"prepare.input": "/nowhere"}, "prepare.input='/nowhere' does not exist"),
        ({"prepare.shards": 0}, "prepare.shards=0: must be at least 1"),
        ({"prepare.shards": 13}, "prepare.shards=13: the input has 12 pictures"),
        ({"prepare.batch_size": 0}, "prepare.batch_size=0"),
        ({"prepare.max_bad": -1}, "prepare.max_bad=-1"),
        ({"prepare.latents": False}, "nothing to make"),
        ({"prepare.process_index": 2, "prepare.process_count": 2}, "prepare.process_index=2"),
        ({"prepare.process_index": 1}, "prepare.process_index=1"),
        ({"prepare.process_count": 4}, "prepare.process_count=4: must be at most prepare.shards=3"),
        ({"data.image_size": 18}, "data.image_size=18: .*try 16"),
        ({"data.path": ""}, "data.path='' is not set"),
        ({"data.path": "/proc/nowhere"}, "data.path='/proc/nowhere' cannot be written"),
        ({"data.autoencoder": "sd-vae"}, "data.autoencoder='sd-vae'"),
        (
            {"prepare.reference": "statistics.txt"},
            "prepare.reference='statistics.txt': must end in .npz",
        ),
    ):
        code, _, told = prepared("latents", **changes)
        assert (code, told.count("\n")) == (2, 1)
        assert re.search(message, told), told
        assert not list((tmp_path / "latents").glob("latents*"))


def test_a_folder_of_other_settings_or_other_files_is_refused(prepared, tree, tmp_path):
    prepared("latents")
    before = files(tmp_path / "latents")
    for changes, message in (
        ({"data.image_size": 32}, "image_size 16 -> 32"),
        ({"prepare.shards": 2}, "num_shards 3 -> 2"),
    ):
        code, _, told = prepared("latents", **changes)
        assert code == 2
        assert message in told
    (tree / "n01" / "one_more.png").write_bytes(CONTENTS[NAMES[0]])
    code, _, told = prepared("latents")
    assert code == 2
    assert "num_listed 12 -> 13" in told
    assert files(tmp_path / "latents") == before
    code, _, told = prepared("pictures")
    assert code == 2
    assert "holds other files" in told


def test_training_on_latents_that_are_not_finished_says_how_many_shards_are_there(
    prepared, command, tmp_path
):
    prepared("latents", index=1, count=2)
    code, _, told = command(
        "--config=configs/digits.py",
        f"--workdir={tmp_path / 'run'}",
        "--config.data.name=latents",
        f"--config.data.path={tmp_path / 'latents'}",
    )
    assert code == 2
    assert "is not finished: 1 of 3 shards are there" in told


# --- reference statistics -------------------------------------------------------------------------


@pytest.fixture
def features(monkeypatch):
    """Replace Inception's features by two small ones, and return the function that gives them."""

    def compute(params, images):
        rows = images.reshape(len(images), -1).astype(np.float32)
        return {"2048": rows[:, :5] / 255, "spatial": rows[:, 40:43] / 255}

    monkeypatch.setattr(prepare, "find_weights", lambda name, *_, **__: name)
    monkeypatch.setattr(prepare, "load_inception", lambda path: Inception({}, "0123"))
    monkeypatch.setattr(prepare, "verify", lambda *_: None)
    monkeypatch.setattr(statistics, "inception_features", jax.jit(compute))
    monkeypatch.setattr(statistics, "FEATURES", {"2048": 5, "spatial": 3})
    return compute


def expected_statistics(features, names=NAMES):
    found = features({}, np.stack([adm_crop(picture(name), SIZE) for name in names]))
    rows = {name: np.asarray(values, np.float64) for name, values in found.items()}
    return {
        "num_images": len(names),
        "mu": rows["2048"].mean(axis=0),
        "sigma": np.cov(rows["2048"], rowvar=False),
        "mu_s": rows["spatial"].mean(axis=0),
        "sigma_s": np.cov(rows["spatial"], rowvar=False),
    }, rows["2048"]


def only_reference(path):
    return {"prepare.latents": False, "prepare.reference": path}


def assert_statistics(path, expected):
    with np.load(path) as found:
        for name, value in expected.items():
            np.testing.assert_allclose(found[name], value, atol=1e-7)
        assert found["mu"].dtype == found["sigma_s"].dtype == np.float64


def test_reference_statistics_are_those_of_the_cropped_pictures(
    prepared, features, tree, tmp_path, monkeypatch
):
    monkeypatch.setattr(statistics, "KEPT_FEATURES", 5)
    (tree / NAMES[4]).write_bytes(b"no picture")  # the third of the kept ones, 0, 2, 4, 7 and 9
    path = tmp_path / "reference.npz"
    code, told, _ = prepared("none", **only_reference(path))
    assert code == 0
    assert "statistics of 11 pictures" in told
    expected, rows = expected_statistics(features, [name for name in NAMES if name != NAMES[4]])
    assert_statistics(path, expected)
    with np.load(path) as found:
        np.testing.assert_allclose(found["features"], rows[[0, 2, 6, 8]], atol=1e-6)
    assert not (tmp_path / "none").exists()


def test_a_reference_holds_pictures_for_evaluators_that_compute_features(
    prepared, features, tree, tmp_path, monkeypatch
):
    """Those of the features that are kept, of all processes, as ADM reads them."""
    monkeypatch.setattr(statistics, "KEPT_FEATURES", 5)
    (tree / NAMES[4]).write_bytes(b"no picture")  # of the kept ones, 0, 2, 4, 7 and 9
    path, more = tmp_path / "reference.npz", {"prepare.reference_pictures": True}
    for index in (1, 0):
        code, _, told = prepared("none", index=index, count=2, **only_reference(path), **more)
        assert code == 0, told
    with np.load(path) as found:
        stored = found["arr_0"]
        rows = features({}, stored)["2048"]
        np.testing.assert_allclose(found["features"], rows, atol=1e-6)
    assert stored.dtype == np.uint8
    np.testing.assert_array_equal(stored, [adm_crop(picture(NAMES[i]), SIZE) for i in (0, 2, 7, 9)])
    assert read_reference(path).num_pictures == 4


def test_memory_that_is_short_is_no_broken_picture(prepared, tree, tmp_path, monkeypatch):
    """The same command makes the shards of an undisturbed run afterwards."""
    prepared("undisturbed")

    def fail(*_):
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(stream, "adm_crop", fail)
        code, _, told = prepared("latents")
        assert code == 2
        assert "no memory to decode n01/n01_0.JPEG" in told
    assert prepared("latents")[0] == 0
    assert files(tmp_path / "latents") == files(tmp_path / "undisturbed")


def test_latents_and_statistics_come_from_one_pass_over_any_number_of_processes(
    prepared, features, tmp_path, monkeypatch
):
    expected, rows = expected_statistics(features)
    path = tmp_path / "reference.npz"
    prepared("latents alone")
    for index in (1, 0):
        code, told, _ = prepared("latents", index=index, count=2, **{"prepare.reference": path})
        assert code == 0
        assert path.exists() == (index == 0)
        assert ("1 of 3 shards are in the sums" in told) == (index == 1)
    assert files(tmp_path / "latents") == files(tmp_path / "latents alone")
    assert_statistics(path, expected)
    with np.load(path) as found:
        np.testing.assert_allclose(found["features"], rows, atol=1e-6)


def test_statistics_continue_after_a_stop_with_the_same_bytes(
    prepared, features, tmp_path, monkeypatch
):
    path, stopped = tmp_path / "undisturbed.npz", tmp_path / "stopped.npz"
    prepared("none", **only_reference(path))
    add, calls = statistics.ReferenceStatistics.add, []

    def stop(self, pixels, images):
        if len(calls) == 3:  # in the second shard
            raise BadInput("stopped")
        calls.append(1)
        add(self, pixels, images)

    with monkeypatch.context() as patch:
        patch.setattr(statistics.ReferenceStatistics, "add", stop)
        assert prepared("none", **only_reference(stopped))[0] == 2
    assert not stopped.exists()
    with monkeypatch.context() as patch:
        patch.setattr(
            statistics.ReferenceStatistics,
            "begin",
            lambda self, shard: calls.append(f"shard {shard}"),
        )
        assert prepared("none", **only_reference(stopped))[0] == 0
    assert calls[3:] == ["shard 1", "shard 2"]
    assert stopped.read_bytes() == path.read_bytes()


def test_too_many_broken_pictures_stop_statistics_even_over_restarts(
    prepared, features, tree, tmp_path
):
    for name in (NAMES[0], NAMES[11]):
        (tree / name).write_bytes(b"no picture")
    for _ in range(2):  # the second time the first two shards are in the sums already
        code, _, told = prepared(
            "none", **only_reference(tmp_path / "a.npz"), **{"prepare.max_bad": 1}
        )
        assert code == 2
        assert "prepare.max_bad=1: 2 pictures are broken" in told


def test_a_file_of_statistics_is_not_written_over(prepared, features, tmp_path):
    path = tmp_path / "reference.npz"
    path.write_bytes(b"")
    code, _, told = prepared("none", **only_reference(path))
    assert code == 2
    assert "exists; must be new" in told
    assert path.read_bytes() == b""


def test_damaged_sums_are_named(prepared, features, tmp_path):
    path = tmp_path / "reference.npz"
    prepared("none", index=0, count=2, **only_reference(path))
    (sums,) = (tmp_path / "reference.npz.parts").glob("sums*")
    sums.write_bytes(sums.read_bytes()[:200])
    code, _, told = prepared("none", index=1, count=2, **only_reference(path))
    assert code == 2
    assert f"{sums} is no file of sums" in told


# --- progress -------------------------------------------------------------------------------------


def test_without_a_terminal_a_line_says_how_far_it_is(prepared, tree):
    (tree / NAMES[0]).write_bytes(b"no picture")
    _, told, _ = prepared("latents", "--config.log.progress=True")
    lines = [line for line in told.splitlines() if "images/s" in line]
    assert len(lines) == 1
    assert "shard 2 of 3" in lines[0]
    assert "12/12 (100%)" in lines[0]
    assert "0:00:00 left" in lines[0]
