"""--mode=eval: how far the samples are from the data, as a table with the real-data floor in its first row.

Images are compared in the features of a small classifier trained on the training split, vectors directly. The table's
reference is the training split for images (as is usual for the Fréchet distance), the held-out split for vectors. The
floor row puts the other split of the real data in the place of the samples.
"""

import dataclasses
import functools
import json
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils.epath import Path
from jaxtyping import Float, Shaped
from ml_collections import ConfigDict
from rich.console import Console
from rich.table import Table

from mf_jax import fid, metrics
from mf_jax.config import make_objective, make_scheme, validate
from mf_jax.data import Batch, Source, make_source, read
from mf_jax.data.pixels import from_pixels, to_pixels
from mf_jax.errors import BadInput
from mf_jax.flow import diagnostics
from mf_jax.flow.records import NO_LABEL, Rows
from mf_jax.generator import Generator
from mf_jax.loading import labels_of, load_cell
from mf_jax.models import as_field
from mf_jax.ranges import check_values
from mf_jax.reporting.page import write_report
from mf_jax.runtime import processes
from mf_jax.runtime import workdir as run_folder
from mf_jax.runtime.files import replace_file
from mf_jax.scoring.grid import cells, names
from mf_jax.scoring.rows import ROWS_FILE

_DIAGNOSTIC_ROWS = 1024
_DIAGNOSTIC_STREAM = 2**31  # sample i folds i into the same key, and i stays below
_FLOOR = "real data (held-out)"
Scores = dict[str, float]


@dataclasses.dataclass(frozen=True)
class ImageScores:
    """Score images in the features of a classifier, against the training split.

    Args:
      classifier: gives features and logits.
      reference: features of the training split, `[N, D]`.
    """

    classifier: metrics.Classifier
    reference: Float[np.ndarray, "n d"]
    columns = ("frechet_distance", "precision", "recall", "class_accuracy")

    @classmethod
    def against(cls, train: Batch, num_classes: int, cache_dir: Path) -> "ImageScores":
        """Return the scores against a training split; its classifier is trained at the first use, then cached."""
        images, labels = _as_quantised(train.x), train.labels
        if num_classes < 2:  # nothing to tell apart: the classifier learns rotations instead
            num_classes, labels = 0, np.full_like(labels, NO_LABEL)
        classifier = metrics.cached_classifier(
            images, labels, num_classes=num_classes, cache_dir=cache_dir
        )
        return cls(classifier, classifier.features_and_logits(images)[0])

    @property
    def protocol(self) -> str:
        """What the features are and what they are compared with."""
        kind = "rotation" if self.classifier.is_self_supervised else "class"
        return (
            f"reference: {len(self.reference)} training images; features: {self.reference.shape[1]} of the {kind} "
            f"classifier {self.classifier.fingerprint}; precision and recall with k = 3"
        )

    def __call__(self, x: Shaped[np.ndarray, "n ..."], labels: Shaped[np.ndarray, "n"]) -> Scores:
        """Return the scores of images in [-1, 1] with their labels."""
        features, logits = self.classifier.features_and_logits(_as_quantised(x))
        precision, recall = metrics.precision_recall(features, self.reference)
        distance = metrics.frechet_distance(
            *metrics.gaussian_statistics(features), *metrics.gaussian_statistics(self.reference)
        )
        scores = {"frechet_distance": distance, "precision": precision, "recall": recall}
        if self.classifier.is_self_supervised:
            return scores
        return scores | {"class_accuracy": float(np.mean(logits.argmax(axis=1) == labels))}


@dataclasses.dataclass(frozen=True)
class VectorScores:
    """Score vectors directly, against the held-out split.

    Args:
      reference: held-out vectors `[N, D]`.
    """

    reference: Float[np.ndarray, "n d"]
    columns = ("energy_distance", "sliced_wasserstein")

    @property
    def protocol(self) -> str:
        """What the vectors are compared with."""
        return f"reference: {len(self.reference)} held-out vectors"

    def __call__(self, x: Shaped[np.ndarray, "n ..."], labels: Shaped[np.ndarray, "n"]) -> Scores:
        """Return the scores of vectors; they have no labels to check."""
        return {
            "energy_distance": metrics.energy_distance(x, self.reference),
            "sliced_wasserstein": metrics.sliced_wasserstein(x, self.reference),
        }


def _as_quantised(x: Shaped[np.ndarray, "n h w c"]) -> Float[np.ndarray, "n h w c"]:
    """Return images as they are after being stored in bytes, so that real and generated ones are treated alike."""
    return from_pixels(to_pixels(x))


def diagnose(generator: Generator, source: Source, *, seed: int) -> Scores:
    """Return the MeanFlow diagnostics on draws of real data with the run's own distribution of times.

    Args:
      generator: the model.
      source: real data.
      seed: of the choice of rows, the noise and the times.

    Returns:
      velocity_error, and for a network that knows u(z, r, t) identity_residual and additivity_gap.
    """
    rows_key, noise_key, times_key = jax.random.split(
        jax.random.fold_in(jax.random.key(seed), _DIAGNOSTIC_STREAM), 3
    )
    index = jax.random.randint(rows_key, (_DIAGNOSTIC_ROWS,), 0, len(source))
    batch = source.gather(np.asarray(index))
    x, labels = jnp.asarray(batch.x), jnp.asarray(batch.labels)
    r, t = make_scheme(generator.config).times.sample(times_key, _DIAGNOSTIC_ROWS)
    e = jax.random.normal(noise_key, x.shape)
    rows = Rows(x=x, e=e, t=t, r=r, labels=labels, dropped=jnp.zeros(labels.shape, bool))
    chosen: list[Callable] = [diagnostics.velocity_error]
    if make_objective(generator.config).learns_average:
        chosen += [diagnostics.identity_residual, diagnostics.additivity_gap]
    field = as_field(generator.network)
    with jax.default_matmul_precision("highest"):
        return {
            measure.__name__: float(
                jax.jit(functools.partial(measure, field))(generator.params, rows)
            )
            for measure in chosen
        }


def run(config: ConfigDict, workdir: Path) -> None:
    """Write `eval.json` and print its table.

    Args:
      config: of the command; `eval` says what to compute.
      workdir: of the run.
    """
    with processes.together():
        check_values(config)
        if not config.eval.samples and not config.eval.watch and not config.init.path:
            run_folder.check(workdir, config)
    against_references = config.eval.references or config.eval.samples or config.eval.watch
    result = fid.run(config, workdir) if against_references else _small_data(config, workdir)
    if not processes.is_first():  # which alone has all scores
        return
    replace_file(workdir / "eval.json", json.dumps(result, indent=1).encode())
    write_report(workdir)
    _show(result)
    rows = {"rows": ROWS_FILE, "pictures": fid.PICTURES} if against_references else {}
    run_folder.tell(workdir, table="eval.json", **rows, report="report.html")


def _small_data(config: ConfigDict, workdir: Path) -> dict[str, Any]:
    """Score samples against the data themselves, all in memory."""
    with processes.together():
        train = validate(config, num_devices=1)
        grid = cells(config)
        held_out = make_source(config.data, split="held_out")
    score, rows = _floor(config, workdir, train, held_out)
    seed, size = config.eval.seed, config.eval.batch_size
    # cells of one model are neighbours
    load = functools.lru_cache(1)(functools.partial(load_cell, config, workdir))
    for cell, name in zip(grid, names(grid), strict=True):
        generator = load(cell.checkpoint, cell.ema)
        _check_same_kind(generator, train)
        labels = labels_of(config, generator)
        x = generator.sample_raw(labels, plan=cell.plan(seed=seed, batch_size=size))
        rows.append({"name": name, "steps": cell.steps, "samples": len(x), **score(x, labels)})
    order = {"balanced": "all classes in turn", "random": "random classes"}[config.eval.labels]
    told = order if generator.spec.num_classes else "no labels"
    ema = "raw parameters" if generator.ema == "none" else f"EMA {generator.ema}"
    is_one = len({(cell.checkpoint, cell.ema) for cell in grid}) == 1
    one_model = f"checkpoint of step {generator.step}, {ema}, " * is_one
    protocol = (
        f"{one_model}{len(labels)} samples a row, seed {config.eval.seed}, "
        f"{told}, {score.protocol}, {config.model.dtype} 'highest'"
    )
    found = diagnose(generator, train, seed=config.eval.seed)
    columns = ["steps", "samples", *(name for name in score.columns if name in rows[0])]
    return {"protocol": protocol, "columns": columns, "rows": rows, "diagnostics": found}


def _check_same_kind(generator: Generator, train: Source) -> None:
    """Raise BadInput if a model, of weights from elsewhere, generates other things than the data are."""
    ours, theirs = (
        f"shape {kind.shape} and {kind.num_classes} classes"
        for kind in (generator.spec, train.spec)
    )
    if ours != theirs:
        raise BadInput(
            f"init.path={generator.ema}: its samples have {ours}, the data {theirs}; use the config of its own data"
        )


def _floor(
    config: ConfigDict, workdir: Path, train: Source, held_out: Source
) -> tuple[ImageScores | VectorScores, list[dict]]:
    """Return the scores, and the table's first row: what real data score."""
    if len(train.spec.shape) == 3:
        cache_dir = Path(config.cache_dir) if config.cache_dir else workdir
        score = ImageScores.against(read(train), train.spec.num_classes, cache_dir)
        real = read(held_out)
    else:
        score = VectorScores(read(held_out, config.eval.num_samples).x)
        real = read(train, config.eval.num_samples)
    return score, [{"name": _FLOOR, "samples": len(real.x), **score(real.x, real.labels)}]


def _show(result: dict) -> None:
    table = Table(
        "", *(name.replace("_", " ") for name in result["columns"]), caption=result["protocol"]
    )
    for row in result["rows"]:
        cells = (row.get(name) for name in result["columns"])
        table.add_row(
            row["name"],
            *("–" if c is None else f"{c:.4g}" if isinstance(c, float) else str(c) for c in cells),
        )
    console = Console()
    console.print(table)
    console.print(
        "  ".join(
            f"{name.replace('_', ' ')} {value:.4g}" for name, value in result["diagnostics"].items()
        )
    )
