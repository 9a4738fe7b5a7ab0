"""The centre crop that published latents, and reference statistics of ImageNet, are made with."""

import numpy as np
from jaxtyping import UInt8
from PIL import Image

CROP = "adm"
"""The crop's name in manifests."""


def adm_crop(image: Image.Image, image_size: int) -> UInt8[np.ndarray, "image_size image_size 3"]:
    """Scale a picture so that its short side is `image_size`, and keep the centre.

    Args:
      image: RGB, of any size.
      image_size: pixels, at least 1.

    Returns:
      `[image_size, image_size, 3]`.

    Source: Dhariwal and Nichol, arXiv 2105.05233; the pre-processing of their released code.
    """
    while min(image.size) >= 2 * image_size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = image_size / min(image.size)
    width, height = round(image.width * scale), round(image.height * scale)
    left, top = (width - image_size) // 2, (height - image_size) // 2
    scaled = image.resize((width, height), Image.Resampling.BICUBIC)
    return np.asarray(scaled.crop((left, top, left + image_size, top + image_size)))
