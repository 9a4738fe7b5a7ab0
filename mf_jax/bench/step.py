"""A training step beside a flow-matching step of the same network, batch and optimiser."""

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

from mf_jax.bench import measure
from mf_jax.data import Batch, Source, Stored
from mf_jax.flow.records import NO_LABEL, DataSpec
from mf_jax.runtime.configs import defaults
from mf_jax.runtime.sharding import batch_sharding, make_mesh, placed, put_batch, state_sharding
from mf_jax.step import StepParts, initial_state, make_train_step
from mf_jax.train import step_parts

SHOWN = (
    "objective gflop temp_bytes argument_bytes step_seconds_median images_per_second "
    "trace_seconds compile_seconds peak_share"
)
COUNTABLE = {
    "model": {"scan": False, "attention": "plain"},
    "perceptual": {"rows_at_once": 2**31 - 1},
    "train": {"microbatch": 0},
}
"""The same network with nothing hidden: XLA counts a loop once, and a kernel not at all."""
PUBLISHED = {  # counted once, by XLA before compiling; see docs/performance.md
    "meanflow": "2.00 (guided, DiT-S/4, batch 16)",
    "improved_meanflow": "3.01 (12 blocks of width 384, heads of 8, patch 4, batch 16)",
}
"""GFLOP of the published code's step beside flow matching of the same network."""
COUNT_NOTE = "GFLOP: XLA's count of the network without loops and kernels, before it is compiled"
_OF_OBJECTIVES = ("objective", "guidance", "controls", "velocity", "perceptual")


@dataclasses.dataclass(frozen=True)
class Noise:
    """A source of random elements and labels, in the form in which other data are stored."""

    spec: DataSpec
    stored: Stored | None = None

    def __len__(self) -> int:
        return 2**31

    def gather(self, indices: Int[np.ndarray, "n"]) -> Batch:
        """Return elements, a function of all the indices together."""
        rng = np.random.default_rng(indices)
        row = self.stored.rows if self.stored else jax.ShapeDtypeStruct(self.spec.shape, np.float32)
        x = rng.standard_normal((len(indices), *row.shape), np.float32).astype(row.dtype)
        labels = np.full(len(indices), NO_LABEL, np.int32)
        if self.spec.num_classes:
            labels = rng.integers(self.spec.num_classes, size=len(indices), dtype=np.int32)
        more = {
            name: rng.standard_normal((len(indices), *shape)).astype(dtype)
            for name, (shape, dtype) in self.spec.more.items()
        }
        return Batch(x, labels, **more)


def fresh_batches(config: ConfigDict, source: Source, mesh: Mesh) -> Iterator[tuple[Array, Array]]:
    """Yield batches (x, labels) of noise on the devices, no two alike, in the form of a source."""
    noise = Noise(source.spec, source.stored)
    num = config.train.batch_size // jax.process_count()
    for step in itertools.count():
        batch = noise.gather(np.arange(step * num, (step + 1) * num))
        yield jax.block_until_ready(put_batch(mesh, tuple(batch)))


def run(config: ConfigDict, source: Source, say: measure.Say) -> measure.Result:
    """See `BENCHMARKS`; `ratio` is the config's row over the row of flow matching."""
    say("measuring the matmul peak")
    peak = measure.matmul_peak(config.model.dtype)
    mesh = make_mesh(data=config.mesh.data, fsdp=config.mesh.fsdp)
    both = (config, flow_matching(config))
    rows, programs = zip(*(compile_step(each, source, mesh, say) for each in both), strict=True)
    if config.bench.repeats:
        say(f"timing {config.bench.dropped + config.bench.repeats} steps of each")
        contenders = (
            contender_of(*pair, source, mesh) for pair in zip(both, programs, strict=True)
        )
        times = measure.take_turns(*contenders, **measure.turns(config))
        for row, seconds in zip(rows, times, strict=True):
            row |= measure.spread("step", seconds)
            work = {"images": config.train.batch_size, "gflop": row["gflop"], "peak": peak}
            row |= measure.throughput(row["step_seconds_median"], **work)
    own, flow = rows
    ratio = {key: own[key] / x for key, x in flow.items() if isinstance(x, int | float)}
    notes, name = [COUNT_NOTE], config.objective.name
    if name in PUBLISHED:
        notes.append(f"ratio of GFLOP of the published code's {name}: {PUBLISHED[name]}")
    result = {"batch_size": config.train.batch_size, "notes": notes, "rows": [own, flow]}
    more = {"gflop_counted": "lowered", "ratio": {"objective": "ratio", **ratio}}
    return result | peak | more


def flow_matching(config: ConfigDict) -> ConfigDict:
    """Return a copy of a config whose objective is flow matching, with nothing beside it."""
    usual = defaults().to_dict()
    copy = changed(config, {name: usual[name] for name in _OF_OBJECTIVES})
    return changed(copy, {"objective": {"name": "flow_matching"}, "draws": {"omega_max": 1.0}})


def changed(config: ConfigDict, changes: Mapping[str, Mapping[str, Any]]) -> ConfigDict:
    """Return a copy of a config with other values of some keys, by section."""
    copy = config.copy_and_resolve_references()
    copy.update(changes)
    return copy


def compile_step(
    config: ConfigDict, source: Source, mesh: Mesh, say: measure.Say
) -> tuple[measure.Result, jax.stages.Compiled]:
    """Return the row of a config's step before it is timed, and the compiled step."""
    name = config.objective.name
    say(f"compiling {name}")
    program, costs = measure.compile_program(*placed_step(step_parts(config, source), mesh))
    parts = step_parts(changed(config, COUNTABLE), source)
    state = jax.eval_shape(functools.partial(initial_state, parts))
    lowered = measure.lowered_flops(make_train_step(parts), state, *parts.batch) / 1e9
    # for one device, after XLA's optimisations; the body of a loop counts once
    compiled = program.cost_analysis()["flops"] * jax.device_count() / 1e9
    row = {"objective": name, "gflop": lowered, "gflop_lowered": lowered}
    return row | {"gflop_compiled": compiled} | costs, program


def placed_step(parts: StepParts, mesh: Mesh) -> tuple[Any, ...]:
    """Return the step as training jits it on a mesh, and the placed shapes of its arguments."""
    state = jax.eval_shape(functools.partial(initial_state, parts))
    shardings, rows = state_sharding(mesh, state), batch_sharding(mesh)
    step = jax.jit(make_train_step(parts, mesh), donate_argnums=0, out_shardings=shardings)
    batch = placed(parts.batch, jax.tree.map(lambda _: rows, parts.batch))
    return step, placed(state, shardings), *batch


def contender_of(
    config: ConfigDict, program: jax.stages.Compiled, source: Source, mesh: Mesh
) -> measure.Contender:
    """Return the contender of a config's compiled step."""
    first_state = functools.partial(initial_state, step_parts(config, source))
    state = jax.jit(first_state, out_shardings=program.output_shardings)()
    return contender(program, state, fresh_batches(config, source, mesh))


def contender(
    program: jax.stages.Compiled, state: PyTree, batches: Iterator[Any]
) -> measure.Contender:
    """Return batches, and a compiled step with a state of its own."""

    def advance(batch: tuple[Any, ...]) -> PyTree:
        nonlocal state
        state = program(state, *batch)
        return state

    return batches, advance
