"""Pictures as networks see them, in [-1, 1], and as files hold them, in bytes."""

import numpy as np
from jaxtyping import Array, Float, UInt8

QUANTISATION = "round((x + 1) * 127.5), clipped to a byte"
"""What `to_pixels` does, for the protocol of an evaluation."""


def to_pixels(x: Float[Array | np.ndarray, "*_ c"]) -> UInt8[Array | np.ndarray, "*_ c"]:
    """Return pictures in [-1, 1] as bytes, in an array of the same library."""
    xp = x.__array_namespace__()
    return xp.clip(xp.round((x + 1) * 127.5), 0, 255).astype(xp.uint8)


def from_pixels(pixels: UInt8[np.ndarray, "*_ c"]) -> Float[np.ndarray, "*_ c"]:
    """Return bytes as pictures in [-1, 1], float32."""
    return pixels.astype(np.float32) / np.float32(127.5) - 1
