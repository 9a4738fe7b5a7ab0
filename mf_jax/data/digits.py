"""The 1,797 handwritten digits that come with scikit-learn: real pictures without a download."""

import numpy as np
from etils import epy
from jaxtyping import Int

from mf_jax.data.pipeline import SPLITS, Batch
from mf_jax.flow.errors import BadInput
from mf_jax.flow.records import DataSpec

with epy.lazy_imports():  # takes a second
    import sklearn.datasets
    import sklearn.model_selection

IMAGE_SIZE = 8
SPLIT_SEED = 0
"""Seed of the split, fixed so that every run and every host holds out the same digits."""


class Digits:
    """Grey digits `[8, 8, 1]` in [-1, 1]; of each of ten classes a fifth is held out."""

    spec = DataSpec((IMAGE_SIZE, IMAGE_SIZE, 1), 10, tuple("0123456789"))
    stored = None

    def __init__(self, *, image_size: int, split: str) -> None:
        """Load one split; `image_size` must be 8."""
        if image_size != IMAGE_SIZE:
            raise BadInput(
                f"image_size={image_size!r} must be {IMAGE_SIZE} for digits: set {IMAGE_SIZE}"
            )
        pixels, labels = sklearn.datasets.load_digits(return_X_y=True)
        parts = sklearn.model_selection.train_test_split(
            np.arange(len(labels)), test_size=0.2, random_state=SPLIT_SEED, stratify=labels
        )
        chosen = np.sort(parts[SPLITS.index(split)])
        self._x = (pixels[chosen] / 8 - 1).astype(np.float32).reshape(-1, *self.spec.shape)
        self._labels = labels[chosen].astype(np.int32)

    def __len__(self) -> int:
        return len(self._labels)

    def gather(self, indices: Int[np.ndarray, "n"]) -> Batch:
        """See `Source.gather`."""
        return Batch(self._x[indices], self._labels[indices])
