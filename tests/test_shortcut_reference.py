"""Shortcut models and terminal velocity matching, as built from their config rows, as published.

Every size and setting comes from the case's own `meta`; those of the row are the published ones.
"""

import functools
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict
from recorded import FOLDER, assert_close, from_published

from configs import imagenet
from mf_jax.config import make_network, make_objective, make_scheme
from mf_jax.flow.paths import interpolate
from mf_jax.flow.records import NO_LABEL, Condition, DataSpec, Draws, GuidanceScale, Rows
from mf_jax.flow.rows import at_time, condition_of
from mf_jax.flow.sampler import sample
from mf_jax.models import as_field
from mf_jax.published.flow_matching import reversed_time

CASES = sorted(path for kind in ("shortcut", "tvm") for path in FOLDER.glob(f"{kind}*.npz"))
ROWS = {"shortcut": "shortcut_xl2", "tvm": "tvm_xl2"}
_BLOCK = {"Dense_0": "modulation", "Dense_4": "attention/out"}
_BLOCK |= {"MlpBlock_0/Dense_0": "expand", "MlpBlock_0/Dense_1": "contract"}
_SHORTCUT = {
    "PatchEmbed_0/Conv_0": "patch_embedding",
    "LabelEmbedder_0/Embed_0": "condition/label_embedding",
    "FinalLayer_0/Dense_0": "final_modulation",
    "FinalLayer_0/Dense_1": "final",
}
for _i, _letter in enumerate("th"):
    for _j, _layer in enumerate(("hidden", "out")):
        _SHORTCUT[f"TimestepEmbedder_{_i}/Dense_{_j}"] = f"condition/{_letter}_embedding/{_layer}"


def _from_shortcut(flat):
    """Return published parameters, or their gradient, as ours, where t = 1 is noise and u = e - x.

    The map of the first time layer is orthogonal, so gradients follow it too.
    """
    ours = {}
    for name, array in flat.items():
        layer, leaf = name.rsplit("/", 1)
        block = layer.split("/", 1)
        if block[0].startswith("DiTBlock"):
            place = f"block_{block[0].removeprefix('DiTBlock_')}"
            if block[1] in _BLOCK:
                ours[f"{place}/{_BLOCK[block[1]]}/{leaf}"] = array
            elif block[1] == "Dense_2":  # queries; Dense_1 are keys, Dense_3 values
                parts = [flat[f"{block[0]}/Dense_{i}/{leaf}"] for i in (2, 1, 3)]
                ours[f"{place}/attention/qkv/{leaf}"] = np.concatenate(parts, axis=-1)
        elif layer in _SHORTCUT:
            array = array.reshape(-1, array.shape[-1]) if array.ndim == 4 else array
            ours[f"{_SHORTCUT[layer]}/{leaf}"] = -array if "FinalLayer_0/Dense_1" in name else array
    time = "condition/t_embedding/hidden/kernel"
    ours[time] = reversed_time(ours[time])
    return unflatten_dict(ours, sep="/")


def _settings(meta):
    """Return what a case says of its objective, by key of the config."""
    said, guided = meta["objective"], meta["batch"].get("num_guided", 0) > 0
    if meta["kind"] == "tvm":
        return dict.fromkeys(("draws.omega_min", "draws.omega_max"), said["cfg"])
    return {
        "objective.target_clip": said["clip"],
        "times.levels": int(math.log2(said["denoise_timesteps"])),
        "guidance.omega": said["cfg_scale"] if guided else 1.0,
        "draws.instant_share": 1 - 1 / said["bootstrap_every"],
    }


def _load(path):
    case = dict(np.load(path))
    meta = json.loads(str(case.pop("meta")))
    config, sizes = imagenet.get_config(ROWS[meta["kind"]]), meta["model"]
    config.model.update({"patch_size": sizes["patch_size"], "depth": sizes["depth"]})
    config.model.update({"width": sizes["hidden_size"], "num_heads": sizes["num_heads"]})
    config.model.update({"dtype": "float32", "scan": False})
    config.update_from_flattened_dict(_settings(meta))

    def tree(prefix):
        flat = {k.removeprefix(prefix): v for k, v in case.items() if k.startswith(prefix)}
        if meta["kind"] == "shortcut":
            return _from_shortcut(flat)
        return from_published("tvm", {k.removeprefix("model."): v for k, v in flat.items()})

    trees = [tree(f"{name}/net/") for name in ("params", "ema_params", "grads")]
    network = make_network(config, DataSpec(case["in/x"].shape[1:], sizes["num_classes"]))
    return meta, case, network, make_objective(config), trees


def _draws(meta, case):
    """Return the draws of a case in our convention."""
    x, e, t = (jnp.asarray(case[f"in/{name}"]) for name in "xet")
    labels, guidance = jnp.asarray(case["in/y"], jnp.int32), None
    if meta["kind"] == "shortcut":  # at x + floor e the path through the point is ours
        x, t = x + meta["objective"]["path_floor"] * e, 1 - t
        r = t - 2.0 ** -case["in/log2_steps"]
    else:
        r, one = jnp.asarray(case["in/r"]), jnp.ones_like(t)
        guidance = GuidanceScale(1 / jnp.asarray(case["in/beta"]), 0 * one, one)
    dropped, null = jnp.asarray(case["in/dropped"]), jnp.full_like(labels, NO_LABEL)
    told = {"condition": labels, "null": null, "guidance": guidance, "for_networks": True}
    rows = Rows(x=x, e=e, t=t, r=r, dropped=dropped, **told)
    if meta["kind"] == "tvm":
        return Draws(at_time(rows, jnp.asarray(case["in/s"])), rows)
    n = meta["batch"]["num_bootstrap"]
    interval, instant = jax.tree.map(lambda a: a[:n], rows), jax.tree.map(lambda a: a[n:], rows)
    return Draws(at_time(instant, instant.t), interval)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _evaluate(network, objective, params, teacher, draws):
    """Return u of rows with r < t and of the others, targets of the first, loss and gradient."""
    field, rows = as_field(network), draws.interval
    both = jax.tree.map(lambda *a: jnp.concatenate(a), rows, draws.instant)
    z = interpolate(both.x, both.e, t=both.t)
    u = field(params, z, r=both.r, t=both.t, condition=condition_of(both)).u
    target = u[:0]
    if hasattr(objective, "levels"):
        target = objective._parts(field, params, teacher, rows)[1]
    loss = jax.value_and_grad(lambda p: objective.loss(field, p, draws, 0, teacher), has_aux=True)
    return u, target, *loss(params)


@pytest.mark.parametrize("path", CASES, ids=lambda path: path.stem)
def test_reference_case_through_the_row(path):
    meta, case, network, objective, (params, teacher, theirs) = _load(path)
    draws, is_tvm = _draws(meta, case), meta["kind"] == "tvm"
    with jax.default_matmul_precision("highest"):
        u, target, (loss, metrics), ours = _evaluate(network, objective, params, teacher, draws)
    if is_tvm:
        scale = 1 / case["in/beta"][:, None, None, None]
        assert_close(u[: len(scale)], scale * case["out/network"], "u")
    else:
        assert_close(-u, case["out/u"], "u")
        assert_close(-target, case["out/target"][: len(target)], "target")
        for name, theirs_are in (("u_error", "loss_bootstrap"), ("v_error", "loss_flow")):
            assert_close(metrics[name].compute(), case[f"out/metric/{theirs_are}"], name)
    assert_close(loss, case["out/loss"], "loss")
    ours, theirs = flatten_dict(ours, sep="/"), flatten_dict(theirs, sep="/")
    assert ours.keys() == theirs.keys()
    for name in theirs:
        error = np.abs(ours[name] - theirs[name]).max() / np.abs(theirs[name]).max()
        assert error < 1e-4, f"gradient of {name}: {error:.1e}"


def test_reference_samples_of_shortcut():
    for path in (path for path in CASES if path.stem.startswith("shortcut")):
        _, case, network, _, (params, _, _) = _load(path)
        e, told = jnp.asarray(case["sample/e"]), Condition(jnp.asarray(case["sample/y"]))
        for key in (key for key in case if key.startswith("sample/steps/")):
            with jax.default_matmul_precision("highest"):
                ours = sample(as_field(network), params, e, told, steps=int(key.rsplit("/", 1)[1]))
            assert_close(ours, case[key], key)


def test_draws_of_the_rows():
    x, labels = jnp.zeros((256, 1)), jnp.zeros(256, jnp.int32)
    config = imagenet.get_config(ROWS["shortcut"])
    draws, levels = make_scheme(config).draw(jax.random.key(0), x, labels), config.times.levels
    steps = np.asarray(1 / (draws.interval.t - draws.interval.r))
    each = len(steps) // levels
    counts = [each + len(steps) % levels, *[each] * (levels - 1)]
    np.testing.assert_array_equal(np.sort(steps), np.repeat(2.0 ** np.arange(levels), counts))
    assert len(steps) == 256 // 8
    assert not draws.interval.dropped.any()
    place = 2**levels * draws.instant.t
    assert ((place == place.round()) & (place > 0)).all()
    draws = make_scheme(imagenet.get_config(ROWS["tvm"])).draw(jax.random.key(0), x, labels)
    assert len(draws.instant.t) == len(draws.interval.t) == len(x)
    assert abs(jnp.corrcoef(draws.instant.t, draws.interval.t)[0, 1]) < 0.2
