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
def folder(tmp_path, monkeypatch):
    """Return the folder of finished runs beside the page, their distance a quarter of FID."""
    for row in ROWS:
        d = row.published / 4 if row.published > 0 else 5.0
        scores = [{"steps": k, "frechet_distance": d / k, "class_accuracy": 1 / d} for k in (1, 2)]
        if row.run == "baseline":
            scores[0]["frechet_distance"] = 15.2
        real = {"name": "real data", "frechet_distance": 3.5, "class_accuracy": 0.99}
        result = {"config": CONFIGS[row.run], "num_steps": 1000, "rows": [real, *scores]}
        _write(tmp_path / ablations.RUNS, row.run, **result)
    (tmp_path / "docs").mkdir()
    shutil.copy(ROOT / "docs" / "ablations.md", tmp_path / "docs")
    monkeypatch.chdir(tmp_path)
    return ablations.RUNS


def _write(folder, run, **result):
    """Write a result, or change the one that is there."""
    path = folder / run / "result.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    there = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(there | result))


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
    config = CONFIGS["weight_0"] | {"weight": CONFIGS["weight_0"]["weight"] | {"p": 0.25}}
    _write(folder, "weight_0", config=config)
    for runs, words in (
        (folder, "weight_0: its result is of another config"),
        (folder / "none", "holds no finished run"),
    ):
        monkeypatch.setattr(ablations, "RUNS", runs)
        assert runner.main(ablations, ["--document"]) == 2
        assert words in capsys.readouterr().err


def test_the_page_gets_tables_and_plots_and_what_must_fail_is_checked(folder, capsys, monkeypatch):
    def save_one(path, group, results):
        plots.append(path.name)
        if group == "weight":
            save_picture(path, group, results)

    plots, save_picture = [], ablations.save_picture
    monkeypatch.setattr(ablations, "save_picture", save_one)
    _write(folder, "weight_2", diverged="why", rows=[])
    _write(folder, "share_0", rows=[{"steps": 1, "frechet_distance": 30.3}])
    (folder / "times_uniform" / "result.json").unlink()
    before = Path("docs/ablations.md").read_text()
    assert runner.main(ablations, ["--document"]) == 1
    assert capsys.readouterr().err == "ablations: share_0 must fail and does not\n"
    after = Path("docs/ablations.md").read_text()
    assert {
        "| (v, 0, 1) | **61.06** | **15.20** | **7.63** | **6.6%** |",
        "| p = 2 | 69.19 | diverged | diverged | – |",
        "| uniform | 65.9 | – | – | – |",
        "| 0 | – | 15.20 | 7.63 | 6.6% |",
    } <= {*after.splitlines()}
    prose = [[x for x in text.splitlines() if x[:1] != "|"] for text in (before, after)]
    assert prose[0] == prose[1]
    assert plots == [f"{group}.png" for group in ablations.GROUPS]
    assert 2_000 < Path("docs/ablations/weight.png").stat().st_size < 60_000
    assert all(f"(ablations/{name})" in after for name in plots[1:])
