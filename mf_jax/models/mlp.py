"""A residual perceptron for vectors, modulated by time and class like a DiT."""

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from mf_jax.flow.records import Condition, Prediction
from mf_jax.models.layers import (
    ConditionEmbedding,
    Network,
    at_least_float32,
    xavier_dense,
    zero_dense,
)

_FREQUENCIES = (1.0, 2.0, 4.0)
"""Of the sines and cosines of z that enter beside z: a perceptron of z alone is slow to learn sharp edges.

Source: Tancik et al., arXiv 2006.10739.
"""


class MLP(Network):
    """Predict u(z, r, t) of vectors.

    Args:
      depth: number of residual blocks of two layers each.
      width: width of the hidden layers.
      num_classes: classes; 0 for an unconditional network.
      time_conditioning: a key of `layers.TIME_CONDITIONINGS`.
      dtype: of the computation, float32 or bfloat16; parameters and time embeddings are float32 in any case.
    """

    depth: int
    width: int
    num_classes: int
    time_conditioning: str = "t,t-r"
    dtype: str = "float32"

    @nn.compact
    def __call__(
        self,
        z: Float[Array, "b d"],
        *,
        r: Float[Array, "b"],
        t: Float[Array, "b"],
        condition: Condition,
    ) -> Prediction:
        """Return the average velocity, float32 like z `[B, D]`."""
        c = ConditionEmbedding(
            self.width, self.time_conditioning, self.num_classes, name="condition"
        )(r=r, t=t, labels=condition.labels)
        c = nn.silu(c).astype(self.dtype)
        waves = [wave(k * z) for k in _FREQUENCIES for wave in (jnp.sin, jnp.cos)]
        x = xavier_dense(self.width, dtype=self.dtype, name="embedding")(
            jnp.concatenate([z, *waves], axis=-1)
        )
        for i in range(self.depth):
            scale, shift = jnp.split(
                xavier_dense(2 * self.width, dtype=self.dtype, name=f"modulation_{i}")(c),
                2,
                axis=-1,
            )
            hidden = xavier_dense(self.width, dtype=self.dtype, name=f"hidden_{i}")(
                nn.silu(x * (1 + scale) + shift)
            )
            x = x + xavier_dense(self.width, dtype=self.dtype, name=f"out_{i}")(nn.silu(hidden))
        u = zero_dense(z.shape[-1], dtype=self.dtype, name="final")(nn.silu(x))
        return Prediction(u=at_least_float32(u))
