"""Data: a batch is a pure function of (seed, step), and sources refuse what they cannot read."""

import io
import itertools
import json
import os

import numpy as np
import PIL
import pytest
import tensorflow_datasets as tfds
from absl import logging
from array_record.python.array_record_module import ArrayRecordWriter
from conftest import refuses
from ml_collections import ConfigDict
from PIL import Image
from tensorflow_datasets.proto import tf_example_pb2

from mf_jax import data
from mf_jax.data import picture_list, pictures, toy2d
from mf_jax.data.crop import adm_crop, as_rgb, open_picture
from mf_jax.data.pipeline import stream_flips, stream_indices
from mf_jax.data.pixels import from_pixels, to_pixels
from mf_jax.flow.errors import BadInput
from mf_jax.flow.records import NO_LABEL, DataSpec

SECTION = {"name": "digits", "path": "", "image_size": 8, "toy": "checkerboard"}
SECTION |= {"dataset": "cifar10", "split_train": "train", "split_held_out": "test"}
SECTION |= {"held_out_share": 0.25}


class Numbered:
    """Pictures `[2, 3, 1]` whose label is their index and whose pixels tell left from right."""

    spec = DataSpec((2, 3, 1))
    stored = None

    def __init__(self, length):
        self.length = length

    def __len__(self):
        return self.length

    def gather(self, indices):
        row = np.float32([[[0.0], [0.25], [0.5]]] * 2)
        return data.Batch(indices[:, None, None, None] + row, indices.astype(np.int32))


def take(source, count, **options):
    """Return x and labels `[count, batch, ...]` of the first batches."""
    options = {"batch_size": 6, "seed": 5, "flip": True} | options
    batches = list(itertools.islice(data.make_batches(source, **options), count))
    return [np.stack(arrays) for arrays in zip(*(batch[:2] for batch in batches), strict=True)]


def make(name="digits", split="train", **changes):
    return data.make_source(ConfigDict({**SECTION, "name": name, **changes}), split=split)


ORDER = "1 7 9 6 8 0 5 4 10 11 2 3 10 7 11 6 5 3 8 9 1 2 4 0 9 8 10 0 7 4"
FLIPS = "010010000000111110101001000111"
"""Of runs that an earlier version began."""


def test_order_and_flips_are_those_of_older_runs_wherever_reading_starts():
    order, flips = stream_indices(np.arange(30), length=12, seed=7), stream_flips(0, 30, seed=7)
    assert " ".join(map(str, order)) == ORDER
    assert "".join(str(int(flip)) for flip in flips) == FLIPS
    np.testing.assert_array_equal(stream_indices(np.arange(17, 30), length=12, seed=7), order[17:])
    np.testing.assert_array_equal(stream_flips(17, 10, seed=7), flips[17:27])
    assert 0.4 < (stream_flips(0, 1000, seed=0) != stream_flips(0, 1000, seed=1)).mean() < 0.6
    for length in (1, 2, 7, 64):  # every epoch holds every element once
        epochs = stream_indices(np.arange(3 * length), length=length, seed=3).reshape(3, length)
        np.testing.assert_array_equal(np.sort(epochs), [np.arange(length)] * 3)


def test_neither_resuming_nor_processes_nor_threads_change_the_stream():
    """Batches straddle epochs and drop nothing; flips mirror pictures, never labels."""
    x, labels = whole = take(Numbered(10), 12)
    expected = stream_indices(np.arange(72), length=10, seed=5)  # whatever its threads do
    np.testing.assert_array_equal(labels.ravel(), expected)
    plain, _ = take(Numbered(10), 12, flip=False)
    flips = stream_flips(0, 72, seed=5).reshape(12, 6, 1, 1, 1)
    np.testing.assert_array_equal(x, np.where(flips, plain[:, :, :, ::-1], plain))
    for start in (1, 7):
        resumed = take(Numbered(10), 12 - start, start_step=start)
        np.testing.assert_equal(resumed, (x[start:], labels[start:]))
    shares = [take(Numbered(10), 12, process_index=i, process_count=3) for i in range(3)]
    joined = [np.concatenate(parts, axis=1) for parts in zip(*shares, strict=True)]
    np.testing.assert_equal(joined, whole)
    _, long = take(Numbered(10), 2, batch_size=25)
    np.testing.assert_array_equal(long.ravel(), stream_indices(np.arange(50), length=10, seed=5))


def test_sources_that_are_none_are_refused():
    refuses(r"name='digit'.*digits, toy2d, image_folder, tfds.*mean digits", make, "digit")
    refuses("image_size=32 must be 8", make, image_size=32)
    refuses(r"toy='two_moon'.*mean two_moons", make, "toy2d", toy="two_moon")
    refuses("also needs image_size", data.make_source, {"name": "digits"}, split="train")


def test_sources_in_memory_keep_the_protocol():
    for name, split in itertools.product(("digits", "toy2d"), data.SPLITS):
        source = make(name, split)
        assert isinstance(source, data.Source)
        batch, whole = source.gather(np.array([3, 1, 3])), data.read(source)
        assert batch.x.shape == (3, *source.spec.shape)
        assert (batch.x.dtype, batch.labels.dtype) == (np.float32, np.int32)
        np.testing.assert_array_equal(batch.x, whole.x[[3, 1, 3]])
        turns = data.in_turn(source, len(source) + 3).labels
        np.testing.assert_array_equal(turns, [*whole.labels, *whole.labels[:3]])
        for some in (data.read(source, 100), data.in_turn(source, 100)):  # from all over it
            chosen = np.arange(100) * len(source) // 100
            np.testing.assert_array_equal(some.labels, whole.labels[chosen])


def test_digits_are_split_by_class_without_overlap_and_keep_their_labels():
    train, held_out = (data.read(make(split=split)) for split in data.SPLITS)
    assert [len(part.labels) for part in (train, held_out)] == [1437, 360]
    every = np.concatenate([train.x, held_out.x])
    assert len(np.unique(every.reshape(1797, -1), axis=0)) == 1797
    assert (every.min(), every.max()) == (-1, 1)
    shares = np.bincount(held_out.labels) / np.bincount(train.labels)
    np.testing.assert_allclose(shares, 0.25, atol=0.02)
    means = np.stack([train.x[train.labels == label].mean(0) for label in range(10)])
    nearest = np.square(held_out.x[:, None] - means).sum((2, 3, 4)).argmin(1)
    assert (nearest == held_out.labels).mean() > 0.85


def test_toys_have_the_documented_moments_and_shapes():
    """They are the same every time, and differ between the splits."""
    for toy in toy2d.TOYS:
        train, again, held_out = (
            data.read(make("toy2d", split, toy=toy)).x for split in ("train", *data.SPLITS)
        )
        np.testing.assert_array_equal(train, again)
        assert not np.isin(train.view(np.int64), held_out.view(np.int64)).any()
        mean, std = (toy2d.GAUSSIAN_MEAN, toy2d.GAUSSIAN_STD) if toy == "gaussian" else (0, 1)
        for x in (train, held_out):
            assert x.shape == (2**16, 2)
            np.testing.assert_allclose(x.mean(0), np.broadcast_to(mean, 2), atol=0.02)
            np.testing.assert_allclose(x.std(0), std, atol=0.01)
    assert set(data.read(make("toy2d")).labels.tolist()) == {NO_LABEL}
    squares = np.floor(toy2d.checkerboard(4000, 0) * np.sqrt(16 / 12) + 2).astype(int)
    assert (squares.sum(1) % 2 == 0).all()
    assert len(np.unique(squares, axis=0)) == 8
    scale = np.sqrt(9 * np.pi**2 / 4 + np.array([0.75, -0.75]) + 0.3**2)
    x, y = (toy2d.spirals(4000, 0) * scale).T
    # On one arm the radius is the angle, on the other it is the angle and half a turn.
    turn = np.hypot(x, y) - np.arctan2(y, x)
    assert np.abs(np.sin(turn)).mean() < 0.35
    assert 0.45 < (np.cos(turn) > 0).mean() < 0.55
    x, y = toy2d.eight_gaussians(8000, 0).T
    counts = np.bincount(np.rint(np.arctan2(y, x) / (np.pi / 4)).astype(int) % 8)
    np.testing.assert_allclose(counts, 1000, atol=100)
    assert np.abs(np.sin(4 * np.arctan2(y, x))).mean() < 0.45


def test_bytes_become_floats_in_minus_one_to_one_and_come_back():
    pixels = np.arange(256, dtype=np.uint8)
    x = from_pixels(pixels)
    assert (x.dtype, x[0], x[-1], (to_pixels(x) == pixels).all()) == (np.float32, -1, 1, True)
    assert to_pixels(np.float32([-1.5, -1, 0, 1, 2])).tolist() == [0, 0, 128, 255, 255]


def test_every_mode_becomes_upright_rgb():
    for mode, colour, expected in (
        ("RGBA", (255, 0, 0, 0), (255, 255, 255)),
        ("RGBA", (255, 0, 0, 255), (255, 0, 0)),
        ("LA", (0, 0), (255, 255, 255)),
        ("L", 51, (51, 51, 51)),
        ("I;16", 51 * 257, (51, 51, 51)),
        ("P", 0, (0, 0, 0)),
        ("1", 1, (255, 255, 255)),
    ):
        image = as_rgb(Image.new(mode, (1, 1), colour))
        assert (image.mode, image.getpixel((0, 0))) == ("RGB", expected), mode
    deep = np.arange(0, 256, 51, dtype=np.uint16)[None] * 257
    for levels, options, expected in (
        (deep, {"format": "PPM"}, range(0, 256, 51)),  # read as mode I
        (deep.astype(">u2"), {"format": "TIFF"}, range(0, 256, 51)),
        (deep, {"format": "TIFF", "tiffinfo": {262: 0}}, range(255, -1, -51)),  # white is 0
        (deep, {"format": "PNG", "transparency": 51 * 257}, (0, 255, 102, 153, 204, 255)),
        (np.float32(deep / 65535), {"format": "TIFF"}, range(0, 256, 51)),
        (np.float32(deep / 257), {"format": "TIFF"}, "no known range"),
        (np.float32(deep * np.nan), {"format": "TIFF"}, "no known range"),
        (deep.astype(np.int32), {"format": "TIFF"}, "no known range"),
    ):
        content = io.BytesIO()
        Image.fromarray(levels).save(content, **options)
        with open_picture(content.getvalue()) as image:
            if isinstance(expected, str):
                with pytest.raises(ValueError, match=expected):
                    as_rgb(image)
            else:
                assert np.asarray(as_rgb(image))[0, :, 1].tolist() == list(expected), options
    picture = Image.new("RGB", (16, 16), "black")
    picture.paste("white", (0, 0, 16, 8))
    picture.getexif()[0x0112] = 6  # upright after a quarter turn clockwise: the top becomes right
    upright = np.asarray(as_rgb(picture))
    assert (upright[:, :8].max(), upright[:, 8:].min()) == (0, 255)


def test_the_crop_is_that_of_adm(rng):
    crop = lambda pixels, size: adm_crop(Image.fromarray(pixels), size).astype(int)  # noqa: E731
    pixels = rng.integers(0, 256, (8, 13, 3), dtype=np.uint8)
    np.testing.assert_array_equal(crop(pixels, 8), pixels[:, 2:10])  # fits: the centre is left
    ramp = np.broadcast_to(np.arange(80, dtype=np.uint8)[:, None], (40, 80, 3))
    expected = 20 + 5 * np.arange(8)[2:-2, None] + 2  # centres of columns of five, in the middle
    assert np.abs(crop(ramp, 8)[2:-2, 2:-2] - expected).max() <= 1
    assert np.abs(crop(ramp.transpose(1, 0, 2), 8)[2:-2, 2:-2] - expected[:, None]).max() <= 1
    blocks = np.kron(rng.integers(0, 64, (16, 16, 3)) * 4, np.ones((2, 2, 1))).astype(np.uint8)
    means = blocks.reshape(8, 4, 8, 4, 3).mean(axis=(1, 3))  # halved twice, with a box filter
    assert np.abs(crop(blocks, 8) - means).max() <= 0.5
    below = Image.fromarray(blocks[:31])  # too small to halve
    scaled = below.resize((round(32 * 16 / 31), 16), Image.Resampling.BICUBIC)
    np.testing.assert_array_equal(adm_crop(below, 16), np.asarray(scaled)[:, :16])
    small = np.full((7, 3), 9, np.uint8)  # enlarged, and grey
    np.testing.assert_array_equal(crop(small, 50), np.full((50, 50, 1), 9))


def save(path, colour, size=(12, 12), mode="RGB"):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, colour).save(path)


def folder(path, split="train", **changes):
    return make("image_folder", split, path=str(path), **changes)


@pytest.fixture
def classes(tmp_path):
    """Make two classes; red numbers a picture within its class, green tells the class."""
    for name, green, count in (("zebra", 200, 12), ("Ape", 100, 8)):
        for number in range(count):
            save(tmp_path / name / f"{number:02}.png", (10 * number, green, 0))
    return tmp_path


def identities(*sources):
    read = [to_pixels(data.read(source).x[:, 0, 0]).tolist() for source in sources]
    return [tuple(row) for rows in read for row in rows]


def both(path, **changes):
    return [folder(path, split, **changes) for split in data.SPLITS]


def test_sub_folders_are_classes_split_by_a_hash_of_names(classes):
    train, held_out = both(classes)
    assert (train.spec.class_names, train.spec.num_classes) == (("Ape", "zebra"), 2)
    assert isinstance(train, data.Source)
    # those that an earlier version held out
    numbers = [(red // 10, green) for red, green, _ in identities(held_out)]
    assert numbers == [(3, 100), (5, 100), (2, 200), (4, 200), (5, 200)]
    labels = data.read(train).labels
    assert np.bincount(labels).tolist() == [6, 9]
    assert [green for _, green, _ in identities(train)] == [(100, 200)[k] for k in labels]
    assert identities(train) == sorted(identities(train), key=lambda pixel: (pixel[1], pixel[0]))
    assert len(set(identities(train, held_out))) == 20


def test_two_pictures_without_a_class_go_to_both_splits(tmp_path):
    for number in range(2):
        save(tmp_path / f"{number}.png", (number, 0, 0))
    (tmp_path / "no class").mkdir()
    for source in both(tmp_path, held_out_share=0.01) + both(tmp_path, held_out_share=0.99):
        assert source.spec == DataSpec((8, 8, 3))
        assert data.read(source).labels.tolist() == [NO_LABEL]


def test_broken_pictures_are_counted_named_and_skipped(classes, monkeypatch):
    warnings = []
    monkeypatch.setattr(logging, "warning", lambda text, *values: warnings.append(text % values))
    before = set(identities(*both(classes)))
    assert not warnings
    Image.effect_noise((64, 64), 90).save(classes / "zebra" / "cut.jpg")
    (classes / "Ape" / "noise.jpg").write_bytes(b"no picture at all")
    cut = ("Ape/03.png", "zebra/05.png", "zebra/cut.jpg")
    for name in cut:
        whole = (classes / name).read_bytes()
        (classes / name).write_bytes(whole[: len(whole) // 2])
    assert set(identities(*both(classes))) == before - {(30, 100, 0), (50, 200, 0)}
    counts = [line.split(": ")[1] for line in warnings]
    assert counts == [f"skipped 2 broken of {number} pictures" for number in (17, 5)]
    assert all(name in " ".join(warnings) for name in (*cut, "Ape/noise.jpg"))


def test_pictures_too_many_to_keep_are_decoded_on_demand(classes, monkeypatch):
    kept, opened = folder(classes), []
    expected, stream = identities(kept), take(kept, 5)
    image_open = Image.open
    monkeypatch.setattr(Image, "open", lambda *a, **k: opened.append(a) or image_open(*a, **k))
    assert identities(kept) == expected
    assert not opened
    monkeypatch.setattr(pictures, "CACHE_BYTES", 15 * 8 * 8 * 3 - 1)
    on_demand = folder(classes)
    opened.clear()
    assert [identities(on_demand), identities(on_demand)] == [expected, expected]
    assert len(opened) == 30
    np.testing.assert_equal(take(on_demand, 5), stream)


def test_grey_stays_grey_and_transparent_shows_the_background(tmp_path, capsys, monkeypatch):
    for number in range(3):
        save(tmp_path / f"{number}.png", (9 * number, 0), mode="LA")
    deep = Image.fromarray(np.full((8, 8), 257, np.uint16))
    deep.save(tmp_path / "3.png", transparency=257)
    assert folder(tmp_path).spec.shape == (8, 8, 3)  # as earlier runs had them
    grey = folder(tmp_path, channels=0, background="#404040")
    assert grey.spec.shape == (8, 8, 1)
    np.testing.assert_array_equal(to_pixels(data.read(grey).x), 64)
    assert folder(tmp_path, channels=0, background="red").spec.shape == (8, 8, 3)
    assert "all are read as grey" not in capsys.readouterr().out
    monkeypatch.setattr(pictures, "_LOOKED_AT", 3)
    assert folder(tmp_path, channels=0).spec.shape == (8, 8, 1)
    assert "3 of 4 pictures are grey: all are read as grey" in capsys.readouterr().out
    monkeypatch.undo()
    save(tmp_path / "4.png", (255, 0, 0))
    assert folder(tmp_path, channels=0).spec.shape == (8, 8, 3)
    assert np.ptp(data.read(folder(tmp_path, channels=1)).x, axis=-1).max() == 0


def test_decoded_pictures_are_kept_until_a_file_changes(classes, tmp_path_factory, monkeypatch):
    cache = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("MF_CACHE", str(cache))
    (classes / "Ape" / "noise.jpg").write_bytes(b"no picture at all")
    first = identities(folder(classes))
    with monkeypatch.context() as patch:
        patch.setattr(picture_list.File, "read", None)
        assert identities(folder(classes)) == first
    [kept] = (cache / "data").iterdir()
    whole = kept.read_bytes()
    kept.write_bytes(whole[:400] + bytes([whole[400] ^ 1]) + whole[401:])
    assert identities(folder(classes)) == first
    status = (classes / "zebra" / "05.png").stat()
    save(classes / "zebra" / "05.png", (1, 2, 3), size=(9, 16))
    os.utime(classes / "zebra" / "05.png", ns=(status.st_atime_ns, status.st_mtime_ns))
    (classes / "zebra" / "06.png").unlink()
    (classes / "zebra" / "06.png").symlink_to("nowhere.png")
    assert (1, 2, 3) in identities(*both(classes))
    assert len(list((cache / "data").iterdir())) == 3
    assert PIL.__version__ in pictures._DECODERS
    monkeypatch.setattr(pictures, "_DECODERS", ("0",))
    folder(classes)
    (classes / "zebra" / "05.png").chmod(0o600)  # which may have been why it could not be read
    folder(classes)
    assert len(list((cache / "data").iterdir())) == 5


def test_other_names_are_another_digest_and_a_lost_picture_is_named(classes, monkeypatch):
    monkeypatch.setattr(pictures, "CACHE_BYTES", 0)
    before = folder(classes)
    assert folder(classes).digest == before.digest
    assert make("image_folder", "held_out", path=str(classes)).digest != before.digest
    name = "zebra/11.png"
    content = (classes / name).read_bytes()
    (classes / name).unlink()
    with pytest.raises(BadInput, match=f"{name} has gone or changed.*put any picture in its place"):
        before.gather(np.array([len(before) - 1]))
    (classes / name).with_name("other.png").write_bytes(content)
    assert folder(classes).digest != before.digest


def test_bad_folders_are_refused(classes, tmp_path, monkeypatch):
    flat = tmp_path / "flat"
    save(flat / "a.png", 0, mode="L")
    for arguments, message in (
        ({"path": ""}, "path='' is neither a folder"),
        ({"path": "gs://bucket/pictures"}, "in a bucket: copy it"),
        ({"path": flat, "split": "held_out"}, "no picture for split='held_out'"),
        *(({"path": classes, "held_out_share": x}, "held_out_share") for x in (0.0, 1.0)),
        ({"path": classes, "background": "whit"}, "background='whit'"),
    ):
        refuses(message, folder, **arguments)
    (flat / "a.png").write_text("text")
    refuses(r"none of 1 pictures is readable.*a\.png", folder, flat)
    monkeypatch.chdir(classes)
    refuses(r"pictures of class flat are broken.*flat/a\.png", folder, ".")


def write_tfds(root, examples, channels):
    """Write a prepared TFDS set by hand, as `tfds build --file_format=array_record` lays it out."""
    home = root / "tiny" / "1.0.0"
    home.mkdir(parents=True)
    label = tfds.features.ClassLabel(names=["cat", "dog"])
    image = tfds.features.Image(shape=(None, None, channels))
    tfds.features.FeaturesDict({"image": image, "label": label}).save_config(home)
    split = {"name": "train", "shardLengths": [str(len(examples))], "numBytes": "1"}
    split["filepathTemplate"] = "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"
    info = {"name": "tiny", "version": "1.0.0", "fileFormat": "array_record", "splits": [split]}
    (home / "dataset_info.json").write_text(json.dumps(info))
    writer = ArrayRecordWriter(str(home / "tiny-train.array_record-00000-of-00001"), "group_size:1")
    for content, number in examples:
        example = tf_example_pb2.Example()
        example.features.feature["image"].bytes_list.value.append(content)
        example.features.feature["label"].int64_list.value.append(number)
        writer.write(example.SerializeToString())
    writer.close()


def test_a_prepared_set_is_read_resized_and_labelled(tmp_path, monkeypatch):
    for mode, channels in (("RGB", 3), ("L", 1)):
        examples, root = [], tmp_path / mode
        for number, size in enumerate([(8, 8), (30, 20), (9, 50)]):
            save(root / "a.png", ("black", "white")[number % 2], size, mode)
            examples.append(((root / "a.png").read_bytes(), (number + 1) % 2))
        write_tfds(root, examples, channels)
        tiny = {"name": "tfds", "path": str(root), "dataset": "tiny"}
        for most in (2**30, 0):  # kept, and decoded on demand
            monkeypatch.setattr(pictures, "CACHE_BYTES", most)
            source = make(**tiny)
            assert source.spec == DataSpec((8, 8, channels), 2, ("cat", "dog"))
            x, labels, *_ = source.gather(np.array([2, 1, 0, 1]))
            np.testing.assert_array_equal(x, np.broadcast_to([[[[-1]]], [[[1]]]] * 2, x.shape))
            assert labels.tolist() == [1, 0, 1, 0]
    refuses(r"dataset='tiny' split 'train\[:0\]'", make, **tiny, split_train="train[:0]")
    refuses(r"dataset='tiny' split 'test'", make, **tiny, split="held_out")


def test_bad_names_and_unprepared_sets_are_refused_without_a_download(tmp_path, monkeypatch):
    # pytest.fail is no Exception, so that the source cannot mistake it for one of TFDS.
    monkeypatch.setattr(
        tfds.core.DatasetBuilder, "download_and_prepare", lambda *_, **__: pytest.fail("download")
    )
    for dataset, message in (
        ("cifra10", r"dataset='cifra10'.*mean cifar10"),
        ("cifar10", "tfds build cifar10 --file_format=array_record"),
        ("not a name!", "dataset='not a name!'"),
    ):
        refuses(message, make, "tfds", path=str(tmp_path), dataset=dataset)
    with tfds.testing.mock_data(), pytest.raises(BadInput, match="no image of uint8"):
        make("tfds", dataset="ag_news_subset")
