"""--mode=bench --config.bench.what=plan: bytes in closed form, collectives of the step, arithmetic redone by hand."""

import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import plans
import pytest
from conftest import ROOT
from jax.sharding import AbstractMesh

from configs.toy2d import get_config as toy2d
from mf_jax.bench.collectives import exchanges
from mf_jax.bench.compiled import product_flops
from mf_jax.bench.plan import _candidates
from mf_jax.bench.predict import predicted, ring_rate, timed
from mf_jax.bench.topologies import TOPOLOGIES
from mf_jax.config import make_network
from mf_jax.flow.records import DataSpec
from mf_jax.models import parameter_shapes
from mf_jax.runtime.sharding import state_sharding

MESHES = {"data": (8, 1), "both": (4, 2), "fsdp": (1, 8)}
SCALARS = 200
"""Metrics add about 25 numbers to what is reduced."""


@pytest.fixture(scope="module")
def planned(tmp_path_factory):
    """Return the outcomes of plans.py, whose process starts JAX with as many devices as it plans for."""
    process = subprocess.run(
        [sys.executable, ROOT / "tests" / "plans.py", tmp_path_factory.mktemp("plans")],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stderr
    return json.loads(process.stdout)


def _numbers(mesh):
    """Return the numbers in the parameters that a mesh splits, and in those that it does not."""
    config = toy2d()
    config.model.depth, config.model.width = 1, plans.WIDTH
    shapes = parameter_shapes(make_network(config, DataSpec((2,))), (2,))
    shardings = state_sharding(AbstractMesh(mesh, ("data", "fsdp")), shapes)
    pairs = list(zip(jax.tree.leaves(shapes), jax.tree.leaves(shardings), strict=True))
    return sum(a.size for a, s in pairs if s.spec), sum(a.size for a, s in pairs if not s.spec)


@pytest.mark.parametrize("name", MESHES)
def test_what_a_device_holds_is_the_closed_form(planned, name):
    outcome = planned[name]
    assert outcome["code"] == 0, outcome["errors"]
    *_, row = outcome["result"]["rows"]
    mesh = MESHES[name]
    split, whole = _numbers(mesh)
    assert (split > 0) == (mesh[1] > 1)
    params = 4 * (split // mesh[1] + whole)
    assert row["mesh"] == list(mesh)
    assert row["params_bytes"] == params
    assert row["ema_bytes"] == len(plans.AVERAGES) * params
    assert row["opt_state_bytes"] == 2 * params + 2 * 4  # the steps of adam and of its schedule
    assert row["batch_bytes"] == 64 // 8 * (2 * 4 + 4)
    assert 0 < row["rest_bytes"] < 4 * SCALARS
    held = sum(row[f"{part}_bytes"] for part in ("params", "ema", "opt_state", "rest", "batch"))
    assert row["total_bytes"] == held + row["temporary_bytes"]
    assert row["temporary_bytes"] >= 4 * (split + whole)  # the gradient, and what was gathered
    assert row["left_bytes"] == outcome["result"]["memory"] - row["total_bytes"]
    assert row["fits"] is True


@pytest.mark.parametrize("name", MESHES)
def test_collectives_are_those_of_the_step(planned, name):
    """Each split parameter is gathered once and its gradient scattered; all other gradients are reduced over all."""
    data, fsdp = MESHES[name]
    split, whole = _numbers((data, fsdp))
    found = {
        (each["kind"], each["axis"]): (each["payload_bytes"], each["devices"])
        for each in planned[name]["result"]["collectives"]
    }
    expected = {
        ("all-reduce", {"data": "data", "both": "data fsdp", "fsdp": "fsdp"}[name]): (4 * whole, 8)
    }
    if fsdp > 1:
        expected |= {(kind, "fsdp"): (4 * split, fsdp) for kind in ("all-gather", "reduce-scatter")}
    if name == "both":
        expected["all-reduce", "data"] = (4 * split // fsdp, data)
    assert found.keys() == expected.keys()
    for key, (payload, devices) in expected.items():
        assert abs(found[key][0] - payload) < 4 * SCALARS, key
        assert found[key][1] == devices


def test_it_is_printed_as_it_is_written(planned):
    out, result = (planned["both"][key] for key in ("out", "result"))
    for key in (
        "topology",
        "num_devices",
        "processes",
        "memory",
        "peak",
        "link",
        "outside",
        "utilisation",
    ):
        assert key in result, key
    assert (result["topology"], result["num_devices"], result["memory"]) == ("cpu-8", 8, 4e9)
    (row,) = result["rows"]
    assert row["gflop"] > 0
    assert row["collective_seconds"] == sum(each["seconds"] for each in result["collectives"])
    assert row["efficiency"] == row["compute_seconds"] / (
        row["compute_seconds"] + row["collective_seconds"]
    )
    for text in (
        "on 8 x cpu (planned on 1 hosts)",
        "fits as configured",
        "multiplies bfloat16 as float32",
    ):
        assert text in out
    for value in (row["params_bytes"] / 1e9, row["temporary_bytes"] / 1e9, row["gflop"]):
        assert f"│ {value:.4g} " in out
    assert "│ yes " in out
    assert "data fsdp" in out


def test_settings_that_make_it_fit_are_found(planned):
    """An MLP computes nothing again; what the state alone overfills is not compiled."""
    *tried, last = planned["fsdp"]["result"]["rows"]
    names = [f"mesh.data=0 mesh.fsdp={size}" for size in (2, 4, 8)]
    assert [row["settings"] for row in tried] == ["as configured", *names[:-1]]
    assert not any(row["fits"] for row in tried)
    assert all(row["total_bytes"] > plans.MEMORY["tight"] for row in tried)
    assert ["temporary_bytes" in row for row in tried] == [False, False, True]
    assert (last["settings"], last["fits"]) == (names[-1], True)
    assert f"does not fit as configured, but with {names[-1]}" in planned["fsdp"]["out"]


def test_it_says_when_nothing_fits(planned):
    result = planned["nothing"]["result"]
    assert [row["fits"] for row in result["rows"]] == [False] * 4
    assert result["collectives"] == []
    assert (
        "nor with anything that changes no result: use a smaller train.batch_size"
        in result["notes"][0]
    )


def test_what_computes_again_is_tried_before_what_splits_more():
    config = toy2d()
    config.model.name, config.model.remat, config.mesh.fsdp = "dit", "dots", 2
    scanned = [{"scan": True}, {"scan": True, "remat": "block"}]
    models = [{}, *({"model": model} for model in scanned)]
    meshes = [{}, *({"mesh": {"data": 0, "fsdp": size}} for size in (4, 8))]
    late = [{"gather": "block"}, *({"data": 0, "fsdp": size, "gather": "block"} for size in (4, 8))]
    last = [{"mesh": mesh, **models[-1]} for mesh in late]
    assert (
        list(_candidates(config, 8)) == [mesh | model for mesh in meshes for model in models] + last
    )
    config.mesh.gather = "block"
    assert list(_candidates(config, 8)) == [mesh | model for mesh in meshes for model in models]
    config.model.name, config.mesh.gather = "unet", "step"
    assert list(_candidates(config, 8)) == meshes


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("batch", ["train.batch_size=12", "8 devices"]),
        ("mesh", ["mesh.fsdp=3", "must multiply to the 8 devices"]),
        (
            "started",
            ["bench.topology='v5e-16'", "needs 16", "started with 8", "a process of its own"],
        ),
    ],
)
def test_what_the_devices_cannot_share_is_one_line(planned, name, words):
    outcome = planned[name]
    assert (outcome["code"], outcome["out"], outcome["errors"].count("\n")) == (2, "", 1), outcome
    assert all(word in outcome["errors"] for word in words), outcome["errors"]
    assert not outcome["made"]


@pytest.mark.parametrize(
    ("flag", "words"),
    [
        (
            "topology=v5e-61",
            ["bench.topology='v5e-61'", ", ".join(TOPOLOGIES), "did you mean v5e-16?"],
        ),
        ("utilisation=0.0", ["bench.utilisation=0.0", "above 0 and at most 1"]),
        ("utilisation=1.5", ["bench.utilisation=1.5", "above 0 and at most 1"]),
    ],
)
def test_bad_input_is_one_line(command, tmp_path, flag, words):
    what = "plan" if flag.startswith("topology") else "step"
    flags = (
        "--mode=bench",
        f"--config.bench.what={what}",
        f"--workdir={tmp_path}/run",
        f"--config.bench.{flag}",
    )
    code, out, errors = command("--config=configs/toy2d.py", *flags)
    assert (code, out, errors.count("\n")) == (2, "", 1), errors
    assert all(word in errors for word in words), errors


PROGRAM = """HloModule step

%body (p: (s32[], f32[4,8])) -> (s32[], f32[4,8]) {
  %left = f32[4,8]{1,0} parameter(0)
  %product = f32[4,4]{1,0} dot(%left, %left), lhs_contracting_dims={1}, rhs_contracting_dims={1}
  ROOT %all-gather.1 = f32[4,8]{1,0} all-gather(%left), replica_groups=[2,4]<=[4,2]T(1,0), dimensions={0}
}

ENTRY %main (a: f32[16]) -> f32[16] {
  %loop = (s32[], f32[4,8]) while(%t), condition=%c, body=%body, backend_config={"known_trip_count":{"n":"5"}}
  %reduce-scatter = f32[6]{0} reduce-scatter(%a), replica_groups={{0,1},{2,3},{4,5},{6,7}}, to_apply=%add
  %both = (bf16[16]{0}, pred[]) all-reduce(%a, %b), replica_groups=[1,8]<=[8], to_apply=%add
  ROOT %permuted = f32[3]{0} collective-permute(%a), source_target_pairs={{0,1},{1,0}}
}
"""


def test_what_a_program_exchanges_is_read_from_its_text():
    found = {each.kind: each for each in exchanges(PROGRAM, {"data": 4, "fsdp": 2})}
    values = {
        kind: (each.axis, each.group, each.count, each.numbers, each.payload)
        for kind, each in found.items()
    }
    everyone = tuple(range(8))
    assert values == {
        "all-gather": ("data", (0, 2, 4, 6), 5, 5 * 32, 5 * 128),
        "reduce-scatter": ("fsdp", (0, 1), 1, 12, 48),
        "all-reduce": ("data fsdp", everyone, 1, 17, 33),
        "collective-permute": ("other", everyone, 1, 3, 12),
    }
    assert {kind: each.passed_on for kind, each in found.items()} == {
        "all-gather": 3 / 4,
        "reduce-scatter": 1 / 2,
        "all-reduce": 2 * 7 / 8,
        "collective-permute": 1.0,
    }
    assert product_flops(PROGRAM) == 5 * 2 * 16 * 8
    assert exchanges(PROGRAM, {"data": 2, "fsdp": 4})[0].axis == "other"


def test_products_of_a_compiled_program():
    """Seven products of 3 x 16 and 16 x 16 in a loop, and a convolution of 3 x 3 pixels from 2 to 5 channels."""

    def function(x, w, image, kernel):
        looped, _ = jax.lax.scan(lambda x, _: (jnp.tanh(x @ w), None), x, length=7)
        numbers = ("NHWC", "HWIO", "NHWC")
        out = jax.lax.conv_general_dilated(image, kernel, (1, 1), "SAME", dimension_numbers=numbers)
        return looped, out

    shapes = [(3, 16), (16, 16), (1, 6, 6, 2), (3, 3, 2, 5)]
    text = (
        jax.jit(function)
        .lower(*(np.ones(shape, np.float32) for shape in shapes))
        .compile()
        .as_text()
    )
    assert product_flops(text) == 7 * 2 * 3 * 16 * 16 + 2 * 36 * 5 * 9 * 2


def test_a_ring_is_as_fast_as_what_leaves_a_host():
    h100 = TOPOLOGIES["h100-64"]
    assert ring_rate(h100, tuple(range(8, 16))) == 450e9
    assert ring_rate(h100, tuple(range(64))) == 8 * 50e9
    assert ring_rate(h100, tuple(range(0, 64, 8))) == 50e9
    assert ring_rate(h100, tuple(range(0, 64, 4))) == 100e9
    assert ring_rate(TOPOLOGIES["v5e-16"], tuple(range(16))) == 200e9


def test_the_time_of_a_step_by_hand():
    """4e11 operations at 1e11 a second; a reduction of 1 GB among 8 and a gather of 2 GB at 1e10 bytes a second."""
    topology = TOPOLOGIES["cpu-8"]
    text = (
        "ENTRY %main (a: f32[1]) -> f32[1] {\n"
        "  %r = f32[250000000]{0} all-reduce(%a), replica_groups={{0,1,2,3,4,5,6,7}}, to_apply=%add\n"
        "  %g = f32[500000000]{0} all-gather(%a), replica_groups={{0,1,2,3},{4,5,6,7}}, dimensions={0}\n}"
    )
    rows = {
        row["kind"]: row
        for row in (timed(e, topology) for e in exchanges(text, {"data": 2, "fsdp": 4}))
    }
    assert rows["all-reduce"]["seconds"] == pytest.approx(2 * 7 / 8 * 1e9 / 1e10)
    assert rows["all-gather"]["seconds"] == pytest.approx(3 / 4 * 2e9 / 1e10)
    step = predicted(4e11, list(rows.values()), topology, 0.4)
    assert step == {
        "gflop": 400.0,
        "floor_seconds": pytest.approx(4.0),
        "compute_seconds": pytest.approx(10.0),
        "collective_seconds": pytest.approx(0.325),
        "efficiency_at_peak": pytest.approx(4 / 4.325),
        "efficiency": pytest.approx(10 / 10.325),
    }


def test_every_machine_is_whole_hosts():
    for name, topology in TOPOLOGIES.items():
        assert topology.devices % topology.processes == 0, name
        assert topology.outside <= topology.link, name
    assert {name: TOPOLOGIES[name][:2] for name in ("v5e-16", "v4-32", "v5p-64", "h100-64")} == {
        "v5e-16": (16, 4),
        "v4-32": (16, 4),
        "v5p-64": (32, 8),
        "h100-64": (64, 8),
    }
