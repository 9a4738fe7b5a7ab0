"""Layers that more than one network uses, and what all networks have in common."""

import functools
from collections.abc import Callable
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from mf_jax.flow.errors import BadInput, check_known
from mf_jax.flow.records import Told

Time = Float[Array, "b"]
Vectors = Float[Array, "b d"]
Image = Float[Array, "b h w c"]
Signal = Float[Array, "b l c"]
Tokens = Float[Array, "b n d"]

TIME_CONDITIONINGS = ("t,r", "t,t-r", "t,r,t-r", "t-r", "t")
"""Which of t, r and t - r a network is told; t alone is flow matching.

Source: MeanFlow, arXiv 2505.13447, table 1c.
"""

LONGEST_PERIOD = 10_000
_NUM_FEATURES = 256
_LARGE = 2**18  # numbers from which on it is worth while to keep x, measured on CPUs


class Network(nn.Module, kw_only=True):
    """A network predicts velocities from z, the times and the condition.

    Some have a condition_size, the numbers of a row's condition, and a time_conditioning, one of
    `TIME_CONDITIONINGS`. Parameters, predictions, embeddings, normalisation and softmax are float32
    whatever the dtype of the computation.
    """

    takes: ClassVar[tuple[str, ...]] = ("images",)
    guidance_inputs: ClassVar[tuple[str, ...]] = ()
    """Which of omega, t_min and t_max it can be told."""
    second_head = False  # whether it predicts v too; without an annotation it is no field

    num_classes: int  # of the data; 0 for a network without classes
    dtype: str = "float32"  # or bfloat16


def at_least_float32(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """Return x in float32, or in its own type where that is wider."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def kept_in_memory(x: Float[Array, "..."], other: Float[Array, "..."]) -> Float[Array, "..."]:
    """Return x, number for number; XLA for CPUs then computes it once and keeps it.

    XLA computes sums again in every operation that reads them. Of a residual stream that is the
    chain of all sums before: the first block's gradient reads tensors of every block. XLA does
    not repeat a division, here by a one that it cannot know, made of `other`, finite and there
    before x. A small x stays in the cache anyway.
    """
    if jax.default_backend() != "cpu" or not isinstance(x.size, int) or x.size < _LARGE:
        return x  # exported programs are of any batch size
    one = 1 + 0 * jax.lax.stop_gradient(other[(0,) * other.ndim])
    return x / one.astype(x.dtype)


def sinusoidal_features(t: Time) -> Vectors:
    """Return cosines, then sines of t at frequencies from 1 down to 1 / 10,000.

    t is not multiplied by 1,000 as diffusion codes do: that would multiply du/dt by 1,000 too.
    """
    half = _NUM_FEATURES // 2
    frequencies = jnp.exp(-np.log(LONGEST_PERIOD) * jnp.arange(half) / half)
    angles = at_least_float32(t)[:, None] * frequencies
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


class ScalarEmbedding(nn.Module):
    """Embed one number per row by two layers on its sinusoidal features, in float32."""

    width: int
    kernel_init: nn.initializers.Initializer = nn.initializers.normal(0.02)

    @nn.compact
    def __call__(self, t: Time) -> Vectors:
        dense = functools.partial(nn.Dense, self.width, kernel_init=self.kernel_init)
        hidden = dense(name="hidden")(sinusoidal_features(t))
        return dense(name="out")(nn.silu(hidden))


def embed_class(
    labels: Int[Array, "b"], num_classes: int, width: int, *, init: Callable, name: str
) -> Vectors:
    """Return rows of a learned table, its last one for negative labels."""
    table = nn.Embed(num_classes + 1, width, embedding_init=init, name=name)
    return table(jnp.where(labels < 0, num_classes, labels))


class VectorEmbedding(nn.Module):
    """Embed the numbers of each row by one layer; a row with NaN becomes a learned vector."""

    width: int

    @nn.compact
    def __call__(self, numbers: Float[Array, "b k"]) -> Vectors:
        is_null = jnp.isnan(numbers).any(axis=1, keepdims=True)
        numbers = jnp.where(is_null, 0, at_least_float32(numbers))  # gradients must see no NaN
        init = nn.initializers.normal(0.02)
        embedding = nn.Dense(self.width, name="dense")(numbers)
        return jnp.where(is_null, self.param("null", init, (self.width,)), embedding)


class ConditionEmbedding(nn.Module):
    """Embed times, class and numbers: the sum of the embeddings of each, in float32."""

    width: int
    time_conditioning: str
    num_classes: int
    condition_size: int = 0

    @nn.compact
    def __call__(self, *, r: Time, t: Time, labels: Int[Array, "b"] | Told) -> Vectors:
        """Return the embedding; a negative label is the null class, labels alone are no numbers."""
        if not isinstance(labels, Told):
            labels = Told(labels, jnp.full((*t.shape, self.condition_size), jnp.nan))
        labels, numbers = labels
        check_known("model.time_conditioning", self.time_conditioning, TIME_CONDITIONINGS)
        times = {"t": ("t", t), "r": ("r", r), "t-r": ("h", t - r)}
        embedding = sum(
            ScalarEmbedding(self.width, name=f"{letter}_embedding")(time)
            for letter, time in map(times.get, self.time_conditioning.split(","))
        )
        if self.num_classes:
            sizes, init = (self.num_classes, self.width), nn.initializers.normal(0.02)
            embedding += embed_class(labels, *sizes, init=init, name="label_embedding")
        if self.condition_size:
            embedding += VectorEmbedding(self.width, name="vector_embedding")(numbers)
        return embedding


def sine_cosine_positions(*grid: int, num_features: int) -> Float[np.ndarray, "n d"]:
    """Return the fixed position embedding of a grid of patches, row by row, or of a length.

    Of a picture the first half of the features (divisible by 4) is of the column, then the row.
    Source: MAE, arXiv 2111.06377, as used by DiT, arXiv 2212.09748.
    """
    count = num_features // (2 * len(grid))
    frequencies = LONGEST_PERIOD ** -np.linspace(0, 1, count, endpoint=False)
    places = np.indices(grid).reshape(len(grid), -1)[::-1]
    angles = [np.outer(place, frequencies) for place in places]
    waves = [wave(angle) for angle in angles for wave in (np.sin, np.cos)]
    return np.concatenate(waves, axis=1).astype(np.float32)


def patches_of(z: Image | Signal, size: int) -> Tokens:
    """Cut images into patches of size x size pixels, row by row, or signals into pieces of size."""
    batch, *sides, channels = z.shape
    if size <= 0 or any(side % size for side in sides):
        raise BadInput(f"model.patch_size={size}: must divide the size {'x'.join(map(str, sides))}")
    if len(sides) == 2:
        z = z.reshape(batch, sides[0] // size, size, sides[1] // size, size, channels)
        z = z.swapaxes(2, 3)
    return z.reshape(batch, -1, size ** len(sides) * channels)


def image_of(patches: Tokens, shape: tuple[Any, ...], size: int) -> Image | Signal:
    """Undo `patches_of`, given the shape of the images or signals; at least float32."""
    if len(shape) == 4:
        batch, height, width, channels = shape
        patches = patches.reshape(batch, height // size, width // size, size, size, channels)
        patches = patches.swapaxes(2, 3)
    return at_least_float32(patches.reshape(shape))


xavier_dense = functools.partial(nn.Dense, kernel_init=nn.initializers.xavier_uniform())
zero_dense = functools.partial(nn.Dense, kernel_init=nn.initializers.zeros)


class Attention(nn.Module):
    """Multi-head self-attention."""

    num_heads: int  # divides the width
    dtype: str
    attend: Callable  # from scaled queries, keys, values [B, tokens, heads, features] to values
    out: Callable = xavier_dense  # makes the last linear layer
    power: float = -0.5  # logits are products of queries and keys times the head's width to it
    qk_norm: bool = False  # whether RMSNorm, in float32, comes before the products

    @nn.compact
    def __call__(self, x: Tokens) -> Tokens:
        width = x.shape[-1]
        qkv = xavier_dense(3 * width, dtype=self.dtype, name="qkv")(x)
        q, k, v = jnp.moveaxis(qkv.reshape((*x.shape[:2], 3, self.num_heads, -1)), 2, 0)
        if self.qk_norm:
            q, k = (nn.RMSNorm(name=f"{n}_norm")(a) for n, a in (("query", q), ("key", k)))
            q, k = q.astype(self.dtype), k.astype(self.dtype)
        attended = self.attend(q * q.shape[-1] ** self.power, k, v).reshape(x.shape)
        return self.out(width, dtype=self.dtype, name="out")(attended)
