"""Read the pickles of PyTorch, and call nothing that they ask for.

A pickle is a list of functions to call. Python's own reader is not used. What is here knows a list
of opcodes, an ordered dictionary, a tensor, types of numbers and inert settings, and refuses the
rest.
"""

import collections
import io
import math
import pickletools
import re
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Shaped

from mf_jax.flow.errors import BadInput

_NEW = {"EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_TUPLE": tuple, "NEWFALSE": bool}
_NEW |= {"NEWTRUE": lambda: True, "NONE": lambda: None}
_OWN = "BININT BININT1 BININT2 LONG1 BINFLOAT BINUNICODE SHORT_BINUNICODE BINSTRING SHORT_BINSTRING"
"""Opcodes that push a new value, or their own argument."""
_MOST_PICKLE_BYTES = 2**23
"""Of a pickle, which names tensors: 60,000 of them."""
_MOST_ARGUMENTS = 8
"""Of a function, and of the axes of a tensor: a long tuple, used often, would take for ever."""
Row = Shaped[np.ndarray, "n"]
Storage = Callable[[str, np.dtype, int], Row]
"""From the key of a storage, its type and its length to its numbers in a row."""


def unpickle(file: io.BytesIO, storage: Storage) -> Any:
    """Build the ordered dictionaries, arrays and plain values of a pickle, and call nothing else.

    Nothing that the pickle holds is hashed, compared or printed unless it is text or a number: a
    few bytes of nested tuples would take for ever. The file is left where the pickle has ended.
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
        if name in _NEW:
            stack.append(_NEW[name]())
        elif name in _OWN.split():
            stack.append(argument)
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
            stack[-1].state = stack.pop()
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
    if re.match("(argparse|omegaconf)[. ]", name):
        return _Inert
    if name not in _GLOBALS:
        fix = "may only hold tensors: save a state_dict(), or .safetensors"
        raise BadInput(f"asks for {name.replace(' ', '.', 1)}, which is refused; {fix}")
    return _GLOBALS[name]


def _row(pid: Any, storage: Storage) -> Row:
    match pid:
        case ("storage", np.dtype() as dtype, str(key), str(), int(size), *view):
            if size >= 0 and view in ([], [None]):
                return storage(key, dtype, size)
    raise BadInput("refers to something else than numbers of a tensor, which is refused")


def _tensor(row: Row, offset: int, shape: tuple, strides: tuple, *_: Any) -> np.ndarray:
    # Numpy refuses what would lie outside the row. The other arguments are about gradients.
    if not len(shape) == len(strides) <= _MOST_ARGUMENTS or math.prod(shape) > row.size:
        raise ValueError("a tensor has more numbers than its storage, or too many axes")
    size = row.itemsize
    return np.ndarray(shape, row.dtype, row, offset * size, [stride * size for stride in strides])


def _ordered(pairs: Any = ()) -> collections.OrderedDict:
    made = collections.OrderedDict()
    for key, value in pairs:  # as Python 2 wrote the published VGG16
        _extend(made, [key, value])
    return made


class _Inert:
    """Stands for an object of settings, which is not built."""

    def __init__(self, *_: Any):
        self.state = {}


_OF_SETTINGS = ("dict", "list", "int", "float", "str", "bool")
_GLOBALS = {
    "collections OrderedDict": _ordered,
    "torch._utils _rebuild_parameter": lambda tensor, *_: tensor,
    "torch._utils _rebuild_tensor_v2": _tensor,
    "torch DoubleStorage": np.dtype("<f8"),
    "torch FloatStorage": np.dtype("<f4"),
    "torch HalfStorage": np.dtype("<f2"),
    "torch BFloat16Storage": np.dtype(jnp.bfloat16),
    "torch LongStorage": np.dtype("<i8"),
    "torch IntStorage": np.dtype("<i4"),
    **dict.fromkeys(("typing Any", "collections defaultdict"), _Inert),
    **dict.fromkeys((f"builtins {kind}" for kind in _OF_SETTINGS), _Inert),
}
"""All that a pickle may ask for, beside objects of argparse and omegaconf."""
