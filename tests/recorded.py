"""Numbers recorded from published implementations, and the random weights behind them."""

import json
import os
import zlib
from pathlib import Path

import numpy as np
from flax.traverse_util import unflatten_dict

from mf_jax.published.names import as_ours, our_name

FOLDER = Path(os.environ.get("MF_REFERENCE_DIR") or Path(__file__).parent / "reference")
"""`MF_REFERENCE_DIR` where it is set, else tests/reference."""


def from_published(kind, flat):
    """Return published parameters as the tree of our network."""
    ours = {
        our_name(kind, name)[0]: as_ours(array, our_name(kind, name)[1])
        for name, array in flat.items()
    }
    return unflatten_dict(dict(sorted(ours.items())), sep="/")


def inception_weights(seed=0, divisor=1):
    """Return weights of Inception-v3 under published names, drawn as the folder's README says.

    Its layers have `divisor` times fewer channels.
    """

    def draw(name, shape):
        a = np.random.RandomState((zlib.crc32(name.encode()) + seed) % 2**32).standard_normal(shape)
        if name.endswith("num_batches_tracked"):
            return np.array(0)
        if name.endswith("conv.weight"):
            a *= np.sqrt(2 / np.prod(shape[1:]))
        elif name.endswith("bn.weight"):
            a = 1 + 0.1 * a
        elif name.endswith("running_var"):
            a = np.exp(0.1 * a)
        else:
            a *= shape[1] ** -0.5 if name == "fc.weight" else 0.1
        return a.astype(np.float32)

    shapes = json.loads((FOLDER / "inception_state_dict.json").read_text())
    return {
        name: draw(name, [n // divisor if n > 7 else n for n in shape])
        for name, shape in shapes.items()
    }
