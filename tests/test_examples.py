"""Each example runs with few steps and returns what its line prints."""

import importlib

import jax
import jax.numpy as jnp
import pytest
from conftest import ROOT


@pytest.fixture(autouse=True)
def _beside(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "docs" / "examples")


def _run(name, **few):
    return importlib.import_module(name).main(**few)


def test_finetune_starts_at_the_flow_matching_network():
    found = _run("finetune", steps=10, before=40)
    assert found["warm"] < found["flow_matching"], "the longer network learns"


def test_the_policy_never_looks_at_what_is_hidden():
    policy = importlib.import_module("policy")
    rows = policy.demonstrations(jax.random.key(0), 64).interval
    assert 0 < rows.mask.mean() < 1
    params = [jnp.full(shape, 0.01) for shape in policy.SHAPES]
    u, other = (
        policy.field(
            params,
            rows.x + jnp.where(rows.mask, 0, hidden),
            r=rows.r,
            t=rows.t,
            condition=rows.condition,
        )
        for hidden in (0.0, 9.0)
    )
    assert jnp.array_equal(u, other)
    assert all(0 <= share <= 1 for share in policy.main(steps=5).values())


def test_signals_of_flax_nnx_take_their_class():
    assert _run("signals_nnx", steps=100)["steps_2"] > 0.15, "chance is 1 in 32"


def test_signals_of_equinox_take_their_class():
    pytest.importorskip("equinox")
    assert _run("signals_equinox", steps=100)["steps_2"] > 0.15, "chance is 1 in 32"


def test_restoration_learns_from_pairs():
    found = _run("restoration", steps=100)
    assert found["regression"] < 0.25
    assert found["steps_1"] < 0.4


def test_the_density_of_one_step_is_near_the_exact_one():
    found = _run("density", steps=60)
    assert abs(found["mean"]) < 0.5
    assert found["rms"] < 1
