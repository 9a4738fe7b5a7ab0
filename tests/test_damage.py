"""Damaged and hostile files of each kind: noticed in one line, or harmless; never anything else."""

import io
import json
import os
import random
import resource
import shutil
import signal
import struct
import tarfile
import zipfile

import numpy as np
import pytest
import safetensors.numpy
from etils import epath
from PIL import Image
from recorded import FOLDER
from test_data import write_tfds
from test_inception import _save_zip, _small, _write_zip
from test_latents import LENGTH, SECTION, write_folder

from mf_jax import data
from mf_jax.data.crop import adm_crop, as_rgb, open_picture
from mf_jax.data.picture_list import list_files
from mf_jax.flow.errors import BadInput
from mf_jax.metrics.reference_file import read_reference
from mf_jax.published.checkpoints import read_published
from mf_jax.published.fetch import find_weights
from mf_jax.published.torch_file import read_state_dict
from mf_jax.runtime.files import locked, opened

MOST_SECONDS, MOST_BYTES = 10, 2**30
"""What reading one damaged file may take."""


def count(read, path):
    """Return how many of 40 bit flips and 20 cuts of a file are noticed, harmless and silent.

    Args:
      read: from the file, or what it belongs to, to arrays; BadInput means noticed.
      path: of the file, which is put back at the end.
    """
    whole, good = path.read_bytes(), read()
    rng, counts = random.Random(0), dict.fromkeys(("noticed", "harmless", "silent"), 0)
    spots = [rng.randrange(8 * len(whole)) for _ in range(40)]
    damaged = [_flipped(whole, spot) for spot in spots]
    damaged += [whole[: rng.randrange(len(whole))] for _ in range(20)]
    for content in damaged:
        path.write_bytes(content)
        counts[outcome(read, good)] += 1
    path.write_bytes(whole)
    return counts


def outcome(read, good):
    """Return what becomes of reading; anything but arrays and BadInput is raised."""
    try:
        with limits():
            found = read()
    except BadInput as problem:
        assert len(str(problem).splitlines()) == 1  # noqa: PT017
        return "noticed"
    same = found.keys() == good.keys()
    same = same and all(np.array_equal(found[name], good[name]) for name in good)
    return "harmless" if same else "silent"


class limits:
    """Raise TimeoutError after a while, and MemoryError for more memory than small files need."""

    def __enter__(self):
        def late(*_):
            raise TimeoutError

        self._handler = signal.signal(signal.SIGALRM, late)
        self._memory = resource.getrlimit(resource.RLIMIT_AS)
        with open("/proc/self/statm") as file:
            used = int(file.read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + MOST_BYTES, self._memory[1]))
        signal.alarm(MOST_SECONDS)

    def __exit__(self, *_):
        signal.alarm(0)
        signal.signal(signal.SIGALRM, self._handler)
        resource.setrlimit(resource.RLIMIT_AS, self._memory)


def _flipped(content, spot):
    changed = bytearray(content)
    changed[spot // 8] ^= 1 << spot % 8
    return bytes(changed)


def _npz(path, *, save=np.savez, **arrays):
    with path.open("wb") as file:
        save(file, **arrays)
    return path


def _torch(path):
    return lambda: read_state_dict(path).arrays


def _statistics(path):
    return lambda: {k: v for k, v in vars(read_reference(path).statistics).items() if v is not None}


def _arrays_of(path):
    def read():
        pictures = list_files(str(path), key="data.path", class_order="name")
        return {pictures.name(i): _pixels(pictures.read(i)[0]) for i in range(len(pictures))}

    return read


def _pixels(content):
    """Return a picture as every reader of pictures does: what Pillow raises is a broken one."""
    try:
        with open_picture(content) as image:
            return adm_crop(as_rgb(image), 8)
    except MemoryError:
        raise
    except Exception as error:
        raise BadInput(f"broken: {type(error).__name__}") from error


def _latents(folder):
    def read():
        source = data.make_source(SECTION | {"path": str(folder)}, split="train")
        batch = source.gather(np.arange(2 * LENGTH))
        return {"x": batch.x, "labels": batch.labels}

    return read


def _tar(path, pictures, *, size=None, kind=None):
    with tarfile.open(path, "w") as tar:
        for name, content in pictures.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    if size is not None:  # of the first member, as its header says
        header = bytearray(path.read_bytes())
        header[124:136] = (size % 2**96 if size < 0 else size | 2**95).to_bytes(12, "big")
        header[156:157] = kind or b"0"
        header[148:156] = b" " * 8
        header[148:156] = b"%06o\0 " % sum(header[:512])
        path.write_bytes(header)
    return path


def _png(rng, side=12):
    content = io.BytesIO()
    Image.fromarray(rng.integers(0, 256, (side, side, 3), np.uint8)).save(content, "PNG")
    return content.getvalue()


def test_damage_is_noticed_or_harmless(tmp_path, rng):
    """Only formats without a checksum may change in silence: runs and scores keep their hashes."""
    latents = tmp_path / "latents"
    latents.mkdir()
    write_folder(latents)
    manifest = json.loads((latents / "manifest.json").read_text())
    (latents / "manifest.json").write_text(json.dumps(manifest | {"num_pictures": LENGTH}))
    pictures = {"a/1.png": _png(rng), "b/2.png": _png(rng)}
    folder = tmp_path / "pictures"
    for name, content in pictures.items():
        (folder / name).parent.mkdir(parents=True)
        (folder / name).write_bytes(content)
    published = shutil.copytree(FOLDER / "official_checkpoint_pmf", tmp_path / "published")
    (metadata,) = published.rglob("_METADATA")
    zipped, tensors = _save_zip(tmp_path / "a.pth", _small()), tmp_path / "a.safetensors"
    safetensors.numpy.save_file({"w": np.ones((3, 5), np.float32)}, tensors)
    moments = {"mu": np.zeros(5), "sigma": np.eye(5)}
    npz = _npz(tmp_path / "a.npz", **moments)
    packed = _npz(tmp_path / "b.npz", save=np.savez_compressed, **moments)
    tar = _tar(tmp_path / "a.tar", pictures)
    read = lambda: read_published(published, "pmf")  # noqa: E731
    table = [
        # kind, read, file, whether its format has a checksum
        ("torch", _torch(zipped), zipped, True),
        ("safetensors", _torch(tensors), tensors, False),
        ("npz", _statistics(npz), npz, True),
        ("npz, compressed", _statistics(packed), packed, True),
        ("manifest", _latents(latents), latents / "manifest.json", True),
        ("shard", _latents(latents), latents / manifest["shards"][3]["name"], True),
        ("tar", _arrays_of(tar), tar, False),
        ("picture", _arrays_of(folder), folder / "b" / "2.png", False),
        ("orbax", read, metadata, False),
    ]
    for kind, reader, path, has_checksum in table:
        counts = count(reader, path)
        print(kind, counts)
        assert sum(counts.values()) == 60, kind
        assert counts["noticed"] > 5, kind
        assert not has_checksum or counts["silent"] == 0, (kind, counts)


def _pickled(path, opcodes, members=None):
    return _write_zip(path, b"\x80\x02" + opcodes, members or {"0": bytes(16)})


def test_hostile_files_are_refused_at_once(tmp_path, rng):
    """Each of these once ran for ever, took gigabytes, ended the process or left its folder."""
    row = b"(X\7\0\0\0storagectorch\nFloatStorage\nX\1\0\0\0" + b"0X\3\0\0\0cpuJ%btQ"
    tensor = b"}X\1\0\0\0wctorch._utils\n_rebuild_tensor_v2\n(" + row + b"K\0%b%b\x89}tRs."
    four, many = struct.pack("<i", 4), b"J" + struct.pack("<i", 2**31 - 1)
    laughs = b"K\1\x85q\0" + b"h\0h\0\x86q\0" * 60
    hostile = {
        "laughs": laughs + b"Q.",
        "nested": b")" + b"\x85" * 10**6 + b"}h\0K\1s.",
        "nested key": b"})" + b"\x85" * 10**6 + b"K\1s.",
        "stride 0": tensor % (four, many + b"\x85", b"K\0\x85"),
        "memo": b"}r" + struct.pack("<I", 2**31) + b"K\1K\2s.",
        "build": b"ctorch._utils\n_rebuild_tensor_v2\n}X\1\0\0\0aK\1sb.",
        "claims": tensor % (many[1:], many + b"\x85", b"K\1\x85"),
    }
    reads = {}
    for name, opcodes in hostile.items():
        reads[name] = _torch(_pickled(tmp_path / f"{name}.pth", opcodes))
    with zipfile.ZipFile(tmp_path / "bomb.pth", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/data.pkl", b"}.")
        archive.writestr("a/data/0", bytes(10**7))
    reads["bomb"] = _torch(tmp_path / "bomb.pth")
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        header, {"descr": "<f8", "fortran_order": False, "shape": (10**12,)}
    )
    with zipfile.ZipFile(tmp_path / "huge.npz", "w") as archive:
        archive.writestr("mu.npy", header.getvalue())
        archive.writestr("sigma.npy", header.getvalue())
    reads["npz"] = _statistics(tmp_path / "huge.npz")
    for size in (-512, -1024, 2**62):
        for kind in (b"0", b"x", b"L"):
            name = f"{size} {kind}.tar"
            reads[name] = _arrays_of(_tar(tmp_path / name, {"a.png": b""}, size=size, kind=kind))
    os.mkfifo(tmp_path / "pipe")
    for place in ("/dev/zero", str(tmp_path / "pipe"), "gs://bucket/vae"):
        reads[place] = lambda place=place: find_weights(place, "", key="data.autoencoder")
    reads["pipe"] = lambda: opened(tmp_path / "pipe")
    narrow = io.BytesIO()
    Image.new("L", (10**6, 1)).save(narrow, "PNG")
    reads["narrow"] = lambda: _pixels(narrow.getvalue())
    reads["eps"] = lambda: _pixels(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")
    (tmp_path / ".lock").symlink_to(tmp_path / "precious")
    (tmp_path / "precious").write_text("kept")
    reads["lock"] = lambda: locked(epath.Path(tmp_path / ".lock"), wait=False).__enter__()
    for name, read in reads.items():
        assert outcome(read, {}) == "noticed", name
    assert (tmp_path / "precious").read_text() == "kept"


def test_no_manifest_chooses_a_place_and_no_set_a_class(tmp_path, monkeypatch, rng):
    (tmp_path / "latents").mkdir()
    write_folder(tmp_path / "latents")
    good = json.loads((tmp_path / "latents" / "manifest.json").read_text())
    kept = tmp_path / "kept"
    kept.write_text("kept")
    (tmp_path / "home").mkdir()
    for change in (
        {"name": "../kept"},
        {"name": str(kept)},
        {"name": "../latents/manifest.json"},
        {"count": -1},
        {"count": True},
        {"count": 10**9},
        {"bytes": 0.5},
        {"bytes": "1"},
    ):
        shards = [good["shards"][0] | change, *good["shards"][1:]]
        manifest = tmp_path / "latents" / "manifest.json"
        manifest.write_text(json.dumps(good | {"shards": shards}))
        section = {"path": str(tmp_path / "latents"), "copy_to": str(tmp_path / "home" / "copy")}
        with pytest.raises(BadInput, match=r"manifest.json: "):
            data.make_source(SECTION | section, split="train")
        assert kept.read_text() == "kept"
    write_tfds(tmp_path / "sets", [(_png(rng), 0)], 3)
    (features,) = (tmp_path / "sets").rglob("features.json")
    marker = tmp_path / "marker"
    (tmp_path / "hook.py").write_text(f"open({str(marker)!r}, 'w')")
    monkeypatch.syspath_prepend(tmp_path)
    text = features.read_text().replace(
        "tensorflow_datasets.core.features.image_feature.Image", "hook.Thing"
    )
    assert "hook" in text
    features.write_text(text)
    keys = {"path": str(tmp_path / "sets"), "dataset": "tiny", "image_size": 8}
    keys |= {"split_train": "train", "split_held_out": "train"}
    with pytest.raises(BadInput, match=r"asks for hook.Thing, which is no feature of TFDS"):
        data.make_source({"name": "tfds", **keys}, split="train")
    assert not marker.exists()
