"""Several devices compute what one computes, and parameters are really split over fsdp."""

import dataclasses
import inspect
import json

import jax
import numpy as np
import pytest
from conftest import refuses
from jax.sharding import AbstractMesh, PartitionSpec
from jobs import Job

from mf_jax.runtime.sharding import make_mesh, state_sharding


@dataclasses.dataclass(frozen=True)
class _Chip:
    """The attributes of a device of a slice that a mesh reads."""

    id: int
    process_index: int
    platform: str = "tpu"
    device_kind: str = "TPU v5 lite"


def test_rows_of_a_process_are_beside_one_another_where_hosts_alternate_on_the_torus():
    """Hosts of 2x2 chips, numbered along the rows of a slice of 4x4, read rows in one order."""
    hosts = (0, 0, 1, 1, 0, 0, 1, 1, 2, 2, 3, 3, 2, 2, 3, 3)
    chips = [_Chip(*numbers) for numbers in enumerate(hosts)]
    mesh = inspect.unwrap(make_mesh)(data=0, fsdp=2, devices=chips)
    assert dict(mesh.shape) == {"data": 8, "fsdp": 2}
    assert [chip.process_index for chip in mesh.devices.flat] == sorted(hosts)
    assert [chip.id for chip in mesh.devices.flat][:5] == [0, 1, 4, 5, 2]
    for data, fsdp in ((3, 2), (-1, 1), (0, 0), (0, 3)):
        more = {"data": data, "fsdp": fsdp, "devices": chips}
        refuses("must multiply to the 16 devices", inspect.unwrap(make_mesh), **more)


def test_large_arrays_are_split_along_their_largest_axis_small_ones_are_not():
    mesh = AbstractMesh((2, 4), ("data", "fsdp"))
    shapes = {"kernel": (256, 1024), "odd": (1001, 400), "bias": (1024,), "prime": (211, 113)}
    state = {name: jax.ShapeDtypeStruct(shape, np.float32) for name, shape in shapes.items()}
    found = state_sharding(mesh, state)
    specs = [found[name].spec for name in shapes]
    assert specs == [PartitionSpec(None, "fsdp")] * 2 + [PartitionSpec()] * 2


@pytest.fixture(scope="module")
def compiled():
    """Return the collectives of steps compiled for 8 devices; see collectives.py."""
    (ended,) = Job(1, program=("tests/collectives.py",), devices=8).finish()
    assert ended.code == 0, ended
    return json.loads(ended.output)


SCALARS = 200
"""Metrics add about 25 numbers; of two biases of 128 with one gradient, XLA reduces one."""


def test_devices_exchange_the_gradient_once_and_parameters_as_often_as_they_need_them(compiled):
    """Terminal velocity gathers twice: its targets come from the moving average.

    Blocks that gather their own parameters do it wherever they are computed, again for gradients.
    """
    for case, gathers, gathers_in_blocks, shares in (
        ("data/flow/step", 0, 0, 0),
        ("both/loop/step", 1, 0, 2),
        ("fsdp/terminal/step", 2, 0, 0),
        ("both/loop/block", 1, 3, 2),
    ):
        exchanged, split = compiled[case]["collectives"], compiled[case]["split"]
        in_blocks = compiled[case]["in_blocks"] if gathers_in_blocks else 0
        assert (split > in_blocks, in_blocks > 0) == (gathers > 0, gathers_in_blocks > 0), case
        reduced = compiled[case]["whole"] + (split // shares if shares else 0)
        assert abs(exchanged.pop("all-reduce") - reduced) < SCALARS, case
        gathered = gathers * split + gathers_in_blocks * in_blocks
        expected = {"all-gather": gathered, "reduce-scatter": split + in_blocks}
        assert exchanged == (expected if split else {}), case
    rows, tokens = compiled["attention"]
    assert (rows, bool(tokens)) == ({}, True), "only split tokens need communication"


def test_eight_devices_compute_what_one_computes(compiled):
    assert compiled["both/loop/step"]["apart"] < 1e-6
    assert compiled["both/loop/block"]["apart"] < 1e-6
    assert compiled["in parts"] < 1e-5
