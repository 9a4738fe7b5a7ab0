"""Recorded evaluations of published code, reproduced by what a config row builds.

Every size and setting comes from the case's own `meta`; those of the row are the published ones.
"""

import dataclasses
import functools
import json
import math
import os
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import recorded
from flax.traverse_util import flatten_dict, unflatten_dict
from oracle import joined
from recorded import FOLDER, assert_close, assert_gradients, below, config_of, draws_of

from configs import imagenet
from mf_jax.config import make_network, make_objective, make_scheme
from mf_jax.flow.guidance import guided_velocities
from mf_jax.flow.paths import interpolate
from mf_jax.flow.records import NO_LABEL, Condition, DataSpec, Draws, GuidanceScale, Rows
from mf_jax.flow.rows import at_instant, at_time, condition_of
from mf_jax.flow.sampler import sample
from mf_jax.models import SIZES, DiT, as_field, parameter_shapes
from mf_jax.published.flow_matching import reversed_time

ROWS = {"meanflow": "b4", "imf": "imf_b2", "pmf": "pmf_b16"}
ROWS |= {kind: f"{kind}_xl2" for kind in ("alphaflow", "soflow", "shortcut", "tvm")}
SCHEDULE = "objective.anneal_from=change_init_steps objective.anneal_to=change_end_steps "
SCHEDULE += "objective.sharpness=gamma objective.derivative_below=clamp_value "
SCALES, WEIGHT = "guidance.omega=omega guidance.kappa=kappa ", "weight.p=norm_p weight.c=norm_eps"
NAMES = {
    "meanflow": f"{SCALES} guidance.t_min=guidance_t_start guidance.t_max=guidance_t_end {WEIGHT}",
    **dict.fromkeys(("imf", "pmf"), WEIGHT),
    "alphaflow": f"{SCHEDULE} objective.alpha_start=alpha_start objective.alpha_end=alpha_end "
    f"objective.target_clip=clamp_utgt {SCALES} guidance.t_min=t_min guidance.t_max=t_max "
    "weight.c=eps",
    "soflow": "objective.alpha_start=r_init objective.alpha_end=r_end objective.min_gap=min_gap "
    "guidance.t_max=cfg_decay_time draws.label_drop_share=cfg_drop_rate weight.p=p weight.c=eps",
    "shortcut": "objective.target_clip=clip guidance.omega=cfg_scale",
    "tvm": "draws.omega_min=cfg draws.omega_max=cfg",
}
"""Keys of a config, and what a case calls them."""


def _cases(*kinds):
    paths = sorted(path for kind in kinds for path in FOLDER.glob(f"{kind}*.npz"))
    return [path for path in paths if path.stem != "alphaflow_schedule"]


CASES = _cases("meanflow", "imf", "pmf", "alphaflow", "soflow")
_PAIRS = """
PatchEmbed_0/Conv_0=patch_embedding LabelEmbedder_0/Embed_0=condition/label_embedding
TimestepEmbedder_0/Dense_0=condition/t_embedding/hidden
TimestepEmbedder_0/Dense_1=condition/t_embedding/out
TimestepEmbedder_1/Dense_0=condition/h_embedding/hidden
TimestepEmbedder_1/Dense_1=condition/h_embedding/out
Dense_0=modulation Dense_2=attention/qkv Dense_4=attention/out
MlpBlock_0/Dense_0=expand MlpBlock_0/Dense_1=contract
FinalLayer_0/Dense_0=final_modulation FinalLayer_0/Dense_1=final
"""
_OF_SHORTCUT = dict(pair.split("=") for pair in _PAIRS.split())
"""Of the published Shortcut network, and ours. Dense_1 are keys, Dense_3 values of attention."""


def _from_shortcut(flat):
    """Return published parameters, or their gradient, as ours, where t = 1 is noise and u = e - x.

    The map of the first time layer is orthogonal, so gradients follow it too.
    """
    ours = {}
    for name, a in flat.items():
        block, layer, leaf = re.fullmatch(r"(DiTBlock_\d+/)?(.*)/(\w+)", name).groups("")
        if layer == "Dense_2":
            a = np.concatenate([flat[f"{block}Dense_{i}/{leaf}"] for i in (2, 1, 3)], axis=-1)
        if layer in _OF_SHORTCUT:
            name = f"{block.replace('DiTB', 'b')}{_OF_SHORTCUT[layer]}/{leaf}"
            ours[name] = a.reshape(-1, a.shape[-1]) if a.ndim > 2 else a
    ours |= {name: -ours[name] for name in ("final/kernel", "final/bias")}
    time = "condition/t_embedding/hidden/kernel"
    return unflatten_dict(ours | {time: reversed_time(ours[time])}, sep="/")


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
    if kind == "shortcut":
        settings["times.levels"] = int(math.log2(said["denoise_timesteps"]))
        if not meta["batch"]["num_guided"]:
            settings["guidance.omega"] = 1.0
    return settings


@functools.cache
def _parts(path):
    """Return a case, its trees by name, and the field and objective of its row."""
    case, trees = dict(np.load(path)), {}
    meta = json.loads(str(case.pop("meta")))
    said, model, kind = meta["objective"], meta["model"], meta["kind"]
    for name in ("params", "ema_params", "grads"):
        flat = below(case, f"{name}/net/")
        if kind == "shortcut":
            trees[name] = _from_shortcut(flat)
        else:
            flat = below(flat, "model.") if kind == "tvm" else flat
            trees[name] = recorded.from_published(kind, flat)
    config = config_of(ROWS[kind], model, trees["params"])
    config.perceptual.lpips = config.perceptual.convnext = 0.0
    config.update_from_flattened_dict(_settings(meta))
    config.objective.anneal_to = said.get("total_steps", config.objective.anneal_to)
    spec = DataSpec(case["in/x"].shape[1:], model["num_classes"])
    return meta, case, trees, as_field(make_network(config, spec)), make_objective(config)


@pytest.mark.parametrize("path", CASES, ids=lambda path: path.stem)
def test_recorded_case_through_the_row(path):
    meta, case, trees, field, objective = _parts(path)
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
        heads, v, (loss, metrics), ours = evaluate(trees["params"], draws)
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
    tolerance = 1e-4 if meta["kind"] in ("alphaflow", "soflow") else 1e-5
    assert_gradients(ours, trees["grads"], tolerance)


def _shortcut_draws(meta, case):
    given = jax.tree.map(jnp.asarray, below(case, "in/"))
    x, e, t, labels = (given[name] for name in "xety")
    told = {"condition": labels, "null": jnp.full_like(labels, NO_LABEL), "for_networks": True}
    told["dropped"] = given["dropped"]
    if meta["kind"] == "tvm":
        guidance = GuidanceScale(0 * t + meta["objective"]["cfg"], 0 * t, 1 + 0 * t)
        rows = Rows(x, e, t, given["r"], guidance=guidance, **told)
        return Draws(at_time(rows, given["s"]), rows)
    # their t = 1 is data; at x + floor e their path is ours
    x, n = x + meta["objective"]["path_floor"] * e, meta["batch"]["num_bootstrap"]
    rows = Rows(x, e, 1 - t, 1 - t - 2.0 ** -given["log2_steps"], **told)
    interval, instant = jax.tree.map(lambda a: a[:n], rows), jax.tree.map(lambda a: a[n:], rows)
    return Draws(at_time(instant, instant.t), interval)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _evaluate(field, objective, trees, draws):
    """Return u of rows with r < t and of the others, targets of the first, loss and gradient."""
    rows, params, teacher = draws.interval, trees["params"], trees["ema_params"]
    both = jax.tree.map(lambda *a: jnp.concatenate(a), rows, draws.instant)
    if both.guidance is not None:  # the objective itself tells dropped rows 1
        omega = jnp.where(both.dropped, 1, both.guidance.omega)
        both = both.replace(guidance=both.guidance.replace(omega=omega))
    z = interpolate(both.x, both.e, t=both.t)
    u = field(params, z, r=both.r, t=both.t, condition=condition_of(both)).u
    has_target = hasattr(objective, "levels")
    target = objective._parts(field, params, teacher, rows)[1] if has_target else None
    loss = jax.value_and_grad(lambda p: objective.loss(field, p, draws, 0, teacher)[0])
    return u, target, *loss(params)


@pytest.mark.parametrize("path", _cases("shortcut", "tvm"), ids=lambda path: path.stem)
def test_reference_shortcut_through_the_row(path):
    meta, case, trees, field, objective = _parts(path)
    with jax.default_matmul_precision("highest"):
        draws = _shortcut_draws(meta, case)
        u, target, loss, ours = _evaluate(field, objective, trees, draws)
    if target is None:
        beta = case["in/beta"][:, None, None, None]
        assert_close(beta * u[: len(beta)], case["out/network"], "network")
    else:
        assert_close(-u, case["out/u"], "u")
        assert_close(-target, case["out/target"][: len(target)], "target")
    assert_close(loss, case["out/loss"], "loss")
    assert_gradients(ours, trees["grads"], 1e-4)


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


def test_reference_samples():
    """SoFlow's second step starts from its first sample, half of it replaced by fresh noise."""
    for path in _cases("shortcut"):
        _, case, trees, field, _ = _parts(path)
        e, told = jnp.asarray(case["sample/e"]), Condition(jnp.asarray(case["sample/y"]))
        for key, theirs in below(case, "sample/steps/").items():
            with jax.default_matmul_precision("highest"):
                ours = sample(field, trees["params"], e, told, steps=int(key))
            assert_close(ours, theirs, key)
    for path in _cases("soflow"):
        _, case, trees, field, _ = _parts(path)
        e, noise, labels = (jnp.asarray(case[f"sample/{name}"]) for name in ("e", "noise", "y"))
        with jax.default_matmul_precision("highest"):
            drawn = functools.partial(sample, field, trees["params"], e, Condition(labels))
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
    x, labels, key = jnp.zeros((256, 1)), jnp.zeros(256, jnp.int32), jax.random.key(0)
    schemes = (make_scheme(imagenet.get_config(row)) for row in ("tvm_xl2", "shortcut_xl2"))
    tvm, steps = (jax.jit(scheme.draw)(key, x, labels) for scheme in schemes)
    np.testing.assert_array_equal(tvm.instant.e, tvm.interval.e)
    np.testing.assert_array_equal(tvm.instant.dropped, tvm.interval.dropped)
    assert abs(jnp.corrcoef(tvm.instant.t, tvm.interval.t)[0, 1]) < 0.2  # of one row's two times
    sizes, counts = np.unique(steps.interval.t - steps.interval.r, return_counts=True)
    assert set(counts[:-1]) == {256 // 8 // len(sizes)}
    assert not steps.interval.dropped.any()
    assert (2 ** len(sizes) * steps.instant.t % 1 == 0).all()
