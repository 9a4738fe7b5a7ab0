"""How many images a second --mode=sample draws, and the time of the bare forward beside it."""

import itertools
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree
from ml_collections import ConfigDict

from mf_jax.bench import measure
from mf_jax.bench.step import COUNT_NOTE, COUNTABLE, changed
from mf_jax.config import make_network, sample_plan
from mf_jax.data import Source
from mf_jax.flow.records import Condition, GuidanceScale
from mf_jax.generator import Generator
from mf_jax.models import as_field, initial_params, parameter_shapes
from mf_jax.runtime.sharding import everywhere

SHOWN = (
    "evaluations gflop_per_image batch_seconds_median forward_seconds_median ratio_to_forwards "
    "images_per_second peak_share"
)
_PEAK_NOTE = "sampling multiplies at the highest precision, the peak at the default precision"


def run(config: ConfigDict, source: Source, say: measure.Say) -> measure.Result:
    """See `BENCHMARKS`; `config.sample` says what a batch is."""
    say("measuring the matmul peak")
    peak, turns = measure.matmul_peak(config.model.dtype), measure.turns(config)
    forward, network, z = _forward(config, source)
    params = initial_params(network, source.spec.shape, jax.random.key(config.seed))
    params = jax.device_put(params, everywhere())
    plan = sample_plan(config)
    generator = Generator(config, network, params, source.spec, 0, "none")
    labels = generator.labels_for(config.sample.labels or None, plan.batch_size)
    say("compiling the sampler")
    generator.sample_raw(labels, plan=plan)
    say(f"timing {sum(turns.values())} batches, and as many forwards")
    forward = jax.jit(forward)
    sampling = itertools.count(), lambda seed: generator.sample_raw(labels, plan=plan, seed=seed)
    bare = itertools.repeat(z), lambda z: forward(params, z)
    seconds, forwards = measure.take_turns(sampling, bare, **turns)
    row = measure.spread("batch", seconds) | measure.spread("forward", forwards)
    evaluate, countable, z = _forward(changed(config, COUNTABLE), source)
    shapes, evaluations = parameter_shapes(countable, source.spec.shape), len(plan.grid) - 1
    gflop = measure.lowered_flops(evaluate, shapes, z) / 1e9
    row |= {"evaluations": evaluations, "gflop_per_image": gflop / plan.batch_size}
    work = {"images": plan.batch_size, "gflop": evaluations * gflop, "peak": peak}
    row |= measure.throughput(row["batch_seconds_median"], **work)
    least = evaluations * row["forward_seconds_median"]
    row["ratio_to_forwards"] = row["batch_seconds_median"] / least
    result = {"batch_size": plan.batch_size, "notes": [COUNT_NOTE, _PEAK_NOTE], "rows": [row]}
    return result | peak


def _forward(
    config: ConfigDict, source: Source
) -> tuple[Callable[[PyTree, Array], Array], nn.Module, Array]:
    """Return one evaluation of a batch, its network, and a batch."""
    network = make_network(config, source.spec, for_sampling=True)
    ones = jnp.ones(config.sample.batch_size)
    condition = Condition(ones.astype(jnp.int32), guidance=GuidanceScale(ones, ones, ones))

    def forward(params: PyTree, z: Array) -> Array:
        with jax.default_matmul_precision("highest"):  # as samples are drawn
            return as_field(network)(params, z, r=ones, t=ones, condition=condition).u

    return forward, network, jnp.ones((*ones.shape, *source.spec.shape))
