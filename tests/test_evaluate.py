"""Evaluation: the grid, its rows, and scores that are not computed twice; Inception is replaced."""

import itertools
import json
import shutil
from types import SimpleNamespace
from unittest import mock

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import TINY, refuses
from etils import epath
from jobs import assert_refused, here, keys, tiny_config, works
from PIL import Image
from test_data import Numbered

from configs.digits import get_config
from mf_jax import data, evaluate
from mf_jax.flow.couplings import COUPLINGS
from mf_jax.flow.records import DataSpec, Prediction
from mf_jax.metrics import classifier
from mf_jax.metrics.frechet import Moments, frechet_distance
from mf_jax.metrics.inception import FEATURES, Inception
from mf_jax.metrics.reference_file import Statistics, read_reference, write_reference
from mf_jax.published.fetch import find_weights
from mf_jax.runtime.checkpoint import UnreadableCheckpoint, fingerprint
from mf_jax.scoring import rows as score_rows
from mf_jax.scoring import scorers
from mf_jax.scoring.diagnose import diagnose
from mf_jax.scoring.rows import cells, in_shares

OF_PICTURES = "frechet_distance frechet_distance_std precision recall kernel_distance"
WIDTHS = {"2048": 6, "spatial": 5, "logits_unbiased": 4}
SCORES = {"fid", "sfid", "precision", "recall", "kid", "inception_score", "fid_standard_error"}
ARGUMENTS = "--config=configs/digits.py", "--mode=eval", *TINY
ARGUMENTS += (*keys("eval.steps=1, log.progress=False"),)


def _features(images):
    """Stand for Inception: a few fixed projections of the pictures."""
    flat = np.asarray(images).reshape(len(images), -1).astype(np.float32) / 255
    draw = lambda n: np.random.default_rng(n).standard_normal((flat.shape[1], n), np.float32)  # noqa: E731
    return {name: jnp.asarray(flat @ draw(width)) for name, width in WIDTHS.items()}


@pytest.fixture
def looks(monkeypatch):
    """Replace Inception; return the numbers of pictures that it looks at."""
    seen = []

    def counted(params, images):
        seen.append(len(images))
        return _features(images)

    monkeypatch.setattr(scorers, "inception_features", counted)
    monkeypatch.setattr(scorers, "FEATURES", FEATURES | WIDTHS)
    monkeypatch.setattr(scorers, "load_inception", lambda path: Inception({}, "1" * 64))
    monkeypatch.setattr(scorers, "find_weights", lambda *_, **__: "somewhere")
    monkeypatch.setattr(scorers, "verify", lambda *_: None)
    return seen


def _write_reference(path, *, seed=0, width=6):
    rows = np.random.default_rng(seed).standard_normal((50, width)).astype(np.float32)
    pooled, spatial = (Moments.of(x).gaussian for x in (rows, rows[:, :5]))
    write_reference(path, Statistics(len(rows), pooled, spatial, rows))
    return path


@pytest.fixture
def reference(tmp_path):
    return _write_reference(tmp_path / "reference.npz")


@pytest.fixture
def score(looks, copy_of_trained, reference):
    """Return a function that evaluates the trained run and returns its rows; errors fail."""

    def run(more="", references=(reference,), workdir=copy_of_trained):
        looks.clear()
        named = f"--config.eval.references={tuple(map(str, references))}"
        run.out = works(*ARGUMENTS, f"--workdir={workdir}", named, *keys(more))
        return _rows(workdir)

    run.workdir = copy_of_trained
    return run


def _rows(workdir):
    return score_rows.read_rows(epath.Path(workdir))


def _table(workdir):
    return json.loads((workdir / "eval.json").read_text())


def _protocols(rows, *keys):
    return [tuple(row["protocol"][key] for key in keys) for row in rows]


def test_every_cell_has_a_row_with_its_protocol_and_is_scored_once(score, looks, reference):
    (first,) = score("eval.steps=2,")
    assert sum(looks) == 80
    assert set(first) >= SCORES
    assert f"{first['fid']:.4g}" in score.out
    assert "two FIDs that differ by less than" in " ".join(score.out.split())
    told = ("checkpoint", "steps", "ema", "seed", "num_samples", "labels", "weights")
    weights = fingerprint(epath.Path(score.workdir), 12)
    assert _protocols([first], *told) == [(12, 2, "0.995", 1, 80, "balanced", weights)]
    assert first["protocol"]["reference_sha256"] == read_reference(reference).sha256
    assert first["name"] == "checkpoint 12, EMA 0.995, 2 steps"
    with Image.open(score.workdir / "eval_samples/checkpoint_12_EMA_0.995_2_steps.png") as image:
        caption = "step 12 · 2 evaluations a sample · average 0.995"
        assert image.text["Description"] == caption

    with mock.patch("mf_jax.evaluate.save_sample_grid", side_effect=OSError("no font")):
        rows = score("eval.steps=2,1 eval.emas=('','none')")
    assert score.out.count("eval_samples/checkpoint_12_EMA_0.995_1_step.png is left out") == 1
    assert sum(looks) == 3 * 80  # one of four cells was there
    assert rows[0] == first
    assert len({row["fid"] for row in rows}) == 4
    table = _table(score.workdir)
    averages, steps = ("EMA 0.995", "raw parameters"), ("2 steps", "1 step")
    cells = [", ".join(cell) for cell in itertools.product(averages, steps)]
    assert [row["name"] for row in table["rows"]] == cells
    assert table["columns"][:3] == ["steps", "samples", "fid"]
    other = _write_reference(reference.with_name("other.npz"), seed=1)
    rows = score("eval.labels=random eval.checkpoints=4,8", (reference, other))
    assert sum(looks) == 2 * 80, "references share the samples"
    assert len({row["fid"] for row in rows}) == 8
    told = ("checkpoint", "reference", "labels")
    expected = [
        (*pair, "random") for pair in itertools.product((4, 8), ("reference.npz", "other.npz"))
    ]
    assert _protocols(rows[4:], *told) == expected


def test_numbers_of_any_batch_are_alike_and_rows_beside_are_kept(score, looks, monkeypatch):
    found, theirs = [], {"name": "of another job", "fid": 1.0, "protocol": {"checkpoint": 3}}
    compare, rows_file = scorers._score_pictures, score.workdir / "eval.jsonl"

    def score_beside_another(*arguments):
        rows_file.write_text(json.dumps(theirs) + "\n")
        return compare(*arguments)

    monkeypatch.setattr(scorers, "_score_pictures", score_beside_another)
    for batch_size, seen in ((80, [80]), (32, [32, 32, 32])):
        rows_file.unlink(missing_ok=True)
        other, row = score(f"eval.batch_size={batch_size}")
        assert (looks, other) == (seen, theirs)
        found.append({name: value for name, value in row.items() if isinstance(value, float)})
    assert found[0] == pytest.approx(found[1], rel=1e-4)  # padding is not counted


def test_watching_scores_the_newest_without_the_damaged_and_the_dropped(score, monkeypatch):
    """It waits for the run; a checkpoint that lands during a scoring is next."""
    run, checkpoints, load = score.workdir, score.workdir / "checkpoints", evaluate.load_run
    shutil.copytree(checkpoints / "4", checkpoints / "2")
    for path in (checkpoints / "4").rglob("*"):
        if path.is_file():
            path.write_bytes(path.read_bytes()[:-1])
    waits, (config, last) = [], (run / "config.json", checkpoints / "12")
    for path in (config, last):
        path.rename(run / f"aside_{path.name}")
    events = [
        lambda: (run / "aside_config.json").rename(config),
        lambda: (run / "aside_12").rename(last),
        lambda: shutil.rmtree(checkpoints / "2"),
    ]

    def wait(seconds):
        waits.append(seconds)
        assert len(waits) < 5
        if len(waits) == 1:
            events.pop(0)()

    def load_meanwhile(*arguments, **more):
        if events:
            events.pop(0)()
        return load(*arguments, **more)

    monkeypatch.setattr(evaluate.time, "sleep", wait)
    monkeypatch.setattr(evaluate, "load_run", load_meanwhile)
    assert _protocols(score("eval.watch=True"), "checkpoint") == [(8,), (12,)]
    assert len(waits) == 2, "for the run, and before the damaged one is tried again"
    said = "waiting for a run|2 is left out: the run has dropped it|4 is left out: |damaged"
    assert [text for text in said.split("|") if text not in score.out] == []


def test_watching_scores_a_checkpoint_that_a_restarted_run_writes_again(score, monkeypatch):
    seen = iter([[10], [10], [5], [5, 10], [5, 10, 12], [10, 12]])
    broken, scored = [UnreadableCheckpoint("damaged")] * 2, []

    def score_grid(_, steps):
        if steps == [10] and broken:
            raise broken.pop()
        scored.extend(steps)

    monkeypatch.setattr(evaluate.time, "sleep", lambda _: None)
    monkeypatch.setattr(evaluate.Evaluation, "steps", lambda _: next(seen))
    monkeypatch.setattr(evaluate.Evaluation, "score_grid", score_grid)
    score("eval.watch=True")
    assert scored == [5, 10, 12]


def test_other_weights_are_another_row(score, looks, tmp_path):
    """Of init.path whatever it stands for."""
    started, counts = f"init.path={score.workdir}", []
    for more in ("", "init.which=none", "objective.name=flow_matching", ""):
        rows = score(f"{started} {more}", workdir=tmp_path / "elsewhere")
        counts.append(len({row["fid"] for row in rows}))
    assert (counts, looks) == ([1, 2, 3, 3], [])


def test_anybodys_samples_against_all_kinds_of_references(score, looks, reference, tmp_path):
    theirs, real = np.random.default_rng(0).integers(0, 256, (2, 45, 8, 8, 3), dtype=np.uint8)
    both = np.concatenate([theirs, real])
    mu, sigma = Moments.of(np.asarray(_features(both)["2048"])).gaussian
    np.savez(tmp_path / "theirs.npz", theirs)
    np.savez(tmp_path / "real.npz", real)
    # its pictures give the features that it lacks
    np.savez(tmp_path / "adm.npz", both, mu=mu, sigma=sigma)
    files = (reference, tmp_path / "real.npz", tmp_path / "adm.npz")
    asked = f"eval.samples={tmp_path / 'theirs.npz'} eval.batch_size=20"
    rows = score(asked, files, tmp_path / "scores")
    assert looks == [45, 90, 20, 20, 20]
    assert _protocols(rows, "samples", "num_samples") == [("theirs.npz", 45)] * 3
    ours = Moments.of(np.asarray(_features(theirs)["2048"])).gaussian
    distance = frechet_distance(ours, read_reference(reference).pooled)
    assert rows[0]["fid"] == pytest.approx(distance, rel=1e-5)
    assert 0 < rows[1]["precision"] <= 1
    assert rows[2]["precision"] == 1  # the samples are some of the reference
    assert 0 < rows[2]["recall"] <= 1


def test_small_pictures_are_compared_with_the_data(score, monkeypatch, capsys):
    """In features of a classifier that is trained once and kept in the workdir."""
    recipe = classifier.Recipe(steps=3, batch_size=32)
    monkeypatch.setattr(classifier, "Recipe", lambda: recipe)
    model, floor = rows = score(references=())  # a model that is refused leaves no row
    assert model["name"] == "checkpoint 12, EMA 0.995, 1 step"
    assert floor["name"] == "real data (held-out)"
    assert _protocols(rows, "compared_at_once") == [(80,), (80,)]
    columns = [*OF_PICTURES.split(), "nearest_training", "class_accuracy"]
    assert set(floor) == {"name", "protocol", "classifier_sha256", *columns}
    assert set(model) == {"diagnostics", *floor}
    (features,) = {row["protocol"]["features"] for row in rows}
    assert str(recipe) in features
    assert set(model["diagnostics"]) == {"velocity_error", "identity_residual", "additivity_gap"}
    (file,) = score.workdir.glob("classifier-*.npz")
    monkeypatch.setattr(classifier, "_train", None)
    with mock.patch.object(scorers, "_score_whole", wraps=scorers._score_whole) as computed:
        assert score("eval.steps=1,2", references=())[:2] == rows
        assert computed.call_count == 1  # the other rows are there
        assert list(score.workdir.glob("classifier-*.npz")) == [file]
        table = _table(score.workdir)
        *_, row = score("eval.labels=data", references=())
    assert row["protocol"]["labels"] == "data"
    counts = np.bincount(computed.call_args.args[1].labels)
    assert sorted(counts) == [7, 8, 8, 8, 8, 8, 8, 8, 8, 9]  # of 33 to 40 of 360
    columns.remove("frechet_distance_std")  # which is shown beside its mean
    assert table["columns"] == ["steps", "samples", *columns]
    score_rows.show(table)
    assert "±" in capsys.readouterr().out
    assert [(row["name"], row.get("steps"), row["samples"]) for row in table["rows"]] == [
        ("real data (held-out)", None, 360),
        ("1 step", 1, 80),
        ("2 steps", 2, 80),
    ]
    assert table["diagnostics"] == model["diagnostics"]
    labels = np.repeat([2, 0, 1], [5, 90, 5])
    drawn = in_shares(labels, 40, seed=1)
    np.testing.assert_array_equal(np.bincount(drawn), [36, 2, 2])
    assert len(set(drawn[:20].tolist())) > 1


def test_diagnostics_have_the_noise_and_the_guidance_of_training():
    """Of a network that returns 0, whose error is the size of e - x."""
    told = []

    class Zero(nn.Module):
        def __call__(self, z, *, r, t, condition):
            told.append(condition.guidance)
            return Prediction(0 * z)

    def error(**changes):
        config = tiny_config(**{"train.batch_size": 128} | changes)
        source = data.make_source(config.data, split="train")
        return diagnose(config, Zero(), {}, source)["velocity_error"]

    independent, dealt = (error(**{"coupling.name": kind}) for kind in COUPLINGS)
    assert dealt < 0.97 * independent
    error(**{"coupling.name": "optimal_transport", "coupling.rows": 48, "train.batch_size": 48})
    assert error(**{"draws.noise_scale": 3.0}) > 2 * independent
    assert set(told) == {None}
    error(**{"draws.omega_min": 2.0, "draws.omega_max": 2.0})
    assert told[-1] is not None


def test_subsets_have_the_classes_in_the_proportions_of_all_rows():
    """One more or less of a class; few of many rows and half of them alike."""
    kinds, counts = np.array([-1, 3, 4, 9]), np.array([100, 50, 30, 1])
    labels = np.random.default_rng(1).permutation(np.repeat(kinds, counts))
    for size in 18, 90, 500:
        subsets = list(scorers._subsets(labels, size))
        assert len({tuple(rows) for rows in subsets}) == len(subsets) == 10
        for rows in subsets:
            assert len(set(rows)) == len(rows) == min(size, len(labels))
            drawn = (labels[rows] == kinds[:, None]).sum(axis=1)
            assert (abs(drawn - counts * len(rows) / len(labels)) < 1.5).all()


def test_few_pictures_are_scored_as_far_as_they_go(tmp_path):
    """What has no value is null in files, and a dash for people."""
    folder, labels = epath.Path(tmp_path), np.full(9, -1, np.int32)
    pixels = np.random.default_rng(0).integers(0, 256, (9, 8, 8, 1), dtype=np.uint8)
    _, compare = scorers._of_pictures(data.Batch(pixels, labels), 0, folder, 4)
    rows = []
    for count, known in (1, 1), (3, 3), (4, 6), (5, 7):
        scores = compare(pixels[:count], labels[:count])
        assert sum(value is not None for value in scores.values()) == known
        rows.append({"name": str(count), **scores, "protocol": {"num_samples": count}})
    assert rows[3]["nearest_training"] < 1e-3, "they are training pictures"
    rows[2]["diagnostics"] = {"identity_residual": np.inf}
    score_rows.append(folder, rows)
    stored = score_rows.read_rows(folder)
    assert stored[0]["precision"] is stored[2]["diagnostics"]["identity_residual"] is None
    assert "Infinity" not in (folder / "eval.jsonl").read_text()
    table = score_rows.as_table(stored)
    assert {"samples", "precision", "sliced_wasserstein"} < set(table["columns"])
    score_rows.show(table)
    assert "precision none" in score_rows.words_of(stored[0])
    sources = Numbered(1), Numbered(9)
    refuses("leaves one element", scorers.scorer_of_data, get_config(), folder, *sources)


def test_bad_input_is_one_line(looks, copy_of_trained, tmp_path, reference, monkeypatch):
    wide = _write_reference(tmp_path / "wide.npz", width=7)
    np.savez(tmp_path / "empty.npz", arr_0=np.zeros((0, 8, 8, 3), np.uint8))

    def refused(overrides, *words, workdir=copy_of_trained):
        looks.clear()
        assert_refused(here(*ARGUMENTS, f"--workdir={workdir}", *keys(overrides)), *words)

    good = f"eval.references=('{reference}',)"
    for message, overrides in (
        ("nowhere.npz", "eval.references=('nowhere.npz',)"),
        ("eval.references", "eval.samples=x.npz"),
        ("eval.references", "eval.watch=True"),
        ("eval.watch", f"{good} eval.watch=True eval.checkpoints=4,"),
        ("eval.num_samples=6", f"{good} eval.num_samples=6"),
        ("wide.npz: mu has 7 features; must have 6", f"eval.references=('{wide}',)"),
        ("eval.emas", f"{good} eval.emas=0.995,"),
        ("arr_0", f"{good} eval.samples={tmp_path / 'empty.npz'}"),
        ("no checkpoint of step 5; it has 4, 8, 12", f"{good} eval.checkpoints=5,"),
    ):
        refused(overrides, message)
        assert not looks or message == "eval.num_samples=6", "refused before samples are made"
        assert not (copy_of_trained / "eval.jsonl").exists()
    of_weights = f"{good} init.path={copy_of_trained} eval.checkpoints=4,"
    refused(of_weights, "init.which", workdir=tmp_path / "new")
    (copy_of_trained / "eval.jsonl").mkdir()
    refused(good, "eval.jsonl")
    monkeypatch.setattr(scorers, "find_weights", find_weights)
    words = f"{tmp_path}", "weights-inception-2015-12-05-6726825d.pth"
    refused(f"{good} weights_dir={tmp_path}", *words)


def test_weights_have_a_row_for_whatever_decides_their_samples(tmp_path):
    keys, scorer = set(), mock.Mock(spec=scorers.Scorer)
    for key, value, side in (
        ("draws.noise_scale", 1.0, 8),
        ("draws.noise_scale", 0.8, 8),
        ("times.levels", 5, 8),
        ("times.t_mean", 3.0, 8),  # which diagnostics depend on
        ("times.t_mean", 3.0, 16),
    ):
        config = tiny_config(**{key: value})
        evaluation = evaluate.Evaluation(config, epath.Path(tmp_path), scorer, None)
        weights = SimpleNamespace(params={}, spec=DataSpec((side, side, 1)))
        keys.add(score_rows.key_of(evaluation._protocol(cells(config)[0], lambda w=weights: w)))
    assert len(keys) == 5
    config.init.path, config.eval.emas = "weights.npz", ("none",)
    evaluate._check_workdir(config, epath.Path(tmp_path) / "new")
    assert config.eval.emas == ("",), "those of a row are of its own runs"


def test_names_say_whatever_differs():
    cell = {"checkpoint": 4, "ema": "none", "steps": 1, "omega": 1.0, "t_min": 0.0, "t_max": 1.0}
    guided = cell | {"omega": 2.5, "t_min": 0.25}
    name = "1 step, omega 2.5 in [0.25, 1]"
    assert score_rows.name_of(guided) == f"checkpoint 4, raw parameters, {name}"
    for found, names in (
        ((cell, guided, cell | {"steps": 2}), ["1 step", name, "2 steps"]),
        ((cell, cell | {"checkpoint": 8}), ["checkpoint 4, 1 step", "checkpoint 8, 1 step"]),
        ([cell | {"reference": name} for name in "ab"], ["1 step, a", "1 step, b"]),
    ):
        rows = score_rows.as_table([{"protocol": each} for each in found])["rows"]
        assert [row["name"] for row in rows] == names
