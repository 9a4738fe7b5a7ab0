"""Several devices compute what one computes, and parameters are really split over fsdp."""

import dataclasses
import inspect
import json

import jax
import numpy as np
import pytest
from jax.sharding import AbstractMesh, PartitionSpec
from jobs import Job

from mf_jax.errors import BadInput
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
        with pytest.raises(BadInput, match="must multiply to the 16 devices"):
            inspect.unwrap(make_mesh)(data=data, fsdp=fsdp, devices=chips)


def test_large_arrays_are_split_along_their_largest_axis_small_ones_are_not():
    mesh = AbstractMesh((2, 4), ("data", "fsdp"))
    shapes = {"kernel": (256, 1024), "odd": (1001, 400), "bias": (1024,), "prime": (211, 113)}
    state = {name: jax.ShapeDtypeStruct(shape, np.float32) for name, shape in shapes.items()}
    assert {name: s.spec for name, s in state_sharding(mesh, state).items()} == {
        "kernel": PartitionSpec(None, "fsdp"),
        "odd": PartitionSpec(None, "fsdp"),
        "bias": PartitionSpec(),
        "prime": PartitionSpec(),
    }


@pytest.fixture(scope="module")
def compiled():
    """Return the collectives of steps compiled for 8 devices; see collectives.py."""
    (ended,) = Job(1, program=("tests/collectives.py",), devices=8).finish()
    assert ended.code == 0, ended
    return json.loads(ended.output)


SCALARS = 200
"""Metrics add about 25 numbers; of two biases of 128 with one gradient, XLA reduces one."""


def test_devices_that_split_rows_exchange_the_gradient_once_and_nothing_else(compiled):
    found = compiled["data/guided/step"]
    assert set(found["collectives"]) == {"all-reduce"}
    assert abs(found["collectives"]["all-reduce"] - found["whole"]) < SCALARS


def test_devices_that_split_parameters_also_gather_each_once(compiled):
    """Terminal velocity gathers twice: its targets come from the moving average."""
    for case, copies, shards in (("both/loop", 1, 2), ("fsdp/terminal", 2, 0)):
        found = compiled[f"{case}/step"]
        exchanged, split = found["collectives"], found["split"]
        assert split > 0
        assert set(exchanged) == {"all-gather", "reduce-scatter", "all-reduce"}
        assert exchanged["all-gather"] == copies * split
        assert exchanged["reduce-scatter"] == split
        reduced = found["whole"] + (split // shards if shards else 0)
        assert abs(exchanged["all-reduce"] - reduced) < SCALARS


def test_blocks_that_gather_their_own_parameters_do_it_wherever_they_are_computed(compiled):
    """Forwards for targets, rows with r < t and r = t, the last two again for gradients: five."""
    found = compiled["both/loop/block"]
    assert 0 < found["in_blocks"] < found["split"]
    assert found["collectives"]["all-gather"] == found["split"] + 4 * found["in_blocks"]
    assert found["collectives"]["reduce-scatter"] == found["split"] + found["in_blocks"]
    reduced = found["whole"] + found["split"] // 2
    assert abs(found["collectives"]["all-reduce"] - reduced) < SCALARS


def test_eight_devices_compute_what_one_computes(compiled):
    assert compiled["both/loop/step"]["apart"] < 1e-6
    assert compiled["both/loop/block"]["apart"] < 1e-6
