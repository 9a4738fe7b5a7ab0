"""Memory and time of an evaluation's scores beside the networks, on features drawn at random."""

import resource
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from jaxtyping import Float32
from ml_collections import ConfigDict

from mf_jax.bench.measure import Result, Say
from mf_jax.data import Source
from mf_jax.metrics.frechet import Gaussian
from mf_jax.metrics.inception import FEATURES
from mf_jax.metrics.reference_file import Statistics, read_reference, write_reference
from mf_jax.metrics.suite import SampleScores

SHOWN = "samples reference_rows peak_bytes adding_seconds comparing_seconds"
WIDTHS = {name: FEATURES[name] for name in ("2048", "spatial", "logits_unbiased")}
_REFERENCE_ROWS, _FEW = 10_000, 32
_NOTE = "peak: of the process, beyond JAX; the reference is in it"


def run(config: ConfigDict, source: Source, say: Say) -> Result:
    """See `BENCHMARKS`; `peak_bytes` is the peak beyond the memory before the scores."""
    num, size, least = (config.eval[k] for k in ("num_samples", "batch_size", "least_samples"))
    with tempfile.TemporaryDirectory() as folder:
        say("compiling")
        few = dict.fromkeys(WIDTHS, _FEW)
        _score(_write_reference(folder, few, _FEW), few, num=2 * _FEW, size=_FEW, least=1)
        path = _write_reference(folder, WIDTHS, _REFERENCE_ROWS)
        before = _resident_bytes()
        say(f"scoring {num} rows")
        row = _score(path, WIDTHS, num=num, size=size, least=least)
    row |= {"samples": num, "reference_rows": _REFERENCE_ROWS, "peak_bytes": _peak_bytes() - before}
    return {"batch_size": size, "notes": [_NOTE], "rows": [row]}


def _score(
    path: str, widths: Mapping[str, int], *, num: int, size: int, least: int
) -> dict[str, float]:
    """Return all scores of random features, and the seconds of adding and comparing them."""
    reference, samples, adding = read_reference(path), SampleScores(num, least=least), 0.0
    for first in range(0, num, size):
        features = {name: _rows([first, i], size, widths[name]) for i, name in enumerate(widths)}
        start = time.perf_counter()
        samples.add(features, np.arange(first, first + size))
        adding += time.perf_counter() - start
    start = time.perf_counter()
    scores = samples.against(reference) | {"inception_score": samples.inception_score()[0]}
    return {"adding_seconds": adding, "comparing_seconds": time.perf_counter() - start, **scores}


def _rows(seed: list[int], num: int, width: int) -> Float32[np.ndarray, "n d"]:
    return np.random.default_rng(seed).standard_normal((num, width), np.float32)


def _write_reference(folder: str, widths: Mapping[str, int], num_rows: int) -> str:
    """Write statistics of features with a slightly different mean; return the file's path."""
    pooled, spatial = (Gaussian(np.full(n, 0.1), np.eye(n)) for n in list(widths.values())[:2])
    rows = _rows([1, 2, 3], num_rows, len(pooled.mean))
    write_reference(f"{folder}/reference.npz", Statistics(num_rows, pooled, spatial, rows))
    return f"{folder}/reference.npz"


def _resident_bytes() -> int:
    if not (statm := Path("/proc/self/statm")).exists():
        return _peak_bytes()
    return int(statm.read_text().split()[1]) * resource.getpagesize()


def _peak_bytes() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak
