"""Compiled programs are kept between processes, and nothing about their folder stops a run."""

import jax
import numpy as np
import pytest
from jax.experimental.compilation_cache.compilation_cache import reset_cache

from mf_jax.runtime import compile_cache

KEYS = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")


@pytest.fixture
def keep(monkeypatch, capsys):
    """Return a function of $MF_CACHE and JAX's own folder: (the folder used, stderr)."""
    before = {key: getattr(jax.config, key) for key in KEYS}

    def call(value, own=None):
        jax.config.update(KEYS[0], own)
        monkeypatch.setenv(compile_cache.ENVIRONMENT_VARIABLE, str(value))
        compile_cache.keep_programs()
        reset_cache()  # as in a new process
        return jax.config.jax_compilation_cache_dir, capsys.readouterr().err

    yield call
    for key, value in before.items():
        jax.config.update(key, value)
    reset_cache()


def _compile():
    jax.clear_caches()
    np.testing.assert_array_equal(jax.jit(lambda x: x * 1.625)(np.ones(3)), np.full(3, 1.625))


def test_programs_are_kept_where_the_user_says(keep, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    folder = tmp_path / "kept"
    assert [keep(value) for value in ("", "off")] == [(None, "")] * 2
    assert keep(folder, own="/of/jax") == ("/of/jax", "")
    assert not folder.exists()
    assert keep("~/kept") == (str(tmp_path / "home" / "kept"), "")
    written = []
    for _ in range(2):
        assert keep(folder) == (str(folder), "")
        _compile()
        written.append({path: path.stat().st_mtime_ns for path in folder.iterdir()})
    assert written[0] == written[1] != {}
    for path in written[0]:  # of a process that was killed while it wrote
        path.write_bytes(path.read_bytes()[:-9])
    keep(folder)
    with pytest.warns(UserWarning, match="Error reading persistent compilation cache"):
        _compile()
    monkeypatch.setattr(compile_cache, "_MOST_BYTES", 0)
    keep(folder)
    assert list(folder.iterdir()) == []


def test_a_folder_that_cannot_be_written_is_one_line(keep, tmp_path):
    (tmp_path / "file").touch()
    for bad in (tmp_path / "file", tmp_path / "file" / "kept", "/proc/kept", "~nobody-here/kept"):
        used, said = keep(bad)
        assert (used, said.count("\n")) == (None, 1)
        assert str(bad) in said
        assert "MF_CACHE=off" in said
        _compile()
