"""InContextDiT: a transformer over image patches that is told class, guidance and time by tokens before the patches.

Against DiT it has no modulation (adaLN): RMSNorm, normalised queries and keys, rotary positions, SwiGLU perceptrons and
vector gates that start at zero. Its last blocks may exist twice, once for u and once for v; sampling needs u alone.

Source: improved MeanFlow, arXiv 2512.02012, section 4.3; the options for pixels from pixel MeanFlow, arXiv 2601.22158.
"""

import functools
from collections.abc import Callable
from typing import ClassVar

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from mf_jax.errors import BadInput, check_known
from mf_jax.flow.records import Condition, GuidanceScale, Prediction
from mf_jax.models.attention import attend
from mf_jax.models.blocks import run_blocks
from mf_jax.models.layers import (
    Network,
    ScalarEmbedding,
    at_least_float32,
    xavier_dense,
    zero_dense,
)

IN_CONTEXT_SIZES = {  # depth, width, heads, head depth, bottleneck, positions
    "digits": (4, 128, 2, 2, 0, "sequence"),
    "B": (12, 768, 12, 8, 0, "sequence"),
    "M": (24, 768, 12, 8, 0, "sequence"),
    "L": (32, 1024, 16, 8, 0, "sequence"),
    "XL": (48, 1024, 16, 8, 0, "sequence"),
    "pixel_B": (16, 768, 12, 8, 128, "grid"),
    "pixel_L": (32, 1024, 16, 8, 128, "grid"),
    "pixel_H": (48, 1280, 16, 8, 256, "grid"),
}
POSITIONS = ("sequence", "grid")
"""`sequence`: rotary by a token's number, prefix included. `grid`: rotary by a patch's row and column, and a learned
embedding of every token's number."""
_NUM_CLASS_TOKENS = 8
_NUM_SCALAR_TOKENS = {"omega": 4, "t_min": 2, "t_max": 2, "h": 4}  # in this order, after the class
_LONGEST_PERIOD = 10_000
_block_init = nn.initializers.variance_scaling(0.32**2, "fan_in", "normal")


def _frequencies(num: int) -> Float[np.ndarray, "f"]:
    return _LONGEST_PERIOD ** (-np.arange(num) / num)


def rotary_angles(
    positions: str, *, num_prefix: int, rows: int, columns: int, head_width: int
) -> Float[np.ndarray, "n f"]:
    """Return by which angle each token turns each pair of features of a query or key.

    Args:
      positions: one of `POSITIONS`.
      num_prefix: tokens before the patches; on a grid they do not turn.
      rows, columns: of the grid of patches.
      head_width: features of a head; even, on a grid divisible by 4: the first half turns by row, the second by column.

    Returns:
      `[num_prefix + rows * columns, head_width / 2]`.

    Source: RoFormer, arXiv 2104.09864.
    """
    if positions == "sequence":
        return np.outer(np.arange(num_prefix + rows * columns), _frequencies(head_width // 2))
    row, column = np.divmod(np.arange(rows * columns), columns)
    frequencies = _frequencies(head_width // 4)
    angles = np.concatenate([np.outer(row, frequencies), np.outer(column, frequencies)], axis=1)
    return np.pad(angles, ((num_prefix, 0), (0, 0)))


def _rotate(
    x: Float[Array, "b n heads d"], turns: Float[Array, "2 n f"]
) -> Float[Array, "b n heads d"]:
    """Turn each pair of neighbouring features by angles of this cosine and sine, in float32."""
    cos, sin = turns.astype(x.dtype)[:, :, None]
    a, b = x[..., 0::2], x[..., 1::2]
    return jnp.stack([a * cos - b * sin, a * sin + b * cos], axis=-1).reshape(x.shape)


def _linear(features: int, *, dtype: str, name: str) -> nn.Dense:
    return nn.Dense(features, use_bias=False, dtype=dtype, kernel_init=_block_init, name=name)


class RotaryAttention(nn.Module):
    """Multi-head self-attention with normalised, rotated queries and keys; norms, rotation and softmax in float32."""

    num_heads: int
    dtype: str
    attend: Callable

    @nn.compact
    def __call__(
        self, x: Float[Array, "b n d"], turns: Float[Array, "2 n f"]
    ) -> Float[Array, "b n d"]:
        """Return the attended values, like x, in dtype."""
        q, k, v = (
            _linear(x.shape[-1], dtype=self.dtype, name=name)(x).reshape(
                *x.shape[:2], self.num_heads, -1
            )
            for name in ("query", "key", "value")
        )
        q = _rotate(nn.RMSNorm(name="query_norm")(q), turns) * q.shape[-1] ** -0.5
        k = _rotate(nn.RMSNorm(name="key_norm")(k), turns)
        out = self.attend(q.astype(self.dtype), k.astype(self.dtype), v).reshape(x.shape)
        return _linear(x.shape[-1], dtype=self.dtype, name="out")(out)


class GatedBlock(nn.Module):
    """One transformer block: attention and SwiGLU perceptron, each with a gate per feature that starts at zero."""

    num_heads: int
    dtype: str
    attend: Callable

    @nn.compact
    def __call__(
        self, x: Float[Array, "b n d"], turns: Float[Array, "2 n f"]
    ) -> Float[Array, "b n d"]:
        """Return x `[B, tokens, width]` after the block."""
        width = x.shape[-1]
        gates = [
            self.param(name, nn.initializers.zeros, (width,)).astype(self.dtype)
            for name in ("attention_gate", "perceptron_gate")
        ]
        attention = RotaryAttention(self.num_heads, self.dtype, self.attend, name="attention")
        x = x + gates[0] * attention(nn.RMSNorm(name="attention_norm")(x), turns)
        normal = nn.RMSNorm(name="perceptron_norm")(x)
        switch, value = (
            _linear(int(width * 8 / 3), dtype=self.dtype, name=name)(normal)
            for name in ("switch", "expand")
        )
        return x + gates[1] * _linear(width, dtype=self.dtype, name="contract")(
            nn.silu(switch) * value
        )


class Head(nn.Module):
    """The blocks and the output layer of one prediction; the output layer starts at zero."""

    depth: int
    num_out: int
    dtype: str
    run: Callable

    @nn.compact
    def __call__(
        self, x: Float[Array, "b n d"], turns: Float[Array, "2 n f"], *, num_prefix: int
    ) -> Float[Array, "b patches out"]:
        """Return the prediction of each patch, `[B, tokens - num_prefix, num_out]`."""
        x = self.run(GatedBlock, x, [turns] * self.depth, path=self.path)
        return zero_dense(self.num_out, dtype=self.dtype, name="final")(
            nn.RMSNorm(name="norm")(x[:, num_prefix:])
        )


class ScalarTokens(nn.Module):
    """Learned tokens, each plus the embedding of one number per row, in float32."""

    num_tokens: int
    width: int

    @nn.compact
    def __call__(self, value: Float[Array, "b"]) -> Float[Array, "b n d"]:
        """Return the tokens `[B, num_tokens, width]` for values `[B]`."""
        init = nn.initializers.normal(self.width**-0.5)
        tokens = self.param("tokens", init, (self.num_tokens, self.width))
        init = nn.initializers.variance_scaling(1.0, "fan_in", "normal")
        return (
            tokens + ScalarEmbedding(self.width, kernel_init=init, name="embedding")(value)[:, None]
        )


class ClassTokens(nn.Module):
    """Learned tokens, each plus the embedding of the class, in float32."""

    num_classes: int
    width: int

    @nn.compact
    def __call__(self, labels: Int[Array, "b"]) -> Float[Array, "b n d"]:
        """Return the tokens `[B, 8, width]`; a negative label selects the null class."""
        init = nn.initializers.normal(self.width**-0.5)
        tokens = self.param("tokens", init, (_NUM_CLASS_TOKENS, self.width))
        table = nn.Embed(self.num_classes + 1, self.width, embedding_init=init, name="embedding")
        return tokens + table(jnp.where(labels < 0, self.num_classes, labels))[:, None]


class InContextDiT(Network):
    """Predict u(z, r, t), told only t - r, and in training v(z, t) of images or latents.

    Args:
      patch_size: side of a patch, divides the height and width of z.
      depth: number of blocks between z and u.
      width: width of a token, divisible by num_heads.
      num_heads: attention heads; of even width, divisible by 4 for `positions="grid"`.
      head_depth: how many of the blocks, the last ones, belong to one prediction alone.
      num_classes: classes; 0 for an unconditional network, which has no class tokens.
      second_head: predict v too, by head_depth further blocks; False in sampling.
      bottleneck: width between the two layers of the patch embedding; 0 for a patch embedding of one layer.
      positions: one of `POSITIONS`.
      dtype: of the computation, float32 or bfloat16; parameters, normalisation, rotation, softmax and the embeddings
        of what the network is told are float32 in any case.
      attention: a key of `ATTENTIONS`.
      remat, scan: as `run_blocks` takes them.
    """

    patch_size: int
    depth: int
    width: int
    num_heads: int
    head_depth: int
    num_classes: int
    can_be_told_guidance: ClassVar[bool] = True
    second_head: bool = True
    bottleneck: int = 0
    positions: str = "sequence"
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
        """Return the velocities u and, with a second head, v, float32 like z `[B, H, W, C]`.

        Raises:
          BadInput: if the sizes do not fit one another or z.
        """
        self._check(z.shape)
        batch, height, width, channels = z.shape
        p, rows, columns = self.patch_size, height // self.patch_size, width // self.patch_size
        prefix = self._prefix(t - r, condition)
        patches = z.reshape(batch, rows, p, columns, p, channels).swapaxes(2, 3)
        x = patches.reshape(batch, rows * columns, p * p * channels)
        if self.bottleneck:
            x = xavier_dense(self.bottleneck, dtype=self.dtype, name="bottleneck")(x)
        x = xavier_dense(self.width, dtype=self.dtype, name="patch_embedding")(x)
        x = jnp.concatenate([prefix, x], axis=1)
        if self.positions == "grid":
            x = x + self.param("positions", nn.initializers.normal(0.02), x.shape[1:])
        turns = self._turns(prefix.shape[1], rows, columns)
        run = functools.partial(
            run_blocks,
            remat=self.remat,
            scan=self.scan,
            num_heads=self.num_heads,
            dtype=self.dtype,
            attend=functools.partial(
                attend, kind=self.attention, forward_mode=condition.forward_mode
            ),
        )
        x = run(
            GatedBlock,
            x.astype(self.dtype),
            [turns] * (self.depth - self.head_depth),
            path=self.path,
        )

        def predict(name: str) -> Float[Array, "b h w c"]:
            head = Head(self.head_depth, p * p * channels, self.dtype, run, name=name)
            out = head(x, turns, num_prefix=prefix.shape[1])
            out = out.reshape(batch, rows, columns, p, p, channels).swapaxes(2, 3).reshape(z.shape)
            return at_least_float32(out)

        return Prediction(u=predict("u_head"), v=predict("v_head") if self.second_head else None)

    def _prefix(self, h: Float[Array, "b"], condition: Condition) -> Float[Array, "b n d"]:
        """Return the tokens before the patches: class, guidance scale and interval, time."""
        one = jnp.ones_like(h)
        told = condition.guidance or GuidanceScale(omega=one, t_min=0 * one, t_max=one)
        values = {"omega": 1 - 1 / told.omega, "t_min": told.t_min, "t_max": told.t_max, "h": h}
        tokens = [
            ScalarTokens(num_tokens, self.width, name=f"{name}_tokens")(values[name])
            for name, num_tokens in _NUM_SCALAR_TOKENS.items()
        ]
        if self.num_classes:
            tokens = [
                ClassTokens(self.num_classes, self.width, name="class_tokens")(condition.labels),
                *tokens,
            ]
        return jnp.concatenate(tokens, axis=1)

    def _turns(self, num_prefix: int, rows: int, columns: int) -> Float[Array, "2 n f"]:
        """Return cosine and sine of the rotary angles."""
        grid = {"num_prefix": num_prefix, "rows": rows, "columns": columns}
        angles = rotary_angles(self.positions, **grid, head_width=self.width // self.num_heads)
        return jnp.asarray(np.stack([np.cos(angles), np.sin(angles)]))

    def _check(self, shape: tuple[int, ...]) -> None:
        check_known("positions", self.positions, POSITIONS)
        if self.patch_size <= 0 or shape[1] % self.patch_size or shape[2] % self.patch_size:
            raise BadInput(
                f"model.patch_size={self.patch_size}: must divide the image size {shape[1]}x{shape[2]}"
            )
        if not 0 <= self.head_depth <= self.depth:
            raise BadInput(
                f"model.head_depth={self.head_depth}: must be from 0 to depth={self.depth}"
            )
        multiple = self.num_heads * (4 if self.positions == "grid" else 2)
        if self.num_heads <= 0 or self.width <= 0 or self.width % multiple:
            raise BadInput(
                f"width={self.width}: must be a multiple of {multiple} for num_heads={self.num_heads} and "
                f"positions={self.positions!r}; try 64 per head"
            )
