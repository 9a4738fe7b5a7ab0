"""Scores of samples that come batch by batch: recorded numbers, the same as in memory, and no more memory for more."""

import dataclasses
import inspect
import os
import re
import socket
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT

from mf_jax import metrics
from mf_jax.errors import BadInput
from mf_jax.metrics import frechet_noise, row_pairs
from mf_jax.metrics.frechet_noise import frechet_with_error, noise_line
from mf_jax.metrics.inception_score import add_logits, inception_score, start_scores
from mf_jax.metrics.reference_file import Reference, Statistics
from mf_jax.metrics.row_pairs import compare, own_pairs
from mf_jax.metrics.row_store import RowArray, RowStore
from mf_jax.metrics.suite import SampleScores

SCORES = {"fid", "sfid", "fid_standard_error", "precision", "recall", "kid"}


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch):
    monkeypatch.setattr(row_pairs, "_BLOCK", 64)
    monkeypatch.setattr(frechet_noise, "_BLOCK", 64)


def reference_of(rows, spatial=None, features=True, path="reference.npz"):
    extra = () if spatial is None else metrics.gaussian_statistics(spatial)
    statistics = Statistics(0, *metrics.gaussian_statistics(rows), *extra)
    kept = rows.astype(np.float32) if features else None
    return Reference.of(dataclasses.replace(statistics, features=kept), path=path)


def features_of(pooled, spatial=None, logits=None):
    return {
        "2048": pooled,
        "spatial": pooled[:, :3] if spatial is None else spatial,
        "logits_unbiased": pooled[:, :4] if logits is None else logits,
    }


def add_all(scores, features, batch, order=None, junk=np.nan):
    """Add features in batches of one size, the last filled up with junk of weight 0."""
    count = len(features["2048"])
    order = np.arange(count) if order is None else order
    for start in range(0, count, batch):
        index = np.zeros(batch, np.int32)
        part = order[start : start + batch]
        index[: len(part)] = part
        filled = {}
        for name, rows in features.items():
            filled[name] = np.full((batch, rows.shape[1]), junk, np.float32)
            filled[name][: len(part)] = rows[part]
        scores.add(filled, index, (np.arange(batch) < len(part)).astype(np.float32))
    return scores


@pytest.fixture
def made(tmp_path, rng):
    """Return features, a reference, and a function that scores the features in batches."""
    mix = rng.standard_normal((8, 8))
    features = features_of(*(rng.standard_normal((203, n)).astype(np.float32) for n in (8, 5, 6)))
    features["2048"] = (features["2048"] @ mix + 3).astype(np.float32)
    rows = (rng.standard_normal((150, 8)) @ mix * 1.1 + 3.2).astype(np.float32)
    reference = reference_of(rows, rng.standard_normal((150, 5)))

    def score(batch, **more):
        scores = add_all(SampleScores(203, tmp_path, least=10), features, batch, **more)
        return scores.against(reference) | dict(
            zip(("mean", "std"), scores.inception_score(), strict=True)
        )

    return features, reference, score


# The whole


def test_recorded_scores(recorded_scores, tmp_path):
    generated = recorded_scores["in/generated"]
    scores = add_all(SampleScores(len(generated), tmp_path), features_of(generated), 250)
    found = scores.against(reference_of(recorded_scores["in/reference"]))
    assert found["fid"] == pytest.approx(recorded_scores["out/fid"], rel=1e-6)
    # recorded in float32
    assert found["precision"] == pytest.approx(float(recorded_scores["out/precision"]), abs=1e-7)
    assert found["recall"] == pytest.approx(float(recorded_scores["out/recall"]), abs=1e-7)


@pytest.mark.parametrize("batch", [1000, 333, 250])
def test_recorded_inception_score(recorded_scores, batch):
    logits = recorded_scores["in/logits"]
    sums = start_scores(len(logits), logits.shape[1])
    for start in range(0, len(logits), batch):
        index = np.arange(start, start + batch)
        rows = logits[np.minimum(index, len(logits) - 1)]
        sums = add_logits(sums, rows, np.minimum(index, len(logits) - 1), index < len(logits))
    mean, std = inception_score(sums)
    assert mean == pytest.approx(recorded_scores["out/is_mean"], rel=1e-5)
    assert std == pytest.approx(recorded_scores["out/is_std"], rel=1e-5)


def test_recorded_kernel_distance(recorded_scores):
    reference = RowArray(recorded_scores["in/reference"])
    generated = RowArray(recorded_scores["in/generated"][: len(reference)])
    centre = recorded_scores["in/reference"].mean(0)
    found = compare(
        generated, reference, centre, own_pairs(generated, centre), own_pairs(reference, centre)
    )
    assert found.kernel_distance == pytest.approx(
        float(recorded_scores["out/kid_first500"]), rel=1e-5
    )


def test_scores_are_those_in_memory(made):
    features, reference, score = made
    found = score(50)
    rows = reference.features.read(0, len(reference.features))
    precision, recall = metrics.precision_recall(features["2048"], rows)
    expected = {
        "fid": metrics.frechet_distance(
            *metrics.gaussian_statistics(features["2048"]), reference.mean, reference.covariance
        ),
        "sfid": metrics.frechet_distance(
            *metrics.gaussian_statistics(features["spatial"]),
            reference.mean_spatial,
            reference.covariance_spatial,
        ),
        "precision": precision,
        "recall": recall,
        "kid": metrics.kernel_distance(features["2048"], rows),
    }
    assert {name: found[name] for name in expected} == pytest.approx(expected, rel=1e-5)
    assert 0 < precision < 1
    assert 0 < recall < 1


def test_neither_batches_nor_order_nor_padding_matter(made):
    _, _, score = made
    expected = score(203)
    assert expected.keys() == SCORES | {"mean", "std"}
    for more in (
        {},
        {"order": np.random.default_rng(1).permutation(203)},
        {"junk": 1e30},
        {"junk": np.inf},
    ):
        assert score(64, **more) == pytest.approx(expected, rel=1e-6)


def test_what_a_reference_lacks_is_left_out(made, tmp_path):
    features, reference, _ = made
    plain = dataclasses.replace(reference, mean_spatial=None, features=None)
    scores = add_all(SampleScores(203, tmp_path, least=10), features, 203)
    assert scores.against(plain).keys() == {"fid", "fid_standard_error"}
    assert scores.against(reference).keys() == SCORES  # any number of references
    without = add_all(
        SampleScores(203, tmp_path / "none", with_rows=False, least=10), features, 203
    )
    assert without.against(reference).keys() == {"fid", "sfid"}
    assert not (tmp_path / "none").exists()


def test_the_rows_leave_no_file(made, tmp_path):
    scores = add_all(SampleScores(203, tmp_path / "rows", least=10), made[0], 203)
    assert list((tmp_path / "rows").iterdir()) == []
    scores.close()


def test_every_sample_counts_once(made, tmp_path):
    features, reference, _ = made
    scores = SampleScores(203, tmp_path, least=10)
    first = {name: rows[:50] for name, rows in features.items()}
    scores.add(first, np.arange(50), np.ones(50))
    for ask in (lambda: scores.against(reference), scores.inception_score):
        with pytest.raises(ValueError, match="153 of 203 samples were not added, the first is 50"):
            ask()
    for index in (np.arange(49, 99), np.r_[60:109, 60]):
        with pytest.raises(ValueError, match="was added before"):
            scores.add(first, index, np.ones(50))
    for index in (np.arange(154, 204), np.arange(-1, 49)):
        with pytest.raises(ValueError, match=r"numbers must be in \[0, 203\)"):
            scores.add(first, index, np.ones(50))


def test_too_few_samples_are_refused(made, tmp_path):
    features = {name: rows[:8] for name, rows in made[0].items()}
    with pytest.raises(BadInput, match=r"eval\.num_samples=8: must be at least 9") as error:
        SampleScores(8, tmp_path).add(features, np.arange(8), np.ones(8))
    assert "\n" not in str(error.value)
    SampleScores(8, tmp_path, least=8, splits=2).add(features, np.arange(8), np.ones(8))
    with pytest.raises(BadInput, match="at least 10, the parts of Inception Score"):
        SampleScores(8, tmp_path, least=8).add(features, np.arange(8), np.ones(8))


def test_references_of_other_features_are_refused(made, tmp_path, rng):
    scores = add_all(SampleScores(203, tmp_path, least=10), made[0], 203)
    with pytest.raises(
        BadInput, match=r"far.npz: mu has 64 features, as of the first pool.*; must have 8"
    ):
        scores.against(reference_of(rng.standard_normal((99, 64)), path="far.npz"))
    with pytest.raises(BadInput, match="mu_s has 3 features; must have 5"):
        scores.against(reference_of(rng.standard_normal((99, 8)), rng.standard_normal((99, 3))))


# Inception Score


@pytest.mark.parametrize(("count", "splits"), [(10, 10), (23, 4), (7, 2)])
def test_parts_are_cut_as_published(count, splits, rng):
    """Row i of a part boundary decides: score each part alone."""
    logits = 3 * rng.standard_normal((count, 5)).astype(np.float32)
    p = np.exp(logits.astype(np.float64))
    p /= p.sum(1, keepdims=True)
    parts = [p[i * count // splits : (i + 1) * count // splits] for i in range(splits)]
    values = [np.exp((x * np.log(x / x.mean(0))).sum(1).mean()) for x in parts]
    order = rng.permutation(count)
    sums = add_logits(start_scores(count, 5, splits), logits[order], order, np.ones(count))
    assert inception_score(sums) == pytest.approx(
        (np.mean(values), np.std(values)), rel=1e-5, abs=1e-6
    )


def test_certain_and_even_classes_have_their_number_as_score():
    logits = np.where(np.eye(6)[np.arange(60) % 6] == 1, 0, -np.inf).astype(np.float32)
    sums = add_logits(start_scores(60, 6), logits, np.arange(60), np.ones(60))
    assert inception_score(sums) == pytest.approx((6, 0), abs=1e-5)


def test_what_has_no_inception_score_is_refused():
    logits = np.zeros((20, 3), np.float32)
    sums = add_logits(start_scores(20, 3), logits, np.arange(20), np.arange(20) > 1)
    with pytest.raises(BadInput, match="a part without samples"):
        inception_score(sums)
    with pytest.raises(BadInput, match="NaN or infinite"):
        inception_score(
            add_logits(start_scores(20, 3), logits * np.nan, np.arange(20), np.ones(20))
        )


# Pairs of rows


def pair_scores(generated, reference, k=3):
    a, b, centre = RowArray(generated), RowArray(reference), reference.mean(0)
    return compare(a, b, centre, own_pairs(a, centre, k=k), own_pairs(b, centre, k=k))


@pytest.mark.parametrize(("n", "m"), [(4, 4), (64, 65), (130, 64), (63, 200)])
def test_pairs_are_those_in_memory(n, m, rng):
    a, b = (
        rng.standard_normal((n, 4)).astype(np.float32),
        rng.standard_normal((m, 4)).astype(np.float32) + 0.5,
    )
    found = pair_scores(a, b)
    assert found[:2] == metrics.precision_recall(a, b)
    assert found.kernel_distance == pytest.approx(metrics.kernel_distance(a, b), abs=1e-6)


@pytest.mark.parametrize("offset", [0.0, 1e4])
def test_identical_sets_have_full_precision_and_recall(offset, rng):
    rows = (rng.standard_normal((100, 64)) + offset).astype(np.float32)
    rows[:5] = rows[0]  # more copies than k: a ball of radius 0
    assert pair_scores(rows, rows.copy())[:2] == (1.0, 1.0)


def test_copies_lie_inside_a_ball_of_radius_zero(rng):
    for _ in range(30):  # only some draws round badly
        reference, far = rng.standard_normal((80, 64)), rng.standard_normal((2, 64)) + 50
        reference[70:74] = reference[0]
        generated = np.concatenate([np.repeat(reference[:1], 5, axis=0), far])
        found = pair_scores(generated.astype(np.float32), reference.astype(np.float32))
        assert found.precision == pytest.approx(5 / 7)


def test_a_row_beside_a_ball_of_radius_zero_is_outside(rng):
    reference = np.ones((80, 64), np.float32)
    reference[40:] = -1  # two places, of copies alone
    near = reference[:4] + np.float32(0.02) * rng.standard_normal((4, 64)).astype(np.float32)
    assert pair_scores(near, reference).precision == 0


def test_what_fills_a_block_up_has_no_ball(rng):
    rows = rng.standard_normal((70, 2)).astype(np.float32)
    assert pair_scores(rows, rows + 100)[:2] == (0.0, 0.0)
    assert pair_scores(rows + 100, rows)[:2] == (0.0, 0.0)


def test_too_few_rows_for_k_are_refused(rng):
    with pytest.raises(
        BadInput, match="3 rows have no 3 nearest neighbours; there must be at least 4"
    ):
        inspect.unwrap(own_pairs)(RowArray(rng.standard_normal((3, 2))), np.zeros(2))


def test_rows_are_kept_at_their_places(tmp_path, rng):
    rows = rng.standard_normal((20, 3)).astype(np.float32)
    store = RowStore(20, 3, tmp_path / "new")
    order = rng.permutation(20)
    for part in np.split(order, [0, 7, 11]):
        store.write(part, rows[part])
    assert (len(store), store.width) == (20, 3)
    np.testing.assert_array_equal(store.read(4, 9), rows[4:9])
    np.testing.assert_array_equal(store.read(15, 99), rows[15:])
    assert store.read(20, 25).shape == (0, 3)


def test_a_folder_that_cannot_hold_the_rows_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(BadInput, match=f"{tmp_path}/file: cannot hold 4 MB of feature rows"):
        RowStore(1000, 1000, tmp_path / "file")
    with pytest.raises(BadInput, match="local disk with that much space"):
        RowStore(10**9, 10**6, tmp_path)


# The standard error


@pytest.mark.parametrize(("shift", "scale"), [(0.0, 1.5), (1.0, 1.0), (0.3, 0.7)])
def test_standard_error_is_the_spread_over_draws(shift, scale, rng):
    mean, cov = np.zeros(4), np.diag([1.0, 2.0, 0.5, 1e-9]) + 0.1 * np.diag([1.0, 1.0, 0.0], 1)
    cov = (cov + cov.T) / 2
    mix = scale * np.linalg.cholesky(cov + 1e-3 * np.eye(4))
    values, errors = [], []
    for _ in range(300):
        rows = (rng.standard_normal((400, 4)) @ mix.T + shift).astype(np.float32)
        own = metrics.gaussian_statistics(rows)
        values.append(metrics.frechet_distance(*own, mean, cov))
        if len(errors) < 20:
            errors.append(frechet_with_error(*own, mean, cov, RowArray(rows))[1])
    assert np.mean(errors) == pytest.approx(np.std(values), rel=0.15)


def test_standard_error_of_a_known_functional():
    """In one dimension F = (m_a - m_b)^2 + (a - b)^2, so that psi = 2 (m_a - m_b) y + (1 - b / a)(y^2 - a^2)."""
    rows = np.random.default_rng(3).gamma(2.0, size=(500, 1)).astype(np.float32)
    mean, cov = metrics.gaussian_statistics(rows)
    y, deviation = rows.astype(np.float64) - mean, np.sqrt(cov)
    psi = 2 * (mean - 1) * y + (1 - 3 / deviation) * y**2
    expected = psi.std(ddof=1) / np.sqrt(500)
    _, found = frechet_with_error(mean, cov, np.ones(1), np.full((1, 1), 9.0), RowArray(rows))
    assert found == pytest.approx(expected, rel=1e-4)


def test_noise_is_worded():
    assert noise_line(50_000, 0.01) == (
        "at 50000 samples two FIDs that differ by less than 0.028 do not differ"
    )


# Memory and processes

PEAK = """
import re, sys
from pathlib import Path
import numpy as np
from mf_jax.metrics.reference_file import Reference, Statistics
from mf_jax.metrics.suite import SampleScores
count, width = int(sys.argv[1]), 256
rng = np.random.default_rng(0)
rows = rng.standard_normal((1000, width)).astype(np.float32)
gaussian = rows.mean(0, np.float64), np.cov(rows.astype(np.float64), rowvar=False)
reference = Reference.of(Statistics(0, *gaussian, *gaussian, rows), path="r")
scores = SampleScores(count, sys.argv[2])
for start in range(0, count, 250):
    names = "2048", "spatial", "logits_unbiased"
    features = {name: rng.standard_normal((250, width)).astype(np.float32) for name in names}
    scores.add(features, np.arange(start, start + 250), np.ones(250))
assert len(scores.against(reference)) == 6
scores.inception_score()
print(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
"""


def test_more_samples_need_no_more_memory(tmp_path):
    def peak(count):
        result = subprocess.run(
            [sys.executable, "-c", PEAK, str(count), str(tmp_path)],
            env=os.environ | {"PYTHONPATH": str(ROOT), "MALLOC_ARENA_MAX": "1"},
            capture_output=True,
            text=True,
        )
        assert result.returncode == 0, result.stderr
        return int(re.findall(r"\d+", result.stdout)[-1]) / 1024

    few = peak(4000)
    assert peak(16000) < few + 9  # the rows of the others take 12 MB for each kind of feature


PROCESS = """
import sys
import jax, numpy as np
jax.distributed.initialize(f"localhost:{sys.argv[2]}", 2, int(sys.argv[1]))
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from mf_jax import metrics
from mf_jax.metrics.reference_file import Reference, Statistics
from mf_jax.metrics.suite import SampleScores
where = NamedSharding(Mesh(np.array(jax.devices()), ("data",)), PartitionSpec("data"))
rng = np.random.default_rng(0)
rows, other = (rng.standard_normal((n, 6)).astype(np.float32) + 0.004 * n for n in (100, 60))
gaussian = metrics.gaussian_statistics(other)
scores = SampleScores(100, sys.argv[3])
def put(x):
    half = len(x) // 2
    return jax.make_array_from_process_local_data(where, x[half * jax.process_index() :][:half])
for start in range(0, 100, 32):
    place, counts = np.minimum(np.arange(start, start + 32), 99), np.arange(start, start + 32) < 100
    batch = rows[place]
    batch[~counts] = np.nan
    scores.add({name: put(batch) for name in ("2048", "spatial", "logits_unbiased")}, put(place), put(counts))
found = scores.against(Reference.of(Statistics(0, *gaussian, *gaussian, other), path="r"))
expected = metrics.frechet_distance(*metrics.gaussian_statistics(rows), *gaussian)
np.testing.assert_allclose([found["fid"], found["sfid"]], expected, rtol=1e-6)
if jax.process_index() == 0:
    assert (found["precision"], found["recall"]) == metrics.precision_recall(rows, other)
else:
    assert found.keys() == {"fid", "sfid"}
print(*scores.inception_score())
"""


def test_samples_may_be_split_over_processes(tmp_path):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PROCESS, str(i), port, str(tmp_path)],
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(2)
    ]
    outputs = [process.communicate(timeout=100) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    assert outputs[0][0].split()[-2:] == outputs[1][0].split()[-2:]
