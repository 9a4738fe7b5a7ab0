"""ConvNeXt V2, whose features tell how far apart two pictures are, with its published weights.

FLOPs of Base at 224 x 224: 32 GFLOP a picture, and as many for the gradient with respect to it.

Source: Woo et al., arXiv 2301.00808. Layers have the names of `transformers`.
"""

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from mf_jax.models.layers import Image

_EPSILON = 1e-6


class ConvNeXtV2(nn.Module):
    """ConvNeXt V2 without its head; the default sizes are Base.

    Args:
      depths: blocks of each stage.
      widths: channels of each stage; every stage after the first halves the picture.
    """

    depths: tuple[int, ...] = (3, 3, 27, 3)
    widths: tuple[int, ...] = (128, 256, 512, 1024)

    @nn.compact
    def __call__(self, image: Image) -> tuple[Float[Array, "b f"], list[Float[Array, "b _ _ _"]]]:
        """Return the features of pictures in [-1, 1], and what each stage makes of them."""
        at, maps = "embeddings", []
        x = _patches(image, self.widths[0], 4, f"{at}.patch_embeddings")
        x = _norm(f"{at}.layernorm")(x)
        for i, (depth, width) in enumerate(zip(self.depths, self.widths, strict=True)):
            at = f"encoder.stages.{i}"
            if i > 0:
                x = _norm(f"{at}.downsampling_layer.0")(x)
                x = _patches(x, width, 2, f"{at}.downsampling_layer.1")
            for j in range(depth):
                x = _Block(name=f"{at}.layers.{j}")(x)
            maps.append(x)
        return _norm("layernorm")(jnp.mean(x, (1, 2))), maps


class ConvNeXtDistance(nn.Module):
    """The squared distance of the features of pairs of pictures; see `ConvNeXtV2`."""

    depths: tuple[int, ...] = ConvNeXtV2.depths
    widths: tuple[int, ...] = ConvNeXtV2.widths

    @nn.compact
    def __call__(self, a: Image, b: Image) -> Float[Array, "b"]:
        """Return the distance of each pair."""
        network = ConvNeXtV2(self.depths, self.widths, name="convnextv2")
        return jnp.sum((network(a)[0] - network(b)[0]) ** 2, axis=-1)


class _Block(nn.Module):
    @nn.compact
    def __call__(self, x: Image) -> Image:
        width = x.shape[-1]
        hidden = nn.Conv(width, (7, 7), feature_group_count=width, name="dwconv")(x)
        hidden = nn.Dense(4 * width, name="pwconv1")(_norm("layernorm")(hidden))
        hidden = _ResponseNorm(name="grn")(nn.gelu(hidden, approximate=False))
        return x + nn.Dense(width, name="pwconv2")(hidden)


class _ResponseNorm(nn.Module):
    """Global response normalisation: each channel by its share of the norms of all."""

    @nn.compact
    def __call__(self, x: Image) -> Image:
        shape = (1, 1, 1, x.shape[-1])
        weight, bias = (self.param(k, nn.initializers.zeros, shape) for k in ("weight", "bias"))
        norm = jnp.sqrt(jnp.sum(x**2, (1, 2), keepdims=True) + _EPSILON)
        return x + weight * (x * norm / (jnp.mean(norm, -1, keepdims=True) + _EPSILON)) + bias


def _norm(name: str) -> nn.LayerNorm:
    return nn.LayerNorm(epsilon=_EPSILON, use_fast_variance=False, name=name)


def _patches(x: Image, width: int, size: int, name: str) -> Float[Array, "b _ _ c2"]:
    return nn.Conv(width, (size, size), (size, size), "VALID", name=name)(x)
