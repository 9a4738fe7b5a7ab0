"""--mode=bench: time a step, a sampler, a reader, attention or scores, or ask what fits a machine.

A benchmark needs no checkpoint. It leaves one file, bench_WHAT.json, so its workdir may hold a run.
"""

import functools
import importlib
import sys

import jax
from etils.epath import Path
from ml_collections import ConfigDict

from mf_jax.bench.attention import heads
from mf_jax.bench.fits import virtual_devices
from mf_jax.bench.measure import Result, turns
from mf_jax.bench.step import Noise
from mf_jax.bench.table import show
from mf_jax.config import make_network
from mf_jax.data import Source
from mf_jax.flow.errors import BadInput, check_known
from mf_jax.flow.records import DataSpec
from mf_jax.models import parameter_shapes
from mf_jax.runtime import processes
from mf_jax.runtime import workdir as run_folder
from mf_jax.runtime.files import replace_file, to_json
from mf_jax.validation import validate

BENCHMARKS = ("step", "sample", "input", "attention", "scores", "fits")
"""Modules, whose `run` returns `batch_size`, `notes` and `rows`; the table has the keys `SHOWN`."""

_OF_PICTURES = {"image_folder": (1, 3), "tfds": (1, 3), "latents": (8, 4)}
"""Data that need not be here: the pixels that a place stands for on either axis, and channels."""


def run(config: ConfigDict, workdir: Path) -> None:
    """Write `bench_WHAT.json` and print it as a table; nothing is written after bad input."""
    what = config.bench.what
    check_known("bench.what", what, BENCHMARKS)
    if what == "fits":
        virtual_devices(config.bench.devices)  # before anything else starts JAX
    benchmark = importlib.import_module(f"mf_jax.bench.{what}")
    source = _source(config)
    if config.bench.repeats < 1 and what not in ("step", "fits", "scores"):
        raise BadInput(f"bench.repeats=0: must be at least 1 where bench.what={what}")
    result = _describe(config, source)
    run_folder.make(workdir)
    say = functools.partial(print, file=sys.stderr) if config.log.progress else lambda text: None
    result |= benchmark.run(config, source, say) | {"config": config.to_dict()}
    name = f"bench_{what}.json"
    if processes.is_first():
        replace_file(workdir / name, to_json(result, indent=1).encode())
    show(result, benchmark.SHOWN)
    run_folder.tell(workdir, table=name)


def _source(config: ConfigDict) -> Source:
    """Return noise where the config knows the data's shape, else the data, fully checked."""
    bench, side = config.bench, config.data.image_size
    num_devices = bench.devices if bench.what == "fits" else jax.device_count()
    shape = tuple(bench.shape)
    if not shape and config.data.name in _OF_PICTURES:
        pixels, channels = _OF_PICTURES[config.data.name]
        shape = (side // pixels, side // pixels, channels)
    if bench.what == "input" or not shape:
        return validate(config, num_devices=num_devices)
    noise = DataSpec(shape, bench.num_classes)
    return validate(config, num_devices=num_devices, source=Noise(noise))


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
    } | turns(config)
