"""Numbers recorded from published implementations, and the random weights behind them."""

import json
import os
import zlib
from operator import itemgetter
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from configs import imagenet
from mf_jax.flow.records import NO_LABEL, Draws, GuidanceScale, Rows
from mf_jax.flow.rows import at_time
from mf_jax.published.names import as_ours, our_name

FOLDER = Path(os.environ.get("MF_REFERENCE_DIR") or Path(__file__).parent / "reference")
"""`MF_REFERENCE_DIR` where it is set, else tests/reference."""


def from_published(kind, flat):
    """Return published parameters as the tree of our network."""
    ours = {}
    for name, array in flat.items():
        our, stored = our_name(kind, name)
        if stored != "computed":
            ours[our] = as_ours(array, stored)
    return unflatten_dict(dict(sorted(ours.items())), sep="/")


DIFFERENCES = {}
"""The largest relative differences that the test at hand has found, by what was compared."""


def note_difference(name, error):
    """Remember a difference; those of all gradients are one."""
    kind = "gradients" if name.startswith(("gradient", "grads")) else name
    DIFFERENCES[kind] = max(DIFFERENCES.get(kind, 0.0), float(error))


def assert_close(ours, theirs, name, tolerance=1e-5):
    """Raise AssertionError unless the error is below the tolerance, relative to the norm."""
    error = np.linalg.norm(np.asarray(ours, np.float64) - theirs) / np.linalg.norm(theirs)
    note_difference(name, error)
    assert error < tolerance, f"{name}: relative error {error:.2e}"


def assert_gradients(ours, theirs, tolerance=1e-5):
    """Assert the same of each leaf of a gradient, and that both have the same leaves."""
    ours, theirs = flatten_dict(ours, sep="/"), flatten_dict(theirs, sep="/")
    assert ours.keys() == theirs.keys()
    for name in theirs:
        assert_close(ours[name], theirs[name], f"gradient of {name}", tolerance)


def below(arrays, prefix):
    """Return the arrays whose names start with a prefix, without it."""
    return {k.removeprefix(prefix): v for k, v in arrays.items() if k.startswith(prefix)}


def trees_of(kind, case):
    return [from_published(kind, below(case, f"{name}/net/")) for name in ("params", "grads")]


def load_case(path):
    """Return a case's meta, its arrays, and its parameters and gradients under our names."""
    case = dict(np.load(path))
    meta = json.loads(str(case.pop("meta")))
    return meta, case, *trees_of(meta["kind"].removesuffix("_unet"), case)


def config_of(row, sizes, params=(), **more):
    """Return the config of a row of ImageNet with the sizes of a recorded network, in float32."""
    config = imagenet.get_config(row)
    config.model.update({name: sizes[name] for name in ("patch_size", "depth", "num_heads")})
    config.model.update({"width": sizes["hidden_size"], "dtype": "float32", "scan": False} | more)
    if "aux_head_depth" in sizes:
        config.model.head_depth = sizes["aux_head_depth"]
    if "bottleneck" in params:  # its width is that of its weights
        config.model.bottleneck = params["bottleneck"]["kernel"].shape[-1]
    return config


def draws_of(meta, case):
    """Return the draws of a case, whose first rows have r = t."""
    given = jax.tree.map(jnp.asarray, below(case, "in/"))
    told, n = None, meta["batch"]["num_instant"]
    if "omega" in given:
        told = GuidanceScale(*(given[name] for name in ("omega", "t_min", "t_max")))
    rows = Rows(
        **{name: given[name] for name in ("x", "e", "t", "r", "dropped")},
        **{name: given.get(name) for name in ("augment", "box")},
        condition=given["y"],
        null=jnp.full_like(given["y"], NO_LABEL),
        guidance=told,
        for_networks=True,
    )
    instant, interval = (jax.tree.map(itemgetter(s), rows) for s in (slice(n), slice(n, None)))
    return Draws(at_time(instant, instant.t), interval)


def inception_weights(seed=0, divisor=1):
    """Return weights of Inception-v3 under published names, with `divisor` times fewer channels."""
    shapes = json.loads((FOLDER / "inception_state_dict.json").read_text())
    narrow = lambda shape: [n // divisor if n > 7 else n for n in shape]  # noqa: E731
    return drawn_weights({name: narrow(shape) for name, shape in shapes.items()}, seed)


def drawn_weights(shapes, seed):
    """Return weights of published networks, drawn as the folder's README says."""

    def draw(name, shape):
        key = (zlib.crc32(name.encode()) + seed) % 2**32
        a = np.random.RandomState(key).standard_normal(shape)
        if name.endswith("num_batches_tracked"):
            return np.array(0)
        if name.startswith("lin"):
            a = np.abs(a)
        elif name.endswith(("bn.weight", "layernorm.weight", "downsampling_layer.0.weight")):
            a = 1 + 0.1 * a
        elif name.endswith("running_var"):
            a = np.exp(0.1 * a)
        elif name.endswith(".weight") and not name.endswith("grn.weight"):
            before_relu = name.startswith("features.") or name.endswith(".conv.weight")
            a *= np.sqrt((1 + before_relu) / np.prod(shape[1:]))
        else:
            a *= 0.1
        return a.astype(np.float32)

    return {name: draw(name, shape) for name, shape in shapes.items()}
