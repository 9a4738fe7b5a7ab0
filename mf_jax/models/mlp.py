"""A residual perceptron for vectors and signals, modulated by time and class like a DiT."""

import functools

import flax.linen as nn
import jax.numpy as jnp

from mf_jax.flow.paths import Points
from mf_jax.flow.records import Condition, Prediction
from mf_jax.models import layers
from mf_jax.models.layers import Network, Time

_FREQUENCIES = (1.0, 2.0, 4.0)
"""Waves of z enter beside z: a perceptron of z alone is slow to learn sharp edges.

Source: Tancik et al., arXiv 2006.10739.
"""


class MLP(Network, kw_only=True):
    """Predict u(z, r, t) of vectors, or of signals as vectors, by `depth` blocks of two layers."""

    takes = ("vectors", "signals")

    depth: int
    width: int
    time_conditioning: str = "t,t-r"
    condition_size: int = 0

    @nn.compact
    def __call__(self, z: Points, *, r: Time, t: Time, condition: Condition) -> Prediction:
        dense = functools.partial(layers.xavier_dense, dtype=self.dtype)
        sizes = self.width, self.time_conditioning, self.num_classes, self.condition_size
        embed = layers.ConditionEmbedding(*sizes, name="condition")
        shape, z = z.shape, z.reshape(z.shape[0], -1)
        c = nn.silu(embed(r=r, t=t, labels=condition.labels)).astype(self.dtype)
        waves = [wave(k * z) for k in _FREQUENCIES for wave in (jnp.sin, jnp.cos)]
        x = dense(self.width, name="embedding")(jnp.concatenate([z, *waves], axis=-1))
        for i in range(self.depth):
            scale, shift = jnp.split(dense(2 * self.width, name=f"modulation_{i}")(c), 2, axis=-1)
            hidden = dense(self.width, name=f"hidden_{i}")(nn.silu(x * (1 + scale) + shift))
            x = x + dense(self.width, name=f"out_{i}")(nn.silu(hidden))
        u = layers.zero_dense(z.shape[-1], dtype=self.dtype, name="final")(nn.silu(x))
        return Prediction(u=layers.at_least_float32(u).reshape(shape))
