"""launch/ablations.py: its table of runs, what it skips, and the page on made-up numbers."""

import json
import math
import shutil
from pathlib import Path
from unittest import mock

import pytest
from conftest import ROOT

from launch import ablations, runner
from launch.ablations import ROWS, make_config
from launch.runner import decisive, runs_of, score, train
from mf_jax.validation import validate

RUNS = {row.run: row for row in runs_of(ROWS)}
CONFIGS = {name: decisive(make_config(row)) for name, row in RUNS.items()}


@pytest.fixture
def results():
    """Return results in the published order: our distance is a quarter of the published one."""
    made = {}
    for row in reversed(ROWS):
        rows = [{"name": "real data", "frechet_distance": 3.5, "class_accuracy": 0.99}]
        d = row.published / 4 if row.published > 0 else 5.0
        rows += [{"steps": k, "frechet_distance": d / k, "class_accuracy": 1 / d} for k in (1, 2)]
        result = {"config": CONFIGS[row.run], "num_steps": 1000, "rows": rows}
        made.setdefault(row.run, result)
    made["baseline"]["rows"][1]["frechet_distance"] = 15.2
    return made


@pytest.fixture
def folder(tmp_path, results, monkeypatch):
    """Return the folder of finished runs in a current folder that has the page too."""
    for name, result in results.items():
        (tmp_path / ablations.RUNS / name).mkdir(parents=True)
        (tmp_path / ablations.RUNS / name / "result.json").write_text(json.dumps(result))
    (tmp_path / "docs").mkdir()
    shutil.copy(ROOT / "docs" / "ablations.md", tmp_path / "docs")
    monkeypatch.chdir(tmp_path)
    return ablations.RUNS


def test_each_run_has_one_valid_config_of_its_own():
    for row in ROWS:
        assert row.overrides == RUNS[row.run].overrides, row.run
    assert len({json.dumps(config) for config in CONFIGS.values()}) == len(RUNS) == 26
    config = make_config(ROWS[0])
    validate(config, num_devices=1)
    assert (config.times.name, config.times.t_mean, config.times.r_std) == ("logit_normal", -0.4, 1)
    assert (config.draws.instant_share, config.draws.label_drop_share) == (0.75, 0.1)
    assert (config.weight.p, config.objective.tangent, config.seed) == (1.0, "v01", 0)
    for row in runs_of(ROWS, "kappa"):
        guidance = make_config(row).guidance
        assert guidance.omega / (1 - guidance.kappa) == pytest.approx(2)


def test_finished_runs_are_skipped_and_others_executed(folder, monkeypatch, capsys):
    diverge = mock.Mock(side_effect=FloatingPointError("step 3: loss not finite"))
    monkeypatch.setattr(train, "run", diverge)
    monkeypatch.setattr(ablations, "save_picture", lambda *arguments: None)
    (folder / "weight_0" / "result.json").unlink()
    assert runner.main(ablations, ["--only=weight"]) == 0
    assert capsys.readouterr().out.splitlines()[:1] == ["[1/5] weight_0"]
    result = json.loads((folder / "weight_0" / "result.json").read_text())
    assert result["diverged"] == "step 3: loss not finite"
    assert score({"weight_0": result}, "weight_0") == math.inf
    table = runner.as_table("abc", {"recall": ([0.5, math.inf, 0.7], ".1f", max)})
    assert table.splitlines()[3:] == ["| b | diverged |", "| c | **0.7** |"]


def test_results_of_another_config_and_no_results_are_refused(folder, monkeypatch, capsys):
    path = folder / "weight_0" / "result.json"
    path.write_text(path.read_text().replace('"p": 0.0', '"p": 0.25'))
    assert runner.main(ablations, ["--document"]) == 2
    message = capsys.readouterr().err
    assert "weight_0" in message
    assert "another config" in message
    monkeypatch.setattr(ablations, "RUNS", folder / "none")
    assert runner.main(ablations, ["--document"]) == 2
    assert "holds no finished run" in capsys.readouterr().err


def test_the_page_gets_tables_and_plots_and_what_must_fail_is_checked(
    folder, results, capsys, monkeypatch
):
    def save_one(path, group, results):
        plots.append(path.name)
        if group == "weight":
            save_picture(path, group, results)

    plots, save_picture = [], ablations.save_picture
    monkeypatch.setattr(ablations, "save_picture", save_one)
    results["weight_2"].update(diverged="why", rows=[])
    results["share_0"]["rows"][1]["frechet_distance"] = 30.3
    for name in ("weight_2", "share_0"):
        (folder / name / "result.json").write_text(json.dumps(results[name]))
    (folder / "times_uniform" / "result.json").unlink()
    before = Path("docs/ablations.md").read_text()
    assert runner.main(ablations, ["--document"]) == 1
    assert capsys.readouterr().err == "ablations: share_0 must fail and does not\n"
    after = Path("docs/ablations.md").read_text()
    for line in (
        "| (v, 0, 1) | **61.06** | **15.20** | **7.63** | **6.6%** |",
        "| p = 2 | 69.19 | diverged | diverged | – |",
        "| uniform | 65.9 | – | – | – |",
        "| 0 | – | 15.20 | 7.63 | 6.6% |",
    ):
        assert line in after.splitlines(), line
    prose = [[x for x in text.splitlines() if x[:1] != "|"] for text in (before, after)]
    assert prose[0] == prose[1]
    assert plots == [f"{group}.png" for group in ablations.GROUPS]
    assert 2_000 < Path("docs/ablations/weight.png").stat().st_size < 60_000
    assert all(f"(ablations/{name})" in after for name in plots[1:])
