"""What a training step costs, beside a flow-matching step of the same network, batch and optimiser."""

import dataclasses
import functools
import itertools
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Int, PyTree
from ml_collections import ConfigDict

from mf_jax.bench.measure import (
    Contender,
    Program,
    Result,
    Say,
    compile_program,
    lowered_flops,
    matmul_peak,
    peak_share,
    spread,
    take_turns,
)
from mf_jax.data import Batch, Source, Stored
from mf_jax.flow.records import NO_LABEL, DataSpec
from mf_jax.runtime.sharding import batch_sharding, make_mesh, placed, put_batch, state_sharding
from mf_jax.step import StepParts, TrainState, initial_state, make_train_step
from mf_jax.train import step_parts

_FLOW_MATCHING = {
    "objective": {"name": "flow_matching"},
    "guidance": {"omega": 1.0, "kappa": 0.0},
    "draws": {"omega_max": 1.0},
    "controls": {"lipschitz": 0.0, "monotone": 0.0},
}
_COMPARED = (
    "gflop",
    "temp_bytes",
    "argument_bytes",
    "step_seconds_median",
    "images_per_second",
    "trace_seconds",
    "compile_seconds",
)


@dataclasses.dataclass(frozen=True)
class Noise:
    """A source of elements that are noise, of any shape.

    Args:
      spec: of one element; labels are as random.
      stored: as that of the data in whose place it stands; its rows are noise then.
    """

    spec: DataSpec
    stored: Stored | None = None

    def __len__(self) -> int:
        return 2**31

    def gather(self, indices: Int[np.ndarray, "n"]) -> Batch:
        """Return elements, a function of all the indices together."""
        rng = np.random.default_rng(indices)
        row = self.stored.rows if self.stored else jax.ShapeDtypeStruct(self.spec.shape, np.float32)
        x = rng.standard_normal((len(indices), *row.shape), np.float32).astype(row.dtype)
        if not self.spec.num_classes:
            return Batch(x, np.full(len(indices), NO_LABEL, np.int32))
        return Batch(x, rng.integers(self.spec.num_classes, size=len(indices), dtype=np.int32))


def flow_matching_of(config: ConfigDict) -> ConfigDict:
    """Return a config of flow matching with the same network, batch and optimiser."""
    return changed(config, _FLOW_MATCHING)


def in_the_open(config: ConfigDict) -> ConfigDict:
    """Return a config of the same network whose every operation XLA can count before it compiles."""
    return changed(config, {"model": {"scan": False, "attention": "xla"}})


def changed(config: ConfigDict, changes: Mapping[str, Mapping[str, Any]]) -> ConfigDict:
    """Return a copy of a config with other values of some keys, by section."""
    copy = config.copy_and_resolve_references()
    copy.update(changes)
    return copy


def hidden_work(config: ConfigDict) -> list[str]:
    """Return why XLA cannot count a compiled step of a config."""
    reasons = {
        "a loop would count once (model.scan)": config.model.scan,
        "a kernel would not count (model.attention)": config.model.attention == "fused",
        "calls of a library would not count (gpu)": jax.default_backend() == "gpu",
    }
    return [reason for reason, holds in reasons.items() if holds]


def bench_step(config: ConfigDict, source: Source, say: Say) -> Result:
    """Measure the step of a config, and that of flow matching.

    Args:
      config: checked.
      source: for the shape and the classes; the batches are noise.
      say: is told what is being done.

    Returns:
      A row for each and the ratio of the first to the second, the peak of the device, and notes.
    """
    say("measuring the matmul peak")
    peak = matmul_peak(config.model.dtype)
    mesh = make_mesh(data=config.mesh.data, fsdp=config.mesh.fsdp)
    both = (config, flow_matching_of(config))
    rows, programs = zip(*(_compile_step(each, source, mesh, say) for each in both), strict=True)
    if config.bench.repeats:
        contenders = [_contender(*pair, source, mesh) for pair in zip(both, programs, strict=True)]
        turns = {key: config.bench[key] for key in ("repeats", "dropped")}
        say(f"timing {sum(turns.values())} steps of each")
        for row, seconds in zip(rows, take_turns(contenders, **turns), strict=True):
            row |= _speed(
                row["gflop"], seconds, config.train.batch_size, peak["matmul_peak_gflops"]
            )
    hidden = ", ".join(hidden_work(config))
    notes = [
        f"GFLOP is XLA's count of the unrolled network before it is compiled: {hidden}"
    ] * bool(hidden)
    return {
        "batch_size": config.train.batch_size,
        **peak,
        "gflop_counted": "lowered" if hidden else "compiled",
        "notes": notes,
        "rows": list(rows),
        "ratio": {"objective": "ratio"}
        | {key: rows[0][key] / rows[1][key] for key in _COMPARED if key in rows[0]},
    }


def _speed(gflop: float, seconds: list[float], batch_size: int, peak_gflops: float) -> Result:
    times = spread("step", seconds)
    median = times["step_seconds_median"]
    share = peak_share(gflop, seconds=median, peak_gflops=peak_gflops)
    return times | {"images_per_second": batch_size / median, "peak_share": share}


def _compile_step(
    config: ConfigDict, source: Source, mesh: Mesh, say: Say
) -> tuple[Result, Program]:
    """Return what the step of a config costs, and the compiled step; no state is made yet."""
    say(f"counting the operations of {config.objective.name}")
    lowered = _count_step(in_the_open(config), source) / 1e9
    say(f"compiling {config.objective.name}")
    program = compile_program(*placed_step(step_parts(config, source), mesh))
    compiled = program.flops * jax.device_count() / 1e9
    row = {
        "objective": config.objective.name,
        "gflop": lowered if hidden_work(config) else compiled,
        "gflop_compiled": compiled,
        "gflop_lowered": lowered,
        **program.memory,
        "trace_seconds": program.trace_seconds,
        "compile_seconds": program.compile_seconds,
    }
    return row, program


def placed_step(
    parts: StepParts, mesh: Mesh
) -> tuple[jax.stages.Wrapped, TrainState, PyTree, PyTree]:
    """Return the step as training runs it on a mesh, not compiled, and the shapes of its arguments where they lie."""
    state = jax.eval_shape(functools.partial(initial_state, parts))
    shardings, rows = state_sharding(mesh, state), batch_sharding(mesh)
    step = jax.jit(make_train_step(parts, mesh), donate_argnums=0, out_shardings=shardings)
    return step, placed(state, shardings), *placed(parts.batch, (rows, rows))


def _contender(config: ConfigDict, program: Program, source: Source, mesh: Mesh) -> Contender:
    """Return a compiled step with a state of its own, to be timed."""
    first_state = functools.partial(initial_state, step_parts(config, source))
    shardings = state_sharding(mesh, jax.eval_shape(first_state))
    state = jax.jit(first_state, out_shardings=shardings)()
    batches = fresh_batches(config, source, mesh)

    def advance(batch: tuple[Array, Array]) -> TrainState:
        nonlocal state
        state = program.executable(state, *batch)
        return state

    return Contender(lambda: next(batches), advance)


def _count_step(config: ConfigDict, source: Source) -> float:
    """Return the operations of a step, as that of a single device."""
    parts = step_parts(config, source)
    state = jax.eval_shape(functools.partial(initial_state, parts))
    return lowered_flops(make_train_step(parts), state, *parts.batch)


def fresh_batches(config: ConfigDict, source: Source, mesh: Mesh) -> Iterator[tuple[Array, Array]]:
    """Yield batches of noise, no two alike, that lie on the devices.

    Args:
      config: says how large they are.
      source: for the shape and the classes.
      mesh: of the devices.

    Yields:
      x `[B, ...]` and labels `[B]`.
    """
    noise = Noise(source.spec, source.stored)
    num = config.train.batch_size // jax.process_count()
    for step in itertools.count():
        batch = noise.gather(np.arange(step * num, (step + 1) * num))
        yield jax.block_until_ready(put_batch(mesh, tuple(batch)))
