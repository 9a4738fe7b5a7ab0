"""Read weights of published checkpoints, fit them to a network, write ours under published names.

A published checkpoint is a folder `checkpoint_N` that a published training script wrote with
Orbax: a tree of `params`, `ema_params`, `opt_state` and `step`, the parameters below `net`. Pixel
MeanFlow keeps several averages: there `ema_params` holds one tree for each. A `.npz` or
`.safetensors` file holds the same names, joined by "/". A `.pt` or `.pth` file of PyTorch holds
`model`, `ema` or `ema_model`, or one of them alone. The `model` of py-meanflow holds the network
and its averages: `net`, `net_ema`, `net_ema1`, `net_ema2`.

Source: the recorded checkpoints of the published implementations (tests/reference).
"""

import fnmatch
import re
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
from etils import epath
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.numpy import bfloat16
from jaxtyping import Float, PyTree, Shaped
from safetensors import SafetensorError
from safetensors.numpy import save_file

from mf_jax.flow.errors import BadInput, check_fit, listed, refused
from mf_jax.published import Arrays, flow_matching, reading
from mf_jax.published.checkpoint_files import Stored, opened_checkpoint
from mf_jax.published.names import (
    KINDS,
    TORCH_KINDS,
    as_ours,
    our_name,
    published_name,
    to_published,
)
from mf_jax.runtime.files import absolute, written_aside

_SECTIONS = ("ema_params", "ema", "ema_model", "net_ema", "params", "model")
"""Of a training checkpoint; the first that is there is taken."""
_AVERAGE = re.compile(r"(model/)?(net(_ema\d*)?)\.")
_WRAPPERS = re.compile(r"((net/)|(module|_orig_mod|network|model)\.)*")
"""In front of the names of a network's parameters."""
_SECOND_HEAD = "v_head/"
_FIRST_LAYERS = {"pmf": "bottleneck/kernel", "py_meanflow": "encoder_*_conv/kernel"}
"""Our names of the layer whose shape tells the channels, where it is not the usual one."""
_TABLES = ("condition/label_embedding/embedding", "class_tokens/embedding/embedding")
"""Of the classes, in our names."""


def load_published(path: epath.PathLike, kind: str, like: PyTree, *, section: str = "") -> PyTree:
    """Return a published checkpoint (`read_published`) as a network's tree (`fit_published`)."""
    flat = read_published(path, kind, section=section)
    with reading(path, f"parameters of {kind}"):
        return fit_published(kind, flat, like)


def describe_published(path: epath.PathLike, kind: str, *, section: str = "") -> tuple[int, int]:
    """Return channels and classes of a published network (`read_published`), 0 without labels."""
    with opened_checkpoint(path) as stored:
        names = _choose(section, stored.names)
        ours = {renamed[0]: name for name in names if (renamed := our_name(kind, name))}
        pattern = _FIRST_LAYERS.get(kind, "patch_embedding/kernel")
        first = next((ours[name] for name in fnmatch.filter(ours, pattern)), "")
        table = next((ours[name] for name in _TABLES if name in ours), "")
        arrays = _read(stored, {name: names[name] for name in (first, table) if name})
        if not first or arrays[first].ndim != 4:
            raise BadInput(f"holds no first layer of a published {kind} network; check the kind")
    # The last row of the table stands for no label.
    num_classes = arrays[table].shape[-2] - 1 if table else 0
    return arrays[first].shape[1 if kind in TORCH_KINDS else 2], num_classes


def read_published(path: epath.PathLike, kind: str, *, section: str = "") -> Arrays:
    """Return the parameters in a published checkpoint: names without section and `net/`, float32.

    Args:
      path: a folder `checkpoint_N`, or the folder around it (the largest N is taken), or a file
        `.npz`, `.safetensors`, `.pt` or `.pth`.
      section: one of `_SECTIONS`, or one of several averages, e.g. `ema_params/1000`, `net_ema1`;
        "" for the first that is there. A file without sections is taken as it is.
    """
    with opened_checkpoint(path) as stored:
        names = _choose(section, stored.names)
        if (fitting := _kinds_of(names)) and kind not in fitting:
            raise BadInput(f"kind={kind!r}: its parameters are those of kind={fitting[0]!r}")
        if not any(our_name(kind, name) for name in names):
            raise BadInput(f"kind={kind!r}: none of its parameters has a name of any kind")
        return _read(stored, names)


def find_kind(path: epath.PathLike, *, section: str = "") -> str:
    """Return the kind of a published checkpoint, as the names of its parameters tell it."""
    with opened_checkpoint(path) as stored:
        names = _choose(section, stored.names)
        if not (fitting := _kinds_of(names)):
            raise BadInput(f"its parameters ({listed([*names], 3)}) have names of no kind")
        if "sit" not in fitting:
            return fitting[0]
        return _sit_or_dit(stored.settings, epath.Path(path).name)


def _sit_or_dit(settings: Mapping[str, Any], file: str) -> str:
    """Return which of two kinds with the same names its settings, or else its file's name, tell."""
    for text in (settings.get("model"), file):
        told = set(flow_matching.KINDS) & set(re.findall("[a-z]+", str(text).lower()))
        if len(told) == 1:
            break
    else:
        raise BadInput("is of SiT or of DiT, whose names are the same; set init.kind=sit or dit")
    for key, value in {"path_type": "Linear", "prediction": "velocity"}.items():
        if told == {"sit"} and settings.get(key, value) != value:
            raise BadInput(f"was trained with {key}={settings[key]!r}; must be {value!r}")
    return told.pop()


def fit_published(kind: str, flat: Arrays, like: PyTree) -> PyTree:
    """Return published parameters (`read_published`) as the parameter tree of a network.

    A second head is left out where the tree `like` has none.
    """
    wanted = flatten_dict(like, sep="/")
    one_head = not any(name.startswith(_SECOND_HEAD) for name in wanted)
    fitting = {}
    for published, stored in flat.items():
        name, how = our_name(kind, published) or (published, "")
        if how != "computed" and not (one_head and name.startswith(_SECOND_HEAD)):
            fitting[name] = as_ours(stored, how)
    if kind in flow_matching.KINDS:
        channels = flat[published_name(kind, "patch_embedding/kernel")[0]].shape[1]
        fitting = flow_matching.as_flow_map(kind, fitting, wanted, channels=channels)

    def told(arrays: Mapping[str, Any]) -> dict[str, Any]:
        theirs = {name: published_name(kind, name) for name in arrays}
        return {f"{theirs[k][0]} ({k})" if theirs[k] else k: each for k, each in arrays.items()}

    problem = f"published {kind} parameters do not fit the network"
    fix = "build the network with the checkpoint's sizes"
    check_fit(problem, told(fitting), told(wanted), fix)
    return unflatten_dict(fitting, sep="/")


def write_published(
    path: epath.PathLike, kind: str, params: PyTree, *, patch_size: int, positions: Any = ()
) -> None:
    """Write a transformer's parameters for published code and `read_published`.

    Args:
      path: ends in `.npz` or `.safetensors`; the file is replaced if it exists.
      positions: embeddings `[N, width]` of patches, which codes in PyTorch store.
    """
    path = absolute(path)
    if path.suffix not in (".npz", ".safetensors"):
        raise BadInput(f"{path}: must end in .npz or .safetensors")
    if kind == "sit" and {"patch_embedding", "condition"} <= params.keys():  # of a DiT
        params = flow_matching.as_flow_matching(params, patch_size=patch_size)
    flat = to_published(kind, params, patch_size=patch_size)
    if len(positions):
        flat["pos_embed"] = np.ascontiguousarray(positions)[None]
    problem, fix = f"{path}: cannot be written", "choose another path"
    with refused((OSError, SafetensorError), problem, fix), written_aside(path) as aside:
        np.savez(aside, **flat) if path.suffix == ".npz" else save_file(flat, aside)


def _choose(section: str, names: Collection[str]) -> dict[str, str]:
    """Return {name without section and net/: stored name} of a section's parameters."""
    stored = {_AVERAGE.sub(r"\2/", name, count=1): name for name in names}
    named = sorted({found[2] for found in map(_AVERAGE.match, names) if found})
    if named:  # the rest counts updates
        stored = {short: name for short, name in stored.items() if short != name}
    known = list(dict.fromkeys((*_SECTIONS, *named)))
    if section and section.split("/")[0] not in known:
        raise BadInput(f"section={section!r}: must be, or lie below, one of {', '.join(known)}")
    roots = {name.split("/")[0] for name in stored if "/" in name}
    there = [each for each in known if each in roots]
    section = section or next(iter(there), "")
    start = f"{section}/" if there else ""
    chosen = {k.removeprefix(start): name for k, name in stored.items() if k.startswith(start)}
    if not chosen:
        raise BadInput(f"holds no {section or 'parameters'}, but {', '.join(there) or 'nothing'}")
    averages = sorted({short.split("/net/")[0] for short in chosen if "/net/" in short})
    if len(averages) > 1:
        choices = [f"{section}/{average}" for average in averages]
        raise BadInput(f"section={section!r}: must be one of its averages: {', '.join(choices)}")
    prefix = f"{averages[0]}/" if averages else ""
    return {_WRAPPERS.sub("", k.removeprefix(prefix), count=1): v for k, v in chosen.items()}


def _kinds_of(names: Collection[str]) -> list[str]:
    """Return the kinds that have all of some names, the plainest first."""
    return [kind for kind in KINDS if all(our_name(kind, name) for name in names)]


def _read(stored: Stored, names: Mapping[str, str]) -> Arrays:
    """Return the arrays of {name: stored name} by sorted names, in float32."""
    arrays = stored.read(list(names.values()))
    return {name: _as_float32(name, arrays[names[name]]) for name in sorted(names)}


def _as_float32(name: str, array: Shaped[np.ndarray, "..."]) -> Float[np.ndarray, "..."]:
    if array.dtype == np.dtype("V2"):  # how .npz files keep bfloat16
        array = array.view(bfloat16)
    if array.dtype not in (np.float32, np.float16, bfloat16):
        raise BadInput(f"{name} is {array.dtype}; must be float32, bfloat16 or float16")
    if not np.isfinite(array).all():
        raise BadInput(f"{name} has numbers that are not finite; take another checkpoint")
    return array.astype(np.float32, copy=False)
