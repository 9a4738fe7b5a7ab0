"""--mode=bench: how fast this machine trains, samples, reads, attends or scores, and what would fit another machine.

A benchmark needs no checkpoint and leaves one file, bench_WHAT.json, so its workdir may be that of a run.
"""

import contextlib
import json
from collections.abc import Callable, Iterator

import jax
from etils.epath import Path
from ml_collections import ConfigDict
from rich.console import Console

from mf_jax.bench.attention import bench_attention, heads
from mf_jax.bench.input import bench_input
from mf_jax.bench.measure import Result, Say, counting_device
from mf_jax.bench.plan import bench_plan, stand_in_devices
from mf_jax.bench.sample import bench_sample
from mf_jax.bench.scores import bench_scores
from mf_jax.bench.step import Noise, bench_step
from mf_jax.bench.table import show
from mf_jax.bench.topologies import find_topology
from mf_jax.config import make_network, validate
from mf_jax.data import Source
from mf_jax.errors import BadInput, check_known
from mf_jax.flow.records import DataSpec
from mf_jax.models import parameter_shapes
from mf_jax.runtime import processes
from mf_jax.runtime import workdir as run_folder
from mf_jax.runtime.files import replace_file
from mf_jax.runtime.sharding import make_mesh

BENCHMARKS: dict[str, Callable[[ConfigDict, Source, Say], Result]] = {
    "step": bench_step,
    "sample": bench_sample,
    "input": bench_input,
    "attention": bench_attention,
    "scores": bench_scores,
    "plan": bench_plan,
}
"""What can be measured or planned: from a checked config and its data to the rows of a table."""


def run(config: ConfigDict, workdir: Path) -> None:
    """Write `bench_WHAT.json` and print it as a table.

    Args:
      config: of the command; `bench` says what to measure.
      workdir: where the file goes, made if missing; the files of a run there are left alone.

    Raises:
      BadInput: for anything wrong with the config, the data or the workdir; nothing has been written then.
    """
    _check(config)
    source = _source(config)
    about = _describe(config, source)
    run_folder.make(workdir)
    with _progress(config.log.progress) as say:
        measured = BENCHMARKS[config.bench.what](config, source, say)
    result = {**about, **measured, "config": config.to_dict()}
    name = f"bench_{config.bench.what}.json"
    if processes.is_first():
        replace_file(workdir / name, json.dumps(result, indent=1, allow_nan=False).encode())
    show(result)
    run_folder.tell(workdir, table=name)


def _check(config: ConfigDict) -> None:
    """Raise BadInput for whatever is wrong in the section `bench`."""
    bench = config.bench
    check_known("bench.what", bench.what, BENCHMARKS)
    if bench.what == "plan":
        devices = stand_in_devices(bench.topology)  # before anything else starts JAX
        make_mesh(data=config.mesh.data, fsdp=config.mesh.fsdp, devices=devices)
    counting_device()
    least = 0 if bench.what in ("step", "plan") else 1
    problems = [
        f"bench.{key}={tuple(bench[key])}: must hold whole numbers of at least 1, for example (256,)"
        for key in ("shape", "tokens")
        if not all(type(n) is int and n >= 1 for n in bench[key])
    ]
    wrong = {
        f"bench.repeats={bench.repeats}: must be at least {least}; try 20": bench.repeats < least,
        f"bench.dropped={bench.dropped}: must be at least 0; try 3": bench.dropped < 0,
        f"bench.num_classes={bench.num_classes}: must be at least 0; 0 is no classes": bench.num_classes
        < 0,
        f"bench.shape={tuple(bench.shape)}: must be (height, width, channels), (size,) for vectors, or () for the "
        "shape of the data": len(bench.shape) not in (0, 1, 3),
        f"bench.utilisation={bench.utilisation}: must be above 0 and at most 1; try 0.4": not (
            0 < bench.utilisation <= 1
        ),
        "bench.tokens=(): must hold a length, for example (256,)": len(bench.tokens) == 0,
    }
    problems += [message for message, is_wrong in wrong.items() if is_wrong]
    if problems:
        raise BadInput("; ".join(problems))


def _source(config: ConfigDict) -> Source:
    """Return the data that a config names, or noise where it gives a shape, after all checks of a training run."""
    is_plan = config.bench.what == "plan"
    num_devices = find_topology(config.bench.topology).devices if is_plan else jax.device_count()
    if config.bench.what == "input" or not config.bench.shape:
        return validate(config, num_devices=num_devices)
    noise = Noise(DataSpec(tuple(config.bench.shape), config.bench.num_classes))
    return validate(config, num_devices=num_devices, source=noise)


def _describe(config: ConfigDict, source: Source) -> Result:
    """Return what every result says about the machine and the network."""
    network = make_network(config, source.spec)
    if config.bench.what == "attention":
        heads(network)  # before anything is written
    shapes = jax.tree.leaves(parameter_shapes(network, source.spec.shape))
    device = jax.devices()[0]
    return {
        "what": config.bench.what,
        "platform": device.platform,
        "device_kind": device.device_kind,
        "num_devices": jax.device_count(),
        "jax_version": jax.__version__,
        "network": config.model.name,
        "num_parameters": sum(leaf.size for leaf in shapes),
        "dtype": config.model.dtype,
        "shape": list(source.spec.shape),
        "num_classes": source.spec.num_classes,
        "repeats": config.bench.repeats,
        "dropped": config.bench.dropped,
    }


@contextlib.contextmanager
def _progress(is_wanted: bool) -> Iterator[Say]:
    """Yield a function that says on stderr what is being done: beside a spinner on a terminal, in lines elsewhere."""
    console = Console(stderr=True, quiet=not is_wanted, highlight=False)
    if not console.is_terminal:
        yield lambda text: console.print(text, markup=False, soft_wrap=True)
        return
    with console.status("") as status:
        yield status.update
