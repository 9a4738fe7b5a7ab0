"""Whether a config fits a machine that is not here: `bench.devices` of `bench.memory_gb` GB each.

XLA compiles the training step for virtual CPU devices and says what each holds; nothing runs.
State and batch are exact, temporaries an estimate.
"""

import contextlib
import math
from collections.abc import Sequence

import jax
from jaxtyping import PyTree
from ml_collections import ConfigDict

from mf_jax.bench import measure
from mf_jax.bench.step import changed, placed_step
from mf_jax.data import Source
from mf_jax.flow.errors import BadInput
from mf_jax.runtime.sharding import make_mesh
from mf_jax.train import step_parts

SHOWN = "params_bytes ema_bytes opt_state_bytes batch_bytes temp_bytes total_bytes left_bytes fits"
_NOTE = "temp: of XLA for CPUs, which multiplies bfloat16 as float32; a GPU or TPU needs less"
_REMAT = "model.remat counts only with model.scan here: XLA for CPUs drops it otherwise"


def virtual_devices(count: int) -> Sequence[jax.Device]:
    """Return CPU devices; JAX starts with them unless it has started already."""
    with contextlib.suppress(RuntimeError):  # it has started: more will do as well
        jax.config.update("jax_num_cpu_devices", count)
        jax.config.update("jax_platforms", "cpu")
    if (here := jax.device_count("cpu")) < count:
        raise BadInput(f"bench.devices={count}: JAX has started with {here}; use a new process")
    return jax.devices("cpu")[:count]


def run(config: ConfigDict, source: Source, say: measure.Say) -> measure.Result:
    """See `BENCHMARKS`."""
    devices = virtual_devices(config.bench.devices)
    mesh = make_mesh(data=config.mesh.data, fsdp=config.mesh.fsdp, devices=devices)
    say(f"compiling {config.objective.name} for {len(devices)} devices")
    # a fused kernel is interpreted on a CPU, which alone attends to long sequences head by head
    parts = step_parts(changed(config, {"model": {"attention": "plain"}}), source)
    step, state, *batch = placed_step(parts, mesh)
    found = measure.compile_program(step, state, *batch)[0].memory_analysis()
    # results that take no argument's place are temporary too
    temp = found.temp_size_in_bytes + found.output_size_in_bytes - found.alias_size_in_bytes
    total = found.argument_size_in_bytes + temp
    left = config.bench.memory_gb * 1e9 - total
    held = {"params": state.params, "ema": state.ema, "opt_state": state.opt_state, "batch": batch}
    row = {f"{name}_bytes": _on_a_device(tree) for name, tree in held.items()}
    row |= {"temp_bytes": temp, "total_bytes": total, "left_bytes": left}
    row |= {"fits": "yes" if left >= 0 else "no"}
    notes = [_NOTE, *[_REMAT] * (config.model.remat != "none" and not config.model.scan)]
    result = {"batch_size": config.train.batch_size, "notes": notes, "rows": [row]}
    return result | {"memory_gb": config.bench.memory_gb, "mesh": list(mesh.devices.shape)}


def _on_a_device(tree: PyTree) -> int:
    """Return the bytes of a tree of placed shapes on one device."""
    leaves = jax.tree.leaves(tree)
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in leaves)
