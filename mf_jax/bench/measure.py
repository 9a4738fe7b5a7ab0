"""The clock around a call, the FLOPs and the memory of a program, the peak of a device.

A time covers one call until its result lies in memory, not the making of its input.
Calls to be compared take turns, so that a drift of the machine hits all of them alike.
"""

import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.compilation_cache.compilation_cache import reset_cache
from jaxtyping import PyTree
from ml_collections import ConfigDict

from mf_jax.flow.errors import refused

PEAK_SIZES = {"cpu": (512, 1024, 2048), "accelerator": (2048, 4096, 8192)}
"""Sides of the square matrices whose products are timed for the peak."""
Say = Callable[[str], None]
Result = dict[str, Any]
Contender = tuple[Iterator[Any], Callable[[Any], PyTree]]
"""Inputs, and the function of one of them that is timed."""


def turns(config: ConfigDict) -> dict[str, int]:
    """Return how often a config calls each contender."""
    return {key: config.bench[key] for key in ("repeats", "dropped")}


def take_turns(
    *contenders: Contender, repeats: int, dropped: int, least_seconds: float = 0.0
) -> list[list[float]]:
    """Return the seconds of each counted call, a list for each contender; call a, b, a, b, ...

    Args:
      repeats: calls of each that count, at least, after the dropped ones.
      least_seconds: that the counted calls of the first take together.
    """
    times: list[list[float]] = [[] for _ in contenders]
    while len(times[0]) < dropped + repeats or sum(times[0][dropped:]) < least_seconds:
        for (inputs, run), seconds in zip(contenders, times, strict=True):
            prepared = next(inputs)
            start = time.perf_counter()
            jax.block_until_ready(run(prepared))
            seconds.append(time.perf_counter() - start)
    return [seconds[dropped:] for seconds in times]


def spread(name: str, seconds: Sequence[float]) -> Result:
    """Return the median, the quartiles and all of some times, under keys that start with a name."""
    first, median, third = np.quantile(seconds, (0.25, 0.5, 0.75)).tolist()
    key = f"{name}_seconds"
    return {f"{key}_median": median, f"{key}_quartiles": [first, third], key: list(seconds)}


def throughput(seconds: float, *, images: int, gflop: float, peak: Result) -> Result:
    """Return the images per second, and the share of the peak of all devices."""
    share = gflop / seconds / (peak["matmul_peak_gflops"] * jax.device_count())
    return {"images_per_second": images / seconds, "peak_share": share}


def compile_program(
    function: jax.stages.Wrapped, *arguments: PyTree
) -> tuple[jax.stages.Compiled, Result]:
    """Compile a jitted function without the persistent cache; return its costs on a device too."""
    before, times = jax.config.jax_enable_compilation_cache, [time.perf_counter()]
    try:
        jax.config.update("jax_enable_compilation_cache", False)
        reset_cache()  # JAX asks once, at the first compilation, whether there is a cache
        lowered = function.lower(*arguments)
        times.append(time.perf_counter())
        program = lowered.compile()
        trace, compiling = np.diff([*times, time.perf_counter()]).tolist()
    finally:
        jax.config.update("jax_enable_compilation_cache", before)
        reset_cache()
    memory = program.memory_analysis()
    costs = {f"{k}_bytes": getattr(memory, f"{k}_size_in_bytes") for k in ("temp", "argument")}
    return program, costs | {"trace_seconds": trace, "compile_seconds": compiling}


def lowered_flops(function: Callable[..., PyTree], *shapes: PyTree) -> float:
    """Return XLA's count for a function of some shapes, over all devices, without compiling it."""
    with refused(RuntimeError, "JAX_PLATFORMS: has no cpu, which counts FLOPs", "add cpu"):
        device = jax.devices("cpu")[0]
    with jax.default_device(device):
        return jax.jit(function).lower(*shapes).cost_analysis()["flops"]


def matmul_peak(dtype: str) -> Result:
    """Return the best rate of a square matrix product on one device, at JAX's default precision."""
    is_cpu = jax.default_backend() == "cpu"
    dtype = "float32" if is_cpu else dtype  # in which most CPUs multiply bfloat16 too
    product, rates = jax.jit(jnp.matmul), {}
    for size in PEAK_SIZES["cpu" if is_cpu else "accelerator"]:
        factors = jax.random.normal(jax.random.key(0), (2, size, size), dtype)
        contender = itertools.repeat(tuple(factors)), lambda pair: product(*pair)
        (seconds,) = take_turns(contender, repeats=10, dropped=1)
        rates[size] = 2 * size**3 / min(seconds) / 1e9
    best = max(rates, key=rates.get)
    return {"matmul_peak_gflops": rates[best], "matmul_peak_size": best, "matmul_peak_dtype": dtype}
