"""Any image classification set of TensorFlow Datasets, read without TensorFlow."""

import glob
import json
from collections.abc import Iterator
from typing import Any

import numpy as np
from etils import epath

from mf_jax.flow.errors import BadInput, nearest, refused
from mf_jax.flow.records import NO_LABEL
from mf_jax.runtime.files import in_bucket, opened

_FEATURES = "tensorflow_datasets.core.features."
_NAMING = {"pythonClassName", "python_class_name", "type"}  # name a class to import


class TfdsPictures:
    """A split of a prepared set with a feature `image`; a feature `label` gives the classes.

    Args:
      dataset: TFDS name, such as `cifar10` or `imagenet2012:5.1.0`.
      split: in the words of TFDS, such as `train[:90%]`.
      path: the TFDS data_dir; "" means the default of TFDS.
      encoded: leave pictures as the bytes that are stored.
    """

    def __init__(self, dataset: str, split: str, path: str, *, encoded: bool) -> None:
        self._data, features = _open(dataset, split, path, encoded)
        self._split = split
        label = features.get("label")
        has_classes = bool(getattr(label, "num_classes", None))
        self.class_names = tuple(label.names) if has_classes else ()
        self.channels = 1 if features["image"].shape[-1] == 1 else 3

    def __len__(self) -> int:
        return len(self._data)

    def name(self, index: int) -> str:
        """See `Listed.name`."""
        return f"{self._split}[{index}]"

    def read(self, index: int) -> tuple[Any, int]:
        """See `Listed.read`; a decoded picture is a uint8 array."""
        record = self._data[index]
        return record["image"], int(record["label"]) if self.class_names else NO_LABEL

    def lines(self) -> Iterator[str]:
        """See `Listed.lines`."""
        yield from (self._data.dataset_info.full_name, self._split, str(len(self)))

    def versions(self) -> Iterator[str]:
        """See `Listed.versions`."""
        yield from self.lines()
        for path in sorted(epath.Path(self._data.dataset_info.data_dir).glob("*")):
            yield f"{path}\0{path.stat().mtime}\0{path.stat().length}"


def _open(dataset: str, split: str, path: str, encoded: bool) -> tuple[Any, dict[str, Any]]:
    """Return what TFDS calls a data source, and its features by name."""
    import tensorflow_datasets as tfds  # takes most of a second, which other inputs need not pay
    from tensorflow_datasets.core.utils import file_utils

    problem = f"dataset={dataset!r} split {split!r} cannot be read from path={path!r}"
    fix = f"`tfds build {dataset} --file_format=array_record --data_dir=DIR`, and set path to DIR"
    known = tfds.list_builders(with_community_datasets=False)
    hint = "" if dataset.partition(":")[0] in known else nearest(dataset, known)
    fix = f"check the names{hint}, or prepare it where TensorFlow is installed with {fix}"
    with refused(Exception, problem, fix):  # ValueError, AssertionError, KeyError, ...
        name, _ = tfds.core.naming.parse_builder_name_kwargs(dataset)
        if name.namespace:
            raise BadInput(f"dataset={dataset!r}: may not be a community's, which brings its code")
        for folder in file_utils.list_data_dirs(given_data_dir=path or None):
            _check_features(epath.Path(folder) / name.name)
        data = tfds.data_source(
            dataset,
            split=split,
            data_dir=path or None,
            download=False,
            decoders={"image": tfds.decode.SkipDecoding()} if encoded else None,
        )
    features = dict(data.dataset_info.features.items())
    image = features.get("image")
    if image is None or image.np_dtype != np.uint8 or len(image.shape) != 3:
        raise BadInput(f"dataset={dataset!r} has {list(features)}, no image of uint8 [H, W, C]")
    return data, features


def _check_features(folder: epath.Path) -> None:
    """Raise BadInput if a prepared set, in a version or in that of a variant, names other classes.

    TFDS would import them, and so run what lies in a folder from which Python imports.
    """

    def check(entry: dict[str, Any]) -> None:
        for name in (str(entry[key]) for key in _NAMING & entry.keys()):
            if not name.startswith(_FEATURES):
                raise BadInput(f"{folder} asks for {name[:80]}, which is no feature of TFDS")

    for versions in ("", "*/", "*/*/"):
        pattern = f"{versions}features.json"
        found = folder.glob(pattern)
        if not in_bucket(folder):
            found = (folder / f for f in glob.glob(pattern, root_dir=folder, include_hidden=True))
        for path in found:
            with opened(path) as file:
                json.load(file, object_hook=check)
