"""Attention of every token to every token, in plain expressions that differentiate in any way."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from mf_jax.flow.errors import check_known

ATTENTIONS = ("xla", "fused")
Heads = Float[Array, "b n heads d"]


def attend(q: Heads, k: Heads, v: Heads, *, kind: str, forward_mode: bool = False) -> Heads:
    """Return softmax(q k^T) v of each head, the softmax in float32 or wider.

    Args:
      q: queries, already multiplied by D^-0.5.
      kind: one of `ATTENTIONS`; `fused` is experimental.
      forward_mode: see `fused_attention.fused_attention`; `xla` does not need it.
    """
    check_known("kind", kind, ATTENTIONS)
    if kind == "fused":
        from mf_jax.models.fused_attention import fused_attention  # imports Pallas

        return fused_attention(q, k, v, forward_mode=forward_mode)
    scores = jnp.einsum("bqhd,bkhd->bhqk", q, k)
    wide = scores.astype(jnp.promote_types(scores.dtype, jnp.float32))
    weights = jax.nn.softmax(wide).astype(q.dtype)
    return jnp.einsum("bhqk,bkhd->bqhd", weights, v)
