"""The files of an input: those in a folder and below it, or those packed in a tar file."""

import os
import posixpath
import tarfile
from collections.abc import Iterator
from typing import NamedTuple

from etils import epath

from mf_jax.flow.errors import BadInput
from mf_jax.runtime.files import in_bucket, opened

_OF_TARFILE = b"LKxgX"
"""Types of members that tarfile reads itself: long names, and headers of POSIX."""
_MOST_OF_A_NAME = 2**20


class File(NamedTuple):
    """A file of an input, or a folder.

    parts: its name below the root; of a folder, the last is empty. name: as it is shown and told
    apart. path, offset, size: its place; a size of -1 means the whole file.
    """

    parts: tuple[str, ...]
    name: str
    path: str
    offset: int = 0
    size: int = -1

    def read(self) -> bytes:
        """Return its bytes."""
        with opened(self.path) as file:
            file.seek(self.offset)
            return file.read(self.size)


def in_folder(root: epath.Path) -> Iterator[File]:
    """Yield the files below a folder, and its folders."""
    names = _names(os.fspath(root), "", ())
    if in_bucket(root):
        start = len(f"{root}/")
        names = (f"{place}/{name}"[start:] for place, _, each in root.walk() for name in each)
    for name in names:
        if parts := _parts(name):
            yield File(parts, name, f"{root}/{name}")


def _names(root: str, below: str, within: tuple[str, ...]) -> Iterator[str]:
    """Yield the names of files, and of folders with a slash, in the folder `below` of a root."""
    within = (*within, os.path.realpath(f"{root}/{below}"))
    with os.scandir(f"{root}/{below}") as entries:  # which knows folders without asking for each
        for entry in entries:
            name = below + entry.name
            if not entry.is_dir():
                yield from [name] if entry.is_file() or entry.is_symlink() else []
            elif _parts(name) and os.path.realpath(entry.path) not in within:
                yield f"{name}/"
                yield from _names(root, f"{name}/", within)


def _parts(name: str) -> tuple[str, ...]:
    """Return a name's parts, or () if it is outside of the root or hidden, as Macs' companions."""
    parts = *posixpath.normpath(name.strip("/")).split("/"), *[""] * name.endswith("/")
    is_hidden = any(part.startswith(".") or part == "__MACOSX" for part in parts)
    return () if is_hidden else parts


def in_tar(tar_file: File, key: str) -> Iterator[File]:
    """Yield the files of a tar file, which may lie in another."""
    shown = tar_file.path if tar_file.size < 0 else f"{tar_file.path}:{tar_file.name}"
    members: dict[str, tarfile.TarInfo] = {}
    try:
        with opened(tar_file.path) as file:
            end = file.seek(0, os.SEEK_END)
            end = end if tar_file.size < 0 else min(end, tar_file.offset + tar_file.size)
            file.seek(tar_file.offset)
            with tarfile.open(fileobj=file, mode="r:", tarinfo=_Header) as tar:
                for member in tar:
                    if not 0 <= member.size <= end - member.offset_data or member.issparse():
                        raise tarfile.ReadError("a size is wrong")
                    members[posixpath.normpath(member.name)] = member
    except BadInput:
        raise
    except Exception as error:  # its type depends on where tarfile stumbles over the damage
        raise BadInput(
            f"{key}: {shown} is cut short, or no uncompressed tar file ({error}): fetch it "
            "again, or unpack it"
        ) from error
    for member in members.values():
        target = _target(member, members)
        if parts := _parts(member.name + "/" * member.isdir()):
            place = (target.offset_data, target.size) if target.isfile() else (0, 0)
            yield File(parts, member.name, tar_file.path, *place)


class _Header(tarfile.TarInfo):
    """The header of a member, before tarfile skips what it says, or reads it as a long name."""

    @classmethod
    def frombuf(cls, buf: bytes, encoding: str, errors: str) -> "_Header":
        header = super().frombuf(buf, encoding, errors)
        if header.size < 0 or (header.type in _OF_TARFILE and header.size > _MOST_OF_A_NAME):
            raise tarfile.ReadError("a size is wrong")
        return header


def _target(member: tarfile.TarInfo, members: dict[str, tarfile.TarInfo]) -> tarfile.TarInfo:
    """Return what a link leads to; a link that leads nowhere, and all else, itself."""
    above = posixpath.dirname(member.name) if member.issym() else ""
    return members.get(posixpath.normpath(posixpath.join(above, member.linkname)), member)
