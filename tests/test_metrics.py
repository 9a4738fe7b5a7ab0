"""Metrics for small data sets: recorded values of published implementations, closed forms, and the digit classifier."""

import inspect

import numpy as np
import pytest
from safetensors.numpy import load, save
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from mf_jax import metrics
from mf_jax.errors import BadInput
from mf_jax.flow.records import NO_LABEL
from mf_jax.metrics import classifier as classifier_module
from mf_jax.metrics import neighbours, two_sample
from mf_jax.metrics.frechet import checked_features

SHORT = metrics.Recipe(steps=12, batch_size=32)


def fid(a, b):
    return metrics.frechet_distance(
        *metrics.gaussian_statistics(a), *metrics.gaussian_statistics(b)
    )


# Fréchet distance


def test_frechet_distance_matches_the_recorded_value(recorded_scores):
    assert fid(recorded_scores["in/generated"], recorded_scores["in/reference"]) == pytest.approx(
        recorded_scores["out/fid"], rel=1e-6
    )


def test_gaussian_statistics_are_unbiased_and_float64():
    mean, covariance = metrics.gaussian_statistics(np.array([[0, 1], [2, 1], [4, 4]], np.float32))
    assert mean.dtype == covariance.dtype == np.float64
    np.testing.assert_allclose(mean, [2, 2])
    np.testing.assert_allclose(covariance, [[4, 3], [3, 3]])
    assert metrics.gaussian_statistics(np.array([[0.0], [2.0]]))[1].shape == (1, 1)


def test_frechet_distance_of_diagonal_gaussians():
    a, b = np.array([1.0, 4.0, 9.0]), np.array([4.0, 0.0, 1.0])
    value = metrics.frechet_distance(np.zeros(3), np.diag(a), np.array([1.0, 2.0, 0.0]), np.diag(b))
    assert value == pytest.approx(5 + ((np.sqrt(a) - np.sqrt(b)) ** 2).sum(), rel=1e-12)


def test_frechet_distance_of_covariances_that_do_not_commute():
    a, b = np.array([[2.0, 0.5], [0.5, 1.0]]), np.array([[1.0, -0.9], [-0.9, 3.0]])
    product = a @ b  # for a 2 x 2 matrix, tr sqrt(M) = sqrt(tr M + 2 sqrt(det M))
    cross = np.sqrt(np.trace(product) + 2 * np.sqrt(np.linalg.det(product)))
    value = metrics.frechet_distance(np.zeros(2), a, np.zeros(2), b)
    assert value == pytest.approx(np.trace(a) + np.trace(b) - 2 * cross, rel=1e-12)


def test_frechet_distance_of_singular_covariances(rng):
    u, v = rng.standard_normal((2, 60))
    value = metrics.frechet_distance(np.zeros(60), np.outer(u, u), np.zeros(60), np.outer(v, v))
    assert value == pytest.approx(u @ u + v @ v - 2 * abs(u @ v), rel=1e-5)
    few = rng.standard_normal((10, 60))
    assert 0 <= fid(few, few) < 1e-5


@pytest.mark.parametrize(
    ("mean", "covariance", "message"),
    [
        (np.zeros(2), np.eye(3), r"shapes \(2,\) and \(3, 3\)"),
        (np.array([0, np.nan]), np.eye(2), "mean_b has 1 values"),
        (np.zeros(2), np.array([[1.0, 0.5], [0.0, 1.0]]), "transpose by 0.5"),
        (np.zeros(2), np.diag([1.0, -0.1]), "eigenvalue -0.1"),
        (np.zeros(3), np.eye(3), "mean_b has 3 features"),
    ],
)
def test_frechet_distance_refuses_what_is_no_gaussian(mean, covariance, message):
    with pytest.raises(BadInput, match=message):
        inspect.unwrap(metrics.frechet_distance)(np.zeros(2), np.eye(2), mean, covariance)


# Bad feature rows, the same for every metric


@pytest.mark.parametrize(
    ("features", "message"),
    [
        (np.zeros((4, 2, 1)), "flatten"),
        (np.zeros((4, 0)), "flatten"),
        (np.zeros((4, 3)), "like the other set"),
        (np.zeros((1, 2)), "at least 2"),
        (np.array([[0, 1], [np.nan, np.inf]]), "2 values"),
    ],
)
def test_bad_feature_rows_are_refused(features, message):
    with pytest.raises(BadInput, match=message) as error:
        inspect.unwrap(checked_features)(features, "features", at_least=2, width=2)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "name", ["precision_recall", "energy_distance", "kernel_distance", "sliced_wasserstein"]
)
def test_every_two_sample_metric_checks_both_sets(name, rng):
    metric, good = inspect.unwrap(getattr(metrics, name)), rng.standard_normal((8, 2))
    for bad in (good[:1], good * np.nan, np.ones((8, 3))):
        with pytest.raises(BadInput):
            metric(good, bad)
        with pytest.raises(BadInput):
            metric(bad, good)


def test_gaussian_statistics_need_two_rows():
    with pytest.raises(BadInput, match="at least 2"):
        metrics.gaussian_statistics(np.zeros((1, 3)))


# Precision and recall


def test_precision_and_recall_match_the_recorded_values(recorded_scores):
    precision, recall = metrics.precision_recall(
        recorded_scores["in/generated"], recorded_scores["in/reference"]
    )
    assert precision == pytest.approx(float(recorded_scores["out/precision"]), abs=1e-6)
    assert recall == pytest.approx(float(recorded_scores["out/recall"]), abs=1e-6)


@pytest.mark.parametrize("offset", [0.0, 1e4])
def test_identical_sets_have_full_precision_and_recall(rng, offset):
    rows = rng.standard_normal((50, 64)) + offset
    rows[:5] = rows[0]  # more copies than k: a ball of radius 0
    assert metrics.precision_recall(rows, rows.copy()) == (1.0, 1.0)


def test_copies_lie_inside_a_ball_of_radius_zero(rng):
    for _ in range(60):  # only some draws round badly
        reference, far = rng.standard_normal((53, 64)), rng.standard_normal((2, 64)) + 50
        reference[:4] = reference[0]
        generated = np.concatenate([np.repeat(reference[:1], 5, axis=0), far])
        assert metrics.precision_recall(generated, reference)[0] == pytest.approx(5 / 7)


def test_far_apart_sets_have_no_precision_and_no_recall(rng):
    rows = rng.standard_normal((50, 4))
    assert metrics.precision_recall(rows, rows + 100) == (0.0, 0.0)


def test_dropping_a_mode_costs_recall_and_not_precision(rng):
    kept, dropped = rng.standard_normal((2, 30, 3))
    assert metrics.precision_recall(kept, np.concatenate([kept, dropped + 100])) == (1.0, 0.5)


def test_radius_reaches_to_the_kth_neighbour():
    reference = np.array([[0.0], [1.0], [3.0], [6.0]])
    generated = np.array([[-1.5], [-0.5], [8.5], [9.5]])
    # Radii of the reference: k=1: 1, 1, 2, 3; k=2: 3, 2, 3, 5.
    assert metrics.precision_recall(generated, reference, k=1)[0] == 0.5
    assert metrics.precision_recall(generated, reference, k=2)[0] == 1.0


def test_too_few_rows_for_k_are_refused(rng):
    rows = rng.standard_normal((5, 2))
    metrics.precision_recall(rows, rows, k=4)
    for few, many in ((0, 5), (5, 0)):
        with pytest.raises(BadInput, match="at least 6"):
            metrics.precision_recall(
                np.repeat(rows, 1 + few, axis=0), np.repeat(rows, 1 + many, axis=0), k=5
            )
    with pytest.raises(BadInput, match="k is 0"):
        metrics.precision_recall(rows, rows, k=0)


def test_chunks_do_not_change_precision_and_recall(rng, monkeypatch):
    a, b = rng.standard_normal((700, 5)), rng.standard_normal((900, 5))
    whole = metrics.precision_recall(a, b)
    monkeypatch.setattr(neighbours, "_CHUNK_MIB", 0.1)
    assert metrics.precision_recall(a, b) == whole


# Energy, kernel and sliced Wasserstein distance


def test_energy_distance_by_hand():
    # 2 (2 + 4 + 1 + 3) / 4 - 1 - 2
    assert metrics.energy_distance(
        np.array([[0.0], [1.0]]), np.array([[2.0], [4.0]])
    ) == pytest.approx(2.0)


@pytest.mark.parametrize("metric", [metrics.energy_distance, metrics.kernel_distance])
def test_unbiased_distances_vanish_on_average_for_equal_distributions(metric, rng):
    values = [
        metric(rng.standard_normal((20, 2)), rng.standard_normal((15, 2))) for _ in range(300)
    ]
    assert abs(np.mean(values)) < 3 * np.std(values) / np.sqrt(len(values))


@pytest.mark.parametrize(
    "metric", [metrics.energy_distance, metrics.kernel_distance, metrics.sliced_wasserstein]
)
def test_distances_grow_with_a_shift(metric, rng):
    a, b = rng.standard_normal((2, 400, 2))
    values = [metric(a, b + shift) for shift in (0.0, 0.5, 1.0, 2.0)]
    assert values == sorted(values)
    assert values[-1] > 10 * abs(values[0])


def test_kernel_distance_matches_the_recorded_value(recorded_scores):
    reference = recorded_scores["in/reference"]
    value = metrics.kernel_distance(recorded_scores["in/generated"][: len(reference)], reference)
    assert value == pytest.approx(float(recorded_scores["out/kid_first500"]), rel=1e-6)


@pytest.mark.parametrize("metric", [metrics.energy_distance, metrics.kernel_distance])
def test_chunks_do_not_change_a_distance(metric, rng, monkeypatch):
    a, b = rng.standard_normal((70, 3)), rng.standard_normal((50, 3)) + 1
    whole = metric(a, b)
    monkeypatch.setattr(two_sample, "_CHUNK_ENTRIES", 170)
    assert metric(a, b) == pytest.approx(whole, rel=1e-12)


@pytest.mark.parametrize("width", [1, 2, 5])
def test_sliced_wasserstein_of_a_translation(width, rng):
    rows, shift = rng.standard_normal((40, width)), rng.standard_normal(width)
    value = metrics.sliced_wasserstein(rows, rows + shift, num_projections=10)
    assert value == pytest.approx(np.linalg.norm(shift) / np.sqrt(width), rel=1e-12)


def test_sliced_wasserstein_of_different_counts(rng):
    # The quantile functions of {0, 1} and {0, 0, 1} differ by 1 on (1/2, 2/3).
    value = metrics.sliced_wasserstein(np.array([[0.0], [1.0]]), np.array([[0.0], [0.0], [1.0]]))
    assert value == pytest.approx(np.sqrt(1 / 6), rel=1e-12)
    rows = rng.standard_normal((30, 2))
    assert metrics.sliced_wasserstein(rows, np.repeat(rows, 3, axis=0)) == 0


def test_sliced_wasserstein_depends_on_its_seed_alone(rng):
    a, b = rng.standard_normal((2, 50, 8))
    few = {seed: metrics.sliced_wasserstein(a, b, num_projections=3, seed=seed) for seed in (0, 1)}
    assert few[0] == metrics.sliced_wasserstein(a, b, num_projections=3, seed=0) != few[1]
    with pytest.raises(BadInput, match="num_projections is 0"):
        metrics.sliced_wasserstein(a, b, num_projections=0)


# Classifier


@pytest.fixture(scope="module")
def digits():
    images, labels = load_digits(return_X_y=True)
    images = (images.reshape(-1, 8, 8, 1) / 8 - 1).astype(np.float32)
    return train_test_split(images, labels, test_size=0.2, stratify=labels, random_state=0)


@pytest.fixture(scope="module")
def classifier(digits):
    images, _, labels, _ = digits
    return metrics.train_classifier(images, labels, 10)


def test_classifier_tells_digits_apart(digits, classifier):
    _, images, _, labels = digits
    features, logits = classifier.features_and_logits(images)
    assert (logits.argmax(axis=1) == labels).mean() >= 0.985
    assert features.shape == (len(images), 64)
    assert logits.shape == (len(images), classifier.num_classes) == (len(images), 10)
    assert not classifier.is_self_supervised
    assert np.linalg.matrix_rank(metrics.gaussian_statistics(features)[1]) == 64


def test_classifier_features_tell_noise_from_digits(digits, classifier, rng):
    train, held_out, _, _ = digits
    noise = rng.uniform(-1, 1, held_out.shape).astype(np.float32)
    real, other, bad = (classifier.features_and_logits(x)[0] for x in (train, held_out, noise))
    assert fid(real, bad) > 10 * fid(real, other)


def test_classifier_rows_do_not_depend_on_their_batch(digits, classifier):
    images = digits[0][:600]
    features, logits = classifier.features_and_logits(images)
    few_features, few_logits = classifier.features_and_logits(images[500:507])
    np.testing.assert_allclose(few_features, features[500:507], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(few_logits, logits[500:507], rtol=1e-5, atol=1e-5)
    assert classifier.features_and_logits(images[:0])[0].shape == (0, 64)


def test_training_twice_gives_the_same_bits(digits):
    images, _, labels, _ = digits
    first, second = (metrics.train_classifier(images, labels, 10, SHORT) for _ in range(2))
    other = metrics.train_classifier(images, (labels + 1) % 10, 10, SHORT)
    assert first.fingerprint == second.fingerprint != other.fingerprint
    np.testing.assert_array_equal(
        first.features_and_logits(images[:9])[1], second.features_and_logits(images[:9])[1]
    )


def test_rotations_replace_missing_labels(digits):
    train, images, labels, _ = digits
    recipe = metrics.Recipe(steps=80, batch_size=64)
    classifier = metrics.train_classifier(train, np.full_like(labels, NO_LABEL), 0, recipe)
    assert classifier.is_self_supervised
    assert classifier.num_classes == 4
    turned = np.concatenate([np.rot90(images, turn, axes=(1, 2)) for turn in range(4)])
    guesses = classifier.features_and_logits(turned)[1].argmax(axis=1)
    assert (guesses == np.repeat(np.arange(4), len(images))).mean() > 0.5


def test_images_of_any_size_are_taken(rng):
    images = rng.standard_normal((3, 9, 17, 3)).astype(np.float32)
    classifier = metrics.train_classifier(
        images, np.array([0, 1, 1]), 2, metrics.Recipe(steps=1, batch_size=4)
    )
    features, logits = classifier.features_and_logits(images)
    assert features.shape == (3, 64)
    assert logits.shape == (3, 2)


def test_shifts_move_whole_images(rng):
    images = np.arange(4 * 8 * 8, dtype=np.float32).reshape(4, 8, 8, 1)
    shifted = classifier_module._shifted(np.repeat(images, 50, axis=0), 1, rng)
    padded = np.pad(images, [(0, 0), (1, 1), (1, 1), (0, 0)], mode="edge")
    allowed = {padded[0, i : i + 8, j : j + 8].tobytes() for i in range(3) for j in range(3)}
    assert {x.tobytes() for x in shifted[:50]} == allowed


@pytest.fixture
def cached(digits, tmp_path):
    images, _, labels, _ = digits

    def load_or_train(images=images[:64], labels=labels[:64], recipe=SHORT):
        return metrics.cached_classifier(
            images, labels, num_classes=10, cache_dir=tmp_path / "new", recipe=recipe
        )

    return load_or_train


def test_cache_is_read_and_leaves_one_file(cached, tmp_path, monkeypatch):
    first = cached()
    monkeypatch.setattr(classifier_module, "train_classifier", None)
    second = cached()
    assert second.fingerprint == first.fingerprint
    assert (second.shape, second.num_classes, second.is_self_supervised) == ((8, 8, 1), 10, False)
    images = np.ones((2, 8, 8, 1), np.float32)
    np.testing.assert_array_equal(
        second.features_and_logits(images)[0], first.features_and_logits(images)[0]
    )
    assert [x.suffix for x in (tmp_path / "new").iterdir()] == [".safetensors"]


def test_cache_key_covers_data_and_settings(cached, classifier, digits, tmp_path, monkeypatch):
    monkeypatch.setattr(classifier_module, "train_classifier", lambda *_: classifier)
    images, labels = digits[0][:64], digits[2][:64]
    cached()
    changed = images.copy()
    changed[3, 2, 1, 0] += 0.5
    cached(images=changed)
    cached(labels=(labels + 1) % 10)
    cached(recipe=metrics.Recipe(steps=SHORT.steps + 1, batch_size=SHORT.batch_size))
    assert len(list((tmp_path / "new").iterdir())) == 4


def flip_a_bit(content):
    return content[:-1] + bytes([content[-1] ^ 1])


def stored_with_fingerprint(tensors):
    return save(tensors, {"fingerprint": classifier_module._fingerprint(tensors)})


def drop_a_name(content):
    return stored_with_fingerprint(dict(list(load(content).items())[1:]))


def halve_the_shapes(content):
    return stored_with_fingerprint(
        {name: x[: len(x) // 2].copy() for name, x in load(content).items()}
    )


@pytest.mark.parametrize(
    "damage",
    [lambda content: content[:-20], lambda _: b"", flip_a_bit, drop_a_name, halve_the_shapes],
)
def test_a_damaged_cache_file_is_replaced_with_a_warning(cached, tmp_path, caplog, damage):
    fingerprint = cached().fingerprint
    (path,) = (tmp_path / "new").iterdir()
    intact = path.read_bytes()
    path.write_bytes(damage(intact))
    assert cached().fingerprint == fingerprint
    assert "damaged" in caplog.text
    assert path.read_bytes() == intact


@pytest.mark.parametrize(
    ("shape", "labels", "num_classes", "message"),
    [
        ((4, 8, 7, 1), [0, 1, 0, 1], 2, "at least 8"),
        ((4, 8, 8), [0, 1, 0, 1], 2, "at least 8"),
        ((0, 8, 8, 1), [], 2, "at least one image"),
        ((4, 8, 8, 1), [0, 1, 0], 2, r"shape \(3,\) for 4 images"),
        ((4, 8, 8, 1), [0, 1, 0, 2], 2, r"in \[0, 2\]"),
        ((4, 8, 8, 1), [0, 1, 0, -1], 2, r"in \[-1, 1\]"),
        ((4, 8, 8, 1), [0, 0, 0, 0], 1, "num_classes is 1"),
        ((4, 8, 8, 1), [-1, -1, -1, 0], 0, "pass the number of classes"),
        ((4, 8, 9, 1), [-1, -1, -1, -1], 0, "square"),
    ],
)
def test_bad_training_sets_are_refused(shape, labels, num_classes, message, tmp_path):
    images, labels = np.zeros(shape, np.float32), np.array(labels, np.int32)
    with pytest.raises(BadInput, match=message):
        inspect.unwrap(metrics.train_classifier)(images, labels, num_classes)
    with pytest.raises(BadInput, match=message):
        inspect.unwrap(metrics.cached_classifier)(
            images, labels, num_classes=num_classes, cache_dir=tmp_path
        )


def test_bad_images_are_refused(classifier):
    with pytest.raises(BadInput, match=r"takes \(8, 8, 1\)"):
        classifier.features_and_logits(np.zeros((2, 8, 8, 3), np.float32))
    with pytest.raises(BadInput, match="finite"):
        classifier.features_and_logits(np.full((2, 8, 8, 1), np.nan, np.float32))
