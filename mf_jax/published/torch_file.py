"""Read published PyTorch parameters without PyTorch, and without running what a file asks for.

`torch.save` writes a pickle, a list of functions to call. Here it may name an ordered dictionary, a
tensor and types of numbers; anything else is refused before it is looked up. The pickle lies in a
zip archive or, before PyTorch 1.6, in front of the numbers.

Source: the format of `torch.save`, PyTorch documentation, "Serialization semantics".
"""

import collections
import functools
import hashlib
import io
import pickle
import zipfile
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from etils import epath
from jaxtyping import Float32, Shaped
from safetensors import safe_open

from mf_jax.flow.errors import BadInput, list_problems, listed
from mf_jax.published import reading

_MAGIC = 0x1950A86A20F9469CFC6C.to_bytes(10, "little")
"""Is in the first pickle of a file without an archive."""
_DTYPES = {
    "DoubleStorage": np.dtype("<f8"),
    "FloatStorage": np.dtype("<f4"),
    "HalfStorage": np.dtype("<f2"),
    "BFloat16Storage": np.dtype(jnp.bfloat16),
    "LongStorage": np.dtype("<i8"),
    "IntStorage": np.dtype("<i4"),
}
_Row = Shaped[np.ndarray, "n"]
Arrays = dict[str, Shaped[np.ndarray, "..."]]


class StateDict(NamedTuple):
    """The parameters of a file, of the types it has, and the SHA-256 of its bytes."""

    path: str
    sha256: str
    arrays: Arrays


def read_state_dict(path: epath.PathLike) -> StateDict:
    """Return the parameters in a `.pth` or `.safetensors` file, told apart by their content."""
    path = epath.Path(path).expanduser().absolute()
    if not path.is_file():
        raise BadInput(
            f"{path}: no such file; must be a .pth or .safetensors file of published weights"
        )
    content = path.read_bytes()
    with reading(path, ".pth or .safetensors"):
        if content.startswith(b"PK\x03\x04"):
            arrays = _read_archive(content)
        elif _MAGIC in content[:32]:
            arrays = _read_pickles(content)
        else:
            with safe_open(path, framework="np") as file:
                names = file.keys()
                arrays = {name: file.get_tensor(name) for name in names}
    return StateDict(str(path), hashlib.sha256(content).hexdigest(), arrays)


def fit_state_dict(
    state: StateDict, wanted: Mapping[str, tuple[int, ...]]
) -> dict[str, Float32[np.ndarray, "..."]]:
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


class _Unpickler(pickle.Unpickler):
    """Build ordered dictionaries of arrays and plain values, and call nothing else.

    The pickle cannot alter anything that it is handed: a type of numbers is its name, and what
    rebuilds a tensor is a bound method.

    Args:
      storage: from the key of a storage, its type and its length to its numbers in a row.
    """

    def __init__(self, content: io.BytesIO, storage: Callable[[str, np.dtype, int], _Row]):
        super().__init__(content)
        self._storage = storage

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and name in _DTYPES:
            return name
        if (module, name) == ("collections", "OrderedDict"):
            return collections.OrderedDict
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return self._tensor
        raise BadInput(
            f"asks for {module}.{name}, which is refused; may only hold tensors: save a"
            " state_dict(), or convert the file to .safetensors"
        )

    def persistent_load(self, pid: Any) -> _Row:
        match pid:
            case ("storage", str(kind), str(key), str(), int(size), *view) if view in ([], [None]):
                return self._storage(key, _DTYPES[kind], size)
        raise BadInput(f"refers to {str(pid)[:80]}, which is refused; must be numbers of a tensor")

    def _tensor(self, row, offset, shape, strides, *_) -> Shaped[np.ndarray, "..."]:
        # Numpy refuses what would lie outside the row. The other arguments are about gradients.
        size = row.itemsize
        return np.ndarray(
            shape, row.dtype, row, offset * size, [stride * size for stride in strides]
        )


def _read_archive(content: bytes) -> Arrays:
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        (pickled,) = [name for name in archive.namelist() if name.endswith("/data.pkl")]
        folder = pickled.removesuffix("data.pkl")
        if f"{folder}byteorder" in archive.namelist():
            _check_byte_order(archive.read(f"{folder}byteorder") == b"little")

        @functools.cache
        def storage(key: str, dtype: np.dtype, size: int) -> _Row:
            return np.frombuffer(archive.read(f"{folder}data/{key}"), dtype, size)

        return _arrays(_Unpickler(io.BytesIO(archive.read(pickled)), storage).load())


def _read_pickles(content: bytes) -> Arrays:
    """Read a file whose numbers come after the pickle, which only says how many there will be."""
    file, rows = io.BytesIO(content), {}

    def storage(key: str, dtype: np.dtype, size: int) -> _Row:
        return rows.setdefault(key, np.empty(size, dtype))

    _, _, system, saved, keys = (_Unpickler(file, storage).load() for _ in range(5))
    _check_byte_order(system["little_endian"])
    for key in keys:
        row = rows[key]
        size = int.from_bytes(file.read(8), "little")
        if size != row.size or file.readinto(row.view(np.uint8)) < row.nbytes:
            raise BadInput(f"does not have the {row.size} numbers of storage {key}; fetch it again")
    return _arrays(saved)


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
