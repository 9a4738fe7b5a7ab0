"""DiT: a transformer over image patches whose blocks are modulated by time and class (adaLN-zero).

Source: DiT, arXiv 2212.09748; with the two-time conditioning of MeanFlow, arXiv 2505.13447, appendix A, and the
decoupled one of arXiv 2510.24474.
"""

import functools
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from mf_jax.errors import BadInput
from mf_jax.flow.records import Condition, Prediction
from mf_jax.models.attention import attend
from mf_jax.models.blocks import run_blocks
from mf_jax.models.layers import (
    TIME_CONDITIONINGS,
    Attention,
    ConditionEmbedding,
    Network,
    at_least_float32,
    sine_cosine_positions,
    xavier_dense,
    zero_dense,
)

DIT_SIZES = {  # depth, width, heads
    "digits": (4, 128, 2),
    "S": (12, 384, 6),
    "B": (12, 768, 12),
    "M": (16, 1024, 16),
    "L": (24, 1024, 16),
    "XL": (28, 1152, 16),
}

DECOUPLED = "t|r"
"""The first blocks are told t and the last ones r, through one embedding: a flow-matching network, told t alone,
is a flow map as it stands, u(z, t, t) = v. Source: Decoupled MeanFlow, arXiv 2510.24474, section 3."""

DIT_TIME_CONDITIONINGS = (*TIME_CONDITIONINGS, DECOUPLED)


def num_r_blocks(depth: int, r_blocks: int) -> int:
    """Return how many of the last blocks of a decoupled network are told r.

    Args:
      depth: number of blocks.
      r_blocks: wanted; 0 for a quarter of the blocks, rounded up.

    Raises:
      BadInput: if there are not that many, or none is left to be told t.
    """
    last = r_blocks or -(-depth // 4)
    if not 0 < last < depth:
        fix = (
            f"use 1 to {depth - 1}, or 0 for a quarter"
            if depth > 1
            else "use a model.depth of 2 or more"
        )
        raise BadInput(
            f"model.r_blocks={r_blocks}: with model.time_conditioning={DECOUPLED} the last {last} of {depth} blocks"
            f" are told r, and one or more must be left for t; {fix}"
        )
    return last


def _normalise(x: Float[Array, "b n d"]) -> Float[Array, "b n d"]:
    """Apply LayerNorm without parameters, in float32."""
    x = at_least_float32(x)
    centred = x - jnp.mean(x, axis=-1, keepdims=True)
    return centred * jax.lax.rsqrt(jnp.mean(centred**2, axis=-1, keepdims=True) + 1e-6)


def _modulate(
    x: Float[Array, "b n d"], shift: Float[Array, "b d"], scale: Float[Array, "b d"]
) -> Float[Array, "b n d"]:
    return _normalise(x) * (1 + scale[:, None]) + shift[:, None]


class Block(nn.Module):
    """One transformer block: attention and perceptron, each modulated and gated by the condition."""

    num_heads: int
    dtype: str
    attend: Callable

    @nn.compact
    def __call__(self, x: Float[Array, "b n d"], c: Float[Array, "b d"]) -> Float[Array, "b n d"]:
        """Return x `[B, tokens, width]` after the block, given the condition c `[B, width]`."""
        width = x.shape[-1]
        modulation = zero_dense(6 * width, dtype=self.dtype, name="modulation")(nn.silu(c))
        shift1, scale1, gate1, shift2, scale2, gate2 = jnp.split(modulation, 6, axis=-1)
        attention = Attention(self.num_heads, self.dtype, self.attend, name="attention")
        attended = attention(_modulate(x, shift1, scale1))
        x = x + gate1[:, None] * attended
        hidden = xavier_dense(4 * width, dtype=self.dtype, name="expand")(
            _modulate(x, shift2, scale2)
        )
        return x + gate2[:, None] * xavier_dense(width, dtype=self.dtype, name="contract")(
            nn.gelu(hidden)
        )


class DiT(Network):
    """Predict u(z, r, t) of images or latents.

    Args:
      patch_size: side of a patch, divides the height and width of z.
      depth: number of blocks.
      width: width of a token, divisible by 4 and by num_heads.
      num_heads: attention heads.
      num_classes: classes; 0 for an unconditional network.
      time_conditioning: one of `DIT_TIME_CONDITIONINGS`.
      r_blocks: blocks told r where time_conditioning is `DECOUPLED`; 0 for a quarter of them, rounded up.
      dtype: of the computation, float32 or bfloat16; parameters, normalisation, softmax and time embeddings
        are float32 in any case.
      attention: a key of `ATTENTIONS`.
      remat, scan: as `run_blocks` takes them.
    """

    patch_size: int
    depth: int
    width: int
    num_heads: int
    num_classes: int
    time_conditioning: str = "t,t-r"
    r_blocks: int = 0
    dtype: str = "float32"
    attention: str = "xla"
    remat: str = "none"
    scan: bool = False

    @nn.compact
    def __call__(
        self,
        z: Float[Array, "b h w c"],
        *,
        r: Float[Array, "b"],
        t: Float[Array, "b"],
        condition: Condition,
    ) -> Prediction:
        """Return the average velocity, float32 like z `[B, H, W, C]`."""
        batch, height, width, channels = z.shape
        p, rows, columns = self.patch_size, height // self.patch_size, width // self.patch_size
        patches = z.reshape(batch, rows, p, columns, p, channels).swapaxes(2, 3)
        x = xavier_dense(self.width, dtype=self.dtype, name="patch_embedding")(
            patches.reshape(batch, rows * columns, p * p * channels)
        )
        x = x + jnp.asarray(sine_cosine_positions(rows, columns, self.width), self.dtype)
        decoupled = self.time_conditioning == DECOUPLED
        embed = ConditionEmbedding(
            self.width,
            "t" if decoupled else self.time_conditioning,
            self.num_classes,
            name="condition",
        )
        c = embed(r=r, t=t, labels=condition.labels)
        conditions = [c] * self.depth
        if decoupled:
            c = embed(r=r, t=r, labels=condition.labels)
            last = num_r_blocks(self.depth, self.r_blocks)
            conditions[-last:] = [c] * last
        fields = {
            "num_heads": self.num_heads,
            "dtype": self.dtype,
            "attend": functools.partial(
                attend, kind=self.attention, forward_mode=condition.forward_mode
            ),
        }
        x = run_blocks(
            Block, x, conditions, path=self.path, remat=self.remat, scan=self.scan, **fields
        )
        shift, scale = jnp.split(
            zero_dense(2 * self.width, dtype=self.dtype, name="final_modulation")(nn.silu(c)),
            2,
            axis=-1,
        )
        out = zero_dense(p * p * channels, dtype=self.dtype, name="final")(
            _modulate(x, shift, scale)
        )
        out = out.reshape(batch, rows, columns, p, p, channels).swapaxes(2, 3).reshape(z.shape)
        return Prediction(u=at_least_float32(out))
