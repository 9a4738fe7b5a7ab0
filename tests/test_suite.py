"""All scores of features that come batch by batch are those of the whole."""

import numpy as np
import pytest

from mf_jax.errors import BadInput
from mf_jax.metrics.frechet import Moments, frechet_distance
from mf_jax.metrics.reference_file import Reference, Statistics
from mf_jax.metrics.row_pairs import pair_scores
from mf_jax.metrics.suite import SampleScores

SCORES = {"fid", "sfid", "fid_standard_error", "precision", "recall", "kid"}
NUM = 203


def reference_of(rows, spatial, *, path="reference.npz"):
    statistics = Statistics.of(Moments.of(rows), Moments.of(spatial), rows.astype(np.float32))
    return Reference(path, statistics)


def add_all(scores, features, batch, order=None, junk=np.nan):
    """Add features in batches of one size, the last filled up with junk."""
    order = np.arange(NUM) if order is None else order
    for start in range(0, NUM, batch):
        part = order[start : start + batch]
        index = np.full(batch, NUM + 5)
        index[: len(part)] = part
        filled = {}
        for name, rows in features.items():
            filled[name] = np.full((batch, rows.shape[1]), junk, np.float32)
            filled[name][: len(part)] = rows[part]
        scores.add(filled, index)
    return scores


@pytest.fixture(scope="module")
def made():
    """Return features and a reference."""
    rng = np.random.default_rng(0)
    mix = rng.standard_normal((8, 8))
    widths = {"2048": 8, "spatial": 5, "logits_unbiased": 6}
    features = {k: rng.standard_normal((NUM, n)).astype("f4") for k, n in widths.items()}
    features["2048"] = (features["2048"] @ mix + 3).astype(np.float32)
    rows = (rng.standard_normal((150, 8)) @ mix * 1.1 + 3.2).astype(np.float32)
    return features, reference_of(rows, rng.standard_normal((150, 5)))


def score(features, reference, batch, **more):
    scores = add_all(SampleScores(NUM, least=10), features, batch, **more)
    mean, deviation = scores.inception_score()
    return scores.against(reference) | {"mean": mean, "deviation": deviation}


def test_scores_are_of_the_whole_whatever_the_batches(made):
    features, reference = made
    found, real = score(features, reference, NUM), reference.statistics
    own, spatial = (Moments.of(features[name]) for name in ("2048", "spatial"))
    pairs = pair_scores(features["2048"], real.features)
    theirs = real.mean_spatial, real.covariance_spatial
    expected = dict(zip(("precision", "recall", "kid"), pairs, strict=True)) | {
        "fid": frechet_distance(own.mean, own.covariance, real.mean, real.covariance),
        "sfid": frechet_distance(spatial.mean, spatial.covariance, *theirs),
    }
    assert {name: found[name] for name in expected} == pytest.approx(expected, rel=1e-9)
    assert 0 < found["precision"] < 1
    assert 0 < found["recall"] < 1
    assert found.keys() == SCORES | {"mean", "deviation"}
    for more in ({}, {"order": np.random.default_rng(1).permutation(NUM)}, {"junk": np.inf}):
        assert score(features, reference, 64, **more) == pytest.approx(found, rel=1e-6)


def test_scores_whose_statistics_a_reference_lacks_are_left_out(made):
    features, reference = made
    real = reference.statistics
    plain = Reference("plain.npz", Statistics(0, real.mean, real.covariance))
    scores = add_all(SampleScores(NUM, least=10), features, NUM)
    assert scores.against(plain).keys() == {"fid", "fid_standard_error"}
    assert scores.against(reference).keys() == SCORES  # any number of references


def test_samples_that_are_missing_or_too_few_are_refused(made):
    features, reference = made
    scores = SampleScores(NUM, least=10)
    scores.add({name: rows[:50] for name, rows in features.items()}, np.arange(50))
    with pytest.raises(BadInput, match=r"153 of 203 samples are missing .*, the first is 50"):
        scores.against(reference)
    few = {name: rows[:8] for name, rows in features.items()}
    with pytest.raises(BadInput, match=r"eval\.num_samples=8: must be at least 9"):
        SampleScores(8).add(few, np.arange(8))
    SampleScores(8, least=8, splits=2).add(few, np.arange(8))


def test_references_of_other_features_are_refused(made, rng):
    scores = add_all(SampleScores(NUM, least=10), made[0], NUM)
    far = reference_of(rng.standard_normal((99, 64)), rng.standard_normal((99, 5)), path="far.npz")
    with pytest.raises(BadInput, match=r"far.npz: mu has 64 .*first pool.*; must have 8"):
        scores.against(far)
    other = reference_of(rng.standard_normal((99, 8)), rng.standard_normal((99, 3)))
    with pytest.raises(BadInput, match="mu_s has 3 features; must have 5"):
        scores.against(other)
