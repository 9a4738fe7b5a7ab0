"""Damaged and hostile files of each kind: noticed in one line, or harmless; never silent."""

import collections
import contextlib
import functools
import io
import itertools
import json
import os
import resource
import shutil
import signal
import struct
import zipfile
from unittest import mock

import jax
import numpy as np
import pytest
import safetensors.numpy
from conftest import ROOT, refuses
from etils import epath
from PIL import Image
from recorded import FOLDER
from test_data import make, write_tfds
from test_inception import _save_zip, _small, _write_zip
from test_latents import LENGTH, SECTION, write_folder
from test_picture_list import write_tar
from test_prepare import write_tree

import mf_jax
from mf_jax import data
from mf_jax.data import latent_records
from mf_jax.data.crop import Broken, decoded
from mf_jax.data.picture_list import list_files
from mf_jax.flow.errors import BadInput
from mf_jax.flow.records import DataSpec
from mf_jax.metrics import classifier
from mf_jax.metrics.reference_file import read_reference
from mf_jax.models import autoencoder
from mf_jax.published import fetch
from mf_jax.published.checkpoints import read_published
from mf_jax.published.torch_file import StateDict, read_state_dict
from mf_jax.reporting import run_log
from mf_jax.reporting.run_log import read_metrics
from mf_jax.runtime import files, json_files
from mf_jax.runtime import workdir as run_folder
from mf_jax.scoring import rows as score_rows

MOST_SECONDS, MOST_BYTES = 10, 2**30
"""What reading one damaged file may take."""
ROW = {"name": "a", "fid": 1.25, "diagnostics": {"gap": 0.5}, "precision": None}
MODEL = {"ema": "0.9", "checkpoint": 4, "steps": 2, "omega": 1.0, "t_min": 0.0, "t_max": 1.0}
HOSTILE = (
    *(b"", b"\0" * 40, b"[1]", b"7", b"null", b'{"a": 1', b'{"a": "\xff"}', b"[" * 10**5),
    *(b'{"step": 1e400}', b'{"step": NaN}', b'{"step": "1"}', b'{"step": [1]}', b"{}"),
    b'{"step": ' + b"9" * 5000 + b"}",
    *('{"step": 1}'.encode(code) for code in ("utf-16", "utf-32")),
    b'{"model": 3, "data": [], "seed": {"a": {"b": 1}}, "protocol": [], "shape": 4, "shards": {}}',
    b'{"data.name": 1, "data": {"name": {"x": 1}}, "rows": {"a": 1}, "columns": 3, "weight": 1}',
    b'{"protocol": {"ema": 1}, "name": 3, "wall_seconds": "x", "train": 3, "diagnostics": []}',
)


class Source:
    spec = DataSpec((2,), 0)
    digest = "a"

    def __len__(self):
        return 3


def _start_again(workdir, path):
    return run_folder.check_data(workdir, Source(), init_sha256=files.sha256_of(path))


@contextlib.contextmanager
def limits():
    """Raise TimeoutError after a while, and MemoryError for more memory than small files need."""
    handler = signal.signal(signal.SIGALRM, mock.Mock(side_effect=TimeoutError))
    memory = resource.getrlimit(resource.RLIMIT_AS)
    used = int(epath.Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MOST_BYTES, memory[1]))
    signal.alarm(MOST_SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, handler)
        resource.setrlimit(resource.RLIMIT_AS, memory)


def _noticed(read, capsys):
    """Return what a reader returns, and what it says or, as BadInput, raises in one line."""
    json_files.tell_once.cache_clear()
    capsys.readouterr()
    try:
        with limits():
            value = jax.tree.map(lambda x: x.tolist() if isinstance(x, np.ndarray) else x, read())
    except BadInput as problem:
        assert len(str(problem).splitlines()) == 1  # noqa: PT017
        return None, str(problem)
    return value, capsys.readouterr().out


def _count(read, path, capsys):
    """Return how many of 40 bit flips and 20 cuts of a file are noticed, harmless and silent."""
    path, rng, counts = epath.Path(path), np.random.default_rng(0), collections.Counter()
    whole, (good, said) = path.read_bytes(), _noticed(read, capsys)
    assert (good is not None, said) == (True, "")
    damaged = [whole[:cut] for cut in rng.integers(len(whole), size=20)]
    for place, bit in rng.integers((len(whole), 8), size=(40, 2)):
        flipped = whole[place] ^ 1 << int(bit)
        damaged.append(whole[:place] + bytes([flipped]) + whole[place + 1 :])
    for each in damaged:
        path.write_bytes(each)
        value, said = _noticed(read, capsys)
        counts["noticed" if said else "harmless" if value == good else "silent"] += 1
    path.write_bytes(whole)
    return counts


def _torch(path):
    return lambda: read_state_dict(path).arrays


def _statistics(path):
    return lambda: (read_reference(path).num_images, read_reference(path).pooled)


def _arrays_of(path):
    def read():
        pictures = list_files(str(path), key="data.path", class_order="name")
        return {pictures.name(i): _pixels(pictures.read(i)[0]) for i in range(len(pictures))}

    return read


def _pixels(content):
    """Return a picture as every reader of pictures does: what Pillow raises is a broken one."""
    try:
        return decoded(content, 8)
    except Broken as error:
        raise BadInput(str(error)) from error


def _latents(folder):
    def read():
        source = data.make_source(SECTION | {"path": str(folder)}, split="train")
        batch = source.gather(np.arange(2 * LENGTH))
        return {"x": batch.x, "labels": batch.labels}

    return read


def _claiming(tar, size, kind):
    """Return a tar file whose header says this size and kind of its first member."""
    header = bytearray(tar.read_bytes())
    header[124:136] = (size % 2**96 if size < 0 else size | 2**95).to_bytes(12, "big")
    header[156:157] = kind
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header[:512])
    tar.write_bytes(header)
    return tar


def _png(rng, side=12):
    content = io.BytesIO()
    Image.fromarray(rng.integers(0, 256, (side, side, 3), np.uint8)).save(content, "PNG")
    return content.getvalue()


def _of_runs(run, tmp_path):
    """Yield the name of a kind of file that decides numbers, its reader, and an undamaged file."""
    folder = epath.Path(run)
    yield "config.json", lambda: run_folder.stored_config(folder).to_dict(), run / "config.json"
    yield "data.json", lambda: run_folder.stored_data(folder), run / "data.json"
    yield "timing.json", lambda: run_log._timing_of(folder), run / "timing.json"
    yield "metrics.jsonl", lambda: read_metrics(run), run / "metrics.jsonl"
    score_rows.append(folder, [ROW | {"protocol": MODEL | {"seed": seed}} for seed in range(5)])
    known = score_rows.read_rows(folder)  # a row that is missing is computed again
    strange = lambda: [row for row in score_rows.read_rows(folder) if row not in known]  # noqa: E731
    yield "eval.jsonl", strange, run / "eval.jsonl"
    side = {"name": latent_records.shard_name(0, 1), "count": 3, "bytes": 500, "sha256": "ab"}
    made = {"name": "vae", "sha256": "cd"}
    manifest = {"format_version": 1, "crop": "adm", "image_size": 16, "latent_shape": [2, 2, 4]}
    manifest |= {"autoencoder": made, "classes": [{"name": "c"}], "shards": [side]}
    json_files.write_json(run / "manifest.json", manifest, indent=1)
    yield "manifest", lambda: latent_records.read_manifest(folder), run / "manifest.json"
    sizes = epath.Path(shutil.copy(FOLDER / "vae" / "config.json", tmp_path))
    network = functools.partial(autoencoder._network, sizes, StateDict("", "", {}))
    yield "autoencoder", network, sizes
    rng = np.random.default_rng(0)
    arrays = {name: rng.standard_normal((4, 4), np.float32) for name in ("a/kernel", "b/bias")}
    np.savez(tmp_path / "weights.npz", **arrays)
    safetensors.numpy.save_file(arrays, tmp_path / "weights.safetensors")
    for path in (tmp_path / "weights.npz", tmp_path / "weights.safetensors"):
        other = epath.Path(tmp_path / path.suffix)
        other.mkdir()
        about = run_folder._about(Source()) | {"init_sha256": files.sha256_of(path)}
        json_files.write_json(other / "data.json", about)
        yield path.name, functools.partial(_start_again, other, path), path
    cache = epath.Path(shutil.copy(tmp_path / "weights.npz", tmp_path / "cache.npz"))
    images, labels = np.zeros((4, 8, 8, 1), np.float32), np.arange(4) % 2
    trusted = {files.sha256_of(cache)}

    def cached():
        return classifier.train_classifier(images, labels, 2, file=cache, trusted=trusted).args[1]

    yield "classifier", cached, cache


def _of_strangers(tmp_path, rng):
    """Yield the same of what others have made."""
    latents = tmp_path / "latents"
    latents.mkdir()
    write_folder(latents)
    manifest = json.loads((latents / "manifest.json").read_text())
    json_files.write_json(latents / "manifest.json", manifest | {"num_pictures": LENGTH})
    pictures = {"a/1.png": _png(rng), "b/2.png": _png(rng)}
    folder = write_tree(tmp_path / "pictures", pictures)
    published = shutil.copytree(FOLDER / "official_checkpoint_pmf", tmp_path / "published")
    (metadata,) = published.rglob("_METADATA")
    zipped, tensors = _save_zip(tmp_path / "a.pth", _small()), tmp_path / "a.safetensors"
    safetensors.numpy.save_file({"w": np.ones((3, 5), np.float32)}, tensors)
    moments = {"mu": np.zeros(5), "sigma": np.eye(5)}
    npz, packed = tmp_path / "a.npz", tmp_path / "b.npz"
    np.savez(npz, **moments)
    np.savez_compressed(packed, **moments)
    tar = write_tar(tmp_path / "a.tar", pictures)
    yield "torch", _torch(zipped), zipped
    yield "safetensors", _torch(tensors), tensors
    yield "npz", _statistics(npz), npz
    yield "npz, compressed", _statistics(packed), packed
    yield "manifest", _latents(latents), latents / "manifest.json"
    yield "shard", _latents(latents), latents / manifest["shards"][3]["name"]
    yield "tar", _arrays_of(tar), tar
    yield "picture", _arrays_of(folder), folder / "b" / "2.png"
    yield "orbax", lambda: read_published(published, "pmf"), metadata


WITHOUT_CHECKSUM = ("safetensors", "tar", "picture", "orbax")
"""Formats that may change in silence: runs and scores keep hashes of such files."""


def test_no_flip_and_no_cut_is_silent(copy_of_trained, tmp_path, capsys, monkeypatch, rng):
    monkeypatch.setattr(classifier, "_train", lambda *_: {"a": np.zeros(1)})
    of_runs, of_strangers = _of_runs(copy_of_trained, tmp_path), _of_strangers(tmp_path, rng)
    for kinds, least in ((of_runs, 20), (of_strangers, 5)):
        for kind, read, path in kinds:
            counts = _count(read, path, capsys)
            assert counts.total() == 60, kind
            assert counts["noticed"] > least, (kind, counts)
            assert counts["silent"] == 0 or kind in WITHOUT_CHECKSUM, (kind, counts)


def test_what_is_no_such_file_is_one_line(copy_of_trained, tmp_path, capsys):
    for kind, read, path in itertools.islice(_of_runs(copy_of_trained, tmp_path), 7):
        path = epath.Path(path)
        content = path.read_bytes()
        for each in HOSTILE:
            path.write_bytes(each)
            _noticed(read, capsys)
        path.unlink()
        path.mkdir()
        assert _noticed(read, capsys)[1], kind
        path.rmdir()
        path.write_bytes(content)


def test_an_old_run_is_read_with_one_line(capsys):
    json_files.tell_once.cache_clear()
    folder = ROOT / "tests" / "reference" / "old_run"
    mf_jax.load(folder)
    assert len(read_metrics(folder)) == 1
    assert capsys.readouterr().out.count("\n") == 1


def test_hostile_files_are_refused_at_once(tmp_path, capsys):
    """Each of these once ran for ever, took gigabytes, ended the process or left its folder."""
    row = b"(X\7\0\0\0storagectorch\nFloatStorage\nX\1\0\0\0" + b"0X\3\0\0\0cpuJ%btQ"
    tensor = b"}X\1\0\0\0wctorch._utils\n_rebuild_tensor_v2\n(" + row + b"K\0%b%b\x89}tRs."
    four, many = struct.pack("<i", 4), b"J" + struct.pack("<i", 2**31 - 1)
    laughs = b"K\1\x85q\0" + b"h\0h\0\x86q\0" * 60
    hostile = {
        "laughs": laughs + b"Q.",
        "nested": b")" + b"\x85" * 200_000 + b"}h\0K\1s.",
        "nested key": b"})" + b"\x85" * 200_000 + b"K\1s.",
        "stride 0": tensor % (four, many + b"\x85", b"K\0\x85"),
        "memo": b"}r" + struct.pack("<I", 2**31) + b"K\1K\2s.",
        "build": b"ctorch._utils\n_rebuild_tensor_v2\n}X\1\0\0\0aK\1sb.",
        "claims": tensor % (many[1:], many + b"\x85", b"K\1\x85"),
    }
    reads = {
        name: _torch(_write_zip(tmp_path / f"{name}.pth", b"\x80\x02" + opcodes, {"0": bytes(16)}))
        for name, opcodes in hostile.items()
    }
    with zipfile.ZipFile(tmp_path / "bomb.pth", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/data.pkl", b"}.")
        archive.writestr("a/data/0", bytes(10**7))
    reads["bomb"] = _torch(tmp_path / "bomb.pth")
    header, huge = io.BytesIO(), {"descr": "<f8", "fortran_order": False, "shape": (10**12,)}
    np.lib.format.write_array_header_1_0(header, huge)
    with zipfile.ZipFile(tmp_path / "huge.npz", "w") as archive:
        for name in ("mu.npy", "sigma.npy"):
            archive.writestr(name, header.getvalue())
    reads["npz"] = _statistics(tmp_path / "huge.npz")
    for size, kind in itertools.product((-512, -1024, 2**62), (b"0", b"x", b"L")):
        tar = write_tar(tmp_path / f"{size} {kind}.tar", {"a.png": b""})
        reads[tar.name] = _arrays_of(_claiming(tar, size, kind))
    os.mkfifo(tmp_path / "pipe")
    for place in ("/dev/zero", str(tmp_path / "pipe"), "gs://bucket/vae"):
        reads[place] = lambda place=place: fetch.find_weights(place, "", key="data.autoencoder")
    reads["pipe"] = lambda: files.opened(tmp_path / "pipe")
    narrow = io.BytesIO()
    Image.new("L", (10**6, 1)).save(narrow, "PNG")
    reads["narrow"] = lambda: _pixels(narrow.getvalue())
    reads["eps"] = lambda: _pixels(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")
    (tmp_path / ".lock").symlink_to(tmp_path / "precious")
    (tmp_path / "precious").write_text("kept")
    reads["lock"] = lambda: files.locked(epath.Path(tmp_path / ".lock"), wait=False).__enter__()
    for name, read in reads.items():
        value, said = _noticed(read, capsys)
        assert (value, bool(said)) == (None, True), name
    assert (tmp_path / "precious").read_text() == "kept"


def test_no_manifest_chooses_a_place_and_no_set_a_class(tmp_path, monkeypatch, rng):
    manifest, kept = tmp_path / "latents" / "manifest.json", tmp_path / "kept"
    for folder in (manifest.parent, tmp_path / "home"):
        folder.mkdir()
    write_folder(manifest.parent)
    good = json.loads(manifest.read_text())
    kept.write_text("kept")
    changes = {"name": ("../kept", str(kept), "../latents/manifest.json"), "bytes": (0.5, "1")}
    changes |= {"count": (-1, True, 10**9)}
    section = {"path": str(manifest.parent), "copy_to": str(tmp_path / "home" / "copy")}
    for change in ({key: value} for key, values in changes.items() for value in values):
        shards = [good["shards"][0] | change, *good["shards"][1:]]
        manifest.write_text(json.dumps(good | {"shards": shards}))
        refuses(r"manifest.json: ", data.make_source, SECTION | section, split="train")
        assert kept.read_text() == "kept"
    write_tfds(tmp_path / "sets", [(_png(rng), 0)], 3)
    (features,) = (tmp_path / "sets").rglob("features.json")
    marker = tmp_path / "marker"
    (tmp_path / "hook.py").write_text(f"open({str(marker)!r}, 'w')")
    monkeypatch.syspath_prepend(tmp_path)
    text, kind = features.read_text(), "tensorflow_datasets.core.features.image_feature.Image"
    assert kind in text
    features.write_text(text.replace(kind, "hook.Thing"))
    with pytest.raises(BadInput, match=r"asks for hook.Thing, which is no feature of TFDS"):
        make("tfds", path=str(tmp_path / "sets"), dataset="tiny")
    assert not marker.exists()
