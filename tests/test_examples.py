"""Each example runs with few steps and returns what its line prints."""

import importlib
import math

import jax
import jax.numpy as jnp
import pytest
from conftest import ROOT


@pytest.fixture(autouse=True)
def _beside(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "docs" / "examples")


def _numbers(found):
    return [float(leaf) for leaf in jax.tree.leaves(found)]


def test_a_flow_matching_network_with_a_span_predicts_the_same_at_first():
    finetune = importlib.import_module("finetune")
    params, one = finetune.fresh(jax.random.key(0)), jnp.ones(4)
    z = jax.random.normal(jax.random.key(1), (4, 2))
    v = finetune.field(params, z, r=one, t=one)
    longer = finetune.with_span(params)
    assert jnp.array_equal(finetune.field(longer, z, r=0 * one, t=one), v)
    longer["span"] += 1
    assert not jnp.allclose(finetune.field(longer, z, r=0 * one, t=one), v)
    assert all(map(math.isfinite, _numbers(finetune.main(steps=3, before=3, seeds=1))))


def test_the_policy_never_looks_at_what_is_hidden_and_learns():
    policy = importlib.import_module("policy")
    seen, chunk, mask = policy.demonstrations(jax.random.key(0), 64)
    assert 0 < mask.mean() < 1
    keys = jax.random.split(jax.random.key(1), len(policy.SIZES))
    sizes = zip(keys, policy.SIZES.items(), strict=True)
    params = {name: jax.random.normal(key, size) * 0.1 for key, (name, size) in sizes}
    t = jnp.ones(64)
    u, other = (
        policy.field(params, jnp.where(mask, chunk, hidden), r=t, t=t, condition=seen)
        for hidden in (0.0, 9.0)
    )
    assert jnp.allclose(jnp.where(mask, u - other, 0), 0, atol=1e-5)
    found = policy.main(steps=2, seeds=1)
    assert all(0 <= value <= 1 for value in found.values())


def test_signals():
    found = importlib.import_module("signals_nnx").main(steps=60)
    assert found["one_step"]["purity"] > 0.2, "as noise is"


def test_signals_of_equinox():
    pytest.importorskip("equinox")
    found = importlib.import_module("signals_equinox").main(steps=60)
    assert found["one_step"]["purity"] > 0.2, "as noise is"


def test_restoration_is_nearer_to_the_digits_than_what_it_is_given():
    found = importlib.import_module("restoration").main(steps=80)
    assert found["regression"] < found["degraded"]
    assert found["steps_1"] < 0.5


def test_density():
    found = importlib.import_module("density").main(steps=100)
    assert abs(found["mean"]) < 1
    assert found["rms"] < 3
