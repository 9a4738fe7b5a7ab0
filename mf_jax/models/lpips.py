"""LPIPS: how different two pictures look to a VGG16, with its published weights.

FLOPs at 224 x 224: 30 GFLOP a picture, and as many for the gradient with respect to it.

Source: Zhang et al., arXiv 1801.03924 (version 0.1); VGG16, arXiv 1409.1556. Layers have the names
of torchvision and of the package `lpips`.
"""

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from mf_jax.models.layers import Image

_BLOCKS = ((64, 0, 2), (128, 5, 7), (256, 10, 12, 14), (512, 17, 19, 21), (512, 24, 26, 28))
"""Channels of the convolutions of a block, and their numbers in `features` of torchvision."""
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet, for pixels in [0, 1]
_TINY = 1e-10


class VGG16(nn.Module):
    """The convolutions of VGG16."""

    @nn.compact
    def __call__(self, image: Image) -> list[Float[Array, "b _ _ _"]]:
        """Return what each block makes of pictures in [-1, 1]."""
        x, maps = ((image + 1) / 2 - jnp.asarray(_MEAN)) / jnp.asarray(_STD), []
        for channels, *numbers in _BLOCKS:
            x = nn.max_pool(x, (2, 2), (2, 2)) if maps else x
            for number in numbers:
                x = nn.relu(nn.Conv(channels, (3, 3), name=str(number))(x))
            maps.append(x)
        return maps


class LPIPS(nn.Module):
    """The distance of pairs of pictures in [-1, 1]."""

    @nn.compact
    def layers(self, a: Image, b: Image) -> list[Float[Array, "b"]]:
        """Return what each layer adds to the distance of each pair."""
        vgg, parts = VGG16(name="features"), []
        for i, (ours, theirs) in enumerate(zip(vgg(a), vgg(b), strict=True)):
            weigh = nn.Conv(1, (1, 1), use_bias=False, name=f"lin{i}.model.1")
            parts.append(jnp.mean(weigh((_unit(ours) - _unit(theirs)) ** 2), (1, 2, 3)))
        return parts

    def __call__(self, a: Image, b: Image) -> Float[Array, "b"]:
        """Return the distance of each pair."""
        return sum(self.layers(a, b))


def _unit(x: Image) -> Image:
    """Return each pixel divided by its norm, 0 where that is 0, with a gradient of 0 there."""
    squares = jnp.sum(x**2, axis=-1, keepdims=True)
    is_zero = squares == 0
    norm = jnp.where(is_zero, 0, jnp.sqrt(jnp.where(is_zero, 1, squares)))
    return x / (norm + _TINY)
