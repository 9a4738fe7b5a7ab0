"""The files of published checkpoints: arrays by name, of which only those asked for are read."""

import contextlib
import math
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple
from urllib.parse import quote

import tensorstore as ts
from etils import epath
from safetensors import safe_open

from mf_jax.flow.errors import BadInput
from mf_jax.published import Arrays, reading
from mf_jax.published.torch_file import read_torch
from mf_jax.runtime.archives import array_names, check_claim, opened_npz, read_array
from mf_jax.runtime.files import absolute, on_disk, opened
from mf_jax.runtime.json_files import parse_json

_FORMS = "a folder checkpoint_N, or end in .npz, .safetensors, .pt or .pth"


class Stored(NamedTuple):
    """The names in a checkpoint, what reads the arrays of some of them, a training's settings."""

    names: Collection[str]
    read: Callable[[Sequence[str]], Arrays]
    settings: Mapping[str, Any] = {}


@contextlib.contextmanager
def opened_checkpoint(path: epath.PathLike) -> Iterator[Stored]:
    """Open a published checkpoint; whatever the body raises is a BadInput that names it."""
    with reading(path, "a published checkpoint"), contextlib.ExitStack() as stack:
        path = absolute(path)
        if path.is_dir():
            yield _opened_folder(_newest(path))
        elif path.suffix == ".npz":
            archive = stack.enter_context(opened_npz(path))
            yield _stored(array_names(archive), lambda name: read_array(archive, name))
        elif path.suffix in (".pt", ".pth"):
            arrays, settings = read_torch(stack.enter_context(opened(path)).read())
            yield _stored(arrays, arrays.get)._replace(settings=settings)
        elif path.suffix == ".safetensors" and path.is_file():
            place = stack.enter_context(on_disk(path))
            file = stack.enter_context(safe_open(place, framework="np"))
            yield _stored(file.keys(), file.get_tensor)
        else:
            raise BadInput(f"must be {_FORMS}")


def _stored(names: Collection[str], read: Callable[[str], Any]) -> Stored:
    return Stored(names, lambda asked: {name: read(name) for name in asked})


def _newest(folder: epath.Path) -> epath.Path:
    """Return the Orbax checkpoint that a folder is or holds."""
    if (folder / "_METADATA").exists():
        return folder
    numbers = [re.fullmatch(r"checkpoint_(\d+)", child.name) for child in folder.iterdir()]
    if not any(numbers):
        raise BadInput(f"must be {_FORMS}; or a folder that holds some checkpoint_N")
    return folder / max(filter(None, numbers), key=lambda match: int(match[1]))[0]


def _opened_folder(folder: epath.Path) -> Stored:
    """Open an Orbax checkpoint without Orbax.

    That would open the optimiser's arrays too, and its threads would print tracebacks about damaged
    files.
    """
    metadata = parse_json((folder / "_METADATA").read_bytes(), {"tree_metadata": {}})
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

    def read(names: Sequence[str]) -> Arrays:
        opening = [open_array(name) for name in names]
        arrays = [array.result() for array in opening]
        claimed = sum(_num_bytes(array, array.shape) for array in arrays)
        chunks = (_num_bytes(array, array.chunk_layout.read_chunk.shape) for array in arrays)
        files = (place / name for place, _, names in folder.walk() for name in names)
        check_claim(max([claimed, *chunks]), sum(file.stat().length for file in files))
        reads = [array.read() for array in arrays]
        return {name: array.result() for name, array in zip(names, reads, strict=True)}

    return Stored(list(dotted), read)


def _num_bytes(array: ts.TensorStore, shape: Sequence[int]) -> int:
    return math.prod(shape) * array.dtype.numpy_dtype.itemsize
