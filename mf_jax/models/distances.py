"""How different two pictures look: by LPIPS and by ConvNeXt V2, with their published weights.

FLOPs at 224 x 224, of LPIPS 30 GFLOP a picture, of ConvNeXt V2 Base 32, and as many for the
gradient with respect to it.

Source: Zhang et al., arXiv 1801.03924 (LPIPS, version 0.1); VGG16, arXiv 1409.1556; Woo et al.,
arXiv 2301.00808 (ConvNeXt V2). Layers have the names of torchvision and of the package `lpips`, and
of `transformers`.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
from etils import epath
from jaxtyping import Array, Float, PyTree

from mf_jax.flow.paths import Scalars
from mf_jax.models.layers import Image
from mf_jax.published.torch_file import network_params, read_state_dict

_BLOCKS = ((64, 0, 2), (128, 5, 7), (256, 10, 12, 14), (512, 17, 19, 21), (512, 24, 26, 28))
"""Channels of the convolutions of a block, and their numbers in `features` of torchvision."""
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet, for pixels in [0, 1]
_EPSILON = 1e-6
_norm = functools.partial(nn.LayerNorm, epsilon=_EPSILON, use_fast_variance=False)


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
    def layers(self, a: Image, b: Image) -> list[Scalars]:
        """Return what each layer adds to the distance of each pair."""
        vgg, parts = VGG16(name="features"), []
        for i, (ours, theirs) in enumerate(zip(vgg(a), vgg(b), strict=True)):
            weigh = nn.Conv(1, (1, 1), use_bias=False, name=f"lin{i}.model.1")
            parts.append(jnp.mean(weigh((_unit(ours) - _unit(theirs)) ** 2), (1, 2, 3)))
        return parts

    def __call__(self, a: Image, b: Image) -> Scalars:
        """Return the distance of each pair."""
        return sum(self.layers(a, b))


def _unit(x: Image) -> Image:
    """Return each pixel divided by its norm, 0 where that is 0, with a gradient of 0 there."""
    squares = jnp.sum(x**2, axis=-1, keepdims=True)
    is_zero = squares == 0
    norm = jnp.where(is_zero, 0, jnp.sqrt(jnp.where(is_zero, 1, squares)))
    return x / (norm + 1e-10)


class ConvNeXtV2(nn.Module):
    """ConvNeXt V2 without its head; the default sizes are Base."""

    depths: tuple[int, ...] = (3, 3, 27, 3)  # blocks of each stage
    widths: tuple[int, ...] = (128, 256, 512, 1024)

    @nn.compact
    def __call__(self, image: Image) -> tuple[Float[Array, "b f"], list[Float[Array, "b _ _ _"]]]:
        """Return the features of pictures in [-1, 1], and what each stage makes of them."""
        at, maps = "embeddings", []
        x = nn.Conv(self.widths[0], (4, 4), 4, "VALID", name=f"{at}.patch_embeddings")(image)
        x = _norm(name=f"{at}.layernorm")(x)
        for i, (depth, width) in enumerate(zip(self.depths, self.widths, strict=True)):
            at = f"encoder.stages.{i}"
            if i > 0:
                x = _norm(name=f"{at}.downsampling_layer.0")(x)
                x = nn.Conv(width, (2, 2), 2, "VALID", name=f"{at}.downsampling_layer.1")(x)
            for j in range(depth):
                x = _Block(name=f"{at}.layers.{j}")(x)
            maps.append(x)
        return _norm(name="layernorm")(jnp.mean(x, (1, 2))), maps


class ConvNeXtDistance(nn.Module):
    """The squared distance of the features of pairs of pictures."""

    convnextv2: ConvNeXtV2 = ConvNeXtV2()

    def __call__(self, a: Image, b: Image) -> Scalars:
        """Return the distance of each pair."""
        return jnp.sum((self.convnextv2(a)[0] - self.convnextv2(b)[0]) ** 2, axis=-1)


class _Block(nn.Module):
    @nn.compact
    def __call__(self, x: Image) -> Image:
        width = x.shape[-1]
        hidden = nn.Conv(width, (7, 7), feature_group_count=width, name="dwconv")(x)
        hidden = nn.Dense(4 * width, name="pwconv1")(_norm(name="layernorm")(hidden))
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


DISTANCES = {"lpips": LPIPS(), "convnext": ConvNeXtDistance()}
"""Networks from pairs of pictures `[B, H, W, 3]` in [-1, 1] to their distances `[B]`."""
LEAST_SIDE = 32
_FILES = ("vgg16-397923af.pth", "vgg.pth")
"""Of LPIPS: the VGG16 of torchvision, and the last layers of the package `lpips`, version 0.1."""


@functools.cache
def distance_shapes(network: nn.Module) -> PyTree:
    """Return the shapes of the parameters of one of these networks, computing nothing."""
    image = jnp.zeros((1, LEAST_SIDE, LEAST_SIDE, 3))
    return jax.eval_shape(network.init, jax.random.key(0), image, image)["params"]


def load_distance(network: nn.Module, path: epath.Path) -> tuple[PyTree, str]:
    """Return parameters of a file, or of the folder of LPIPS, and the first file's SHA-256."""
    paths = [path / name for name in _FILES] if path.is_dir() else [path]
    first, *others = map(read_state_dict, paths)
    arrays = {k: v for state in (first, *others) for k, v in state.arrays.items()}
    used = {name: array for name, array in arrays.items() if not name.startswith("classifier.")}
    return network_params(distance_shapes(network), first._replace(arrays=used)), first.sha256
