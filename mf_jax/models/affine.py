"""Baselines that are affine in z: a network's gain over them is due to its nonlinearity.

For Gaussian data the average velocity is affine in z, so they are exact but for the times.
"""

import abc
from collections.abc import Callable

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from mf_jax.flow.paths import Points
from mf_jax.flow.records import Condition, Prediction
from mf_jax.models import layers
from mf_jax.models.layers import Network, Time


class _Perceptron(nn.Module):
    """Return `size` numbers per row that depend on the times and, given classes, on the class."""

    size: int
    width: int
    num_classes: int
    time_conditioning: str
    dtype: str
    out: Callable = layers.zero_dense  # makes the last layer

    @nn.compact
    def __call__(self, *, r: Time, t: Time, labels: Int[Array, "b"]) -> Float[Array, "b n"]:
        sizes = self.width, self.time_conditioning, self.num_classes
        c = nn.silu(layers.ConditionEmbedding(*sizes, name="condition")(r=r, t=t, labels=labels))
        hidden = nn.silu(layers.xavier_dense(self.width, dtype=self.dtype, name="hidden")(c))
        return self.out(self.size, dtype=self.dtype, name="out")(hidden)


class _AffineInZ(Network, kw_only=True):
    """Predict u = A(r, t) z + b(r, t, class) of vectors or images, z as one vector."""

    takes = ("images", "vectors")

    width: int
    time_conditioning: str = "t,t-r"

    @nn.compact
    def __call__(self, z: Points, *, r: Time, t: Time, condition: Condition) -> Prediction:
        flat = z.reshape(z.shape[0], -1).astype(self.dtype)

        def numbers(size: int, name: str, num_classes: int = 0, **more: Callable) -> Array:
            fields = size, self.width, num_classes, self.time_conditioning, self.dtype
            return _Perceptron(*fields, name=name, **more)(r=r, t=t, labels=condition.labels)

        offset = numbers(flat.shape[1], "offset", self.num_classes)
        u = self._linear(flat, numbers) + offset
        return Prediction(u=layers.at_least_float32(u).reshape(z.shape))

    @abc.abstractmethod
    def _linear(self, z: Float[Array, "b n"], numbers: Callable) -> Float[Array, "b n"]:
        """Return A z, given a function that makes numbers of the times."""


class Affine(_AffineInZ, kw_only=True):
    """Predict with any A, as many numbers as z has, squared: for small images only."""

    def _linear(self, z: Float[Array, "b n"], numbers: Callable) -> Float[Array, "b n"]:
        size = z.shape[1]
        return jnp.einsum("bij,bj->bi", numbers(size**2, "matrix").reshape(-1, size, size), z)


class LowRank(_AffineInZ, kw_only=True):
    """Predict with A = U(r, t) V(r, t)^T, U and V of `rank` columns."""

    rank: int = 8

    def _linear(self, z: Float[Array, "b n"], numbers: Callable) -> Float[Array, "b n"]:
        shape = -1, z.shape[1], self.rank
        count = z.shape[1] * self.rank
        # One factor starts at zero so that u does. Were both zero, neither would get a gradient.
        left = numbers(count, "left").reshape(shape)
        right = numbers(count, "right", out=layers.xavier_dense).reshape(shape)
        return jnp.einsum("bik,bk->bi", left, jnp.einsum("bjk,bj->bk", right, z))
