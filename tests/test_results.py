"""launch/results.py: a config for each run, and tiny runs at equal FLOPs with their page."""

import functools
import json
import shutil

import numpy as np
import pytest
from conftest import ROOT
from PIL import Image

from launch import results
from launch.results import METHODS, ROWS, make_config
from launch.runner import decisive
from mf_jax.metrics import classifier
from mf_jax.validation import validate

SMALL = {"model.depth": 1, "model.width": 16, "train.batch_size": 16, "optim.warmup_steps": 0}
SMALL |= {"train.log_every_steps": 3, "eval.num_samples": 80}


def test_every_run_has_a_valid_config_of_its_own_and_mnist_may_be_a_file(tmp_path, monkeypatch):
    file = tmp_path / "mnist.npz"
    np.savez(file, x=np.zeros((40, 28, 28, 1), np.uint8), label=np.arange(40) % 10)
    monkeypatch.setenv("MF_MNIST", str(file))
    configs = [make_config(row, 24) for row in ROWS]
    assert len({json.dumps(decisive(config)) for config in configs}) == 2 * 9 * 3
    for config in configs[:: results.SEEDS]:
        side = validate(config, num_devices=1).spec.shape[0]
        assert (side, config.model.depth) in ((8, configs[0].model.depth), (28, 4))
        assert config.objective.anneal_to == config.train.num_steps == 24


def test_tiny_runs_have_equal_flops_and_are_written_into_the_page(tmp_path, monkeypatch, capsys):
    recipe = classifier.Recipe(steps=3, batch_size=32)
    monkeypatch.setattr(classifier, "Recipe", lambda: recipe)
    shutil.copy(ROOT / "docs" / "results.md", tmp_path / "page.md")
    small = {"RUNS": tmp_path, "DOCUMENT": tmp_path / "page.md", "QUIET": results.QUIET | SMALL}
    small |= {"NUM_STEPS": {"digits": 12}, "cost_of": functools.cache(results.cost_of.__wrapped__)}
    small["ROWS"] = first, _, last = (*ROWS[:2], ROWS[24])
    for name, value in small.items():
        monkeypatch.setattr(results, name, value)
    for starts in ([f"[{i + 1}/3] {row.run}" for i, row in enumerate(small["ROWS"])], []):
        assert results.main([]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert [line for line in lines if line.startswith("[")] == starts
    ours, flow = (json.loads((tmp_path / r.run / "result.json").read_text()) for r in (first, last))
    each = flow["costs"]["MFLOPs a step"]
    assert each < ours["costs"]["MFLOPs a step"]
    assert ours["num_steps"] == 12 < flow["num_steps"] == flow["config"]["train"]["num_steps"]
    assert 1e3 * flow["costs"]["GFLOPs"] == pytest.approx(1e3 * ours["costs"]["GFLOPs"], abs=each)
    assert [row.get("steps") for row in ours["rows"]] == [None, 1, 2, 4, 8]
    page = (tmp_path / "page.md").read_text()
    assert "Not run yet: `bash launch/results.sh --only=mnist`" in page
    lines = [line.split(" | ") for line in page.splitlines() if line.startswith("| ")]
    assert len(lines) == 4 * (3 + len(METHODS)) + 2 + len(METHODS)
    found = {}
    for name, *cells in lines:
        found.setdefault(name, []).append(" ".join(cells))
    assert [text.count("±") for text in found["| MeanFlow"][1:]] == [4] * 4
    assert not any("±" in text for text in found["| flow matching"])
    assert [text.count("±") for text in found["| real data, held out"]] == [0, 4, 0, 0]
    assert found["| SoFlow"] == ["– – – – – |", *4 * ["– – – – |"]]
    with Image.open(tmp_path / "page" / "digits.png") as picture:
        assert picture.height > 3 * 56
    real, samples = np.load(tmp_path / first.run / results.PICTURES)
    assert real.shape == (20, 8, 8, 1)
    assert not np.array_equal(real, samples)
    flow |= {"diverged": "why", "rows": []}
    (tmp_path / last.run / "result.json").write_text(json.dumps(flow))
    assert results.main(["--document"]) == 0
    assert "| flow matching | diverged | diverged |" in (tmp_path / "page.md").read_text()
