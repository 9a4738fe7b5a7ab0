"""What the scores of an evaluation cost beside the networks: memory and time, on features drawn at random."""

import contextlib
import resource
import sys
import tempfile
import time

import numpy as np
from jaxtyping import Float32, Float64
from ml_collections import ConfigDict

from mf_jax.bench.measure import Result, Say
from mf_jax.data import Source
from mf_jax.metrics import Reference, SampleScores
from mf_jax.metrics.inception import FEATURES

WIDTHS = {name: FEATURES[name] for name in ("2048", "spatial", "logits_unbiased")}
_REFERENCE_ROWS = 10_000
_DECAY = 300
"""Features have a few large directions and many small ones, as those of pictures."""


def bench_scores(config: ConfigDict, source: Source, say: Say) -> Result:
    """Measure all scores of `eval.num_samples` rows of features, against a reference with rows.

    Args:
      config: checked.
      source: not used; features take the place of pictures.
      say: is told what is being done.

    Returns:
      One row; its memory is what the process's peak grew by, beyond JAX and the reference.
    """
    num, size = config.eval.num_samples, config.eval.batch_size
    reference = _reference()
    before, adding = _peak_bytes(), 0.0
    with (
        tempfile.TemporaryDirectory() as folder,
        contextlib.closing(SampleScores(num, folder, least=config.eval.least_samples)) as samples,
    ):
        say(f"adding {num} rows")
        for first in range(0, num, size):
            index = np.arange(first, first + size)
            features = {
                name: _rows([first, i], size, width) for i, (name, width) in enumerate(WIDTHS.items())
            }
            start = time.perf_counter()
            samples.add(features, index, index < num)
            adding += time.perf_counter() - start
        say("comparing them with the reference")
        start = time.perf_counter()
        scores = samples.against(reference) | {"inception_score": samples.inception_score()[0]}
        comparing = time.perf_counter() - start
    row = {"samples": num, "reference_rows": _REFERENCE_ROWS, "peak_bytes": _peak_bytes() - before}
    row |= {"adding_seconds": adding, "comparing_seconds": comparing, **scores}
    return {
        "batch_size": size,
        "notes": ["peak: of the process, beyond JAX and the reference"],
        "rows": [row],
    }


def _rows(seed: list[int], num: int, width: int) -> Float32[np.ndarray, "n d"]:
    return np.random.default_rng(seed).standard_normal((num, width), np.float32) * _spread(width)


def _spread(width: int) -> Float32[np.ndarray, "d"]:
    return np.exp(-np.arange(width, dtype=np.float32) / _DECAY)


def _reference() -> Reference:
    def gaussian(name: str) -> tuple[Float64[np.ndarray, "d"], Float64[np.ndarray, "d d"]]:
        spread = _spread(WIDTHS[name]).astype(np.float64)
        return np.full(len(spread), 0.1), np.diag(spread**2)

    rows = _rows([1, 2, 3], _REFERENCE_ROWS, WIDTHS["2048"])
    return Reference(
        0, *gaussian("2048"), *gaussian("spatial"), rows, path="random", sha256="", num_pictures=0
    )


def _peak_bytes() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak
