"""Attention of every token to every token, in plain expressions that differentiate in any way."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from mf_jax.flow.errors import check_known

ATTENTIONS = ("xla", "plain", "fused")
_LONG = 256  # tokens from which on one head at a time is quicker, measured on CPUs
Heads = Float[Array, "b n heads d"]


def attend(q: Heads, k: Heads, v: Heads, *, kind: str, forward_mode: bool = False) -> Heads:
    """Return softmax(q k^T) v of each head, the softmax in float32 or wider.

    Args:
      q: queries, already multiplied by D^-0.5.
      kind: one of `ATTENTIONS`. `plain` computes all weights at once, `xla` does so but for long
        sequences on CPUs; `fused` is experimental.
      forward_mode: see `fused_attention.fused_attention`; the others do not need it.
    """
    check_known("kind", kind, ATTENTIONS)
    if kind == "fused":
        from mf_jax.models.fused_attention import fused_attention  # imports Pallas

        return fused_attention(q, k, v, forward_mode=forward_mode)
    length, is_slow = q.shape[1], jax.default_backend() == "cpu"
    return (_by_heads if kind == "xla" and is_slow and length >= _LONG else _plain)(q, k, v)


def _plain(q: Heads, k: Heads, v: Heads) -> Heads:
    weights = _weights(jnp.einsum("bqhd,bkhd->bhqk", q, k))
    return jnp.einsum("bhqk,bkhd->bqhd", weights, v)


def _weights(scores: Float[Array, "... q k"]) -> Float[Array, "... q k"]:
    wide = scores.astype(jnp.promote_types(scores.dtype, jnp.float32))
    return jax.nn.softmax(wide).astype(scores.dtype)


def _by_heads(q: Heads, k: Heads, v: Heads) -> Heads:
    """Attend head by head, so that weights and their tangents stay in the cache of a CPU.

    The gradient computes weights again instead of reading them from memory. Products are of plain
    matrices: with axes for batch and heads, even of length 1, they take twice as long.
    """
    batch, length, heads, size = q.shape
    apart = [x.swapaxes(1, 2).reshape(-1, length, size) for x in (q, k, v)]
    out = jax.lax.map(jax.checkpoint(lambda qkv: _weights(qkv[0] @ qkv[1].T) @ qkv[2]), apart)
    return out.reshape(batch, heads, length, size).swapaxes(1, 2)
