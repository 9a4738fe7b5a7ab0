"""launch/results.py: a config for each run, and tiny runs at equal FLOPs with their page."""

import collections
import functools
import json
import re
import shutil

import numpy as np
from conftest import ROOT
from etils import epath

from launch import results, runner
from launch.results import ROWS, make_config
from mf_jax.metrics import classifier
from mf_jax.runtime.files import sha256_of
from mf_jax.scoring.rows import read_rows
from mf_jax.validation import validate

SMALL = {"model.depth": 1, "model.width": 16, "train.batch_size": 16, "optim.warmup_steps": 0}
SMALL |= {"train.log_every_steps": 3, "eval.num_samples": 80}


def test_every_run_has_a_valid_config_of_its_own_and_mnist_may_be_a_file(tmp_path, monkeypatch):
    file = tmp_path / "mnist.npz"
    np.savez(file, x=np.zeros((40, 28, 28, 1), np.uint8), label=np.arange(40) % 10)
    monkeypatch.setenv("MF_MNIST", str(file))
    configs = [make_config(row, 240) for row in ROWS]
    assert len({json.dumps(runner.decisive(config)) for config in configs}) == 2 * 9 * 3
    for config in (each for each in configs if each.seed == 0):
        side = validate(config, num_devices=1).spec.shape[0]
        assert (side, config.model.depth) in ((8, configs[0].model.depth), (28, 4))
        assert config.objective.anneal_to == config.train.num_steps == 240


def test_a_tiny_run_is_kept_and_its_page_written(tmp_path, monkeypatch, capsys):
    """Another method diverges, after as many steps as take the FLOPs."""

    def compiled(config, source, mesh, say):
        gflop = {"meanflow": 3.0, "flow_matching": 2.0}[config.objective.name]
        return {"gflop": gflop, "temp_bytes": 3e6, "argument_bytes": 2e6}, None

    def run(config, folder):
        if config.objective.name == "meanflow":
            return runner.whole_run(config, folder)
        shutil.copytree(results.RUNS / first.run, folder)
        return {"num_steps": config.train.num_steps, "rows": [], "diverged": "why"}

    monkeypatch.setattr(classifier, "Recipe", functools.partial(classifier.Recipe, 3, 32))
    (tmp_path / "docs").mkdir()
    shutil.copy(ROOT / "docs" / "results.md", tmp_path / "docs")
    monkeypatch.chdir(tmp_path)
    small = {"QUIET": results.QUIET | SMALL, "STEPS": (1, 4), "compile_step": compiled}
    small["NUM_STEPS"] = {"digits": 12}
    small |= {"cost_of": functools.cache(results.cost_of.__wrapped__), "whole_run": run}
    first, small["ROWS"] = ROWS[0], (ROWS[0], ROWS[8])
    for name, value in small.items():
        monkeypatch.setattr(results, name, value)
    for starts in ([f"[{i + 1}/2] {row.run}" for i, row in enumerate(small["ROWS"])], []):
        assert runner.main(results, []) == 0
        assert [x for x in capsys.readouterr().out.splitlines() if x[:1] == "["] == starts
    result = json.loads((results.RUNS / first.run / "result.json").read_text())
    assert [row.get("steps") for row in result["rows"]] == [None, 1, 4]
    real, samples = np.load(results.RUNS / first.run / results.PICTURES)
    assert real.mean() != samples.mean()
    assert (tmp_path / "docs" / "results" / "digits.png").stat().st_size > 2_000
    (second := results.RUNS / ROWS[9].run).mkdir()
    runner.borrow_classifier(second)
    (file,), (row,) = second.glob("classifier-*.npz"), read_rows(epath.Path(second))
    assert row["classifier_sha256"] == sha256_of(file)
    monkeypatch.setattr(results, "ROWS", (*small["ROWS"], ROWS[9]))
    for row in result["rows"][1:]:
        row |= {key: 2 * row[key] + 1 for key in results.SCORES}
    result["config"]["seed"] = 1
    result.pop("checksum")
    (second / "result.json").write_text(json.dumps(result))
    assert runner.main(results, ["--document"]) == 0
    texts = ((folder / "docs" / "results.md").read_text() for folder in (ROOT, tmp_path))
    (_, before), (page, after) = (text.split("## MNIST") for text in texts)
    assert before == after, "no run of it is here"
    found = collections.defaultdict(list)
    for name, cells in re.findall(r"^\| ([^|]+) \| (.*)", page, re.MULTILINE):
        found[name].append(cells.replace(" |", ""))
    assert re.fullmatch(r"12 36 [\d,]+ 3,000 5", found["MeanFlow"][0])
    assert [text.count("±") for text in found["MeanFlow"][1:]] == [2] * 4
    assert found["flow matching"][0].startswith("18 36 ")
    assert found["flow matching"][1:3] == ["– –", "diverged diverged"]
    assert [text.count("±") for text in found["real data, held out"]] == [0, 2, 0, 0]
