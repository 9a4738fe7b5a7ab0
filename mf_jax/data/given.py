"""What samples are given besides labels: conditions, noise of their own, and masks."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Shaped

from mf_jax.flow.errors import BadInput, refused
from mf_jax.flow.records import DataSpec


def checked_given(
    spec: DataSpec, given: Mapping[str, Any], *, has_null: bool
) -> dict[str, Shaped[np.ndarray, "n ..."]]:
    """Return arrays `[n, ...]` by the names of `DataSpec.more`, or e; BadInput if they do not fit.

    Args:
      spec: of the data that a model was trained on.
      given: arrays by name, None where there is none; one row may come without its first axis.
      has_null: whether the model knows rows without condition, which are NaN.
    """
    known, arrays = {"e": (spec.shape, "float32")} | spec.more, {}  # anything can start from e
    for name, value in given.items():
        shape, dtype = known.get(name, ((), "float32"))
        needed = f"[N, {', '.join(map(str, shape))}]"
        if value is None:
            if name in spec.more and name != "mask" and not (name == "condition" and has_null):
                raise BadInput(f"{name}: this model was never trained without; give {needed}")
            continue
        if name not in known:
            raise BadInput(f"{name}: this model was trained without; leave {name} out")
        with refused((TypeError, ValueError), f"{name}: is no array of numbers", needed):
            array = np.asarray(value, dtype)
        array = array[None] if array.ndim == len(shape) else array
        if array.shape[1:] != shape or not len(array):
            raise BadInput(f"{name}: is {list(array.shape)}; must be {needed}")
        is_null = np.isnan(array).all(axis=-1, keepdims=True) & (name == "condition") & has_null
        if not (np.isfinite(array) | is_null).all():
            raise BadInput(f"{name}: holds NaN or infinite values; must be finite")
        arrays[name] = array
    return arrays
