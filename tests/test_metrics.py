"""Scores against recorded values of published code, closed forms and slow definitions."""

import functools

import jax
import numpy as np
import pytest
import scipy.special
from conftest import refuses
from sklearn.datasets import load_digits
from sklearn.metrics.pairwise import pairwise_distances, polynomial_kernel
from sklearn.model_selection import train_test_split

from mf_jax.metrics import classifier as classifiers
from mf_jax.metrics import frechet, row_pairs, two_sample
from mf_jax.metrics.classifier import Recipe, principal_components, train_classifier
from mf_jax.metrics.frechet import Gaussian, Moments, frechet_distance, frechet_with_error
from mf_jax.metrics.reference_file import Statistics
from mf_jax.metrics.row_pairs import pair_scores
from mf_jax.metrics.suite import SampleScores, check_widths, inception_score
from mf_jax.metrics.two_sample import energy_distance, nearest_distances, sliced_wasserstein
from mf_jax.runtime.files import sha256_of
from mf_jax.scoring import scorers


def gaussian(rows):
    return Moments.of(rows).gaussian


def fid(a, b):
    return frechet_distance(gaussian(a), gaussian(b))


def test_reference_numbers_of_all_scores(recorded_scores):
    generated, reference = recorded_scores["in/generated"], recorded_scores["in/reference"]
    recorded = {k[4:]: float(x) for k, x in recorded_scores.items() if k.startswith("out/")}
    assert fid(generated, reference) == pytest.approx(recorded["fid"], rel=1e-6)
    found = pair_scores(generated, reference)
    assert found[:2] == pytest.approx([recorded["precision"], recorded["recall"]], abs=1e-6)
    found = pair_scores(generated[: len(reference)], reference)
    assert found.kernel_distance == pytest.approx(recorded["kid_first500"], rel=1e-5)
    scores = inception_score(recorded_scores["in/logits"])
    assert scores == pytest.approx([recorded["is_mean"], recorded["is_std"]], rel=1e-6)


def test_moments_of_batches_are_those_of_numpy(rng, monkeypatch):
    monkeypatch.setattr(frechet, "_BLOCK", 50)
    rows = (rng.standard_normal((500, 24)) * np.exp(rng.standard_normal(24)) + 3e4).astype("f4")
    exact = rows.astype(np.float64)
    for batch in (500, 97, 1):
        moments = Moments.none(24)
        for start in range(0, 500, batch):
            moments += Moments.of(rows[start : start + batch])
        assert (moments.count, moments.mean.dtype) == (500, np.float64)
        np.testing.assert_allclose(moments.mean, exact.mean(0), rtol=1e-14)
        covariance = moments.gaussian.covariance
        np.testing.assert_allclose(covariance, np.cov(exact.T), rtol=1e-10, atol=1e-10)
    refuses("1 rows; it must have at least 2", gaussian, rows[:1])


def test_frechet_distance_of_known_gaussians(rng):
    a, b = np.array([[2.0, 0.5], [0.5, 1.0]]), np.array([[1.0, -0.9], [-0.9, 3.0]])
    product = a @ b  # for a 2 x 2 matrix, tr sqrt(M) = sqrt(tr M + 2 sqrt(det M))
    cross = np.sqrt(np.trace(product) + 2 * np.sqrt(np.linalg.det(product)))
    value = frechet_distance(Gaussian(np.zeros(2), a), Gaussian(np.array([1.0, 2.0]), b))
    assert value == pytest.approx(5 + np.trace(a) + np.trace(b) - 2 * cross, rel=1e-12)
    u, v = rng.standard_normal((2, 60))  # of rank 1
    value = frechet_distance(*(Gaussian(np.zeros(60), np.outer(x, x)) for x in (u, v)))
    assert value == pytest.approx(u @ u + v @ v - 2 * abs(u @ v), rel=1e-5)
    few = rng.standard_normal((10, 60))
    assert 0 <= fid(few, few) < 1e-5


def test_standard_error_is_the_spread_over_draws_and_that_of_a_known_functional(rng, monkeypatch):
    """In one dimension psi = 2 (m_a - m_b) y + (1 - b / a)(y^2 - a^2)."""
    mean, cov = np.zeros(4), np.diag([1.0, 2.0, 0.5, 1e-9]) + 0.1 * np.diag([1.0, 1.0, 0.0], 1)
    cov = (cov + cov.T) / 2
    for shift, scale in ((0.0, 1.5), (0.3, 0.7)):
        mix, found = scale * np.linalg.cholesky(cov + 1e-3 * np.eye(4)), []
        for _ in range(300):
            rows = (rng.standard_normal((400, 4)) @ mix.T + shift).astype(np.float32)
            found.append(frechet_with_error(gaussian(rows), Gaussian(mean, cov), rows))
        values, errors = zip(*found, strict=True)
        assert np.mean(errors) == pytest.approx(np.std(values), rel=0.15)
    monkeypatch.setattr(frechet, "_BLOCK", 64)
    rows = rng.gamma(2.0, size=(500, 1)).astype(np.float32)
    mean, cov = gaussian(rows)
    y, deviation = rows.astype(np.float64) - mean, np.sqrt(cov)
    psi = 2 * (mean - 1) * y + (1 - 3 / deviation) * y**2
    for alike in (np.ones((12, 3)), np.full((12, 3), np.float32(0.1)), np.zeros((2, 3))):
        standard = Gaussian(np.zeros(3), np.eye(3))
        fid, error = frechet_with_error(gaussian(alike), standard, alike)
        assert fid == pytest.approx(3 + 3 * alike[0, 0] ** 2)
        assert error == pytest.approx(0, abs=1e-6)
    other = Gaussian(np.ones(1), np.full((1, 1), 9.0))
    found = frechet_with_error(gaussian(rows), other, rows)
    distance = (mean - 1) ** 2 + (deviation - 3) ** 2
    assert found == pytest.approx((distance.item(), psi.std(ddof=1) / np.sqrt(500)), rel=1e-4)
    assert "less than 0.028 do" in frechet.noise_line(50_000, 0.01)


def test_parts_of_inception_score_are_cut_as_published(rng):
    """Row i of a part boundary decides: score each part alone."""
    for count, splits in ((10, 10), (23, 4), (7, 2)):
        logits = 3 * rng.standard_normal((count, 5)).astype(np.float32)
        p = scipy.special.softmax(logits.astype(np.float64), axis=1)
        parts = [p[i * count // splits : (i + 1) * count // splits] for i in range(splits)]
        values = [np.exp((x * np.log(x / x.mean(0))).sum(1).mean()) for x in parts]
        expected = np.mean(values), np.std(values)
        assert inception_score(logits, splits) == pytest.approx(expected, rel=1e-9, abs=1e-9)
    certain = np.where(np.eye(6)[np.arange(60) % 6] == 1, 0, -np.inf).astype(np.float32)
    assert inception_score(certain) == pytest.approx((6, 0), abs=1e-9)
    assert inception_score(certain[:9]) == (None, None)


def slow_pair_scores(a, b):
    """In float64, as the definitions say."""
    own, cross = [pairwise_distances(x) for x in (a, b)], pairwise_distances(a, b)
    radii = [np.sort(x, 1)[:, 3] for x in own]  # entry 0 is the row itself
    inside = (cross <= radii[1]).any(1).mean(), (radii[0] >= cross.T).any(1).mean()
    kernel = functools.partial(polynomial_kernel, degree=3, gamma=1 / a.shape[1], coef0=1)
    means = [(kernel(x).sum() - np.trace(kernel(x))) / len(x) / (len(x) - 1) for x in (a, b)]
    return *inside, sum(means) - 2 * kernel(a, b).mean()


def test_pairs_are_those_of_the_definition(rng, monkeypatch):
    monkeypatch.setattr(row_pairs, "_ROWS_AT_ONCE", 16)
    jax.clear_caches()
    for n, m in ((4, 4), (50, 33)):
        a, b = (rng.standard_normal((rows, 4)).astype(np.float32) + 1 for rows in (n, m))
        b += 0.5
        found, expected = pair_scores(a, b), slow_pair_scores(a, b)
        assert found[:2] == expected[:2]
        assert found.kernel_distance == pytest.approx(expected[2], rel=1e-4)
        assert pair_scores(a, b, own=row_pairs.own_pairs(a)) == found


def test_identical_sets_have_full_precision_and_recall_and_copies_a_ball_of_radius_zero(rng):
    for offset in (0.0, 1e4):
        rows = (rng.standard_normal((80, 64)) + offset).astype(np.float32)
        rows[:5] = rows[0]  # more copies than k: a ball of radius 0
        far = rows + 100
        assert pair_scores(rows, rows.copy())[:2] == (1.0, 1.0)
        assert pair_scores(rows, far)[:2] == pair_scores(far, rows)[:2] == (0.0, 0.0)
    both = np.concatenate([rows, far])  # a dropped mode costs recall and not precision
    assert pair_scores(rows, both)[:2] == (1.0, 0.5)

    for _ in range(30):  # only some draws round badly
        reference, far = rng.standard_normal((80, 64)), rng.standard_normal((2, 64)) + 50
        reference[70:74] = reference[0]
        generated = np.concatenate([np.repeat(reference[:1], 5, axis=0), far])
        found = pair_scores(generated.astype(np.float32), reference.astype(np.float32))
        assert found.precision == pytest.approx(5 / 7)
    reference = np.ones((80, 64), np.float32)
    reference[40:] = -1  # two places, of copies alone
    near = reference[:7] + np.float32(0.02) * rng.standard_normal((7, 64)).astype(np.float32)
    assert pair_scores(near, reference).precision == 0


def test_distances_of_known_sets(rng, monkeypatch):
    # 2 (2 + 4 + 1 + 3) / 4 - 1 - 2
    a, b = np.array([[0.0], [1.0]]), np.array([[2.0], [4.0]])
    assert energy_distance(a, b) == pytest.approx(2.0)
    a, b = rng.standard_normal((70, 3)), rng.standard_normal((50, 3)) + 1
    whole = energy_distance(a, b)
    monkeypatch.setattr(two_sample, "_CHUNK_ENTRIES", 170)
    assert energy_distance(a, b) == pytest.approx(whole, rel=1e-12)

    monkeypatch.setattr(two_sample, "_CHUNK_ENTRIES", 7)
    b = rng.normal(size=(9, 2, 3))
    far = 5 * np.sign(b[[4, 0]])
    np.testing.assert_allclose(nearest_distances(b[[4, 0]], b), 0, atol=1e-3)
    far[1] = b[1] + 0.25
    nearest = np.sqrt(np.square(far[:, None] - b).mean(axis=(2, 3)).min(axis=1))
    np.testing.assert_allclose(nearest_distances(far, b), nearest, rtol=1e-5)

    for width in (1, 2, 4):
        rows, shift = rng.standard_normal((40, width)), rng.standard_normal(width)
        value = sliced_wasserstein(rows, rows + shift)
        assert value == pytest.approx(np.linalg.norm(shift) / np.sqrt(width), rel=1e-12)
    # The quantile functions of {0, 1} and {0, 0, 1} differ by 1 on (1/2, 2/3).
    value = sliced_wasserstein(np.array([[0.0], [1.0]]), np.array([[0.0], [0.0], [1.0]]))
    assert value == pytest.approx(np.sqrt(1 / 6), rel=1e-12)
    assert sliced_wasserstein(rows, np.repeat(rows, 3, axis=0)) == 0
    assert sum(block.shape[1] for block in two_sample._directions(3)) == 128  # not a multiple


@pytest.fixture(scope="module")
def digits():
    images, labels = load_digits(return_X_y=True)
    images = (images.reshape(-1, 8, 8, 1) / 8 - 1).astype(np.float32)
    return train_test_split(images, labels, test_size=0.2, stratify=labels, random_state=0)


@pytest.fixture(scope="module")
def classifier(digits):
    images, _, labels, _ = digits
    return train_classifier(images, labels, 10, Recipe(steps=150))


def test_classifier_tells_digits_apart(digits, classifier, rng):
    train, images, _, labels = digits
    features, logits = classifier(images)
    assert (logits.argmax(axis=1) == labels).mean() >= 0.95
    assert np.linalg.matrix_rank(gaussian(features)[1]) == 64
    noise = classifier(rng.uniform(-1, 1, images.shape).astype(np.float32))[0]
    real = classifier(train)[0]
    assert fid(real, noise) > 10 * fid(real, features)
    for few, all_rows in zip(classifier(images[300:307]), (features, logits), strict=True):
        np.testing.assert_allclose(few, all_rows[300:307], rtol=1e-5, atol=1e-5)  # second batch


def test_training_twice_gives_the_same_bits_a_file_spares_more(digits, tmp_path, monkeypatch):
    (images, _, labels, _), file = digits, tmp_path / "kept.npz"
    train = functools.partial(train_classifier, images, recipe=Recipe(3, 32), num_classes=10)
    other = train(labels=(labels + 1) % 10)(images[:9])[1]
    found = [train(labels=labels)(images[:9])[1], train(labels=labels, file=file)(images[:9])[1]]
    monkeypatch.setattr(classifiers, "_train", None)
    found.append(train(labels=labels, file=file, trusted={sha256_of(file)})(images[:9])[1])
    np.testing.assert_array_equal(found, [found[0]] * 3)
    assert np.abs(found[0] - other).max() > 0.01


def test_images_without_labels_have_principal_components(digits, rng):
    train, held_out, _, _ = digits
    describe = principal_components(train)
    (real, _), (other, logits) = describe(train), describe(held_out)
    assert (other.shape, other.dtype, logits) == ((360, 64), np.float32, None)
    variances = real.var(axis=0)
    assert (np.diff(variances) < 1e-6).all()
    assert variances.sum() == pytest.approx(train.reshape(len(train), -1).var(0).sum(), rel=1e-5)
    noise, _ = describe(rng.uniform(-1, 1, held_out.shape).astype(np.float32))
    assert fid(real, noise) > 10 * fid(real, other)


def test_shifts_move_whole_images(rng):
    images = np.arange(4 * 8 * 8, dtype=np.float32).reshape(4, 8, 8, 1)
    shifted = classifiers._shifted(np.repeat(images, 50, axis=0), 1, rng)
    padded = np.pad(images, [(0, 0), (1, 1), (1, 1), (0, 0)], mode="edge")
    allowed = {padded[0, i : i + 8, j : j + 8].tobytes() for i in range(3) for j in range(3)}
    assert {x.tobytes() for x in shifted[:50]} == allowed


SCORES = {"fid", "sfid", "fid_standard_error", "precision", "recall", "kid"}
NUM = 203


def add_all(scores, features, batch, order=None, junk=np.nan):
    """Add features in batches of one size, the last filled up with junk; return the scores."""
    order = np.arange(NUM) if order is None else order
    for start in range(0, NUM, batch):
        part = order[start : start + batch]
        pad = functools.partial(np.pad, constant_values=junk)
        more = (0, batch - len(part)), (0, 0)
        filled = {name: pad(rows[part], more) for name, rows in features.items()}
        scores.add(filled, np.pad(part, more[0], constant_values=NUM + 5))
    return scores


@pytest.fixture(scope="module")
def made():
    rng = np.random.default_rng(0)
    mix = rng.standard_normal((8, 8))
    widths = {"2048": 8, "spatial": 5, "logits_unbiased": 6}
    features = {k: rng.standard_normal((NUM, n)).astype("f4") for k, n in widths.items()}
    features["2048"] = (features["2048"] @ mix + 3).astype(np.float32)
    rows = (rng.standard_normal((150, 8)) @ mix * 1.1 + 3.2).astype(np.float32)
    spatial = gaussian(rng.standard_normal((150, 5)))
    return features, Statistics(150, gaussian(rows), spatial, rows, "real.npz")


def test_scores_are_of_the_whole_whatever_the_batches(made):
    features, real = made

    def score(batch, **more):
        scores = add_all(SampleScores(NUM, least=10), features, batch, **more)
        mean, deviation = scores.inception_score()
        return scores.against(real) | {"mean": mean, "deviation": deviation}

    found, pairs = score(NUM), pair_scores(features["2048"], real.features)
    expected = dict(zip(("precision", "recall", "kid"), pairs, strict=True))
    expected["fid"] = frechet_distance(gaussian(features["2048"]), real.pooled)
    expected["sfid"] = frechet_distance(gaussian(features["spatial"]), real.spatial)
    assert {name: found[name] for name in expected} == pytest.approx(expected, rel=1e-9)
    assert 0 < min(pairs[:2]) <= max(pairs[:2]) < 1
    assert found.keys() == SCORES | {"mean", "deviation"}
    for more in ({}, {"order": np.random.default_rng(1).permutation(NUM)}, {"junk": np.inf}):
        assert score(64, **more) == pytest.approx(found, rel=1e-6)


def test_missing_and_too_few_samples_are_refused_and_references_scored_by_what_they_have(made):
    features, reference = made
    scores = SampleScores(NUM, least=10)
    scores.add({name: rows[:50] for name, rows in features.items()}, np.arange(50))
    refuses(r"153 of 203 samples are missing .*, the first is 50", scores.against, reference)
    few = {name: rows[:8] for name, rows in features.items()}
    refuses(r"num_samples=8: must be within \[9, inf\)", SampleScores(8).add, few, np.arange(8))
    SampleScores(8, least=8).add(few, np.arange(8))
    scores = add_all(SampleScores(NUM, least=10), features, NUM)
    plain = Statistics(0, reference.pooled)
    assert scores.against(plain).keys() == {"fid", "fid_standard_error"}
    assert scores.against(reference).keys() == SCORES
    refuses("real.npz: mu has 8 features; must have 64", check_widths, reference, 64, 5)
    refuses("mu_s has 5 features; must have 3", check_widths, reference, 8, 3)


def test_rows_whose_features_are_kept_are_spread_evenly(monkeypatch):
    monkeypatch.setattr(scorers, "_KEPT_FEATURES", 4)
    for num, kept in ((10, [0, 2, 5, 7]), (3, [0, 1, 2])):
        found = [start + scorers._kept(num, start, 3) for start in (0, 3, 6, 9)]
        np.testing.assert_array_equal(np.concatenate(found), kept)
