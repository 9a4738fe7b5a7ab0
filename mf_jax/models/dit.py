"""DiT: a transformer over image patches whose blocks are modulated by time and class (adaLN-zero).

Source: DiT, arXiv 2212.09748; with the two-time conditioning of MeanFlow, arXiv 2505.13447, appendix A.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from mf_jax.models.layers import (
    ConditionEmbedding,
    at_least_float32,
    sine_cosine_positions,
    xavier_dense,
    zero_dense,
)
from mf_jax.types import Condition, Prediction

DIT_SIZES = {  # depth, width, heads
    "digits": (4, 128, 2),
    "S": (12, 384, 6),
    "B": (12, 768, 12),
    "M": (16, 1024, 16),
    "L": (24, 1024, 16),
    "XL": (28, 1152, 16),
}


def _normalise(x: Float[Array, "b n d"]) -> Float[Array, "b n d"]:
    """Apply LayerNorm without parameters, in float32."""
    x = at_least_float32(x)
    centred = x - jnp.mean(x, axis=-1, keepdims=True)
    return centred * jax.lax.rsqrt(jnp.mean(centred**2, axis=-1, keepdims=True) + 1e-6)


def _modulate(
    x: Float[Array, "b n d"], shift: Float[Array, "b d"], scale: Float[Array, "b d"]
) -> Float[Array, "b n d"]:
    return _normalise(x) * (1 + scale[:, None]) + shift[:, None]


class Attention(nn.Module):
    """Multi-head self-attention; softmax in float32."""

    num_heads: int
    dtype: str

    @nn.compact
    def __call__(self, x: Float[Array, "b n d"]) -> Float[Array, "b n d"]:
        """Return the attended values, like x."""
        width = x.shape[-1]
        qkv = xavier_dense(3 * width, dtype=self.dtype, name="qkv")(x)
        q, k, v = jnp.moveaxis(qkv.reshape((*x.shape[:2], 3, self.num_heads, -1)), 2, 0)
        scores = jnp.einsum("bqhd,bkhd->bhqk", q * q.shape[-1] ** -0.5, k)
        weights = jax.nn.softmax(at_least_float32(scores)).astype(self.dtype)
        out = jnp.einsum("bhqk,bkhd->bqhd", weights, v).reshape(x.shape)
        return xavier_dense(width, dtype=self.dtype, name="out")(out)


class Block(nn.Module):
    """One transformer block: attention and perceptron, each modulated and gated by the condition."""

    num_heads: int
    dtype: str

    @nn.compact
    def __call__(self, x: Float[Array, "b n d"], c: Float[Array, "b d"]) -> Float[Array, "b n d"]:
        """Return x `[B, tokens, width]` after the block, given the condition c `[B, width]`."""
        width = x.shape[-1]
        modulation = zero_dense(6 * width, dtype=self.dtype, name="modulation")(nn.silu(c))
        shift1, scale1, gate1, shift2, scale2, gate2 = jnp.split(modulation, 6, axis=-1)
        attended = Attention(self.num_heads, self.dtype, name="attention")(_modulate(x, shift1, scale1))
        x = x + gate1[:, None] * attended
        hidden = xavier_dense(4 * width, dtype=self.dtype, name="expand")(_modulate(x, shift2, scale2))
        return x + gate2[:, None] * xavier_dense(width, dtype=self.dtype, name="contract")(nn.gelu(hidden))


class DiT(nn.Module):
    """Predict u(z, r, t) of images or latents.

    Args:
      patch_size: side of a patch, divides the height and width of z.
      depth: number of blocks.
      width: width of a token, divisible by 4 and by num_heads.
      num_heads: attention heads.
      num_classes: classes; 0 for an unconditional network.
      time_conditioning: a key of `layers.TIME_CONDITIONINGS`.
      dtype: of the computation, float32 or bfloat16; parameters, normalisation, softmax and time embeddings
        are float32 in any case.
    """

    patch_size: int
    depth: int
    width: int
    num_heads: int
    num_classes: int
    time_conditioning: str = "t,t-r"
    dtype: str = "float32"

    @nn.compact
    def __call__(
        self, z: Float[Array, "b h w c"], *, r: Float[Array, "b"], t: Float[Array, "b"], condition: Condition
    ) -> Prediction:
        """Return the average velocity, float32 like z `[B, H, W, C]`."""
        batch, height, width, channels = z.shape
        p, rows, columns = self.patch_size, height // self.patch_size, width // self.patch_size
        patches = z.reshape(batch, rows, p, columns, p, channels).swapaxes(2, 3)
        x = xavier_dense(self.width, dtype=self.dtype, name="patch_embedding")(
            patches.reshape(batch, rows * columns, p * p * channels)
        )
        x = x + jnp.asarray(sine_cosine_positions(rows, columns, self.width), self.dtype)
        c = ConditionEmbedding(self.width, self.time_conditioning, self.num_classes, name="condition")(
            r=r, t=t, labels=condition.labels
        )
        for i in range(self.depth):
            x = Block(self.num_heads, self.dtype, name=f"block_{i}")(x, c)
        shift, scale = jnp.split(
            zero_dense(2 * self.width, dtype=self.dtype, name="final_modulation")(nn.silu(c)), 2, axis=-1
        )
        out = zero_dense(p * p * channels, dtype=self.dtype, name="final")(_modulate(x, shift, scale))
        out = out.reshape(batch, rows, columns, p, p, channels).swapaxes(2, 3).reshape(z.shape)
        return Prediction(u=at_least_float32(out))
