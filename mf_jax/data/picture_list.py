"""Labelled pictures wherever they lie: in folders, in tar files that stay packed, or in a TFDS set.

Classes and pictures are in the order of their names. Hence a picture has the same number on every
host, and ImageNet's labels are the usual 0 to 999.
"""

import contextlib
import hashlib
import io
import tarfile
from collections.abc import Iterable, Iterator
from typing import IO, NamedTuple, Protocol, runtime_checkable

import numpy as np
from etils import epath

from mf_jax.data.tfds_source import TfdsPictures
from mf_jax.errors import BadInput, listed
from mf_jax.flow.records import NO_LABEL

SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
_TAR = ".tar"
_Binary = IO[bytes] | io.BufferedIOBase


@runtime_checkable
class PicturesIn(Protocol):
    """An ordered list of encoded pictures; its methods are safe to call from several threads.

    class_names: in the order of the labels; () without labels.
    """

    class_names: tuple[str, ...]

    def __len__(self) -> int: ...

    def name(self, index: int) -> str:
        """Return a picture's name, with the folders it is in."""

    def read(self, index: int) -> tuple[bytes, int]:
        """Return a picture as it is stored, and its label."""

    def lines(self) -> Iterator[str]:
        """Yield text that differs between different lists."""


class _Listed(NamedTuple):
    """A picture of a listing: its class or "", its name, and its place in a file (size -1: all)."""

    class_name: str
    name: str
    file: str
    offset: int = 0
    size: int = -1


class Listed:
    """Pictures in folders or in tar files, read by their place."""

    def __init__(self, listed: Iterable[_Listed]) -> None:
        listed = sorted(listed)
        self.class_names = tuple(sorted({picture.class_name for picture in listed} - {""}))
        numbers = {name: label for label, name in enumerate(self.class_names)}
        self.labels = [numbers.get(picture.class_name, NO_LABEL) for picture in listed]
        self._names = [picture.name for picture in listed]
        self._files = [picture.file for picture in listed]
        self._places = np.array([(p.offset, p.size) for p in listed], np.int64).reshape(-1, 2)

    def __len__(self) -> int:
        return len(self._names)

    def name(self, index: int) -> str:
        """See `PicturesIn.name`."""
        return self._names[index]

    def read(self, index: int) -> tuple[bytes, int]:
        """See `PicturesIn.read`."""
        offset, size = self._places[index].tolist()
        with epath.Path(self._files[index]).open("rb") as file:
            file.seek(offset)
            return file.read(size), self.labels[index]

    def lines(self) -> Iterator[str]:
        """See `PicturesIn.lines`."""
        for label, name, size in zip(self.labels, self._names, self._places[:, 1], strict=True):
            yield f"{self.class_names[label] if label != NO_LABEL else ''}\0{name}\0{size}"


def list_pictures(path: str, *, key: str, tfds_split: str) -> PicturesIn:
    """List the pictures of an input: of the TFDS set X for `tfds:X`, and else of `list_files`."""
    if path.startswith("tfds:"):
        return TfdsPictures(path.removeprefix("tfds:"), tfds_split, "", encoded=True)
    return list_files(path, key=key)


def list_files(path: str, *, key: str) -> Listed:
    """List pictures, at least one.

    Args:
      path: a folder of class folders, or with `train/` above them; a folder of pictures without
        classes; a tar file of such folders; or one tar file a class, in a folder or a tar file.
      key: config key that holds the path, for errors.
    """
    root = epath.Path(path).expanduser()
    if path and root.is_dir():  # "" would be the current directory
        return Listed(_in_folder(root, key))
    if root.suffix == _TAR and root.exists():
        return Listed(_in_tar(root, key))
    raise BadInput(f"{key}={path!r} is neither a folder of pictures nor a .tar file: set {key}")


def digest(pictures: PicturesIn) -> str:
    """Return hex digits that tell lists of pictures apart."""
    total = hashlib.sha256()
    for line in pictures.lines():
        total.update(line.encode(errors="surrogateescape") + b"\n")
    return total.hexdigest()


class _Listing(NamedTuple):
    pictures: list[str]
    tars: list[str]
    folders: list[str]


def _listing(folder: epath.Path) -> _Listing:
    names = sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))
    pictures = [name for name in names if name.lower().endswith(SUFFIXES)]
    tars = [name for name in names if name.endswith(_TAR)]
    # asking each picture whether it is a folder would take hours on a network
    others = [name for name in names if not name.lower().endswith((*SUFFIXES, _TAR))]
    return _Listing(pictures, tars, [name for name in others if (folder / name).is_dir()])


def _in_folder(root: epath.Path, key: str) -> list[_Listed]:
    listing = _listing(root)
    if "train" in listing.folders and not listing.pictures:  # ImageNet's tree
        below = _listing(root / "train")
        if not below.pictures:  # a class called train would hold pictures itself
            root, listing = root / "train", below
    if listing.pictures:  # folders beside pictures are classes only if they hold some
        classes = [name for name in listing.folders if _listing(root / name).pictures]
        listing = listing._replace(folders=classes)
    present = [f"{kind} ({listed(names, 3)})" for kind, names in listing._asdict().items() if names]
    if len(present) != 1:
        raise BadInput(
            f"{key}={str(root)!r} holds {' and '.join(present) or 'no pictures'}; must hold either "
            f"class folders, or tar files of classes, or pictures ({' '.join(SUFFIXES)}): move the "
            f"others away, or set {key}"
        )
    pictures = [_Listed("", name, str(root / name)) for name in listing.pictures]
    for name in listing.tars:
        with (root / name).open("rb") as file:
            pictures += _of_class(file, str(root / name), root / name, key)
    for name in listing.folders:
        inside, _, folders = _listing(root / name)
        if not inside:
            but = f", only folders ({listed(folders, 3)})" * bool(folders)
            _refuse_empty(root / name, key, but)
        pictures += [_Listed(name, f"{name}/{file}", str(root / name / file)) for file in inside]
    return pictures


def _in_tar(path: epath.Path, key: str) -> list[_Listed]:
    """List a tar file of one tar file a class, or else of pictures, whose folder is their class."""
    with path.open("rb") as file, _opened(file, str(path), key) as (tar, members):
        class_tars = [member for member in members if member.name.endswith(_TAR)]
        pictures: list[_Listed] = []
        for member in class_tars:
            name, start = f"{path}:{member.name}", member.offset_data
            pictures += _of_class(tar.extractfile(member), name, path, key, start)
    if class_tars:
        return pictures
    pictures = [
        _Listed(epath.Path(m.name).parent.name, m.name, str(path), m.offset_data, m.size)
        for m in members
        if m.name.lower().endswith(SUFFIXES)
    ]
    if not pictures:
        _refuse_empty(path, key)
    if len({picture.class_name == "" for picture in pictures}) == 2:
        raise BadInput(
            f"{key}={str(path)!r} holds pictures both directly and in class folders: pack one kind"
        )
    return pictures


def _of_class(
    file: _Binary, name: str, path: epath.Path, key: str, start: int = 0
) -> list[_Listed]:
    """List a class's tar file, which begins at byte `start` of the file at `path`."""
    class_name = epath.Path(name.rpartition(":")[2]).stem
    with _opened(file, name, key) as (_, members):
        pictures = [member for member in members if member.name.lower().endswith(SUFFIXES)]
    if not pictures:
        _refuse_empty(name, key)
    names = [f"{class_name}/{epath.Path(member.name).name}" for member in pictures]
    return [
        _Listed(class_name, name, str(path), start + member.offset_data, member.size)
        for name, member in zip(names, pictures, strict=True)
    ]


@contextlib.contextmanager
def _opened(
    file: _Binary, name: str, key: str
) -> Iterator[tuple[tarfile.TarFile, list[tarfile.TarInfo]]]:
    """Yield a tar file and the files in it."""
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            yield tar, [member for member in tar if member.isfile()]
    except tarfile.TarError as error:
        raise BadInput(
            f"{key}: {name} is cut short, or no uncompressed tar file ({error}): fetch it again, "
            "or unpack it"
        ) from error


def _refuse_empty(place: epath.PathLike, key: str, but: str = "") -> None:
    raise BadInput(
        f"{key}: {place} holds no pictures ({' '.join(SUFFIXES)}){but}; a class must have one: "
        f"remove it, or set {key} to the folder whose sub-folders hold pictures"
    )
