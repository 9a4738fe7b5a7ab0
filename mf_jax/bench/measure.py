"""What a measurement is made of: the clock around a call, the cost of a program, the peak of a device.

A time is that of one call, from its start until its result lies in memory. What a call needs is made before the clock
starts, the first calls are dropped, and calls to be compared take turns, so that a drift of the machine hits all of
them alike. A spread is the quartiles.
"""

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.compilation_cache.compilation_cache import reset_cache
from jaxtyping import PyTree

from mf_jax.errors import BadInput

PEAK_SIZES = {"cpu": (512, 1024, 2048), "accelerator": (2048, 4096, 8192)}
"""Sides of the square matrices whose products are timed for the peak."""
_PEAK_REPEATS = 10
Clock = Callable[[], float]
Say = Callable[[str], None]
Result = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Contender:
    """Something to be timed: `run(prepare())`, where the clock runs only during `run`."""

    prepare: Callable[[], Any]
    run: Callable[[Any], PyTree]


@dataclasses.dataclass(frozen=True)
class Program:
    """A compiled program, and how many seconds it took to trace and lower it, and to compile it."""

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
        analysis = self.executable.memory_analysis()
        return {
            "temp_bytes": analysis.temp_size_in_bytes,
            "argument_bytes": analysis.argument_size_in_bytes,
        }


def spread(name: str, seconds: Sequence[float]) -> dict[str, Any]:
    """Return the median, the quartiles and all of some times, under keys that start with a name."""
    first, median, third = np.quantile(seconds, (0.25, 0.5, 0.75)).tolist()
    return {
        f"{name}_seconds_median": median,
        f"{name}_seconds_quartiles": [first, third],
        f"{name}_seconds": list(seconds),
    }


def peak_share(gflop: float, *, seconds: float, peak_gflops: float) -> float:
    """Return which share of the peak a program of so many GFLOP reaches that runs so many seconds on all devices."""
    return gflop / seconds / (peak_gflops * jax.device_count())


def take_turns(
    contenders: Sequence[Contender], *, repeats: int, dropped: int, clock: Clock = time.perf_counter
) -> list[list[float]]:
    """Time calls in turns: a, b, a, b, ...

    Args:
      contenders: what is called.
      repeats: calls of each that count.
      dropped: calls of each before them.
      clock: in seconds.

    Returns:
      The seconds of each call that counts, a list for each contender.
    """
    times: list[list[float]] = [[] for _ in contenders]
    for _ in range(dropped + repeats):
        for contender, seconds in zip(contenders, times, strict=True):
            prepared = contender.prepare()
            start = clock()
            jax.block_until_ready(contender.run(prepared))
            seconds.append(clock() - start)
    return [seconds[dropped:] for seconds in times]


def time_stream(
    pull: Callable[[], PyTree],
    *,
    repeats: int,
    dropped: int,
    least_seconds: float,
    clock: Clock = time.perf_counter,
) -> list[float]:
    """Time the elements of a stream, which may hold some of them ready: a few say nothing about its rate.

    Args:
      pull: returns the next element.
      repeats: elements that count, at least.
      dropped: elements before them.
      least_seconds: what the elements that count must take together.
      clock: in seconds.

    Returns:
      The seconds of each element that counts.
    """
    for _ in range(dropped):
        jax.block_until_ready(pull())
    seconds: list[float] = []
    while len(seconds) < repeats or sum(seconds) < least_seconds:
        start = clock()
        jax.block_until_ready(pull())
        seconds.append(clock() - start)
    return seconds


@contextlib.contextmanager
def without_compilation_cache() -> Iterator[None]:
    """Compile everything anew, and store nothing."""
    before = jax.config.jax_enable_compilation_cache
    try:
        jax.config.update("jax_enable_compilation_cache", False)
        reset_cache()  # whether there is a cache is asked once, at the first compilation
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", before)
        reset_cache()


def compile_program(
    function: jax.stages.Wrapped, *arguments: PyTree, clock: Clock = time.perf_counter
) -> Program:
    """Compile a function that `jax.jit` returned for some arguments, without the persistent cache."""
    with without_compilation_cache():
        start = clock()
        lowered = function.lower(*arguments)
        middle = clock()
        executable = lowered.compile()
        return Program(executable, trace_seconds=middle - start, compile_seconds=clock() - middle)


def counting_device() -> jax.Device:
    """Return a device of the CPU backend, the only one that counts what is not compiled.

    Raises:
      BadInput: if it was left out.
    """
    try:
        return jax.devices("cpu")[0]
    except RuntimeError as error:
        platforms = jax.config.jax_platforms
        raise BadInput(
            f"JAX_PLATFORMS={platforms}: operations are counted by the CPU backend; use {platforms},cpu"
        ) from error


def lowered_flops(function: Callable[..., PyTree], *shapes: PyTree) -> float:
    """Return XLA's count for a function before any optimisation, over all devices, without compiling it.

    Args:
      function: not compiled.
      shapes: of its arguments.
    """
    with jax.default_device(counting_device()):
        return jax.jit(function).lower(*shapes).cost_analysis()["flops"]


def matmul_peak(dtype: str, *, clock: Clock = time.perf_counter) -> dict[str, Any]:
    """Return the best rate of a square matrix product on one device, at JAX's default precision.

    Args:
      dtype: of the factors; a CPU is measured in float32 in any case, in which most multiply bfloat16 too.
      clock: in seconds.

    Returns:
      matmul_peak_gflops in GFLOP per second, matmul_peak_size (the side of the matrices) and matmul_peak_dtype.
    """
    is_cpu = jax.default_backend() == "cpu"
    dtype = "float32" if is_cpu else dtype
    sizes = PEAK_SIZES["cpu" if is_cpu else "accelerator"]
    rates = {size: _matmul_rate(size, dtype, clock) for size in sizes}
    best = max(rates, key=rates.get)
    return {"matmul_peak_gflops": rates[best], "matmul_peak_size": best, "matmul_peak_dtype": dtype}


def _matmul_rate(size: int, dtype: str, clock: Clock) -> float:
    factors = jax.random.normal(jax.random.key(0), (2, size, size), dtype)
    jax.block_until_ready(factors)
    product = jax.jit(jnp.matmul)
    (seconds,) = take_turns(
        [Contender(lambda: factors, lambda pair: product(*pair))],
        repeats=_PEAK_REPEATS,
        dropped=1,
        clock=clock,
    )
    return 2 * size**3 / min(seconds) / 1e9
