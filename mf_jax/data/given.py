"""What samples are given besides labels: conditions, noise of their own, and masks."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Shaped

from mf_jax.flow.errors import BadInput
from mf_jax.flow.records import DataSpec


def checked_given(
    spec: DataSpec, given: Mapping[str, Any], *, has_null: bool
) -> dict[str, Shaped[np.ndarray, "n ..."]]:
    """Return arrays `[n, ...]` by the names of `DataSpec.more`; raise BadInput if they do not fit.

    Args:
      spec: of the data that a model was trained on.
      given: arrays by name, None where there is none; one row may come without its first axis.
      has_null: whether the model knows rows without condition, which are NaN.
    """
    arrays = {}
    for name, value in given.items():
        if value is not None:
            arrays[name] = _checked(spec, name, value, has_null)
    missing = set(spec.more) - set(arrays) - {"mask"} - ({"condition"} if has_null else set())
    for name in sorted(missing):
        shape = ", ".join(map(str, spec.more[name][0]))
        raise BadInput(f"{name}: this model was never trained without; give {name}=, [N, {shape}]")
    return arrays


def _checked(spec: DataSpec, name: str, value: Any, has_null: bool) -> Shaped[np.ndarray, "n ..."]:
    if name not in spec.more:
        raise BadInput(f"{name}: this model was trained without; leave {name} out")
    shape, dtype = spec.more[name]
    array = np.asarray(value, dtype)
    array = array[None] if array.ndim == len(shape) else array
    if array.shape[1:] != shape or not len(array):
        needed = ", ".join(map(str, shape))
        raise BadInput(f"{name}: is {list(array.shape)}; must be [N, {needed}]")
    bad = ~np.isfinite(array)
    if name == "condition" and has_null:
        bad &= ~np.isnan(array).all(axis=1, keepdims=True)
    if bad.any():
        raise BadInput(f"{name}: holds NaN or infinite values; must be finite")
    return array
