"""Random resized crops, the same of several pictures: their boxes are drawn before the loss.

Source: Szegedy et al., arXiv 1409.4842, section 6 (area and ratio); Keys 1981 (the cubic kernel).
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

AREA, RATIO = (0.08, 1.0), (3 / 4, 4 / 3)
"""Of a box: its share of the picture, and its width over its height."""


def draw_boxes(key: PRNGKeyArray, shape: tuple[int, ...]) -> Int[Array, "b 4"]:
    """Draw (top, left, height, width) of a box in each picture of a shape `(B, H, W, C)`."""
    rows, height, width, _ = shape
    area, ratio, down, right = jax.random.uniform(key, (4, rows))
    area = (AREA[0] + (AREA[1] - AREA[0]) * area) * height * width
    low, high = jnp.log(jnp.asarray(RATIO))
    ratio = jnp.exp(low + (high - low) * ratio)
    box_height = jnp.clip(jnp.round(jnp.sqrt(area / ratio)), 1, height)
    box_width = jnp.clip(jnp.round(jnp.sqrt(area * ratio)), 1, width)
    top, left = down * (height - box_height + 1), right * (width - box_width + 1)
    return jnp.stack([top, left, box_height, box_width], axis=1).astype(jnp.int32)


def crop(
    images: Float[Array, "b h w c"], boxes: Int[Array, "b 4"], side: int
) -> Float[Array, "b side side c"]:
    """Resize the box of each picture to a square, cubic and antialiased.

    The kernel reads beyond the box. At the edge of the picture its weights are made to sum to 1.
    """

    def one(image: Float[Array, "h w c"], box: Int[Array, "4"]) -> Float[Array, "side side c"]:
        scale = side / box[2:]
        shape = (side, side, image.shape[-1])
        return jax.image.scale_and_translate(
            image, shape, (0, 1), scale, -box[:2] * scale, method="cubic", antialias=True
        )

    return jax.vmap(one)(images, boxes)
