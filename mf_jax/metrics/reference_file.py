"""Files of reference statistics: what FID, sFID, precision, recall and KID compare samples with.

The format is that of the evaluation of ADM, an `.npz` of `mu`, `sigma` (of the 2048 pooled features), `mu_s`, `sigma_s`
(of the 2023 spatial ones) and `arr_0`, pictures; files of other tools with `mu` and `sigma` alone are read too. Ours
add `features`, some of the feature rows, and `num_images`. Pictures are never read unless asked for, and by blocks.
"""

import contextlib
import dataclasses
import functools
import hashlib
import math
import struct
import uuid
import zipfile
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
from etils import epath
from jaxtyping import Float, Float64, Shaped, UInt8
from numpy.lib import format as npy

from mf_jax.errors import BadInput
from mf_jax.metrics.frechet import asymmetry
from mf_jax.metrics.row_store import RowArray, RowFile, RowSource

_PICTURES = "arr_0"
_LEAST_FEATURES = 4  # of precision and recall with three neighbours
_ROUNDING = 1e-6
"""Of a covariance: asymmetry as a share of its largest entry, eigenvalues below 0 as one of their sum."""


@dataclasses.dataclass(frozen=True, eq=False)
class Statistics:
    """What there is to know of a set of reference pictures.

    num_images: how many they are, 0 if unknown. mean, covariance: of the pooled features, `[d]` and `[d, d]`.
    mean_spatial, covariance_spatial: of the spatial ones, or None. features: rows of some of them `[m, d]`, or None.
    """

    num_images: int
    # shapes are checked with what is in the arrays, in one line that names the file
    mean: Float[np.ndarray, "..."]
    covariance: Float[np.ndarray, "..."]
    mean_spatial: Float[np.ndarray, "..."] | None = None
    covariance_spatial: Float[np.ndarray, "..."] | None = None
    features: Float[np.ndarray, "..."] | None = None


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Reference:
    """Statistics to compare with, of which only the small ones are held: the others are read wherever they are used.

    path: of the file. sha256: of its bytes, in hex digits. num_pictures: pictures in it for `read_pictures`.
    num_images, mean, mean_spatial: as in `Statistics`. features: rows in the file, or None. load: returns its `sigma`
    or `sigma_s`.
    """

    path: str
    sha256: str
    num_pictures: int
    num_images: int
    mean: Float64[np.ndarray, "d"]
    mean_spatial: Float64[np.ndarray, "s"] | None
    features: RowSource | None
    load: Callable[[str], Float64[np.ndarray, "_ _"]]

    @classmethod
    def of(
        cls, statistics: Statistics, *, path: str, sha256: str = "", num_pictures: int = 0
    ) -> "Reference":
        """Return statistics that are in memory as a reference."""
        covariances = {"sigma": statistics.covariance, "sigma_s": statistics.covariance_spatial}
        return cls(
            path=path,
            sha256=sha256,
            num_pictures=num_pictures,
            num_images=statistics.num_images,
            mean=statistics.mean,
            mean_spatial=statistics.mean_spatial,
            features=None if statistics.features is None else RowArray(statistics.features),
            load=covariances.__getitem__,
        )

    @property
    def covariance(self) -> Float64[np.ndarray, "d d"]:
        """Return the covariance of the pooled features."""
        return self.load("sigma")

    @property
    def covariance_spatial(self) -> Float64[np.ndarray, "s s"] | None:
        """Return the covariance of the spatial features, or None where there are none."""
        return None if self.mean_spatial is None else self.load("sigma_s")


Compute = Callable[[Iterator[UInt8[np.ndarray, "n h w c"]]], Statistics]


def read_reference(
    path: epath.PathLike, compute: Compute | None = None, *, block_size: int = 250
) -> Reference:
    """Read a file of reference statistics; its pictures are not touched if it has statistics.

    Args:
      path: of the `.npz`.
      compute: for a file of pictures alone: from blocks of its pictures to their statistics; None refuses such files.
      block_size: pictures of a block, at least 1.

    Returns:
      The reference.

    Raises:
      BadInput: no such file, not a whole `.npz`, keys missing, or statistics that are none; names the file and the key.
    """
    path = epath.Path(path).expanduser()
    about = path.stat() if path.is_file() else None
    with _opened(path) as archive:
        names = _names(archive)
        shape = _header(archive, _PICTURES)[0] if _PICTURES in names else (0,)
        if "mu" in names or "sigma" in names or not (shape and shape[0]):
            found = _read_statistics(archive, names, str(path))
        elif compute is None:
            raise BadInput(
                f"{path}: holds pictures (arr_0) and no statistics; must have mu and sigma: compute them from the "
                "pictures first"
            )
        else:
            found = None
    is_stored = found is not None
    if found is None:
        found = compute(read_pictures(path, block_size))
    found = _checked(found, str(path))
    if found.features is not None and len(found.features) < _LEAST_FEATURES:
        raise BadInput(
            f"{path}: has {len(found.features)} rows of features; must have at least {_LEAST_FEATURES}"
        )
    num_pictures = shape[0] if shape else 0
    reference = Reference.of(found, path=str(path), sha256=_sha256(path), num_pictures=num_pictures)
    if not is_stored:
        return reference
    rows = _rows_in(path) if "features" in names else None
    return dataclasses.replace(
        reference, load=functools.partial(_load, path, about), features=rows or reference.features
    )


def _load(path: epath.Path, about: Any, name: str) -> Float64[np.ndarray, "_ _"]:
    if not path.is_file() or path.stat() != about:
        raise BadInput(
            f"{path}: has changed since it was read first; leave it as it is, and run the same command again"
        )
    with _opened(path) as archive:
        return _array(archive, name, np.float64)


def _rows_in(path: epath.Path) -> RowFile | None:
    """Return the features in a file, or None where they cannot be read in blocks: compressed, or no float32 rows."""
    with _opened(path) as archive:
        (rows, width), by_columns, dtype = _header(archive, "features")
        about = archive.getinfo("features.npy")
        if about.compress_type != zipfile.ZIP_STORED or by_columns or dtype != np.dtype("<f4"):
            return None
        with archive.open(about) as member:
            _read_header(member)
            in_member = member.tell()
    with path.open("rb") as file:
        file.seek(about.header_offset)
        # a local header is 30 bytes, the last two numbers of which are the lengths of the name and of what follows it
        in_file = about.header_offset + 30 + sum(struct.unpack("<26x2H", file.read(30)))
    return RowFile(path, in_file + in_member, rows, width)


def read_pictures(path: epath.PathLike, block_size: int) -> Iterator[UInt8[np.ndarray, "n h w c"]]:
    """Yield the pictures of a file in blocks; no more than one block is held in memory.

    Args:
      path: of an `.npz` whose `arr_0` is uint8 `[N, H, W, C]`.
      block_size: pictures of a block, at least 1; the last may be smaller.

    Raises:
      BadInput: no such file, no pictures in it, pictures of another type or shape, or a damaged file.
    """
    path = epath.Path(path).expanduser()
    with _opened(path) as archive:
        if _PICTURES not in _names(archive):
            raise BadInput(
                f"{path}: has no pictures; must have arr_0, uint8 [N, H, W, C]: use a file of pictures"
            )
        shape, fortran, dtype = _header(archive, _PICTURES)
        if dtype != np.uint8 or len(shape) != 4 or fortran or 0 in shape:
            raise BadInput(
                f"{path}: arr_0 is {dtype} {list(shape)}{' in Fortran order' if fortran else ''}; must be uint8 "
                "[N, H, W, C] in C order, none of them 0: write it with np.savez"
            )
        with archive.open(f"{_PICTURES}.npy") as member:
            _read_header(member)
            for start in range(0, shape[0], block_size):
                block = (min(block_size, shape[0] - start), *shape[1:])
                content = member.read(math.prod(block))
                if len(content) < math.prod(block):
                    raise EOFError("arr_0 ends early")
                yield np.frombuffer(content, np.uint8).reshape(block)


def count_pictures(path: epath.PathLike) -> int:
    """Return how many pictures a file for `read_pictures` has.

    Raises:
      BadInput: as `read_pictures`.
    """
    path = epath.Path(path).expanduser()
    next(read_pictures(path, 1), None)  # checks that they are pictures
    with _opened(path) as archive:
        return _header(archive, _PICTURES)[0][0]


def write_reference(
    path: epath.PathLike,
    statistics: Statistics,
    *,
    pictures: Iterable[UInt8[np.ndarray, "n h w c"]] = (),
    num_pictures: int = 0,
) -> None:
    """Write a file of reference statistics, whole or not at all.

    Args:
      path: of the `.npz`, whose folder is created.
      statistics: of the reference pictures.
      pictures: blocks of pictures to store with them; no more than one is held in memory. ADM's evaluation reads no
        file without, as it computes precision and recall from them; ours needs the features alone.
      num_pictures: how many they are together.

    Raises:
      BadInput: statistics that are none, or another number of pictures.
    """
    path = epath.Path(path).expanduser()
    statistics = _checked(statistics, str(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    # Written aside and renamed: another process sees the whole file or none.
    aside = path.parent / f".{path.name}.{uuid.uuid4().hex}"
    try:
        with aside.open("wb") as file, zipfile.ZipFile(file, "w") as archive:
            for name, array in zip(_KEYS, vars(statistics).values(), strict=True):
                if array is not None:
                    with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                        npy.write_array(member, np.asarray(array), allow_pickle=False)
            if num_pictures:
                _write_pictures(archive, pictures, num_pictures)
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)


_KEYS = ("num_images", "mu", "sigma", "mu_s", "sigma_s", "features")
"""Of the fields of `Statistics`."""


def _write_pictures(
    archive: zipfile.ZipFile, pictures: Iterable[np.ndarray], expected: int
) -> None:
    written, shape = 0, None
    with archive.open(f"{_PICTURES}.npy", "w", force_zip64=True) as member:
        for block in pictures:
            if shape is None:
                shape = block.shape[1:]
                header = {"descr": "|u1", "fortran_order": False, "shape": (expected, *shape)}
                npy.write_array_header_1_0(member, header)
            if block.shape[1:] != shape or block.dtype != np.uint8:
                raise BadInput(
                    f"pictures: a block is {block.dtype} {list(block.shape[1:])}; must be uint8 {list(shape)} like the "
                    "first: resize all alike"
                )
            written += len(block)
            member.write(np.ascontiguousarray(block).data)
    if written != expected:
        raise BadInput(
            f"num_pictures={expected}: there were {written}; must be the number of pictures given"
        )


@contextlib.contextmanager
def _opened(path: epath.Path) -> Iterator[zipfile.ZipFile]:
    """Open an `.npz`, and say in one line what is wrong with it as far as anything in it is read."""
    if not path.is_file():
        raise BadInput(
            f"{path}: no such file; must be an .npz of reference statistics or of pictures"
        )
    try:
        with path.open("rb") as file, zipfile.ZipFile(file) as archive:
            yield archive
    except BadInput:
        raise
    except (
        zipfile.BadZipFile,
        zipfile.LargeZipFile,
        zipfile.zlib.error,
        EOFError,
        KeyError,
    ) as error:
        raise BadInput(
            f"{path}: cannot be read as .npz ({' '.join(str(error).split())[:120]}); check the file, or fetch it again"
        ) from error
    except (ValueError, NotImplementedError, OSError) as error:
        raise BadInput(
            f"{path}: an array in it cannot be read ({' '.join(str(error).split())[:120]}); check the file, or fetch "
            "it again"
        ) from error


def _names(archive: zipfile.ZipFile) -> set[str]:
    return {name.removesuffix(".npy") for name in archive.namelist()}


def _read_header(member: zipfile.ZipExtFile) -> tuple[tuple[int, ...], bool, np.dtype]:
    version = npy.read_magic(member)
    return (npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0)(member)


def _header(archive: zipfile.ZipFile, name: str) -> tuple[tuple[int, ...], bool, np.dtype]:
    with archive.open(f"{name}.npy") as member:
        return _read_header(member)


def _array(archive: zipfile.ZipFile, name: str, dtype: type) -> Shaped[np.ndarray, "..."]:
    with archive.open(f"{name}.npy") as member:
        return np.asarray(npy.read_array(member, allow_pickle=False), dtype)


def _read_statistics(archive: zipfile.ZipFile, names: set[str], path: str) -> Statistics:
    missing = [name for name in ("mu", "sigma") if name not in names]
    half = [name for name in ("mu_s", "sigma_s") if name not in names]
    if missing or len(half) == 1:
        raise BadInput(
            f"{path}: lacks {', '.join(missing or half)}; it has {', '.join(sorted(names)) or 'nothing'}, and must "
            "have mu and sigma, mu_s and sigma_s both or neither: use a file of FID reference statistics"
        )
    values: list[Any] = [
        int(_array(archive, "num_images", np.int64).sum()) if "num_images" in names else 0
    ]
    for name in _KEYS[1:]:
        dtype = np.float32 if name == "features" else np.float64
        values.append(_array(archive, name, dtype) if name in names else None)
    return Statistics(*values)


def _checked(statistics: Statistics, path: str) -> Statistics:
    _check_gaussian(statistics.mean, statistics.covariance, path, "mu", "sigma")
    if (statistics.mean_spatial is None) != (statistics.covariance_spatial is None):
        raise BadInput(f"{path}: mean_spatial and covariance_spatial must be given both or neither")
    if statistics.mean_spatial is not None:
        _check_gaussian(
            statistics.mean_spatial, statistics.covariance_spatial, path, "mu_s", "sigma_s"
        )
    features = statistics.features
    if features is not None:
        if features.ndim != 2 or features.shape[1] != statistics.mean.size:
            raise BadInput(
                f"{path}: features is {list(features.shape)}; must be [rows, {statistics.mean.size}] like mu: write "
                "both from one network"
            )
        _require_finite(features, path, "features")
    return statistics


def _check_gaussian(
    mean: Float[np.ndarray, "..."],
    covariance: Float[np.ndarray, "..."],
    path: str,
    first: str,
    second: str,
) -> None:
    if mean.ndim != 1 or not mean.size or covariance.shape != (mean.size, mean.size):
        raise BadInput(
            f"{path}: {first} is {list(mean.shape)} and {second} {list(covariance.shape)}; must be [d] and [d, d]: use "
            "a file of FID reference statistics"
        )
    _require_finite(mean, path, first)
    _require_finite(covariance, path, second)
    if asymmetry(covariance) > _ROUNDING * max(covariance.max(), -covariance.min()):
        raise BadInput(
            f"{path}: {second} is not symmetric; must be a covariance: compute the file again"
        )
    shifted = covariance + _ROUNDING * (np.trace(covariance) or 1) * np.eye(len(covariance))
    try:
        np.linalg.cholesky(shifted)  # a tenth of the time of eigenvalues
    except np.linalg.LinAlgError as error:
        raise BadInput(
            f"{path}: {second} has eigenvalues below 0; must be a covariance, which has none: compute the file again"
        ) from error


def _require_finite(array: Float[np.ndarray, "..."], path: str, name: str) -> None:
    bad = array.size - np.count_nonzero(np.isfinite(array))
    if bad:
        raise BadInput(
            f"{path}: {name} has {bad} values that are NaN or infinite; all must be finite: compute the file again"
        )


def _sha256(path: epath.Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
