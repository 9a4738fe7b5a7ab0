"""Damage to files that decide numbers: noticed, or harmless, and never silent."""

import collections
import functools
import shutil

import jax
import numpy as np
import pytest
from conftest import ROOT
from etils import epath
from recorded import FOLDER
from safetensors.numpy import save_file

import mf_jax
from mf_jax.data import latent_records
from mf_jax.flow.errors import BadInput
from mf_jax.flow.records import DataSpec
from mf_jax.metrics import classifier
from mf_jax.metrics.reference_file import read_reference
from mf_jax.models import autoencoder
from mf_jax.published import fetch
from mf_jax.published.torch_file import StateDict
from mf_jax.reporting import run_log
from mf_jax.reporting.page import write_report
from mf_jax.reporting.run_log import RunLog, read_metrics
from mf_jax.runtime import files, json_files
from mf_jax.runtime import workdir as run_folder
from mf_jax.scoring import rows as score_rows

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
    return run_folder.check_data(workdir, Source(), files.sha256_of(path))


def _noticed(read, path, capsys):
    """Return what a reader of a file returns, and what it says or raises in one line."""
    json_files.tell_once.cache_clear()
    capsys.readouterr()
    try:
        value = read(path)
    except BadInput as problem:
        return None, str(problem)
    return value, capsys.readouterr().out


def _kinds(run, tmp_path):
    """Yield the name of a kind of file, its reader, and an undamaged file."""
    folder = epath.Path(run)
    yield "config.json", lambda _: run_folder.stored_config(folder).to_dict(), run / "config.json"
    yield "data.json", lambda _: run_folder.stored_data(folder), run / "data.json"
    yield "timing.json", lambda _: run_log._timing_of(folder), run / "timing.json"
    yield "metrics.jsonl", lambda _: read_metrics(run), run / "metrics.jsonl"
    score_rows.append(folder, [ROW | {"protocol": MODEL | {"seed": seed}} for seed in range(5)])
    known = score_rows.read_rows(folder)  # a row that is missing is computed again
    strange = lambda _: [row for row in score_rows.read_rows(folder) if row not in known]  # noqa: E731
    yield "eval.jsonl", strange, run / "eval.jsonl"
    side = {"name": latent_records.shard_name(0, 1), "count": 3, "bytes": 500, "sha256": "ab"}
    made = {"name": "vae", "sha256": "cd"}
    manifest = {"format_version": 1, "crop": "adm", "image_size": 16, "latent_shape": [2, 2, 4]}
    manifest |= {"autoencoder": made, "classes": [{"name": "c"}], "shards": [side]}
    json_files.write_json(run / "manifest.json", manifest, indent=1)
    yield "manifest", lambda _: latent_records.read_manifest(folder), run / "manifest.json"
    sizes = lambda path: autoencoder._network(path, StateDict("", "", {}))  # noqa: E731
    yield "autoencoder", sizes, shutil.copy(FOLDER / "vae" / "config.json", tmp_path)
    rng = np.random.default_rng(0)
    arrays = {name: rng.standard_normal((4, 4), np.float32) for name in ("a/kernel", "b/bias")}
    np.savez(tmp_path / "weights.npz", **arrays)
    save_file(arrays, tmp_path / "weights.safetensors")
    for path in (tmp_path / "weights.npz", tmp_path / "weights.safetensors"):
        other = epath.Path(tmp_path / path.suffix)
        other.mkdir()
        about = run_folder._about(Source()) | {"init_sha256": files.sha256_of(path)}
        json_files.write_json(other / "data.json", about)
        yield path.name, functools.partial(_start_again, other), path
    square = np.eye(3) + 0.5
    np.savez(tmp_path / "ref.npz", mu=square[0], sigma=square @ square.T, num_images=9)
    values = lambda path: str(vars(read_reference(path).statistics))  # noqa: E731
    yield "reference", values, tmp_path / "ref.npz"
    cache = shutil.copy(tmp_path / "weights.npz", tmp_path / "cache.npz")
    images, labels = np.zeros((4, 8, 8, 1), np.float32), np.arange(4) % 2
    trusted = {files.sha256_of(cache)}

    def cached(path):
        describe = classifier.train_classifier(images, labels, 2, file=path, trusted=trusted)
        return jax.tree.map(np.ndarray.tolist, describe.args[1])

    yield "classifier", cached, cache


def test_no_flip_and_no_cut_is_silent(copy_of_trained, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(classifier, "_train", lambda *_: {"a": np.zeros(1)})
    rng = np.random.default_rng(0)
    for kind, read, path in _kinds(copy_of_trained, tmp_path):
        path = epath.Path(path)
        content, (right, said) = path.read_bytes(), _noticed(read, path, capsys)
        assert (right is not None, said) == (True, ""), kind
        damaged = [content[:cut] for cut in rng.integers(len(content), size=20)]
        for place, bit in rng.integers((len(content), 8), size=(40, 2)):
            flipped = bytearray(content)
            flipped[place] ^= 1 << int(bit)
            damaged.append(bytes(flipped))
        count = collections.Counter()
        for each in damaged:
            path.write_bytes(each)
            value, said = _noticed(read, path, capsys)
            count["noticed" if said else "harmless" if value == right else "silent"] += 1
        path.write_bytes(content)
        assert (count["silent"], count["noticed"] > 20) == (0, True), (kind, count)


def test_what_is_no_such_file_is_one_line(copy_of_trained, tmp_path, capsys):
    for kind, read, path in list(_kinds(copy_of_trained, tmp_path))[:7]:
        path = epath.Path(path)
        content = path.read_bytes()
        for each in HOSTILE:
            path.write_bytes(each)
            _noticed(read, path, capsys)
        path.unlink()
        path.mkdir()
        assert _noticed(read, path, capsys)[1], kind
        path.rmdir()
        path.write_bytes(content)


def test_a_name_with_a_dollar_is_drawn(tmp_path):
    with RunLog(tmp_path, num_steps=2, start_step=0, batch_size=1, show_progress=False) as log:
        log.write(1, {"a $ b $": 1.0})
    assert "a $ b $" in write_report(tmp_path).read_text()


def test_the_config_of_a_published_autoencoder_is_checked(tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text("{}")
    sha256 = files.sha256_of(tmp_path / "config.json")
    file = fetch.PublishedFile("config.json", 2, sha256, "there")
    monkeypatch.setattr(fetch, "PUBLISHED", {"vae": (file, file)})
    fetch.find_weights("vae", str(tmp_path))
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(BadInput, match="SHA-256"):
        fetch.find_weights("vae", str(tmp_path))


def test_an_old_run_is_read_with_one_line(capsys):
    json_files.tell_once.cache_clear()
    folder = ROOT / "tests" / "reference" / "old_run"
    mf_jax.load(folder)
    assert len(read_metrics(folder)) == 1
    assert capsys.readouterr().out.count("\n") == 1
