"""Stored latents: what a batch of them holds, how they are drawn, and what is refused."""

import errno
import functools
import hashlib
import json
from concurrent.futures import ThreadPoolExecutor
from unittest import mock

import jax
import numpy as np
import pytest
from array_record.python.array_record_module import ArrayRecordWriter
from conftest import refuses
from etils import epath

from configs.default import get_config
from mf_jax import data
from mf_jax.data import latents
from mf_jax.data.latent_records import MANIFEST, WRITER_OPTIONS, shard_name, to_record
from mf_jax.data.pipeline import stream_flips, stream_indices
from mf_jax.flow.records import NO_LABEL, DataSpec
from mf_jax.published.fetch import PUBLISHED
from mf_jax.runtime.workdir import as_json, check

SHAPE = (3, 5, 2)
COUNTS = (4, 0, 1, 6)
LENGTH = sum(COUNTS)
ROWS = np.random.default_rng(0).standard_normal((LENGTH, 2, 2, *SHAPE)).astype(np.float16)
"""By picture, mirror, and mean or standard deviation."""
LABELS = np.arange(LENGTH) % 3
SECTION = get_config().data.to_dict()
SECTION |= {"name": "latents", "image_size": 16, "autoencoder": "sd-vae-ft-mse"}
SHARD = shard_name(3, len(COUNTS))


def write_folder(folder, labels=LABELS, classes=("a", "b", "c")):
    """Write a folder of latents as --mode=prepare leaves it."""
    shards, first = [], 0
    for number, count in enumerate(COUNTS):
        path = folder / shard_name(number, len(COUNTS))
        writer = ArrayRecordWriter(str(path), WRITER_OPTIONS)
        for picture in range(first, first + count):
            for rows in ROWS[picture]:
                writer.write(to_record(int(labels[picture]), rows))
        writer.close()
        shards.append({"name": path.name, "count": count, "bytes": path.stat().st_size})
        first += count
    manifest = {
        "format_version": 1,
        "crop": "adm",
        "image_size": 16,
        "latent_shape": list(SHAPE),
        "autoencoder": {"name": "sd-vae-ft-mse", "sha256": PUBLISHED["sd-vae-ft-mse"][0].sha256},
        "classes": [{"name": name, "count": 0} for name in classes],
        "shards": shards,
    }
    (folder / MANIFEST).write_text(json.dumps(manifest))
    return folder


def change_manifest(folder, **changes):
    path = folder / MANIFEST
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes, "checksum": None}))


def opened(folder, split="train", **changes):
    return data.make_source(SECTION | {"path": str(folder)} | changes, split=split)


@pytest.fixture
def folder(tmp_path):
    return write_folder(tmp_path)


@pytest.fixture
def source(folder):
    return functools.partial(opened, folder)


def test_several_threads_find_pictures_and_mirror_images_in_any_order(source, tmp_path):
    latents = source()
    assert len(latents) == LENGTH
    sha256 = PUBLISHED["sd-vae-ft-mse"][0].sha256
    assert latents.spec == DataSpec(SHAPE, 3, ("a", "b", "c"), sha256)
    assert isinstance(latents, data.Source)
    orders = [np.random.default_rng(seed).permutation(2 * LENGTH) for seed in range(40)]
    with ThreadPoolExecutor(8) as pool:
        for order, batch in zip(orders, pool.map(latents.gather, orders), strict=True):
            assert (batch.x.dtype, batch.labels.dtype) == (np.float16, np.int32)
            assert batch.x.shape[1:] == latents.stored.rows.shape == (2, *SHAPE)
            np.testing.assert_array_equal(batch.x, ROWS[order % LENGTH, order // LENGTH])
            np.testing.assert_array_equal(batch.labels, LABELS[order % LENGTH])
    assert len(latents.gather(np.array([], np.int64)).x) == 0
    write_folder(tmp_path, labels=np.full(LENGTH, NO_LABEL), classes=())
    latents = source()
    assert (latents.spec.num_classes, latents.spec.class_names) == (0, ())
    assert (latents.gather(np.arange(LENGTH)).labels == NO_LABEL).all()


def test_the_pipeline_takes_pictures_and_mirror_images_in_the_order_of_the_stream(source):
    order = stream_indices(np.arange(20), length=LENGTH, seed=3)
    flips = stream_flips(0, 20, seed=3).astype(int)
    for flip in (False, True):
        batches = data.make_batches(source(), batch_size=10, seed=3, flip=flip)
        x = np.concatenate([next(batches).x, next(batches).x])
        np.testing.assert_array_equal(x, ROWS[order, flips * flip])


def test_a_drawn_latent_has_the_stored_mean_and_spread_normalised(source):
    rows = np.zeros((4000, 2, *SHAPE), np.float16)
    rows[:, 0], rows[:, 1] = 3.0, [0.0, 1.5]  # the second channel alone is uncertain
    certain = 4000 * SHAPE[0] * SHAPE[1]
    for mean, std in (((0.5,), (2.0,)), ((0.5, -1.0), (2.0, 4.0))):
        draw = jax.jit(source(latent_mean=mean, latent_std=std).stored.draw)
        drawn, again, other = (np.asarray(draw(jax.random.key(seed), rows)) for seed in (0, 0, 1))
        assert (drawn.dtype, drawn.shape) == (np.float32, (4000, *SHAPE))
        shift, scale = np.broadcast_to(mean, 2), np.broadcast_to(std, 2)
        np.testing.assert_allclose(drawn[..., 0], (3 - shift[0]) / scale[0], rtol=1e-6)
        expected, spread = (3 - shift[1]) / scale[1], 1.5 / scale[1]
        assert abs(drawn[..., 1].mean() - expected) < 5 * spread / certain**0.5
        assert abs(drawn[..., 1].std() / spread - 1) < 5 / certain**0.5
        np.testing.assert_array_equal(again, drawn)
        assert (other[..., 1] != drawn[..., 1]).mean() > 0.9


def test_settings_that_differ_from_the_manifest_are_refused(source):
    for changes, message in (
        ({"path": "/nowhere"}, "path='/nowhere' is no folder"),
        ({"path": "gs://bucket/latents"}, "is in a bucket.*set copy_to"),
        ({"image_size": 32}, "image_size=32: .* 16 pixels.*set image_size=16"),
        ({"autoencoder": "sd-vae-ft-ema"}, "autoencoder='sd-vae-ft-ema': .*'sd-vae-ft-mse'"),
        ({"autoencoder": "/not/there"}, "autoencoder='/not/there'"),
        ({"latent_mean": (1.0, 2.0, 3.0)}, "latent_mean=.* 1 or 2 finite numbers"),
        ({"latent_mean": (float("nan"),)}, "latent_mean=.*finite"),
        ({"latent_std": ()}, "latent_std=.* 1 or 2"),
        ({"latent_std": (1.0, 0.0)}, r"latent_std=.*within \(0, inf\)"),
        ({"split": "held_out"}, "eval.references"),
    ):
        refuses(message, source, **changes)


def test_an_autoencoder_given_as_a_path_is_known_by_its_weights(tmp_path_factory, folder, source):
    weights = tmp_path_factory.mktemp("vae") / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(b"other weights")
    refuses("these latents are of 'sd-vae-ft-mse'", source, autoencoder=str(weights))
    sha256 = hashlib.sha256(b"other weights").hexdigest()
    change_manifest(folder, autoencoder={"name": "elsewhere", "sha256": sha256})
    for autoencoder in (str(weights), str(weights.parent), "elsewhere"):
        assert len(source(autoencoder=autoencoder)) == LENGTH


def test_damage_is_named(folder, source):
    """Of the manifest and of lengths before training, of content when it is read."""
    path, written = folder / SHARD, (folder / MANIFEST).read_text()
    content = path.read_bytes()
    change_manifest(folder, format_version=2, crop="other")
    refuses("format_version, crop must be as in format 1.*prepare again", source)
    (folder / MANIFEST).unlink()
    refuses("holds no latents", source)
    (folder / MANIFEST).write_text(written)
    last = content.rindex(to_record(int(LABELS[-1]), ROWS[-1, 1])[:16]) + 9
    flipped = content[:last] + bytes([content[last] ^ 1]) + content[last + 1 :]
    for damaged, name, changes in (
        (flipped, SHARD, {}),
        (content[:100] + bytes(len(content) - 100), SHARD, {}),
        (content, shard_name(0, len(COUNTS)), {"latent_shape": [3, 5, 4]}),  # the first to be read
    ):
        path.write_bytes(damaged)
        change_manifest(folder, **changes)
        batches = data.make_batches(source(), batch_size=4 * LENGTH, seed=0, flip=True)
        refuses(rf"{name} is damaged .*again", next, batches)
    path.write_bytes(content[:-1])
    refuses(f"{SHARD} has {len(content) - 1} of {len(content)} bytes", source)
    path.unlink()
    refuses(rf"{SHARD} has 0 of", source)


@pytest.fixture
def copied(bucket, tmp_path):
    """Return a function that opens latents in a bucket, the bucket's folder, and the copy's."""
    address, inside = bucket
    inside.mkdir(parents=True)
    make = functools.partial(opened, address, copy_to=str(tmp_path / "copy"))
    return make, write_folder(inside), tmp_path / "copy"


def assert_all_there(latents):
    order = np.arange(2 * LENGTH)
    np.testing.assert_array_equal(latents.gather(order).x, ROWS[order % LENGTH, order // LENGTH])


def test_latents_in_a_bucket_are_copied_once_and_a_stopped_copy_is_finished(copied):
    make, inside, copy = copied
    make()
    (copy / SHARD).unlink()
    cut = copy / shard_name(0, len(COUNTS))
    cut.write_bytes(cut.read_bytes()[:-1])
    assert_all_there(make())
    names = {path.name for path in inside.iterdir()}
    assert {path.name for path in copy.iterdir()} == names | {".lock"}
    for path in inside.glob("*.array_record"):
        path.write_bytes(b"not read again")
    again = make()
    assert_all_there(again)
    path, before = copy / SHARD, (copy / MANIFEST).read_bytes()
    path.write_bytes(bytes(path.stat().st_size))
    refuses("delete it and run this command again", assert_all_there, again)
    change_manifest(inside, classes=[{"name": "other", "count": 0}])
    refuses(r"copy_to=.*holds other latents: choose another", make)
    assert (copy / MANIFEST).read_bytes() == before


def test_a_place_that_cannot_hold_the_copy_is_named(copied):
    make, inside, copy = copied
    full = OSError(errno.ENOSPC, "No space left on device")
    with mock.patch.object(latents, "written_aside", side_effect=full):
        refuses(r"a copy of gs://.* GB .*No space left", make)
    assert {path.name for path in copy.iterdir()} == {".lock", MANIFEST}
    assert_all_there(make(path=str(inside)))  # from a file system too
    copy.rename(copy.with_name("moved"))
    copy.touch()
    refuses(r"copy_to=.*cannot be made a copy", make)
    copy.unlink()
    (inside / SHARD).unlink()  # what is wrong with the source is not said of the copy
    refuses(rf"a copy of gs://runs/first.*No such file.*{SHARD}", make)
    refuses("copy_to='gs://runs/copy': is in a bucket", make, copy_to="gs://runs/copy")


def test_where_data_and_their_copy_lie_may_change_when_a_run_continues(tmp_path):
    config = get_config()
    workdir = epath.Path(tmp_path)
    (workdir / "config.json").write_text(as_json(config))
    config.data.copy_to = config.data.path = "/elsewhere"
    check(workdir, config)
    config.data.flip = not config.data.flip
    refuses(r"data\.flip", check, workdir, config)
