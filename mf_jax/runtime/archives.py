"""What a file claims to hold is compared with its own size, before anything is allocated for it."""

import contextlib
import math
import zipfile
import zlib
from collections.abc import Collection, Iterator, Mapping

import numpy as np
from etils import epath
from numpy.lib import format as npy

from mf_jax.flow.errors import BadInput
from mf_jax.runtime.files import opened, written_aside

_MOST_TIMES = 20  # its size may a compressed file hold: numbers of networks compress little
_ALWAYS_BYTES = 2**28  # may be in any file: zeros compress well
UNREADABLE = (OSError, ValueError, TypeError, EOFError, KeyError, NotImplementedError)
UNREADABLE += (zipfile.BadZipFile, zipfile.LargeZipFile, zlib.error)
"""What reading a damaged `.npz` raises."""


def check_claim(claimed: int, num_bytes: int) -> None:
    """Raise BadInput if a file of so many bytes claims far more bytes of numbers."""
    if claimed > max(_MOST_TIMES * num_bytes, _ALWAYS_BYTES):
        raise BadInput(f"claims {claimed:,} bytes in a file of {num_bytes:,}: fetch it again")


def check_members(archive: zipfile.ZipFile, num_bytes: int, *, stored: bool = False) -> None:
    """Raise BadInput unless so many bytes can hold the members, uncompressed if `stored`."""
    members = archive.infolist()
    names = {member.filename for member in members}
    inside = sum(member.compress_size for member in members)
    packed = stored and any(member.compress_type != zipfile.ZIP_STORED for member in members)
    if packed or len(names) < len(members) or inside > num_bytes:
        raise BadInput("has members that are compressed, named twice or larger than the file")
    check_claim(sum(member.file_size for member in members), inside if stored else num_bytes)


@contextlib.contextmanager
def opened_npz(path: epath.PathLike) -> Iterator[zipfile.ZipFile]:
    """Open an `.npz` whose members are of a size that its own allows."""
    with opened(path) as file, zipfile.ZipFile(file) as archive:
        check_members(archive, file.seek(0, 2))
        yield archive


def read_npz(path: epath.PathLike, only: Collection[str] = ()) -> dict[str, np.ndarray]:
    """Return the arrays of an `.npz`, all or `only` some; one of `UNREADABLE` if it is damaged."""
    with opened_npz(path) as archive:
        return {name: read_array(archive, name) for name in only or array_names(archive)}


def write_npz(path: epath.PathLike, arrays: Mapping[str, np.ndarray]) -> None:
    """Write arrays as a whole `.npz`, in an existing folder, or nothing."""
    with written_aside(epath.Path(path)) as aside:
        np.savez(aside, **arrays)


def array_names(archive: zipfile.ZipFile) -> list[str]:
    """Return the names of the arrays in an `.npz`."""
    return [name.removesuffix(".npy") for name in archive.namelist()]


def array_header(archive: zipfile.ZipFile, name: str) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Return shape, order and type of an array of an `.npz`, which must be as long as they say."""
    info = archive.getinfo(f"{name}.npy")
    with archive.open(info) as member:
        shape, _, dtype = header = read_header(member)
        claimed = member.tell() + math.prod(shape) * dtype.itemsize
    if dtype.hasobject or claimed < info.file_size:
        raise ValueError(f"{name} holds more than numbers")
    if claimed > info.file_size:
        raise EOFError(f"{name} ends early")
    return header


def read_header(member: zipfile.ZipExtFile) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Return shape, order and type of the array that follows."""
    version = npy.read_magic(member)
    return (npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0)(member)


def read_array(archive: zipfile.ZipFile, name: str) -> np.ndarray:
    """Return an array of an `.npz`."""
    array_header(archive, name)
    with archive.open(f"{name}.npy") as member:
        return npy.read_array(member, allow_pickle=False)
