"""The data layer: what a batch holds is a pure function of (seed, step), and sources refuse what they cannot read."""

import os
import subprocess
import sys

import numpy as np
import pytest
import tensorflow_datasets as tfds
from absl import logging
from array_record.python.array_record_module import ArrayRecordWriter
from ml_collections import ConfigDict
from PIL import Image
from tensorflow_datasets.proto import tf_example_pb2

from mf_jax import data
from mf_jax.data import image_folder, toy2d
from mf_jax.data.crop import adm_crop
from mf_jax.data.pipeline import stream_flips, stream_indices
from mf_jax.errors import BadInput
from mf_jax.flow.records import NO_LABEL

SECTION = {
    "name": "digits",
    "path": "",
    "image_size": 8,
    "toy": "checkerboard",
    "dataset": "cifar10",
    "split_train": "train",
    "split_held_out": "test",
    "held_out_share": 0.25,
}


class Numbered:
    """Pictures `[2, 3, 1]` whose label is their index and whose pixels tell left from right."""

    shape = (2, 3, 1)
    num_classes = 0
    class_names = ()
    stored = None

    def __init__(self, length):
        self.length = length

    def __len__(self):
        return self.length

    def gather(self, indices):
        row = np.array([0.0, 0.25, 0.5], np.float32)
        x = indices[:, None, None, None].astype(np.float32) + np.broadcast_to(
            row[:, None], self.shape
        )
        return data.Batch(x, indices.astype(np.int32))


def take(batches, count):
    return [next(batches) for _ in range(count)]


def labels_of(source, count, **options):
    return np.concatenate(
        [batch.labels for batch in take(data.make_batches(source, **options), count)]
    )


def section(**changes):
    return ConfigDict({**SECTION, **changes})


# --- the stream ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [1, 2, 3, 7, 64, 100])
def test_every_epoch_holds_every_element_once(length):
    for epoch in range(4):
        order = stream_indices(
            np.arange(epoch * length, (epoch + 1) * length), length=length, seed=3
        )
        np.testing.assert_array_equal(np.sort(order), np.arange(length))


def test_order_differs_between_epochs_and_seeds_and_repeats_for_the_same():
    orders = [
        stream_indices(np.arange(50) + 50 * epoch, length=50, seed=seed).tolist()
        for seed in (0, 1, 2**40)
        for epoch in range(3)
    ]
    assert len({tuple(order) for order in orders}) == 9
    assert list(range(50)) not in orders
    assert stream_indices(np.arange(50, 100), length=50, seed=0).tolist() == orders[1]


def test_order_does_not_depend_on_where_reading_starts():
    whole = stream_indices(np.arange(100), length=30, seed=0)
    np.testing.assert_array_equal(stream_indices(np.arange(37, 100), length=30, seed=0), whole[37:])


@pytest.mark.parametrize("batch_size", [4, 25])
def test_batches_straddle_epochs_and_drop_nothing(batch_size):
    seen = labels_of(Numbered(10), 50 // batch_size + 1, batch_size=batch_size, seed=0)
    for epoch in range(5):
        np.testing.assert_array_equal(np.sort(seen[10 * epoch : 10 * epoch + 10]), np.arange(10))


@pytest.mark.parametrize("start_step", [1, 7])
def test_a_resumed_stream_equals_the_uninterrupted_one(start_step):
    options = {"batch_size": 6, "seed": 5, "flip": True}
    whole = take(data.make_batches(Numbered(10), **options), 12)
    resumed = take(
        data.make_batches(Numbered(10), start_step=start_step, **options), 12 - start_step
    )
    for expected, got in zip(whole[start_step:], resumed, strict=True):
        np.testing.assert_array_equal(got.x, expected.x)
        np.testing.assert_array_equal(got.labels, expected.labels)


def test_the_shares_of_the_processes_make_up_the_batch():
    options = {"batch_size": 12, "seed": 5, "flip": True}
    whole = take(data.make_batches(Numbered(10), **options), 5)
    shares = [
        take(data.make_batches(Numbered(10), process_index=i, process_count=3, **options), 5)
        for i in range(3)
    ]
    for step, expected in enumerate(whole):
        assert [share[step].x.shape[0] for share in shares] == [4, 4, 4]
        np.testing.assert_array_equal(
            np.concatenate([share[step].x for share in shares]), expected.x
        )
        np.testing.assert_array_equal(
            np.concatenate([share[step].labels for share in shares]), expected.labels
        )


@pytest.mark.parametrize(("threads", "prefetch"), [(0, 0), (0, 4), (4, 0), (1, 1), (8, 16)])
def test_threads_change_nothing(threads, prefetch):
    options = {"batch_size": 8, "seed": 1, "flip": True}
    expected = take(data.make_batches(Numbered(20), **options), 10)
    got = take(data.make_batches(Numbered(20), threads=threads, prefetch=prefetch, **options), 10)
    for one, other in zip(expected, got, strict=True):
        np.testing.assert_array_equal(one.x, other.x)


def test_flip_mirrors_about_half_of_the_pictures_and_others_in_the_next_epoch():
    length, epochs = 500, 4
    source = Numbered(length)
    plain, flipped = (
        take(data.make_batches(source, batch_size=length, seed=0, flip=flip), epochs)
        for flip in (False, True)
    )
    decisions = np.zeros((epochs, length), bool)
    for epoch, (before, after) in enumerate(zip(plain, flipped, strict=True)):
        np.testing.assert_array_equal(before.labels, after.labels)
        mirrored = (after.x == before.x[:, :, ::-1]).all((1, 2, 3))
        np.testing.assert_array_equal(mirrored, ~(after.x == before.x).all((1, 2, 3)))
        decisions[epoch, after.labels] = mirrored
    assert abs(decisions.mean() - 0.5) < 0.05
    for epoch in range(1, epochs):
        assert 0.35 < (decisions[epoch] != decisions[0]).mean() < 0.65


def test_a_flip_depends_on_seed_and_position_alone():
    whole = stream_flips(0, 1000, seed=0)
    np.testing.assert_array_equal(stream_flips(123, 500, seed=0), whole[123:623])
    assert 0.4 < (stream_flips(0, 1000, seed=1) != whole).mean() < 0.6
    assert 0.4 < (whole[1:] != whole[:-1]).mean() < 0.6


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size=0"),
        (
            {"batch_size": 10, "process_count": 4},
            "batch_size=10 must be a multiple of process_count=4",
        ),
        ({"process_index": 2, "process_count": 2}, "process_index=2"),
        ({"start_step": -1}, "start_step=-1"),
        ({"seed": -1}, "seed=-1"),
        ({"threads": -1}, "threads=-1"),
    ],
)
def test_bad_stream_options_are_refused(options, message):
    with pytest.raises(BadInput, match=message):
        data.make_batches(Numbered(10), **{"batch_size": 8, "seed": 0, **options})


def test_flip_of_points_is_refused():
    with pytest.raises(BadInput, match="flip=True"):
        data.make_batches(
            data.make_source(section(name="toy2d"), split="train"), batch_size=8, seed=0, flip=True
        )


def test_read_returns_the_first_elements_in_order():
    np.testing.assert_array_equal(data.read(Numbered(10)).labels, np.arange(10))
    np.testing.assert_array_equal(data.read(Numbered(10), 4).labels, np.arange(4))
    with pytest.raises(BadInput, match="n=11"):
        data.read(Numbered(10), 11)


# --- the table of sources --------------------------------------------------------------------------------------------


def test_an_unknown_name_lists_the_known_ones_and_suggests_the_nearest():
    with pytest.raises(
        BadInput, match=r"name='digit'.*digits, toy2d, image_folder, tfds.*did you mean digits"
    ):
        data.make_source(section(name="digit"), split="train")


def test_an_unknown_split_and_a_missing_key_are_refused():
    with pytest.raises(BadInput, match=r"split='test'.*train, held_out"):
        data.make_source(section(), split="test")
    with pytest.raises(BadInput, match="image_size"):
        data.make_source({"name": "digits"}, split="train")


@pytest.mark.parametrize("name", ["digits", "toy2d"])
@pytest.mark.parametrize("split", data.SPLITS)
def test_sources_in_memory_keep_the_protocol(name, split):
    source = data.make_source(section(name=name), split=split)
    assert isinstance(source, data.Source)
    batch = source.gather(np.array([3, 1, 3]))
    assert batch.x.shape == (3, *source.shape)
    assert (batch.x.dtype, batch.labels.dtype) == (np.float32, np.int32)
    np.testing.assert_array_equal(batch.x[0], batch.x[2])
    np.testing.assert_array_equal(batch.x[1], data.read(source, 2).x[1])
    assert len(source.class_names) == source.num_classes


def test_digits_are_split_by_class_without_overlap():
    train, held_out = (data.read(data.make_source(section(), split=split)) for split in data.SPLITS)
    assert (len(train.labels), len(held_out.labels)) == (1437, 360)
    every = np.concatenate([train.x, held_out.x])
    assert len(np.unique(every.reshape(1797, -1), axis=0)) == 1797
    assert (every.min(), every.max()) == (-1, 1)
    np.testing.assert_allclose(
        np.bincount(held_out.labels) / np.bincount(train.labels), 0.25, atol=0.02
    )


def test_digits_labels_belong_to_their_pictures():
    train, held_out = (data.read(data.make_source(section(), split=split)) for split in data.SPLITS)
    means = np.stack([train.x[train.labels == label].mean(0) for label in range(10)])
    nearest = np.square(held_out.x[:, None] - means).sum((2, 3, 4)).argmin(1)
    assert (nearest == held_out.labels).mean() > 0.85


def test_digits_of_another_size_are_refused():
    with pytest.raises(BadInput, match="image_size=32 must be 8"):
        data.make_source(section(image_size=32), split="train")


@pytest.mark.parametrize("toy", toy2d.TOYS)
@pytest.mark.parametrize("split", data.SPLITS)
def test_toys_have_the_documented_moments(toy, split):
    batch = data.read(data.make_source(section(name="toy2d", toy=toy), split=split))
    mean, std = (toy2d.GAUSSIAN_MEAN, toy2d.GAUSSIAN_STD) if toy == "gaussian" else (0, 1)
    assert batch.x.shape == (2**16, 2)
    np.testing.assert_allclose(batch.x.mean(0), np.broadcast_to(mean, 2), atol=0.02)
    np.testing.assert_allclose(batch.x.std(0), std, atol=0.01)
    assert (batch.labels == NO_LABEL).all()


@pytest.mark.parametrize("toy", toy2d.TOYS)
def test_toys_are_the_same_every_time_and_differ_between_splits(toy):
    first, again = (
        data.read(data.make_source(section(name="toy2d", toy=toy), split="train")).x
        for _ in range(2)
    )
    np.testing.assert_array_equal(first, again)
    other = data.read(data.make_source(section(name="toy2d", toy=toy), split="held_out")).x
    assert not np.isin(first.view(np.int64), other.view(np.int64)).any()


def test_the_checkerboard_is_empty_on_every_other_square():
    points = toy2d.checkerboard(4000, 0) * np.sqrt(16 / 12) + 2
    squares = np.floor(points).astype(int)
    assert (squares.sum(1) % 2 == 0).all()
    assert len(np.unique(squares, axis=0)) == 8


def test_the_spirals_are_two_and_archimedean():
    x, y = (toy2d.spirals(4000, 0) * np.sqrt(9 * np.pi**2 / 4 + np.array([0.75, -0.75]) + 0.3**2)).T
    # On one arm the radius is the angle, on the other it is the angle and half a turn.
    turn = np.hypot(x, y) - np.arctan2(y, x)
    assert np.abs(np.sin(turn)).mean() < 0.35
    assert 0.45 < (np.cos(turn) > 0).mean() < 0.55


def test_the_eight_gaussians_are_eight_and_equal():
    x, y = toy2d.eight_gaussians(8000, 0).T
    counts = np.bincount(np.rint(np.arctan2(y, x) / (np.pi / 4)).astype(int) % 8)
    np.testing.assert_allclose(counts, 1000, atol=100)
    assert np.abs(np.sin(4 * np.arctan2(y, x))).mean() < 0.45


def test_an_unknown_toy_is_refused():
    with pytest.raises(BadInput, match=r"toy='two_moon'.*mean two_moons"):
        data.make_source(section(name="toy2d", toy="two_moon"), split="train")


# --- a folder of pictures --------------------------------------------------------------------------------------------


def save(path, colour, size=(12, 12), mode="RGB", **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, colour).save(path, **options)


def folder(path, split="train", **changes):
    return data.make_source(section(name="image_folder", path=str(path), **changes), split=split)


@pytest.fixture
def classes(tmp_path):
    """Make two classes; the red channel numbers a picture within its class, the green one tells the class."""
    for name, green, count in (("zebra", 200, 12), ("Ape", 100, 8)):
        for number in range(count):
            save(tmp_path / name / f"{number:02}.png", (10 * number, green, 0))
    return tmp_path


def identities(source):
    pixels = np.rint((data.read(source).x[:, 0, 0] + 1) * 127.5).astype(int)
    return [tuple(row) for row in pixels]


def test_sub_folders_are_classes_in_the_order_of_their_names(classes):
    source = folder(classes)
    assert source.class_names == ("Ape", "zebra")
    assert source.num_classes == 2
    assert isinstance(source, data.Source)
    labels = data.read(source).labels
    assert [green for _, green, _ in identities(source)] == [(100, 200)[label] for label in labels]
    assert identities(source) == sorted(identities(source), key=lambda pixel: (pixel[1], pixel[0]))


def test_the_splits_are_disjoint_cover_everything_and_keep_the_share_of_each_class(classes):
    train, held_out = (folder(classes, split=split) for split in data.SPLITS)
    assert np.bincount(data.read(held_out).labels).tolist() == [2, 3]
    assert np.bincount(data.read(train).labels).tolist() == [6, 9]
    assert len(set(identities(train)) | set(identities(held_out))) == 20


def test_a_class_of_two_gives_one_picture_to_each_split(tmp_path):
    for number in range(2):
        save(tmp_path / "few" / f"{number}.png", (number, 0, 0))
    for share in (0.01, 0.99):
        assert [
            len(folder(tmp_path, split=split, held_out_share=share)) for split in data.SPLITS
        ] == [1, 1]


def test_a_flat_folder_is_unconditional(tmp_path):
    for number in range(4):
        save(tmp_path / f"{number}.png", (number, 0, 0))
    source = folder(tmp_path)
    assert (source.num_classes, source.class_names) == (0, ())
    assert data.read(source).labels.tolist() == [NO_LABEL] * 3


def test_the_order_of_the_listing_does_not_matter(classes, monkeypatch):
    expected = [identities(folder(classes, split=split)) for split in data.SPLITS]
    scandir = os.scandir

    class Reversed(list):
        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

    monkeypatch.setattr(
        os, "scandir", lambda path: Reversed(sorted(scandir(path), key=lambda e: e.name)[::-1])
    )
    assert folder(classes).class_names == ("Ape", "zebra")
    assert [identities(folder(classes, split=split)) for split in data.SPLITS] == expected


def test_pictures_are_turned_upright(tmp_path):
    picture = Image.new("RGB", (16, 16), "black")
    picture.paste("white", (0, 0, 16, 8))
    exif = Image.Exif()
    exif[0x0112] = (
        6  # upright after a quarter turn clockwise: the upper half becomes the right half
    )
    picture.save(tmp_path / "a.png", exif=exif)
    picture.save(tmp_path / "b.png", exif=exif)
    x = data.read(folder(tmp_path)).x[0, :, :, 0]
    assert x[:, :3].max() < -0.8
    assert x[:, 5:].min() > 0.8


@pytest.mark.parametrize(
    ("mode", "colour", "expected"),
    [
        ("RGBA", (255, 0, 0, 0), (255, 255, 255)),
        ("RGBA", (255, 0, 0, 255), (255, 0, 0)),
        ("LA", (0, 0), (255, 255, 255)),
        ("L", 51, (51, 51, 51)),
        ("I;16", 51 * 257, (51, 51, 51)),
        ("P", 0, (0, 0, 0)),
        ("1", 1, (255, 255, 255)),
    ],
)
def test_every_mode_becomes_rgb(tmp_path, mode, colour, expected):
    for name in ("a.png", "b.png"):
        save(tmp_path / name, colour, mode=mode)
    assert identities(folder(tmp_path)) == [expected]


def test_the_short_side_is_resized_and_the_centre_kept():
    ramp = np.broadcast_to(
        np.arange(80, dtype=np.uint8)[:, None], (40, 80, 3)
    )  # the value is the column
    expected = (
        20 + 5 * np.arange(8) + 2
    )  # the centres of eight columns of five pixels, in the middle of the picture
    for pixels in (ramp, ramp.transpose(1, 0, 2)):
        got = adm_crop(Image.fromarray(pixels), 8).astype(int)[2:-2, 2:-2]
        along = got if pixels is ramp else got.transpose(1, 0, 2)
        assert np.abs(along - expected[2:-2, None]).max() <= 1


def test_resizing_is_antialiased():
    stripes = np.zeros((64, 64, 3), np.uint8)
    stripes[:, ::2] = 255
    assert np.abs(adm_crop(Image.fromarray(stripes), 8)[:, 1:-1].astype(int) - 127).max() < 4


def test_broken_pictures_are_counted_named_and_skipped(classes, monkeypatch):
    warnings = []
    monkeypatch.setattr(logging, "warning", lambda text, *values: warnings.append(text % values))
    before = {name for split in data.SPLITS for name in identities(folder(classes, split=split))}
    assert not warnings
    save(classes / "Ape" / "noise.jpg", (0, 0, 0))
    Image.effect_noise((64, 64), 90).save(classes / "zebra" / "cut.jpg")
    for name in ("Ape/03.png", "zebra/05.png", "zebra/cut.jpg"):
        whole = (classes / name).read_bytes()
        (classes / name).write_bytes(whole[: len(whole) // 2])
    (classes / "Ape" / "noise.jpg").write_bytes(b"no picture at all")
    sources = [folder(classes, split=split) for split in data.SPLITS]
    assert {name for source in sources for name in source.broken} == {
        "Ape/03.png",
        "Ape/noise.jpg",
        "zebra/05.png",
        "zebra/cut.jpg",
    }
    after = {name for source in sources for name in identities(source)}
    assert before - after == {(30, 100, 0), (50, 200, 0)}
    assert after < before
    assert len(warnings) == sum(bool(source.broken) for source in sources)
    for source, line in zip([source for source in sources if source.broken], warnings, strict=True):
        assert (
            f"skipped {len(source.broken)} broken of {len(source) + len(source.broken)} pictures"
            in line
        )
        assert all(name in line for name in source.broken)
        assert "\n" not in line


def test_pictures_too_many_to_keep_are_decoded_on_demand(classes, monkeypatch):
    kept = folder(classes)
    expected = identities(kept)
    opened = []
    image_open = Image.open
    monkeypatch.setattr(Image, "open", lambda path: opened.append(path) or image_open(path))
    assert identities(kept) == expected
    assert not opened
    monkeypatch.setattr(image_folder, "CACHE_BYTES", 15 * 8 * 8 * 3 - 1)
    on_demand = folder(classes)
    opened.clear()
    assert [identities(on_demand), identities(on_demand)] == [expected, expected]
    assert len(opened) == 30


def test_a_cached_folder_gives_the_same_stream_on_threads(classes):
    options = {"batch_size": 7, "seed": 0, "flip": True}
    slow = take(data.make_batches(folder(classes), threads=0, prefetch=0, **options), 12)
    fast = take(data.make_batches(folder(classes), threads=8, prefetch=8, **options), 12)
    for one, other in zip(slow, fast, strict=True):
        np.testing.assert_array_equal(one.x, other.x)
        np.testing.assert_array_equal(one.labels, other.labels)


def test_an_unset_path_is_not_the_current_directory(classes, monkeypatch):
    monkeypatch.chdir(classes)
    assert folder(".").num_classes == 2
    with pytest.raises(BadInput, match="path='' is not set"):
        folder("")


def test_bad_folders_are_refused(tmp_path):
    with pytest.raises(BadInput, match="does not exist"):
        folder(tmp_path / "missing")
    with pytest.raises(BadInput, match="holds no pictures"):
        folder(tmp_path)
    (tmp_path / "file.png").write_text("text")
    with pytest.raises(BadInput, match="is not a folder"):
        folder(tmp_path / "file.png")
    (tmp_path / "other.png").write_text("text")
    with pytest.raises(BadInput, match=r"none of 1 pictures is readable.*\.png"):
        folder(tmp_path)
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "a.png").write_text("text")
    with pytest.raises(BadInput, match="both directly and in sub-folders"):
        folder(tmp_path)


def test_a_class_without_pictures_and_a_lone_picture_are_refused(classes, tmp_path):
    (classes / "empty").mkdir()
    with pytest.raises(BadInput, match="'empty'"):
        folder(classes)
    save(tmp_path / "lone" / "a.png", 0, mode="L")
    with pytest.raises(BadInput, match="held_out"):
        folder(tmp_path / "lone", split="held_out")


def test_bad_folder_options_are_refused(classes):
    for share in (0.0, 1.0, -0.5):
        with pytest.raises(BadInput, match="held_out_share"):
            folder(classes, held_out_share=share)
    with pytest.raises(BadInput, match="image_size=0"):
        folder(classes, image_size=0)


def test_hidden_files_and_other_files_are_ignored(classes):
    expected = identities(folder(classes))
    (classes / ".cache").mkdir()
    (classes / "Ape" / "._00.png").write_text("not a picture")
    (classes / "Ape" / "notes.txt").write_text("not a picture")
    assert identities(folder(classes)) == expected


# --- TensorFlow Datasets ---------------------------------------------------------------------------------------------


def prepare(root, pictures, labels, channels):
    """Write a prepared TFDS set by hand, as `tfds build --file_format=array_record` lays it out."""
    home = root / "tiny" / "1.0.0"
    home.mkdir(parents=True)
    shape = (None, None, channels)
    features = {
        "image": tfds.features.Image(shape=shape),
        "label": tfds.features.ClassLabel(names=["cat", "dog"]),
    }
    tfds.features.FeaturesDict(features).save_config(home)
    split = '{"name": "train", "shardLengths": ["%d"], "numBytes": "1", "filepathTemplate": "%s"}'
    template = "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"
    (home / "dataset_info.json").write_text(
        '{"name": "tiny", "version": "1.0.0", "fileFormat": "array_record", "splits": [%s]}'
        % (split % (len(labels), template))
    )
    writer = ArrayRecordWriter(str(home / "tiny-train.array_record-00000-of-00001"), "group_size:1")
    for number, (picture, label) in enumerate(zip(pictures, labels, strict=True)):
        picture.save(root / f"{number}.png")
        example = tf_example_pb2.Example()
        example.features.feature["image"].bytes_list.value.append(
            (root / f"{number}.png").read_bytes()
        )
        example.features.feature["label"].int64_list.value.append(label)
        writer.write(example.SerializeToString())
    writer.close()


@pytest.mark.parametrize(("mode", "channels"), [("RGB", 3), ("L", 1)])
def test_a_prepared_set_is_read_resized_and_labelled(tmp_path, mode, channels):
    pictures = [
        Image.new(mode, size, ("black", "white")[i % 2])
        for i, size in enumerate([(8, 8), (30, 20), (9, 50)])
    ]
    prepare(tmp_path, pictures, [1, 0, 1], channels)
    source = data.make_source(
        section(name="tfds", path=str(tmp_path), dataset="tiny"), split="train"
    )
    assert (source.shape, source.class_names, source.num_classes) == (
        (8, 8, channels),
        ("cat", "dog"),
        2,
    )
    for _ in range(2):
        batch = source.gather(np.array([2, 1, 0, 1]))
        np.testing.assert_array_equal(
            batch.x, np.broadcast_to(np.array([-1, 1, -1, 1])[:, None, None, None], batch.x.shape)
        )
        assert batch.labels.tolist() == [1, 0, 1, 0]
    with pytest.raises(BadInput, match=r"dataset='tiny' split 'train\[:0\]'"):
        data.make_source(
            section(name="tfds", path=str(tmp_path), dataset="tiny", split_train="train[:0]"),
            split="train",
        )
    with pytest.raises(BadInput, match=r"dataset='tiny' split 'test'"):
        data.make_source(section(name="tfds", path=str(tmp_path), dataset="tiny"), split="held_out")


def test_a_known_set_is_read_by_its_name():
    with tfds.testing.mock_data(num_examples=5):
        source = data.make_source(section(name="tfds", image_size=16), split="train")
        batch = data.read(source)
        expected = [record["label"] for record in tfds.data_source("cifar10", split="train")]
    assert (batch.x.shape, source.num_classes, len(source)) == ((5, 16, 16, 3), 10, 5)
    assert "airplane" in source.class_names or source.class_names == tuple("0123456789")
    assert batch.labels.tolist() == expected
    assert -1 <= batch.x.min() < -0.5 < 0.5 < batch.x.max() <= 1


def test_bad_names_and_unprepared_sets_are_refused_without_a_download(tmp_path, monkeypatch):
    # pytest.fail is no Exception, so that the source cannot mistake it for one of TFDS.
    monkeypatch.setattr(
        tfds.core.DatasetBuilder, "download_and_prepare", lambda *_, **__: pytest.fail("download")
    )

    def source(**changes):
        return data.make_source(section(name="tfds", path=str(tmp_path), **changes), split="train")

    with pytest.raises(BadInput, match=r"dataset='cifra10'.*'cifar10'") as error:
        source(dataset="cifra10")
    assert "\n" not in str(error.value)
    with pytest.raises(BadInput, match="tfds build cifar10 --file_format=array_record") as error:
        source(dataset="cifar10")
    assert "\n" not in str(error.value)
    with pytest.raises(BadInput, match="dataset='not a name!'"):
        source(dataset="not a name!")
    with tfds.testing.mock_data(), pytest.raises(BadInput, match="feature 'image'"):
        source(dataset="ag_news_subset")


def test_nothing_imports_tensorflow_or_starts_a_backend():
    program = """
import sys
from mf_jax import data
assert "tensorflow_datasets" not in sys.modules
import tensorflow_datasets as tfds
with tfds.testing.mock_data(num_examples=4):
    keys = dict(path="", image_size=8, dataset="mnist", split_train="train", split_held_out="test")
    source = data.make_source(dict(name="tfds", **keys), split="train")
    batch = next(data.make_batches(source, batch_size=6, seed=0, flip=True))
assert batch.x.shape == (6, 8, 8, 1), batch.x.shape
assert "tensorflow" not in sys.modules and "torch" not in sys.modules
from jax._src import xla_bridge
assert not xla_bridge.backends_are_initialized()
"""
    subprocess.run(
        [sys.executable, "-c", program], check=True, env={**os.environ, "JAX_PLATFORMS": "cpu"}
    )
