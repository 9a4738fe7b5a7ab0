"""The launch scripts, with an interpreter that only tells what it was called with."""

import signal
import subprocess
from fnmatch import fnmatch

import pytest
from conftest import ROOT
from fakes import INSTALLED

STUB = """#!/usr/bin/env bash
echo "python $*"
case "$*" in
  *wait*)
    trap 'echo saved; exit 0' TERM
    echo waiting
    while :; do read -t 0.1 <> <(:) || true; done
    ;;
  *fail*) exit 7 ;;
esac
"""

MODES = ("train", "eval", "sample")


@pytest.fixture
def launch(tmp_path):
    """Return a function that starts a launch script with this interpreter, as if installed."""
    (tmp_path / "bin").mkdir()
    stub = tmp_path / "bin" / "python"
    stub.write_text(STUB)
    stub.chmod(0o755)
    (tmp_path / ".installed").write_text(INSTALLED)

    def start(script, *arguments):
        command = ["bash", str(ROOT / "launch" / script), *arguments]
        env, pipe = {"PATH": "/usr/bin:/bin", "MF_VENV": str(tmp_path)}, subprocess.PIPE
        return subprocess.Popen(command, env=env, stdout=pipe, stderr=pipe, text=True)

    return start


def _lines(process):
    out, errors = process.communicate(timeout=30)
    return process.returncode, out.splitlines(), errors


def test_local_passes_arguments_to_the_modes_and_stops_where_one_fails(launch):
    """A config replaces the default; a mode that is given runs alone."""
    main = "python -m mf_jax.main --config=configs/"
    toy = ("--config=configs/toy2d.py", "--config.data.toy=two_moons")
    for arguments, code, lines in (
        ((), 0, [f"{main}digits.py --mode={mode}" for mode in MODES]),
        (toy, 0, [f"{main}toy2d.py {toy[1]} --mode={mode}" for mode in MODES]),
        (("--mode=sample",), 0, [f"{main}digits.py --mode=sample"]),
        (("--workdir=fail",), 7, [f"{main}digits.py --workdir=fail --mode=train"]),
    ):
        assert _lines(launch("local.sh", *arguments))[:2] == (code, lines)


def test_local_dry_run_prints_what_can_be_pasted_and_installs_nothing(launch, tmp_path):
    """Without it, an installation is announced and tried where requirements have changed."""
    (tmp_path / ".installed").write_text("jax==0.1\n")
    code, lines, errors = _lines(launch("local.sh", "--dry-run", "--workdir=runs/a b"))
    main = f"{tmp_path}/bin/python -m mf_jax.main --config=configs/digits.py '--workdir=runs/a b'"
    assert (code, errors) == (0, "")
    assert lines == [f"{main} --mode={mode}" for mode in MODES]
    _, lines, _ = _lines(launch("local.sh"))
    assert "installing" in lines[0]
    assert any("pip install" in line for line in lines)


def test_sigterm_reaches_the_run_and_ends_the_script(launch):
    process = launch("local.sh", "--workdir=wait")
    assert process.stdout.readline().startswith("python")
    assert process.stdout.readline() == "waiting\n"
    process.send_signal(signal.SIGTERM)
    assert _lines(process) == (0, ["saved"], "")


def test_test_script_checks_style_and_passes_arguments_to_pytest(launch):
    _, (*checks, tests), _ = _lines(launch("test.sh", "-k", "draws"))
    assert checks == ["python -m ruff check .", "python -m ruff format --check ."]
    assert fnmatch(tests, "python -m pytest * -k draws")
