"""Vectors, signals and pictures in a file of arrays: through the command line, and their parts."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import refuses
from jobs import assert_refused, here, keys, tiny_config, works
from steps import parts_of

import mf_jax
from mf_jax.config import make_objective
from mf_jax.data import digits, make_batches, make_source, read
from mf_jax.flow.errors import BadInput
from mf_jax.flow.records import Condition, DataSpec, Told
from mf_jax.models import MLP, as_field, initial_params
from mf_jax.models.layers import sine_cosine_positions
from mf_jax.validation import validate

N = 40
TINY = (
    "--config=configs/digits.py",
    *keys("data.name=arrays data.held_out_share=0.3 model.depth=1 model.width=16 eval.steps=1,"),
    *keys("train.num_steps=2 train.batch_size=8 optim.warmup_steps=0 log.progress=False"),
    *keys("log.sample_every_steps=0 sample.num=15"),
)


def _arrays(*shape, seed=0, **more):
    rng = np.random.default_rng(seed)
    arrays = {"x": rng.uniform(-1, 1, (N, *shape)), "condition": rng.normal(size=(N, 3))}
    return arrays | {key: make(rng) for key, make in more.items()}


def _masked_pairs():
    """Return signals of several lengths, NaN behind their ends, with e and conditions."""
    arrays = _arrays(8, 2, pair=lambda rng: rng.normal(size=(N, 8, 2)))
    mask = np.arange(8)[:, None] < np.random.default_rng(1).integers(3, 9, N)[:, None, None]
    arrays["x"][~np.broadcast_to(mask, arrays["x"].shape)] = np.nan
    return arrays | {"mask": mask}


FILES = {"vectors": _arrays(5, label=lambda rng: rng.integers(0, 3, N)), "signals": _masked_pairs()}


def _open(path, split="train", **more):
    section = {"name": "arrays", "path": str(path), "held_out_share": 0.25}
    return make_source(section | more, split=split)


def test_vectors_and_signals_train_are_scored_and_sampled(tmp_path):
    """Pictures do as the trained digits do."""
    for name, arrays in FILES.items():
        file, run = tmp_path / f"{name}.npz", tmp_path / name
        np.savez(file, **arrays)
        guided = "guidance.omega=2.0 draws.label_drop_share=0.1"
        more = keys(f"data.path={file} {'model.name=mlp' if name == 'vectors' else guided}")
        more.append(f"--workdir={run}")
        if name == "signals":
            assert_refused(here(*TINY, *more), "'optimal_transport': the data are pairs")
            more += keys("coupling.name=independent")
        output = works(*TINY, *more)
        for made in ("metrics.jsonl", "checkpoints", "samples", "report.html"):
            assert f"{name}/{made}" in output
        works("--mode=eval", f"--workdir={run}")
        rows = json.loads((run / "eval.json").read_text())["rows"]
        assert [row["samples"] for row in rows] == [12, 12]
        assert all(row["frechet_distance"] < np.inf > row["sliced_wasserstein"] > 0 for row in rows)
        assert [row.get("pair_rmse", 0) > 0.1 for row in rows] == [False, "pair" in arrays]
        works("--mode=sample", f"--workdir={run}")
        samples = dict(np.load(run / "samples.npz"))
        held_out = read(_open(file, "held_out", held_out_share=0.3))
        assert samples["arr_0"].shape == (15, *arrays["x"].shape[1:])
        assert samples["arr_0"].dtype == np.float32
        turn = np.arange(15) % 12
        np.testing.assert_array_equal(samples["condition"], held_out.condition[turn])
        assert (run / {"vectors": "scatter.png", "signals": "signals.png"}[name]).exists()
        if name == "vectors":
            np.testing.assert_array_equal(samples["arr_1"], held_out.labels[turn])
        if name == "signals":
            assert set(samples) == {"arr_0", "condition", "e", "mask"}
            np.testing.assert_array_equal(samples["e"], held_out.e[turn])
            assert not samples["arr_0"][~samples["mask"]].any()
            assert samples["arr_0"][samples["mask"]].all()

    generator = mf_jax.load(tmp_path / "vectors")
    twice = generator.sample(labels=[1], condition=np.ones((2, 3)), seed=4)
    assert twice.shape == (2, 5)
    told = {"labels": [1], "condition": np.ones((2, 3)), "e": np.ones((2, 5))}
    of_e, other = (generator.sample(seed=seed, **told) for seed in (1, 2))
    np.testing.assert_array_equal(of_e, other)
    np.testing.assert_allclose(of_e[0], of_e[1], atol=1e-6)
    for wrong, words in (
        ({}, "never trained without"),
        ({"condition": np.ones((2, 4))}, r"\[2, 4\]"),
        ({"condition": np.full((1, 3), np.nan)}, "NaN"),
        ({"condition": np.ones(3), "mask": np.ones((1, 5), bool)}, "leave mask out"),
    ):
        refuses(words, generator.sample, labels=[1], **wrong)
    run = ("--mode=sample", f"--workdir={tmp_path / 'vectors'}")
    assert_refused(here(*run, *keys("sample.condition=1.0,")), "sample.condition")
    np.savez(tmp_path / "vectors.npz", **FILES["vectors"] | {"condition": np.ones((N, 3))})
    assert_refused(here(*run), "on other data")


def test_numbers_unlike_the_noise_are_told(tmp_path, capsys):
    rng, file = np.random.default_rng(0), tmp_path / "x.npz"
    for x, told in (
        (rng.random((N, 8, 8, 1)), "no number is below 0"),
        (rng.uniform(-1, 1, (N, 8, 8, 1)), ""),
        (rng.normal(5000, 1000, (N, 3)), "has mean 5"),
        (rng.normal(0, 0.01, (N, 3)), "deviation 0.0"),
        (rng.normal(size=(N, 3)), ""),
    ):
        np.savez(file, x=x)
        _open(file)
        printed = capsys.readouterr().out
        assert (told in printed, bool(told)) == (True, bool(printed))
    np.savez(file, x=x, mask=np.zeros((N, 3), bool))
    _open(file)  # of which nothing can be told


def test_a_dropped_condition_is_the_learned_null_whatever_was_given():
    network = MLP(depth=1, width=8, num_classes=2, condition_size=3)
    params = initial_params(network, (4,), jax.random.key(0))
    params = jax.tree.map(lambda leaf: leaf + 0.1, params)  # the last layer starts at 0
    z, time, labels = jnp.ones((2, 4)), jnp.ones(2), jnp.zeros(2, jnp.int32)

    @jax.jit
    def u(params, numbers):
        told = labels if numbers is None else Told(labels, numbers)
        field = as_field(network)
        return field(params, z, r=0 * time, t=time, condition=Condition(told)).u

    some, none = jnp.arange(6.0).reshape(2, 3), jnp.full((2, 3), jnp.nan)
    partly = some.at[0].set(jnp.nan)
    np.testing.assert_array_equal(u(params, partly)[0], u(params, none)[0])
    np.testing.assert_array_equal(u(params, partly)[1], u(params, some)[1])
    np.testing.assert_array_equal(u(params, None), u(params, none))
    assert np.abs(u(params, some) - u(params, none)).min() > 1e-4
    gradient = jax.jit(jax.grad(lambda p: u(p, partly).sum()))(params)
    embedding = gradient["condition"]["vector_embedding"]
    assert all(np.isfinite(leaf).all() and leaf.any() for leaf in jax.tree.leaves(embedding))


def test_masks_pairs_and_conditions_reach_the_draws(tmp_path):
    np.savez(tmp_path / "x.npz", **FILES["signals"])
    source = _open(tmp_path / "x.npz")
    network = MLP(depth=1, width=8, num_classes=0, condition_size=3)
    parts = parts_of(network, mf_jax.MeanFlow(), shape=(8, 2), batch=16, label_drop_share=0.5)
    parts = dataclasses.replace(parts, more=source.spec.more)
    batch = next(make_batches(source, batch_size=16, seed=0))
    assert jax.tree.map(jnp.shape, batch) == jax.tree.map(jnp.shape, parts.batch)
    draws = jax.jit(parts.draw)(0, *jax.tree.map(jnp.asarray, batch))
    instant = np.arange(16) % 4 < 3
    for rows, chosen in ((draws.instant, instant), (draws.interval, ~instant)):
        np.testing.assert_array_equal(rows.x, batch.x[chosen])
        np.testing.assert_array_equal(rows.mask, batch.mask[chosen])
        np.testing.assert_array_equal(rows.e, np.where(rows.mask, batch.e[chosen], 0))
        np.testing.assert_array_equal(rows.condition.numbers, batch.condition[chosen])
        assert np.isnan(rows.null.numbers).all()
    assert draws.instant.dropped.any()
    config = tiny_config(**{"coupling.name": "independent", "velocity.source": "data"})
    config.velocity.target = 0.5
    known, whole = make_objective(config, source).velocity, read(source)
    np.testing.assert_array_equal(known.labels.numbers, whole.condition)
    np.testing.assert_array_equal(known.mask, whole.mask)
    config.model.patch_size = 2
    refuses("the data are pairs; use sample", validate, config, num_devices=1, source=source)


def test_positions_of_a_signal_differ_and_those_of_a_picture_are_as_published():
    line, grid = (sine_cosine_positions(*sides, num_features=8) for sides in ((6,), (2, 3)))
    np.testing.assert_allclose(line[:, 0], np.sin(np.arange(6)), atol=1e-6)
    np.testing.assert_allclose(grid[:, 0], np.sin([0, 1, 2, 0, 1, 2]), atol=1e-6)
    np.testing.assert_allclose(grid[:, 4], np.sin([0, 0, 0, 1, 1, 1]), atol=1e-6)


def test_bad_files_are_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr("mf_jax.data.arrays._CHUNK", 12)  # of three rows
    good = FILES["signals"]
    x = np.zeros((N, 4))
    nan = np.where(np.arange(N)[:, None] == 7, np.nan, x)
    for arrays, words in (
        ({"y": x}, "has 'y'"),
        ({"condition": x}, "no array x"),
        ({"x": np.zeros(N)}, "must be.*N, D"),
        *(({"x": np.zeros((n, 4))}, "2 rows or more") for n in (0, 1)),
        ({"x": np.array([[None, 1]] * N)}, "no objects"),
        ({"x": nan}, "not finite, as float32, in row 7"),
        ({"x": np.full((N, 4), 1e39)}, "not finite, as float32, in row 0"),
        ({"x": x.astype(np.int32)}, "int32.*must be float, or uint8"),
        ({"x": np.zeros((N, 8, 8), np.uint8)}, r"of grey save x\[..., None\]"),
        ({"x": np.full((N, 4, 4, 1), 3.0)}, r"in \[-1, 1\] or uint8"),
        ({"x": x, "label": np.full(N, 0.5)}, "whole numbers"),
        ({"x": x, "label": np.full(N, -1)}, "classes from 0"),
        ({"x": x, "label": np.arange(N) % 3 * 2}, "no training row is of class 1, 3;"),
        ({"x": x, "condition": np.zeros((N, 0))}, r"numbers \[N, K\]"),
        ({"x": x, "label": np.zeros(N - 1, int)}, "a row for each of x"),
        ({"x": x, "condition": np.zeros(N)}, r"numbers \[N, K\]"),
        ({"x": x, "condition": nan}, "condition is not finite, as float32, in row 7"),
        ({"x": x, "pair": np.zeros((N, 5))}, "a pair x's shape"),
        (good | {"mask": np.ones((N, 7, 1), bool)}, "broadcasts to x"),
        ({"x": np.zeros((N, N)), "mask": np.ones(N, bool)}, "broadcasts to x"),
        (good | {"mask": np.ones((N, 8, 1))}, "must be bool"),
        (good | {"pair": np.full((N, 8, 2), np.inf)}, "pair is not finite"),
    ):
        np.savez(tmp_path / "x.npz", **arrays)
        refuses(words, _open, tmp_path / "x.npz")
    for content in (b"", b"PK\x03\x04 cut", b"text"):
        (tmp_path / "x.npz").write_bytes(content)
        refuses("cannot be read", _open, tmp_path / "x.npz")
    refuses("no .npz or .npy file that exists", _open, tmp_path / "none.npz")


def test_rows_are_split_once_and_bytes_are_scaled(tmp_path):
    x = np.arange(N * 2, dtype=np.uint8).reshape(N, 2)
    np.save(tmp_path / "x.npy", x)
    parts = [read(_open(tmp_path / "x.npy", split)).x for split in ("train", "held_out")]
    assert [len(part) for part in parts] == [30, 10]
    back = np.concatenate(parts)
    np.testing.assert_allclose(back[np.argsort(back[:, 0])], x / 127.5 - 1, atol=1e-6)


def test_labels_of_any_type_are_classes(tmp_path):
    for dtype, num in {"float32": 3, "int8": 128, "uint8": 256}.items():
        label = (np.arange(2000) % num).astype(dtype)
        np.savez(tmp_path / "a.npz", x=np.zeros((2000, 2), np.float32), label=label)
        source = _open(tmp_path / "a.npz", "train")
        assert source.spec.num_classes == num


def test_openml_is_fetched_into_a_folder_and_a_missing_network_is_told(tmp_path, monkeypatch):
    asked = []

    def fetch(name, **options):
        asked.append((name, options["data_home"]))
        pixels = np.tile(np.arange(14)[:, None], (1, 784))
        return pixels.astype(float), np.array([str(i % 10) for i in range(14)], object)

    monkeypatch.setattr("sklearn.datasets.fetch_openml", fetch)
    section = {"name": "openml", "dataset": "Fashion-MNIST", "path": str(tmp_path)}
    monkeypatch.setenv("MF_CACHE", str(tmp_path / "cache"))
    train, held_out = (make_source(section, split=split) for split in ("train", "held_out"))
    assert make_source(section, split="train").digest == train.digest
    assert asked == [("Fashion-MNIST", str(tmp_path))]  # once for both splits and for later
    assert train.digest == held_out.digest != ""
    assert train.spec == DataSpec((28, 28, 1), 10, digits.DATASETS["Fashion-MNIST"])
    assert (len(train), read(held_out).labels.tolist()) == (12, [2, 3])
    np.testing.assert_allclose(read(held_out).x[:, 0, 0, 0], np.array([12, 13]) / 127.5 - 1)
    with pytest.raises(BadInput, match="must be one of mnist_784, Fashion-MNIST"):
        make_source(section | {"dataset": "mnist"}, split="train")

    def fail(name, **options):
        raise OSError("no route to host")

    monkeypatch.setattr("sklearn.datasets.fetch_openml", fail)
    with pytest.raises(BadInput, match=r"no route to host.*set path to a folder"):
        make_source(section | {"dataset": "mnist_784"}, split="train")
