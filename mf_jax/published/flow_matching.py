"""A flow-matching transformer becomes a flow map that starts as u(z, r, t) = v(z, t).

SiT has t = 1 for data and predicts x - e; the last channels of each pixel are not the velocity.

1. Channels: the first C of each pixel of a patch are kept.
2. Sign: the output layer is negated.
3. Time: with s = 1 - t, cos(w s) = cos w cos(w t) + sin w sin(w t), and likewise sin(w s). Hence
   the first time layer becomes K_cos' = K_cos cos w + K_sin sin w,
   K_sin' = K_cos sin w - K_sin cos w. The map is its own inverse.
4. Interval: the embedding of t - r, which flow matching lacks, ends in zeros. Its first layer is
   the time's, since a layer of zeros in front of zeros would never learn.

DiT predicts noise at t in 0, 1, ..., 999: it gets steps 1 and 4, and is a start, not a flow map.

Source: SiT, arXiv 2401.08740; DiT, arXiv 2212.09748; the recorded checkpoints of tests/reference.
"""

import re
from collections.abc import Iterable, Mapping

import jax
import numpy as np
from jaxtyping import Float, PyTree

from mf_jax.published.names import Leaf

KINDS = ("sit", "dit")
_LONGEST_PERIOD = 10_000
_TIME = "condition/t_embedding/hidden/kernel"
_FINAL = ("final/kernel", "final/bias")


def as_flow_map(
    kind: str, flat: Mapping[str, Leaf], wanted: Iterable[str], *, channels: int
) -> dict[str, Leaf]:
    """Return parameters of a `sit` or `dit`, in our names, for a network of these names."""
    flat = dict(flat)
    for name in filter(flat.__contains__, _FINAL):
        pixels = flat[name].reshape(*flat[name].shape[:-1], -1, 2 * channels)[..., :channels]
        flat[name] = pixels.reshape(*flat[name].shape[:-1], -1) * (-1 if kind == "sit" else 1)
    if kind == "sit" and _TIME in flat:
        flat[_TIME] = reversed_time(flat[_TIME])
    for name in filter(re.compile("condition/[hr]_embedding/").match, wanted):
        of_time = flat.get(re.sub("[hr]_embedding", "t_embedding", name))
        if name not in flat and of_time is not None:
            flat[name] = of_time if "/hidden/" in name else np.zeros_like(of_time)
    return flat


def as_flow_matching(params: PyTree, *, patch_size: int) -> PyTree:
    """Return the parameters of a `sit` whose velocity is u(z, t, t); see `as_flow_map`.

    The embedding of t - r = 0 goes into the time's bias. Channels that are no velocity are zero.
    """
    params = jax.tree.map(np.asarray, params)
    time, final = params["condition"]["t_embedding"], params["final"]
    if interval := params["condition"].pop("h_embedding", None):
        hidden, out = interval["hidden"], interval["out"]
        at_zero = hidden["kernel"][: len(hidden["kernel"]) // 2].sum(axis=0) + hidden["bias"]
        at_zero = at_zero / (1 + np.exp(-at_zero)) @ out["kernel"] + out["bias"]
        time["out"]["bias"] = time["out"]["bias"] + at_zero
    time["hidden"]["kernel"] = reversed_time(time["hidden"]["kernel"])
    for name, array in final.items():
        pixels = -array.reshape(*array.shape[:-1], patch_size**2, -1)
        both = np.concatenate([pixels, np.zeros_like(pixels)], axis=-1)
        final[name] = both.reshape(*array.shape[:-1], -1)
    return params


def reversed_time(kernel: Float[np.ndarray, "f d"]) -> Float[np.ndarray, "f d"]:
    """Return the first layer of a time embedding, from features of t to features of 1 - t."""
    half = len(kernel) // 2
    frequencies = np.exp(-np.log(_LONGEST_PERIOD) * np.arange(half) / half)[:, None]
    cos, sin = np.cos(frequencies), np.sin(frequencies)
    of_cos, of_sin = np.float64(kernel[:half]), np.float64(kernel[half:])
    both = of_cos * cos + of_sin * sin, of_cos * sin - of_sin * cos
    return np.concatenate(both).astype(kernel.dtype)
