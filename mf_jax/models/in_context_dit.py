"""InContextDiT: a transformer that is told class, guidance and time by tokens before the patches.

In place of modulation (adaLN) it has RMSNorm, normalised queries and keys, rotary positions, SwiGLU
and vector gates that start at zero. Its last blocks may exist twice, for u and for v.

Source: improved MeanFlow, arXiv 2512.02012, section 4.3; the options for pixels from pixel
MeanFlow, arXiv 2601.22158.
"""

import functools
from collections.abc import Callable

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Shaped

from mf_jax.flow.errors import check_known, check_within
from mf_jax.flow.records import Condition, GuidanceScale, Prediction
from mf_jax.models import layers
from mf_jax.models.blocks import Transformer, run_blocks
from mf_jax.models.layers import LONGEST_PERIOD, Image, Time, Tokens

POSITIONS = ("sequence", "grid")
"""`sequence`: rotary by a token's number, prefix included.

`grid`: rotary by a patch's row and column, and a learned embedding of every token's number.
"""
Turns = Float[Array, "2 n f"]
"""Cosine and sine of the angles by which each token turns its queries and keys."""
_NUM_CLASS_TOKENS = 8
_NUM_SCALAR_TOKENS = {"omega": 4, "t_min": 2, "t_max": 2, "h": 4}  # in this order, after the class
_BLOCK_INIT = nn.initializers.variance_scaling(0.32**2, "fan_in", "normal")
_linear = functools.partial(nn.Dense, use_bias=False, kernel_init=_BLOCK_INIT)
_SCALAR_INIT = nn.initializers.variance_scaling(1.0, "fan_in", "normal")


def _frequencies(num: int) -> Float[np.ndarray, "f"]:
    return LONGEST_PERIOD ** (-np.arange(num) / num)


def rotary_angles(
    positions: str, *, num_prefix: int, rows: int, columns: int, head_width: int
) -> Float[np.ndarray, "n f"]:
    """Return the angle by which each token turns each pair of features of a query or key.

    On a grid the prefix does not turn, the first half of the pairs turns by row, the second by
    column. Source: RoFormer, arXiv 2104.09864.
    """
    if positions == "sequence":
        return np.outer(np.arange(num_prefix + rows * columns), _frequencies(head_width // 2))
    row, column = np.divmod(np.arange(rows * columns), columns)
    frequencies = _frequencies(head_width // 4)
    angles = np.concatenate([np.outer(row, frequencies), np.outer(column, frequencies)], axis=1)
    return np.pad(angles, ((num_prefix, 0), (0, 0)))


def _rotate(x: Float[Array, "b n heads d"], turns: Turns) -> Float[Array, "b n heads d"]:
    """Turn each pair of neighbouring features."""
    cos, sin = turns.astype(x.dtype)[:, :, None]
    a, b = x[..., 0::2], x[..., 1::2]
    return jnp.stack([a * cos - b * sin, a * sin + b * cos], axis=-1).reshape(x.shape)


class RotaryAttention(nn.Module):
    """Self-attention with normalised, rotated queries and keys; both computed in float32."""

    num_heads: int
    dtype: str
    attend: Callable

    @nn.compact
    def __call__(self, x: Tokens, turns: Turns) -> Tokens:
        linear = functools.partial(_linear, x.shape[-1], dtype=self.dtype)
        heads = (*x.shape[:2], self.num_heads, -1)
        q, k, v = (linear(name=name)(x).reshape(heads) for name in ("query", "key", "value"))
        q = _rotate(nn.RMSNorm(name="query_norm")(q), turns) * q.shape[-1] ** -0.5
        k = _rotate(nn.RMSNorm(name="key_norm")(k), turns)
        out = self.attend(q.astype(self.dtype), k.astype(self.dtype), v)
        return linear(name="out")(out.reshape(x.shape))


class GatedBlock(nn.Module):
    """One transformer block: attention and SwiGLU, each with a gate per feature, zero at first."""

    num_heads: int
    dtype: str
    attend: Callable

    @nn.compact
    def __call__(self, x: Tokens, turns: Turns) -> Tokens:
        width, linear = x.shape[-1], functools.partial(_linear, dtype=self.dtype)
        attention_gate, perceptron_gate = (
            self.param(name, nn.initializers.zeros, (width,)).astype(self.dtype)
            for name in ("attention_gate", "perceptron_gate")
        )
        attention = RotaryAttention(self.num_heads, self.dtype, self.attend, name="attention")
        x = x + attention_gate * attention(nn.RMSNorm(name="attention_norm")(x), turns)
        normal = nn.RMSNorm(name="perceptron_norm")(x)
        switch, value = (linear(width * 8 // 3, name=name)(normal) for name in ("switch", "expand"))
        out = linear(width, name="contract")(nn.silu(switch) * value)
        return layers.kept_in_memory(x + perceptron_gate * out, perceptron_gate)


class Head(nn.Module):
    """The blocks and the output layer of one prediction; the output layer starts at zero."""

    depth: int
    num_out: int
    dtype: str
    run: Callable

    @nn.compact
    def __call__(
        self, x: Tokens, turns: Turns, *, num_prefix: int
    ) -> Float[Array, "b patches out"]:
        x = self.run(GatedBlock, x, [turns] * self.depth, path=self.path)
        normal = nn.RMSNorm(name="norm")(x[:, num_prefix:])
        return layers.zero_dense(self.num_out, dtype=self.dtype, name="final")(normal)


class PrefixTokens(nn.Module):
    """Learned tokens, each plus the embedding of a row's number or label, in float32."""

    num_tokens: int
    width: int
    num_classes: int = 0  # 0 for a number

    @nn.compact
    def __call__(self, value: Shaped[Array, "b"]) -> Tokens:
        init, name = nn.initializers.normal(self.width**-0.5), "embedding"
        if self.num_classes:
            embedded = layers.embed_class(value, self.num_classes, self.width, init=init, name=name)
        else:
            embedded = layers.ScalarEmbedding(self.width, _SCALAR_INIT, name=name)(value)
        return self.param("tokens", init, (self.num_tokens, self.width)) + embedded[:, None]


class InContextDiT(Transformer, kw_only=True):
    """Predict u(z, r, t), told only t - r, and in training v(z, t) of images or latents."""

    guidance_inputs = ("omega", "t_min", "t_max")

    head_depth: int  # blocks, the last ones of depth, that belong to one prediction alone
    second_head: bool = True  # predict v too, by head_depth further blocks; False in sampling
    bottleneck: int = 0  # width between two layers of the patch embedding; 0 for one layer
    positions: str = "sequence"  # one of POSITIONS

    @nn.compact
    def __call__(self, z: Image, *, r: Time, t: Time, condition: Condition) -> Prediction:
        check_known("model.positions", self.positions, POSITIONS)
        self.check_width(self.num_heads * (4 if self.positions == "grid" else 2))
        check_within("model.head_depth", self.head_depth, f"[0, {self.depth}]", "or add depth")
        p, dense = self.patch_size, functools.partial(layers.xavier_dense, dtype=self.dtype)
        patches = x = layers.patches_of(z, p)
        prefix = self._prefix(t - r, condition)
        num_prefix = prefix.shape[1]
        if self.bottleneck:
            x = dense(self.bottleneck, name="bottleneck")(x)
        x = dense(self.width, name="patch_embedding")(x)
        x = jnp.concatenate([prefix, x], axis=1)
        if self.positions == "grid":
            x = x + self.param("positions", nn.initializers.normal(0.02), x.shape[1:])
        grid = {"rows": z.shape[1] // p, "columns": z.shape[2] // p}
        head_width = self.width // self.num_heads
        angles = rotary_angles(self.positions, num_prefix=num_prefix, head_width=head_width, **grid)
        turns = jnp.asarray(np.stack([np.cos(angles), np.sin(angles)]))
        run = functools.partial(run_blocks, self, forward_mode=condition.forward_mode)
        shared = [turns] * (self.depth - self.head_depth)
        x = run(GatedBlock, x.astype(self.dtype), shared, path=self.path)

        def predict(name: str) -> Image:
            head = Head(self.head_depth, patches.shape[-1], self.dtype, run, name=name)
            return layers.image_of(head(x, turns, num_prefix=num_prefix), z.shape, p)

        return Prediction(u=predict("u_head"), v=predict("v_head") if self.second_head else None)

    def _prefix(self, h: Time, condition: Condition) -> Tokens:
        """Return the tokens before the patches: class, guidance scale and interval, time."""
        one = jnp.ones_like(h)
        scale = condition.guidance or GuidanceScale(omega=one, t_min=0 * one, t_max=one)
        values = {"omega": 1 - 1 / scale.omega, "t_min": scale.t_min, "t_max": scale.t_max, "h": h}
        tokens = [
            PrefixTokens(num, self.width, name=f"{key}_tokens")(values[key])
            for key, num in _NUM_SCALAR_TOKENS.items()
        ]
        if self.num_classes:
            sizes = _NUM_CLASS_TOKENS, self.width, self.num_classes
            tokens = [PrefixTokens(*sizes, name="class_tokens")(condition.labels), *tokens]
        return jnp.concatenate(tokens, axis=1)
