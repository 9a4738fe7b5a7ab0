"""The page on adding an objective does what it says."""

import re
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ROOT
from oracle import BENT, class_mean, exact_draws, gaussian_field

from mf_jax import objectives
from mf_jax.objectives.meanflow import MeanFlow
from mf_jax.objectives.terms import AdaptiveWeight
from mf_jax.step import initial_state, make_train_step
from mf_jax.train import step_parts
from mf_jax.validation import validate


@pytest.fixture
def added(monkeypatch):
    """Add the page's objective as the page does, and return (its class, its config's function)."""
    text = (ROOT / "docs" / "adding_an_objective.md").read_text()
    file, line, config = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    module = types.ModuleType("mf_jax.objectives.modular_meanflow")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    exec(compile(file, module.__name__, "exec"), module.__dict__)
    monkeypatch.setattr(objectives, "OBJECTIVES", objectives.OBJECTIVES)
    # taken out again afterwards
    monkeypatch.setitem(objectives.OBJECTIVES, "modular_meanflow", None)
    exec(line, {"OBJECTIVES": objectives.OBJECTIVES, "ModularMeanFlow": module.ModularMeanFlow})
    scope = {}
    exec(config, scope)
    return module.ModularMeanFlow, scope["get_config"]


def _gradient(objective):
    field, draws = gaussian_field(lambda condition: class_mean(condition.labels)), exact_draws()
    draws = draws.replace(interval=draws.interval.replace(x=draws.interval.x + 0.3))
    return jax.grad(lambda p: objective.loss(field, p, draws)[0])(jnp.asarray(BENT))


def test_the_added_objective_is_meanflow_at_share_0_and_another_above(added):
    record, _ = added
    with jax.enable_x64(True):
        weight = AdaptiveWeight(p=0.5)
        theirs = _gradient(MeanFlow(weight=weight))
        np.testing.assert_allclose(_gradient(record(weight=weight)), theirs, rtol=1e-9)
        assert not np.allclose(
            _gradient(record(weight=weight, gradient_share=1.0)), theirs, rtol=1e-2
        )


def test_the_page_for_other_codes_runs(capsys):
    text = (ROOT / "docs" / "from_your_own_code.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    scope = {}
    exec(code, scope)
    assert np.isfinite([float(value) for value in scope["metrics"].values()]).all()
    printed = capsys.readouterr().out
    named = re.findall(r"^\| .*\| `(\w+)`:", text, re.MULTILINE)
    assert len(named) == 7
    assert all(name in printed for name in named)


def test_the_added_config_has_a_step(added):
    config = added[1]()
    config.model.depth, config.model.width, config.train.batch_size = 1, 16, 16
    parts = step_parts(config, validate(config, num_devices=1))
    assert parts.objective.gradient_share == 0.5
    state = jax.eval_shape(lambda: initial_state(parts))
    assert jax.eval_shape(make_train_step(parts), state, *parts.batch).params == state.params
