"""The clock around a call, the FLOPs and the memory of a program, the peak of a device.

A time covers one call until its result lies in memory, not the making of its input.
Calls to be compared take turns, so that a drift of the machine hits all of them alike.
"""

import dataclasses
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

from mf_jax.errors import BadInput

PEAK_SIZES = {"cpu": (512, 1024, 2048), "accelerator": (2048, 4096, 8192)}
"""Sides of the square matrices whose products are timed for the peak."""
_PEAK_REPEATS = 10
Say = Callable[[str], None]
Result = dict[str, Any]
Contender = tuple[Iterator[Any], Callable[[Any], PyTree]]
"""Inputs, and the function of one of them that is timed."""


def turns(config: ConfigDict) -> dict[str, int]:
    """Return how often a config calls each contender."""
    return {key: config.bench[key] for key in ("repeats", "dropped")}


def take_turns(
    *contenders: Contender,
    repeats: int,
    dropped: int,
    least_seconds: float = 0.0,
    clock: Callable[[], float] = time.perf_counter,
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
            start = clock()
            jax.block_until_ready(run(prepared))
            seconds.append(clock() - start)
    return [seconds[dropped:] for seconds in times]


def spread(name: str, seconds: Sequence[float]) -> Result:
    """Return the median, the quartiles and all of some times, under keys that start with a name."""
    first, median, third = np.quantile(seconds, (0.25, 0.5, 0.75)).tolist()
    key = f"{name}_seconds"
    return {f"{key}_median": median, f"{key}_quartiles": [first, third], key: list(seconds)}


@dataclasses.dataclass(frozen=True)
class Program:
    """A compiled program, and the seconds that tracing and compiling took."""

    executable: jax.stages.Compiled
    trace_seconds: float
    compile_seconds: float

    @property
    def flops(self) -> float:
        """XLA's count for one device after its optimisations; the body of a loop counts once."""
        return self.executable.cost_analysis()["flops"]

    @property
    def memory(self) -> dict[str, int]:
        """The bytes of its temporary arrays and of its arguments on one device."""
        found = self.executable.memory_analysis()
        temp, arguments = found.temp_size_in_bytes, found.argument_size_in_bytes
        return {"temp_bytes": temp, "argument_bytes": arguments}


def compile_program(function: jax.stages.Wrapped, *arguments: PyTree) -> Program:
    """Compile a jitted function for some arguments, without the persistent cache."""
    before = jax.config.jax_enable_compilation_cache
    try:
        jax.config.update("jax_enable_compilation_cache", False)
        reset_cache()  # JAX asks once, at the first compilation, whether there is a cache
        start = time.perf_counter()
        lowered = function.lower(*arguments)
        middle = time.perf_counter()
        executable = lowered.compile()
        return Program(executable, middle - start, time.perf_counter() - middle)
    finally:
        jax.config.update("jax_enable_compilation_cache", before)
        reset_cache()


def lowered_flops(function: Callable[..., PyTree], *shapes: PyTree) -> float:
    """Return XLA's count for a function of some shapes, over all devices, without compiling it."""
    try:
        device = jax.devices("cpu")[0]
    except RuntimeError as error:
        platforms = jax.config.jax_platforms
        fix = f"the CPU backend counts FLOPs; use {platforms},cpu"
        raise BadInput(f"JAX_PLATFORMS={platforms}: {fix}") from error
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
        (seconds,) = take_turns(contender, repeats=_PEAK_REPEATS, dropped=1)
        rates[size] = 2 * size**3 / min(seconds) / 1e9
    best = max(rates, key=rates.get)
    return {"matmul_peak_gflops": rates[best], "matmul_peak_size": best, "matmul_peak_dtype": dtype}


def peak_share(gflop: float, *, seconds: float, peak: Result) -> float:
    """Return the share of all devices' peak that a program of so many GFLOP and seconds reaches."""
    return gflop / seconds / (peak["matmul_peak_gflops"] * jax.device_count())
