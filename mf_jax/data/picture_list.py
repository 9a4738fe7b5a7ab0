"""Labelled pictures wherever they lie: in folders, in tar files that stay packed, or in a TFDS set.

Classes and pictures are in the order of their names, whatever order a file system lists them in, so that a picture has
the same number on every host; ImageNet's labels are the usual 0 to 999.
"""

import hashlib
import io
import tarfile
from collections.abc import Iterable
from typing import IO, NamedTuple, Protocol, runtime_checkable

import numpy as np
from etils import epath

from mf_jax.data.image_folder import SUFFIXES
from mf_jax.data.tfds_source import open_tfds
from mf_jax.errors import BadInput
from mf_jax.flow.records import NO_LABEL

TFDS = "tfds:"
"""Begins the name of an input that is a TFDS set."""
_TAR = ".tar"
_SHOWN = 3


@runtime_checkable
class PicturesIn(Protocol):
    """An ordered list of encoded pictures; `read` and `name` are safe to call from several threads.

    class_names: in the order of the labels; () without labels. digest: differs between different lists.
    """

    class_names: tuple[str, ...]
    digest: str

    def __len__(self) -> int: ...

    def name(self, index: int) -> str: ...

    def read(self, index: int) -> tuple[bytes, int]: ...


class _Found(NamedTuple):
    """A picture of a listing: its class ("" for none), its name, and where in which file it lies (size -1: all)."""

    class_name: str
    name: str
    file: str
    offset: int = 0
    size: int = -1


class Listed:
    """Pictures in folders or in tar files, read by their place."""

    def __init__(self, found: Iterable[_Found]) -> None:
        """Sort and number the pictures.

        Args:
          found: the pictures; those of the class "" have no label.
        """
        found = sorted(found)
        self.class_names = tuple(sorted({picture.class_name for picture in found} - {""}))
        labels = {name: label for label, name in enumerate(self.class_names)}
        self._names = [picture.name for picture in found]
        self._labels = [labels.get(picture.class_name, NO_LABEL) for picture in found]
        self._files = [picture.file for picture in found]
        self._places = np.array([(p.offset, p.size) for p in found], np.int64)
        self.digest = _digest(f"{p.class_name}\0{p.name}\0{p.size}" for p in found)

    def __len__(self) -> int:
        return len(self._names)

    def name(self, index: int) -> str:
        """Return the name of a picture, with the folders it is in."""
        return self._names[index]

    def read(self, index: int) -> tuple[bytes, int]:
        """Return a picture as it is stored, and its label."""
        offset, size = self._places[index].tolist()
        with epath.Path(self._files[index]).open("rb") as file:
            file.seek(offset)
            return file.read(size), self._labels[index]


class TfdsPictures:
    """The pictures of a split of a TFDS set."""

    def __init__(self, dataset: str, split: str) -> None:
        """Open the split; its folder is TFDS's own, or that of the variable TFDS_DATA_DIR.

        Args:
          dataset: TFDS name, such as `imagenet2012`.
          split: TFDS name of the split.

        Raises:
          BadInput: if it cannot be read, or has no pictures.
        """
        self._data = open_tfds(dataset, split, "", encoded=True)
        self._split = split
        label = dict(self._data.dataset_info.features.items()).get("label")
        self.class_names = tuple(label.names) if getattr(label, "num_classes", None) else ()
        self.digest = _digest([self._data.dataset_info.full_name, split, str(len(self))])

    def __len__(self) -> int:
        return len(self._data)

    def name(self, index: int) -> str:
        """Return the split and the number of a picture in it."""
        return f"{self._split}[{index}]"

    def read(self, index: int) -> tuple[bytes, int]:
        """Return a picture as it is stored, and its label."""
        record = self._data[index]
        return record["image"], int(record["label"]) if self.class_names else NO_LABEL


def list_pictures(path: str, *, tfds_split: str) -> PicturesIn:
    """List the pictures of an input.

    Args:
      path: a folder whose sub-folders are classes, or with `train/` above them; a folder of pictures without classes; a
        tar file of such folders or of one tar file a class; a folder of one tar file a class; or `tfds:NAME`.
      tfds_split: the split of a TFDS set.

    Returns:
      The pictures, at least one.

    Raises:
      BadInput: if there is no such input, it has no pictures, a class without any, or both pictures and folders.
    """
    if not path:
        raise BadInput(
            "input='' is not set; it must be a folder of pictures, a .tar file or tfds:NAME: set input"
        )
    if path.startswith(TFDS):
        return TfdsPictures(path.removeprefix(TFDS), tfds_split)
    root = epath.Path(path).expanduser()
    if root.is_dir():
        return Listed(_in_folder(root))
    if not root.exists():
        raise BadInput(
            f"input={path!r} does not exist; must be a folder, a .tar file or tfds:NAME: set input"
        )
    if root.suffix != _TAR:
        raise BadInput(
            f"input={path!r} is a file but no .tar; it must be a folder, a .tar file or tfds:NAME"
        )
    return Listed(_in_tar(root))


def _in_folder(root: epath.Path) -> list[_Found]:
    listing = _listing(root)
    if "train" in listing.folders and not listing.pictures:  # ImageNet's tree
        inside = _listing(root / "train")
        if not inside.pictures:  # a class called train would hold pictures itself
            root, listing = root / "train", inside
    present = [f"{kind} ({_some(names)})" for kind, names in listing._asdict().items() if names]
    if len(present) != 1:
        raise BadInput(
            f"input={str(root)!r} holds {' and '.join(present) or 'nothing to read'}; must hold either class folders, "
            f"or tar files of classes, or pictures ({' '.join(SUFFIXES)}): move the others away, or set input elsewhere"
        )
    found = [_Found("", name, str(root / name)) for name in listing.pictures]
    for name in listing.tars:
        found += _in_class_tar(root / name)
    for name in listing.folders:
        found += _in_class_folder(root, name)
    return found


class _Listing(NamedTuple):
    pictures: list[str]
    tars: list[str]
    folders: list[str]


def _listing(folder: epath.Path) -> _Listing:
    names = sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))
    pictures = [name for name in names if name.lower().endswith(SUFFIXES)]
    tars = [name for name in names if name.endswith(_TAR)]
    # only what is left is asked whether it is a folder: a question for each picture would take hours on a network
    others = [name for name in names if not name.lower().endswith((*SUFFIXES, _TAR))]
    return _Listing(pictures, tars, [name for name in others if (folder / name).is_dir()])


def _in_class_folder(root: epath.Path, name: str) -> list[_Found]:
    pictures, _, folders = _listing(root / name)
    if not pictures:
        _refuse_empty(f"{root / name}", f", only folders ({_some(folders)})" if folders else "")
    return [_Found(name, f"{name}/{picture}", str(root / name / picture)) for picture in pictures]


def _in_class_tar(path: epath.Path) -> list[_Found]:
    with path.open("rb") as file, _opened(file, str(path)) as tar:
        return _of_class(tar, str(path), path)


def _in_tar(path: epath.Path) -> list[_Found]:
    """List a tar file of one tar file a class, or else of pictures, whose class is the folder that they are in."""
    with path.open("rb") as file, _opened(file, str(path)) as tar:
        members = _members(tar, str(path))
        class_tars = [member for member in members if member.name.endswith(_TAR)]
        if not class_tars:
            return _of_folders(members, path)
        found = []
        for member in class_tars:
            name = f"{path}:{member.name}"
            with _opened(tar.extractfile(member), name) as inside:
                found += _of_class(inside, name, path, member.offset_data)
        return found


def _of_class(tar: tarfile.TarFile, name: str, path: epath.Path, offset: int = 0) -> list[_Found]:
    class_name = epath.Path(name.rpartition(":")[2]).stem
    pictures = [member for member in _members(tar, name) if member.name.lower().endswith(SUFFIXES)]
    if not pictures:
        _refuse_empty(name)
    return [
        _member(m, class_name, f"{class_name}/{epath.Path(m.name).name}", path, offset)
        for m in pictures
    ]


def _of_folders(members: list[tarfile.TarInfo], path: epath.Path) -> list[_Found]:
    pictures = [member for member in members if member.name.lower().endswith(SUFFIXES)]
    found = [_member(m, epath.Path(m.name).parent.name, m.name, path) for m in pictures]
    if not found:
        _refuse_empty(str(path))
    if len({picture.class_name == "" for picture in found}) == 2:
        raise BadInput(
            f"input={str(path)!r} holds pictures both directly and in folders, which are classes: pack one kind"
        )
    return found


def _member(
    member: tarfile.TarInfo, class_name: str, name: str, path: epath.Path, offset: int = 0
) -> _Found:
    return _Found(class_name, name, str(path), offset + member.offset_data, member.size)


def _opened(file: IO[bytes] | io.BufferedIOBase, name: str) -> tarfile.TarFile:
    try:
        return tarfile.open(fileobj=file, mode="r:")
    except tarfile.TarError as error:
        raise BadInput(
            f"input: {name} is no uncompressed tar file ({error}): fetch it again, or unpack it"
        ) from error


def _members(tar: tarfile.TarFile, name: str) -> list[tarfile.TarInfo]:
    try:
        return [member for member in tar if member.isfile()]
    except tarfile.TarError as error:
        raise BadInput(
            f"input: {name} is cut short or damaged ({error}): fetch it again"
        ) from error


def _refuse_empty(name: str, but: str = "") -> None:
    raise BadInput(
        f"input: {name} holds no pictures ({' '.join(SUFFIXES)}){but}; a class must have one: remove it, or set "
        "input to the folder whose sub-folders hold pictures"
    )


def _some(names: list[str]) -> str:
    return ", ".join(names[:_SHOWN]) + ", ..." * (len(names) > _SHOWN)


def _digest(texts: Iterable[str]) -> str:
    total = hashlib.sha256()
    for text in texts:
        total.update(text.encode(errors="surrogateescape") + b"\n")
    return total.hexdigest()
