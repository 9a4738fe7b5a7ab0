"""Arrays of a file: vectors `[N, D]`, signals `[N, L, C]` or pictures `[N, H, W, C]`.

A file is an `.npz` of arrays by the names of `KEYS`, or an `.npy` of x alone, which is read row by
row from the disk.
"""

import contextlib
import functools
import os
from collections.abc import Mapping

import numpy as np
from etils import epath
from jaxtyping import Float32, Int, Shaped

from mf_jax.data.pipeline import SPLITS, Batch, count_held_out
from mf_jax.data.pixels import from_pixels
from mf_jax.flow.errors import BadInput, listed, nearest, reason_of
from mf_jax.flow.records import NO_LABEL, DataSpec
from mf_jax.runtime.archives import UNREADABLE, read_npz
from mf_jax.runtime.files import in_bucket, sha256_of
from mf_jax.runtime.json_files import tell_once

KEYS = ("x", "label", "condition", "pair", "mask")
SPLIT_SEED = 0  # fixed so that every run and every host holds out the same rows
_RANKS = {2: "[N, D]", 3: "[N, L, C]", 4: "[N, H, W, C]"}
_MOST_CLASSES = 100_000
_CHUNK = 2**22  # numbers looked at together
_TOLD_BY = 1000  # rows whose scale is looked at
Arrays = Mapping[str, Shaped[np.ndarray, "n ..."]]


class Rows:
    """Some rows of arrays, in the order given; x float32, bytes scaled to [-1, 1]."""

    stored = None

    def __init__(
        self,
        arrays: Arrays,
        rows: Int[np.ndarray, "k"],
        class_names: tuple[str, ...] = (),
        digest: str = "",
    ) -> None:
        """Take arrays by the names of `KEYS`, which fit one another."""
        self._arrays, self._rows, self.digest = arrays, rows, digest
        condition = arrays.get("condition", np.empty((0, 0)))
        self.spec = DataSpec(
            arrays["x"].shape[1:],
            len(class_names),
            class_names,
            condition_size=condition.shape[1],
            has_pairs="pair" in arrays,
            has_mask="mask" in arrays,
        )

    def __len__(self) -> int:
        return len(self._rows)

    def gather(self, indices: Int[np.ndarray, "n"]) -> Batch:
        """See `Source.gather`; x and e are 0 where a mask hides them."""
        order, back = np.unique(self._rows[indices], return_inverse=True)  # as they lie on a disk
        found = {key: np.asarray(array[order][back]) for key, array in self._arrays.items()}
        mask = found.get("mask")
        x, e = (_as_floats(found.get(key), mask) for key in ("x", "pair"))
        labels = found.get("label", np.full(len(indices), NO_LABEL))
        return Batch(x, labels.astype(np.int32), found.get("condition"), e, mask)


def of_file(*, path: str, held_out_share: float, split: str) -> Rows:
    """Open one split of an `.npz` or `.npy` file; held out are rows chosen once and for all."""
    file, where = epath.Path(path).expanduser(), f"path={path!r}"
    if in_bucket(file):
        raise BadInput(f"{where} is in a bucket: copy the file to each host, and set path to that")
    if file.suffix not in (".npz", ".npy") or not file.is_file():
        what = "is no .npz or .npy file" if file.exists() else "does not exist"
        raise BadInput(f"{where} {what}; name a file of numpy.savez(file, x=x) or numpy.save")
    status = os.stat(file)
    arrays, digest = _checked(str(file), where, (status.st_mtime_ns, status.st_size))
    order = np.random.default_rng(SPLIT_SEED).permutation(len(arrays["x"]))
    held_out = count_held_out(held_out_share, len(order))
    rows = order[held_out:] if split == SPLITS[0] else order[:held_out]
    num_classes = _num_classes(arrays, order[held_out:], where)
    return Rows(arrays, rows, tuple(map(str, range(num_classes))), digest)


def _num_classes(arrays: Arrays, training: Int[np.ndarray, "k"], where: str) -> int:
    """Return how many classes there are; BadInput where no training row is of one."""
    if "label" not in arrays:
        return 0
    count = int(arrays["label"].max()) + 1
    if lost := sorted(set(range(count)) - set(arrays["label"][training].tolist())):
        fix = "number the classes anew from 0, or lower held_out_share"
        raise BadInput(
            f"{where}: label: no training row is of class {listed([*map(str, lost)])}; {fix}"
        )
    return count


@functools.lru_cache(1)  # for both splits
def _checked(file: str, where: str, version: tuple[int, int]) -> tuple[Arrays, str]:
    """Return the arrays of a version of a file, which fit one another, and its SHA-256."""
    arrays = _read(file, where)
    if unknown := [key for key in arrays if key not in KEYS]:
        hint = nearest(unknown[0], KEYS)
        raise BadInput(f"{where} has {unknown[0]!r}{hint}; must be {', '.join(KEYS)}: leave it out")
    if "x" not in arrays:
        known = listed(list(arrays)) or "nothing"
        raise BadInput(f"{where} has no array x, but {known}; save it with numpy.savez(FILE, x=x)")
    x = arrays["x"]
    if x.ndim not in _RANKS:
        kinds = " or ".join(_RANKS.values())
        raise BadInput(f"{where}: x is {list(x.shape)}; must be {kinds}: reshape it")
    if x.dtype == np.uint8 and x.ndim == 3:
        fix = "of grey pictures save x[..., None], of signals floats"
        raise BadInput(f"{where}: x is uint8 {list(x.shape)}; pictures are {_RANKS[4]}: {fix}")
    if min(x.shape) < 1 or len(x) < 2:
        raise BadInput(f"{where}: x is {list(x.shape)}; must have 2 rows or more, none empty")
    for key, array in arrays.items():
        found, needed = (each.shape[: None if key == "pair" else 1] for each in (array, x))
        if key != "mask" and found != needed:
            raise BadInput(
                f"{where}: {key} is {list(array.shape)} where x is {list(x.shape)}; must have a "
                "row for each row of x, and a pair x's shape"
            )
    checks = {"label": _label, "condition": _condition, "mask": functools.partial(_mask, x=x)}
    arrays |= {key: checks[key](arrays[key], where) for key in checks if key in arrays}
    for key in ("x", "pair"):
        if key in arrays:
            _check_numbers(arrays[key], arrays.get("mask"), f"{where}: {key}", is_x=key == "x")
    if arrays["x"].dtype != np.uint8:
        _tell_scale(arrays["x"], arrays.get("mask"), f"{where}: x")
    return arrays, sha256_of(epath.Path(file))


def _read(file: str, where: str) -> dict[str, np.ndarray]:
    try:
        if file.endswith(".npy"):
            return {"x": np.load(file, mmap_mode="r", allow_pickle=False)}
        return read_npz(file)
    except UNREADABLE as error:
        raise BadInput(
            f"{where} cannot be read ({reason_of(error)}); must hold arrays of numbers, no "
            "objects: save it again with numpy.savez(FILE, x=x)"
        ) from error


def _check_numbers(x: np.ndarray, mask: np.ndarray | None, name: str, *, is_x: bool) -> None:
    """Raise BadInput unless x is bytes, or finite where the mask does not hide it."""
    if x.dtype == np.uint8:
        return
    if not np.issubdtype(x.dtype, np.floating):
        fix = "must be float, or uint8, which is scaled to [-1, 1]: use x.astype(numpy.float32)"
        raise BadInput(f"{name} is {x.dtype}; {fix}")
    size = max(1, _CHUNK * len(x) // x.size)
    for first in range(0, len(x), size):
        rows = slice(first, first + size)
        seen = _as_floats(x[rows], None if mask is None else mask[rows])
        if not (is_finite := np.isfinite(seen).reshape(len(seen), -1).all(axis=1)).all():
            row = first + int(np.argmin(is_finite))
            fix = "must be finite, as float32 too, but where mask is False"
            raise BadInput(f"{name} is not finite in row {row}; {fix}: leave such rows out")
        if is_x and x.ndim == 4 and np.abs(seen).max() > 1:
            ends = f"[{seen.min():g}, {seen.max():g}]"
            raise BadInput(f"{name}: pictures lie in {ends}; must be in [-1, 1] or uint8: scale x")


def _tell_scale(x: np.ndarray, mask: np.ndarray | None, name: str) -> None:
    """Tell of numbers that are unlike the noise, which has mean 0 and deviation 1."""
    seen = _as_floats(x[:_TOLD_BY], None if mask is None else mask[:_TOLD_BY])
    seen = seen if mask is None else seen[mask[:_TOLD_BY]]
    if not seen.size:
        return
    mean, deviation = float(np.mean(seen)), float(np.std(seen))
    if x.ndim == 4 and seen.min() >= 0:
        tell_once(f"{name}: no number is below 0; if black is 0, use 2 * x - 1")
    elif x.ndim != 4 and (abs(mean) > 3 or not 0.1 < deviation < 10):
        told = f"has mean {mean:.3g} and deviation {deviation:.3g}, noise 0 and 1"
        tell_once(f"{name}: {told}; training is easier with (x - mean) / deviation")


def _as_floats(
    x: np.ndarray | None, mask: np.ndarray | None
) -> Float32[np.ndarray, "n ..."] | None:
    if x is None:
        return None
    with np.errstate(over="ignore"):
        x = from_pixels(x) if x.dtype == np.uint8 else x.astype(np.float32)
    return x if mask is None else np.where(mask, x, np.float32(0))


def _label(label: np.ndarray, where: str) -> Int[np.ndarray, "n"]:
    if label.ndim != 1 or label.dtype.kind not in "uif" or (label != np.floor(label)).any():
        kind = f"{label.dtype}{list(label.shape)}"
        raise BadInput(f"{where}: label is {kind}; must be whole numbers [N], classes from 0")
    if label.min() < 0 or label.max() >= _MOST_CLASSES:
        ends = f"{label.min():g} to {label.max():g}"
        raise BadInput(f"{where}: label is {ends}; must be classes from 0 on: number them anew")
    return label.astype(np.int32)


def _condition(condition: np.ndarray, where: str) -> Float32[np.ndarray, "n k"]:
    if condition.ndim != 2 or not condition.shape[1] or condition.dtype.kind not in "uifb":
        kind = f"{condition.dtype}{list(condition.shape)}"
        raise BadInput(f"{where}: condition is {kind}; must be numbers [N, K]: reshape it")
    with np.errstate(over="ignore"):
        condition = condition.astype(np.float32)
    if not np.isfinite(condition).all():
        raise BadInput(f"{where}: condition is not finite; must be, as float32 too: leave rows out")
    return condition


def _mask(mask: np.ndarray, where: str, *, x: np.ndarray) -> Shaped[np.ndarray, "n ..."]:
    """Return a mask with x's shape, which takes no more memory than it did."""
    is_of_rows = mask.ndim < x.ndim and mask.shape[:1] == x.shape[:1]  # or of columns, who knows
    with contextlib.suppress(ValueError):  # told below
        if mask.dtype == bool and not is_of_rows:
            return np.broadcast_to(mask, x.shape)
    raise BadInput(
        f"{where}: mask is {mask.dtype}{list(mask.shape)} where x is {list(x.shape)}; must be bool "
        "that broadcasts to x, a mask of rows with all axes of x: e.g. mask[..., None]"
    )
