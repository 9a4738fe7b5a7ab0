"""--mode=prepare: what it writes, that this never depends on how, and what it refuses."""

import io
import json
import shutil
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jobs import assert_refused, here
from PIL import Image
from recorded import FOLDER
from test_latents import opened

from mf_jax import prepare
from mf_jax.data.crop import adm_crop
from mf_jax.flow.errors import BadInput
from mf_jax.metrics.inception import Inception
from mf_jax.metrics.reference_file import read_reference
from mf_jax.models.autoencoder import load_autoencoder
from mf_jax.prepare import latent_shards, statistics
from mf_jax.prepare.latent_shards import LatentShards

VAE = FOLDER / "vae"
SIZE = 16
CLASSES = {"n02": 3, "n01": 5, "n10": 4}
NAMES = sorted(f"{name}/{name}_{i}.JPEG" for name, count in CLASSES.items() for i in range(count))
SHARDS = 3
_KEYS = f"prepare.shards={SHARDS} prepare.batch_size=2 log.progress=False data.image_size={SIZE}"
TOGETHER = "--config=configs/digits.py", "--mode=prepare", f"--config.data.autoencoder={VAE}"
TOGETHER += tuple(f"--config.{key}" for key in _KEYS.split())


def picture(name):
    """Return noise that depends on a name, as its size does; the third of a class is grey."""
    rng = np.random.default_rng(list(name.encode()))
    height, width = rng.integers(SIZE, 5 * SIZE, 2)
    noise = Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))
    return noise.convert("L" if name.endswith("_2.JPEG") else "RGB")


def cropped(names):
    return np.stack([adm_crop(picture(name).convert("RGB"), SIZE) for name in names])


def encoded(name):
    content = io.BytesIO()
    picture(name).save(content, "PNG")  # a decoder looks at the content, not at the name
    return content.getvalue()


CONTENTS = {name: encoded(name) for name in NAMES}


def write_tree(folder, contents=CONTENTS):
    for name, content in contents.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


@pytest.fixture
def tree(tmp_path):
    return write_tree(tmp_path / "pictures")


@pytest.fixture
def prepared(tree, tmp_path):
    """Return a function that runs --mode=prepare into a folder: (exit code, stdout, stderr)."""

    def run(folder, index=0, count=0, **more):
        process = {"prepare.process_index": index, "prepare.process_count": count}
        return prepare_into(tmp_path / folder, tree, **process | more)

    return run


def prepare_into(folder, tree, **more):
    more = {"prepare.input": tree, "data.path": folder} | more
    return here(*TOGETHER, *(f"--config.{key}={value}" for key, value in more.items()))


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """Return latents of the pictures, made by one process without a stop; do not change them."""
    folder = tmp_path_factory.mktemp("done")
    tree = write_tree(folder / "pictures")
    ended = prepare_into(folder / "latents", tree)
    assert f"{len(NAMES)} pictures in {SHARDS} shards, 0 skipped" in ended.output, ended
    return folder / "latents"


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def open_latents(folder):
    return opened(folder, image_size=SIZE, autoencoder=str(VAE))


def test_latents_are_those_of_the_cropped_pictures_and_of_their_mirror_images(done):
    latents, autoencoder = open_latents(done), load_autoencoder(VAE)
    assert (len(latents), latents.spec.shape) == (len(NAMES), (SIZE // 4, SIZE // 4, 4))
    stored = latents.gather(np.arange(2 * len(NAMES)))
    images = cropped(NAMES)
    both = np.concatenate([images, images[:, :, ::-1]]).astype(np.float32) / 127.5 - 1
    expected = np.stack(autoencoder.encode(jnp.asarray(both)), axis=1)
    np.testing.assert_allclose(stored.x, expected, rtol=2e-3, atol=2e-3)
    assert np.abs(expected[: len(NAMES)] - expected[len(NAMES) :]).max() > 0.1
    labels = [sorted(CLASSES).index(name[:3]) for name in NAMES]
    np.testing.assert_array_equal(stored.labels, labels * 2)
    manifest = json.loads((done / "manifest.json").read_text())
    vae = {"name": str(VAE), "sha256": autoencoder.sha256, "scaling_factor": 0.18215}
    said = {"image_size": SIZE, "crop": "adm", "mirrors": True, "autoencoder": vae, "skipped": []}
    said["classes"] = [{"name": name, "count": CLASSES[name]} for name in sorted(CLASSES)]
    assert manifest | said | {"num_pictures": len(NAMES)} == manifest
    assert [shard["count"] for shard in manifest["shards"]] == [len(NAMES) // SHARDS] * SHARDS


def test_what_is_there_is_checked_and_completed(prepared, done, tree, tmp_path, monkeypatch):
    copy = shutil.copytree(done, tmp_path / "latents")
    (tree / "n01" / "one_more.png").write_bytes(CONTENTS[NAMES[0]])
    resized = prepared("latents", **{"data.image_size": 32})
    assert_refused(resized, "image_size 16 -> 32", "num_listed 12 -> 13")
    (tree / "n01" / "one_more.png").unlink()
    assert_refused(prepared("latents", **{"prepare.shards": 2}), "num_shards 3 -> 2")
    assert_refused(prepared("pictures"), "holds other files")
    assert files(copy) == files(done)
    begun, shard = [], LatentShards.shard
    monkeypatch.setattr(LatentShards, "shard", lambda s, i, _: (begun.append(i), shard(s, i, _))[1])
    assert (prepared("latents")[0], begun) == (0, [])
    first, second = sorted(copy.glob("*.array_record"))[:2]
    first.unlink()
    second.write_bytes(second.read_bytes()[:-1])
    monkeypatch.setattr("mf_jax.runtime.files.in_bucket", lambda path: True)
    assert (prepared("latents")[0], begun) == (0, [0, 1])
    assert files(copy) == files(done)


def test_a_killed_process_continues_with_the_same_bytes(prepared, done, tmp_path, monkeypatch):
    """A copy of the folder in the midst of the second shard is all that a kill would leave."""
    write, calls = latent_shards.records.to_record, []

    def copied_in_the_second_shard(*arguments):
        calls.append(1)
        if len(calls) == 14:
            shutil.copytree(tmp_path / "latents", tmp_path / "killed")
        return write(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(latent_shards.records, "to_record", copied_in_the_second_shard)
        assert prepared("latents")[0] == 0
    left = files(tmp_path / "killed")
    assert sum(name.endswith(".array_record") for name in left) == 1
    assert len(list((tmp_path / "killed").glob(".*.part"))) == 1
    assert prepared("killed")[0] == 0
    whole = {name: made for name, made in files(tmp_path / "killed").items() if name[0] != "."}
    assert whole == files(done)


def test_broken_pictures_are_named_and_skipped(prepared, features, tree, tmp_path, caplog):
    caplog.set_level("WARNING")
    broken, latents = [NAMES[0], NAMES[6], NAMES[11]], tmp_path / "latents"
    (tree / broken[0]).write_bytes(CONTENTS[broken[0]][:-300])
    for name in broken[1:]:
        (tree / name).write_bytes(b"no picture")
    for more in 2 * ({}, only_reference(tmp_path / "a.npz")):
        # the second time the first shards are there already
        ended = prepared("latents", **more, **{"prepare.max_bad": 2})
        assert_refused(ended, "prepare.max_bad=2: 3 pictures are broken", *broken)
    assert (latents / "latents-00001-of-00003.array_record").exists()
    told = prepared("latents", **{"prepare.max_bad": 3, "log.progress": True}).output
    assert "3 skipped" in told
    assert all(name in caplog.text for name in broken)
    manifest = json.loads((latents / "manifest.json").read_text())
    assert (manifest["skipped"], manifest["num_pictures"]) == (broken, 9)
    assert [entry["count"] for entry in manifest["classes"]] == [4, 2, 3]
    labels = open_latents(latents).gather(np.arange(9)).labels
    assert labels.tolist() == [0] * 4 + [1] * 2 + [2] * 3
    (line,) = (line for line in told.splitlines() if "images/s" in line)
    assert all(text in line for text in ("pictures 4/4 (100%)", "0:00:00 left"))


def test_a_fault_of_the_machine_is_one_line_and_the_next_run_continues(prepared, done, tmp_path):
    """Neither short memory nor a lost connection is taken for a broken picture."""
    full = RuntimeError("write() failed:\nNo space left on device")
    told = "a shard cannot be written (write() failed: No space left on device)"
    for target, error, message in (
        (
            "data.picture_list.Listed.read",
            OSError("lost"),
            "_0.JPEG cannot be opened (OSError: lost)",
        ),
        ("data.crop.adm_crop", MemoryError(), "n01/n01_0.JPEG cannot be opened (MemoryError)"),
        ("prepare.latent_shards.ArrayRecordWriter.close", full, told),
    ):
        with mock.patch(f"mf_jax.{target}", side_effect=error):
            assert_refused(prepared("latents"), message)
    assert prepared("latents")[0] == 0
    assert files(tmp_path / "latents") == files(done)


def test_bad_settings_are_refused_in_one_line_before_anything_is_written(prepared, tmp_path):
    for changes, message in (
        ({"prepare.input": "/nowhere"}, "prepare.input='/nowhere' is neither"),
        ({"prepare.shards": 13}, "prepare.shards=13: must be within [1, 12]"),
        ({"prepare.batch_size": 0}, "prepare.batch_size=0"),
        ({"prepare.latents": False}, "nothing to make"),
        ({"prepare.process_index": 2, "prepare.process_count": 2}, "prepare.process_index=2"),
        ({"prepare.process_index": 1}, "prepare.process_index=1"),
        ({"prepare.process_count": 4}, "prepare.process_count=4: must be within [0, 3]"),
        ({"data.image_size": 18}, "data.image_size=18: for autoencoder"),
        ({"data.image_size": 18}, "must be divisible by 4: try 16"),
        ({"data.path": ""}, "data.path='' is not set"),
        ({"data.path": "/proc/nowhere"}, "data.path='/proc/nowhere' cannot be written"),
        ({"data.autoencoder": "sd-vae"}, "data.autoencoder='sd-vae'"),
        ({"prepare.reference": "a.txt"}, "prepare.reference='a.txt': must end in .npz"),
    ):
        assert_refused(prepared("latents", **changes), message)
        assert not list((tmp_path / "latents").glob("latents*"))


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


def assert_statistics(path, features, names, kept):
    """Compare a file with statistics of these pictures, of which some rows are kept."""
    rows = {k: np.asarray(x, np.float64) for k, x in features({}, cropped(names)).items()}
    with np.load(path) as found:
        for end, name in {"": "2048", "_s": "spatial"}.items():
            mean, covariance = found[f"mu{end}"], found[f"sigma{end}"]
            np.testing.assert_allclose(mean, rows[name].mean(axis=0), atol=1e-7)
            np.testing.assert_allclose(covariance, np.cov(rows[name], rowvar=False), atol=1e-7)
            assert mean.dtype == covariance.dtype == np.float64
        np.testing.assert_allclose(found["features"], rows["2048"][kept], atol=1e-7)
        assert found["num_images"] == len(names)


def only_reference(path):
    return {"prepare.latents": False, "prepare.reference": path}


def test_statistics_are_of_cropped_pictures(prepared, features, tree, tmp_path, monkeypatch):
    """Pictures of the kept features are there for evaluators that compute features."""
    monkeypatch.setattr(statistics, "KEPT_FEATURES", 5)
    (tree / NAMES[4]).write_bytes(b"no picture")  # the third of the kept ones, 0, 2, 4, 7 and 9
    path, more = tmp_path / "reference.npz", {"prepare.reference_pictures": True}
    prepared("none", 1, 2, **only_reference(path), **more)
    assert "of 11 pictures" in prepared("none", 0, 2, **only_reference(path), **more).output
    assert_statistics(path, features, [n for n in NAMES if n != NAMES[4]], [0, 2, 6, 8])
    with np.load(path) as found:
        assert found["arr_0"].dtype == np.uint8
        np.testing.assert_array_equal(found["arr_0"], cropped([NAMES[i] for i in (0, 2, 7, 9)]))
    assert read_reference(path).num_pictures == 4
    assert not (tmp_path / "none").exists()


def test_any_number_of_processes_writes_the_same_files(prepared, features, done, tmp_path):
    """The first comes last, and finds all shards there. Statistics come from the same pass."""
    assert len(files(done)) == 2 * SHARDS + 2
    path = tmp_path / "reference.npz"
    for index in (2, 1, 0):
        code, told, _ = prepared("by 3", index, 3, **{"prepare.reference": path})
        assert (code, path.exists()) == (0, index == 0)
        assert ("12 pictures in 3 shards" in told) == (index == 0)
        assert (f"{3 - index} of 3 shards are in the sums" in told) == (index > 0)
        if index:
            with pytest.raises(BadInput, match=f"not finished: {3 - index} of 3 shards are there"):
                open_latents(tmp_path / "by 3")
    assert files(tmp_path / "by 3") == files(done)
    assert_statistics(path, features, NAMES, range(len(NAMES)))


def test_stopped_statistics_have_the_same_bytes(prepared, features, tmp_path, monkeypatch):
    path, stopped = tmp_path / "undisturbed.npz", tmp_path / "stopped.npz"
    prepared("none", **only_reference(path))
    write, written = statistics.write_npz, []

    def stop(path, arrays):
        written.append(arrays["shards"].tolist())
        if len(written) == 2:
            raise BadInput("stopped")
        write(path, arrays)

    monkeypatch.setattr(statistics, "write_npz", stop)
    assert prepared("none", **only_reference(stopped))[0] == 2
    assert not stopped.exists()
    assert prepared("none", **only_reference(stopped))[0] == 0
    assert written == [[0], [0, 1], [0, 1], [0, 1, 2]]
    assert stopped.read_bytes() == path.read_bytes()


def test_what_is_in_the_way_of_statistics_is_named(prepared, features, tree, tmp_path):
    path = tmp_path / "reference.npz"
    path.write_bytes(b"")
    assert_refused(prepared("none", **only_reference(path)), "exists; must be new")
    assert path.read_bytes() == b""
    path.unlink()
    prepared("none", 0, 2, **only_reference(path))
    (sums,) = (tmp_path / "reference.npz.parts").glob("sums*")
    sums.write_bytes(sums.read_bytes()[:200])
    assert_refused(prepared("none", 1, 2, **only_reference(path)), f"{sums} is no file of sums")
    for name in NAMES:
        (tree / name).write_bytes(b"no picture")
    more = only_reference(tmp_path / "a.npz") | {"prepare.max_bad": len(NAMES)}
    assert_refused(prepared("none", **more), "features has 0 rows")
