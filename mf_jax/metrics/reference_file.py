"""Files of reference statistics: the real data that samples are compared with.

The format is the `.npz` of ADM's evaluation: `mu`, `sigma` (of the 2048 pooled features), `mu_s`,
`sigma_s` (of the 2023 spatial ones) and pictures `arr_0`. Ours add some feature rows, `features`,
and `num_images`; files of other tools may have `mu` and `sigma` alone.
"""

import contextlib
import dataclasses
import math
import zipfile
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
from etils import epath
from jaxtyping import Float, UInt8
from numpy.lib import format as npy

from mf_jax.flow.errors import BadInput, refused
from mf_jax.metrics.frechet import Gaussian
from mf_jax.metrics.row_pairs import LEAST_ROWS
from mf_jax.published import reading
from mf_jax.runtime import archives
from mf_jax.runtime.files import sha256_of, written_aside

_PICTURES = "arr_0"
_ROUNDING = 1e-6
"""Share of the largest entry or the trace: smaller faults of a covariance are rounding."""


@dataclasses.dataclass(frozen=True, eq=False)
class Statistics:
    """Statistics of reference pictures, 0 or None where they are not known.

    num_images: behind them. pooled, spatial: of these features. features: some pooled rows. path,
    sha256: of their file. num_pictures: in it, for `read_pictures`.
    """

    num_images: int
    pooled: Gaussian
    spatial: Gaussian | None = None
    # its shape is checked with the values, in one line that names the file
    features: Float[np.ndarray, "..."] | None = None
    path: str = ""
    sha256: str = ""
    num_pictures: int = 0

    def __post_init__(self) -> None:
        _check_gaussian(self.pooled, "mu", "sigma")
        if self.spatial is not None:
            _check_gaussian(self.spatial, "mu_s", "sigma_s")
        if self.features is not None:
            shape, width = self.features.shape, self.pooled.mean.size
            if len(shape) != 2 or shape[1] != width or shape[0] < LEAST_ROWS:
                wanted = f"[rows, {width}] like mu, with at least {LEAST_ROWS} rows"
                raise BadInput(f"features is {list(shape)}; must be {wanted}")
            _check_finite(self.features, "features")


def _check_finite(values: np.ndarray, name: str) -> None:
    if bad := values.size - np.count_nonzero(np.isfinite(values)):
        raise BadInput(f"{name} has {bad} values that are NaN or infinite: compute it again")


def _check_gaussian(gaussian: Gaussian, first: str, second: str) -> None:
    """Raise BadInput unless the arrays are a finite mean `[d]` and a covariance `[d, d]`."""
    mean, covariance = gaussian
    if mean.ndim != 1 or not mean.size or covariance.shape != (mean.size, mean.size):
        shapes = f"{first} is {list(mean.shape)} and {second} {list(covariance.shape)}"
        raise BadInput(f"{shapes}; must be [d] and [d, d]: take both from one set of features")
    _check_finite(mean, first)
    _check_finite(covariance, second)
    shifted = covariance + _ROUNDING * (np.trace(covariance) or 1) * np.eye(len(covariance))
    problem = f"{second} must be a covariance, symmetric and without eigenvalues below 0"
    with refused(np.linalg.LinAlgError, problem, "compute it again"):
        np.linalg.cholesky(shifted)  # a tenth of the time of eigenvalues
        if np.abs(covariance - covariance.T).max() > _ROUNDING * np.abs(covariance).max():
            raise np.linalg.LinAlgError("it is not symmetric")


Compute = Callable[[Iterator[UInt8[np.ndarray, "n h w c"]]], Statistics]


def read_reference(path: epath.PathLike, compute: Compute | None = None) -> Statistics:
    """Read reference statistics; of pictures alone `compute` makes them, and None refuses."""
    path = epath.Path(path).expanduser()
    with _opened(path) as archive:
        names = set(archives.array_names(archive))
        shape = archives.array_header(archive, _PICTURES)[0] if _PICTURES in names else ()
        file = {"path": str(path), "sha256": sha256_of(path), "num_pictures": (*shape, 0)[0]}
        if not file["num_pictures"] or {"mu", "sigma"} & names:
            return _read_statistics(archive, names, file)
    if compute is None:
        raise BadInput(f"{path}: holds pictures (arr_0) and no statistics; compute them first")
    return dataclasses.replace(compute(read_pictures(path)), **file)


def _read_statistics(archive: zipfile.ZipFile, names: set[str], file: dict[str, Any]) -> Statistics:
    there = ", ".join(sorted(names)) or "nothing"
    if missing := [name for name in ("mu", "sigma") if name not in names]:
        raise BadInput(f"lacks {', '.join(missing)}; it has {there}: use FID reference statistics")
    if ("mu_s" in names) != ("sigma_s" in names):
        raise BadInput("mu_s and sigma_s: must be both there or neither: take both of one set")
    arrays = {}
    for name in names & {"mu", "sigma", "mu_s", "sigma_s", "features", "num_images"}:
        array = archives.read_array(archive, name)
        if array.dtype.kind not in "iuf" or (name == "num_images" and np.any(array < 0)):
            raise ValueError(f"{name} is {array.dtype} or below 0")
        arrays[name] = np.asarray(array, np.float32 if name == "features" else np.float64)
    pooled = Gaussian(arrays["mu"], arrays["sigma"])
    spatial = Gaussian(arrays["mu_s"], arrays["sigma_s"]) if "mu_s" in names else None
    num_images = int(np.sum(arrays.get("num_images", 0)))
    return Statistics(num_images, pooled, spatial, arrays.get("features"), **file)


def read_pictures(
    path: epath.PathLike, block_size: int = 250
) -> Iterator[UInt8[np.ndarray, "n h w c"]]:
    """Yield the pictures of a file in blocks; no more than one block is held in memory."""
    with _opened(path) as archive:
        shape = _picture_shape(archive)
        with archive.open(f"{_PICTURES}.npy") as member:
            archives.read_header(member)
            for start in range(0, shape[0], block_size):
                block = (min(block_size, shape[0] - start), *shape[1:])
                yield np.frombuffer(member.read(math.prod(block)), np.uint8).reshape(block)


def count_pictures(path: epath.PathLike) -> int:
    """Return the number of pictures in a file for `read_pictures`."""
    with _opened(path) as archive:
        return _picture_shape(archive)[0]


def write_reference(
    path: epath.PathLike,
    statistics: Statistics,
    *,
    pictures: Iterable[UInt8[np.ndarray, "n h w c"]] = (),
    num_pictures: int = 0,
) -> None:
    """Write a file of reference statistics, whole or not at all, and its folder.

    Args:
      pictures: blocks to store with them, which ADM's evaluation needs; ours needs the features.
      num_pictures: their number in all blocks.
    """
    path = epath.Path(path).expanduser()
    path.parent.mkdir(parents=True, exist_ok=True)
    arrays = {"num_images": statistics.num_images, "features": statistics.features}
    arrays |= dict(zip(("mu", "sigma"), statistics.pooled, strict=True))
    arrays |= dict(zip(("mu_s", "sigma_s"), statistics.spatial or (None, None), strict=True))
    with written_aside(path) as aside:
        np.savez(aside, **{name: array for name, array in arrays.items() if array is not None})
        if num_pictures:
            with zipfile.ZipFile(aside, "a") as archive:
                _write_pictures(archive, pictures, num_pictures)


def _write_pictures(
    archive: zipfile.ZipFile, pictures: Iterable[np.ndarray], expected: int
) -> None:
    written = 0
    with archive.open(f"{_PICTURES}.npy", "w", force_zip64=True) as member:
        for block in pictures:
            if not written:
                shape = (expected, *block.shape[1:])
                header = {"descr": "|u1", "fortran_order": False, "shape": shape}
                npy.write_array_header_1_0(member, header)
            written += len(block)
            member.write(np.ascontiguousarray(block).data)
    if written != expected:
        raise BadInput(f"num_pictures={expected}: there were {written}")


@contextlib.contextmanager
def _opened(path: epath.PathLike) -> Iterator[zipfile.ZipFile]:
    """Open an `.npz`; whatever reading it raises is a BadInput that names it."""
    path = epath.Path(path).expanduser()
    with reading(path, "statistics or pictures of an .npz"), archives.opened_npz(path) as archive:
        yield archive


def _picture_shape(archive: zipfile.ZipFile) -> tuple[int, ...]:
    if f"{_PICTURES}.npy" not in archive.namelist():
        raise BadInput("has no pictures; must have arr_0, uint8 [N, H, W, C]")
    shape, fortran, dtype = archives.array_header(archive, _PICTURES)
    if dtype != np.uint8 or len(shape) != 4 or fortran or 0 in shape:
        found = f"{dtype} {list(shape)}{' in Fortran order' * fortran}"
        raise BadInput(f"arr_0 is {found}; must be uint8 [N, H, W, C] in C order, none of them 0")
    return shape
