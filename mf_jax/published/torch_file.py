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

from mf_jax.flow.errors import BadInput, check_fit
from mf_jax.published import Arrays, reading
from mf_jax.published.names import as_ours
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
    with reading(path, "a .pth or .safetensors file of published weights"):
        with opened(path) as file:
            content = file.read()
        if content.startswith(b"PK\x03\x04") or _MAGIC in content[:32]:  # of torch.save
            arrays, _ = read_torch(content)
        else:
            with on_disk(path) as place, safe_open(place, framework="np") as file:
                names = file.keys()
                arrays = {name: file.get_tensor(name) for name in names}
    return StateDict(str(path), hashlib.sha256(content).hexdigest(), arrays)


def read_torch(content: bytes) -> tuple[Arrays, dict[str, Any]]:
    """Return the arrays {"section/name": array} of a file of PyTorch, and a training's settings.

    A state_dict alone has no sections.
    """
    saved = (_read_archive if content.startswith(b"PK") else _read_pickles)(content)
    values = saved if isinstance(saved, dict) else {}
    sections = {f"{name}/": value for name, value in values.items() if isinstance(value, dict)}
    arrays = {
        f"{section}{name}": value
        for section, named in [("", values), *sections.items()]
        for name, value in named.items()
        if isinstance(value, np.ndarray)
    }
    if not arrays:
        raise BadInput(f"holds a {type(saved).__name__} without tensors; save a state_dict()")
    settings = getattr(values.get("args"), "state", {})
    return arrays, settings if isinstance(settings, dict) else {}


def fit_state_dict(state: StateDict, wanted: Mapping[str, tuple[int, ...]]) -> Arrays:
    """Return the parameters of the wanted shapes in float32; the file must have just these."""
    there = {name: array for name, array in state.arrays.items() if name in wanted}
    types = {k: x.dtype for k, x in there.items() if not jnp.issubdtype(x.dtype, jnp.floating)}
    wrong = {
        "no floats": [f"{name} is {dtype}" for name, dtype in types.items()],
        "not finite": [name for name, array in there.items() if not np.isfinite(array).all()],
    }
    problem = f"{state.path}: its parameters do not fit the network"
    fix = "use the published file, with the config.json beside it where it has one"
    check_fit(problem, state.arrays, wanted, fix, **wrong)
    return {name: there[name].astype(np.float32) for name in wanted}


def network_params(shapes: PyTree, state: StateDict) -> PyTree[Float32[Array, "..."]]:
    """Return the parameters of these shapes of a network whose layers have the names of a file."""
    names, wanted, params = {}, {}, {}
    for keys, leaf in flatten_dict(shapes).items():
        names[keys] = name = ".".join([*keys[:-1], "bias" if keys[-1] == "bias" else "weight"])
        shape = leaf.shape  # of a kernel, output and input axes come first
        wanted[name] = (*shape[:-3:-1], *shape[:-2]) if keys[-1] == "kernel" else shape
    arrays = fit_state_dict(state, wanted)
    for keys, name in names.items():
        is_kernel = keys[-1] == "kernel"
        params[keys] = jnp.asarray(as_ours(arrays[name], "kernel") if is_kernel else arrays[name])
    return unflatten_dict(params)


def _read_archive(content: bytes) -> Any:
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        check_members(archive, len(content), stored=True)
        (pickled,) = [name for name in archive.namelist() if name.endswith("/data.pkl")]
        folder = pickled.removesuffix("data.pkl")
        if f"{folder}byteorder" in archive.namelist():
            _check_byte_order(archive.read(f"{folder}byteorder") == b"little")
        read = functools.cache(lambda key: archive.read(f"{folder}data/{key}"))
        content = io.BytesIO(archive.read(pickled))
        return unpickle(content, lambda key, *kind: np.frombuffer(read(key), *kind))


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
        raise BadInput("has the most significant byte first; must be little-endian: save it again")
