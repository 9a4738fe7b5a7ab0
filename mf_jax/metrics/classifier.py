"""Features of small images that Inception was not made for, learnt from the real data.

They are a classifier's last hidden layer, or principal components. Order and shifts are drawn with
numpy from fixed seeds: training again on one platform gives the same parameters bit by bit.
"""

import dataclasses
import functools
from collections.abc import Callable, Collection, Iterator

import flax.linen as nn
import jax
import numpy as np
import optax
from etils import epath
from flax.training.train_state import TrainState
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Float, Float32, Int, PyTree

from mf_jax.flow.draws import key_of
from mf_jax.reporting.progress import track
from mf_jax.runtime.archives import read_npz, write_npz
from mf_jax.runtime.files import sha256_of

FEATURES_KEPT = 64
SMALLEST_SIDE = 8
_INFERENCE_BATCH = 256
Described = tuple[Float32[np.ndarray, "n d"], Float32[np.ndarray, "n k"] | None]
"""Features of images, and their logits where there are classes."""


@dataclasses.dataclass(frozen=True)
class Recipe:
    """The training of a classifier; the learning rate is decayed to 0 along a cosine."""

    steps: int = 500
    batch_size: int = 128
    learning_rate: float = 2e-3
    weight_decay: float = 1e-3
    seed: int = 0


def train_classifier(
    images: Float[np.ndarray, "n h w c"],
    labels: Int[np.ndarray, "n"],
    num_classes: int,
    recipe: Recipe = Recipe(),
    *,
    file: epath.PathLike = "",
    trusted: Collection[str] = (),
    show_progress: bool = False,
) -> Callable[[Float[np.ndarray, "m h w c"]], Described]:
    """Train a classifier; return the function from images to their features and logits.

    Args:
      images: real images, H and W at least 8, scaled to about [-1, 1].
      labels: classes in [0, num_classes), at least 2.
      file: an `.npz` of its parameters, read if it is trusted and else written; "" for none.
      trusted: SHA-256 of files that were written here.
    """
    describe = functools.partial(_describe, jax.jit(_Network(num_classes).apply))
    if file and epath.Path(file).exists():
        if sha256_of(file) in trusted:
            return functools.partial(describe, unflatten_dict(read_npz(file), sep="/"))
        print(f"{file}: no stored score was made with it; the classifier is trained again")
    params = _train(images, labels, num_classes, recipe, show_progress)
    if file:
        write_npz(file, flatten_dict(params, sep="/"))
    return functools.partial(describe, params)


def _train(
    images: np.ndarray, labels: np.ndarray, num_classes: int, recipe: Recipe, show_progress: bool
) -> PyTree:
    network = _Network(num_classes)
    params = jax.jit(network.init)(key_of(recipe.seed), images[:1])
    schedule = optax.cosine_decay_schedule(recipe.learning_rate, recipe.steps)
    optimiser = optax.adamw(schedule, weight_decay=recipe.weight_decay)
    state = TrainState.create(apply_fn=network.apply, params=params, tx=optimiser)
    shown = {"per_step": recipe.batch_size, "is_wanted": show_progress}
    batches = _batches(images, labels, recipe)
    # Not lax.scan: in it, XLA runs convolutions on a CPU several times slower.
    for batch in track(batches, "classifier of real data", recipe.steps, **shown):
        state = _train_step(state, *batch)
    return jax.device_get(state.params)


def principal_components(
    elements: Float[np.ndarray, "n ..."],
) -> Callable[[Float[np.ndarray, "m ..."]], Described]:
    """Fit principal components; return the function from elements of any rank to them."""
    from sklearn.decomposition import PCA

    rows = elements.reshape(len(elements), -1)
    components = PCA(min(FEATURES_KEPT, *rows.shape), random_state=0).fit(rows)

    def describe(elements: Float[np.ndarray, "m ..."]) -> Described:
        rows = elements.reshape(len(elements), -1)
        return components.transform(rows).astype(np.float32), None

    return describe


class _Network(nn.Module):
    """Convolutions down to about 4 pixels a side, one layer of features, one of logits."""

    outputs: int

    @nn.compact
    def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        # Features must not depend on how an accelerator rounds its inputs.
        conv = functools.partial(nn.Conv, kernel_size=(3, 3), precision=jax.lax.Precision.HIGHEST)
        dense = functools.partial(nn.Dense, precision=jax.lax.Precision.HIGHEST)
        width = 32
        x = nn.gelu(conv(width)(x))
        while min(x.shape[1:3]) > 4:
            width = min(2 * width, 128)
            x = nn.gelu(conv(width, strides=2)(x))
        # GELU, not ReLU: a quarter of ReLU features are 0 for every image.
        features = nn.gelu(dense(FEATURES_KEPT)(x.reshape(len(x), -1)))
        return features, dense(self.outputs)(features)


def _describe(infer: Callable, params: PyTree, images: Float[np.ndarray, "m h w c"]) -> Described:
    batches = []
    for start in range(0, len(images), _INFERENCE_BATCH):
        rows = images[start : start + _INFERENCE_BATCH]
        missing = _INFERENCE_BATCH - len(rows)  # filled up: one shape, one compilation
        filled = np.pad(rows, [(0, missing), *[(0, 0)] * 3])
        batches.append([np.asarray(x)[: len(rows)] for x in infer(params, filled)])
    features, logits = map(np.concatenate, zip(*batches, strict=True))
    return features, logits


@jax.jit
def _train_step(state: TrainState, images: jax.Array, labels: jax.Array) -> TrainState:
    def loss(params):
        _, logits = state.apply_fn(params, images)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    return state.apply_gradients(grads=jax.grad(loss)(state.params))


def _batches(
    images: np.ndarray, labels: np.ndarray, recipe: Recipe
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield shuffled, randomly shifted batches."""
    generator = np.random.default_rng(recipe.seed)
    reach = min(images.shape[1:3]) // SMALLEST_SIDE  # of the shifts, in pixels
    rows = np.empty(0, np.int64)
    for _ in range(recipe.steps):
        while len(rows) < recipe.batch_size:
            rows = np.concatenate([rows, generator.permutation(len(images))])
        batch, rows = rows[: recipe.batch_size], rows[recipe.batch_size :]
        yield _shifted(images[batch], reach, generator), labels[batch]


def _shifted(images: np.ndarray, reach: int, generator: np.random.Generator) -> np.ndarray:
    padded = np.pad(images, [(0, 0), (reach, reach), (reach, reach), (0, 0)], mode="edge")
    corners = generator.integers(2 * reach + 1, size=(len(images), 2))
    windows = np.lib.stride_tricks.sliding_window_view(padded, images.shape[1:3], axis=(1, 2))
    return windows[np.arange(len(images)), *corners.T].transpose(0, 2, 3, 1)
