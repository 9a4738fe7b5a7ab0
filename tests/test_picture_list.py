"""The input of --mode=prepare: which pictures it finds wherever they lie, and in which order."""

import io
import tarfile
from pathlib import Path

from absl import logging
from conftest import refuses
from test_data import write_tfds
from test_prepare import CLASSES, CONTENTS, NAMES, write_tree

from mf_jax.data import picture_list
from mf_jax.data.picture_list import digest, list_files, list_pictures
from mf_jax.flow.records import NO_LABEL

FOLDER = (tarfile.DIRTYPE, "")


def write_tar(path, contents):
    """Write members whose content is bytes, or the type of a member and what it links to."""
    with tarfile.open(path, "w") as tar:
        for name, content in contents.items():
            member = tarfile.TarInfo(name)
            if isinstance(content, bytes):
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
            else:
                member.type, member.linkname = content
                tar.addfile(member)
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


def tar_of_here(folder):
    """Write what `tar -cf here.tar .` writes, which has an entry for the folder itself."""
    with tarfile.open(folder / "here.tar", "w") as tar:
        tar.add(write_tree(folder / "tree"), arcname=".")
    return folder / "here.tar"


INPUTS = (
    write_tree,
    lambda folder: write_tree(folder / "train").parent,
    class_tars,
    tar_of_tars,
    tar_of_here,
    lambda folder: write_tar(folder / "a.tar", {f"train/{n}": CONTENTS[n] for n in NAMES[::-1]}),
)


def listed(path):
    return list_pictures(str(path), key="input", tfds_split="train", class_order="number")


def names_of(pictures):
    return [pictures.name(i) for i in range(len(pictures))]


def test_every_kind_of_input_gives_the_same_pictures_in_the_same_order(tmp_path):
    for number, make in enumerate(INPUTS):
        (tmp_path / str(number)).mkdir()
        pictures = listed(make(tmp_path / str(number)))
        assert pictures.class_names == tuple(sorted(CLASSES))
        names = [name.removeprefix("train/").removeprefix("./") for name in names_of(pictures)]
        assert names == NAMES
        for i, name in enumerate(NAMES):
            assert pictures.read(i) == (CONTENTS[name], sorted(CLASSES).index(name[:3]))
    contents = {"b.png": CONTENTS[NAMES[1]], "a.jpg": CONTENTS[NAMES[0]], "c.txt": b""}
    flat = write_tar(tmp_path / "flat.tar", contents), write_tree(tmp_path / "flat", contents)
    for pictures in map(listed, flat):  # without classes
        assert (names_of(pictures), pictures.class_names) == (["a.jpg", "b.png"], ())
        assert pictures.read(1) == (contents["b.png"], NO_LABEL)


DIGEST = "34ef6547febf2a4c4d1c8b8bf692d673a09bb1a698f727768e64063007cc10d1"
"""Of these names, by an earlier version: its half-finished folders are continued."""


def test_the_order_is_that_of_names_and_the_digest_tells_lists_apart(tmp_path, monkeypatch):
    tree = write_tree(tmp_path, CONTENTS | dict.fromkeys(("n01/._00.png", "n01/a.txt"), b"none"))
    (tree / ".cache").mkdir()
    digests = [digest(listed(tree).lines())]
    with monkeypatch.context() as patch:
        names = picture_list._names
        patch.setattr(picture_list, "_names", lambda *a: sorted(names(*a), reverse=True))
        found = listed(tree)
    assert names_of(found) == NAMES
    assert digest(found.lines()) == digests[0] == DIGEST
    for old, new in ((NAMES[0], "n01/other.JPEG"), ("n02", "n03")):
        (tree / old).rename(tree / new)
        digests.append(digest(listed(tree).lines()))
    assert len(set(digests)) == 3


def test_a_tfds_set_is_read_as_it_is_stored(tmp_path, monkeypatch):
    examples = [(CONTENTS[NAMES[0]], 1), (CONTENTS[NAMES[1]], 0)]
    write_tfds(tmp_path, examples, 3)
    monkeypatch.setattr("tensorflow_datasets.core.constants.DATA_DIR", str(tmp_path))
    pictures = listed("tfds:tiny")
    assert (pictures.class_names, pictures.name(1)) == (("cat", "dog"), "train[1]")
    assert [pictures.read(i) for i in range(len(pictures))] == examples
    more = {"key": "input", "tfds_split": "test", "class_order": "number"}
    refuses("dataset='tiny' split 'test'", list_pictures, "tfds:tiny", **more)


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
        (tmp_path / "nowhere.tar", "is neither a folder of pictures nor a .tar file"),
        (tars / "empty", "holds no pictures; must hold either class folders"),
        (tars / "a.zip", "is neither a folder of pictures nor a .tar file"),
        (tars / "damaged.tar", "damaged.tar is cut short, or no uncompressed tar file"),
        (tars / "cut.tar", "is cut short"),
        (tars / "text.tar", "text.tar' holds no pictures"),
        (tars / "nested.tar", "nested.tar: n01 holds no pictures"),
        (tars / "mixed.tar", r"pictures \(b.png\) and folders \(n01\)"),
    ):
        refuses(message, listed, path)
    (tree / "n05").mkdir()
    refuses(r"n05 holds no pictures that Pillow reads: remove it", listed, tree)
    (tree / "a.png").write_bytes(b"")
    refuses(r"holds pictures \(a.png\) and folders \(n01, n02, n10\)", listed, tree)


def test_folders_and_tar_files_hold_the_same_pictures_and_tell_the_rest(tmp_path, monkeypatch):
    """Below classes, with any ending or none; not the companions of Macs, or validation splits."""
    content, told = CONTENTS[NAMES[0]], []
    monkeypatch.setattr(logging, "warning", lambda text, *values: told.append(text % values))
    good = {f"train/{name}": content for name in ("10/a.jfif", "2/b/c/d.AVIF", "2/none", "2/x.mpo")}
    hidden = dict.fromkeys(("train/2/._a.png", "__MACOSX/2/a.png", ".cache/a.png"), b"nothing")
    rest = dict.fromkeys(("train/2/README", "train/2/b.heic", "train/10/eps.eps"), b"nothing")
    contents = {f"top/{n}": c for n, c in (good | hidden | rest | {"val/2/a.png": content}).items()}
    contents["top/train/10/hard.png"] = tarfile.LNKTYPE, "top/train/2/none"
    contents["top/train/10/soft.png"] = tarfile.SYMTYPE, "../2/b/c/d.AVIF"
    tar = write_tar(tmp_path / "all.tar", contents)
    with tarfile.open(tar) as packed:
        packed.extractall(tmp_path / "unpacked", filter="data")
    (tmp_path / "unpacked" / "top" / "train" / "2" / "loop").symlink_to("..")
    for place in (tar, tmp_path / "unpacked"):
        found = list_files(str(place), key="input", class_order="number")
        names = ["2/b/c/d.AVIF", "2/none", "2/x.mpo", "10/a.jfif", "10/hard.png", "10/soft.png"]
        assert names_of(found) == [f"top/train/{name}" for name in names]
        assert (found.class_names, found.labels) == (("2", "10"), [0, 0, 0, 1, 1, 1])
        assert [found.read(i)[0] for i in range(len(found))] == [content] * 6
        assert f"{place}: left out 4 files" in told[0]
        left_out = ("10/eps.eps", "2/README", "2/b.heic", "val/2/a.png")
        assert all(name in told[0] for name in left_out)
        older = list_files(str(place), key="input", class_order="name")
        assert (older.class_names, older.labels) == (("10", "2"), [0, 0, 0, 1, 1, 1])
        told.clear()
    for names, classes in (
        (("train/a.png", "val/b.png"), ()),
        (("car/a.png", "train/a.png"), ("car", "train")),
        (("Training/c/a.png", "test/c/b.png", "Training/d/e/a.png"), ("c", "d")),
        (("-1.5/a.png", "-10/a.png", "3/a.png"), ("-10", "-1.5", "3")),
        (("1/a.png", "10/a.png", "2x/a.png"), ("1", "10", "2x")),
    ):
        packed = write_tar(tmp_path / "some.tar", dict.fromkeys(names, content))
        assert listed(packed).class_names == classes
    for more in ({"b/y.heic": content}, {"b/._y.png": content, "b": FOLDER}):
        packed = write_tar(tmp_path / "some.tar", {"a/x.png": content} | more)
        refuses("b holds no pictures", listed, packed)  # or labels would shift
