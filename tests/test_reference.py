"""Recorded evaluations of published code, reproduced by what a config row builds.

Every size and setting comes from the case's own `meta`; those of the row are the published ones.
"""

import dataclasses
import functools
import json
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from oracle import joined
from recorded import FOLDER, assert_close, assert_gradients, below, config_of, draws_of, load_case

from configs import imagenet
from mf_jax.config import make_network, make_objective, make_scheme
from mf_jax.flow.guidance import guided_velocities
from mf_jax.flow.paths import interpolate
from mf_jax.flow.records import Condition, DataSpec
from mf_jax.flow.rows import at_instant
from mf_jax.flow.sampler import sample
from mf_jax.models import SIZES, DiT, as_field, parameter_shapes

ROWS = {"meanflow": "b4", "imf": "imf_b2", "pmf": "pmf_b16"}
ROWS |= {"alphaflow": "alphaflow_xl2", "soflow": "soflow_xl2"}
SCHEDULE = (
    "objective.anneal_from=change_init_steps objective.anneal_to=change_end_steps "
    "objective.sharpness=gamma objective.derivative_below=clamp_value "
)
WEIGHT = "weight.p=norm_p weight.c=norm_eps"
NAMES = {
    "meanflow": "guidance.omega=omega guidance.kappa=kappa guidance.t_min=guidance_t_start "
    f"guidance.t_max=guidance_t_end {WEIGHT}",
    "imf": WEIGHT,
    "pmf": WEIGHT,
    "alphaflow": f"{SCHEDULE} objective.alpha_start=alpha_start objective.alpha_end=alpha_end "
    "objective.target_clip=clamp_utgt guidance.omega=omega guidance.kappa=kappa "
    "guidance.t_min=t_min guidance.t_max=t_max weight.c=eps",
    "soflow": "objective.alpha_start=r_init objective.alpha_end=r_end objective.min_gap=min_gap "
    "guidance.t_max=cfg_decay_time draws.label_drop_share=cfg_drop_rate weight.p=p weight.c=eps",
}
"""Keys of a config, and what a case calls them."""
CASES = [
    path
    for kind in ROWS
    for path in sorted(FOLDER.glob(f"{kind}*.npz"))
    if path.stem != "alphaflow_schedule"
]


def _settings(meta):
    """Return what a case says of its objective, by key of the config."""
    said, kind = meta["objective"], meta.get("kind", "")
    names = (pair.split("=") for pair in NAMES.get(kind, SCHEDULE).split())
    settings = {key: said[name] for key, name in names}
    if said.get("guidance") == "none":
        settings |= {"guidance.omega": 1.0, "guidance.kappa": 0.0}
    if kind == "soflow":
        settings["guidance.omega"] = said["mix_ratio"] * said["cfg_scale"]
        settings["guidance.kappa"] = 1 - said["mix_ratio"]
    return settings


@functools.cache
def _parts(path):
    """Return a case, its parameters and gradients, and the field and objective of its row."""
    meta, case, params, grads = load_case(path)
    said, model = meta["objective"], meta["model"]
    config = config_of(ROWS[meta["kind"]], model, params)
    config.perceptual.lpips = config.perceptual.convnext = 0.0
    config.update_from_flattened_dict(_settings(meta))
    config.objective.anneal_to = said.get("total_steps", config.objective.anneal_to)
    spec = DataSpec(case["in/x"].shape[1:], model["num_classes"])
    return meta, case, params, grads, as_field(make_network(config, spec)), make_objective(config)


@pytest.mark.parametrize("path", CASES, ids=lambda path: path.stem)
def test_recorded_case_through_the_row(path):
    meta, case, params, grads, field, objective = _parts(path)
    draws, step = draws_of(meta, case), meta["objective"].get("step", 0)

    @jax.jit
    def evaluate(params, draws):
        v = None
        if "out/velocity_guided" in case:
            own = at_instant(field, params, draws.instant).u
            v = guided_velocities(objective.guidance, field, params, draws, own_instant=own)
        loss = jax.value_and_grad(lambda p: objective.loss(field, p, draws, step), has_aux=True)
        rows = joined(draws)
        z, told = interpolate(rows.x, rows.e, t=rows.t), Condition(rows.condition, rows.guidance)
        return field(params, z, r=rows.r, t=rows.t, condition=told), v, *loss(params)

    with jax.default_matmul_precision(meta.get("matmul_precision", "highest")):
        heads, v, (loss, metrics), ours = evaluate(params, draws)
    for name, head in heads._asdict().items():
        if f"out/{name}" in case:
            assert_close(head, case[f"out/{name}"], name)
    if v is not None:
        both = jnp.concatenate([v.instant, v.interval])
        assert_close(both, case["out/velocity_guided"], "guided velocity")
    metrics = {name: average.compute() for name, average in metrics.items()}
    if meta["kind"] == "soflow":  # whose value of rows with r < t is no error; its gradient is ours
        assert_close(metrics["v_error"], case["out/metric/velocity_mse"], "velocity error")
        assert_close(metrics["u_error"], case["out/metric/consistency_mse"], "consistency error")
    else:
        assert_close(loss, case["out/loss"], "loss")
    if meta["kind"] == "alphaflow":
        np.testing.assert_allclose(metrics["alpha"], meta["objective"]["alpha"], rtol=1e-5)
    assert_gradients(ours, grads, 1e-4 if meta["kind"] in ("alphaflow", "soflow") else 1e-5)


def test_reference_counts_of_parameters():
    assert {"meanflow", "imf", "pmf"} <= {path.stem.split("_")[0] for path in CASES}, FOLDER
    counts = json.loads((FOLDER / "parameter_counts.json").read_text())
    dits = {name.removeprefix("DiT_"): n for name, n in counts.items() if name[:4] == "DiT_"}
    for name, count in dits.items():
        size, patch = name.split("_")
        network = DiT(patch_size=int(patch), num_classes=1000, scan=True, **SIZES["dit"][size])
        shapes = parameter_shapes(network, (32, 32, 4))
        assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == count, name
    assert set(SIZES["dit"]) - {"digits"} == {name.split("_")[0] for name in dits}


def test_reference_samples_of_soflow():
    """Its second step starts from its first sample, half of it replaced by fresh noise."""
    for path in (path for path in CASES if path.stem.startswith("soflow")):
        _, case, params, _, field, _ = _parts(path)
        e, noise, labels = (jnp.asarray(case[f"sample/{name}"]) for name in ("e", "noise", "y"))
        with jax.default_matmul_precision("highest"):
            drawn = functools.partial(sample, field, params, e, Condition(labels))
            once, twice = drawn(), drawn(steps=2, renoise=lambda _, e=noise: e)
        assert_close(once, case["sample/one_step"], "one step")
        assert_close(twice, case["sample/two_steps"], "two steps")


def test_reference_schedule_of_alpha():
    case = dict(np.load(FOLDER / "alphaflow_schedule.npz"))
    settings = below(_settings({"objective": json.loads(str(case["meta"]))}), "objective.")
    row = make_objective(imagenet.get_config(ROWS["alphaflow"]))
    alpha = jax.vmap(dataclasses.replace(row, **settings).alpha)
    ours = alpha(jnp.asarray(case["in/step"], jnp.int32))
    np.testing.assert_allclose(ours, case["out/alpha"], rtol=2e-5, atol=0)


@pytest.mark.skipif("MF_REFERENCE_DIR" in os.environ, reason="other cases have other settings")
def test_rows_have_the_settings_of_the_reference_cases():
    for kind in ("alphaflow", "soflow"):
        meta = _parts(FOLDER / f"{kind}.npz")[0]
        shipped = flatten_dict(imagenet.get_config(ROWS[kind]).to_dict(), sep=".")
        for key, value in _settings(meta).items():
            assert shipped[key] == pytest.approx(value), f"{kind}: {key}"


def test_draws_of_the_rows():
    """Labels are dropped inside the window alone; rows with r = t have times of their own."""
    x, labels = jnp.zeros((4000, 1)), jnp.zeros(4000, jnp.int32)
    for kind in ("alphaflow", "soflow"):
        config = imagenet.get_config(ROWS[kind])
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
