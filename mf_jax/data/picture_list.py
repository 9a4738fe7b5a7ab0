"""Labelled pictures wherever they lie: in folders, in tar files that stay packed, or in a TFDS set.

Classes and pictures are in the order of their names. Hence a picture has the same number on every
host, and ImageNet's labels are the usual 0 to 999.

A folder around all others is opened, and so is `train` beside other splits. What lies below a
folder at the top then is its class.
"""

import contextlib
import decimal
import functools
import hashlib
import os
import posixpath
import re
import tarfile
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from absl import logging
from etils import epath

from mf_jax.data.crop import SUFFIXES, open_picture
from mf_jax.data.tfds_source import TfdsPictures
from mf_jax.flow.errors import BadInput, listed, refused
from mf_jax.flow.records import NO_LABEL
from mf_jax.runtime.files import in_bucket, opened

_TAR, _NUMBER = ".tar", re.compile(r"-?\d+(\.\d+)?")
_TRAIN = ("train", "training")
_SPLITS = {*_TRAIN, "val", "valid", "validation", "dev", "test", "testing"}
_HEAD_BYTES = 2**24  # of a name without ending, to see whether it is a picture
_OF_TARFILE = b"LKxgX"  # types that tarfile reads itself: long names, headers of POSIX
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


class Listed:
    """Encoded pictures in folders or in tar files; `read` is safe in several threads."""

    def __init__(self, classes: list[tuple[str, File]], class_order: str) -> None:
        names = sorted({name for name, _ in classes} - {""})
        if class_order == "number" and all(map(_NUMBER.fullmatch, names)):
            names.sort(key=decimal.Decimal)
        self.class_names = tuple(names)
        numbers = {name: label for label, name in enumerate(self.class_names)}
        found = sorted((numbers.get(name, NO_LABEL), file[1:]) for name, file in classes)
        self.labels = [label for label, _ in found]
        self._files = [File((), *place) for _, place in found]

    def __len__(self) -> int:
        return len(self._files)

    def name(self, index: int) -> str:
        """Return a picture's name, with the folders it is in."""
        return self._files[index].name

    def read(self, index: int) -> tuple[bytes, int]:
        """Return a picture as it is stored, and its label."""
        return self._files[index].read(), self.labels[index]

    def versions(self) -> Iterator[str]:
        """Yield text that differs where a file was changed, or is another."""
        version_of = functools.cache(_version)
        for line, file in zip(self.lines(), self._files, strict=True):
            yield f"{line}\0{os.path.abspath(file.path)}\0{version_of(file.path)}"

    def lines(self) -> Iterator[str]:
        """Yield text that differs between different lists."""
        for label, file in zip(self.labels, self._files, strict=True):
            class_name = self.class_names[label] if label != NO_LABEL else ""
            yield f"{class_name}\0{file.name}\0{file.size}"


def _version(path: str) -> tuple[int, ...]:
    with contextlib.suppress(OSError):  # gone, or a link to nothing: a broken picture
        status = os.stat(path)
        times = status.st_mtime_ns, status.st_ctime_ns  # the second tells of its rights too
        return *times, status.st_ino, status.st_size
    return ()


PicturesIn = Listed | TfdsPictures


def list_pictures(path: str, *, key: str, tfds_split: str, class_order: str) -> PicturesIn:
    """List the pictures of an input: of the TFDS set X for `tfds:X`, and else of `list_files`."""
    if path.startswith("tfds:"):
        return TfdsPictures(path.removeprefix("tfds:"), tfds_split, "", encoded=True)
    return list_files(path, key=key, class_order=class_order)


def list_files(path: str, *, key: str, class_order: str) -> Listed:
    """List pictures, at least one; warn of what is left out.

    Args:
      path: a folder of class folders, or with `train/` above them; a folder of pictures without
        classes; one tar file a class, in a folder; or a tar file of any of these.
      key: config key that holds the path, for errors.
      class_order: `number` orders names that are all numbers as such, `name` as text.
    """
    root = epath.Path(path).expanduser()
    if path and root.is_dir():  # "" would be the current directory
        files = list(_in_folder(root))
    elif root.suffix.lower() == _TAR and root.exists():
        files = list(_in_tar(File((), "", str(root)), key))
    else:
        raise BadInput(f"{key}={path!r} is neither a folder of pictures nor a .tar file: set {key}")
    return Listed(_classes(files, root, key), class_order)


def digest(lines: Iterable[str]) -> str:
    """Return hex digits that tell lists of pictures apart, by their lines."""
    total = hashlib.sha256()
    for line in lines:
        total.update(line.encode(errors="surrogateescape") + b"\n")
    return total.hexdigest()


def _is_picture(file: File) -> bool:
    suffix = posixpath.splitext(file.parts[-1])[1].lower()
    if suffix or not file.parts[-1]:
        return suffix in SUFFIXES
    try:
        size = file.size if 0 <= file.size < _HEAD_BYTES else _HEAD_BYTES
        with open_picture(file._replace(size=size).read()):
            return True
    except Exception:  # the decoders of Pillow raise anything
        return False


def _classes(files: list[File], root: epath.Path, key: str) -> list[tuple[str, File]]:
    """Return pictures and their classes, "" without any; warn of the other files."""
    pictures = {file.name for file in files if _is_picture(file)}
    top = files
    while folder := _to_open(top, pictures):
        below = (f._replace(parts=f.parts[1:]) for f in top if f.parts[0] == folder)
        top = [file for file in below if file.parts]
    flat = [file for file in top if len(file.parts) == 1 and file.name in pictures]
    tars = {posixpath.splitext(f.parts[0])[0]: f for f in top if len(f.parts) == 1 and _is_tar(f)}
    classes: dict[str, list[File]] = {f.parts[0]: [] for f in top if len(f.parts) > 1}
    for file in top:
        if len(file.parts) > 1 and file.name in pictures:
            classes[file.parts[0]].append(file)
    kinds = {
        "pictures": [file.name for file in flat],
        "tars": [file.name for file in tars.values()],
        # folders beside pictures are classes only if they hold some
        "folders": sorted(name for name, found in classes.items() if found or not flat),
    }
    present = [f"{kind} ({listed(names, 3)})" for kind, names in kinds.items() if names]
    if len(present) != 1:
        told = f"{key}={str(root)!r} holds {' and '.join(present) or 'no pictures'}"
        needed = "class folders, or tar files of classes, or pictures for Pillow"
        raise BadInput(f"{told}; must hold either {needed}: move the others away, or set {key}")
    for name, tar in tars.items():
        inside = (file for file in _in_tar(tar, key) if _is_picture(file))
        classes[name] = [f._replace(name=f"{name}/{posixpath.basename(f.name)}") for f in inside]
    if empty := sorted(name for name, found in classes.items() if not (found or flat)):
        fix = f"remove it, or set {key} to the folder whose sub-folders hold pictures"
        raise BadInput(f"{key}: {root}: {listed(empty)} holds no pictures that Pillow reads: {fix}")
    of_classes = [(name, file) for name, found in classes.items() for file in found]
    taken = {file.name for file in [*flat, *tars.values(), *(file for _, file in of_classes)]}
    if out := sorted(file.name for file in files if file.parts[-1] and file.name not in taken):
        text = "%s: left out %d files, no pictures or outside of the classes: %s"
        logging.warning(text, root, len(out), listed(out))
    return [("", file) for file in flat] or of_classes


def _is_tar(file: File) -> bool:
    return file.parts[0].lower().endswith(_TAR)


def _to_open(files: list[File], pictures: set[str]) -> str:
    """Return the folder that holds the classes in place of the root; "" means the root."""
    if any(len(f.parts) == 1 and (f.name in pictures or _is_tar(f)) for f in files):
        return ""
    folders = {file.parts[0] for file in files if len(file.parts) > 1}
    # a class that is called train would hold pictures itself
    direct = {f.parts[0] for f in files if len(f.parts) == 2 and f.name in pictures}
    for name in sorted(folders):
        is_train = name.lower() in _TRAIN
        if is_train and (name not in direct or {other.lower() for other in folders} <= _SPLITS):
            return name
    return next(iter(folders)) if len(folders) == 1 and not direct else ""


def _in_folder(root: epath.Path) -> Iterator[File]:
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


def _in_tar(tar_file: File, key: str) -> Iterator[File]:
    """Yield the files of a tar file, which may lie in another."""
    shown = tar_file.path if tar_file.size < 0 else f"{tar_file.path}:{tar_file.name}"
    members: dict[str, tarfile.TarInfo] = {}
    problem = f"{key}: {shown} is cut short, or no uncompressed tar file"
    # the type of an error depends on where tarfile stumbles over the damage
    with refused(Exception, problem, "fetch it again, or unpack it"), opened(tar_file.path) as file:
        end = file.seek(0, os.SEEK_END)
        end = end if tar_file.size < 0 else min(end, tar_file.offset + tar_file.size)
        file.seek(tar_file.offset)
        with tarfile.open(fileobj=file, mode="r:", tarinfo=_Header) as tar:
            for member in tar:
                if not 0 <= member.size <= end - member.offset_data or member.issparse():
                    raise tarfile.ReadError("a size is wrong")
                members[posixpath.normpath(member.name)] = member
    for member in members.values():
        above = posixpath.dirname(member.name) if member.issym() else ""
        leads_to = posixpath.normpath(posixpath.join(above, member.linkname))
        # a link that leads nowhere, and all that is no link, is its own target
        target = members.get(leads_to, member) if member.linkname else member
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
