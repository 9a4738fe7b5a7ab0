"""Files that are written whole or not at all; a workdir in a bucket, here a folder in disguise."""

import contextlib
import errno
import json
import os
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from etils.epath.backend import fsspec_backend
from jobs import assert_refused, here

from mf_jax import train
from mf_jax.flow.errors import Failure
from mf_jax.main import _say_anything
from mf_jax.reporting import run_log as report
from mf_jax.reporting.page import write_report
from mf_jax.reporting.run_log import RunLog, read_metrics
from mf_jax.reporting.sample_grid import few_classes, save_sample_grid
from mf_jax.runtime import files
from mf_jax.runtime.checkpoint import Checkpoints, saved_steps
from mf_jax.runtime.files import absolute, in_bucket, locked, replace_file, written_aside
from mf_jax.step import TrainState


def test_a_file_is_replaced_as_a_whole(tmp_path):
    """What killed processes have left is tidied up after a day, not before."""
    path = tmp_path / "file"
    replace_file(path, b"old")
    with contextlib.suppress(RuntimeError), written_aside(epath.Path(path)) as aside:
        epath.Path(aside).write_bytes(b"half")
        raise RuntimeError
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("file", b"old")]
    for name in (".file.a.1.part", ".file.b.1.part", ".other.a.1.part"):
        (tmp_path / name).touch()
        if ".a." in name:
            os.utime(tmp_path / name, (0, 0))
    replace_file(path, b"new")
    left = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert left == {"file": b"new", ".file.b.1.part": b"", ".other.a.1.part": b""}


def test_a_checkpoint_is_whole_in_a_folder_of_any_name(tmp_path, monkeypatch):
    """Else training ends with an error; and the page of the run is written."""
    state = TrainState(np.int32(1), {"a": np.arange(4.0, dtype=np.float32)}, {}, {}, {}, -1)
    like = jax.eval_shape(lambda: jax.tree.map(jnp.asarray, state))
    for name in ("lr[1]", "[", "a*b?", "caf\udce9", "x y%#\n"):
        folder = epath.Path(tmp_path) / name / "run"
        folder.mkdir(parents=True)
        with contextlib.closing(Checkpoints(folder)) as checkpoints:
            checkpoints.save(jax.tree.map(jnp.asarray, state))
            checkpoints.verify()
            restored = checkpoints.restore_state(like)
        np.testing.assert_array_equal(restored.params["a"], state.params["a"])
        replace_file(folder / "config.json", json.dumps({"path": name}).encode())
        assert write_report(folder).exists()
    monkeypatch.setattr(type(folder), "glob", files._glob_of_etils)
    with contextlib.closing(Checkpoints(tmp_path / "lr[1]" / "other")) as checkpoints:
        checkpoints.save(jax.tree.map(jnp.asarray, state))
        with pytest.raises(Failure, match=r"other.*/1 was saved and cannot be read"):
            checkpoints.verify()


def test_output_takes_every_letter_and_outlives_its_reader(tmp_path):
    reader, writer = os.pipe()
    os.close(reader)
    for place in (tmp_path / "out", writer):
        with open(place, "w", encoding="ascii") as stream:
            _say_anything(stream)
            print("a \u2014 \u732b \udce9", file=stream, flush=True)
            print("more", file=stream, flush=True)
    assert (tmp_path / "out").read_text() == "a \\u2014 \\u732b \\udce9\nmore\n"


def test_a_bucket_takes_a_run_and_knows_no_locks(bucket, tmp_path, monkeypatch):
    path, folder = bucket
    events = []  # their writer has its own way into buckets
    opened = lambda where, _: events.append(str(where)) or mock.MagicMock()  # noqa: E731
    monkeypatch.setattr(report, "_Events", opened)
    settings = {"num_steps": 4, "batch_size": 2, "is_shown": False}
    with RunLog(path, start_step=0, **settings) as log:
        log.write(1, {"loss": 3.0})
        assert read_metrics(path) == [{"step": 1, "loss": 3.0}]
        log.write(2, {"loss": 2.0})
    with RunLog(path, start_step=1, **settings) as log:
        log.write(2, {"loss": 1.0})
    assert events == ["gs://runs/first/tensorboard"] * 2
    assert read_metrics(path) == [{"step": 1, "loss": 3.0}, {"step": 2, "loss": 1.0}]
    images = np.zeros((4, 8, 8, 1), np.uint8)
    save_sample_grid(path / "samples.png", images, few_classes(4, 0), ())
    replace_file(path / "config.json", b'{"seed": 0}')
    write_report(path)
    for name in ("metrics.jsonl", "samples.png", "timing.json", "report.html"):
        assert (folder / name).exists()
    (folder / "checkpoints" / "7").mkdir(parents=True)
    (folder / "checkpoints" / "7" / "commit_success.txt").touch()
    assert saved_steps(path) == [7]
    for place in (str(path), "/here"):
        assert (str(absolute(place)), in_bucket(epath.Path(place))) == (place, "gs:" in place)
    assert str(absolute("here")) == os.path.abspath("here")
    with locked(path / ".lock", wait=False), locked(path / ".lock", wait=False):
        pass
    local = epath.Path(tmp_path) / ".lock"
    with locked(local, wait=False), pytest.raises(BlockingIOError), locked(local, wait=False):
        pass


def test_what_the_machine_lacks_is_one_line(tmp_path, monkeypatch):
    workdir, asked = tmp_path / "run", jax.config.jax_platforms
    reason = f"mf_jax: --workdir={workdir}: No space left on device; make room, and the same "
    for error in (  # of the system, or of the library that writes checkpoints
        OSError(errno.ENOSPC, "No space left on device"),
        ValueError("RESOURCE_EXHAUSTED: No space left on device [os_error_code='28']"),
    ):
        with mock.patch.object(train, "run", side_effect=error):
            code, _, errors = here("--config=configs/digits.py", f"--workdir={workdir}")
        assert (code, errors) == (1, reason + "command continues\n")
    lacking = "Please install gcsfs to access Google Storage"
    fs = mock.Mock(side_effect=ImportError(lacking))
    monkeypatch.setattr(type(fsspec_backend), "fs", fs)
    ended = here("--config=configs/digits.py", "--workdir=gs://bucket/run")
    assert_refused(ended, f"mf_jax: {lacking}; pip")
    monkeypatch.setattr(jax, "devices", mock.Mock(side_effect=AssertionError))
    jax.config.update("jax_platforms", "cuda")
    try:
        assert_refused(here("--config=configs/digits.py"), "JAX_PLATFORMS=cuda")
    finally:
        jax.config.update("jax_platforms", asked)
