"""What several test files share: a small run, trained once, and the command line as a function."""

import fcntl
import gc
import os
import shutil
import tempfile
from pathlib import Path

import jax
import numpy as np
import pytest
from etils import epath
from etils.epath.backend import fsspec_backend
from fsspec.implementations.dirfs import DirFileSystem
from fsspec.implementations.local import LocalFileSystem
from jobs import PICTURES, works
from jobs import ROOT as ROOT
from jobs import TINY as TINY
from recorded import DIFFERENCES, FOLDER

from mf_jax.flow.errors import BadInput


def pytest_configure(config):
    """Let this process and its children share what they compile and read."""
    gc.set_threshold(100_000, 50, 100)  # tracing makes many objects, and few are in cycles
    if "PYTEST_XDIST_WORKER" in os.environ:
        return  # the environment has come down from the process that started this one
    config.compiled = tempfile.TemporaryDirectory()
    os.environ["MF_CACHE"] = config.compiled.name  # and not the folder of the user
    settings = {
        "jax_compilation_cache_dir": config.compiled.name,
        "jax_persistent_cache_min_compile_time_secs": 0.3,  # to write a small one takes longer
        "jax_persistent_cache_enable_xla_caches": "none",
    }
    for name, value in settings.items():
        os.environ[name.upper()] = str(value)
        jax.config.update(name, value)  # which this process has read already
    # compiling takes most of the time of the tests, running what was compiled very little
    flags = [os.environ.get("XLA_FLAGS", ""), "--xla_backend_optimization_level=0"]
    if jax.__version_info__ < (0, 11):  # XLA ends the process at an option that it does not know
        flags += ["--xla_cpu_use_fusion_emitters=false", "--xla_cpu_parallel_codegen_split_count=1"]
    os.environ["XLA_FLAGS"] = " ".join(flags)


def pytest_addoption(parser):
    told = "tell how far recorded numbers of published code are from ours"
    parser.addoption("--differences", action="store_true", help=told)


@pytest.fixture(autouse=True)
def _differences(record_property):
    DIFFERENCES.clear()
    yield
    for name, error in DIFFERENCES.items():
        record_property(name, error)


def pytest_terminal_summary(terminalreporter, config):
    if not config.getoption("--differences"):
        return
    for report in terminalreporter.getreports(""):  # of teardowns, among others
        found = ", ".join(f"{name} {error:.1e}" for name, error in report.user_properties)
        if found:
            terminalreporter.write_line(f"{report.nodeid.partition('::')[2]}: {found}")


def pytest_unconfigure(config):
    if hasattr(config, "compiled"):
        config.compiled.cleanup()


@pytest.fixture(autouse=True)
def _in_the_checkout(monkeypatch):
    monkeypatch.chdir(ROOT)


@pytest.fixture
def float64():
    with jax.enable_x64(True):
        yield


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.fixture(scope="session")
def recorded_scores():
    return dict(np.load(FOLDER / "metrics.npz"))


def refuses(message, act, *arguments, **more):
    """Check that an act is refused in one line that matches a message."""
    with pytest.raises(BadInput, match=message) as problem:
        act(*arguments, **more)
    assert "\n" not in str(problem.value)


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """Return the workdir of a tiny finished run of configs/digits.py; do not change it."""
    base = tmp_path_factory.getbasetemp()
    folder = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base  # one run for all
    workdir = folder / "trained"
    with (folder / "trained.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not workdir.exists():
            works(f"--config={ROOT}/configs/digits.py", f"--workdir={workdir}", *TINY, PICTURES)
    return workdir


@pytest.fixture
def copy_of_trained(trained, tmp_path):
    """Return a copy of the finished run that a test may change."""
    return Path(shutil.copytree(trained, tmp_path / "run"))


@pytest.fixture
def bucket(tmp_path, monkeypatch):
    """Return a gs:// path, and the folder where its files are in truth."""

    class Bucket(DirFileSystem):
        def _join(self, path):
            return super()._join(path.removeprefix("gs://"))

    files = Bucket(path=str(tmp_path), fs=LocalFileSystem(auto_mkdir=True))
    monkeypatch.setattr(type(fsspec_backend), "fs", lambda self, path: files)
    return epath.Path("gs://runs/first"), tmp_path / "runs" / "first"
