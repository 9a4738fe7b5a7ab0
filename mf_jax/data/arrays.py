"""Arrays of a file: vectors `[N, D]`, signals `[N, L, C]` or pictures `[N, H, W, C]`.

A file is an `.npz` of arrays by the names of `KEYS`, or an `.npy` of x alone, which is read row by
row from the disk.
"""

import functools
import itertools
import os
from collections.abc import Iterator, Mapping

import numpy as np
from etils import epath
from jaxtyping import Float32, Int, Shaped

from mf_jax.data.pipeline import SPLITS, Batch, count_held_out
from mf_jax.data.pixels import from_pixels
from mf_jax.flow.errors import BadInput, in_section, listed, nearest, refused
from mf_jax.flow.records import NO_LABEL, DataSpec
from mf_jax.flow.rows import is_mask
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
        self.spec = DataSpec(
            arrays["x"].shape[1:],
            len(class_names),
            class_names,
            condition_size=arrays["condition"].shape[1] if "condition" in arrays else 0,
            has_pairs="pair" in arrays,
            has_mask="mask" in arrays,
        )

    def __len__(self) -> int:
        return len(self._rows)

    def gather(self, indices: Int[np.ndarray, "n"]) -> Batch:
        """See `Source.gather`; x and e are 0 where a mask hides them."""
        order, back = np.unique(self._rows[indices], return_inverse=True)  # as they lie on a disk
        found = {key: np.asarray(array[order][back]) for key, array in self._arrays.items()}
        x, e = (_as_floats(found, key) if key in found else None for key in ("x", "pair"))
        labels = found.get("label", np.full(len(indices), NO_LABEL)).astype(np.int32)
        return Batch(x, labels, found.get("condition"), e, found.get("mask"))


def of_file(*, path: str, held_out_share: float, split: str) -> Rows:
    """Open one split of an `.npz` or `.npy` file; held out are rows chosen once and for all."""
    file, where = epath.Path(path).expanduser(), f"path={path!r}"
    if in_bucket(file):
        raise BadInput(f"{where} is in a bucket: copy the file to each host, and set path to that")
    if file.suffix not in (".npz", ".npy") or not file.is_file():
        raise BadInput(f"{where} is no .npz or .npy file that exists; use numpy.savez(file, x=x)")
    status = os.stat(file)
    arrays, digest = _checked(str(file), where, (status.st_mtime_ns, status.st_size))
    order = np.random.default_rng(SPLIT_SEED).permutation(len(arrays["x"]))
    held_out = count_held_out(held_out_share, len(order))
    rows = order[held_out:] if split == SPLITS[0] else order[:held_out]
    labels = arrays.get("label", np.full(len(order), NO_LABEL))
    classes = [str(label) for label in range(labels.max() + 1)]
    trained = {str(label) for label in labels[order[held_out:]]}
    if lost := [name for name in classes if name not in trained]:
        fix = "number the classes anew from 0, or lower held_out_share"
        raise BadInput(f"{where}: label: no training row is of class {listed(lost)}; {fix}")
    return Rows(arrays, rows, tuple(classes), digest)


@functools.lru_cache(1)  # for both splits
def _checked(file: str, where: str, version: tuple[int, int]) -> tuple[Arrays, str]:
    """Return the arrays of a version of a file, which fit one another, and its SHA-256."""
    fix = "save arrays of numbers, no objects"
    with in_section(where, " "), refused(UNREADABLE, "cannot be read", fix):
        is_npz = file.endswith(".npz")
        arrays = read_npz(file) if is_npz else {"x": np.load(file, "r", allow_pickle=False)}
    if problem := next(_misfits(arrays), ""):
        raise BadInput(f"{where}: {problem}")
    if "label" in arrays:
        arrays["label"] = arrays["label"].astype(np.int32)
    if "condition" in arrays:
        with np.errstate(over="ignore"):
            arrays["condition"] = arrays["condition"].astype(np.float32)
    if "mask" in arrays:  # takes no more memory than it did
        arrays["mask"] = np.broadcast_to(arrays["mask"], arrays["x"].shape)
    if problem := next(_wrong_numbers(arrays), ""):
        raise BadInput(f"{where}: {problem}")
    if arrays["x"].dtype != np.uint8:
        _tell_scale(arrays, f"{where}: x")
    return arrays, sha256_of(epath.Path(file))


def _misfits(arrays: Arrays) -> Iterator[str]:
    """Yield what is wrong with names, shapes and types."""
    for key in arrays.keys() - set(KEYS):
        yield f"has {key!r}{nearest(key, KEYS)}; must be {', '.join(KEYS)}: leave it out"
    if "x" not in arrays:
        yield f"has no array x, but {listed([*arrays]) or 'nothing'}; use numpy.savez(FILE, x=x)"
    x, label, condition, _, mask = (arrays.get(key) for key in KEYS)
    kinds = {key: f"{key} is {array.dtype} {list(array.shape)}" for key, array in arrays.items()}
    if x.ndim not in _RANKS or min(x.shape) < 1 or len(x) < 2:
        yield f"{kinds['x']}; must be {' or '.join(_RANKS.values())}, 2 rows or more, none empty"
    if x.dtype == np.uint8 and x.ndim == 3:
        yield f"{kinds['x']}; pictures are {_RANKS[4]}: of grey save x[..., None], else floats"
    for key in ("x", "pair"):
        if key in arrays and not (arrays[key].dtype.kind == "f" or arrays[key].dtype == np.uint8):
            yield f"{kinds[key]}; must be float, or uint8 for [-1, 1]: x.astype(numpy.float32)"
    for key, array in arrays.items():
        needed = x.shape if key == "pair" else x.shape[:1]
        if key != "mask" and array.shape[: len(needed)] != needed:
            yield f"{kinds[key]}, {kinds['x']}; must have a row for each of x, a pair x's shape"
    if label is not None:
        if label.ndim != 1 or label.dtype.kind not in "uif" or (label != np.floor(label)).any():
            yield f"{kinds['label']}; must be whole numbers [N], classes from 0"
        if label.min() < 0 or label.max() >= _MOST_CLASSES:
            yield f"label is {label.min():g} to {label.max():g}; must be classes from 0: renumber"
    is_told = condition is not None
    if is_told and (
        condition.ndim != 2 or not condition.size or condition.dtype.kind not in "uifb"
    ):
        yield f"{kinds['condition']}; must be numbers [N, K]: reshape it"
    if mask is not None and not is_mask(mask, x):
        fix = "a mask of rows with all axes of x: e.g. mask[..., None]"
        yield f"{kinds['mask']}, {kinds['x']}; must be bool that broadcasts to x, {fix}"


def _wrong_numbers(arrays: Arrays) -> Iterator[str]:
    """Yield what is not finite where a mask shows it, and which pictures are not in [-1, 1]."""
    x = arrays["x"]
    size = max(1, _CHUNK * len(x) // x.size)
    keys = [key for key in arrays if key in ("x", "pair", "condition")]
    for first, key in itertools.product(range(0, len(x), size), keys):
        if arrays[key].dtype == np.uint8:
            continue
        seen = _as_floats({k: array[first : first + size] for k, array in arrays.items()}, key)
        if not (is_finite := np.isfinite(seen).reshape(len(seen), -1).all(axis=1)).all():
            row = first + int(np.argmin(is_finite))
            yield f"{key} is not finite, as float32, in row {row}: mask it, or leave the row out"
        if key == "x" and x.ndim == 4 and np.abs(seen).max() > 1:
            ends = f"{seen.min():g} to {seen.max():g}"
            yield f"x: pictures lie in {ends}; must be in [-1, 1] or uint8: scale x"


def _tell_scale(arrays: Arrays, name: str) -> None:
    """Tell of numbers that are unlike the noise, which has mean 0 and deviation 1."""
    some = {key: array[:_TOLD_BY] for key, array in arrays.items()}
    seen, is_picture = _as_floats(some, "x"), arrays["x"].ndim == 4
    seen = seen[some["mask"]] if "mask" in some else seen
    if not seen.size:
        return
    mean, deviation = float(np.mean(seen)), float(np.std(seen))
    if is_picture and seen.min() >= 0:
        tell_once(f"{name}: no number is below 0; if black is 0, use 2 * x - 1")
    elif not is_picture and (abs(mean) > 3 or not 0.1 < deviation < 10):
        told = f"has mean {mean:.3g} and deviation {deviation:.3g}, noise 0 and 1"
        tell_once(f"{name}: {told}; training is easier with (x - mean) / deviation")


def _as_floats(arrays: Arrays, key: str) -> Float32[np.ndarray, "n ..."]:
    """Return an array as float32, bytes in [-1, 1]; x and pair are 0 where a mask hides them."""
    x = arrays[key]
    with np.errstate(over="ignore"):
        x = from_pixels(x) if x.dtype == np.uint8 else x.astype(np.float32)
    is_whole = key == "condition" or "mask" not in arrays
    return x if is_whole else np.where(arrays["mask"], x, np.float32(0))
