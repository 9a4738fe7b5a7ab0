"""Read published PyTorch parameters without PyTorch, and without running what a file asks for.

`torch.save` writes a pickle, see `mf_jax.published.pickles`. It lies in a zip archive or, before
PyTorch 1.6, in front of the numbers.

Source: the format of `torch.save`, PyTorch documentation, "Serialization semantics".
"""

import functools
import hashlib
import io
import zipfile
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from etils import epath
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Array, Float32, PyTree
from safetensors import safe_open

from mf_jax.flow.errors import BadInput, list_problems, listed
from mf_jax.published import Arrays, reading
from mf_jax.published.pickles import Row, unpickle
from mf_jax.runtime.archives import check_members
from mf_jax.runtime.files import absolute, on_disk, opened

_MAGIC = 0x1950A86A20F9469CFC6C.to_bytes(10, "little")
"""Is in the first pickle of a file without an archive."""


class StateDict(NamedTuple):
    """The parameters of a file, of the types it has, and the SHA-256 of its bytes."""

    path: str
    sha256: str
    arrays: Arrays


def read_state_dict(path: epath.PathLike) -> StateDict:
    """Return the parameters in a `.pth` or `.safetensors` file, told apart by their content."""
    path = absolute(path)
    if not path.is_file():
        raise BadInput(
            f"{path}: no such file; must be a .pth or .safetensors file of published weights"
        )
    with opened(path) as file:
        content = file.read()
    with reading(path, ".pth or .safetensors"):
        if content.startswith(b"PK\x03\x04") or _MAGIC in content[:32]:  # of torch.save
            arrays = _arrays(_read(content))
        else:
            with on_disk(path) as place, safe_open(place, framework="np") as file:
                names = file.keys()
                arrays = {name: file.get_tensor(name) for name in names}
    return StateDict(str(path), hashlib.sha256(content).hexdigest(), arrays)


def _read(content: bytes) -> Any:
    return (_read_archive if content.startswith(b"PK") else _read_pickles)(content)


def read_training(content: bytes) -> tuple[Arrays, dict[str, Any]]:
    """Return the arrays {"section/name": array} that a training script has saved, and its settings.

    A state_dict alone has no sections.
    """
    saved = _read(content)
    if not isinstance(saved, dict):
        raise BadInput(f"holds a {type(saved).__name__}; must be names and tensors")
    sections = {f"{name}/": value for name, value in saved.items() if isinstance(value, dict)}
    named = [("", saved), *sections.items()]
    arrays = {
        f"{section}{name}": value
        for section, values in named
        for name, value in values.items()
        if isinstance(value, np.ndarray)
    }
    settings = getattr(saved.get("args"), "state", {})
    return arrays, settings if isinstance(settings, dict) else {}


def fit_state_dict(state: StateDict, wanted: Mapping[str, tuple[int, ...]]) -> Arrays:
    """Return the parameters of the wanted shapes in float32; the file must have just these."""
    arrays, misshapen, mistyped = state.arrays, [], []
    for name in filter(arrays.__contains__, wanted):
        array, shape = arrays[name], list(wanted[name])
        if list(array.shape) != shape:
            misshapen.append(f"{name} is {list(array.shape)}, must be {shape}")
        if not jnp.issubdtype(array.dtype, jnp.floating):
            mistyped.append(f"{name} is {array.dtype}, must be floating point")
    problems = {
        "missing": [name for name in wanted if name not in arrays],
        "left over": [name for name in arrays if name not in wanted],
        "of another shape": misshapen,
        "of another type": mistyped,
        "not finite": [name for name in wanted if not np.isfinite(arrays.get(name, 0)).all()],
    }
    if misfits := list_problems(problems):
        raise BadInput(
            f"{state.path}: its parameters do not fit the network; {misfits}; use the published "
            "file, with the config.json beside it where it has one"
        )
    return {name: arrays[name].astype(np.float32) for name in wanted}


def network_params(shapes: PyTree, state: StateDict) -> PyTree[Float32[Array, "..."]]:
    """Return the parameters of these shapes of a network whose layers have the names of a file."""
    flat = flatten_dict(shapes)
    stored = {keys: _stored(keys, leaf.shape) for keys, leaf in flat.items()}
    arrays, params = fit_state_dict(state, dict(stored.values())), {}
    for keys, (name, shape) in stored.items():
        array = arrays[name]
        if keys[-1] == "kernel":
            array = array.transpose(2, 3, 1, 0) if len(shape) == 4 else array.T
        params[keys] = jnp.asarray(array)
    return unflatten_dict(params)


def _stored(keys: tuple[str, ...], shape: tuple[int, ...]) -> tuple[str, tuple[int, ...]]:
    """Return the published name and shape of a parameter: output and input axes come first."""
    name = ".".join([*keys[:-1], "bias" if keys[-1] == "bias" else "weight"])
    return name, (*shape[:-3:-1], *shape[:-2]) if keys[-1] == "kernel" else shape


def _read_archive(content: bytes) -> Any:
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        check_members(archive, len(content), stored=True)
        (pickled,) = [name for name in archive.namelist() if name.endswith("/data.pkl")]
        folder = pickled.removesuffix("data.pkl")
        if f"{folder}byteorder" in archive.namelist():
            _check_byte_order(archive.read(f"{folder}byteorder") == b"little")
        read = functools.cache(lambda key: archive.read(f"{folder}data/{key}"))

        def storage(key: str, dtype: np.dtype, size: int) -> Row:
            return np.frombuffer(read(key), dtype, size)

        return unpickle(io.BytesIO(archive.read(pickled)), storage)


def _read_pickles(content: bytes) -> Any:
    """Read a file whose numbers come after the pickle, which only says how many there will be."""
    file, rows, left = io.BytesIO(content), {}, len(content)

    def storage(key: str, dtype: np.dtype, size: int) -> Row:
        nonlocal left
        if key not in rows:
            left -= size * dtype.itemsize
            if left < 0:
                raise BadInput("claims more numbers than it has bytes; fetch it again")
            rows[key] = np.empty(size, dtype)
        return rows[key]

    _, _, system, saved, keys = (unpickle(file, storage) for _ in range(5))
    _check_byte_order(system["little_endian"])
    for key in keys:
        if not isinstance(key, str):
            raise BadInput("has a storage without a name; fetch it again")
        row = rows[key]
        size = int.from_bytes(file.read(8), "little")
        if size != row.size or file.readinto(row.view(np.uint8)) < row.nbytes:
            raise BadInput(f"does not have the {row.size} numbers of storage {key}; fetch it again")
    return saved


def _check_byte_order(little: bool) -> None:
    if not little:
        raise BadInput(
            "was written with the most significant byte first; must be little-endian: save it again"
        )


def _arrays(saved: Any) -> Arrays:
    """Return the content of a pickle, if that is names and tensors."""
    if not isinstance(saved, dict) or not saved:
        raise BadInput(
            f"holds a {type(saved).__name__}; must be names and tensors: save a state_dict()"
        )
    others = [str(name) for name, value in saved.items() if not isinstance(value, np.ndarray)]
    if others:
        raise BadInput(
            f"holds more than names and tensors ({listed(others)}); save a state_dict() alone"
        )
    return saved
