"""Attention of a network's heads, plain and fused, in all the ways that training takes it."""

import itertools
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree
from ml_collections import ConfigDict

from mf_jax.bench import measure
from mf_jax.config import make_network
from mf_jax.data import Source
from mf_jax.flow.errors import BadInput
from mf_jax.models.attention import ATTENTIONS, attend

SHOWN = " ".join(
    ["tokens pass", *(f"{kind}_seconds_median" for kind in ATTENTIONS), "seconds_ratio"]
    + [f"{kind}_temp_bytes" for kind in ATTENTIONS]
)
_INTERPRETED = "fused: interpreted on cpu; its times say nothing of a GPU or TPU"
QKV = tuple[Float[Array, "b n heads d"], ...]


def heads(network: nn.Module) -> tuple[int, int]:
    """Return how many heads the attention of a network has, and their width."""
    network = getattr(network, "network", network)  # of a DataPrediction
    if not hasattr(network, "num_heads"):
        raise BadInput("bench.what='attention': dit, in_context_dit have it; use bench.what=step")
    return network.num_heads, network.width // network.num_heads


def run(config: ConfigDict, source: Source, say: measure.Say) -> measure.Result:
    """See `BENCHMARKS`; a row for each length of `bench.tokens` and pass, on one device."""
    (num_heads, width), rows = heads(make_network(config, source.spec)), []
    for tokens in config.bench.tokens:
        shape = (2, 3, config.train.batch_size, tokens, num_heads, width)
        qkv, tangents = jax.random.normal(jax.random.key(config.seed), shape, config.model.dtype)
        inputs = (qkv[0] * width**-0.5, *qkv[1:]), tuple(tangents)
        for name in passes("xla"):
            say(f"{tokens} tokens: {name}")
            row, contenders = {"tokens": tokens, "pass": name}, []
            for kind in ATTENTIONS:
                program, costs = measure.compile_program(jax.jit(passes(kind)[name]), *inputs)
                row |= {f"{kind}_{key}": cost for key, cost in costs.items()}
                contenders.append((itertools.repeat(inputs), lambda pair, run=program: run(*pair)))
            times = measure.take_turns(*contenders, **measure.turns(config))
            for kind, seconds in zip(ATTENTIONS, times, strict=True):
                row |= measure.spread(kind, seconds)
            ratio = row["fused_seconds_median"] / row["xla_seconds_median"]
            rows.append(row | {"seconds_ratio": ratio})
    notes = [f"{num_heads} heads, {width} wide"]
    notes += [_INTERPRETED] * (jax.default_backend() == "cpu")
    result = {"batch_size": config.train.batch_size, "notes": notes, "rows": rows}
    return result | {"num_heads": num_heads, "head_width": width}


def passes(kind: str) -> dict[str, Callable[[QKV, QKV], PyTree]]:
    """Return what sampled rows, rows with r = t, and rows with r < t compute of (q, k, v)."""

    def forward(qkv: QKV, tangents: QKV) -> Array:
        return attend(*qkv, kind=kind)

    def tangent(qkv: QKV, tangents: QKV) -> tuple[Array, Array]:
        return jax.jvp(lambda *qkv: attend(*qkv, kind=kind, forward_mode=True), qkv, tangents)

    def squares(qkv: QKV, tangents: QKV) -> Array:
        return jnp.sum(forward(qkv, tangents).astype(jnp.float32) ** 2)

    def meanflow(qkv: QKV, tangents: QKV) -> Array:
        out, derivative = tangent(qkv, tangents)
        return jnp.sum((out - jax.lax.stop_gradient(derivative)).astype(jnp.float32) ** 2)

    return {
        "forward": forward,
        "forward, gradient": jax.value_and_grad(squares),
        "forward, tangent": tangent,
        "forward, tangent, gradient": jax.value_and_grad(meanflow),
    }
