"""MNIST and Fashion-MNIST, fetched once from OpenML through scikit-learn."""

import functools
import hashlib
import os

import numpy as np
from etils import epy

from mf_jax.data.arrays import Rows
from mf_jax.data.pipeline import SPLITS
from mf_jax.flow.errors import BadInput, check_known, reason_of

with epy.lazy_imports():  # takes a second
    import sklearn.datasets

_SIDE = 28
_HELD_OUT_OF = 7  # the last 10,000 of 70,000 pictures are the test set
_CLOTHES = "T-shirt/top,Trouser,Pullover,Dress,Coat,Sandal,Shirt,Sneaker,Bag,Ankle boot"
DATASETS = {"mnist_784": tuple("0123456789"), "Fashion-MNIST": tuple(_CLOTHES.split(","))}
"""The names of the classes of each set, by its name at OpenML."""


def of_openml(*, dataset: str, path: str, split: str) -> Rows:
    """Open the official split of a set as grey pictures `[28, 28, 1]`.

    Args:
      dataset: a key of `DATASETS`.
      path: folder to keep what is fetched; "" = scikit-learn's own.
    """
    check_known("dataset", dataset, DATASETS)
    x, labels, digest = _fetch(dataset, os.path.expanduser(path))
    start = len(x) - len(x) // _HELD_OUT_OF
    rows = np.arange(start) if split == SPLITS[0] else np.arange(start, len(x))
    return Rows({"x": x, "label": labels}, rows, DATASETS[dataset], digest)


@functools.lru_cache(1)  # for both splits: to parse the text takes a minute
def _fetch(dataset: str, path: str) -> tuple[np.ndarray, np.ndarray, str]:
    options = {"version": 1, "as_frame": False, "return_X_y": True}
    try:  # pandas, the usual parser, is one package more
        pixels, labels = sklearn.datasets.fetch_openml(
            dataset, data_home=path or None, parser="liac-arff", **options
        )
    except (OSError, ValueError) as error:  # no network; an answer that is no data set
        raise BadInput(
            f"dataset={dataset!r} cannot be fetched from OpenML ({reason_of(error)}): try again "
            "with a network, or set path to a folder with a copy; it is "
            f"{path or 'the usual one'!r}"
        ) from error
    x = np.asarray(pixels).astype(np.uint8).reshape(-1, _SIDE, _SIDE, 1)
    labels = labels.astype(np.int32)
    return x, labels, hashlib.sha256(x.tobytes() + labels.tobytes()).hexdigest()
