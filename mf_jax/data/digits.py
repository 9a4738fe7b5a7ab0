"""Grey pictures through scikit-learn: its own 1,797 digits, and MNIST's kin fetched from OpenML."""

import functools
import hashlib
import importlib.metadata
import os

import numpy as np
from etils import epath, epy

from mf_jax.data.arrays import SPLIT_SEED, Rows
from mf_jax.data.kept import kept
from mf_jax.data.pipeline import SPLITS
from mf_jax.flow.errors import BadInput, check_known, refused
from mf_jax.runtime.files import in_bucket

with epy.lazy_imports():  # takes a second
    import sklearn.datasets
    import sklearn.model_selection

IMAGE_SIZE = 8
_CLOTHES = "T-shirt/top,Trouser,Pullover,Dress,Coat,Sandal,Shirt,Sneaker,Bag,Ankle boot"
DATASETS = {"mnist_784": tuple("0123456789"), "Fashion-MNIST": tuple(_CLOTHES.split(","))}
"""The names of the classes of each set, by its name at OpenML."""


def of_digits(*, image_size: int, split: str) -> Rows:
    """Open one split of grey digits `[8, 8, 1]` in [-1, 1]; of each class a fifth is held out."""
    if image_size != IMAGE_SIZE:
        raise BadInput(f"image_size={image_size!r} must be {IMAGE_SIZE} for digits: set that")
    version = importlib.metadata.version("scikit-learn")
    found = kept(["digits", version], _read_digits)
    arrays = {key: found[key] for key in ("x", "label")}
    return Rows(arrays, found[split], DATASETS["mnist_784"])


def _read_digits() -> dict[str, np.ndarray]:
    pixels, labels = sklearn.datasets.load_digits(return_X_y=True)
    parts = sklearn.model_selection.train_test_split(
        np.arange(len(labels)), test_size=0.2, random_state=SPLIT_SEED, stratify=labels
    )
    x = (pixels / 8 - 1).astype(np.float32).reshape(-1, IMAGE_SIZE, IMAGE_SIZE, 1)
    return {"x": x, "label": labels, **dict(zip(SPLITS, map(np.sort, parts), strict=True))}


def of_openml(*, dataset: str, path: str, split: str) -> Rows:
    """Open the official split of one of `DATASETS` as grey pictures `[28, 28, 1]`.

    What is fetched is kept in the folder `path`; "" is scikit-learn's own.
    """
    check_known("dataset", dataset, DATASETS)
    if in_bucket(epath.Path(path)):
        raise BadInput(f"path={path!r} is in a bucket: name a folder of each host")
    path = os.path.expanduser(path)
    arrays = kept(["openml", dataset, path], lambda: _fetch(dataset, path))
    x, labels = arrays["x"], arrays["label"]
    digest = hashlib.sha256(x.tobytes() + labels.tobytes()).hexdigest()
    start = len(x) - len(x) // 7  # the last 10,000 of 70,000 pictures are the test set
    rows = np.arange(start) if split == SPLITS[0] else np.arange(start, len(x))
    return Rows(arrays, rows, DATASETS[dataset], digest)


@functools.lru_cache(1)  # for both splits, also where nothing is kept: it takes a minute
def _fetch(dataset: str, path: str) -> dict[str, np.ndarray]:
    options = {"version": 1, "as_frame": False, "return_X_y": True}
    options |= {"data_home": path or None, "parser": "liac-arff"}  # pandas is one package more
    problem = f"dataset={dataset!r} cannot be fetched from OpenML"
    fix = "try again with a network, or set path to a folder with a copy"
    with refused((OSError, ValueError), problem, fix):  # also of an answer that is no data set
        pixels, labels = sklearn.datasets.fetch_openml(dataset, **options)
    x = np.asarray(pixels).astype(np.uint8).reshape(-1, 28, 28, 1)
    return {"x": x, "label": labels.astype(np.int32)}
