"""Sums of feature rows on the device: as exact as float64, whatever the batches, the padding and the devices."""

import inspect
import os
import subprocess
import sys

import jax
import numpy as np
import pytest
from conftest import ROOT

from mf_jax.errors import BadInput
from mf_jax.metrics import moments
from mf_jax.metrics.moments import (
    add_rows,
    from_arrays,
    mean_and_covariance,
    merge,
    start_sums,
    to_arrays,
)

WIDTH = 24


@pytest.fixture(scope="module")
def rows():
    rng = np.random.default_rng(0)
    spread = np.exp(rng.standard_normal(WIDTH))
    return (rng.standard_normal((1000, WIDTH)) * spread + 30).astype(np.float32)


def summed(rows, batch, sums=None, junk=np.nan):
    """Add rows in batches, the last filled up with junk of weight 0."""
    sums = start_sums(rows.shape[1]) if sums is None else sums
    for start in range(0, len(rows), batch):
        part = rows[start : start + batch]
        filled = np.full((batch, rows.shape[1]), junk, np.float32)
        filled[: len(part)] = part
        sums = add_rows(sums, filled, np.arange(batch) < len(part))
    return sums


def check(sums, rows, tolerance=1e-6):
    count, mean, covariance = mean_and_covariance(sums)
    exact = np.cov(rows.astype(np.float64), rowvar=False).reshape(len(mean), -1)
    assert (count, mean.dtype, covariance.dtype) == (len(rows), np.float64, np.float64)
    spread = np.sqrt(np.diag(exact))
    np.testing.assert_allclose(
        mean / spread, rows.astype(np.float64).mean(0) / spread, atol=tolerance, rtol=0
    )
    scale = np.outer(spread, spread)
    np.testing.assert_allclose(covariance / scale, exact / scale, atol=tolerance, rtol=0)
    np.testing.assert_array_equal(covariance, covariance.T)


@pytest.mark.parametrize("batch", [1000, 250, 97])
def test_mean_and_covariance_are_those_of_float64(rows, batch):
    check(summed(rows, batch), rows)


@pytest.mark.parametrize("junk", [np.nan, np.inf, 1e30])
def test_rows_of_weight_0_are_not_counted(rows, junk):
    check(summed(rows[:123], 50, junk=junk), rows[:123])


def test_a_batch_without_rows_changes_nothing(rows):
    sums = add_rows(start_sums(WIDTH), np.full((4, WIDTH), np.nan, np.float32), np.zeros(4))
    check(summed(rows[:64], 32, sums), rows[:64])


def test_two_rows_far_from_zero_give_their_difference():
    sums = summed(np.array([[1e6], [1e6 + 2]], np.float32), 2)
    assert mean_and_covariance(sums)[1:] == (1e6 + 1, 2.0)


def test_what_float32_would_drop_is_kept_by_the_compiled_program():
    """2^24 + 1 = 2^24 in float32: after 2^24 has come, 300 ones one at a time would all be lost."""
    rows = np.concatenate([[[4096.0]], np.ones((300, 1))]).astype(np.float32)
    sums = summed(rows, 1, start_sums(1, centre=np.zeros(1)))
    assert float(sums.scatter[0, 0]) + float(sums.scatter_rest[0, 0]) == 2**24 + 300
    sums = summed(
        np.concatenate([[[2.0**25]], rows[1:]]).astype(np.float32), 1, start_sums(1, np.zeros(1))
    )
    assert float(sums.total[0]) + float(sums.total_rest[0]) == 2**25 + 300


def test_a_sum_of_two_loses_nothing_when_compiled():
    rng = np.random.default_rng(1)
    a, b = (rng.standard_normal(1000) * 2.0 ** rng.integers(-20, 20, 1000) for _ in range(2))
    a, b = a.astype(np.float32), b.astype(np.float32)
    total, rest = (np.asarray(x, np.float64) for x in jax.jit(moments.two_sum)(a, b))
    np.testing.assert_array_equal(total + rest, a.astype(np.float64) + b)
    assert np.count_nonzero(rest) > 500


def test_a_large_batch_is_not_added_in_float32_alone():
    """One row of 4096 and as many ones as hide behind it, in a single batch."""
    rows = np.ones((4096, 1), np.float32)
    rows[0] = 4096
    sums = add_rows(start_sums(1, centre=np.zeros(1)), rows, np.ones(len(rows)))
    exact = 2**24 + 4095
    assert float(sums.scatter[0, 0]) + float(sums.scatter_rest[0, 0]) == pytest.approx(
        exact, abs=256
    )


def test_the_first_rows_choose_the_centre_unless_one_is_given(rows):
    sums = summed(rows[:100], 50)
    np.testing.assert_allclose(sums.centre, rows[:50].mean(0), rtol=1e-5)
    given = summed(rows[:100], 50, start_sums(WIDTH, centre=np.full(WIDTH, 29.0)))
    np.testing.assert_array_equal(given.centre, np.full(WIDTH, 29.0))
    check(given, rows[:100], 1e-4)


@pytest.mark.parametrize("split", [0, 1, 400, 1000])
def test_merged_sums_are_those_of_all_rows(rows, split):
    check(merge(summed(rows[:split], 100), summed(rows[split:], 100)), rows)


def test_merging_keeps_what_float32_would_drop(rows):
    parts = [summed(part, 100) for part in np.split(rows, 10)]
    merged = parts[0]
    for part in parts[1:]:
        merged = merge(merged, part)
    exact = mean_and_covariance(parts[0])[2] * 99
    means = [mean_and_covariance(part)[1] for part in parts]
    for part in parts[1:]:
        exact += mean_and_covariance(part)[2] * 99
    exact += 100 * 9 * np.cov(np.array(means), rowvar=False)
    np.testing.assert_allclose(mean_and_covariance(merged)[2] * 999, exact, rtol=1e-10, atol=1e-9)


def test_sums_are_kept_in_a_file_and_continued(rows, tmp_path):
    np.savez(tmp_path / "sums.npz", **to_arrays(summed(rows[:300], 100)))
    with np.load(tmp_path / "sums.npz") as file:
        continued = summed(rows[300:], 100, from_arrays(file))
    for name, array in to_arrays(summed(rows, 100)).items():
        np.testing.assert_array_equal(to_arrays(continued)[name], array)


def test_what_cannot_be_is_refused(rows):
    with pytest.raises(BadInput, match="1 feature rows have no covariance"):
        mean_and_covariance(summed(rows[:1], 1))
    for bad in (np.nan, np.inf):
        broken = rows[:20].copy()
        broken[3, 2] = bad
        for batch in (10, 20):
            with pytest.raises(BadInput, match="some of 20 feature rows hold NaN"):
                mean_and_covariance(summed(broken, batch))
    with pytest.raises(BadInput, match="of 3 features cannot be added to sums over rows of 24"):
        inspect.unwrap(merge)(start_sums(WIDTH), start_sums(3))
    with pytest.raises(BadInput, match="lack scatter, total_rest"):
        from_arrays(
            {
                k: v
                for k, v in to_arrays(start_sums(2)).items()
                if k not in ("scatter", "total_rest")
            }
        )


MESH = """
import jax, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from mf_jax.metrics.moments import add_rows, mean_and_covariance, start_sums
rows = np.random.default_rng(0).standard_normal((3000, 7)).astype(np.float32) + 5
mesh = Mesh(np.array(jax.devices()).reshape(4, 2), ("data", "fsdp"))
place = lambda x: jax.device_put(x, NamedSharding(mesh, PartitionSpec(("data", "fsdp"))))
sums = start_sums(7)
for start, size in ((0, 40), (40, 2800), (2840, 160)):
    part = rows[start : start + size].copy()
    part[-3:] = np.nan
    sums = add_rows(sums, place(part), place(np.arange(size) < size - 3))
    assert all(x.sharding.is_fully_replicated and len(x.sharding.device_set) == 8 for x in jax.tree.leaves(sums))
kept = np.delete(rows, [37, 38, 39, 2837, 2838, 2839, 2997, 2998, 2999], axis=0).astype(np.float64)
count, mean, covariance = mean_and_covariance(sums)
assert count == len(kept)
np.testing.assert_allclose(mean, kept.mean(0), rtol=1e-8)
np.testing.assert_allclose(covariance, np.cov(kept, rowvar=False), atol=1e-7)
"""


def test_rows_may_be_split_over_a_mesh():
    flags = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
    environment = os.environ | {"PYTHONPATH": str(ROOT), "XLA_FLAGS": flags}
    result = subprocess.run(
        [sys.executable, "-c", MESH], env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
