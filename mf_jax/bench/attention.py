"""What attention of a network's heads costs in all the ways that training differentiates it, plain and fused."""

import functools
from collections.abc import Callable, Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree
from ml_collections import ConfigDict

from mf_jax.bench.measure import Contender, Result, Say, compile_program, spread, take_turns
from mf_jax.config import make_network
from mf_jax.data import Source
from mf_jax.errors import BadInput
from mf_jax.models import DataPrediction, DiT, InContextDiT
from mf_jax.models.attention import ATTENTIONS, attend

_INTERPRETED = (
    "fused: interpreted on cpu, in a few repeats; its times say nothing about a GPU or TPU"
)
_INTERPRETED_REPEATS = 3


def heads(network: nn.Module) -> tuple[int, int]:
    """Return how many heads the attention of a network has, and their width.

    Raises:
      BadInput: if it has none of the attention that can be fused.
    """
    network = network.network if isinstance(network, DataPrediction) else network
    if not isinstance(network, DiT | InContextDiT):
        raise BadInput(
            "bench.what='attention': only model.name=dit and in_context_dit have it; use bench.what=step"
        )
    return network.num_heads, network.width // network.num_heads


def bench_attention(config: ConfigDict, source: Source, say: Say) -> Result:
    """Measure attention of the lengths `bench.tokens`, on one device.

    Args:
      config: checked.
      source: for the shape and the classes, which decide the network.
      say: is told what is being done.

    Returns:
      A row for each length and pass, and notes.
    """
    num_heads, width = heads(make_network(config, source.spec))
    is_interpreted = jax.default_backend() == "cpu"
    turns = {key: config.bench[key] for key in ("repeats", "dropped")}
    if is_interpreted:
        turns = {key: min(num, _INTERPRETED_REPEATS) for key, num in turns.items()}
    rows = []
    for tokens in config.bench.tokens:
        shape = (config.train.batch_size, tokens, num_heads, width)
        keys = jax.random.split(jax.random.key(config.seed), 6)
        q, *others = (jax.random.normal(key, shape, config.model.dtype) for key in keys)
        inputs = (q * width**-0.5, *others)
        for name, function in PASSES.items():
            say(f"{tokens} tokens: {name}")
            rows.append({"tokens": tokens, "pass": name, **_compare(function, inputs, turns)})
    return {
        "batch_size": config.train.batch_size,
        "num_heads": num_heads,
        "head_width": width,
        **turns,
        "notes": [f"{num_heads} heads, {width} wide", *[_INTERPRETED] * is_interpreted],
        "rows": rows,
    }


def _compare(
    function: Callable[..., PyTree],
    inputs: tuple[Float[Array, "b n heads d"], ...],
    turns: Mapping[str, int],
) -> Result:
    """Return a row about one pass of both kinds of attention."""
    programs = [
        compile_program(jax.jit(functools.partial(function, kind)), *inputs) for kind in ATTENTIONS
    ]
    contenders = [
        Contender(lambda: inputs, lambda inputs, run=program.executable: run(*inputs))
        for program in programs
    ]
    row = {}
    for kind, program, seconds in zip(
        ATTENTIONS, programs, take_turns(contenders, **turns), strict=True
    ):
        row |= spread(kind, seconds) | {
            f"{kind}_{key}": value for key, value in program.memory.items()
        }
    row["seconds_ratio"] = row["fused_seconds_median"] / row["xla_seconds_median"]
    if row["xla_temp_bytes"]:
        row["temp_ratio"] = row["fused_temp_bytes"] / row["xla_temp_bytes"]
    return row


def _sum_of_squares(x: Array) -> Array:
    return jnp.sum(x.astype(jnp.float32) ** 2)


def _forward(kind: str, q: Array, k: Array, v: Array, *tangents: Array) -> PyTree:
    return attend(q, k, v, kind=kind)


def _gradient(kind: str, q: Array, k: Array, v: Array, *tangents: Array) -> PyTree:
    return jax.value_and_grad(lambda qkv: _sum_of_squares(attend(*qkv, kind=kind)))((q, k, v))


def _tangent(kind: str, q: Array, k: Array, v: Array, *tangents: Array) -> PyTree:
    return jax.jvp(functools.partial(attend, kind=kind, forward_mode=True), (q, k, v), tangents)


def _meanflow(kind: str, q: Array, k: Array, v: Array, *tangents: Array) -> PyTree:
    def loss(qkv: tuple[Array, ...]) -> Array:
        out, tangent = _tangent(kind, *qkv, *tangents)
        return _sum_of_squares(out - jax.lax.stop_gradient(tangent))

    return jax.value_and_grad(loss)((q, k, v))


PASSES = {
    "forward": _forward,
    "forward, gradient": _gradient,
    "forward, tangent": _tangent,
    "forward, tangent, gradient": _meanflow,
}
"""What is computed: of rows that are sampled, of rows with r = t, and of rows with r < t without and with training."""
