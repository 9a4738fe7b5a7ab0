"""An encoded picture in RGB or grey, and the centre crop of published latents and statistics."""

import io

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageOps, UnidentifiedImageError

from mf_jax.flow.errors import reason_of
from mf_jax.runtime.archives import check_claim

CROP = "adm"  # the crop's name in manifests
_FORMATS = """AVIF BLP BMP CUR DCX DDS DIB FITS FLI FTEX GBR GIF HEIF ICNS ICO IM JPEG JPEG2000 MSP
PCD PCX PIXAR PNG PPM PSD QOI SGI SPIDER SUN TGA TIFF WEBP XBM XPM"""
"""Those with pixels in them: EPS and WMF are programs, others hold a picture of any format."""
_MOST_TIMES = 100  # may a picture be as long as wide: the crop scales its short side
_BITS, _PHOTOMETRIC, _WHITE_IS_ZERO = 258, 262, 0  # tags of TIFF, and a value

Image.init()  # before there are threads: a race in Pillow would reject a good picture
FORMATS = tuple(name for name in _FORMATS.split() if name in Image.OPEN)  # Pillow may lack some
_NAMED = {*FORMATS, "MPO"}  # which is read as JPEG
SUFFIXES = frozenset(s for s, name in Image.registered_extensions().items() if name in _NAMED)
"""The endings of pictures' names, in small letters."""


class Broken(Exception):
    """Say why a picture cannot be decoded."""


def decoded(
    content: bytes, image_size: int, mode: str = "RGB", background: str = "white"
) -> UInt8[np.ndarray, "h w c"]:
    """Return an encoded picture, cropped; size 0 is whole, a JPEG's an eighth. Or raise Broken."""
    try:
        with open_picture(content) as image:
            if not image_size:
                image.draft(None, (1, 1))  # it is read to its end all the same
            image = as_rgb(image, background).convert(mode)
            return adm_crop(image, image_size) if image_size else np.atleast_3d(image)
    except MemoryError:
        raise
    except Exception as error:  # the decoders of Pillow raise anything
        is_none = isinstance(error, UnidentifiedImageError)
        raise Broken("no picture" if is_none else reason_of(error)) from error


def open_picture(content: bytes) -> Image.Image:
    """Open an encoded picture; its pixels are read when they are asked for."""
    image = Image.open(io.BytesIO(content), formats=FORMATS)
    if max(image.size) > _MOST_TIMES * min(image.size):
        raise ValueError(f"{image.width} x {image.height} pixels are too narrow for a crop")
    check_claim(3 * image.width * image.height, len(content))
    return image


def as_rgb(image: Image.Image, background: str = "white") -> Image.Image:
    """Return the picture upright and in RGB; transparent pixels show the background."""
    stored, image = image, ImageOps.exif_transpose(image)
    if image.mode.startswith(("I", "F")):
        image = _eight_bits(image, stored, background)
    if image.has_transparency_data:  # convert("RGB") would reveal the colours hidden underneath
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, background), image)
    return image.convert("RGB")


def _eight_bits(image: Image.Image, stored: Image.Image, background: str) -> Image.Image:
    """Return grey of more than 8 bits in RGB, which convert() would clip at 255, not scale."""
    levels, tags, high = np.asarray(image), getattr(stored, "tag_v2", {}), 2**16 - 1
    if image.mode == "F":  # from 0 to 1
        levels = np.rint(levels * np.float64(high))
    elif _BITS in tags:
        high = 2 ** tags[_BITS][0] - 1
    is_known = image.mode != "I" or stored.format in (None, "PNG", "PPM")  # these have 16 bits
    if not (is_known and levels.min() >= 0 and levels.max() <= high):
        raise ValueError("its grey levels have no known range: save it with 8 or 16 bits")
    grey = levels.astype(np.int64) * 255 // high
    grey = 255 - grey if tags.get(_PHOTOMETRIC) == _WHITE_IS_ZERO else grey
    shown = Image.fromarray(grey.astype(np.uint8)).convert("RGB")
    shown.paste(background, mask=Image.fromarray(levels == image.info.get("transparency", -1)))
    return shown


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
