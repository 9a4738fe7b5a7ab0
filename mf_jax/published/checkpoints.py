"""Read weights of published checkpoints, fit them to a network, write ours under published names.

A published checkpoint is a folder `checkpoint_N` that a published training script wrote with
Orbax: a tree of `params`, `ema_params`, `opt_state` and `step`, the parameters below `net`. Pixel
MeanFlow keeps several averages: there `ema_params` holds one tree for each. A `.npz` or
`.safetensors` file holds the same names, joined by "/".

Source: the recorded checkpoints of the published implementations (tests/reference).
"""

import functools
import re
from collections.abc import Callable, Collection, Mapping
from urllib.parse import quote

import numpy as np
import tensorstore as ts
from etils import epath
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.numpy import bfloat16
from jaxtyping import Float, PyTree, Shaped
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from mf_jax.flow.errors import BadInput, check_known, list_problems
from mf_jax.published import reading
from mf_jax.published.names import KINDS, as_ours, our_name, published_name, to_published
from mf_jax.runtime.files import on_disk, parse_json, written_aside

Arrays = dict[str, Shaped[np.ndarray, "..."]]
_Choose = Callable[[Collection[str]], dict[str, str]]
"""From the names that are stored to {short name: stored name} of the wanted ones."""
_SECTIONS = ("ema_params", "params")
_NETWORK = "net/"
_SECOND_HEAD = "v_head/"
_TELLING = {
    "meanflow": ("patch_embedding/kernel", "condition/label_embedding/embedding"),
    "imf": ("patch_embedding/kernel", "class_tokens/embedding/embedding"),
    "pmf": ("bottleneck/kernel", "class_tokens/embedding/embedding"),
}
"""Our names of the first layer, whose shape tells the channels, and of the table of classes."""


def load_published(
    path: epath.PathLike, kind: str, like: PyTree, *, section: str = "ema_params"
) -> PyTree[Float[np.ndarray, "..."]]:
    """Return a published checkpoint (`read_published`) as a network's tree (`fit_published`)."""
    flat = read_published(path, kind, section=section)
    with reading(path, f"parameters of {kind}"):
        return fit_published(kind, flat, like)


def describe_published(
    path: epath.PathLike, kind: str, *, section: str = "ema_params"
) -> tuple[int, int]:
    """Return channels and classes of a published network (`read_published`), 0 without labels."""
    check_known("kind", kind, KINDS)
    patches, table = (published_name(kind, ours)[0] for ours in _TELLING[kind])
    arrays = read_published(path, kind, section=section, only=(patches, table))
    if patches not in arrays or arrays[patches].ndim != 4:
        raise BadInput(
            f"{path}: holds no {patches} [p, p, C, width] of a published {kind} network; check the"
            " kind"
        )
    # The last row of the table stands for no label.
    num_classes = arrays[table].shape[-2] - 1 if table in arrays else 0
    return arrays[patches].shape[2], num_classes


def read_published(
    path: epath.PathLike, kind: str, *, section: str = "ema_params", only: Collection[str] = ()
) -> dict[str, Float[np.ndarray, "..."]]:
    """Return the parameters in a published checkpoint: names without section and `net/`, float32.

    Args:
      path: a folder `checkpoint_N`, or the folder around it (the largest N is taken), or a file
        `.npz` or `.safetensors`.
      section: `ema_params`, `params`, or one of several averages, e.g. `ema_params/1000`. A file
        without sections is taken as it is.
      only: names to read, where they are there; empty for all.
    """
    check_known("kind", kind, KINDS)
    if section.split("/")[0] not in _SECTIONS:
        raise BadInput(
            f"section={section!r}: must be one of {', '.join(_SECTIONS)}, or below one of them"
        )
    path = epath.Path(path).expanduser().absolute()
    if not path.exists():
        raise BadInput(f"{path}: no such file or folder; must be a published checkpoint")
    if not path.is_dir() and path.suffix not in _FILES:
        raise BadInput(
            f"{path}: must be a folder checkpoint_N, or a file ending in {' or '.join(_FILES)}"
        )
    choose = functools.partial(_choose, section, only)
    with reading(path, "a published checkpoint"):
        read = _read_folder if path.is_dir() else _FILES[path.suffix][0]
        flat = read(path, choose)
        if not only:
            _check_kind(flat, kind)
        return {name: _as_float32(name, array) for name, array in sorted(flat.items())}


def fit_published(
    kind: str, flat: Mapping[str, Float[np.ndarray, "..."]], like: PyTree
) -> PyTree[Float[np.ndarray, "..."]]:
    """Return published parameters (`read_published`) as the parameter tree of a network.

    A second head is left out where the tree `like` has none.
    """
    wanted = flatten_dict(like, sep="/")
    one_head = not any(name.startswith(_SECOND_HEAD) for name in wanted)
    fitting, unknown, misshapen = {}, [], []
    for published, stored in flat.items():
        name, _ = our_name(kind, published) or ("", "")
        if one_head and name.startswith(_SECOND_HEAD):
            continue
        if name not in wanted:
            unknown.append(f"{published} ({name})" if name else published)
            continue
        fitting[name] = as_ours(stored)
        if fitting[name].shape != wanted[name].shape:
            shapes = f"is {list(stored.shape)}, must become {list(wanted[name].shape)}"
            misshapen.append(f"{published} ({name}) {shapes}")
    names_of = {name: published_name(kind, name) for name in wanted if name not in fitting}
    missing = [
        f"{(known or ['nothing published'])[0]} ({name})" for name, known in names_of.items()
    ]
    names = {"missing": missing, "unknown to the network": unknown, "of another shape": misshapen}
    if problems := list_problems(names):
        raise BadInput(
            f"published {kind} parameters do not fit the network; {problems}; "
            "build the network with the checkpoint's sizes"
        )
    return unflatten_dict(fitting, sep="/")


def write_published(path: epath.PathLike, kind: str, params: PyTree, *, patch_size: int) -> None:
    """Write a transformer's parameters for published code and `read_published`.

    Args:
      path: ends in `.npz` or `.safetensors`; the file is replaced if it exists.
    """
    path = epath.Path(path).expanduser().absolute()
    if path.suffix not in _FILES:
        raise BadInput(f"{path}: must end in {' or '.join(_FILES)}")
    flat = to_published(kind, params, patch_size=patch_size)
    try:
        with written_aside(path) as aside:
            _FILES[path.suffix][1](aside, flat)
    except (OSError, SafetensorError) as error:
        raise BadInput(f"{path}: cannot be written ({error}); choose another path") from error


def _newest(folder: epath.Path) -> epath.Path:
    """Return the Orbax checkpoint that a folder is or holds."""
    if (folder / "_METADATA").exists():
        return folder
    numbers = [re.fullmatch(r"checkpoint_(\d+)", child.name) for child in folder.iterdir()]
    if not any(numbers):
        raise BadInput("must be a folder checkpoint_N of a published training script, or hold one")
    return folder / max((match for match in numbers if match), key=lambda match: int(match[1]))[0]


def _read_folder(folder: epath.Path, choose: _Choose) -> Arrays:
    """Read the chosen arrays alone.

    Orbax itself would open the optimiser's arrays too, and its threads would print tracebacks
    about damaged files.
    """
    folder = _newest(folder)
    like = {"tree_metadata": {}}
    metadata, _ = parse_json((folder / "_METADATA").read_bytes(), like)
    entries = metadata["tree_metadata"].values()
    keys = [[key["key"] for key in entry["key_metadata"]] for entry in entries]
    dotted = {"/".join(parts): ".".join(parts) for parts in keys}
    root = f"{folder}/" if "://" in str(folder) else f"file://{quote(str(folder))}/"
    one_database = (folder / "manifest.ocdbt").exists()  # otherwise every array is a folder
    driver = "zarr3" if metadata.get("use_zarr3") else "zarr"

    def open_array(name: str) -> ts.Future:
        where = f"{dotted[name]}/"
        database = {"driver": "ocdbt", "base": root, "path": where}
        kvstore = database if one_database else root + where
        spec = {"driver": driver, "kvstore": kvstore, "fill_missing_data_reads": False}
        return ts.open(spec, open=True, read=True)

    arrays = {short: open_array(name) for short, name in choose(dotted).items()}
    reads = {short: array.result().read() for short, array in arrays.items()}
    return {short: read.result() for short, read in reads.items()}


def _read_npz(path: epath.Path, choose: _Choose) -> Arrays:
    with path.open("rb") as file, np.load(file) as arrays:
        return {short: arrays[name] for short, name in choose(arrays.files).items()}


def _read_safetensors(path: epath.Path, choose: _Choose) -> Arrays:
    with on_disk(path) as place, safe_open(place, framework="np") as file:
        return {short: file.get_tensor(name) for short, name in choose(file.keys()).items()}


def _write_npz(path: str, flat: Arrays) -> None:
    with open(path, "wb") as file:  # given a path, numpy would append .npz
        np.savez(file, **flat)


def _write_safetensors(path: str, flat: Arrays) -> None:
    save_file({name: np.ascontiguousarray(array) for name, array in flat.items()}, path)


_FILES = {
    ".npz": (_read_npz, _write_npz),
    ".safetensors": (_read_safetensors, _write_safetensors),
}


def _choose(section: str, only: Collection[str], names: Collection[str]) -> dict[str, str]:
    """Return {name without section and net/: stored name} of a section's parameters."""
    sections = sorted({name.split("/")[0] for name in names} & set(_SECTIONS))
    start = f"{section}/" if sections else ""
    chosen = {name.removeprefix(start): name for name in names if name.startswith(start)}
    if not chosen:
        raise BadInput(f"holds no {section}, but {', '.join(sections) or 'no parameters at all'}")
    inner = f"/{_NETWORK}"
    averages = sorted({short.split(inner)[0] for short in chosen if inner in short})
    if len(averages) > 1:
        choices = ", ".join(f"{section}/{average}" for average in averages)
        raise BadInput(f"section={section!r}: must be one of its averages: {choices}")
    prefix = averages[0] + inner if averages else _NETWORK
    chosen = {short.removeprefix(prefix): name for short, name in chosen.items()}
    return {short: name for short, name in chosen.items() if not only or short in only}


def _check_kind(names: Collection[str], kind: str) -> None:
    """Raise BadInput if all names are of another kind, or none is of this."""
    known = {other: [our_name(other, name) is not None for name in names] for other in KINDS}
    fitting = [other for other in KINDS if all(known[other])]
    if fitting and kind not in fitting:
        raise BadInput(f"kind={kind!r}: its parameters are those of kind={fitting[0]!r}")
    if not any(known[kind]):
        raise BadInput(f"kind={kind!r}: none of its parameters has a published name of any kind")


def _as_float32(name: str, array: Shaped[np.ndarray, "..."]) -> Float[np.ndarray, "..."]:
    if array.dtype == np.dtype("V2"):  # how .npz files keep bfloat16
        array = array.view(bfloat16)
    if array.dtype not in (np.float32, np.float16, bfloat16):
        raise BadInput(f"{name} is {array.dtype}; must be float32, bfloat16 or float16")
    if not np.isfinite(array).all():
        raise BadInput(f"{name} has numbers that are not finite; take another checkpoint")
    return array.astype(np.float32, copy=False)
