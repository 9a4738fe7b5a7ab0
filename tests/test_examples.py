"""Each example runs with few steps and returns what its line prints."""

import importlib

import jax
import jax.numpy as jnp
import pytest
from conftest import ROOT

EXAMPLES = {
    # few steps, and what holds after them
    "finetune": ({"steps": 10, "before": 40}, lambda x: x["warm"] < x["flow_matching"]),
    "signals_nnx": ({"steps": 100}, lambda x: x["steps_2"] > 0.15),  # chance is 1 in 32
    "signals_equinox": ({"steps": 100}, lambda x: x["steps_2"] > 0.15),
    "restoration": ({"steps": 100}, lambda x: x["regression"] < 0.25 and x["steps_1"] < 0.4),
    "density": ({"steps": 60}, lambda x: abs(x["mean"]) < 0.5 and x["rms"] < 1),
    "policy": ({"steps": 5}, lambda x: all(0 <= share <= 1 for share in x.values())),
}


@pytest.fixture(autouse=True)
def _beside(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "docs" / "examples")


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_learns(name):
    if name == "signals_equinox":
        pytest.importorskip("equinox")
    few, holds = EXAMPLES[name]
    found = importlib.import_module(name).main(**few)
    assert holds(found), found


def test_the_policy_never_looks_at_what_is_hidden():
    policy = importlib.import_module("policy")
    rows = policy.demonstrations(jax.random.key(0), 64).interval
    assert 0 < rows.mask.mean() < 1
    params, told = [jnp.full(shape, 0.01) for shape in policy.SHAPES], rows.condition
    u, other = (
        policy.field(params, x, r=rows.r, t=rows.t, condition=told)
        for x in (rows.x, rows.x + jnp.where(rows.mask, 0, 9.0))
    )
    assert jnp.array_equal(u, other)
