"""Any image classification set of TensorFlow Datasets, read without TensorFlow."""

import difflib
import importlib
from typing import Any

import numpy as np
from jaxtyping import Int
from PIL import Image

from mf_jax.data.crop import adm_crop, as_rgb
from mf_jax.data.image_folder import Pictures
from mf_jax.data.pipeline import SPLITS, Batch, check_at_least
from mf_jax.errors import BadInput, check_known
from mf_jax.flow.records import NO_LABEL


class Tfds:
    """A prepared TFDS set with a feature `image`, resized and cropped to `[image_size, image_size, C]`.

    C is 1 for grey sets and 3 otherwise. The feature `label` gives the classes, if it is there.
    """

    def __init__(
        self,
        *,
        path: str,
        image_size: int,
        dataset: str,
        split_train: str,
        split_held_out: str,
        split: str,
    ) -> None:
        """Open one split.

        Args:
          path: the TFDS data_dir; "" means the default of TFDS.
          image_size: height and width in pixels.
          dataset: TFDS name, such as `cifar10` or `imagenet2012:5.1.0`.
          split_train: TFDS name of the split `train`; slices such as `train[:90%]` are allowed.
          split_held_out: TFDS name of the split `held_out`.
          split: `train` or `held_out`.

        Raises:
          BadInput: if the set or split is unknown, is not prepared, or has no pictures.
        """
        check_known("split", split, SPLITS)
        check_at_least("image_size", image_size, 1)
        self._data = open_tfds(dataset, split_train if split == "train" else split_held_out, path)
        features = dict(self._data.dataset_info.features.items())
        image, label = features["image"], features.get("label")
        self.num_classes = getattr(label, "num_classes", None) or 0
        self.class_names = tuple(label.names) if self.num_classes else ()
        self.shape = (image_size, image_size, 1 if image.shape[-1] == 1 else 3)
        self.stored = None
        self._pictures = Pictures(self._decode, (len(self._data), *self.shape))

    def __len__(self) -> int:
        return len(self._data)

    def gather(self, indices: Int[np.ndarray, "n"]) -> Batch:
        """Return the pictures `[n, H, W, C]` at these indices, and their labels."""
        return self._pictures.gather(indices)

    def _decode(self, index: int) -> tuple[np.ndarray, int]:
        record = self._data[index]
        label = record["label"] if self.num_classes else NO_LABEL
        return adm_crop(self._to_image(record["image"]), self.shape[0]), int(label)

    def _to_image(self, pixels: np.ndarray) -> Image.Image:
        return (
            Image.fromarray(pixels[..., 0])
            if self.shape[-1] == 1
            else as_rgb(Image.fromarray(pixels))
        )


def open_tfds(dataset: str, tfds_split: str, path: str, *, encoded: bool = False) -> Any:
    """Open a split of a prepared set with a feature `image`.

    Args:
      dataset: TFDS name.
      tfds_split: TFDS name of the split.
      path: the TFDS data_dir; "" means the default of TFDS.
      encoded: leave pictures as the bytes that are stored.

    Returns:
      What TFDS calls a data source.

    Raises:
      BadInput: if the set or split is unknown, is not prepared, or has no pictures.
    """
    # Imported here: it takes most of a second, which the other sources need not pay.
    tfds = importlib.import_module("tensorflow_datasets")
    decoders = {"image": tfds.decode.SkipDecoding()} if encoded else None
    try:
        data = tfds.data_source(
            dataset, split=tfds_split, data_dir=path or None, download=False, decoders=decoders
        )
    except tfds.core.DatasetNotFoundError as error:
        near = difflib.get_close_matches(
            dataset, tfds.list_builders(with_community_datasets=False), n=1
        )
        suggestion = (
            f"did you mean {near[0]!r}?" if near else "see the catalogue of TensorFlow Datasets"
        )
        raise BadInput(
            f"dataset={dataset!r} is unknown to TFDS and not prepared in path={path!r}: {suggestion}"
        ) from error
    except Exception as error:
        # TFDS raises ValueError, AssertionError, NotImplementedError, KeyError, ... alike.
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise BadInput(
            f"dataset={dataset!r} split {tfds_split!r} cannot be read from path={path!r} ({reason}): check the names, "
            f"or prepare it where TensorFlow is installed with `tfds build {dataset} --file_format=array_record "
            "--data_dir=DIR` (download_and_prepare) and set path=DIR"
        ) from error
    features = dict(data.dataset_info.features.items())
    image = features.get("image")
    if image is None or image.np_dtype != np.uint8 or len(image.shape) != 3:
        raise BadInput(
            f"dataset={dataset!r} must have a feature 'image' (uint8 [H, W, C]); it has {list(features)}"
        )
    return data
