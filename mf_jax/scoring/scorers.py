"""Scorers: samples in, one record of scores for each reference.

Pictures meet files of reference statistics in the features of Inception, or the training split in
features learnt from it. Vectors meet the training split directly.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import jax
import numpy as np
from etils import epath
from jaxtyping import Array, Float, Int, Shaped, UInt8
from ml_collections import ConfigDict

from mf_jax.data import Batch, Source, read
from mf_jax.data.pixels import from_pixels, to_pixels
from mf_jax.flow.errors import BadInput
from mf_jax.metrics import classifier, reference_file
from mf_jax.metrics.frechet import Moments, frechet_distance
from mf_jax.metrics.inception import FEATURES, Inception, inception_features, load_inception
from mf_jax.metrics.reference_file import Statistics
from mf_jax.metrics.row_pairs import LEAST_ROWS, NEIGHBOURS, pair_scores
from mf_jax.metrics.suite import POOLED, SPATIAL, SampleScores, check_widths
from mf_jax.metrics.two_sample import energy_distance, nearest_distances, sliced_wasserstein
from mf_jax.published.fetch import find_weights, verify
from mf_jax.reporting.progress import track
from mf_jax.runtime import processes
from mf_jax.runtime.files import sha256_of
from mf_jax.runtime.sharding import batch_sharding, make_mesh
from mf_jax.scoring.rows import Row, digest, key_of, read_rows

_CLASSIFIER = "classifier_sha256"
_OF_VECTORS = (energy_distance, sliced_wasserstein)
_OF_PICTURES = ("frechet_distance", "frechet_distance_std", "precision", "recall")
_OF_PICTURES += ("kernel_distance", "nearest_training")
_KEPT_FEATURES, _BLOCK = 10_000, 250
_SUBSETS, _NEAREST_OF = 10, 500
Scores = dict[str, float | str | None]
Compare = Callable[[Shaped[np.ndarray, "n ..."], Int[np.ndarray, "n"]], Scores]
"""From samples and their labels."""


class Samples(NamedTuple):
    """Samples to score.

    name: for people. batches: pictures of bytes or vectors, and their numbers; rows with a number
    of len(labels) or more are padding. labels: of each sample. batch_size: of all batches. targets:
    of pairs, what each sample should be, like x of the data; else None.
    """

    name: str
    batches: Iterable[tuple[Shaped[Array | np.ndarray, "b ..."], Int[np.ndarray, "b"]]]
    labels: Int[np.ndarray, "n"]
    batch_size: int
    targets: Float[np.ndarray, "n ..."] | None = None


class Scorer(NamedTuple):
    """Compares samples.

    protocols: with what, one for each record of scores. gather: takes samples, on all processes of
    a job, and returns the comparison, for the first alone.
    """

    protocols: Sequence[Row]
    gather: Callable[[Samples], Callable[[], list[Scores]]]


def scorer_of_references(config: ConfigDict) -> Scorer | None:
    """Return the scorer against `eval.references`, or None if there are none."""
    section = config.eval
    if not section.references:
        return None
    path = find_weights(section.inception, config.weights_dir, key="eval.inception")
    inception = load_inception(path)
    verify(section.inception, inception.sha256)
    references = [load_reference(path, inception) for path in section.references]
    shared = {"inception": inception.sha256, "matmul_precision": "highest"}
    protocols = [
        shared | {"reference": epath.Path(one.path).name, "reference_sha256": one.sha256}
        for one in references
    ]
    return Scorer(protocols, functools.partial(_score_pictures, config, inception, references))


def _score_pictures(
    config: ConfigDict, inception: Inception, references: Sequence[Statistics], samples: Samples
) -> Callable[[], list[Scores]]:
    num, size = len(samples.labels), samples.batch_size
    scores = SampleScores(num, least=config.eval.least_samples)
    shown = {"per_step": size, "is_wanted": config.log.progress}
    for pixels, index in track(samples.batches, samples.name, -(-num // size), **shown):
        scores.add(inception_features(inception.params, pixels), index)

    def compare() -> list[Scores]:
        mean, deviation = scores.inception_score()
        shared = {"inception_score": mean, "inception_score_std": deviation}
        return [scores.against(reference) | shared for reference in references]

    return compare


def scorer_of_data(
    config: ConfigDict, workdir: epath.Path, train: Source, held_out: Source
) -> tuple[Scorer, tuple[Row, Callable[[], Samples]]]:
    """Return a scorer against one split of the data, and as `samples_of_file` the other split.

    The reference is the training split. Distances grow as elements become few: samples and held-out
    pictures are compared in random subsets of one size, at most half of the held-out ones. Of
    vectors and signals as many elements are taken from either split. Where rows are compared, or
    tell samples more, `eval.num_samples` is lowered to their number.
    """
    asked, most = config.eval.num_samples, min(len(train), len(held_out))
    if asked > most and (not train.spec.is_picture or train.spec.more):
        print(f"eval.num_samples={asked}: lowered to {most}, as many as there are held-out rows")
        config.eval.num_samples = most
    if train.spec.is_picture:
        whole, real = (b._replace(x=to_pixels(b.x)) for b in (read(train), read(held_out)))
        equal = max(min(len(real.x) // 2, config.eval.num_samples), 1)
        shown = config.log.progress
        protocol, compare = _of_pictures(whole, train.spec.num_classes, workdir, equal, shown)
    else:
        whole, real = (read(each, config.eval.num_samples) for each in (train, held_out))
        protocol, compare = _of_vectors(whole.x)
    if len(whole.x) < 2:
        fix = "leaves one element to compare with: add data, or train with another share"
        raise BadInput(f"data.held_out_share={config.data.held_out_share}: {fix}")
    name, num = "real data (held-out)", len(real.x)
    samples = Samples(name, [(real.x, np.arange(num))], real.labels, num)
    sha256 = digest(real.x, real.labels, *real.more.values())
    subject = {"samples": name, "samples_sha256": sha256, "num_samples": num}
    return Scorer([protocol], functools.partial(_score_whole, compare)), (subject, lambda: samples)


def _score_whole(compare: Compare, samples: Samples) -> Callable[[], list[Scores]]:
    rows = np.concatenate([processes.on_host(x) for x, _ in samples.batches])
    rows, pairs = rows[: len(samples.labels)], {}
    if samples.targets is not None:
        x = from_pixels(rows) if rows.dtype == np.uint8 else rows
        pairs["pair_rmse"] = float(np.sqrt(np.mean((x - samples.targets) ** 2)))
    return lambda: [compare(rows, samples.labels) | pairs]


def _of_vectors(train: Float[np.ndarray, "n ..."]) -> tuple[Row, Compare]:
    """Return protocol and comparison of vectors, or of signals as vectors."""
    points = train.reshape(len(train), -1)
    is_long = points.shape[1] > classifier.FEATURES_KEPT
    protocol = {
        "reference": f"{len(points)} training {'signals' if train.ndim > 2 else 'vectors'}",
        "reference_sha256": digest(points),
        "features": f"{classifier.FEATURES_KEPT} principal components" if is_long else "raw",
    }

    def compare(x: Float[np.ndarray, "n ..."], labels: Int[np.ndarray, "n"]) -> Scores:
        x = x.reshape(len(x), -1)
        describe = classifier.principal_components(points) if is_long else lambda rows: (rows, None)
        ours, theirs = (Moments.of(describe(rows)[0]).gaussian for rows in (x, points))
        scores: Scores = {"frechet_distance": frechet_distance(ours, theirs)}
        return scores | {each.__name__: each(x, points) for each in _OF_VECTORS}

    return protocol, compare


def _subsets(labels: Int[np.ndarray, "n"], size: int) -> Iterator[Int[np.ndarray, "_"]]:
    """Yield random subsets of rows, the classes of each in the proportions of all rows.

    Drawn freely, they would vary less in half of the real pictures than in a few of many samples.
    """
    draws, counts = np.random.default_rng(0), np.unique(labels, return_counts=True)[1]
    for _ in range(_SUBSETS):
        order = draws.permutation(len(labels))
        order = order[np.argsort(labels[order], kind="stable")]  # class by class
        places = [(np.arange(count) + draws.uniform()) / count for count in counts]
        yield order[np.argsort(np.concatenate(places))[:size]]


def _of_pictures(
    train: Batch, num_classes: int, workdir: epath.Path, equal: int, show_progress: bool = False
) -> tuple[Row, Compare]:
    """Return protocol and comparison of `equal` pictures at once, in features of real ones."""
    has_classes = num_classes > 1 and min(train.x.shape[1:3]) >= classifier.SMALLEST_SIDE
    recipe = classifier.Recipe()
    kind = f"classifier, {recipe}" if has_classes else "principal components"
    protocol = {
        "reference": f"{len(train.x)} training images",
        "reference_sha256": digest(*train[: 1 + has_classes]),
        "features": f"{classifier.FEATURES_KEPT} of the {kind}",
        "neighbours": NEIGHBOURS,
        "compared_at_once": equal,
    }
    file = workdir / f"classifier-{digest(key_of(protocol).encode())[:12]}.npz"
    protocol["subsets"] = "by class"  # no part of the name: the classifier is as before

    @functools.cache
    def learnt() -> tuple[Callable[..., classifier.Described], Float[np.ndarray, "n d"]]:
        images = from_pixels(train.x)
        if has_classes:
            trusted = {str(row.get(_CLASSIFIER)) for row in read_rows(workdir)}
            more = {"file": file, "trusted": trusted, "show_progress": show_progress}
            training = images, train.labels, num_classes, recipe
            describe = classifier.train_classifier(*training, **more)
        else:
            describe = classifier.principal_components(images)
        return describe, describe(images)[0]

    def compare(x: UInt8[np.ndarray, "n h w c"], labels: Int[np.ndarray, "n"]) -> Scores:
        describe, real = learnt()
        features, logits = describe(from_pixels(x))
        subsets = list(_subsets(labels, equal))
        first, theirs = features[subsets[0]], Moments.of(real)
        scores: Scores = dict.fromkeys(_OF_PICTURES)
        if len(first) > 1:
            ours = [Moments.of(features[rows]).gaussian for rows in subsets]
            distances = [frechet_distance(one, theirs.gaussian) for one in ours]
            scores["frechet_distance"] = float(np.mean(distances))
            if len(first) < len(features):
                scores["frechet_distance_std"] = float(np.std(distances))
        if min(len(first), len(real)) >= LEAST_ROWS:
            scores |= pair_scores(first, real)._asdict()
        nearest = nearest_distances(from_pixels(x[subsets[0][:_NEAREST_OF]]), from_pixels(train.x))
        scores["nearest_training"] = float(np.median(nearest))
        if logits is None and len(features) > 1:
            scores["sliced_wasserstein"] = sliced_wasserstein(features, real)
        if logits is not None:
            scores["class_accuracy"] = float(np.mean(logits.argmax(axis=1) == labels))
            scores[_CLASSIFIER] = sha256_of(file)
        return scores

    return protocol, compare


def samples_of_file(config: ConfigDict) -> tuple[Row, Callable[[], Samples]]:
    """Return the protocol of the pictures in a file, all of them, and how to read them."""
    path = epath.Path(config.eval.samples).expanduser()
    num, mesh = reference_file.count_pictures(path), make_mesh(data=0, fsdp=1)
    size = -(-min(config.eval.batch_size, num) // mesh.size) * mesh.size

    def batches() -> Iterator:
        for first, block in enumerate(reference_file.read_pictures(path, size)):
            padded = np.concatenate([block, np.repeat(block[-1:], size - len(block), axis=0)])
            index = np.arange(first * size, (first + 1) * size, dtype=np.int32)
            yield jax.device_put(padded, batch_sharding(mesh)), index

    labels = np.full(num, -1, np.int32)
    subject = {"samples": path.name, "samples_sha256": sha256_of(path), "num_samples": num}
    return subject, lambda: Samples(path.name, batches(), labels, size)


def load_reference(path: epath.PathLike, inception: Inception) -> Statistics:
    """Read reference statistics; whatever a file of pictures lacks is computed from them."""
    reference = reference_file.read_reference(
        path, lambda blocks: _statistics(inception, blocks, reference_file.count_pictures(path))
    )
    check_widths(reference, FEATURES[POOLED], FEATURES[SPATIAL])  # before any sample is made
    num = reference.num_pictures
    if reference.features is not None or num < LEAST_ROWS:
        return reference
    # as the evaluation of ADM has its files
    rows = [
        inception_features(inception.params, block[_kept(num, i * _BLOCK, len(block))])[POOLED]
        for i, block in enumerate(reference_file.read_pictures(path, _BLOCK))
    ]
    return dataclasses.replace(reference, features=np.concatenate(rows))


def _kept(num: int, start: int, size: int) -> Int[np.ndarray, "_"]:
    """Return which of some rows, from a start on, are of the kept ones of num, spread evenly."""
    kept = min(num, _KEPT_FEATURES)
    places = np.arange(kept) * num // kept - start
    return places[(places >= 0) & (places < size)]


def _statistics(
    inception: Inception, blocks: Iterator[UInt8[np.ndarray, "n h w c"]], num: int
) -> Statistics:
    """Return the statistics of num pictures, and the features of `_kept` ones."""
    sums, rows = {name: Moments.none(FEATURES[name]) for name in (POOLED, SPATIAL)}, []
    for block in blocks:
        features = inception_features(inception.params, block)
        features = {name: np.asarray(features[name]) for name in sums}
        rows.append(features[POOLED][_kept(num, sums[POOLED].count, len(block))])
        sums = {name: moments + Moments.of(features[name]) for name, moments in sums.items()}
    gaussians = (moments.gaussian for moments in sums.values())
    return Statistics(num, *gaussians, np.concatenate(rows))
