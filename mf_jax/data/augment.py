"""EDM's augmentation of pictures: they are moved at random, and the network is told how.

A network that is told does not show it in samples, which are told of none. A picture is mirrored
with probability 1/2. With 12 % each it is scaled, stretched along an axis, and shifted, by normal
amounts. With q, p the places in the old and the new picture, from the centre,

    q = 2^(-0.2 a) (s I + (1/s - s) n n^T) (p - size (b, c) / 8),   s = 2^(0.2 w),

n = (cos o, -sin o), o = 0 or, as often, uniform. The six labels are: mirrored or not, a, w cos o,
w sin o, b, c. EDM also turns pictures; codes with six labels do not. What lies beyond an edge is
mirrored there. Pictures are read between pixels at twice their size, which EDM makes with a
wavelet; here it is Lanczos.

Source: EDM, arXiv 2206.00364, appendix F.2; MeanFlow, arXiv 2505.13447, appendix A.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.ndimage import map_coordinates
from jaxtyping import Array, Float, PRNGKeyArray

Pictures = Float[Array, "b h w c"]


class Augmentation(NamedTuple):
    """How pictures are changed, and how many numbers of a row tell it."""

    num_labels: int
    draw: Callable[[PRNGKeyArray, Pictures], tuple[Pictures, Float[Array, "b k"]]] | None


def augmented(key: PRNGKeyArray, x: Pictures) -> tuple[Pictures, Float[Array, "b 6"]]:
    """Return pictures, each changed at random by itself, and their labels."""
    num, keys = len(x), jax.random.split(key, 5)
    mirrors = jax.random.bernoulli(keys[0], 0.5, (num,))
    moves = jax.random.bernoulli(keys[1], 0.12, (num, 3))
    amounts = jax.random.normal(keys[2], (num, 4)) * moves[:, np.array([0, 1, 2, 2])]
    scale, stretch, *shift = amounts.T
    turns = jax.random.bernoulli(keys[3], 0.5, (num,))
    angle = turns * jax.random.uniform(keys[4], (num,), minval=-np.pi, maxval=np.pi)
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    labels = jnp.stack([mirrors, scale, stretch * cos, stretch * sin, *shift], axis=1)
    x = jnp.where(mirrors[:, None, None, None], x[:, :, ::-1], x)
    moved = jax.vmap(_move)(x, scale, stretch, jnp.stack([cos, -sin], 1), jnp.stack(shift, 1))
    return jnp.where(moves.any(axis=1)[:, None, None, None], moved, x), labels


def _move(x: Array, scale: Array, stretch: Array, axis: Array, shift: Array) -> Array:
    """Move one picture; axis and shift are (right, down)."""
    height, width, channels = x.shape
    fine = jax.image.resize(x, (2 * height, 2 * width, channels), "lanczos3")
    rows, columns = jnp.indices(fine.shape[:2], jnp.float32)
    size = jnp.array([2.0 * width, 2.0 * height])
    centre = (size - 1) / 2
    places = jnp.stack([columns, rows], axis=-1) - centre - size * shift / 8
    longer = 2 ** (0.2 * stretch)
    along = jnp.sum(places * axis, axis=-1, keepdims=True) * axis  # no product of matrices: exact
    old = 2 ** (-0.2 * scale) * (longer * places + (1 / longer - longer) * along) + centre
    where = [old[..., 1], old[..., 0]]
    read = jax.vmap(lambda c: map_coordinates(c, where, order=1, mode="mirror"), 2, 2)
    return jax.image.resize(read(fine), x.shape, "lanczos3")


AUGMENTATIONS = {"none": Augmentation(0, None), "edm": Augmentation(6, augmented)}
