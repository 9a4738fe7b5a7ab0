"""Pictures as bytes, and as the floats in [-1, 1] that networks see."""

import numpy as np
from jaxtyping import Array, Float, Float32, UInt8

QUANTISATION = "round((x + 1) * 127.5), clipped to a byte"
"""Describes `to_pixels` in the protocol of an evaluation."""


def from_pixels(pixels: UInt8[Array | np.ndarray, "..."]) -> Float32[Array | np.ndarray, "..."]:
    """Return bytes as floats in [-1, 1]; an array of numpy stays one of numpy."""
    return pixels.astype(np.float32) / 127.5 - 1


def to_pixels(x: Float[Array | np.ndarray, "..."]) -> UInt8[Array | np.ndarray, "..."]:
    """Return floats as bytes, clipped to [-1, 1]; an array of numpy stays one of numpy."""
    xp = x.__array_namespace__()
    return xp.clip(xp.round((x + 1) * 127.5), 0, 255).astype(xp.uint8)
