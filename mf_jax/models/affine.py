"""Baselines that are affine in z: a network's gain over them is due to its nonlinearity.

For Gaussian data the average velocity is affine in z, so they are exact but for the times.
"""

import math
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


class Affine(Network, kw_only=True):
    """Predict u = A(r, t) z + b(r, t, class) of vectors or small images, z as one vector."""

    takes = ("images", "vectors")
    rank = 0  # 0 for any A, as many numbers as z has, squared; no field, see LowRank

    width: int
    time_conditioning: str = "t,t-r"

    @nn.compact
    def __call__(self, z: Points, *, r: Time, t: Time, condition: Condition) -> Prediction:
        flat = z.reshape(z.shape[0], -1).astype(self.dtype)
        size = flat.shape[1]

        def numbers(*shape: int, name: str, num_classes: int = 0, **more: Callable) -> Array:
            count = math.prod(shape)
            fields = count, self.width, num_classes, self.time_conditioning, self.dtype
            made = _Perceptron(*fields, name=name, **more)(r=r, t=t, labels=condition.labels)
            return made.reshape(-1, *shape)

        offset = numbers(size, name="offset", num_classes=self.num_classes)
        if self.rank:
            # One factor starts at zero so that u does. Were both, neither would get a gradient.
            left = numbers(size, self.rank, name="left")
            right = numbers(size, self.rank, name="right", out=layers.xavier_dense)
            u = jnp.einsum("bik,bk->bi", left, jnp.einsum("bjk,bj->bk", right, flat))
        else:
            u = jnp.einsum("bij,bj->bi", numbers(size, size, name="matrix"), flat)
        return Prediction(u=layers.at_least_float32(u + offset).reshape(z.shape))


class LowRank(Affine, kw_only=True):
    """Predict with A = U(r, t) V(r, t)^T, U and V of `rank` columns."""

    rank: int = 8
