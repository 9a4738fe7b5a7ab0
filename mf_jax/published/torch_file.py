"""Read published PyTorch parameters without PyTorch, and without running what a file asks for.

`torch.save` writes a pickle, a list of functions to call. Here it may name an ordered dictionary, a
tensor and the types of numbers. Anything else is refused before it is looked up. The pickle lies in
a zip archive or, before PyTorch 1.6, in front of the numbers themselves. A `.safetensors` file of
the same names is read too.

Source: the format of `torch.save`, PyTorch documentation, "Serialization semantics".
"""

import collections
import hashlib
import io
import pickle
import zipfile
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from etils import epath
from jaxtyping import Float32, Shaped
from numpy.lib.stride_tricks import as_strided
from safetensors import safe_open

from mf_jax.errors import BadInput, list_problems, listed

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
Arrays = dict[str, Shaped[np.ndarray, "..."]]


class StateDict(NamedTuple):
    """The parameters of a file, of the types it has, and the SHA-256 of its bytes."""

    path: str
    sha256: str
    arrays: Arrays


class _Storage(NamedTuple):
    """Numbers in a row, which several tensors may share; `size` of them."""

    key: str
    dtype: np.dtype
    size: int


class _Tensor(NamedTuple):
    """The numbers of a storage that make a tensor; offset and strides count numbers, not bytes."""

    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def read_state_dict(path: epath.PathLike) -> StateDict:
    """Return the parameters in a `.pth` or `.safetensors` file, told apart by their content."""
    path = epath.Path(path).expanduser().absolute()
    if not path.is_file():
        raise BadInput(
            f"{path}: no such file; must be a .pth or .safetensors file of published weights"
        )
    content = path.read_bytes()
    try:
        arrays = _read(path, content)
    except BadInput as problem:
        raise BadInput(f"{path}: {problem}") from problem
    except Exception as error:  # its type depends on where a reader stumbles over the damage
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"
        raise BadInput(
            f"{path}: cannot be read as .pth or .safetensors ({reason}); check the file, or fetch it"
            " again"
        ) from error
    return StateDict(str(path), hashlib.sha256(content).hexdigest(), arrays)


def fit_state_dict(
    state: StateDict, wanted: Mapping[str, tuple[int, ...]]
) -> dict[str, Float32[np.ndarray, "..."]]:
    """Return the wanted parameters in float32, after checking that the file has just these.

    Args:
      wanted: names to shapes.
    """
    arrays = state.arrays
    both = {name: (arrays[name], tuple(shape)) for name, shape in wanted.items() if name in arrays}
    problems = {
        "missing": [name for name in wanted if name not in arrays],
        "left over": [name for name in arrays if name not in wanted],
        "of another shape": [
            f"{name} is {list(array.shape)}, must be {list(shape)}"
            for name, (array, shape) in both.items()
            if array.shape != shape
        ],
        "of another type": [
            f"{name} is {array.dtype}, must be floating point"
            for name, (array, _) in both.items()
            if not jnp.issubdtype(array.dtype, jnp.floating)
        ],
    }
    if found := list_problems(problems):
        raise BadInput(
            f"{state.path}: its parameters do not fit the network; {found}; use the published file,"
            " with the config.json beside it where it has one"
        )
    return {name: arrays[name].astype(np.float32) for name in wanted}


class _Unpickler(pickle.Unpickler):
    """Builds ordered dictionaries of tensors and plain values, and calls nothing else.

    The pickle cannot alter anything that it is handed: a type of numbers is its name, and what
    rebuilds a tensor is a bound method.
    """

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

    def persistent_load(self, pid: Any) -> _Storage:
        match pid:
            case ("storage", str(kind), str(key), str(), int(size), *view) if (
                view in ([], [None]) and size >= 0
            ):
                return _Storage(key, _DTYPES[kind], size)
        raise BadInput(f"refers to {str(pid)[:80]}, which is refused; must be numbers of a tensor")

    def _tensor(self, storage, offset, shape, strides, *_) -> _Tensor:
        return _Tensor(storage, offset, shape, strides)  # the rest is about gradients


def _read(path: epath.Path, content: bytes) -> Arrays:
    if content.startswith(b"PK\x03\x04"):
        return _read_archive(content)
    if _MAGIC in content[:32]:
        return _read_pickles(content)
    with safe_open(path, framework="np") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, not a dict


def _read_archive(content: bytes) -> Arrays:
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        (pickled,) = [name for name in archive.namelist() if name.endswith("/data.pkl")]
        folder = pickled.removesuffix("data.pkl")
        if f"{folder}byteorder" in archive.namelist():
            _check_byte_order(archive.read(f"{folder}byteorder") == b"little")
        tensors = _tensors(_Unpickler(io.BytesIO(archive.read(pickled))).load())
        rows = {
            storage: np.frombuffer(archive.read(f"{folder}data/{storage.key}"), storage.dtype)
            for storage in {tensor.storage for tensor in tensors.values()}
        }
        return _arrays(tensors, rows)


def _read_pickles(content: bytes) -> Arrays:
    file = io.BytesIO(content)
    _, _, system = (_Unpickler(file).load() for _ in range(3))
    _check_byte_order(system["little_endian"])
    tensors = _tensors(_Unpickler(file).load())
    stored = {tensor.storage.key: tensor.storage for tensor in tensors.values()}
    rows = {}
    for key in _Unpickler(file).load():
        size, storage = int.from_bytes(file.read(8), "little"), stored[key]
        rows[storage] = np.frombuffer(file.read(size * storage.dtype.itemsize), storage.dtype)
    return _arrays(tensors, rows)


def _check_byte_order(little: bool) -> None:
    if not little:
        raise BadInput(
            "was written with the most significant byte first; must be little-endian: save it again"
        )


def _tensors(saved: Any) -> dict[str, _Tensor]:
    """Return the content of a pickle, if that is names and tensors."""
    if not isinstance(saved, dict) or not saved:
        raise BadInput(
            f"holds a {type(saved).__name__}; must be names and tensors: save a state_dict()"
        )
    others = [str(name) for name, value in saved.items() if not isinstance(value, _Tensor)]
    if others:
        raise BadInput(
            f"holds more than names and tensors ({listed(others)}); save a state_dict() alone"
        )
    return saved


def _arrays(
    tensors: Mapping[str, _Tensor], rows: Mapping[_Storage, Shaped[np.ndarray, "n"]]
) -> Arrays:
    for storage, row in rows.items():
        if row.size != storage.size:
            raise BadInput(
                f"has {row.size} numbers in storage {storage.key}, must have {storage.size}; fetch"
                " it again"
            )
    return {name: _array(name, tensor, rows[tensor.storage]) for name, tensor in tensors.items()}


def _array(name: str, tensor: _Tensor, row: Shaped[np.ndarray, "n"]) -> Shaped[np.ndarray, "..."]:
    """Return a copy of a tensor's numbers; beside the storage lies other memory."""
    _, offset, shape, strides = tensor
    end = offset + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True)) + 1
    if min([offset, *shape, *strides]) < 0 or (0 not in shape and end > row.size):
        raise BadInput(f"says that {name} lies outside its storage; fetch it again")
    return as_strided(row[offset:], shape, [stride * row.itemsize for stride in strides]).copy()
