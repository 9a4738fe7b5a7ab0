"""Whether a config fits a machine that is not here, what its devices exchange, and how fast a step can be there.

The whole training step is compiled for as many virtual devices of the CPU backend; nothing is run. State and batch are
exact. Temporaries are what XLA for CPUs needs for the same program: it fuses otherwise and multiplies in float32.
"""

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
from jaxtyping import PyTree
from ml_collections import ConfigDict

from mf_jax.bench.collectives import exchanges
from mf_jax.bench.compiled import product_flops
from mf_jax.bench.measure import Program, Result, Say, compile_program
from mf_jax.bench.predict import predicted, timed
from mf_jax.bench.step import changed, placed_step
from mf_jax.bench.topologies import Topology, find_topology
from mf_jax.data import Source
from mf_jax.errors import BadInput
from mf_jax.runtime.sharding import make_mesh
from mf_jax.train import step_parts

Changes = dict[str, dict[str, Any]]
_REMATS = ("none", "dots", "block")
"""From the fastest to the smallest."""
_CAN_REMAT = ("dit", "in_context_dit")
NOTES = {
    "nothing": "nor with anything that changes no result: use a smaller train.batch_size, or a larger machine",
    "temporaries": "temporaries are XLA's for CPUs, which multiplies bfloat16 as float32: an estimate for GPU and TPU",
    "time": "times: operations at bench.utilisation of the peak, then all collectives as rings at the link's rate, "
    "nothing hidden",
    "remat": "model.remat without model.scan: XLA for CPUs drops it, GPU and TPU do not; plan with model.scan=True",
    "attention": "planned with model.attention=xla: a fused kernel is interpreted on a CPU; it needs less",
}


def stand_in_devices(topology: str) -> Sequence[jax.Device]:
    """Return virtual CPU devices in the place of a machine's; JAX starts with them where it has not started yet.

    Args:
      topology: name of the machine.

    Raises:
      BadInput: if it is unknown, or JAX has started with fewer.
    """
    count = find_topology(topology).devices
    try:
        jax.config.update("jax_num_cpu_devices", count)
        jax.config.update("jax_platforms", "cpu")
    except RuntimeError:  # it has started: more will do as well
        pass
    if jax.device_count("cpu") < count:
        raise BadInput(
            f"bench.topology={topology!r}: needs {count} virtual devices, but JAX has started with "
            f"{jax.device_count('cpu')}; plan in a process of its own"
        )
    return jax.devices("cpu")[:count]


def bench_plan(config: ConfigDict, source: Source, say: Say) -> Result:
    """Plan the training of a config on `bench.topology`; where it does not fit, look for settings with which it does.

    Args:
      config: checked.
      source: for the shape and the classes; nothing is read.
      say: is told what is being done.

    Returns:
      A row for each setting tried, the last of which fits if any does; its collectives, and notes.

    Raises:
      BadInput: if the mesh is not that of so many devices.
    """
    name = config.bench.topology
    topology, devices = find_topology(name), stand_in_devices(name)
    rows, found = [], []
    for changes in _candidates(config, topology.devices):
        each = changed(config, changes)
        say(f"compiling for {name}: {_spelled(changes)}")
        row, found = _plan(
            changed(each, {"model": {"attention": "xla"}}), source, devices, topology
        )
        rows.append({"settings": _spelled(changes), **row})
        if row["fits"]:
            break
    return {
        "topology": name,
        **topology._asdict(),
        "num_devices": topology.devices,
        "device_kind": name.rpartition("-")[0],
        "platform": f"planned on {topology.processes} hosts",
        "batch_size": config.train.batch_size,
        "utilisation": config.bench.utilisation,
        "notes": _notes(config, rows),
        "rows": rows,
        "collectives": found,
    }


def _notes(config: ConfigDict, rows: Sequence[Result]) -> list[str]:
    verdict = "fits as configured"
    if not rows[0]["fits"]:
        found = f"but with {rows[-1]['settings']}" if rows[-1]["fits"] else NOTES["nothing"]
        verdict = f"does not fit as configured, {found}"
    return [
        verdict,
        NOTES["temporaries"],
        NOTES["time"],
        *[NOTES["remat"]] * (config.model.remat != "none" and not config.model.scan),
        *[NOTES["attention"]] * (config.model.attention != "xla"),
    ]


def _spelled(changes: Changes) -> str:
    settings = [
        f"{part}.{key}={value}" for part, keys in changes.items() for key, value in keys.items()
    ]
    return " ".join(settings) or "as configured"


def _candidates(config: ConfigDict, num_devices: int) -> Iterator[Changes]:
    """Yield changes of a config that save memory and change no numbers, the cheapest first.

    They are none, recomputing, and fsdp, each size of it with all kinds of recomputing before the next one; then all
    sizes again, with blocks that gather their own parameters and the smallest kind of recomputing.
    """
    remats: list[Changes] = [{}]
    if config.model.name in _CAN_REMAT:
        model = {"scan": True} if not config.model.scan else {}
        first = _REMATS.index(config.model.remat)
        same = [{"model": model}] if model and first else []
        remats += same + [{"model": {**model, "remat": remat}} for remat in _REMATS[first + 1 :]]
    fsdp = config.mesh.fsdp
    sizes = [
        size for size in range(fsdp + 1, num_devices + 1) if num_devices % size == size % fsdp == 0
    ]
    meshes: list[Changes] = [{}, *({"mesh": {"data": 0, "fsdp": size}} for size in sizes)]
    yield from ({**mesh, **remat} for mesh, remat in itertools.product(meshes, remats))
    if config.model.name in _CAN_REMAT and config.mesh.gather == "step":
        first = [{"gather": "block"}] * (fsdp > 1)
        late = first + [{"data": 0, "fsdp": size, "gather": "block"} for size in sizes]
        yield from ({"mesh": mesh, **remats[-1]} for mesh in late)


def _plan(
    config: ConfigDict, source: Source, devices: Sequence[jax.Device], topology: Topology
) -> tuple[Result, list[Result]]:
    """Return a row about a config, and its collectives; not compiled if the state alone does not fit."""
    mesh = make_mesh(data=config.mesh.data, fsdp=config.mesh.fsdp, devices=devices)
    step, state, *batch = placed_step(step_parts(config, source), mesh)
    row: Result = {"mesh": list(mesh.devices.shape), **_held(state, batch)}
    held = sum(row[f"{part}_bytes"] for part in PARTS)
    if held > topology.memory:
        return row | {"total_bytes": held, "left_bytes": topology.memory - held, "fits": False}, []
    program = compile_program(step, state, *batch)
    row |= _needed(program, held, topology)
    text = program.executable.as_text()
    collectives = [timed(each, topology) for each in exchanges(text, dict(mesh.shape))]
    row |= predicted(product_flops(text), collectives, topology, config.bench.utilisation)
    return row, collectives


PARTS = ("params", "ema", "opt_state", "rest", "batch")
"""What a device holds between steps, and what a step is given."""


def _held(state: PyTree, batch: PyTree) -> Result:
    """Return the bytes on one device of each part of the state, and of the batch."""
    parts = {field.name: getattr(state, field.name) for field in dataclasses.fields(state)}
    named = {name: parts.pop(name) for name in ("params", "ema", "opt_state")}
    trees = named | {"rest": parts, "batch": batch}
    return {
        f"{name}_bytes": sum(map(_on_a_device, jax.tree.leaves(tree)))
        for name, tree in trees.items()
    }


def _on_a_device(leaf: jax.ShapeDtypeStruct) -> int:
    shard = jax.ShapeDtypeStruct(leaf.sharding.shard_shape(leaf.shape), leaf.dtype)
    return shard.size * shard.dtype.itemsize


def _needed(program: Program, held: int, topology: Topology) -> Result:
    """Return the bytes beyond what is held: temporaries, and results that take no argument's place."""
    memory = program.executable.memory_analysis()
    temporary = memory.temp_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    left = topology.memory - held - temporary
    return {
        "temporary_bytes": temporary,
        "total_bytes": held + temporary,
        "left_bytes": left,
        "fits": left >= 0,
    }
