"""alpha-Flow and SoFlow, as built from their config rows, against their published code's numbers.

Every size and setting comes from the case's own `meta`; those of the row are the published ones.
"""

import dataclasses
import json
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from recorded import FOLDER, assert_close, assert_gradients, config_of, draws_of, load_case

from configs import imagenet
from mf_jax.config import make_network, make_objective, make_scheme
from mf_jax.flow.guidance import guided_velocities
from mf_jax.flow.paths import interpolate
from mf_jax.flow.records import Condition, DataSpec
from mf_jax.flow.sampler import sample
from mf_jax.models import as_field
from mf_jax.objectives.terms import at_instant

CASES = sorted(
    path
    for kind in ("alphaflow", "soflow")
    for path in FOLDER.glob(f"{kind}*.npz")
    if path.stem != "alphaflow_schedule"
)
ROWS = {"alphaflow": "alphaflow_xl2", "soflow": "soflow_xl2"}


def _settings(meta):
    """Return what a case says of its objective, by key of the config."""
    said = meta["objective"]
    if meta["kind"] == "alphaflow":
        own = {
            "objective.alpha_start": "alpha_start",
            "objective.alpha_end": "alpha_end",
            "objective.anneal_from": "change_init_steps",
            "objective.anneal_to": "change_end_steps",
            "objective.sharpness": "gamma",
            "objective.derivative_below": "clamp_value",
            "objective.target_clip": "clamp_utgt",
            "guidance.omega": "omega",
            "guidance.kappa": "kappa",
            "guidance.t_min": "t_min",
            "guidance.t_max": "t_max",
            "weight.c": "eps",
        }
        return {key: said[name] for key, name in own.items()}
    return {
        "objective.alpha_start": said["r_init"],
        "objective.alpha_end": said["r_end"],
        "objective.min_gap": said["min_gap"],
        "guidance.omega": said["mix_ratio"] * said["cfg_scale"],
        "guidance.kappa": 1 - said["mix_ratio"],
        "guidance.t_max": said["cfg_decay_time"],
        "draws.label_drop_share": said["cfg_drop_rate"],
        "weight.p": said["p"],
        "weight.c": said["eps"],
    }


def _config(meta):
    """Return the row's config with the sizes and the settings of a case."""
    config = config_of(ROWS[meta["kind"]], meta["model"])
    config.update_from_flattened_dict(_settings(meta))
    if "total_steps" in meta["objective"]:
        config.objective.anneal_to = meta["objective"]["total_steps"]
    return config


def _parts(path):
    meta, case, params, grads = load_case(path)
    config = _config(meta)
    spec = DataSpec(case["in/x"].shape[1:], meta["model"]["num_classes"])
    field = as_field(make_network(config, spec))
    return meta, case, params, grads, field, make_objective(config)


@pytest.mark.parametrize("path", CASES, ids=lambda path: path.stem)
def test_reference_case_through_the_row(path):
    meta, case, params, grads, field, objective = _parts(path)
    draws, step = draws_of(meta, case), meta["objective"]["step"]

    @jax.jit
    def evaluate(params, draws):
        own = at_instant(field, params, draws.instant).u
        v = guided_velocities(objective.guidance, field, params, draws, own_instant=own)
        loss = jax.value_and_grad(lambda p: objective.loss(field, p, draws, step), has_aux=True)
        both = jax.tree.map(lambda *a: jnp.concatenate(a), draws.instant, draws.interval)
        z, told = interpolate(both.x, both.e, t=both.t), Condition(both.condition)
        u = field(params, z, r=both.r, t=both.t, condition=told).u
        return u, jnp.concatenate([v.instant, v.interval]), *loss(params)

    with jax.default_matmul_precision("highest"):
        u, v, (loss, metrics), ours = evaluate(params, draws)
    assert_close(u, case["out/u"], "u")
    if "out/velocity_guided" in case:
        assert_close(v, case["out/velocity_guided"], "guided velocity")
    metrics = {name: average.compute() for name, average in metrics.items()}
    if meta["kind"] == "alphaflow":
        assert_close(loss, case["out/loss"], "loss")
        np.testing.assert_allclose(metrics["alpha"], meta["objective"]["alpha"], rtol=1e-5)
    else:  # the published value of the rows with r < t is no error; its gradient is that of ours
        assert_close(metrics["v_error"], case["out/metric/velocity_mse"], "velocity error")
        assert_close(metrics["u_error"], case["out/metric/consistency_mse"], "consistency error")
    assert_gradients(ours, grads, 1e-4)


def test_reference_samples_of_soflow():
    """Its second step starts from its first sample, half of it replaced by fresh noise."""
    for path in (path for path in CASES if path.stem.startswith("soflow")):
        _, case, params, _, field, _ = _parts(path)
        e, noise, labels = (jnp.asarray(case[f"sample/{name}"]) for name in ("e", "noise", "y"))
        told = Condition(labels)
        with jax.default_matmul_precision("highest"):
            once = sample(field, params, e, told)
            twice = sample(field, params, e, told, steps=2, renoise=lambda _, e=noise: e)
        assert_close(once, case["sample/one_step"], "one step")
        assert_close(twice, case["sample/two_steps"], "two steps")


def test_reference_schedule_of_alpha():
    case = dict(np.load(FOLDER / "alphaflow_schedule.npz"))
    said = json.loads(str(case["meta"]))
    keys = {"anneal_from": "change_init_steps", "anneal_to": "change_end_steps"}
    keys |= {"sharpness": "gamma", "derivative_below": "clamp_value"}
    row = make_objective(imagenet.get_config(ROWS["alphaflow"]))
    objective = dataclasses.replace(row, **{key: said[name] for key, name in keys.items()})
    ours = jax.vmap(objective.alpha)(jnp.asarray(case["in/step"], jnp.int32))
    np.testing.assert_allclose(ours, case["out/alpha"], rtol=2e-5, atol=0)


@pytest.mark.skipif("MF_REFERENCE_DIR" in os.environ, reason="other cases have other settings")
def test_rows_have_the_settings_of_the_reference_cases():
    for kind, row in ROWS.items():
        meta = load_case(FOLDER / f"{kind}.npz")[0]
        shipped = flatten_dict(imagenet.get_config(row).to_dict(), sep=".")
        for key, value in _settings(meta).items():
            assert shipped[key] == pytest.approx(value), f"{row}: {key}"


def test_draws_of_the_rows():
    """Labels are dropped inside the window alone; rows with r = t have times of their own."""
    x, labels = jnp.zeros((4000, 1)), jnp.zeros(4000, jnp.int32)
    for row in ROWS.values():
        config = imagenet.get_config(row)
        draws = jax.jit(make_scheme(config).draw)(jax.random.key(0), x, labels)
        low, high = config.draws.label_drop_window
        for rows in (draws.instant, draws.interval):
            inside = (low <= rows.t) & (rows.t <= high)
            assert not jnp.any(rows.dropped & ~inside)
            assert 0.08 < rows.dropped.sum() / inside.sum() < 0.12
        t = jax.scipy.special.logit(draws.instant.t)
        assert abs(t.mean() - config.instant_times.t_mean) < 0.1
        assert abs(t.std() - config.instant_times.t_std) < 0.1
        gap = draws.interval.t - draws.interval.r
        assert gap.min() > config.times.min_gap * 0.99
        if config.times.order == "clip":
            t = jax.scipy.special.logit(draws.interval.t)
            assert abs(t.mean() - config.times.t_mean) < 0.1
