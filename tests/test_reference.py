"""Recorded loss evaluations of the published code, reproduced in outputs, loss and gradients.

Every size and setting comes from the case's own `meta`.
"""

import json

import jax
import jax.numpy as jnp
import pytest
from recorded import FOLDER, assert_close, assert_gradients, draws_of, load_case

from mf_jax import AdaptiveWeight, Guidance, ImprovedMeanFlow, MeanFlow, PixelMeanFlow
from mf_jax.flow.paths import interpolate
from mf_jax.flow.records import Condition
from mf_jax.models import SIZES, DataPrediction, DiT, InContextDiT, as_field, parameter_shapes

CASES = sorted(path for kind in ("meanflow", "imf", "pmf") for path in FOLDER.glob(f"{kind}_*.npz"))


def _network(meta, params):
    """Return the network of a case; a bottleneck's width is that of its weights."""
    model = meta["model"]
    sizes = {
        "patch_size": model["patch_size"],
        "depth": model["depth"],
        "width": model["hidden_size"],
        "num_heads": model["num_heads"],
        "num_classes": model["num_classes"],
    }
    if meta["kind"] == "meanflow":
        return DiT(**sizes)
    sizes["head_depth"] = model["aux_head_depth"]
    if meta["kind"] == "imf":
        return InContextDiT(**sizes)
    bottleneck = params["bottleneck"]["kernel"].shape[-1]
    return DataPrediction(InContextDiT(**sizes, bottleneck=bottleneck, positions="grid"))


def _objective(meta):
    settings = meta["objective"]
    weight = AdaptiveWeight(p=settings["norm_p"], c=settings["norm_eps"])
    if meta["kind"] != "meanflow":
        return {"imf": ImprovedMeanFlow, "pmf": PixelMeanFlow}[meta["kind"]](weight=weight)
    guidance = Guidance(
        omega=settings["omega"],
        kappa=settings["kappa"],
        t_min=settings["guidance_t_start"],
        t_max=settings["guidance_t_end"],
    )
    off = settings["guidance"] == "none"
    return MeanFlow(guidance=Guidance() if off else guidance, weight=weight)


@pytest.mark.parametrize("path", CASES, ids=lambda p: p.stem)
def test_recorded_case(path):
    meta, case, params, grads = load_case(path)
    field, draws, objective = (
        as_field(_network(meta, params)),
        draws_of(meta, case),
        _objective(meta),
    )
    rows = jax.tree.map(lambda *a: jnp.concatenate(a), draws.instant, draws.interval)
    with jax.default_matmul_precision(meta["matmul_precision"]):
        z = interpolate(rows.x, rows.e, t=rows.t)
        condition = Condition(rows.condition, rows.guidance)
        outputs = jax.jit(field)(params, z, r=rows.r, t=rows.t, condition=condition)
        loss, ours = jax.jit(jax.value_and_grad(lambda p: objective.loss(field, p, draws)[0]))(
            params
        )
    for name, output in outputs._asdict().items():
        if f"out/{name}" in case:
            assert_close(output, case[f"out/{name}"], name)
    assert_close(loss, case["out/loss"], "loss")
    assert_gradients(ours, grads)


def test_reference_counts_of_parameters():
    assert {path.stem.split("_")[0] for path in CASES} == {"meanflow", "imf", "pmf"}, FOLDER
    counts = json.loads((FOLDER / "parameter_counts.json").read_text())
    dits = {name.removeprefix("DiT_"): n for name, n in counts.items() if name[:4] == "DiT_"}
    for name, count in dits.items():
        size, patch = name.split("_")
        network = DiT(patch_size=int(patch), num_classes=1000, scan=True, **SIZES["dit"][size])
        shapes = parameter_shapes(network, (32, 32, 4))
        assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == count, name
    assert set(SIZES["dit"]) - {"digits"} == {name.split("_")[0] for name in dits}
