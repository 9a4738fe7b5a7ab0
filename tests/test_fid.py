"""Evaluation against references: the grid, its rows, and what is not computed twice; Inception is replaced."""

import json
import shutil

import numpy as np
import pytest
from conftest import TINY

from mf_jax import fid
from mf_jax.metrics import frechet_distance, gaussian_statistics
from mf_jax.metrics.inception import FEATURES, Inception
from mf_jax.metrics.reference_file import Statistics, read_reference, write_reference
from mf_jax.scoring import scorers as judge

WIDTHS = {"2048": 6, "spatial": 5, "logits_unbiased": 4}
ARGUMENTS = (
    "--config=configs/digits.py",
    *(a for a in TINY if ".steps" not in a),
    "--mode=eval",
    "--config.log.progress=False",
)


def _features(params, images):
    """Stand for Inception: a few fixed projections of the pictures."""
    flat = images.reshape(len(images), -1).astype("float32") / 255
    return {
        name: flat
        @ np.random.default_rng(width).standard_normal((flat.shape[1], width)).astype(np.float32)
        for name, width in WIDTHS.items()
    }


@pytest.fixture
def few_features(monkeypatch, tmp_path):
    """Replace Inception; return a reference of as few features, and count how often pictures are looked at."""
    looks = []

    def counted(params, images):
        looks.append(len(images))
        return _features(params, images)

    monkeypatch.setattr(judge, "inception_features", counted)
    monkeypatch.setattr(judge, "FEATURES", FEATURES | WIDTHS)
    monkeypatch.setattr(fid, "load_inception", lambda path: Inception({}, "1" * 64))
    monkeypatch.setattr(fid, "find_weights", lambda *_, **__: "somewhere")
    monkeypatch.setattr(fid, "verify", lambda *_: None)
    return looks, _write_reference(tmp_path / "reference.npz", seed=0)


def _write_reference(path, seed, width=6):
    rows = np.random.default_rng(seed).standard_normal((50, width)).astype(np.float32)
    spatial = rows[:, :5].astype(np.float64)
    moments = [rows.mean(0, np.float64), np.cov(rows.astype(np.float64).T)]
    moments += [spatial.mean(0), np.cov(spatial.T)]
    write_reference(path, Statistics(50, *moments, rows))
    return path


def _references(*paths):
    return f"--config.eval.references={tuple(map(str, paths))}"


def _rows(workdir):
    return [json.loads(line) for line in (workdir / "eval.jsonl").read_text().splitlines()]


def test_every_cell_has_a_row_with_its_protocol_and_is_scored_once(
    few_features, copy_of_trained, command
):
    looks, reference = few_features
    one = (*ARGUMENTS, f"--workdir={copy_of_trained}", _references(reference))
    code, out, errors = command(*one, "--config.eval.steps=2,")
    assert code == 0, errors
    assert sum(looks) == 80
    (first,) = _rows(copy_of_trained)
    assert {
        "fid",
        "sfid",
        "precision",
        "recall",
        "kid",
        "inception_score",
        "fid_standard_error",
    } <= set(first)
    assert f"{first['fid']:.4g}" in out
    assert "two FIDs that differ by less than" in " ".join(out.split())
    about = first["protocol"]
    assert (about["checkpoint"], about["steps"], about["ema"], about["seed"]) == (12, 2, "0.995", 1)
    assert about["reference_sha256"] == read_reference(reference).sha256
    assert [path.name for path in (copy_of_trained / "eval_samples").iterdir()] == [
        "checkpoint_12_EMA_0.995_2_steps.png"
    ]

    looks.clear()
    assert command(*one, "--config.eval.steps=2,1", "--config.eval.emas=('', 'none')")[0] == 0
    assert sum(looks) == 3 * 80  # one of four cells was there
    rows = _rows(copy_of_trained)
    assert rows[0] == first
    assert {(row["protocol"]["steps"], row["protocol"]["ema"]) for row in rows} == {
        (steps, ema) for steps in (1, 2) for ema in ("0.995", "none")
    }
    assert len({row["fid"] for row in rows}) == 4

    looks.clear()
    assert command(*one, "--config.eval.steps=2,", "--config.eval.seed=5")[0] == 0
    assert command(*one, "--config.eval.steps=2,", "--config.eval.labels=random")[0] == 0
    assert command(*one, "--config.eval.steps=2,", "--config.eval.num_samples=90")[0] == 0
    assert sum(looks) == 80 + 80 + 90
    assert len(_rows(copy_of_trained)) == 7


def test_numbers_do_not_depend_on_the_batch_and_padding_is_not_counted(
    few_features, copy_of_trained, command
):
    looks, reference = few_features
    found = []
    for batch_size in (80, 32):
        (copy_of_trained / "eval.jsonl").unlink(missing_ok=True)
        code, _, errors = command(
            *ARGUMENTS,
            f"--workdir={copy_of_trained}",
            _references(reference),
            "--config.eval.steps=1,",
            f"--config.eval.batch_size={batch_size}",
        )
        assert code == 0, errors
        found.append({k: v for k, v in _rows(copy_of_trained)[0].items() if isinstance(v, float)})
    assert looks == [80, 32, 32, 32]
    assert found[0] == pytest.approx(found[1], rel=1e-4)


def test_several_references_share_their_samples(few_features, copy_of_trained, command, tmp_path):
    looks, reference = few_features
    other = _write_reference(tmp_path / "other.npz", seed=1)
    code, _, _ = command(
        *ARGUMENTS,
        f"--workdir={copy_of_trained}",
        _references(reference, other),
        "--config.eval.steps=1,",
    )
    assert (code, sum(looks)) == (0, 80)
    rows = _rows(copy_of_trained)
    assert [row["protocol"]["reference"] for row in rows] == ["reference.npz", "other.npz"]
    assert len({row["fid"] for row in rows}) == 2
    table = json.loads((copy_of_trained / "eval.json").read_text())
    assert [row["name"].split(", ")[-1] for row in table["rows"]] == ["reference.npz", "other.npz"]


def test_chosen_checkpoints(few_features, copy_of_trained, command):
    _, reference = few_features
    one = (
        *ARGUMENTS,
        f"--workdir={copy_of_trained}",
        _references(reference),
        "--config.eval.steps=1,",
    )
    assert command(*one, "--config.eval.checkpoints=4,8")[0] == 0
    assert [row["protocol"]["checkpoint"] for row in _rows(copy_of_trained)] == [4, 8]
    code, _, errors = command(*one, "--config.eval.checkpoints=5,")
    assert code == 2
    assert "no checkpoint of step 5; it has 4, 8, 12" in errors


@pytest.fixture
def watch(few_features, copy_of_trained, command, monkeypatch):
    """Return a function that watches the run and does something whenever the job waits."""
    _, reference = few_features
    waits = []

    def start(when_waiting=lambda: None, *more):
        def wait(seconds):
            waits.append(seconds)
            assert len(waits) < 5
            when_waiting()

        monkeypatch.setattr(fid.time, "sleep", wait)
        one = (
            *ARGUMENTS,
            f"--workdir={copy_of_trained}",
            _references(reference),
            "--config.eval.steps=1,",
        )
        return *command(*one, "--config.eval.watch=True", *more), waits

    return start


def test_watching_scores_what_is_new_until_the_last_step(watch, copy_of_trained):
    """The run's last checkpoint appears only while the job waits."""
    last, aside = copy_of_trained / "checkpoints" / "12", copy_of_trained / "later"
    shutil.move(last, aside)
    code, out, errors, waits = watch(lambda: shutil.move(aside, last))
    assert code == 0, errors
    assert len(waits) == 1
    assert [row["protocol"]["checkpoint"] for row in _rows(copy_of_trained)] == [8, 4, 12]
    assert "checkpoint 4" in out


def test_a_checkpoint_that_lands_during_the_last_scoring_is_scored(
    watch, copy_of_trained, monkeypatch
):
    last, aside = copy_of_trained / "checkpoints" / "12", copy_of_trained / "later"
    shutil.move(last, aside)
    score = fid._score_grid

    def score_slowly(*arguments):
        rows = score(*arguments)
        if aside.exists():
            shutil.move(aside, last)
        return rows

    monkeypatch.setattr(fid, "_score_grid", score_slowly)
    code, _, errors, _ = watch()
    assert code == 0, errors
    assert [row["protocol"]["checkpoint"] for row in _rows(copy_of_trained)] == [8, 12, 4]


def test_a_watched_checkpoint_is_scored_in_all_ways_before_an_older_one(watch, copy_of_trained):
    code, _, errors, _ = watch(lambda: None, "--config.eval.steps=1,2")
    assert code == 0, errors
    about = [row["protocol"] for row in _rows(copy_of_trained)]
    assert [(row["checkpoint"], row["steps"]) for row in about] == [
        (checkpoint, steps) for checkpoint in (12, 8, 4) for steps in (1, 2)
    ]


def test_watching_waits_for_a_run_and_goes_on_without_what_it_drops(
    watch, copy_of_trained, monkeypatch
):
    config, aside = copy_of_trained / "config.json", copy_of_trained / "aside"
    shutil.move(config, aside)
    load = fid.load_cell

    def drop_one(settings, workdir, checkpoint, ema):
        shutil.rmtree(workdir / "checkpoints" / "4", ignore_errors=True)
        return load(settings, workdir, checkpoint, ema)

    monkeypatch.setattr(fid, "load_cell", drop_one)
    code, out, errors, waits = watch(lambda: shutil.move(aside, config))
    assert code == 0, errors
    assert len(waits) == 1
    assert "waiting for a run" in out
    assert "checkpoint 4 is left out: the run has dropped it" in out
    assert [row["protocol"]["checkpoint"] for row in _rows(copy_of_trained)] == [12, 8]


def test_watching_leaves_out_a_damaged_checkpoint(watch, copy_of_trained):
    for path in (copy_of_trained / "checkpoints" / "8").rglob("*"):
        if path.is_file():
            path.write_bytes(path.read_bytes()[:-1])
    code, out, errors, _ = watch()
    assert code == 0, errors
    assert "checkpoint 8 is left out: " in out
    assert "damaged" in out
    assert [row["protocol"]["checkpoint"] for row in _rows(copy_of_trained)] == [12, 4]


def test_rows_of_a_job_beside_are_kept(few_features, copy_of_trained, command, monkeypatch):
    _, reference = few_features
    path = copy_of_trained / "eval.jsonl"
    theirs = {"name": "of another job", "fid": 1.0, "protocol": {"checkpoint": 3}}
    score = judge.Judge.__call__

    def score_beside_another(self, *arguments, **more):
        path.write_text(json.dumps(theirs) + "\n")
        return score(self, *arguments, **more)

    monkeypatch.setattr(judge.Judge, "__call__", score_beside_another)
    one = (*ARGUMENTS, f"--workdir={copy_of_trained}", _references(reference))
    assert command(*one, "--config.eval.steps=1,")[0] == 0
    assert _rows(copy_of_trained)[0] == theirs
    assert len(_rows(copy_of_trained)) == 2


def test_other_weights_are_another_row(few_features, copy_of_trained, command, tmp_path):
    """Of a run that was trained anew, and of init.path whatever it stands for."""
    looks, reference = few_features
    one = (*ARGUMENTS, _references(reference), "--config.eval.steps=1,")
    assert command(*one, f"--workdir={copy_of_trained}")[0] == 0
    before = (copy_of_trained / "eval.jsonl").read_text()
    for name in ("checkpoints", "config.json"):
        path = copy_of_trained / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    trained_anew = [*ARGUMENTS, "--config.seed=7", "--mode=train"]
    code, _, errors = command(*trained_anew, f"--workdir={copy_of_trained}")
    assert code == 0, errors
    (copy_of_trained / "eval.jsonl").write_text(before)
    looks.clear()
    assert command(*one, "--config.seed=7", f"--workdir={copy_of_trained}")[0] == 0
    assert sum(looks) == 80
    assert len({row["fid"] for row in _rows(copy_of_trained)}) == 2

    elsewhere = tmp_path / "elsewhere"
    started = (*one, f"--workdir={elsewhere}", f"--config.init.path={copy_of_trained}")
    for more in ((), ("--config.init.which=none",), ("--config.model.prediction=data",)):
        code, _, errors = command(*started, *more)
        assert code == 0, errors
    assert len({row["fid"] for row in _rows(elsewhere)}) == 3
    looks.clear()
    assert command(*started)[0] == 0
    assert sum(looks) == 0
    code, _, errors = command(*started, "--config.eval.emas=('none',)")
    assert (code, "init.which" in errors) == (2, True)


def test_anybodys_samples(few_features, command, tmp_path):
    looks, reference = few_features
    pictures = np.random.default_rng(0).integers(0, 256, (45, 8, 8, 3), dtype=np.uint8)
    np.savez(tmp_path / "theirs.npz", arr_0=pictures)
    code, _, errors = command(
        *ARGUMENTS,
        f"--workdir={tmp_path / 'scores'}",
        _references(reference),
        f"--config.eval.samples={tmp_path / 'theirs.npz'}",
        "--config.eval.batch_size=20",
    )
    assert code == 0, errors
    (row,) = _rows(tmp_path / "scores")
    assert row["protocol"]["num_samples"] == 45
    assert looks == [20, 20, 20]
    features = _features({}, pictures)["2048"].astype(np.float64)
    wanted = read_reference(reference)
    distance = frechet_distance(*gaussian_statistics(features), wanted.mean, wanted.covariance)
    assert row["fid"] == pytest.approx(distance, rel=1e-5)


def test_a_reference_of_nothing_but_pictures(few_features, command, tmp_path):
    pictures = np.random.default_rng(0).integers(0, 256, (2, 60, 8, 8, 3), dtype=np.uint8)
    np.savez(tmp_path / "theirs.npz", arr_0=pictures[0])
    np.savez(tmp_path / "real.npz", arr_0=pictures[1])
    code, _, errors = command(
        *ARGUMENTS,
        f"--workdir={tmp_path / 'scores'}",
        _references(tmp_path / "real.npz"),
        f"--config.eval.samples={tmp_path / 'theirs.npz'}",
    )
    assert code == 0, errors
    (row,) = _rows(tmp_path / "scores")
    assert row["fid"] > 0
    assert 0 < row["precision"] <= 1


def test_the_pictures_of_a_reference_give_the_features_that_it_lacks(
    few_features, command, tmp_path
):
    pictures = np.random.default_rng(0).integers(0, 256, (60, 8, 8, 3), dtype=np.uint8)
    np.savez(tmp_path / "theirs.npz", arr_0=pictures[:40])
    features = _features({}, pictures)["2048"].astype(np.float64)
    np.savez(tmp_path / "adm.npz", mu=features.mean(0), sigma=np.cov(features.T), arr_0=pictures)
    code, _, errors = command(
        *ARGUMENTS,
        f"--workdir={tmp_path / 'scores'}",
        _references(tmp_path / "adm.npz"),
        f"--config.eval.samples={tmp_path / 'theirs.npz'}",
    )
    assert code == 0, errors
    (row,) = _rows(tmp_path / "scores")
    assert row["precision"] == 1  # the samples are some of the reference
    assert 0 < row["recall"] <= 1


def test_a_row_that_is_none_stops_the_job_and_stays(few_features, copy_of_trained, command):
    _, reference = few_features
    (copy_of_trained / "eval.jsonl").write_text("nonsense\n")
    code, _, errors = command(*ARGUMENTS, f"--workdir={copy_of_trained}", _references(reference))
    assert code == 2
    assert "eval.jsonl" in errors
    assert (copy_of_trained / "eval.jsonl").read_text() == "nonsense\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config.eval.references=('nowhere.npz',)"], "nowhere.npz"),
        (["--config.eval.samples=x.npz"], "eval.references"),
        (["--config.eval.watch=True"], "eval.references"),
        (["REFERENCE", "--config.eval.watch=True", "--config.eval.checkpoints=4,"], "eval.watch"),
        (["REFERENCE", "--config.eval.num_samples=6"], "eval.num_samples=6"),
        (["REFERENCE", "--config.eval.labels=sorted"], "eval.labels"),
        (["REFERENCE", "--config.eval.batch_size=0"], "eval.batch_size"),
        (["OTHER WIDTH"], "features"),
        (["--config.eval.references=5,"], "eval.references"),
        (["REFERENCE", "--config.eval.emas=0.995,"], "eval.emas"),
        (["REFERENCE", "--config.eval.samples=EMPTY"], "arr_0"),
    ],
)
def test_bad_input_is_one_line(
    few_features, copy_of_trained, command, tmp_path, arguments, message
):
    _, reference = few_features
    wide = _write_reference(tmp_path / "wide.npz", seed=0, width=7)
    np.savez(tmp_path / "empty.npz", arr_0=np.zeros((0, 8, 8, 3), np.uint8))
    arguments = [argument.replace("EMPTY", str(tmp_path / "empty.npz")) for argument in arguments]
    given = {"REFERENCE": _references(reference), "OTHER WIDTH": _references(wide)}
    code, _, errors = command(
        *ARGUMENTS,
        f"--workdir={copy_of_trained}",
        *(given.get(argument, argument) for argument in arguments),
    )
    assert code == 2
    assert message in errors
    assert errors.count("\n") == 1
    assert not (copy_of_trained / "eval.jsonl").exists()


def test_a_reference_of_other_features_is_refused_before_samples_are_made(
    few_features, copy_of_trained, command, tmp_path
):
    looks, reference = few_features
    wide = _write_reference(tmp_path / "wide.npz", seed=0, width=7)
    code, _, errors = command(
        *ARGUMENTS, f"--workdir={copy_of_trained}", _references(reference, wide)
    )
    assert code == 2
    assert "wide.npz: mu has 7 features; must have 6" in errors
    assert not looks


def test_published_weights_that_are_missing_are_named(copy_of_trained, command, tmp_path):
    reference = _write_reference(tmp_path / "reference.npz", seed=0)
    code, _, errors = command(
        *ARGUMENTS,
        f"--workdir={copy_of_trained}",
        _references(reference),
        f"--config.weights_dir={tmp_path}",
    )
    assert code == 2
    for part in (
        "weights-inception-2015-12-05-6726825d.pth",
        "https://",
        "6726825d0af5f729",
        str(tmp_path),
    ):
        assert part in errors
