"""Scorers: samples in, a record of scores for each thing that they are compared with.

Pictures are compared in the features of Inception with files of reference statistics, or in
features of the training split with that split. Vectors are compared directly, with the held-out
split.
"""

import dataclasses
import functools
import hashlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jaxtyping import Array, Float, Int, Shaped, UInt8
from ml_collections import ConfigDict

from mf_jax.data import Batch, Source, read
from mf_jax.data.pixels import from_pixels, to_pixels
from mf_jax.metrics.classifier import (
    FEATURES_KEPT,
    Described,
    Recipe,
    principal_components,
    train_classifier,
)
from mf_jax.metrics.frechet import Moments, frechet_distance
from mf_jax.metrics.inception import FEATURES, Inception, inception_features, load_inception
from mf_jax.metrics.reference_file import (
    Reference,
    Statistics,
    count_pictures,
    read_pictures,
    read_reference,
)
from mf_jax.metrics.row_pairs import pair_scores
from mf_jax.metrics.suite import SampleScores, check_widths
from mf_jax.metrics.two_sample import energy_distance, sliced_wasserstein
from mf_jax.published.fetch import find_weights, verify
from mf_jax.reporting.progress import track
from mf_jax.runtime import processes
from mf_jax.runtime.files import sha256_of
from mf_jax.runtime.sharding import batch_sharding, make_mesh
from mf_jax.scoring.rows import Row

_REAL_DATA = "real data (held-out)"
_KEPT_FEATURES, _BLOCK = 10_000, 250
Scores = dict[str, float]


class Samples(NamedTuple):
    """Samples to score.

    name: for people. batches: pictures of bytes or vectors, and their numbers; rows with a number
    of len(labels) or more are padding. labels: of each sample. batch_size: of all batches.
    """

    name: str
    batches: Iterable[tuple[Shaped[Array | np.ndarray, "b ..."], Int[np.ndarray, "b"]]]
    labels: Int[np.ndarray, "n"]
    batch_size: int


@runtime_checkable
class Scorer(Protocol):
    """Compares samples; `protocols` says with what, one entry for each record of scores."""

    def protocols(self) -> list[Row]: ...

    def __call__(self, samples: Samples) -> Callable[[], list[Scores]]:
        """Gather samples, on all processes of a job; return the comparison, for the first alone."""
        ...


@dataclasses.dataclass(frozen=True)
class InceptionScorer:
    """Compare pictures with reference statistics.

    references: to compare with. inception: the network of features. least_samples: of
    `SampleScores`. show_progress: while samples are made.
    """

    references: Sequence[Reference]
    inception: Inception
    least_samples: int
    show_progress: bool

    def protocols(self) -> list[Row]:
        """See `Scorer`."""
        shared = {"inception": self.inception.sha256, "matmul_precision": "highest"}
        return [
            shared | {"reference": epath.Path(one.path).name, "reference_sha256": one.sha256}
            for one in self.references
        ]

    def __call__(self, samples: Samples) -> Callable[[], list[Scores]]:
        """See `Scorer`."""
        num = len(samples.labels)
        scores = SampleScores(num, least=self.least_samples)
        size, shown = samples.batch_size, self.show_progress
        count = -(-num // size)
        batches = track(samples.batches, samples.name, count, per_step=size, is_wanted=shown)
        for pixels, index in batches:
            scores.add(_features(self.inception, pixels), index)
        return functools.partial(self._compare, scores)

    def _compare(self, scores: SampleScores) -> list[Scores]:
        mean, deviation = scores.inception_score()
        shared = {"inception_score": mean, "inception_score_std": deviation}
        return [scores.against(reference) | shared for reference in self.references]


@dataclasses.dataclass(frozen=True)
class PictureScorer:
    """Compare pictures with the training split, in features that are learnt from it.

    Those are of a small classifier, or principal components where there is nothing to classify.

    train: the training split, its pictures as bytes. num_classes: of its labels.
    """

    train: Batch
    num_classes: int

    def protocols(self) -> list[Row]:
        """See `Scorer`."""
        has_classes = self.num_classes > 1
        recipe = f"classifier, {Recipe()}" if has_classes else "principal components"
        return [
            {
                "reference": f"{len(self.train.x)} training images",
                "reference_sha256": _sha256(*(self.train if has_classes else self.train[:1])),
                "features": f"{FEATURES_KEPT} of the {recipe}",
                "neighbours": 3,
            }
        ]

    @functools.cached_property
    def _describe(self) -> Callable[..., Described]:
        if self.num_classes < 2:
            return principal_components(from_pixels(self.train.x))
        return train_classifier(from_pixels(self.train.x), self.train.labels, self.num_classes)

    @functools.cached_property
    def _reference(self) -> Float[np.ndarray, "n d"]:
        return self._describe(from_pixels(self.train.x))[0]

    def __call__(self, samples: Samples) -> Callable[[], list[Scores]]:
        """See `Scorer`."""
        return functools.partial(self._compare, _gathered(samples), samples.labels)

    def _compare(self, x: np.ndarray, labels: np.ndarray) -> list[Scores]:
        features, logits = self._describe(from_pixels(x))
        ours, theirs = (Moments.of(rows) for rows in (features, self._reference))
        gaussians = ours.mean, ours.covariance, theirs.mean, theirs.covariance
        precision, recall, _ = pair_scores(features, self._reference)
        scores = {
            "frechet_distance": frechet_distance(*gaussians),
            "precision": precision,
            "recall": recall,
        }
        if logits is not None:
            is_right = logits.argmax(axis=1) == labels
            scores["class_accuracy"] = float(np.mean(is_right))
        return [scores]


@dataclasses.dataclass(frozen=True)
class VectorScorer:
    """Compare vectors with held-out ones `[N, D]`."""

    reference: Float[np.ndarray, "n d"]

    def protocols(self) -> list[Row]:
        """See `Scorer`."""
        name = f"{len(self.reference)} held-out vectors"
        return [{"reference": name, "reference_sha256": _sha256(self.reference)}]

    def __call__(self, samples: Samples) -> Callable[[], list[Scores]]:
        """See `Scorer`."""
        x, measures = _gathered(samples), (energy_distance, sliced_wasserstein)
        return lambda: [{each.__name__: each(x, self.reference) for each in measures}]


def scorer_of_references(config: ConfigDict) -> InceptionScorer | None:
    """Return the scorer against `eval.references`, or None if there are none."""
    section = config.eval
    if not section.references:
        return None
    path = find_weights(section.inception, config.weights_dir, key="eval.inception")
    inception = load_inception(path)
    verify(section.inception, inception.sha256)
    references = [load_reference(path, inception) for path in section.references]
    return InceptionScorer(references, inception, section.least_samples, config.log.progress)


def scorer_of_data(
    config: ConfigDict, train: Source, held_out: Source
) -> tuple[Scorer, tuple[Row, Callable[[], Samples]]]:
    """Return a scorer against one split of the data, and as `samples_of_file` the other split.

    The reference is the training split for pictures, as is usual for the Fréchet distance, and the
    held-out one for vectors.
    """
    if train.spec.is_picture:
        whole, real = (
            batch._replace(x=to_pixels(batch.x)) for batch in (read(train), read(held_out))
        )
        scorer: Scorer = PictureScorer(whole, train.spec.num_classes)
    else:
        real = read(train, config.eval.num_samples)
        scorer = VectorScorer(read(held_out, config.eval.num_samples).x)
    num = len(real.x)
    samples = Samples(_REAL_DATA, [(real.x, np.arange(num))], real.labels, num)
    return scorer, ({"samples": _REAL_DATA, "num_samples": num}, lambda: samples)


def samples_of_file(config: ConfigDict) -> tuple[Row, Callable[[], Samples]]:
    """Return the protocol of the pictures in a file, all of them, and how to read them."""
    path = epath.Path(config.eval.samples).expanduser()
    num, mesh = count_pictures(path), make_mesh(data=0, fsdp=1)
    size = -(-min(config.eval.batch_size, num) // mesh.size) * mesh.size

    def batches() -> Iterator:
        for first, block in enumerate(read_pictures(path, size)):
            padded = np.concatenate([block, np.repeat(block[-1:], size - len(block), axis=0)])
            index = np.arange(first * size, (first + 1) * size, dtype=np.int32)
            yield jax.device_put(padded, batch_sharding(mesh)), index

    labels = np.full(num, -1, np.int32)
    subject = {"samples": path.name, "samples_sha256": sha256_of(path), "num_samples": num}
    return subject, lambda: Samples(path.name, batches(), labels, size)


def load_reference(path: epath.PathLike, inception: Inception) -> Reference:
    """Read reference statistics; whatever a file of pictures lacks is computed from them.

    Args:
      path: of the `.npz`.
      inception: the network of features, which the statistics must be of too.
    """
    reference = read_reference(path, functools.partial(_statistics, inception))
    check_widths(reference, FEATURES["2048"], FEATURES["spatial"])  # before any sample is made
    if reference.statistics.features is not None or not reference.num_pictures:
        return reference
    # as the evaluation of ADM has its files
    blocks = itertools.islice(read_pictures(path, _BLOCK), _KEPT_FEATURES // _BLOCK)
    rows = [np.asarray(_features(inception, jnp.asarray(block))["2048"]) for block in blocks]
    statistics = dataclasses.replace(reference.statistics, features=np.concatenate(rows))
    return dataclasses.replace(reference, statistics=statistics)


def _statistics(inception: Inception, blocks: Iterator[UInt8[np.ndarray, "n h w c"]]) -> Statistics:
    """Return the statistics of pictures, and the features of the first."""
    pooled, spatial = (Moments.none(FEATURES[name]) for name in ("2048", "spatial"))
    rows: list[np.ndarray] = []
    for block in blocks:
        features = _features(inception, jnp.asarray(block))
        pooled += Moments.of(np.asarray(features["2048"]))
        spatial += Moments.of(np.asarray(features["spatial"]))
        if pooled.count <= _KEPT_FEATURES:
            rows.append(np.asarray(features["2048"]))
    return Statistics.of(pooled, spatial, np.concatenate(rows))


def _features(inception: Inception, pixels: UInt8[Array, "b h w c"]) -> dict[str, Array]:
    grey = pixels.shape[-1] == 1
    return inception_features(inception.params, jnp.repeat(pixels, 3, -1) if grey else pixels)


def _gathered(samples: Samples) -> Shaped[np.ndarray, "n ..."]:
    rows = [processes.on_host(x) for x, _ in samples.batches]
    return np.concatenate(rows)[: len(samples.labels)]


def _sha256(*arrays: np.ndarray) -> str:
    return hashlib.sha256(b"".join(array.tobytes() for array in arrays)).hexdigest()
