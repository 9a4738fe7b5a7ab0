"""Read weights of published checkpoints, fit them to a network, write ours under published names.

A published checkpoint is a folder `checkpoint_N` that a published training script wrote with
Orbax: a tree of `params`, `ema_params`, `opt_state` and `step`, the parameters below `net`. Pixel
MeanFlow keeps several averages: there `ema_params` holds one tree for each. A `.npz` or
`.safetensors` file holds the same names, joined by "/". A `.pt` or `.pth` file of PyTorch holds
`model`, `ema` or `ema_model`, or one of them alone. The `model` of py-meanflow holds the network
and its averages: `net`, `net_ema`, `net_ema1`, `net_ema2`.

Source: the recorded checkpoints of the published implementations (tests/reference).
"""

import functools
import re
from collections.abc import Collection
from fnmatch import fnmatchcase
from typing import Any

import numpy as np
from etils import epath
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.numpy import bfloat16
from jaxtyping import Float, PyTree, Shaped
from safetensors import SafetensorError
from safetensors.numpy import save_file

from mf_jax.flow.errors import BadInput, check_known, list_problems, listed
from mf_jax.published import Arrays, flow_matching, reading, torch_file
from mf_jax.published.checkpoint_files import TORCH_FILES, opened_checkpoint
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
_TELLING = {
    **dict.fromkeys(
        ("meanflow", *TORCH_KINDS),
        ("patch_embedding/kernel", "condition/label_embedding/embedding"),
    ),
    "imf": ("patch_embedding/kernel", "class_tokens/embedding/embedding"),
    "pmf": ("bottleneck/kernel", "class_tokens/embedding/embedding"),
    "py_meanflow": ("enc.*_conv.weight", "map_label"),
}
"""Our names of the first layer, whose shape tells the channels, and of the table of classes.

Of a U-Net, patterns of the published names.
"""


def load_published(path: epath.PathLike, kind: str, like: PyTree, *, section: str = "") -> PyTree:
    """Return a published checkpoint (`read_published`) as a network's tree (`fit_published`)."""
    flat = read_published(path, kind, section=section)
    with reading(path, f"parameters of {kind}"):
        return fit_published(kind, flat, like)


def describe_published(path: epath.PathLike, kind: str, *, section: str = "") -> tuple[int, int]:
    """Return channels and classes of a published network (`read_published`), 0 without labels."""
    check_known("kind", kind, KINDS)
    patches, table = ((published_name(kind, ours) or (ours,))[0] for ours in _TELLING[kind])
    arrays = read_published(path, kind, section=section, only=(patches, table))
    first, classes = (
        next((array for name, array in arrays.items() if fnmatchcase(name, pattern)), None)
        for pattern in (patches, table)
    )
    if first is None or first.ndim != 4:
        raise BadInput(
            f"{path}: holds no {patches} [p, p, C, width] of a published {kind} network; check the"
            " kind"
        )
    # The last row of the table stands for no label.
    num_classes = 0 if classes is None else classes.shape[-2] - 1
    return first.shape[1 if kind in TORCH_KINDS else 2], num_classes


def read_published(
    path: epath.PathLike, kind: str, *, section: str = "", only: Collection[str] = ()
) -> Arrays:
    """Return the parameters in a published checkpoint: names without section and `net/`, float32.

    Args:
      path: a folder `checkpoint_N`, or the folder around it (the largest N is taken), or a file
        `.npz`, `.safetensors`, `.pt` or `.pth`.
      section: one of `_SECTIONS`, or one of several averages, e.g. `ema_params/1000`, `net_ema1`;
        "" for the first that is there. A file without sections is taken as it is.
      only: names or patterns of names to read, where they are there; empty for all.
    """
    check_known("kind", kind, KINDS)
    path, read = opened_checkpoint(path)
    choose = functools.partial(_choose, section, only)
    with reading(path, "a published checkpoint"):
        flat = read(path, choose)
        if not only and (fitting := _kinds_of(flat)) and kind not in fitting:
            raise BadInput(f"kind={kind!r}: its parameters are those of kind={fitting[0]!r}")
        if not only and not any(our_name(kind, name) for name in flat):
            raise BadInput(f"kind={kind!r}: none of its parameters has a name of any kind")
        return {name: _as_float32(name, array) for name, array in sorted(flat.items())}


def find_kind(path: epath.PathLike, *, section: str = "") -> str:
    """Return the kind of a published checkpoint, as the names of its parameters tell it."""
    path, read = opened_checkpoint(path)
    names: list[str] = []

    def take(stored: Collection[str]) -> dict[str, str]:
        names.extend(_choose(section, (), stored))
        return {}

    with reading(path, "a published checkpoint"):
        read(path, take)
        fitting = _kinds_of(names)
        if not fitting:
            raise BadInput(f"its parameters ({listed(names, 3)}) have names of no published kind")
        return _sit_or_dit(path) if set(flow_matching.KINDS) <= set(fitting) else fitting[0]


def _sit_or_dit(path: epath.Path) -> str:
    """Return which of two kinds, whose names are the same, its settings or its own name tell."""
    is_torch = path.suffix in TORCH_FILES
    settings = torch_file.read_training(path.read_bytes())[1] if is_torch else {}
    for text in (settings.get("model"), path.name):
        words = re.findall("[a-z]+", str(text).lower())
        told = [kind for kind in flow_matching.KINDS if kind in words]
        if len(told) != 1:
            continue
        asked = {"path_type": "Linear", "prediction": "velocity"} if told == ["sit"] else {}
        for key, value in asked.items():
            if settings.get(key, value) != value:
                raise BadInput(f"was trained with {key}={settings[key]!r}; must be {value!r}")
        return told[0]
    raise BadInput("is of SiT or of DiT, whose names are the same; set init.kind=sit or dit")


def fit_published(kind: str, flat: Arrays, like: PyTree) -> PyTree:
    """Return published parameters (`read_published`) as the parameter tree of a network.

    A second head is left out where the tree `like` has none.
    """
    wanted = flatten_dict(like, sep="/")
    one_head = not any(name.startswith(_SECOND_HEAD) for name in wanted)
    fitting, unknown = {}, []
    for published, stored in flat.items():
        name, how = our_name(kind, published) or ("", "")
        if how == "computed" or (one_head and name.startswith(_SECOND_HEAD)):
            continue
        if name in wanted:
            fitting[name] = as_ours(stored, how)
        else:
            unknown.append(f"{published} ({name})" if name else published)
    if kind in flow_matching.KINDS:
        channels = flat[published_name(kind, _TELLING[kind][0])[0]].shape[1]
        fitting = flow_matching.as_flow_map(kind, fitting, wanted, channels=channels)
    nothing = ("nothing published",)
    theirs = {name: (published_name(kind, name) or nothing)[0] for name in wanted}
    missing = [f"{theirs[name]} ({name})" for name in wanted if name not in fitting]
    misshapen = [
        f"{theirs[name]} ({name}) is {list(flat[theirs[name]].shape)}, "
        f"must become {list(wanted[name].shape)}"
        for name, array in fitting.items()
        if array.shape != wanted[name].shape and theirs[name] in flat
    ]
    names = {"missing": missing, "unknown to the network": unknown, "of another shape": misshapen}
    if problems := list_problems(names):
        raise BadInput(
            f"published {kind} parameters do not fit the network; {problems}; "
            "build the network with the checkpoint's sizes"
        )
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
    try:
        with written_aside(path) as aside:
            if path.suffix == ".npz":
                np.savez(aside, **flat)
            else:
                save_file(flat, aside)
    except (OSError, SafetensorError) as error:
        raise BadInput(f"{path}: cannot be written ({error}); choose another path") from error


def _choose(section: str, only: Collection[str], names: Collection[str]) -> dict[str, str]:
    """Return {name without section and net/: stored name} of a section's parameters."""
    stored = {_AVERAGE.sub(r"\2/", name, count=1): name for name in names}
    named = sorted({found[2] for found in map(_AVERAGE.match, names) if found})
    if named:  # the rest counts updates
        stored = {short: name for short, name in stored.items() if short != name}
    known = tuple(dict.fromkeys((*_SECTIONS, *named)))
    if section and section.split("/")[0] not in known:
        raise BadInput(
            f"section={section!r}: must be one of {', '.join(known)}, or below one of them"
        )
    there = {name.split("/")[0] for name in stored if "/" in name}
    sections = [each for each in known if each in there]
    section = section or next(iter(sections), "")
    start = f"{section}/" if sections else ""
    chosen = {
        short.removeprefix(start): name for short, name in stored.items() if short.startswith(start)
    }
    if not chosen:
        raise BadInput(
            f"holds no {section or 'parameters'}, but {', '.join(sections) or 'nothing'}"
        )
    averages = sorted({short.split("/net/")[0] for short in chosen if "/net/" in short})
    if len(averages) > 1:
        choices = ", ".join(f"{section}/{average}" for average in averages)
        raise BadInput(f"section={section!r}: must be one of its averages: {choices}")
    prefix = f"{averages[0]}/" if averages else ""
    bare = {_WRAPPERS.sub("", k.removeprefix(prefix), count=1): v for k, v in chosen.items()}
    return {k: v for k, v in bare.items() if not only or any(fnmatchcase(k, p) for p in only)}


def _kinds_of(names: Collection[str]) -> list[str]:
    """Return the kinds that have all of some names, the plainest first."""
    return [kind for kind in KINDS if all(our_name(kind, name) for name in names)]


def _as_float32(name: str, array: Shaped[np.ndarray, "..."]) -> Float[np.ndarray, "..."]:
    if array.dtype == np.dtype("V2"):  # how .npz files keep bfloat16
        array = array.view(bfloat16)
    if array.dtype not in (np.float32, np.float16, bfloat16):
        raise BadInput(f"{name} is {array.dtype}; must be float32, bfloat16 or float16")
    if not np.isfinite(array).all():
        raise BadInput(f"{name} has numbers that are not finite; take another checkpoint")
    return array.astype(np.float32, copy=False)
