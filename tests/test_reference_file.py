"""Files of reference statistics: ours and those of other tools are read, damage is named."""

import hashlib
import io
import tracemalloc
import zipfile

import numpy as np
import pytest
from conftest import refuses

from mf_jax.metrics import reference_file
from mf_jax.metrics.frechet import Gaussian, Moments
from mf_jax.metrics.reference_file import Statistics, read_pictures, read_reference, write_reference


@pytest.fixture
def statistics(rng):
    pooled, spatial = (Moments.of(rng.standard_normal((40, width))).gaussian for width in (6, 5))
    return Statistics(40, pooled, spatial, rng.standard_normal((11, 6)).astype(np.float32))


@pytest.fixture
def pictures(rng):
    return rng.integers(256, size=(23, 4, 5, 3), dtype=np.uint8)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "reference.npz"


def same(reference, statistics):
    for part in ("num_images", "pooled", "spatial", "features"):
        np.testing.assert_equal(getattr(reference, part), getattr(statistics, part))


def refused(path, message, read=read_reference):
    refuses(f"^{path}: .*{message}", read, path)


def test_our_files_are_read_by_us_and_by_others(path, statistics, pictures):
    path = path.parent / "new" / path.name
    blocks = (pictures[i : i + 10] for i in range(0, 23, 10))
    write_reference(path, statistics, pictures=blocks, num_pictures=23)
    assert [x.name for x in path.parent.iterdir()] == [path.name]
    reference = read_reference(path)
    same(reference, statistics)
    assert (reference.path, reference.num_pictures) == (str(path), 23)
    assert reference.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    (mu, sigma), (mu_s, sigma_s), features = (
        getattr(statistics, part) for part in ("pooled", "spatial", "features")
    )
    moments = {"mu": mu, "sigma": sigma, "mu_s": mu_s, "sigma_s": sigma_s, "num_images": 40}
    moments |= {"features": features, "arr_0": pictures}
    np.testing.assert_equal(dict(np.load(path)), moments)


def test_files_of_other_tools_are_read(path, statistics, pictures):
    mu, sigma = statistics.pooled
    mu, sigma = pooled = Gaussian(mu.astype(np.float32), np.asfortranarray(sigma))
    spatial = dict(zip(("mu_s", "sigma_s"), statistics.spatial, strict=True))
    for write in (np.savez, np.savez_compressed):
        write(path, mu=mu, sigma=sigma)
        same(read_reference(path), Statistics(0, pooled))
        write(path, mu=mu, sigma=sigma, **spatial, arr_0=pictures)
        reference = read_reference(path)
        same(reference, Statistics(0, pooled, statistics.spatial))
        assert reference.pooled.mean.dtype == np.float64
        assert reference.num_pictures == 23
        np.testing.assert_array_equal(np.concatenate(list(read_pictures(path, 7))), pictures)


def test_no_more_than_a_block_is_held(path, statistics, pictures):
    np.savez(path, pictures)
    assert reference_file.count_pictures(path) == 23
    for size, lengths in ((10, [10, 10, 3]), (23, [23]), (100, [23])):
        blocks = list(read_pictures(path, size))
        assert [len(block) for block in blocks] == lengths
        np.testing.assert_array_equal(np.concatenate(blocks), pictures)
    refuses(r"holds pictures \(arr_0\) and no statistics", read_reference, path)
    seen = []
    same(read_reference(path, lambda blocks: seen.extend(blocks) or statistics), statistics)
    np.testing.assert_array_equal(np.concatenate(seen), pictures)
    block = np.zeros((100, 64, 64, 3), np.uint8)  # 1.2 MB, of 25 MB
    tracemalloc.start()
    write_reference(path, statistics, pictures=(block.copy() for _ in range(20)), num_pictures=2000)
    reference = read_reference(path, lambda blocks: pytest.fail("statistics are there"))
    assert reference.num_pictures == 2000
    assert sum(len(x) for x in read_pictures(path, 100)) == 2000
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert path.stat().st_size > 20 * block.nbytes
    assert peak < 8 * block.nbytes


def test_a_write_that_fails_leaves_the_old_file(path, statistics, pictures):
    write_reference(path, statistics)
    before = path.read_bytes()
    more = {"pictures": [pictures], "num_pictures": 22}
    refuses("num_pictures=22: there were 23", write_reference, path, statistics, **more)
    refuses("mu_s is", Statistics, 40, statistics.pooled, Gaussian(*statistics.pooled[::-1]))
    assert path.read_bytes() == before
    assert [x.name for x in path.parent.iterdir()] == [path.name]


def test_bad_statistics_are_named_in_one_line(path, statistics):
    names = "mu", "sigma", "mu_s", "sigma_s"
    good = dict(zip(names, statistics.pooled + statistics.spatial, strict=True))
    for change, message in (
        ({"sigma": None}, "lacks sigma; it has mu"),
        ({"mu": None, "sigma": None}, "lacks mu, sigma; it has mu_s, sigma_s: use"),
        ({"sigma_s": None}, "mu_s and sigma_s: must be both there"),
        ({"mu": np.zeros(5)}, r"mu is \[5\] and sigma \[6, 6\]"),
        ({"sigma": np.zeros((6, 5))}, r"sigma \[6, 5\]; must be \[d\] and \[d, d\]"),
        ({"mu": np.array([0, np.nan, 0, 0, 0, 0])}, "mu has 1 values that are NaN"),
        ({"sigma": np.diag([1.0, 1, 1, 1, 1, -1e-3])}, "sigma must be a covariance, symmetric"),
        ({"sigma_s": np.diag(np.ones(4), 1)}, "sigma_s must be a covariance, symmetric"),
        ({"features": np.zeros((4, 5))}, r"features is \[4, 5\]; must be \[rows, 6\]"),
        ({"features": np.zeros((3, 6))}, "at least 4 rows"),
        ({"features": np.full((4, 6), np.nan)}, "features has 24 values"),
        ({"mu": np.array([{}], object)}, "cannot be read as statistics"),
        ({"mu": np.zeros(6) * 1j}, "mu is complex128"),
        ({"num_images": np.int64(-5)}, "num_images is int64 or below 0"),
    ):
        np.savez(path, **{k: array for k, array in (good | change).items() if array is not None})
        refused(path, message)
    for sigma in (np.zeros((6, 6)), np.ones((6, 6)), np.diag([1.0, 1, 1, 1, 1, -1e-8])):
        np.savez(path, **good | {"sigma": sigma})
        read_reference(path)
    as_npy = io.BytesIO()
    np.save(as_npy, np.eye(3))
    for content in (b"", path.read_bytes()[:-9], as_npy.getvalue()):
        path.write_bytes(content)
        refused(path, "fetch it again")
    path.unlink()
    refused(path, "no such file")
    refused(path, "no such file", lambda path: next(read_pictures(path)))


def test_other_arrays_are_no_pictures(path, pictures):
    first = lambda path: next(read_pictures(path, 2))  # noqa: E731
    for array, message in (
        (np.zeros((3, 2, 2, 3)), "arr_0 is float64"),
        (np.zeros((3, 2, 2), np.uint8), r"\[3, 2, 2\]"),
        (np.zeros((0, 2, 2, 3), np.uint8), r"\[0, 2, 2, 3\]"),
        (np.zeros((3, 2, 2, 3), np.uint8, "F"), "in Fortran order"),
    ):
        np.savez(path, array)
        refused(path, message, first)
    np.savez(path, mu=np.zeros(2))
    refused(path, "has no pictures", reference_file.count_pictures)
    content = io.BytesIO()
    np.save(content, pictures)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("arr_0.npy", content.getvalue()[:-5])
    refused(path, "arr_0 ends early", first)
