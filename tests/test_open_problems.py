"""launch/open_problems.py in small, what it measures against closed forms, and reflow's page."""

import dataclasses
import json
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ROOT
from oracle import STD, gaussian_average

import mf_jax
from launch import open_problems, runner
from launch.runner import runs_of
from launch.small import data, measures, training
from launch.small.data import MAPS, Data, assignment, data_of, dealt
from launch.small.training import Fitted, Training, Tuned
from mf_jax.data.arrays import of_file
from mf_jax.objectives.terms import AdaptiveWeight

PLAIN = mf_jax.MeanFlow(weight=AdaptiveWeight(p=0.0))


def test_every_setting_has_one_run_and_the_page_its_tables_and_figures():
    rows = open_problems.ROWS
    for row in rows:
        assert row.how == next(r for r in rows if r.run == row.run).how, row.run
    page = (ROOT / "docs" / "open_problems.md").read_text()
    marks = re.findall(r"<!-- (\w+) -->\n", page)
    assert [mark for mark in marks if mark != "end"] == list(open_problems.GROUPS)
    for group in open_problems.GROUPS:
        assert f"(open_problems/{group}.png)" in page
        assert {row.group for row in runs_of(rows, group)} == {group}


def test_a_small_run_is_kept_and_written_into_the_page(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(training, "SEEDS", 2)
    monkeypatch.setattr(data, "POOL", 1024)
    for module in (open_problems, measures, training):
        monkeypatch.setattr(module, "data_of", data_of.__wrapped__)
    (tmp_path / "docs").mkdir()
    shutil.copy(ROOT / "docs" / "open_problems.md", tmp_path / "docs")
    monkeypatch.chdir(tmp_path)
    ends = "coupling eight_gaussians, held-out", "tilted, reflow 0.1", "0, renoised, 8"
    named = {f"{row.group} {row.label}": row for row in open_problems.ROWS}
    real, reflow, renoised = (next(named[n] for n in named if n.endswith(end)) for end in ends)
    tiny = {"steps": 20, "width": 8, "batch_size": 16}
    small, fresh = (dataclasses.replace(row.how, **tiny) for row in (reflow, renoised))
    rows = real, reflow._replace(how=small), renoised._replace(how=fresh)
    monkeypatch.setattr(open_problems, "ROWS", rows)
    first = ["[1/3] real eight_gaussians", "[2/3] coupling tilted reflow 0.1", "[3/3] hybrid 0"]
    for starts in (first, []):
        assert runner.main(open_problems, []) == 0
        lines = capsys.readouterr().out.splitlines()
        assert [line for line in lines if line.startswith("[")] == starts
    result = json.loads((open_problems.RUNS / reflow.run / "result.json").read_text())
    assert (result["num_steps"], len(result["rows"])) == (20, 2)
    page = (tmp_path / "docs" / "open_problems.md").read_text()
    (line,) = re.findall(r"\| tilted, reflow 0.1 \| 20 .*", page)
    assert line.count("±") == 5
    (line,) = re.findall(r"\| MMD 0, renoised, 8 \| 20 .*", page)
    assert "±" in line
    assert (tmp_path / "docs" / "open_problems" / "coupling.png").stat().st_size > 2000
    monkeypatch.setattr(training, "SEEDS", 3)
    assert runner.main(open_problems, ["--document"]) == 2


def test_what_is_measured_is_what_closed_forms_say():
    x = np.random.default_rng(0).normal(0.5, STD, (20_000, 1)).astype(np.float32)
    z, r, t = jnp.array([[0.2], [-0.3]]), jnp.array([0.3, 0.4]), jnp.array([0.9, 0.7])
    theirs = gaussian_average(z, r[:, None], t[:, None], 0.5)
    np.testing.assert_allclose(measures.exact_average(x, z, r, t), theirs, atol=0.03)
    a = np.arange(8.0)[:, None]
    distance, places = assignment(a, a[::-1] + 0.5)
    assert distance == pytest.approx(0.5)
    np.testing.assert_array_equal(places, np.arange(8)[::-1])
    e = np.random.default_rng(1).normal(size=(500, 2)).astype(np.float32)
    own = measures.sample_scores(e, Data(e, e, e))
    assert (own["w2"], own["recall"], own["nearest"]) == pytest.approx((0, 1, 0), abs=1e-3)
    many = "tilted 2048"
    apart = data_of(many).x - dealt(many, 1024) @ MAPS["tilted"]
    assert np.sqrt(np.mean(apart**2)) < 0.2


def test_numbers_turn_on_what_the_core_calls_by_name():
    """Shares of an estimate for target and tangent at once, and factors of controls."""
    params, estimate = training.initial(jax.random.key(0), 2, 8), mf_jax.VelocityEstimate
    params[-1] = params[0][0][:8, :2], params[-1][1]  # else it would return 0
    draws = training.SCHEME.draw(jax.random.key(1), jnp.ones((8, 2)))
    x = data_of("two_moons 128").x
    controlled = mf_jax.Controlled(PLAIN, mf_jax.Controls(lipschitz=0.3, non_expansive=2.0))
    exact = mf_jax.Estimated(PLAIN, estimate("data", 0.7, 0.2, data=x))
    for names, numbers, theirs in (
        (("target exact", "tangent exact"), (0.7, 0.2), exact),
        (("tangent network",), (0.4,), mf_jax.Estimated(PLAIN, estimate("network", 0.0, 0.4))),
        (("lipschitz", "monotone", "non_expansive"), (0.3, 0.0, 2.0), controlled),
        (("mmd", "target exact"), (0.0, 0.0), PLAIN),
    ):
        ours = Tuned(PLAIN, names, numbers, "two_moons 128")
        losses = [o.loss(training.field, params, draws, 0, params)[0] for o in (ours, theirs)]
        np.testing.assert_allclose(*losses, rtol=1e-5)


def test_gradients_vary_less_in_larger_batches():
    params = training.initial(jax.random.key(0), 2, 8)
    params[-1] = params[-1][0], params[-1][1] + 5.0  # a mean gradient that is no variance
    fitted = Fitted(params, params, np.zeros(1), 0.0)
    own = [Training("wide", Tuned(PLAIN), batch_size=n, width=8) for n in (8, 128)]
    small, large = (measures.gradient_variance(how, fitted, 100) for how in own)
    assert small / large == pytest.approx(16, rel=0.3)


def test_reflow_of_the_page_makes_data_with_pairs(trained, tmp_path, monkeypatch):
    text = (ROOT / "docs" / "own_parts.md").read_text()
    code = re.findall(r"```python\n(.*?)```", text, re.DOTALL)[1]
    monkeypatch.chdir(tmp_path)
    scope = {}
    exec(code.replace("runs/digits", str(trained)).replace("5000", "40"), scope)
    source = of_file(path="pairs.npz", held_out_share=0.1, split="train")
    assert source.spec.has_pairs
    assert len(source) == round(0.9 * 36)
    batch = source.gather(np.arange(3))
    told = mf_jax.Condition(batch.labels)
    again = scope["draw"](scope["field"], scope["generator"].params, batch.e, told, steps=16)
    np.testing.assert_allclose(np.clip(again, -1, 1), batch.x, atol=1e-5)
