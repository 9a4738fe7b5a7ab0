"""launch/ablations: its table of runs, what it skips and plans, and the document on made-up numbers."""

import json
import math
import shutil
import subprocess

import pytest
from conftest import ROOT

from launch.ablations import __main__ as command
from launch.ablations import analysis, document, runs, settings
from mf_jax.config import validate
from mf_jax.errors import BadInput

RUNS = {run.name: run for run in settings.all_runs()}
GROUPS = {group.name: group for group in settings.GROUPS}


def _result(run, distance, *, num_steps=settings.NUM_STEPS, **more):
    """Return a made-up result whose distance falls with the number of steps."""
    rows = [{"name": "real data", "frechet_distance": 3.5, "class_accuracy": 0.99}]
    rows += [
        {
            "name": f"{k} steps",
            "steps": k,
            "frechet_distance": distance / k,
            "class_accuracy": 1 / distance,
        }
        for k in (1, 2, 8)
    ]
    config = runs.decisive_sections(settings.make_config(run, num_steps))
    made = {"config": config, "num_steps": num_steps, "diverged": False, "machine": "2 CPU cores"}
    return made | {"rows": rows, "seconds": 60.0, "step_flops": 2e9} | more


@pytest.fixture
def results():
    """Return results in the order that was published: our distance is a quarter of the published one."""
    made = {}
    for group in settings.GROUPS:
        for setting in group.settings:
            made.setdefault(
                setting.run, _result(RUNS[setting.run], (setting.published or 20.0) / 4)
            )
    for run, distance in zip(settings.SEEDS, (15.2, 15.3, 15.1), strict=True):
        made[run] = _result(RUNS[run], distance)
    return made


def _diverge(results, run):
    results[run] = results[run] | {"diverged": True, "rows": []}


@pytest.fixture
def folder(tmp_path, results):
    for name, result in results.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "result.json").write_text(json.dumps(result))
    return tmp_path


def test_every_setting_of_the_papers_table_is_there():
    sizes = {name: len(group.settings) for name, group in GROUPS.items()}
    paper = {
        "tangent": 4,
        "share": 4,
        "conditioning": 4,
        "times": 5,
        "weight": 5,
        "omega": 5,
        "kappa": 3,
    }
    assert sizes == paper | {"objectives": 15}
    for name in paper:
        assert all(setting.published for setting in GROUPS[name].settings)
    best = {
        name: min(GROUPS[name].settings, key=lambda setting: setting.published).published
        for name in paper
    }
    assert set(best.values()) == {61.06, 15.53, 18.63}


def test_settings_that_coincide_are_one_run_of_one_config():
    named = {}
    for group in settings.GROUPS:
        for setting in group.settings:
            assert named.setdefault(setting.run, setting.overrides) == setting.overrides
    assert set(RUNS) == set(named) | set(settings.SEEDS)
    configs = [runs.decisive_sections(settings.make_config(run)) for run in RUNS.values()]
    assert all(config not in configs[:i] for i, config in enumerate(configs))


@pytest.mark.parametrize("run", RUNS.values(), ids=RUNS)
def test_every_run_has_a_valid_config(run):
    validate(settings.make_config(run, num_steps=300), num_devices=1)


def test_the_baseline_has_the_papers_settings():
    config = settings.make_config(RUNS["baseline"])
    times = config.times
    assert (times.name, times.t_mean, times.t_std, times.r_mean, times.r_std) == (
        "logit_normal", -0.4, 1.0, -0.4, 1.0,
    )  # fmt: skip
    assert (config.draws.instant_share, config.draws.label_drop_share, config.weight.p) == (
        0.75,
        0.1,
        1.0,
    )
    assert (config.objective.tangent, config.model.time_conditioning) == ("v01", "t,t-r")


def test_settings_of_kappa_share_the_effective_scale():
    for setting in GROUPS["kappa"].settings:
        guidance = settings.make_config(RUNS[setting.run]).guidance
        assert guidance.omega / (1 - guidance.kappa) == pytest.approx(2)


def test_only_one_group_is_run_and_an_unknown_one_is_refused():
    assert [run.name for run in settings.all_runs("kappa")] == ["omega_2", "kappa_05", "kappa_09"]
    with pytest.raises(BadInput, match=r"--only=sharer.*did you mean share"):
        settings.all_runs("sharer")
    assert command.main(["--only=sharer"]) == 2


def test_an_equal_budget_buys_fewer_of_dearer_steps(tmp_path):
    counted = []

    def count(config):
        counted.append(config.objective.name)
        return 3e9 if config.objective.name == "terminal_velocity" else 1.5e9

    flops = runs.Flops(tmp_path / "flops.json", count)
    assert runs.planned_steps(RUNS["objective_terminal"], flops) == settings.NUM_STEPS / 2
    assert runs.planned_steps(RUNS["objective_meanflow"], flops) == settings.NUM_STEPS
    assert runs.planned_steps(RUNS["tangent_v00"], flops) == settings.NUM_STEPS
    again = runs.Flops(tmp_path / "flops.json", count)
    assert again.of(RUNS["objective_terminal"]) == 3e9
    assert counted == ["meanflow", "terminal_velocity"]  # each once: the file remembers
    assert runs.affordable_steps(10.0, 1e9) == 1


def test_flops_of_a_step_are_counted_in_the_compiled_step():
    tiny = {
        "model.name": "affine",
        "model.width": 16,
        "train.batch_size": 16,
    }  # and no derivative: quick to compile
    tiny |= {"objective.name": "flow_matching", "draws.instant_share": 1.0}
    flops = runs.step_flops(settings.make_config(settings.Run("", tiny)))
    matrix = 2 * 16 * 64 * 64  # A(r, t) z of a batch, forward alone
    assert 2 * matrix < flops < 1000 * matrix


def test_finished_runs_are_skipped_and_others_executed(folder, monkeypatch, capsys):
    trained = []
    monkeypatch.setattr(runs.train, "run", lambda config, workdir: trained.append(workdir.name))

    def stop(config, workdir):
        raise FloatingPointError("step 3: loss not finite")

    chosen = [RUNS[name] for name in ("baseline", "weight_0")]
    flops = runs.Flops(folder / "flops.json")
    runs.run_all(chosen, folder, flops)
    assert trained == []
    assert "baseline: already finished" in capsys.readouterr().out
    (folder / "weight_0" / "result.json").unlink()
    monkeypatch.setattr(runs.train, "run", stop)
    runs.run_all(chosen, folder, flops)
    assert "diverged" in capsys.readouterr().out
    assert runs.finished(RUNS["weight_0"], folder)["why"] == "step 3: loss not finite"


def test_a_result_of_another_config_is_refused(folder):
    path = folder / "weight_0" / "result.json"
    result = json.loads(path.read_text())
    result["config"]["weight"]["p"] = 0.25
    path.write_text(json.dumps(result))
    with pytest.raises(BadInput, match=r"weight_0.*another config"):
        analysis.read_results(folder)
    with pytest.raises(BadInput, match="another config"):
        runs.finished(RUNS["baseline"], folder, num_steps=999)


def test_no_results_are_refused(tmp_path):
    with pytest.raises(BadInput, match="holds no finished run"):
        analysis.read_results(tmp_path)


def test_a_training_that_was_told_to_stop_is_not_evaluated(tmp_path, monkeypatch):
    class Saved:
        steps = (250,)

        def close(self):
            pass

    monkeypatch.setattr(runs.train, "run", lambda config, workdir: None)
    monkeypatch.setattr(runs, "Checkpoints", lambda *args, **more: Saved())
    with pytest.raises(runs.Stopped, match="at step 250"):
        runs.execute(RUNS["baseline"], tmp_path, runs.Flops(tmp_path / "flops.json"))
    assert runs.finished(RUNS["baseline"], tmp_path) is None


def test_noise_is_the_spread_over_seeds():
    noise = analysis.Noise((10.0, 11.0, 12.1))
    assert noise.deviation == pytest.approx(math.log(1.1))
    assert noise.ratio == pytest.approx(1.1 ** (2 * math.sqrt(2)))
    assert noise.tells_apart(10, 20)
    assert not noise.tells_apart(10, 12)
    assert noise.tells_apart(10, math.inf)
    assert not noise.tells_apart(math.inf, math.inf)


def test_agreement_names_the_best_the_pairs_and_the_rank_correlation():
    noise = analysis.Noise((10.0, 10.1))
    rows = [("a", 1.0, 10.0), ("b", 2.0, 20.0), ("c", 3.0, 30.0)]
    assert analysis.agreement(rows, noise) == (
        "The best setting is the published one, a. Pairs of settings: 3 in the published order, 0 in the opposite "
        "one, 0 too close to tell apart here. Rank correlation (Spearman) 1.00 over 3 settings."
    )
    assert analysis.disagreements(rows, noise) == ""
    rows = [("a", 1.0, 30.0), ("b", 2.0, 20.0), ("c", 3.0, 20.1)]
    text = analysis.agreement(rows, noise)
    assert (
        "best setting here is b (20.00), the published best is a (30.00 here): they differ by more"
        in text
    )
    assert "0 in the published order, 2 in the opposite one, 1 too close" in text
    assert analysis.disagreements(rows, noise).startswith(
        "b beats a (20.00 to 30.00; published 2 to 1); c beats a"
    )
    assert "Too few" in analysis.agreement(rows[:1], noise)


def test_a_diverged_setting_is_the_worst():
    noise = analysis.Noise((10.0, 10.1))
    rows = [("a", 1.0, math.inf), ("b", 2.0, 20.0)]
    assert analysis.disagreements(rows, noise) == "b beats a (20.00 to diverged; published 2 to 1)"


def test_checks_pass_where_what_must_fail_fails(results):
    found = analysis.checks(results)
    assert len(found) == 4
    assert all(check.passed for check in found)
    _diverge(results, "tangent_v10")
    assert all(check.passed for check in analysis.checks(results))
    results["share_0"] = _result(RUNS["share_0"], 16.0)
    assert [check.passed for check in analysis.checks(results)] == [True, True, True, False]


def test_document_tells_tables_sentences_and_pictures(results, tmp_path):
    _diverge(results, "weight_2")
    del results["times_uniform"]
    failed = document.write_document(results, tmp_path / "ablations.md", tmp_path / "ablations")
    text = (tmp_path / "ablations.md").read_text()
    assert failed == []
    assert (
        f"{len(RUNS) - 1} of {len(RUNS)} finished; diverged: weight_2. Wall time: {len(RUNS) - 1} minutes"
        in text
    )
    assert "| (v, 0, 1) | **61.06** | **15.20** | **7.60** | **6.6%** |" in text
    assert "| p = 2 | 69.19 | diverged | diverged | – |" in text
    assert "| uniform (not run) | 65.9 | – | – | – |" in text
    assert "| MeanFlow | 3.43 | 2,000 | 1,000 | 0.86 |" in text
    assert (
        "Order here, at one step: alpha-Flow (0.74), SoFlow (0.74), improved MeanFlow (0.75)"
        in text
    )
    assert text.rstrip().splitlines()[-1].startswith("No pair of settings is in the opposite order")
    for group in settings.GROUPS:
        picture = tmp_path / "ablations" / f"{group.name}.png"
        assert f"(ablations/{group.name}.png)" in text
        assert 2_000 < picture.stat().st_size < 60_000


def test_contradictions_are_written_from_the_numbers(results):
    results["omega_5"] = _result(RUNS["omega_5"], 60.0)
    text = document.document(results)
    section = text.split("## Where digits do not agree with the paper")[1]
    assert "**Scale omega of the guidance in the target**: omega = 1 beats omega = 5" in section
    assert "Power p" not in section.split("No pair")[0]


def test_document_of_the_baseline_alone():
    text = document.document({"baseline": _result(RUNS["baseline"], 15.0)})
    assert "Not checked" in text
    assert "has not been run with several seeds" in text
    assert "Too few settings are finished to compare." in text


def test_a_failing_check_is_one_line_and_the_exit_code(folder, monkeypatch, capsys):
    (folder / "share_0" / "result.json").write_text(json.dumps(_result(RUNS["share_0"], 16.0)))
    monkeypatch.setattr(document, "save_plot", lambda *args: None)
    for name, path in {
        "RUNS": folder,
        "DOCUMENT": folder / "a.md",
        "PICTURES": folder / "a",
    }.items():
        monkeypatch.setattr(command, name, path)
    assert command.main(["--document"]) == 1
    errors = capsys.readouterr().err.splitlines()
    assert errors == [
        "ablations: failed: no rows with r < t: 16.00 at one step is not at least 2 times the baseline's 15.20"
    ]


def test_the_script_passes_arguments_on(tmp_path):
    (tmp_path / "bin").mkdir()
    stub = tmp_path / "bin" / "python"
    stub.write_text('#!/usr/bin/env bash\necho "$JAX_COMPILATION_CACHE_DIR python $*"\n')
    stub.chmod(0o755)
    shutil.copy(ROOT / "requirements.txt", tmp_path / ".installed")
    done = subprocess.run(
        ["bash", str(ROOT / "launch/ablations.sh"), "--document"],
        env={"PATH": "/usr/bin:/bin", "MF_VENV": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=30,
        check=True,
    )
    assert done.stdout == f"{ROOT}/runs/ablations/compiled python -m launch.ablations --document\n"
