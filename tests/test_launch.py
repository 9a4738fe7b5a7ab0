"""The launch scripts, with a stand-in for the environment's interpreter that tells what it was called with."""

import shutil
import signal
import subprocess

import pytest
from conftest import ROOT

STUB = """#!/usr/bin/env bash
echo "python $*"
case "$*" in
  *wait*) trap 'echo saved; exit 0' TERM; echo waiting; while :; do read -t 0.1 <> <(:) || true; done ;;
  *fail*) exit 7 ;;
esac
"""


@pytest.fixture
def launch(tmp_path):
    """Return a function that starts a launch script with a stand-in interpreter that needs no installation."""
    (tmp_path / "bin").mkdir()
    stub = tmp_path / "bin" / "python"
    stub.write_text(STUB)
    stub.chmod(0o755)
    shutil.copy(ROOT / "requirements.txt", tmp_path / ".installed")

    def start(script, *arguments):
        return subprocess.Popen(
            ["bash", str(ROOT / "launch" / script), *arguments],
            env={"PATH": "/usr/bin:/bin", "MF_VENV": str(tmp_path)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    return start


def _lines(process):
    out, errors = process.communicate(timeout=30)
    return process.returncode, out.splitlines(), errors


def test_local_trains_evaluates_and_samples_digits(launch):
    main = "python -m mf_jax.main --config=configs/digits.py --mode="
    assert _lines(launch("local.sh")) == (0, [main + "train", main + "eval", main + "sample"], "")


def test_local_passes_arguments_on_and_a_config_replaces_the_default(launch):
    _, lines, _ = _lines(
        launch("local.sh", "--config=configs/toy2d.py", "--config.data.toy=two_moons")
    )
    assert (
        lines[0]
        == "python -m mf_jax.main --config=configs/toy2d.py --config.data.toy=two_moons --mode=train"
    )
    assert len(lines) == 3


def test_local_runs_a_given_mode_alone(launch):
    _, lines, _ = _lines(launch("local.sh", "--mode=sample"))
    assert lines == ["python -m mf_jax.main --config=configs/digits.py --mode=sample"]


def test_local_dry_run_prints_what_can_be_pasted_and_installs_nothing(launch, tmp_path):
    (tmp_path / ".installed").write_text("jax==0.1\n")
    code, lines, errors = _lines(launch("local.sh", "--dry-run", "--workdir=runs/a b"))
    main = f"{tmp_path}/bin/python -m mf_jax.main --config=configs/digits.py '--workdir=runs/a b' --mode="
    assert (code, lines, errors) == (0, [main + "train", main + "eval", main + "sample"], "")


def test_local_stops_at_the_first_failure_with_its_exit_code(launch):
    code, lines, _ = _lines(launch("local.sh", "--workdir=fail"))
    assert (code, len(lines)) == (7, 1)


def test_sigterm_reaches_the_run_and_ends_the_script(launch):
    process = launch("local.sh", "--workdir=wait")
    assert process.stdout.readline().startswith("python")
    assert process.stdout.readline() == "waiting\n"
    process.send_signal(signal.SIGTERM)
    assert _lines(process) == (0, ["saved"], "")


def test_test_script_checks_style_and_passes_arguments_to_pytest(launch):
    _, lines, _ = _lines(launch("test.sh", "-k", "draws"))
    assert lines[:2] == ["python -m ruff check .", "python -m ruff format --check ."]
    assert lines[2].startswith("python -m pytest ")
    assert lines[2].endswith(" -k draws")


def test_an_installation_is_announced_and_tried_when_requirements_change(launch, tmp_path):
    (tmp_path / ".installed").write_text("jax==0.1\n")
    _, lines, _ = _lines(launch("local.sh"))
    assert "installing" in lines[0]
    assert any("pip install" in line for line in lines)
