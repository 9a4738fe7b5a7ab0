"""How many images a second --mode=sample draws, with a network fresh from its seed."""

import itertools

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, PyTree
from ml_collections import ConfigDict

from mf_jax.bench.measure import (
    Contender,
    Result,
    Say,
    lowered_flops,
    matmul_peak,
    peak_share,
    spread,
    take_turns,
)
from mf_jax.bench.step import in_the_open
from mf_jax.config import make_network, sample_plan
from mf_jax.data import Source
from mf_jax.flow.records import Condition, GuidanceScale
from mf_jax.generator import Generator
from mf_jax.models import as_field, initial_params, parameter_shapes
from mf_jax.runtime.sharding import make_mesh

_NOTES = (
    "GFLOP is XLA's count of one evaluation of the network before it is compiled",
    "sampling computes products at the highest precision; the peak is that of the default precision",
)


def bench_sample(config: ConfigDict, source: Source, say: Say) -> Result:
    """Measure the sampler, from labels to arrays of the host.

    Args:
      config: checked; `sample` says what a batch is.
      source: for the shape and the classes.
      say: is told what is being done.

    Returns:
      One row, the peak of the device, and notes.
    """
    say("measuring the matmul peak")
    peak = matmul_peak(config.model.dtype)
    wanted, turns = config.sample, {key: config.bench[key] for key in ("repeats", "dropped")}
    generator = _fresh_generator(config, source)
    labels = generator.labels_for(wanted.labels or None, wanted.batch_size)
    plan = sample_plan(config)
    say("compiling the sampler")
    generator.sample_raw(labels, plan=plan)
    say(f"timing {sum(turns.values())} batches")
    seeds = itertools.count()
    contender = Contender(
        lambda: next(seeds), lambda seed: generator.sample_raw(labels, plan=plan, seed=seed)
    )
    (seconds,) = take_turns([contender], **turns)
    row = spread("batch", seconds)
    median = row["batch_seconds_median"]
    evaluations = len(plan.grid) - 1
    gflop = _count_forward(in_the_open(config), source) / 1e9
    share = peak_share(evaluations * gflop, seconds=median, peak_gflops=peak["matmul_peak_gflops"])
    row |= {
        "evaluations": evaluations,
        "gflop_per_image": gflop / wanted.batch_size,
        "images_per_second": wanted.batch_size / median,
        "peak_share": share,
    }
    return {"batch_size": wanted.batch_size, **peak, "notes": list(_NOTES), "rows": [row]}


def _fresh_generator(config: ConfigDict, source: Source) -> Generator:
    network = make_network(config, source.spec, for_sampling=True)
    everywhere = NamedSharding(make_mesh(data=0, fsdp=1), PartitionSpec())
    params = jax.device_put(
        initial_params(network, source.spec.shape, jax.random.key(config.seed)), everywhere
    )
    return Generator(config, network, params, source.spec, 0, "none")


def _count_forward(config: ConfigDict, source: Source) -> float:
    """Return the operations of one evaluation of a batch."""
    network = make_network(config, source.spec, for_sampling=True)
    times = jax.ShapeDtypeStruct((config.sample.batch_size,), jnp.float32)
    z = jax.ShapeDtypeStruct((*times.shape, *source.spec.shape), jnp.float32)
    labels = jax.ShapeDtypeStruct(times.shape, jnp.int32)

    def forward(params: PyTree, z: Array, times: Array, labels: Array) -> Array:
        condition = Condition(labels, guidance=GuidanceScale(times, times, times))
        return as_field(network)(params, z, r=times, t=times, condition=condition).u

    return lowered_flops(forward, parameter_shapes(network, source.spec.shape), z, times, labels)
