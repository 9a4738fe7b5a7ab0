"""A decoded picture in RGB, and the centre crop of published latents and statistics."""

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageOps

CROP = "adm"
"""The crop's name in manifests."""


def as_rgb(image: Image.Image) -> Image.Image:
    """Return the picture upright and in RGB; transparent pixels become white."""
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I;16"):  # convert() would clip 16-bit grey at 255, not scale it
        image = Image.fromarray((np.asarray(image) // 257).astype(np.uint8))
    if image.has_transparency_data:  # convert("RGB") would reveal the colours hidden underneath
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def adm_crop(image: Image.Image, image_size: int) -> UInt8[np.ndarray, "image_size image_size c"]:
    """Scale an RGB or grey picture so that its short side is `image_size`, and keep the centre.

    Source: Dhariwal and Nichol, arXiv 2105.05233; the pre-processing of their released code.
    """
    while min(image.size) >= 2 * image_size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = image_size / min(image.size)
    width, height = round(image.width * scale), round(image.height * scale)
    left, top = (width - image_size) // 2, (height - image_size) // 2
    scaled = image.resize((width, height), Image.Resampling.BICUBIC)
    pixels = np.asarray(scaled.crop((left, top, left + image_size, top + image_size)))
    return pixels.reshape(image_size, image_size, -1)
