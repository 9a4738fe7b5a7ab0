"""Sampling and evaluation of a tiny finished run: from Python and from the command line."""

import json

import numpy as np
import pytest
from conftest import TINY

import mf_jax
from mf_jax.data.pixels import to_pixels
from mf_jax.errors import BadInput


@pytest.fixture(scope="module")
def generator(trained):
    return mf_jax.load(trained, ema="none")


@pytest.fixture(scope="module")
def toy_run(tmp_path_factory, spawn):
    workdir = tmp_path_factory.mktemp("toy") / "run"
    process = spawn("--config=configs/toy2d.py", f"--workdir={workdir}", *TINY)
    out, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    return workdir, out


def test_the_promised_two_lines(trained):
    images = mf_jax.load(str(trained)).sample(labels=[3, 3, 7], steps=1, seed=0)
    assert images.shape == (3, 8, 8, 1)
    assert images.dtype == np.uint8


def test_exactly_n_and_the_same_n_at_any_batch_size(generator):
    whole = generator.sample_raw(num=23)
    assert whole.shape == (23, 8, 8, 1)
    for batch_size in (1, 7, 23, 100):
        part = generator.sample_raw(num=23, batch_size=batch_size)
        np.testing.assert_allclose(part, whole, atol=1e-5)
    np.testing.assert_allclose(generator.sample_raw(num=9), whole[:9], atol=1e-5)


def test_two_steps_are_not_one_step(generator):
    one, two, four = (generator.sample_raw(num=4, steps=steps) for steps in (1, 2, 4))
    assert np.abs(one - two).max() > 1e-4
    assert np.abs(two - four).max() > 1e-4
    np.testing.assert_array_equal(generator.sample_raw(num=4, times=(1.0, 0.5, 0.0)), two)
    assert np.abs(generator.sample_raw(num=4, times=(1.0, 0.2, 0.0)) - two).max() > 1e-4


def test_seed_label_and_average_matter(generator, trained):
    base = generator.sample_raw(labels=[1, 2])
    np.testing.assert_array_equal(base, generator.sample_raw(labels=[1, 2]))
    assert np.abs(base - generator.sample_raw(labels=[1, 2], seed=1)).max() > 0.1
    other = np.abs(base - generator.sample_raw(labels=[1, 5])).max(axis=(1, 2, 3))
    assert other[0] == 0
    assert other[1] > 1e-5
    assert np.abs(base - mf_jax.load(trained).sample_raw(labels=[1, 2])).max() > 1e-4


def test_labels(generator):
    np.testing.assert_array_equal(generator.labels_for([4, 2], 5), [4, 2, 4, 2, 4])
    np.testing.assert_array_equal(generator.labels_for(None, 12), [*range(10), 0, 1])
    for bad in ([10], [-2]):
        with pytest.raises(BadInput, match="not a class"):
            generator.sample(labels=bad)
    for arguments in ({}, {"num": 0}, {"num": 3, "steps": 0}, {"num": 3, "batch_size": 0}):
        with pytest.raises(BadInput):
            generator.sample(**arguments)


def test_pixels():
    np.testing.assert_array_equal(
        to_pixels(np.float32([[[[-1.5], [-1.0], [0.0], [1.0], [2.0]]]])).ravel(),
        [0, 0, 128, 255, 255],
    )


def test_load_names_what_is_wrong(tmp_path, trained):
    with pytest.raises(BadInput, match="holds no run"):
        mf_jax.load(tmp_path)
    with pytest.raises(BadInput, match="this run has"):
        mf_jax.load(trained, ema="0.5")


def test_sample_mode_writes_the_fields_convention(copy_of_trained, command):
    more = (
        "--config.sample.num=21",
        "--config.sample.labels=(3,7)",
        "--config.sample.batch_size=8",
    )
    code, out, errors = command(
        "--config=configs/digits.py", "--mode=sample", f"--workdir={copy_of_trained}", *TINY, *more
    )
    assert code == 0, errors
    arrays = np.load(copy_of_trained / "samples.npz")
    assert arrays["arr_0"].shape == (21, 8, 8, 1)
    assert arrays["arr_0"].dtype == np.uint8
    np.testing.assert_array_equal(arrays["arr_1"], np.resize([3, 7], 21))
    expected = mf_jax.load(copy_of_trained).sample(labels=[3, 7], num=21)
    np.testing.assert_array_equal(arrays["arr_0"], expected)
    assert (copy_of_trained / "samples.png").exists()
    assert "samples.npz" in out


def test_sample_mode_of_vectors(toy_run, command):
    workdir, _ = toy_run
    code, _, errors = command(
        "--config=configs/toy2d.py",
        "--mode=sample",
        f"--workdir={workdir}",
        *TINY,
        "--config.sample.num=50",
    )
    assert code == 0, errors
    arrays = np.load(workdir / "samples.npz")
    assert arrays.files == ["arr_0"]
    assert arrays["arr_0"].shape == (50, 2)
    assert arrays["arr_0"].dtype == np.float32
    assert all((workdir / f"{name}.png").exists() for name in ("scatter", "field", "transport"))


def _evaluate(config, workdir, command, cache):
    code, out, errors = command(
        f"--config=configs/{config}.py",
        "--mode=eval",
        f"--workdir={workdir}",
        *TINY,
        f"--config.cache_dir={cache}",
    )
    assert code == 0, errors
    return json.loads((workdir / "eval.json").read_text()), out


def test_eval_of_images(copy_of_trained, command, tmp_path):
    result, out = _evaluate("digits", copy_of_trained, command, tmp_path / "cache")
    floor, *rows = result["rows"]
    assert "real data" in floor["name"]
    assert (floor["samples"], [row["samples"] for row in rows]) == (360, [80, 80])
    assert [row["steps"] for row in rows] == [1, 2]
    assert floor["class_accuracy"] > 0.97
    assert all(row["frechet_distance"] > 3 * floor["frechet_distance"] for row in rows), (
        "12 steps teach little"
    )
    for word in ("step 12", "EMA", "80 samples", "seed 1", "classes in turn", "features"):
        assert word in result["protocol"]
    assert set(result["diagnostics"]) == {"velocity_error", "identity_residual", "additivity_gap"}
    assert "frechet" in out
    again, _ = _evaluate("digits", copy_of_trained, command, tmp_path / "cache")
    assert again == result
    assert len(list((tmp_path / "cache").iterdir())) == 1, "the classifier is trained once"


def test_eval_of_vectors(toy_run, command, tmp_path):
    workdir, _ = toy_run
    result, _ = _evaluate("toy2d", workdir, command, tmp_path)
    floor, *rows = result["rows"]
    assert len(rows) == 2
    assert {"energy_distance", "sliced_wasserstein"} <= set(floor)
    assert all(row["sliced_wasserstein"] > floor["sliced_wasserstein"] for row in rows)


def test_a_run_says_where_its_results_are(toy_run):
    workdir, out = toy_run
    for name in ("metrics.jsonl", "checkpoints", "samples", "report.html"):
        assert f"{workdir.name}/{name}" in out


def test_sampling_computes_in_full_precision_whatever_the_platform_calls_its_default(generator):
    from mf_jax import generator as module

    numbers = (np.float32([1, 0]), np.float32(module.NO_GUIDANCE))
    arrays = (*numbers, np.arange(4, dtype=np.int32), np.zeros(4, np.int32))
    trace = module._sample.trace(
        generator.network, True, generator.spec.shape, generator.params, 0, *arrays
    )
    text = str(trace.jaxpr)
    assert text.count("precision=") > 3
    assert "precision=None" not in text
