"""Read the weights of published checkpoints, fit them to a network, and write ours under the published names.

A published checkpoint is a folder `checkpoint_N` that a published training script wrote with Orbax: a tree of `params`,
`ema_params`, `opt_state` and `step`, the parameters below `net`. Pixel MeanFlow keeps several averages: there
`ema_params` holds one tree for each. A `.npz` or `.safetensors` file holds the same names, joined by "/".

Source: the recorded checkpoints of the published implementations (tests/reference).
"""

import contextlib
import functools
import json
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from urllib.parse import quote

import numpy as np
import tensorstore as ts
from etils import epath
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.numpy import bfloat16
from jaxtyping import Float, PyTree, Shaped
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from mf_jax.errors import BadInput, check_known
from mf_jax.published.names import KINDS, as_ours, our_name, published_name, to_published
from mf_jax.runtime.files import on_disk

_Choose = Callable[[Collection[str]], dict[str, str]]
_SECTIONS = ("ema_params", "params")
_NETWORK = "net/"
_SECOND_HEAD = "v_head/"
_NAMED_IN_ERROR = 8
_TELLING = {
    "meanflow": ("patch_embedding/kernel", "condition/label_embedding/embedding"),
    "imf": ("patch_embedding/kernel", "class_tokens/embedding/embedding"),
    "pmf": ("bottleneck/kernel", "class_tokens/embedding/embedding"),
}
"""Our names of what each image first meets, whose shape tells its channels, and of the table of classes."""


def load_published(
    path: epath.PathLike, kind: str, like: PyTree, *, section: str = "ema_params"
) -> PyTree[Float[np.ndarray, "..."]]:
    """Return the weights of a published checkpoint as the parameters of a network.

    Args:
      path, kind, section: as for `read_published`.
      like: as for `fit_published`.

    Returns:
      The parameter tree, float32, on the host.

    Raises:
      BadInput: if the checkpoint cannot be read or does not fit; names the path.
    """
    flat = read_published(path, kind, section=section)
    try:
        return fit_published(kind, flat, like)
    except BadInput as problem:
        raise BadInput(f"{path}: {problem}") from problem


def describe_published(
    path: epath.PathLike, kind: str, *, section: str = "ema_params"
) -> tuple[int, int]:
    """Return what data a published network takes, from the two arrays that tell; the others are not read.

    Args:
      path, kind, section: as for `read_published`.

    Returns:
      Channels, and the number of classes, 0 for a network without labels.

    Raises:
      BadInput: as `read_published`, or if there is no patch embedding.
    """
    check_known("kind", kind, KINDS)
    patches, table = (published_name(kind, ours)[0] for ours in _TELLING[kind])
    found = read_published(path, kind, section=section, only=(patches, table))
    if patches not in found or found[patches].ndim != 4:
        raise BadInput(
            f"{path}: holds no {patches} [p, p, C, width] of a published {kind} network; check the kind"
        )
    # the last row of the table is that of no label
    return found[patches].shape[2], found[table].shape[-2] - 1 if table in found else 0


def read_published(
    path: epath.PathLike, kind: str, *, section: str = "ema_params", only: Collection[str] = ()
) -> dict[str, Float[np.ndarray, "..."]]:
    """Return the parameters in a published checkpoint, and nothing else of it.

    Args:
      path: a folder `checkpoint_N`, or the folder around it (the largest N is taken), or a file `.npz` or
        `.safetensors`.
      kind: one of `names.KINDS`.
      section: `ema_params`, `params`, or one of several averages, e.g. `ema_params/1000`. A file without sections
        is taken as it is.
      only: names of those wanted, where they are there; by default all.

    Returns:
      Published names, without section and `net/`, to float32 arrays.

    Raises:
      BadInput: if there is no such checkpoint, it is damaged, or its names are not those of the kind.
    """
    check_known("kind", kind, KINDS)
    if section.split("/")[0] not in _SECTIONS:
        raise BadInput(
            f"section={section!r}: must be one of {', '.join(_SECTIONS)}, or below one of them"
        )
    path = epath.Path(path).expanduser().absolute()
    if not path.exists():
        raise BadInput(f"{path}: no such file or folder; must be a published checkpoint")
    choose = functools.partial(_choose, path, section, only)
    if path.is_dir():
        flat = _read_folder(_newest(path), choose)
    elif path.suffix in _READERS:
        flat = _READERS[path.suffix](path, choose)
    else:
        raise BadInput(
            f"{path}: must be a folder checkpoint_N, or a file ending in {' or '.join(_READERS)}"
        )
    if not only:
        _check_kind(path, flat, kind)
    return {name: _as_float32(path, name, array) for name, array in sorted(flat.items())}


def fit_published(
    kind: str, flat: Mapping[str, Float[np.ndarray, "..."]], like: PyTree
) -> PyTree[Float[np.ndarray, "..."]]:
    """Return published parameters as the parameter tree of a network.

    Parameters of a second head are left out where the network is built without one.

    Args:
      kind: one of `names.KINDS`.
      flat: published names to arrays, from `read_published`.
      like: the shapes wanted, e.g. `jax.eval_shape` of `models.initial_params`.

    Returns:
      The parameter tree.

    Raises:
      BadInput: one error that names all parameters that are missing, unknown to the network or of another shape.
    """
    wanted = flatten_dict(like, sep="/")
    one_head = not any(name.startswith(_SECOND_HEAD) for name in wanted)
    fitting, unknown, misshapen = {}, [], []
    for published, stored in flat.items():
        try:
            name, layout = our_name(kind, published)
        except BadInput:
            unknown.append(published)
            continue
        if one_head and name.startswith(_SECOND_HEAD):
            continue
        if name not in wanted:
            unknown.append(f"{published} ({name})")
            continue
        fitting[name] = stored
        with contextlib.suppress(
            BadInput
        ):  # an array that has not the axes for its layout has not the shape either
            fitting[name] = as_ours(published, stored, layout)
        if fitting[name].shape != wanted[name].shape:
            shapes = f"is {list(stored.shape)}, must become {list(wanted[name].shape)}"
            misshapen.append(f"{published} ({name}) {shapes}")
    missing = [_both_names(kind, name) for name in wanted if name not in fitting]
    kinds_of_problem = {
        "missing": missing,
        "unknown to the network": unknown,
        "of another shape": misshapen,
    }
    problems = [f"{what}: {listed(names)}" for what, names in kinds_of_problem.items() if names]
    if problems:
        raise BadInput(
            f"published {kind} parameters do not fit the network; {'; '.join(problems)}; "
            "build the network with the checkpoint's sizes"
        )
    return unflatten_dict(fitting, sep="/")


def write_published(path: epath.PathLike, kind: str, params: PyTree, *, patch_size: int) -> None:
    """Write parameters under their published names, so that published code and `read_published` can read them.

    Args:
      path: of the file, ending in `.npz` or `.safetensors`; replaced if it exists.
      kind: one of `names.KINDS`.
      params: of `models.DiT` or `models.InContextDiT`.
      patch_size: of the network.

    Raises:
      BadInput: if the path ends in anything else or cannot be written, or the kind has no such parameters.
    """
    path = epath.Path(path).expanduser().absolute()
    if path.suffix not in _WRITERS:
        raise BadInput(f"{path}: must end in {' or '.join(_WRITERS)}")
    flat = to_published(kind, params, patch_size=patch_size)
    unfinished = path.with_name(
        f".{path.name}.unfinished"
    )  # a file under its own name is a whole one
    try:
        _WRITERS[path.suffix](unfinished, flat)
        unfinished.replace(path)
    except (OSError, SafetensorError) as error:
        raise BadInput(f"{path}: cannot be written ({error}); choose another path") from error
    finally:
        unfinished.unlink(missing_ok=True)


def _newest(folder: epath.Path) -> epath.Path:
    """Return the Orbax checkpoint that a folder is or holds."""
    if (folder / "_METADATA").exists():
        return folder
    numbers = [re.fullmatch(r"checkpoint_(\d+)", child.name) for child in folder.iterdir()]
    if not any(numbers):
        raise BadInput(
            f"{folder}: must be a folder checkpoint_N of a published training script, or hold one"
        )
    return folder / max((match for match in numbers if match), key=lambda match: int(match[1]))[0]


@contextlib.contextmanager
def _damage(path: epath.Path) -> Iterator[None]:
    # what a reader of damaged files raises depends on where it stumbles
    try:
        yield
    except (BadInput, MemoryError):
        raise
    except Exception as error:
        what = f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"
        raise BadInput(
            f"{path}: cannot be read as a published checkpoint ({what}); check the file, or fetch it again"
        ) from error


def _read_folder(folder: epath.Path, choose: _Choose) -> dict[str, Shaped[np.ndarray, "..."]]:
    """Read the arrays chosen, alone.

    Orbax itself would open the optimiser's arrays too, and its threads would print tracebacks about damaged files.
    """
    with _damage(folder):
        about = json.loads((folder / "_METADATA").read_text())
        keys = [
            [key["key"] for key in entry["key_metadata"]]
            for entry in about["tree_metadata"].values()
        ]
        dotted = {"/".join(parts): ".".join(parts) for parts in keys}
        chosen = choose(dotted)
        root = f"{folder}/" if "://" in str(folder) else f"file://{quote(str(folder))}/"
        one_database = (folder / "manifest.ocdbt").exists()  # otherwise every array is a folder
        driver = {
            "driver": "zarr3" if about.get("use_zarr3") else "zarr",
            "fill_missing_data_reads": False,
        }
        opened = {}
        for short, name in chosen.items():
            where = f"{dotted[name]}/"
            kvstore = (
                {"driver": "ocdbt", "base": root, "path": where} if one_database else root + where
            )
            opened[short] = ts.open(driver | {"kvstore": kvstore}, open=True, read=True)
        reads = {short: array.result().read() for short, array in opened.items()}
        return {short: read.result() for short, read in reads.items()}


def _read_npz(path: epath.Path, choose: _Choose) -> dict[str, Shaped[np.ndarray, "..."]]:
    with _damage(path), path.open("rb") as file, np.load(file) as arrays:
        return {short: arrays[name] for short, name in choose(arrays.files).items()}


def _read_safetensors(path: epath.Path, choose: _Choose) -> dict[str, Shaped[np.ndarray, "..."]]:
    with _damage(path), on_disk(path) as place, safe_open(place, framework="np") as file:
        return {short: file.get_tensor(name) for short, name in choose(file.keys()).items()}


def _write_npz(path: epath.Path, flat: Mapping[str, Shaped[np.ndarray, "..."]]) -> None:
    with path.open("wb") as file:
        np.savez(file, **flat)


def _write_safetensors(path: epath.Path, flat: Mapping[str, Shaped[np.ndarray, "..."]]) -> None:
    save_file({name: np.ascontiguousarray(array) for name, array in flat.items()}, path)


_Reader = Callable[[epath.Path, _Choose], dict[str, Shaped[np.ndarray, "..."]]]
_READERS: dict[str, _Reader] = {".npz": _read_npz, ".safetensors": _read_safetensors}
_WRITERS = {".npz": _write_npz, ".safetensors": _write_safetensors}


def _choose(
    path: epath.Path, section: str, only: Collection[str], names: Collection[str]
) -> dict[str, str]:
    """Return {name without section and net/: stored name} of a section's parameters, all or `only` some."""
    sections = sorted({name.split("/")[0] for name in names} & set(_SECTIONS))
    start = f"{section}/" if sections else ""
    chosen = {name.removeprefix(start): name for name in names if name.startswith(start)}
    if not chosen:
        raise BadInput(
            f"{path}: holds no {section}, but {', '.join(sections) or 'no parameters at all'}"
        )
    averages = sorted(
        {short.split(f"/{_NETWORK}")[0] for short in chosen if f"/{_NETWORK}" in short}
    )
    if len(averages) > 1:
        choices = ", ".join(f"{section}/{average}" for average in averages)
        raise BadInput(f"{path}: section={section!r}: must be one of its averages: {choices}")
    inner = f"{averages[0]}/{_NETWORK}" if averages else _NETWORK
    chosen = {short.removeprefix(inner): name for short, name in chosen.items()}
    return {short: name for short, name in chosen.items() if not only or short in only}


def _check_kind(path: epath.Path, names: Collection[str], kind: str) -> None:
    """Raise BadInput if all names are of another kind, or none is of this."""

    def unknown(kind: str) -> int:
        return sum(_is_unknown(kind, name) for name in names)

    fitting = [other for other in KINDS if not unknown(other)]
    if unknown(kind) and fitting:
        raise BadInput(f"{path}: kind={kind!r}: its parameters are those of kind={fitting[0]!r}")
    if unknown(kind) == len(names):
        raise BadInput(
            f"{path}: kind={kind!r}: none of its parameters has a published name of any kind"
        )


def _is_unknown(kind: str, published: str) -> bool:
    try:
        our_name(kind, published)
    except BadInput:
        return True
    return False


def _as_float32(
    path: epath.Path, name: str, array: Shaped[np.ndarray, "..."]
) -> Float[np.ndarray, "..."]:
    if array.dtype == np.dtype("V2"):  # how .npz files keep bfloat16
        array = array.view(bfloat16)
    if array.dtype not in (np.float32, np.float16, bfloat16):
        raise BadInput(f"{path}: {name} is {array.dtype}; must be float32, bfloat16 or float16")
    return array.astype(np.float32, copy=False)


def _both_names(kind: str, ours: str) -> str:
    try:
        return f"{published_name(kind, ours)[0]} ({ours})"
    except BadInput:
        return f"{ours} (which no published {kind} network has)"


def listed(names: list[str]) -> str:
    """Return names separated by commas, of many only the first and how many more there are."""
    more = f" and {len(names) - _NAMED_IN_ERROR} more" * (len(names) > _NAMED_IN_ERROR)
    return ", ".join(names[:_NAMED_IN_ERROR]) + more
