"""What the scores of an evaluation cost beside the networks: memory and time, on features drawn at random."""

import resource
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from jaxtyping import Float32, Float64
from ml_collections import ConfigDict

from mf_jax.bench.measure import Result, Say
from mf_jax.data import Source
from mf_jax.metrics.inception import FEATURES
from mf_jax.metrics.reference_file import Statistics, read_reference, write_reference
from mf_jax.metrics.suite import SampleScores

WIDTHS = {name: FEATURES[name] for name in ("2048", "spatial", "logits_unbiased")}
_REFERENCE_ROWS, _FEW = 10_000, 32
_DECAY = 300
"""Features have a few large directions and many small ones, as those of pictures."""


def bench_scores(config: ConfigDict, source: Source, say: Say) -> Result:
    """Measure all scores of `eval.num_samples` rows of features, against a reference file with rows.

    Args:
      config: checked.
      source: not used; features take the place of pictures.
      say: is told what is being done.

    Returns:
      One row; its memory is by how much the process's peak lies above what it held before the first feature and
      before the reference was read, when all had been computed once for few features.
    """
    num, size = config.eval.num_samples, config.eval.batch_size
    with tempfile.TemporaryDirectory() as folder:
        say("compiling")
        few = {name: _FEW for name in WIDTHS}
        _score(
            _write_reference(folder, few, _FEW),
            few,
            num=2 * _FEW,
            size=_FEW,
            least=1,
            say=lambda _: None,
        )
        path = _write_reference(folder, WIDTHS, _REFERENCE_ROWS)
        before = _resident_bytes()
        measured = _score(
            path, WIDTHS, num=num, size=size, least=config.eval.least_samples, say=say
        )
    row = {"samples": num, "reference_rows": _REFERENCE_ROWS, "peak_bytes": _peak_bytes() - before}
    return {
        "batch_size": size,
        "notes": ["peak: of the process, beyond JAX; the reference is in it"],
        "rows": [row | measured],
    }


def _score(
    path: str, widths: Mapping[str, int], *, num: int, size: int, least: int, say: Say
) -> dict[str, float]:
    """Return all scores of random features, and the seconds that they took."""
    reference, adding = read_reference(path), 0.0
    samples = SampleScores(num, least=least)
    say(f"adding {num} rows")
    for first in range(0, num, size):
        index = np.arange(first, first + size)
        features = {
            name: _rows([first, i], size, width) for i, (name, width) in enumerate(widths.items())
        }
        start = time.perf_counter()
        samples.add(features, index)
        adding += time.perf_counter() - start
    say("comparing them with the reference")
    start = time.perf_counter()
    scores = samples.against(reference) | {"inception_score": samples.inception_score()[0]}
    comparing = time.perf_counter() - start
    return {"adding_seconds": adding, "comparing_seconds": comparing, **scores}


def _rows(seed: list[int], num: int, width: int) -> Float32[np.ndarray, "n d"]:
    return np.random.default_rng(seed).standard_normal((num, width), np.float32) * _spread(width)


def _spread(width: int) -> Float32[np.ndarray, "d"]:
    return np.exp(-np.arange(width, dtype=np.float32) / _DECAY)


def _write_reference(folder: str, widths: Mapping[str, int], num_rows: int) -> str:
    """Write a file of the statistics that features of a little other mean have; return its path."""

    def gaussian(name: str) -> tuple[Float64[np.ndarray, "d"], Float64[np.ndarray, "d d"]]:
        spread = _spread(widths[name]).astype(np.float64)
        return np.full(len(spread), 0.1), np.diag(spread**2)

    path = f"{folder}/reference.npz"
    rows = _rows([1, 2, 3], num_rows, widths["2048"])
    write_reference(path, Statistics(num_rows, *gaussian("2048"), *gaussian("spatial"), rows))
    return path


def _resident_bytes() -> int:
    """Return what the process holds in memory; where the system does not tell, the most that it ever held."""
    statm = Path("/proc/self/statm")
    return (
        int(statm.read_text().split()[1]) * resource.getpagesize()
        if statm.exists()
        else _peak_bytes()
    )


def _peak_bytes() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak
