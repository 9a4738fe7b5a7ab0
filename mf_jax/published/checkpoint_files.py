"""The files of published checkpoints: arrays by name, of which only those chosen are read."""

import math
import re
from collections.abc import Callable, Collection, Sequence
from urllib.parse import quote

import tensorstore as ts
from etils import epath
from safetensors import safe_open

from mf_jax.flow.errors import BadInput
from mf_jax.published import Arrays, torch_file
from mf_jax.runtime.archives import array_names, check_claim, opened_npz, read_array
from mf_jax.runtime.files import absolute, on_disk
from mf_jax.runtime.json_files import parse_json

Choose = Callable[[Collection[str]], dict[str, str]]
"""From the names that are stored to {short name: stored name} of the wanted ones."""
Read = Callable[[epath.Path, Choose], Arrays]


def opened_checkpoint(path: epath.PathLike) -> tuple[epath.Path, Read]:
    """Return where a published checkpoint lies, and how it is read."""
    path = absolute(path)
    if not path.exists():
        raise BadInput(f"{path}: no such file or folder; must be a published checkpoint")
    if path.is_dir():
        return path, _read_folder
    if path.suffix not in READERS or not path.is_file():
        raise BadInput(f"{path}: must be a folder checkpoint_N, or end in {' or '.join(READERS)}")
    return path, READERS[path.suffix]


def _newest(folder: epath.Path) -> epath.Path:
    """Return the Orbax checkpoint that a folder is or holds."""
    if (folder / "_METADATA").exists():
        return folder
    numbers = [re.fullmatch(r"checkpoint_(\d+)", child.name) for child in folder.iterdir()]
    if not any(numbers):
        raise BadInput("must be a folder checkpoint_N of a published training script, or hold one")
    return folder / max((match for match in numbers if match), key=lambda match: int(match[1]))[0]


def _read_folder(folder: epath.Path, choose: Choose) -> Arrays:
    """Read the chosen arrays alone.

    Orbax itself would open the optimiser's arrays too, and its threads would print tracebacks
    about damaged files.
    """
    folder = _newest(folder)
    metadata, _ = parse_json((folder / "_METADATA").read_bytes(), {"tree_metadata": {}})
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

    opening = {short: open_array(name) for short, name in choose(dotted).items()}
    arrays = {short: array.result() for short, array in opening.items()}
    claimed = sum(_num_bytes(array, array.shape) for array in arrays.values())
    chunks = (_num_bytes(array, array.chunk_layout.read_chunk.shape) for array in arrays.values())
    sizes = ((place / name).stat().length for place, _, names in folder.walk() for name in names)
    check_claim(max([claimed, *chunks]), sum(sizes))
    reads = {short: array.read() for short, array in arrays.items()}
    return {short: read.result() for short, read in reads.items()}


def _num_bytes(array: ts.TensorStore, shape: Sequence[int]) -> int:
    return math.prod(shape) * array.dtype.numpy_dtype.itemsize


def _read_npz(path: epath.Path, choose: Choose) -> Arrays:
    with opened_npz(path) as archive:
        chosen = choose(array_names(archive)).items()
        return {short: read_array(archive, name) for short, name in chosen}


def _read_safetensors(path: epath.Path, choose: Choose) -> Arrays:
    with on_disk(path) as place, safe_open(place, framework="np") as file:
        return {short: file.get_tensor(name) for short, name in choose(file.keys()).items()}


def _read_torch(path: epath.Path, choose: Choose) -> Arrays:
    arrays, _ = torch_file.read_training(path.read_bytes())
    return {short: arrays[name] for short, name in choose(arrays).items()}


TORCH_FILES = (".pt", ".pth")
READERS = {".npz": _read_npz, ".safetensors": _read_safetensors}
READERS |= dict.fromkeys(TORCH_FILES, _read_torch)
