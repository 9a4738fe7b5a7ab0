"""Read published PyTorch parameters without PyTorch, and without running what a file asks for.

`torch.save` writes a pickle, a list of functions to call. Python's own reader is not used. What is
here knows a list of opcodes, an ordered dictionary, a tensor and types of numbers, and refuses the
rest. The pickle lies in a zip archive or, before PyTorch 1.6, in front of the numbers.

Source: the format of `torch.save`, PyTorch documentation, "Serialization semantics".
"""

import collections
import functools
import hashlib
import io
import math
import pickletools
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
from mf_jax.runtime.archives import check_members
from mf_jax.runtime.files import opened

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
_VALUES = {"EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_TUPLE": tuple}
_VALUES |= dict.fromkeys(("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE"))
_VALUES |= dict.fromkeys(("SHORT_BINUNICODE", "BINSTRING", "SHORT_BINSTRING"))
"""Opcodes that push a value: a new one, or their own argument."""
_MOST_PICKLE_BYTES = 2**23
"""Of a pickle, which names tensors: 60,000 of them."""
_MOST_ARGUMENTS = 8
"""Of a function, and of the axes of a tensor: a long tuple, used often, would take for ever."""
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
    with opened(path) as file:
        content = file.read()
    with reading(path, ".pth or .safetensors"):
        if is_torch(content):
            arrays = _arrays(_read(content))
        else:
            with safe_open(path, framework="np") as file:
                names = file.keys()
                arrays = {name: file.get_tensor(name) for name in names}
    return StateDict(str(path), hashlib.sha256(content).hexdigest(), arrays)


def is_torch(content: bytes) -> bool:
    """Return whether a file of this content is one of `torch.save`."""
    return content.startswith(b"PK\x03\x04") or _MAGIC in content[:32]


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


def _unpickle(file: io.BytesIO, storage: Callable[[str, np.dtype, int], _Row]) -> Any:
    """Build the ordered dictionaries, arrays and plain values of a pickle, and call nothing else.

    Nothing that the pickle holds is hashed, compared or printed unless it is text or a number: a
    few bytes of nested tuples would take for ever.

    Args:
      file: where the pickle begins; afterwards, where it has ended.
      storage: from the key of a storage, its type and its length to its numbers in a row.
    """
    stack, marks, memo = [], [], {}

    def popped(first: int) -> list[Any]:
        items = stack[first:]
        del stack[first:]
        return items

    for code, argument, position in pickletools.genops(file):
        name = code.name
        if position > _MOST_PICKLE_BYTES:
            raise BadInput(f"has a pickle of more than {_MOST_PICKLE_BYTES} bytes")
        if name in _VALUES:
            stack.append(argument if _VALUES[name] is None else _VALUES[name]())
        elif name in ("NEWTRUE", "NEWFALSE", "NONE"):
            stack.append({"NEWTRUE": True, "NEWFALSE": False, "NONE": None}[name])
        elif name == "MARK":
            marks.append(len(stack))
        elif name.startswith("TUPLE"):
            stack.append(tuple(popped(marks.pop() if name == "TUPLE" else -int(name[-1]))))
        elif name in ("BINPUT", "LONG_BINPUT", "MEMOIZE"):
            memo[len(memo) if argument is None else argument] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(memo[argument])
        elif name in ("APPEND", "APPENDS", "SETITEM", "SETITEMS"):
            items = popped(marks.pop() if name[-1] == "S" else -2 if name == "SETITEM" else -1)
            _extend(stack[-1], items)
        elif name == "GLOBAL":
            stack.append(_global(argument))
        elif name in ("REDUCE", "NEWOBJ"):
            function, arguments = popped(-2)
            stack.append(function(*arguments[:_MOST_ARGUMENTS]))
        elif name == "BINPERSID":
            stack.append(_row(stack.pop(), storage))
        elif name == "BUILD" and isinstance(stack[-2], _Inert):
            state = stack.pop()
            stack[-1].state = state
        elif name == "BUILD" and type(stack[-2]) is collections.OrderedDict:
            stack.pop()  # versions of modules, which PyTorch hangs on a state_dict
        elif name == "STOP":
            return stack.pop()
        elif name not in ("PROTO", "FRAME"):
            raise BadInput(f"asks for {name}, which is refused; may only hold tensors")


def _extend(target: Any, items: list[Any]) -> None:
    if isinstance(target, dict) and all(isinstance(key, str | int) for key in items[::2]):
        target.update(zip(items[::2], items[1::2], strict=True))
    elif isinstance(target, list):
        target.extend(items)
    elif not isinstance(target, _Inert):
        raise BadInput("fills what is no list, and no dictionary of names; may only hold tensors")


def _global(name: str) -> Any:
    module, _, kind = name.partition(" ")
    if module == "torch" and kind in _DTYPES:
        return kind
    if name in _FUNCTIONS:
        return _FUNCTIONS[name]
    if module.split(".")[0] in _SETTINGS or name in _OF_SETTINGS:
        return _Inert
    raise BadInput(
        f"asks for {module}.{kind}, which is refused; may only hold tensors: save a"
        " state_dict(), or convert the file to .safetensors"
    )


def _row(pid: Any, storage: Callable[[str, np.dtype, int], _Row]) -> _Row:
    match pid:
        case ("storage", str(kind), str(key), str(), int(size)) | (
            "storage",
            str(kind),
            str(key),
            str(),
            int(size),
            None,
        ) if kind in _DTYPES and size >= 0:
            return storage(key, _DTYPES[kind], size)
    raise BadInput("refers to something else than numbers of a tensor, which is refused")


def _tensor(row: _Row, offset: int, shape: tuple, strides: tuple, *_: Any) -> np.ndarray:
    # Numpy refuses what would lie outside the row. The other arguments are about gradients.
    if not len(shape) == len(strides) <= _MOST_ARGUMENTS or math.prod(shape) > row.size:
        raise ValueError("a tensor has more numbers than its storage, or too many axes")
    size = row.itemsize
    return np.ndarray(shape, row.dtype, row, offset * size, [stride * size for stride in strides])


class _Inert:
    """Stands for an object of settings, which is not built."""

    def __init__(self, *_: Any):
        self.state = {}


_SETTINGS = ("argparse", "omegaconf")
_OF_SETTINGS = ("typing Any", "collections defaultdict", "builtins dict", "builtins list")
_OF_SETTINGS += ("builtins int", "builtins float", "builtins str", "builtins bool")
_FUNCTIONS = {
    "torch._utils _rebuild_parameter": lambda tensor, *_: tensor,
    "collections OrderedDict": lambda: collections.OrderedDict(),
    "torch._utils _rebuild_tensor_v2": _tensor,
}


def _read_archive(content: bytes) -> Any:
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        check_members(archive, len(content), stored=True)
        (pickled,) = [name for name in archive.namelist() if name.endswith("/data.pkl")]
        folder = pickled.removesuffix("data.pkl")
        if f"{folder}byteorder" in archive.namelist():
            _check_byte_order(archive.read(f"{folder}byteorder") == b"little")
        read = functools.cache(lambda key: archive.read(f"{folder}data/{key}"))

        def storage(key: str, dtype: np.dtype, size: int) -> _Row:
            return np.frombuffer(read(key), dtype, size)

        return _unpickle(io.BytesIO(archive.read(pickled)), storage)


def _read_pickles(content: bytes) -> Any:
    """Read a file whose numbers come after the pickle, which only says how many there will be."""
    file, rows, left = io.BytesIO(content), {}, len(content)

    def storage(key: str, dtype: np.dtype, size: int) -> _Row:
        nonlocal left
        if key not in rows:
            left -= size * dtype.itemsize
            if left < 0:
                raise BadInput("claims more numbers than it has bytes; fetch it again")
            rows[key] = np.empty(size, dtype)
        return rows[key]

    _, _, system, saved, keys = (_unpickle(file, storage) for _ in range(5))
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
