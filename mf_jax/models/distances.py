"""How different two pictures look: by LPIPS and by ConvNeXt V2, with their published weights."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
from etils import epath
from jaxtyping import PyTree

from mf_jax.models.convnext import ConvNeXtDistance
from mf_jax.models.lpips import LPIPS
from mf_jax.published.torch_file import network_params, read_state_dict

DISTANCES = {"lpips": LPIPS(), "convnext": ConvNeXtDistance()}
"""Networks from pairs of pictures `[B, H, W, 3]` in [-1, 1] to their distances `[B]`."""
LEAST_SIDE = 32
_FILES = ("vgg16-397923af.pth", "vgg.pth")
"""Of LPIPS: the VGG16 of torchvision, and the last layers of the package `lpips`, version 0.1."""
_NOT_USED = "classifier."


@functools.cache
def distance_shapes(network: nn.Module) -> PyTree:
    """Return the shapes of the parameters of one of these networks, computing nothing."""
    image = jnp.zeros((1, LEAST_SIDE, LEAST_SIDE, 3))
    return jax.eval_shape(network.init, jax.random.key(0), image, image)["params"]


def load_distance(network: nn.Module, path: epath.Path) -> tuple[PyTree, str]:
    """Return published parameters, and the SHA-256 of their first file.

    Args:
      path: of a file, or of the folder with the two files of LPIPS.
    """
    paths = [path / name for name in _FILES] if path.is_dir() else [path]
    first, *others = map(read_state_dict, paths)
    arrays = {k: v for state in (first, *others) for k, v in state.arrays.items()}
    used = {name: array for name, array in arrays.items() if not name.startswith(_NOT_USED)}
    return network_params(distance_shapes(network), first._replace(arrays=used)), first.sha256
