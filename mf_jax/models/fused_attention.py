"""Experimental: attention without the matrix of weights in memory, and a kernel for its tangent.

The kernels have run interpreted on CPUs only. Nobody has measured them on a GPU or a TPU yet.

With S = q k^T, P = softmax(S) and O = P v, the tangent of attention is

    dS = dq k^T + q dk^T
    dO = (P * (dS - rowsum(P * dS))) v + P dv

One kernel sums it up over blocks of keys. It works with the largest S and the mean of dS so far
until it knows the final ones. No gradient flows through a tangent, as MeanFlow wants it.

Source: FlashAttention, arXiv 2205.14135; its tangent, sCM, arXiv 2410.11081.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero, linear_call
from jax.experimental import pallas as pl
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array

from mf_jax.models.attention import Heads


def fused_attention(q: Heads, k: Heads, v: Heads, *, forward_mode: bool) -> Heads:
    """See `attention.attend`; with forward_mode `jax.jvp` can differentiate the result.

    Gradients then flow through values alone. Where there is no jvp they cost one more attention.
    """
    return (_with_tangent if forward_mode else _fused)(q, k, v)


@jax.custom_jvp
def _with_tangent(q: Array, k: Array, v: Array) -> Array:
    return _fused(q, k, v)


@functools.partial(_with_tangent.defjvp, symbolic_zeros=True)
def _tangent_of_fused(primals: tuple, tangents: tuple) -> tuple[Array, Array]:
    changing = tuple(None if isinstance(t, SymbolicZero) else t for t in tangents)
    return _fused(*primals), _held_tangent(primals, changing)


@jax.custom_jvp
def _held_tangent(primals: tuple, tangents: tuple) -> Array:
    """Return the tangent by the kernel; its transpose serves reverse mode without forward mode.

    Tangents are None where they are zero: all that a `linear_call` is linear in must change.
    """

    def run(primals: tuple, tangents: tuple) -> Array:
        filled = (jnp.zeros_like(primals[0]) if t is None else t for t in tangents)
        return _on_each_device(attention_tangent, 6)(*primals, *filled)

    def transpose(primals: tuple, gradient: Array) -> tuple:
        gradients = jax.vjp(_fused, *primals)[1](gradient)
        return tuple(None if t is None else g for t, g in zip(tangents, gradients, strict=True))

    return linear_call(run, transpose, primals, tangents)


@_held_tangent.defjvp
def _no_tangent(inputs: tuple, _: tuple) -> tuple[Array, Array]:
    out = _held_tangent(*inputs)
    return out, jnp.zeros_like(out)


def _fused(q: Array, k: Array, v: Array) -> Array:
    """Return the fastest attention with a gradient that backend, type and shape allow."""
    backend, length, head_size = jax.default_backend(), q.shape[1], q.shape[3]
    if backend == "gpu" and q.dtype in (jnp.bfloat16, jnp.float16) and head_size <= 128:
        return _cudnn(q, k, v)
    # Padding by more than half of the length costs more than JAX's flash attention saves.
    if backend == "tpu" and head_size <= 128 and 128 * pl.cdiv(length, 128) <= 1.5 * length:
        return _with_gradient(_flash_on_tpu)(q, k, v)
    return _with_gradient(_dot_product)(q, k, v)


def _dot_product(q: Array, k: Array, v: Array, implementation: str = "xla") -> Array:
    return jax.nn.dot_product_attention(q, k, v, scale=1.0, implementation=implementation)


def _cudnn(*inputs: Array) -> Array:
    size = inputs[0].shape[3]
    padded = (jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, -size % 8))) for x in inputs)
    return _dot_product(*padded, "cudnn")[..., :size]


def _flash_on_tpu(q: Array, k: Array, v: Array) -> Array:
    from jax.experimental.pallas.ops.tpu.flash_attention import SegmentIds, flash_attention

    batch, length = q.shape[:2]
    padded = 128 * pl.cdiv(length, 128)
    # A token attends to its own segment alone; the padding is one.
    segment = jnp.broadcast_to(jnp.arange(padded) >= length, (batch, padded)).astype(jnp.int32)
    segments = SegmentIds(q=segment, kv=segment) if padded > length else None
    inputs = (_heads_first(x, padded, x.shape[3]) for x in (q, k, v))
    out = flash_attention(*inputs, segment_ids=segments)
    return out.swapaxes(1, 2)[:, :length]


@functools.cache
def _with_gradient(attention: Callable) -> Callable:
    """Return an attention that computes its weights again for its gradient, to keep none."""
    forward = _on_each_device(attention, 3)
    backward = _on_each_device(lambda q, k, v, g: jax.vjp(attention, q, k, v)[1](g), 4, 3)
    both = jax.custom_vjp(forward)
    both.defvjp(
        lambda *inputs: (forward(*inputs), inputs),
        lambda inputs, gradient: backward(*inputs, gradient),
    )
    return both


@functools.cache
def _on_each_device(function: Callable, num_in: int, num_out: int = 1) -> Callable:
    """Return a function that each device computes for the rows and heads it has."""

    # XLA cannot see into a kernel: it would give every device the whole batch.
    def partition(mesh: Any, inputs: tuple, outputs: Any) -> tuple:
        rows, _, heads, _ = inputs[0].sharding.spec
        sharding = NamedSharding(mesh, PartitionSpec(rows, None, heads, None))
        return mesh, function, jax.tree.map(lambda _: sharding, outputs), (sharding,) * num_in

    rule = f"{', '.join(['b n h d'] * num_in)} -> {', '.join(['b n h d'] * num_out)}"
    split = custom_partitioning(lambda *inputs: function(*inputs))
    split.def_partition(partition, sharding_rule=rule, need_replication_factors=("n", "d"))
    return split


def attention_tangent(
    *inputs: Heads, backend: str | None = None, interpret: bool | None = None
) -> Heads:
    """Return the tangent of attention, which itself cannot be differentiated.

    Heads are laid before tokens, and padded to whole blocks. All tokens of a head are in the fast
    memory of a TPU at once: 7 MiB for 1,024 tokens of 128 float32.

    Args:
      inputs: q, k, v and their tangents dq, dk, dv.
      backend: whose kernel, gpu (Triton) or tpu (Mosaic); None for the default backend's, on a
        CPU the TPU's.
      interpret: whether to run the kernel as plain operations; None for on a CPU alone.
    """
    here, (batch, length, heads, head_size) = jax.default_backend(), inputs[0].shape
    wide, num_queries = head_size, min(128, _power_of_2(length))
    num_keys, order, options = num_queries, 1, {}
    if (backend or here) == "gpu":
        from jax.experimental.pallas import triton

        # Triton keeps 64 queries and 32 keys, of at most 16 KiB an input, nearly without spilling,
        # and within the 99 KiB of shared memory of smaller GPUs.
        wide = _power_of_2(head_size)
        num_queries = min(64, num_queries, max(16, 2**14 // (wide * inputs[0].dtype.itemsize)))
        num_keys, order = max(16, num_queries // 2), -1  # the first axis runs side by side
        warps = 4 if wide <= 64 else 8
        options["compiler_params"] = triton.CompilerParams(num_warps=warps, num_stages=2)
    padded = num_queries * pl.cdiv(length, num_queries)
    spec = pl.BlockSpec((None, None, padded, wide), lambda *at: (*at[::order][:2], 0, 0))
    run = pl.pallas_call(
        functools.partial(_kernel, 1 + order, length, num_queries, num_keys),
        grid=(batch, heads, padded // num_queries)[::order],
        in_specs=[spec] * 6,
        out_specs=spec,
        out_shape=jax.ShapeDtypeStruct((batch, heads, padded, wide), inputs[0].dtype),
        interpret=here == "cpu" if interpret is None else interpret,
        name="attention_tangent",
        **options,
    )
    out = run(*(_heads_first(x, padded, wide) for x in inputs))
    return out.swapaxes(1, 2)[:, :length, :, :head_size]


def _power_of_2(size: int) -> int:
    """Return the next power of 2, at least 16: the smallest side of a matrix product in Triton."""
    return max(16, pl.next_power_of_2(size))


def _heads_first(x: Array, length: int, size: int) -> Array:
    more = (length - x.shape[1], size - x.shape[3])
    return jnp.pad(x.swapaxes(1, 2), ((0, 0), (0, 0), (0, more[0]), (0, more[1])))


def _kernel(axis: int, length: int, num_queries: int, num_keys: int, *refs: Any) -> None:
    """Write the tangent of a block of queries; each ref holds all tokens of a head of a row."""
    q_ref, k_ref, v_ref, dq_ref, dk_ref, dv_ref, out_ref = refs
    first = pl.multiple_of(pl.program_id(axis) * num_queries, num_queries)
    block = (pl.ds(first, num_queries), slice(None))
    q, dq = q_ref[block], dq_ref[block]

    def add(i: Array, sums: tuple[Array, ...]) -> tuple[Array, ...]:
        top, total, mean, value, change = sums
        start = pl.multiple_of(i * num_keys, num_keys)
        keys = pl.ds(start, num_keys)
        k, v, dk, dv = (ref[keys, :] for ref in (k_ref, v_ref, dk_ref, dv_ref))
        scores, slopes = _times(q, k, axis=1), _times(dq, k, axis=1) + _times(q, dk, axis=1)
        key = start + jax.lax.broadcasted_iota(jnp.int32, (1, num_keys), 1)
        scores = jnp.where(key < length, scores, -jnp.inf)
        new_top = jnp.maximum(top, scores.max(axis=1, keepdims=True))
        weights, rescale = jnp.exp(scores - new_top), jnp.exp(top - new_top)
        total, value, change = rescale * total, rescale * value, rescale * change
        new_total = total + weights.sum(axis=1, keepdims=True)
        new_mean = (total * mean + (weights * slopes).sum(axis=1, keepdims=True)) / new_total
        # Any number subtracted from all slopes leaves dO as it is; their mean keeps small numbers
        # before they are rounded to v's type.
        centred = (weights * (slopes - new_mean)).astype(v.dtype)
        weights = weights.astype(v.dtype)
        change += (mean - new_mean) * value + _times(centred, v) + _times(weights, dv)
        return new_top, new_total, new_mean, value + _times(weights, v), change

    wide = jnp.promote_types(q.dtype, jnp.float32)
    per_query, like_q = jnp.zeros((num_queries, 1), wide), jnp.zeros(q.shape, wide)
    sums = (per_query - jnp.inf, per_query, per_query, like_q, like_q)
    _, total, _, _, change = jax.lax.fori_loop(0, pl.cdiv(length, num_keys), add, sums)
    out_ref[block] = (change / total).astype(q.dtype)


def _times(a: Array, b: Array, *, axis: int = 0) -> Array:
    """Return the product of two matrices, over the last axis of a and the given one of b."""
    wide = jnp.promote_types(a.dtype, jnp.float32)
    return jax.lax.dot_general(a, b, (((1,), (axis,)), ((), ())), preferred_element_type=wide)
