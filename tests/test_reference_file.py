"""Files of reference statistics: what other tools wrote is read, what is written other tools read, damage is named."""

import dataclasses
import hashlib
import inspect
import io
import tracemalloc
import zipfile

import numpy as np
import pytest

from mf_jax.errors import BadInput
from mf_jax.metrics import reference_file
from mf_jax.metrics.reference_file import Statistics, read_pictures, read_reference, write_reference
from mf_jax.metrics.row_store import RowArray, RowFile


def gaussian(rng, width):
    rows = rng.standard_normal((40, width))
    return rows.mean(0), np.cov(rows, rowvar=False)


@pytest.fixture
def statistics(rng):
    features = rng.standard_normal((11, 6)).astype(np.float32)
    return Statistics(40, *gaussian(rng, 6), *gaussian(rng, 5), features)


@pytest.fixture
def pictures(rng):
    return rng.integers(256, size=(23, 4, 5, 3), dtype=np.uint8)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "reference.npz"


def same(reference, statistics):
    for name, value in vars(statistics).items():
        found = getattr(reference, name)
        assert (found is None) == (value is None)
        if value is not None:
            found = found.read(0, len(found)) if name == "features" else found
            np.testing.assert_array_equal(found, value)


def test_what_is_written_is_read(path, statistics, pictures):
    blocks = (pictures[i : i + 10] for i in range(0, 23, 10))
    write_reference(path.parent / "new" / path.name, statistics, pictures=blocks, num_pictures=23)
    path = path.parent / "new" / path.name
    reference = read_reference(path)
    same(reference, statistics)
    assert (reference.path, reference.num_pictures) == (str(path), 23)
    assert reference.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert reference.covariance.dtype == np.float64
    assert [x.name for x in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("write", [np.savez, np.savez_compressed])
def test_rows_are_read_in_blocks_from_any_file(path, statistics, write, dtype):
    rows = statistics.features
    about = {"mu": statistics.mean, "sigma": statistics.covariance}
    write(path, **about, features=rows.astype(dtype))
    found = read_reference(path).features
    is_in_blocks = write is np.savez and dtype is np.float32
    assert isinstance(found, RowFile if is_in_blocks else RowArray)
    assert (len(found), found.width) == rows.shape
    for start, stop in ((0, 4), (3, 11), (8, 20), (11, 15)):
        np.testing.assert_array_equal(found.read(start, stop), rows[start:stop])


def test_large_arrays_are_not_held(path, rng):
    width = 400
    rows = rng.standard_normal((3000, width)).astype(np.float32)
    mean, covariance = rows.mean(0, np.float64), np.cov(rows.T.astype(np.float64))
    write_reference(path, Statistics(3000, mean, covariance, mean, covariance, rows))
    del rows, covariance
    tracemalloc.start()
    reference = read_reference(path)
    held = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert held < 8 * width**2 / 4
    assert reference.covariance.shape == reference.covariance_spatial.shape == (width, width)


def test_other_tools_read_what_is_written(path, statistics, pictures):
    write_reference(path, statistics, pictures=[pictures], num_pictures=23)
    with np.load(path) as file:
        assert set(file.files) == {
            "mu",
            "sigma",
            "mu_s",
            "sigma_s",
            "arr_0",
            "features",
            "num_images",
        }
        np.testing.assert_array_equal(file["sigma_s"], statistics.covariance_spatial)
        np.testing.assert_array_equal(file["arr_0"], pictures)
        assert file["arr_0"].dtype == np.uint8


@pytest.mark.parametrize("write", [np.savez, np.savez_compressed])
def test_files_of_other_tools_are_read(path, statistics, pictures, write):
    mu, sigma = statistics.mean.astype(np.float32), np.asfortranarray(statistics.covariance)
    write(path, mu=mu, sigma=sigma)
    same(read_reference(path), Statistics(0, mu, sigma))
    write(
        path,
        mu=mu,
        sigma=sigma,
        mu_s=statistics.mean_spatial,
        sigma_s=statistics.covariance_spatial,
        arr_0=pictures,
    )
    reference = read_reference(path)
    same(reference, dataclasses.replace(statistics, num_images=0, features=None, mean=mu))
    assert reference.num_pictures == 23
    np.testing.assert_array_equal(np.concatenate(list(read_pictures(path, 7))), pictures)


@pytest.mark.parametrize(("size", "lengths"), [(10, [10, 10, 3]), (23, [23]), (100, [23])])
def test_pictures_are_read_in_blocks(path, pictures, size, lengths):
    np.savez(path, pictures)
    blocks = list(read_pictures(path, size))
    assert [len(block) for block in blocks] == lengths
    np.testing.assert_array_equal(np.concatenate(blocks), pictures)


def test_no_more_than_a_block_is_held(path, statistics):
    block = np.zeros((100, 64, 64, 3), np.uint8)  # 1.2 MB, of 49 MB
    tracemalloc.start()
    write_reference(path, statistics, pictures=(block.copy() for _ in range(40)), num_pictures=4000)
    assert read_reference(path).num_pictures == 4000
    assert sum(len(x) for x in read_pictures(path, 100)) == 4000
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert path.stat().st_size > 40 * block.nbytes
    assert peak < 8 * block.nbytes


def test_pictures_are_not_read_with_the_statistics(path, statistics, pictures, monkeypatch):
    write_reference(path, statistics, pictures=[pictures], num_pictures=23)
    monkeypatch.setattr(reference_file, "read_pictures", None)
    read_reference(path, lambda blocks: pytest.fail("computed again"))


def test_statistics_of_pictures_alone_are_left_to_the_caller(path, statistics, pictures):
    np.savez(path, pictures)
    with pytest.raises(BadInput, match=r"holds pictures \(arr_0\) and no statistics"):
        read_reference(path)
    seen = []

    def compute(blocks):
        seen.extend(blocks)
        return statistics

    same(read_reference(path, compute, block_size=9), statistics)
    assert [len(block) for block in seen] == [9, 9, 5]
    np.testing.assert_array_equal(np.concatenate(seen), pictures)


def test_a_matrix_with_an_eigenvalue_below_0_is_no_covariance(path):
    for sigma in (np.zeros((2, 2)), np.ones((2, 2)), np.diag([1.0, -1e-8])):
        np.savez(path, mu=np.zeros(2), sigma=sigma)
        read_reference(path)
    np.savez(path, mu=np.zeros(2), sigma=np.diag([1.0, -1e-3]))
    with pytest.raises(BadInput, match="sigma has eigenvalues below 0"):
        read_reference(path)


def test_a_file_that_changes_meanwhile_is_noticed(path, statistics):
    write_reference(path, statistics)
    reference = read_reference(path)
    write_reference(path, dataclasses.replace(statistics, features=None))
    with pytest.raises(BadInput, match="has changed since it was read first"):
        reference.covariance  # noqa: B018, reads it


def test_a_write_that_fails_leaves_the_old_file(path, statistics, pictures):
    write_reference(path, statistics)
    before = path.read_bytes()
    for blocks, number, message in (
        ([pictures], 22, "num_pictures=22: there were 23"),
        (
            [pictures[:5], pictures[5:, :3]],
            23,
            r"a block is uint8 \[3, 5, 3\]; must be uint8 \[4, 5, 3\]",
        ),
        ([pictures / 255.0], 23, "a block is float64"),
    ):
        with pytest.raises(BadInput, match=message):
            inspect.unwrap(write_reference)(path, statistics, pictures=blocks, num_pictures=number)
    assert path.read_bytes() == before
    assert [x.name for x in path.parent.iterdir()] == [path.name]


def test_statistics_that_are_none_are_not_written(path, statistics):
    with pytest.raises(BadInput, match="mean_spatial and covariance_spatial"):
        write_reference(path, dataclasses.replace(statistics, covariance_spatial=None))
    assert not path.exists()


def nan_in(array):
    array = array.copy()
    array.flat[1] = np.nan
    return array


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sigma": None}, "lacks sigma; it has mu"),
        ({"mu": None, "sigma": None}, "lacks mu, sigma; it has mu_s, sigma_s, and must have"),
        ({"sigma_s": None}, "lacks sigma_s"),
        ({"mu": np.zeros(5)}, r"mu is \[5\] and sigma \[6, 6\]"),
        ({"sigma": np.zeros((6, 5))}, r"sigma \[6, 5\]; must be \[d\] and \[d, d\]"),
        ({"mu": np.zeros((1, 6))}, r"mu is \[1, 6\]"),
        ({"mu": nan_in(np.zeros(6))}, "mu has 1 values that are NaN"),
        ({"sigma": nan_in(np.eye(6))}, "sigma has 1 values"),
        ({"mu_s": nan_in(np.zeros(5))}, "mu_s has 1 values"),
        ({"sigma_s": np.diag(np.ones(4), 1)}, "sigma_s is not symmetric"),
        ({"sigma": np.eye(6) + np.diag(np.full(5, 1e-3), 1)}, "sigma is not symmetric"),
        ({"features": np.zeros((4, 5))}, r"features is \[4, 5\]; must be \[rows, 6\]"),
        ({"features": nan_in(np.zeros((4, 6)))}, "features has 1 values"),
        ({"mu": np.array([{}], object)}, "an array in it cannot be read"),
        ({"mu": np.array(["a"] * 6)}, "an array in it cannot be read"),
    ],
)
def test_bad_statistics_are_named_in_one_line(path, statistics, change, message):
    arrays = {"mu": statistics.mean, "sigma": statistics.covariance}
    arrays |= {"mu_s": statistics.mean_spatial, "sigma_s": statistics.covariance_spatial}
    np.savez(
        path, **{name: array for name, array in (arrays | change).items() if array is not None}
    )
    with pytest.raises(BadInput, match=f"^{path}: .*{message}") as error:
        read_reference(path)
    assert "\n" not in str(error.value)


def cut(path, share):
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])


def flip(path):
    content = bytearray(path.read_bytes())
    content[400] ^= 255
    path.write_bytes(content)


def as_npy(path):
    with path.open("wb") as file:
        np.save(file, np.eye(3))


@pytest.mark.parametrize(
    "damage",
    [lambda p: cut(p, 0.5), lambda p: cut(p, 0.98), lambda p: p.write_bytes(b""), as_npy, flip],
)
def test_damaged_files_are_named_in_one_line(path, statistics, damage):
    write_reference(path, statistics)
    damage(path)
    with pytest.raises(BadInput, match=f"^{path}: .*check the file, or fetch it again") as error:
        read_reference(path)
    assert "\n" not in str(error.value)


def test_a_missing_file_is_named(path):
    for read in (read_reference, lambda p: next(read_pictures(p, 3))):
        with pytest.raises(BadInput, match=f"^{path}: no such file"):
            read(path)


def test_what_are_no_pictures_is_refused(path):
    for array, message in (
        (np.zeros((3, 2, 2, 3)), "arr_0 is float64"),
        (np.zeros((3, 2, 2), np.uint8), r"\[3, 2, 2\]"),
        (np.asfortranarray(np.zeros((3, 2, 2, 3), np.uint8)), "in Fortran order"),
    ):
        np.savez(path, array)
        with pytest.raises(BadInput, match=message):
            next(read_pictures(path, 2))
    np.savez(path, mu=np.zeros(2))
    with pytest.raises(BadInput, match="has no pictures"):
        next(read_pictures(path, 2))


def test_pictures_that_end_early_are_refused(path, pictures):
    content = io.BytesIO()
    np.save(content, pictures)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("arr_0.npy", content.getvalue()[:-5])
    with pytest.raises(BadInput, match="arr_0 ends early"):
        list(read_pictures(path, 10))
