"""DiT: a transformer over image patches whose blocks are modulated by time and class (adaLN-zero).

Source: DiT, arXiv 2212.09748; two-time conditioning of MeanFlow, arXiv 2505.13447, appendix A;
decoupled conditioning, arXiv 2510.24474; `norm="rms"` and `told_guidance`, terminal velocity
matching, arXiv 2511.19797; `logit_power=-1` and `STEPS`, Shortcut models, arXiv 2410.12557.
"""

import functools
import math
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from mf_jax.flow.errors import BadInput, check_known
from mf_jax.flow.paths import per_row
from mf_jax.flow.records import Condition, Prediction
from mf_jax.models import layers
from mf_jax.models.blocks import Transformer, run_blocks
from mf_jax.models.layers import Image, Signal, Time, Tokens, Vectors

DECOUPLED = "t|r"
"""The first blocks are told t and the last ones r, through one embedding.

A flow-matching network, told t alone, is then a flow map as it stands: u(z, t, t) = v.

Source: Decoupled MeanFlow, arXiv 2510.24474, section 3.
"""
STEPS = "t,log2"
"""Told t and log2 of how many steps of t - r make 1, at most `DiT.levels`, the number at r = t."""
NORMS = ("layer", "rms")
"""LayerNorm of tokens; RMSNorm of them, modulation vectors and, weighted, queries and keys."""


def num_r_blocks(depth: int, r_blocks: int) -> int:
    """Return how many blocks, the last ones, are told r; 0 asks for a quarter, rounded up."""
    last = r_blocks or -(-depth // 4)
    if not 0 < last < depth:
        allowed = f"must be within [1, {depth - 1}], or 0 for a quarter of 2 blocks or more"
        raise BadInput(f"model.r_blocks={r_blocks}: {allowed}; model.depth={depth}")
    return last


def _normalise(x: Float[Array, "... d"], norm: str) -> Float[Array, "... d"]:
    """Apply a norm without parameters, in float32."""
    x = layers.at_least_float32(x)
    if norm == "layer":
        x = x - jnp.mean(x, axis=-1, keepdims=True)
    return x * jax.lax.rsqrt(jnp.mean(x**2, axis=-1, keepdims=True) + 1e-6)


def _vectors(modulation: Float[Array, "b n"], num: int, norm: str) -> list[Vectors]:
    vectors = jnp.split(modulation, num, axis=-1)
    if norm == "rms":
        vectors = [_normalise(vector, norm).astype(vector.dtype) for vector in vectors]
    return vectors


def _modulate(x: Tokens, shift: Vectors, scale: Vectors, norm: str) -> Tokens:
    """Normalise and modulate; on CPUs gradients do it again, which is faster than to keep all."""

    def modulated(x: Tokens, shift: Vectors, scale: Vectors) -> Tokens:
        return _normalise(x, norm) * (1 + scale[:, None]) + shift[:, None]

    if jax.default_backend() == "cpu":
        modulated = jax.checkpoint(modulated)
    return modulated(x, shift, scale)


class Block(nn.Module):
    """One transformer block: attention and perceptron, modulated and gated by the condition."""

    num_heads: int
    dtype: str
    attend: Callable
    norm: str = "layer"
    logit_power: float = -0.5

    @nn.compact
    def __call__(self, x: Tokens, c: Vectors) -> Tokens:
        width, dtype, norm = x.shape[-1], self.dtype, self.norm
        modulation = layers.zero_dense(6 * width, dtype=dtype, name="modulation")(nn.silu(c))
        shift1, scale1, gate1, shift2, scale2, gate2 = _vectors(modulation, 6, norm)
        how = {"power": self.logit_power, "qk_norm": norm == "rms"}
        attention = layers.Attention(self.num_heads, dtype, self.attend, **how, name="attention")
        x = x + gate1[:, None] * attention(_modulate(x, shift1, scale1, norm))
        modulated = _modulate(x, shift2, scale2, norm)
        hidden = layers.xavier_dense(4 * width, dtype=dtype, name="expand")(modulated)
        out = layers.xavier_dense(width, dtype=dtype, name="contract")(nn.gelu(hidden))
        return layers.kept_in_memory(x + gate2[:, None] * out, c)


def _omega(condition: Condition, t: Time) -> Time:
    """Return the scale of guidance, 1 where nothing is told."""
    return jnp.ones_like(t) if condition.guidance is None else condition.guidance.omega


class DiT(Transformer, kw_only=True):
    """Predict u(z, r, t) of images, latents or signals."""

    takes = ("images", "signals")
    guidance_inputs = ("omega",)

    time_conditioning: str = "t,t-r"  # one of TIME_CONDITIONINGS, DECOUPLED or STEPS
    r_blocks: int = 0  # see num_r_blocks, where time_conditioning is DECOUPLED
    condition_size: int = 0
    levels: int = 7  # where time_conditioning is STEPS; the smallest step is 2^-levels
    norm: str = "layer"  # one of NORMS
    logit_power: float = -0.5  # see Attention.power
    told_guidance: bool = False  # it is told 1 / omega, and its output is multiplied by omega

    @nn.compact
    def __call__(self, z: Image | Signal, *, r: Time, t: Time, condition: Condition) -> Prediction:
        self.check_width(math.lcm(4, self.num_heads))
        check_known("model.norm", self.norm, NORMS)
        p, dense = self.patch_size, functools.partial(layers.zero_dense, dtype=self.dtype)
        patches = layers.patches_of(z, p)
        x = layers.xavier_dense(self.width, dtype=self.dtype, name="patch_embedding")(patches)
        grid = (size // p for size in z.shape[1:-1])
        positions = layers.sine_cosine_positions(*grid, num_features=self.width)
        x = x + jnp.asarray(positions, self.dtype)
        conditions, c = self._conditions(r, t, condition)
        how = {"path": self.path, "forward_mode": condition.forward_mode}
        how |= {"norm": self.norm, "logit_power": self.logit_power}
        x = run_blocks(self, Block, x, conditions, **how)
        modulation = dense(2 * self.width, name="final_modulation")(nn.silu(c))
        shift, scale = _vectors(modulation, 2, self.norm)
        out = dense(patches.shape[-1], name="final")(_modulate(x, shift, scale, self.norm))
        u = layers.image_of(out, z.shape, p)
        return Prediction(u * per_row(_omega(condition, t), u) if self.told_guidance else u)

    def _conditions(self, r: Time, t: Time, condition: Condition) -> tuple[list, Array]:
        """Return the conditions of the blocks and of the output layer."""
        kind = self.time_conditioning
        if kind == STEPS:  # in the place of t - r
            r = t + jnp.log2(jnp.maximum(t - r, 2.0**-self.levels))
        told = {DECOUPLED: "t", STEPS: "t,t-r"}.get(kind, kind)
        sizes = self.width, told, self.num_classes, self.condition_size
        embed = layers.ConditionEmbedding(*sizes, name="condition")
        guidance = 0
        if self.told_guidance:
            embed_scale = layers.ScalarEmbedding(self.width, name="guidance_embedding")
            guidance = embed_scale(1 / _omega(condition, t))
        c = embed(r=r, t=t, labels=condition.labels) + guidance
        if kind != DECOUPLED:
            return [c] * self.depth, c
        of_r = embed(r=r, t=r, labels=condition.labels) + guidance
        last = num_r_blocks(self.depth, self.r_blocks)
        return [c] * (self.depth - last) + [of_r] * last, of_r
