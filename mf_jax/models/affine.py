"""Baselines that are affine in z: what a network gains over them is what it owes to being nonlinear.

For Gaussian data the average velocity is affine in z, so that these are exact up to how well they follow the times.
"""

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from mf_jax.flow.records import Condition, Prediction
from mf_jax.models.layers import (
    ConditionEmbedding,
    Network,
    at_least_float32,
    xavier_dense,
    zero_dense,
)


class Perceptron(nn.Module):
    """Numbers that depend on the times and perhaps on the class.

    Args:
      size: how many numbers.
      width: of the perceptron.
      num_classes: classes; 0 for numbers that do not depend on the class.
      time_conditioning: a key of `layers.TIME_CONDITIONINGS`.
      dtype: of the computation; the embedding is float32 in any case.
      zero: whether all numbers start at zero.
    """

    size: int
    width: int
    num_classes: int
    time_conditioning: str
    dtype: str
    zero: bool = True

    @nn.compact
    def __call__(
        self, *, r: Float[Array, "b"], t: Float[Array, "b"], labels: Int[Array, "b"]
    ) -> Float[Array, "b n"]:
        """Return the numbers `[B, size]`."""
        embed = ConditionEmbedding(
            self.width, self.time_conditioning, self.num_classes, name="condition"
        )
        c = nn.silu(embed(r=r, t=t, labels=labels))
        hidden = nn.silu(xavier_dense(self.width, dtype=self.dtype, name="hidden")(c))
        make = zero_dense if self.zero else xavier_dense
        return make(self.size, dtype=self.dtype, name="out")(hidden)


class Affine(Network):
    """Predict u = A(r, t) z + b(r, t, class) of vectors or images, z as one vector.

    A has as many entries as z has numbers, squared: for small images only.

    Args:
      width: of the perceptrons that make A and b.
      num_classes: classes; 0 for an unconditional network.
      time_conditioning: a key of `layers.TIME_CONDITIONINGS`.
      dtype: of the computation, float32 or bfloat16; parameters and time embeddings are float32 in any case.
    """

    width: int
    num_classes: int
    time_conditioning: str = "t,t-r"
    dtype: str = "float32"

    @nn.compact
    def __call__(
        self,
        z: Float[Array, "b ..."],
        *,
        r: Float[Array, "b"],
        t: Float[Array, "b"],
        condition: Condition,
    ) -> Prediction:
        """Return the average velocity, float32 like z `[B, ...]`."""
        flat = z.reshape(z.shape[0], -1).astype(self.dtype)
        size, more = flat.shape[1], (self.time_conditioning, self.dtype)
        told = {"r": r, "t": t, "labels": condition.labels}
        matrix = Perceptron(size**2, self.width, 0, *more, name="matrix")(**told).reshape(
            -1, size, size
        )
        offset = Perceptron(size, self.width, self.num_classes, *more, name="offset")(**told)
        u = jnp.einsum("bij,bj->bi", matrix, flat) + offset
        return Prediction(u=at_least_float32(u).reshape(z.shape))


class LowRank(Network):
    """Predict u = U(r, t) V(r, t)^T z + b(r, t, class) of vectors or images, z as one vector.

    Args:
      width: of the perceptrons that make U, V and b.
      rank: columns of U and V.
      num_classes: classes; 0 for an unconditional network.
      time_conditioning: a key of `layers.TIME_CONDITIONINGS`.
      dtype: of the computation, float32 or bfloat16; parameters and time embeddings are float32 in any case.
    """

    width: int
    rank: int
    num_classes: int
    time_conditioning: str = "t,t-r"
    dtype: str = "float32"

    @nn.compact
    def __call__(
        self,
        z: Float[Array, "b ..."],
        *,
        r: Float[Array, "b"],
        t: Float[Array, "b"],
        condition: Condition,
    ) -> Prediction:
        """Return the average velocity, float32 like z `[B, ...]`."""
        flat = z.reshape(z.shape[0], -1).astype(self.dtype)
        size, more = flat.shape[1], (self.time_conditioning, self.dtype)
        told = {"r": r, "t": t, "labels": condition.labels}

        def factor(name, zero):
            made = Perceptron(size * self.rank, self.width, 0, *more, zero=zero, name=name)
            return made(**told).reshape(-1, size, self.rank)

        # one factor starts at zero so that u does; were both zero, neither would ever get a gradient
        left, right = factor("left", True), factor("right", False)
        offset = Perceptron(size, self.width, self.num_classes, *more, name="offset")(**told)
        u = jnp.einsum("bik,bk->bi", left, jnp.einsum("bjk,bj->bk", right, flat)) + offset
        return Prediction(u=at_least_float32(u).reshape(z.shape))
