"""Shortcut models and terminal velocity matching, as built from their config rows, as published.

Every size and setting comes from the case's own `meta`; those of the row are the published ones.
"""

import functools
import json
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import unflatten_dict
from recorded import FOLDER, assert_close, assert_gradients, below, config_of, from_published

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
_NAMES = {  # of the published Shortcut network, and ours
    "PatchEmbed_0/Conv_0": "patch_embedding",
    "TimestepEmbedder_0/Dense_0": "condition/t_embedding/hidden",
    "TimestepEmbedder_0/Dense_1": "condition/t_embedding/out",
    "TimestepEmbedder_1/Dense_0": "condition/h_embedding/hidden",
    "TimestepEmbedder_1/Dense_1": "condition/h_embedding/out",
    "LabelEmbedder_0/Embed_0": "condition/label_embedding",
    "Dense_0": "modulation",
    "Dense_2": "attention/qkv",  # queries; Dense_1 are keys, Dense_3 values
    "Dense_4": "attention/out",
    "MlpBlock_0/Dense_0": "expand",
    "MlpBlock_0/Dense_1": "contract",
    "FinalLayer_0/Dense_0": "final_modulation",
    "FinalLayer_0/Dense_1": "final",
}


def _from_shortcut(flat):
    """Return published parameters, or their gradient, as ours, where t = 1 is noise and u = e - x.

    The map of the first time layer is orthogonal, so gradients follow it too.
    """
    ours = {}
    for name, a in flat.items():
        block, layer, leaf = re.fullmatch(r"(DiTBlock_\d+/)?(.*)/(\w+)", name).groups("")
        if layer == "Dense_2":
            a = np.concatenate([flat[f"{block}Dense_{i}/{leaf}"] for i in (2, 1, 3)], axis=-1)
        if layer in _NAMES:
            name = f"{block.replace('DiTB', 'b')}{_NAMES[layer]}/{leaf}"
            ours[name] = a.reshape(-1, a.shape[-1]) if a.ndim > 2 else a
    ours |= {name: -ours[name] for name in ("final/kernel", "final/bias")}
    time = "condition/t_embedding/hidden/kernel"
    return unflatten_dict(ours | {time: reversed_time(ours[time])}, sep="/")


def _load(path):
    """Return meta, the case, network and objective of its row, parameters, teacher, gradients."""
    case = dict(np.load(path))
    meta = json.loads(str(case.pop("meta")))
    sizes, said = meta["model"], meta["objective"]
    config = config_of(ROWS[meta["kind"]], sizes)
    if meta["kind"] == "tvm":
        config.draws.omega_min = config.draws.omega_max = said["cfg"]
    else:
        config.objective.target_clip = said["clip"]
        config.times.levels = int(math.log2(said["denoise_timesteps"]))
        config.guidance.omega = said["cfg_scale"] if meta["batch"]["num_guided"] else 1.0

    def tree(prefix):
        flat = below(case, prefix)
        if meta["kind"] == "shortcut":
            return _from_shortcut(flat)
        return from_published("tvm", below(flat, "model."))

    trees = (tree(f"{name}/net/") for name in ("params", "ema_params", "grads"))
    network = make_network(config, DataSpec(case["in/x"].shape[1:], sizes["num_classes"]))
    return meta, case, network, make_objective(config), *trees


def _draws(meta, case):
    """Return the draws of a case in our convention."""
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
def _evaluate(network, objective, params, teacher, draws):
    """Return u of rows with r < t and of the others, targets of the first, loss and gradient."""
    field, rows = as_field(network), draws.interval
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


@pytest.mark.parametrize("path", CASES, ids=lambda path: path.stem)
def test_reference_case_through_the_row(path):
    meta, case, network, objective, params, teacher, theirs = _load(path)
    with jax.default_matmul_precision("highest"):
        draws = _draws(meta, case)
        u, target, loss, ours = _evaluate(network, objective, params, teacher, draws)
    if target is None:
        beta = case["in/beta"][:, None, None, None]
        assert_close(beta * u[: len(beta)], case["out/network"], "network")
    else:
        assert_close(-u, case["out/u"], "u")
        assert_close(-target, case["out/target"][: len(target)], "target")
    assert_close(loss, case["out/loss"], "loss")
    assert_gradients(ours, theirs, 1e-4)


def test_reference_samples_of_shortcut():
    for path in (path for path in CASES if path.stem.startswith("shortcut")):
        _, case, network, _, params, *_ = _load(path)
        e, told = jnp.asarray(case["sample/e"]), Condition(jnp.asarray(case["sample/y"]))
        for key in (key for key in case if key.startswith("sample/steps/")):
            with jax.default_matmul_precision("highest"):
                ours = sample(as_field(network), params, e, told, steps=int(key.split("/")[-1]))
            assert_close(ours, case[key], key)


def test_draws_of_the_rows():
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
