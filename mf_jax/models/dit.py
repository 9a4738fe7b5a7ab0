"""DiT: a transformer over image patches whose blocks are modulated by time and class (adaLN-zero).

Source: DiT, arXiv 2212.09748; two-time conditioning of MeanFlow, arXiv 2505.13447, appendix A;
decoupled conditioning, arXiv 2510.24474.
"""

import functools
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from mf_jax.flow.errors import BadInput
from mf_jax.flow.records import Condition, Prediction
from mf_jax.models.blocks import Transformer, run_blocks
from mf_jax.models.layers import (
    TIME_CONDITIONINGS,
    Attention,
    ConditionEmbedding,
    Image,
    Signal,
    Time,
    Tokens,
    at_least_float32,
    image_of,
    patches_of,
    sine_cosine_positions,
    xavier_dense,
    zero_dense,
)

DECOUPLED = "t|r"
"""The first blocks are told t and the last ones r, through one embedding.

A flow-matching network, told t alone, is then a flow map as it stands: u(z, t, t) = v.

Source: Decoupled MeanFlow, arXiv 2510.24474, section 3.
"""
DIT_TIME_CONDITIONINGS = (*TIME_CONDITIONINGS, DECOUPLED)


def num_r_blocks(depth: int, r_blocks: int) -> int:
    """Return how many of a decoupled network's blocks, the last ones, are told r.

    Args:
      r_blocks: wanted; 0 for a quarter of the blocks, rounded up.
    """
    last = r_blocks or -(-depth // 4)
    if not 0 < last < depth:
        few = "use a model.depth of 2 or more"
        fix = f"use 1 to {depth - 1}, or 0 for a quarter" if depth > 1 else few
        raise BadInput(
            f"model.r_blocks={r_blocks}: with model.time_conditioning={DECOUPLED} the last {last}"
            f" of {depth} blocks are told r, and one or more must be left for t; {fix}"
        )
    return last


def _normalise(x: Tokens) -> Tokens:
    """Apply LayerNorm without parameters, in float32."""
    x = at_least_float32(x)
    centred = x - jnp.mean(x, axis=-1, keepdims=True)
    return centred * jax.lax.rsqrt(jnp.mean(centred**2, axis=-1, keepdims=True) + 1e-6)


def _modulate(x: Tokens, shift: Float[Array, "b d"], scale: Float[Array, "b d"]) -> Tokens:
    return _normalise(x) * (1 + scale[:, None]) + shift[:, None]


class Block(nn.Module):
    """One transformer block: attention and perceptron, modulated and gated by the condition."""

    num_heads: int
    dtype: str
    attend: Callable

    @nn.compact
    def __call__(self, x: Tokens, c: Float[Array, "b d"]) -> Tokens:
        width, dtype = x.shape[-1], self.dtype
        modulation = zero_dense(6 * width, dtype=dtype, name="modulation")(nn.silu(c))
        shift1, scale1, gate1, shift2, scale2, gate2 = jnp.split(modulation, 6, axis=-1)
        attention = Attention(self.num_heads, dtype, self.attend, name="attention")
        x = x + gate1[:, None] * attention(_modulate(x, shift1, scale1))
        hidden = xavier_dense(4 * width, dtype=dtype, name="expand")(_modulate(x, shift2, scale2))
        out = xavier_dense(width, dtype=dtype, name="contract")(nn.gelu(hidden))
        return x + gate2[:, None] * out


class DiT(Transformer, kw_only=True):
    """Predict u(z, r, t) of images, latents or signals.

    Args:
      time_conditioning: one of `DIT_TIME_CONDITIONINGS`.
      r_blocks: see `num_r_blocks`, where time_conditioning is `DECOUPLED`.
    """

    takes = ("images", "signals")

    time_conditioning: str = "t,t-r"
    r_blocks: int = 0
    condition_size: int = 0

    @nn.compact
    def __call__(self, z: Image | Signal, *, r: Time, t: Time, condition: Condition) -> Prediction:
        if self.width % 4 or self.width % self.num_heads:
            raise BadInput(
                f"model.width={self.width}: must be divisible by 4 and by"
                f" model.num_heads={self.num_heads}"
            )
        p, dense = self.patch_size, functools.partial(zero_dense, dtype=self.dtype)
        patches = patches_of(z, p)
        x = xavier_dense(self.width, dtype=self.dtype, name="patch_embedding")(patches)
        grid = (size // p for size in z.shape[1:-1])
        positions = sine_cosine_positions(*grid, num_features=self.width)
        x = x + jnp.asarray(positions, self.dtype)
        conditions, c = self._conditions(r, t, condition)
        x = run_blocks(
            self, Block, x, conditions, path=self.path, forward_mode=condition.forward_mode
        )
        modulation = dense(2 * self.width, name="final_modulation")(nn.silu(c))
        shift, scale = jnp.split(modulation, 2, axis=-1)
        out = dense(patches.shape[-1], name="final")(_modulate(x, shift, scale))
        return Prediction(u=image_of(out, z.shape, p))

    def _conditions(self, r: Time, t: Time, condition: Condition) -> tuple[list, Array]:
        """Return the conditions of the blocks and of the output layer."""
        decoupled = self.time_conditioning == DECOUPLED
        conditioning = "t" if decoupled else self.time_conditioning
        embed = ConditionEmbedding(
            self.width,
            conditioning,
            self.num_classes,
            condition_size=self.condition_size,
            name="condition",
        )
        c = embed(r=r, t=t, labels=condition.labels)
        if not decoupled:
            return [c] * self.depth, c
        of_r = embed(r=r, t=r, labels=condition.labels)
        last = num_r_blocks(self.depth, self.r_blocks)
        return [c] * (self.depth - last) + [of_r] * last, of_r
