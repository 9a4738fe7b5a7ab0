"""Layers that more than one network uses."""

from collections.abc import Callable

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from mf_jax.errors import check_known

TIME_CONDITIONINGS = {
    "t,r": ("t", "r"),
    "t,t-r": ("t", "t-r"),
    "t,r,t-r": ("t", "r", "t-r"),
    "t-r": ("t-r",),
    "t": ("t",),
}
"""Which of t, r and t - r a network is told; t alone is flow matching. Source: MeanFlow, arXiv 2505.13447, table 1c."""

_LONGEST_PERIOD = 10_000


class Network(nn.Module):
    """What a config can ask of a network: whether it can be told guidance, and whether it has a second head."""

    can_be_told_guidance = False  # without annotations these are no fields
    second_head = False


def at_least_float32(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """Return x in float32, or in its own type where that is wider, for what must not be computed in bfloat16."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def sinusoidal_features(t: Float[Array, "b"], num_features: int) -> Float[Array, "b d"]:
    """Return cos and sin of t at frequencies from 1 down to 1 / 10,000, geometrically spaced.

    t is not multiplied by 1,000 as diffusion codes do: that would multiply du/dt by 1,000 too.

    Args:
      t: times in [0, 1], `[B]`.
      num_features: even.

    Returns:
      `[B, num_features]`, cosines first.
    """
    half = num_features // 2
    frequencies = jnp.exp(-np.log(_LONGEST_PERIOD) * jnp.arange(half) / half)
    angles = at_least_float32(t)[:, None] * frequencies
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


class ScalarEmbedding(nn.Module):
    """Embed one number per row with a two-layer perceptron of its sinusoidal features, in float32.

    Args:
      width: size of the embedding.
      num_features: size of the sinusoidal features.
      kernel_init: of both layers.
    """

    width: int
    num_features: int = 256
    kernel_init: nn.initializers.Initializer = nn.initializers.normal(0.02)

    @nn.compact
    def __call__(self, t: Float[Array, "b"]) -> Float[Array, "b d"]:
        """Return the embedding `[B, width]` of t `[B]`."""
        init = self.kernel_init
        hidden = nn.Dense(self.width, kernel_init=init, name="hidden")(
            sinusoidal_features(t, self.num_features)
        )
        return nn.Dense(self.width, kernel_init=init, name="out")(nn.silu(hidden))


class ConditionEmbedding(nn.Module):
    """Embed what a network is told besides z: the sum of its time embeddings and its class embedding.

    Args:
      width: size of the embedding.
      time_conditioning: a key of `TIME_CONDITIONINGS`.
      num_classes: number of classes; 0 for an unconditional network, which has no class embedding.
      num_features: size of the sinusoidal features of a time.
    """

    width: int
    time_conditioning: str
    num_classes: int
    num_features: int = 256

    @nn.compact
    def __call__(
        self, *, r: Float[Array, "b"], t: Float[Array, "b"], labels: Int[Array, "b"]
    ) -> Float[Array, "b d"]:
        """Return the embedding `[B, width]`; a negative label selects the null class."""
        check_known("time_conditioning", self.time_conditioning, TIME_CONDITIONINGS)
        times = {"t": t, "r": r, "t-r": t - r}
        names = {"t": "t_embedding", "r": "r_embedding", "t-r": "h_embedding"}
        embedding = sum(
            ScalarEmbedding(self.width, self.num_features, name=names[which])(times[which])
            for which in TIME_CONDITIONINGS[self.time_conditioning]
        )
        if self.num_classes:
            table = nn.Embed(
                self.num_classes + 1,
                self.width,
                embedding_init=nn.initializers.normal(0.02),
                name="label_embedding",
            )
            embedding += table(jnp.where(labels < 0, self.num_classes, labels))
        return embedding


def sine_cosine_positions(height: int, width: int, num_features: int) -> Float[np.ndarray, "n d"]:
    """Return the fixed position embedding of a grid of patches.

    Args:
      height, width: of the grid, in patches.
      num_features: divisible by 4; the first half encodes the column, the second the row.

    Returns:
      `[height * width, num_features]`, rows of the grid one after another.

    Source: MAE, arXiv 2111.06377, as used by DiT, arXiv 2212.09748.
    """
    quarter = num_features // 4
    frequencies = 1.0 / _LONGEST_PERIOD ** (np.arange(quarter, dtype=np.float64) / quarter)
    rows, columns = np.meshgrid(np.arange(height), np.arange(width), indexing="ij")

    def encode(positions: np.ndarray) -> np.ndarray:
        angles = positions.reshape(-1, 1) * frequencies
        return np.concatenate([np.sin(angles), np.cos(angles)], axis=1)

    return np.concatenate([encode(columns), encode(rows)], axis=1).astype(np.float32)


def xavier_dense(features: int, *, dtype: str, name: str) -> Callable[[Array], Array]:
    """Return a linear layer with Xavier-uniform weights and zero bias, float32 parameters, computing in dtype."""
    return nn.Dense(features, dtype=dtype, kernel_init=nn.initializers.xavier_uniform(), name=name)


def zero_dense(features: int, *, dtype: str, name: str) -> Callable[[Array], Array]:
    """Return a linear layer that starts at zero, float32 parameters, computing in dtype."""
    return nn.Dense(features, dtype=dtype, kernel_init=nn.initializers.zeros, name=name)


class Attention(nn.Module):
    """Multi-head self-attention.

    Args:
      num_heads: divides the width.
      dtype: of the computation.
      attend: the attended values of queries, scaled already, keys and values, each `[B, tokens, heads, features]`.
      out: makes the last linear layer.
    """

    num_heads: int
    dtype: str
    attend: Callable
    out: Callable = xavier_dense

    @nn.compact
    def __call__(self, x: Float[Array, "b n d"]) -> Float[Array, "b n d"]:
        """Return the attended values, like x."""
        width = x.shape[-1]
        qkv = xavier_dense(3 * width, dtype=self.dtype, name="qkv")(x)
        q, k, v = jnp.moveaxis(qkv.reshape((*x.shape[:2], 3, self.num_heads, -1)), 2, 0)
        attended = self.attend(q * q.shape[-1] ** -0.5, k, v).reshape(x.shape)
        return self.out(width, dtype=self.dtype, name="out")(attended)
