"""The 1,797 handwritten digits that come with scikit-learn: real pictures without a download."""

import numpy as np
from etils import epy

from mf_jax.data.arrays import Rows
from mf_jax.data.pipeline import SPLITS
from mf_jax.flow.errors import BadInput

with epy.lazy_imports():  # takes a second
    import sklearn.datasets
    import sklearn.model_selection

IMAGE_SIZE = 8
SPLIT_SEED = 0
"""Seed of the split, fixed so that every run and every host holds out the same digits."""


def of_digits(*, image_size: int, split: str) -> Rows:
    """Open one split of grey digits `[8, 8, 1]` in [-1, 1]; of each class a fifth is held out."""
    if image_size != IMAGE_SIZE:
        raise BadInput(
            f"image_size={image_size!r} must be {IMAGE_SIZE} for digits: set {IMAGE_SIZE}"
        )
    pixels, labels = sklearn.datasets.load_digits(return_X_y=True)
    parts = sklearn.model_selection.train_test_split(
        np.arange(len(labels)), test_size=0.2, random_state=SPLIT_SEED, stratify=labels
    )
    x = (pixels / 8 - 1).astype(np.float32).reshape(-1, IMAGE_SIZE, IMAGE_SIZE, 1)
    chosen = np.sort(parts[SPLITS.index(split)])
    return Rows({"x": x, "label": labels}, chosen, tuple("0123456789"))
