"""A small image classifier trained on the real data: the feature extractor for data sets Inception was not made for.

Trained once, always in the same way, and kept on disk. Without labels it learns instead which of four rotations was
applied to an image (RotNet). Order, shifts and rotations are drawn with numpy from fixed seeds, so that training again
on the same platform gives the same parameters bit by bit.
"""

import dataclasses
import functools
import hashlib
import json
import os
from collections.abc import Iterator, Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import logging
from etils.epath import Path
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Float, Float32, Int, PyTree
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from mf_jax.errors import BadInput
from mf_jax.flow.records import NO_LABEL
from mf_jax.runtime.files import on_disk, replace_file

_VERSION = (
    1  # raise it with any change that alters the trained parameters, to leave old files unused
)
_FEATURES = 64
_ROTATIONS = 4
_SMALLEST_SIDE = 8
_INFERENCE_BATCH = 256


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How a classifier is trained; part of the key under which it is cached.

    steps: optimisation steps, whatever the number of images. batch_size: rows in a step. learning_rate: peak, decayed
    to 0 along a cosine. weight_decay: decoupled. seed: of the initial parameters, the order and the augmentation.
    """

    steps: int = 500
    batch_size: int = 128
    learning_rate: float = 2e-3
    weight_decay: float = 1e-3
    seed: int = 0


@dataclasses.dataclass(frozen=True, eq=False)
class Classifier:
    """A trained classifier.

    params: its parameters. shape: (H, W, C) of the images it takes. num_classes: width of its logits; 4 where it was
    trained on rotations, which is_self_supervised says: then the logits tell nothing about classes.
    """

    params: PyTree
    shape: tuple[int, int, int]
    num_classes: int
    is_self_supervised: bool = False

    @functools.cached_property
    def fingerprint(self) -> str:
        """Name the parameters in 12 hex digits: features with different fingerprints must not be compared."""
        return _fingerprint(flatten_dict(self.params, sep="/"))

    def features_and_logits(
        self, images: Float[np.ndarray, "n h w c"]
    ) -> tuple[Float32[np.ndarray, "n 64"], Float32[np.ndarray, "n k"]]:
        """Return the activations of the last hidden layer and the logits.

        Args:
            images: `[n, H, W, C]`, scaled like the training images, finite; n may be 0.

        Returns:
            Features `[n, 64]` and logits `[n, num_classes]`.

        Raises:
            BadInput: images of another shape, or values that are not finite.
        """
        images = _checked_images(images)
        if images.shape[1:] != self.shape:
            raise BadInput(
                f"images are {images.shape[1:]}; this classifier takes {self.shape}: "
                "use the classifier of the data set that the images are meant to resemble"
            )
        features = np.empty((len(images), _FEATURES), np.float32)
        logits = np.empty((len(images), self.num_classes), np.float32)
        for start in range(0, len(images), _INFERENCE_BATCH):
            rows = images[start : start + _INFERENCE_BATCH]
            missing = _INFERENCE_BATCH - len(rows)  # filled up: one shape, one compilation
            outputs = _infer(
                self.num_classes, self.params, np.pad(rows, [(0, missing), *[(0, 0)] * 3])
            )
            for target, output in zip((features, logits), outputs, strict=True):
                target[start : start + len(rows)] = np.asarray(output)[: len(rows)]
        return features, logits


def train_classifier(
    images: Float[np.ndarray, "n h w c"],
    labels: Int[np.ndarray, "n"],
    num_classes: int,
    recipe: Recipe = Recipe(),
) -> Classifier:
    """Train a classifier; the same input gives the same parameters, bit by bit, on the same platform.

    Args:
        images: real images `[n, H, W, C]`, H and W >= 8, used as given (scale them to about [-1, 1]).
        labels: classes `[n]` in [0, num_classes), or all -1 for images without classes.
        num_classes: >= 2, or 0 for images without classes: it then learns rotations, which needs H = W.
        recipe: how to train.

    Returns:
        The trained classifier.

    Raises:
        BadInput: shapes, labels or values outside the ranges above.

    Source:
        Rotations: Gidaris et al. 2018 (arXiv:1803.07728), section 2.
    """
    images = _checked_training_set(images, labels, num_classes)
    outputs = num_classes or _ROTATIONS
    state = _initial_state(outputs, recipe, images[:1])
    # A Python loop around one compiled step: inside lax.scan, XLA runs convolutions on a CPU several times slower.
    for batch in _batches(images, labels if num_classes else None, recipe):
        state = _train_step(outputs, recipe, state, *batch)
    return Classifier(
        jax.device_get(state[0]), images.shape[1:], outputs, is_self_supervised=not num_classes
    )


def cached_classifier(
    images: Float[np.ndarray, "n h w c"],
    labels: Int[np.ndarray, "n"],
    *,
    num_classes: int,
    cache_dir: str | os.PathLike,
    recipe: Recipe = Recipe(),
) -> Classifier:
    """Load the classifier of these training data, or train it and store it; a damaged file is replaced.

    Args:
        images, labels, num_classes, recipe: like `train_classifier`.
        cache_dir: folder of the cache, created if missing.

    Returns:
        The classifier, the same as `train_classifier` gave when the file was written.

    Raises:
        BadInput: like `train_classifier`.
    """
    images = _checked_training_set(images, labels, num_classes)
    path = (
        Path(cache_dir)
        / f"classifier_{_cache_key(images, labels, num_classes, recipe)}.safetensors"
    )
    outputs = num_classes or _ROTATIONS
    if path.exists():
        try:
            params = _load(path, outputs, images.shape[1:])
            return Classifier(params, images.shape[1:], outputs, is_self_supervised=not num_classes)
        except (SafetensorError, OSError, ValueError) as error:
            logging.warning(
                "The cached classifier %s is damaged (%s); training it again.", path, error
            )
    classifier = train_classifier(images, labels, num_classes, recipe)
    try:
        _store(path, classifier)
    except OSError as error:
        logging.warning(
            "The classifier cannot be kept in %s (%s); it will be trained again.", cache_dir, error
        )
    return classifier


class _Network(nn.Module):
    """Convolutions with stride 2 down to about 4 pixels a side, one hidden layer of features, one of logits."""

    outputs: int

    @nn.compact
    def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        # Not left to the platform: features must not depend on how an accelerator rounds its inputs.
        conv = functools.partial(nn.Conv, kernel_size=(3, 3), precision=jax.lax.Precision.HIGHEST)
        dense = functools.partial(nn.Dense, precision=jax.lax.Precision.HIGHEST)
        width = 32
        x = nn.gelu(conv(width)(x))
        while min(x.shape[1:3]) > 4:
            width = min(2 * width, 128)
            x = nn.gelu(conv(width, strides=2)(x))
        # GELU, not ReLU: a quarter of ReLU features are 0 for every image.
        features = nn.gelu(dense(_FEATURES)(x.reshape(len(x), -1)))
        return features, dense(self.outputs)(features)


@functools.partial(jax.jit, static_argnums=0)
def _infer(outputs: int, params: PyTree, images: jax.Array) -> tuple[jax.Array, jax.Array]:
    return _Network(outputs).apply(params, images)


def _optimiser(recipe: Recipe) -> optax.GradientTransformation:
    schedule = optax.cosine_decay_schedule(recipe.learning_rate, recipe.steps)
    return optax.adamw(schedule, weight_decay=recipe.weight_decay)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _initial_state(
    outputs: int, recipe: Recipe, images: jax.Array
) -> tuple[PyTree, optax.OptState]:
    params = _Network(outputs).init(jax.random.key(recipe.seed), images)
    return params, _optimiser(recipe).init(params)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _train_step(outputs: int, recipe: Recipe, state, images: jax.Array, labels: jax.Array):
    def loss(params):
        _, logits = _Network(outputs).apply(params, images)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    params, optimiser_state = state
    updates, optimiser_state = _optimiser(recipe).update(
        jax.grad(loss)(params), optimiser_state, params
    )
    return optax.apply_updates(params, updates), optimiser_state


def _batches(
    images: np.ndarray, labels: np.ndarray | None, recipe: Recipe
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield shuffled, randomly shifted batches; without labels also randomly rotated, with the rotation as label."""
    generator = np.random.default_rng(recipe.seed)
    reach = min(images.shape[1:3]) // _SMALLEST_SIDE  # of the shifts, in pixels
    rows = np.empty(0, np.int64)
    for _ in range(recipe.steps):
        while len(rows) < recipe.batch_size:
            rows = np.concatenate([rows, generator.permutation(len(images))])
        batch, rows = rows[: recipe.batch_size], rows[recipe.batch_size :]
        shifted = _shifted(images[batch], reach, generator)
        if labels is None:
            turns = generator.integers(_ROTATIONS, size=len(batch))
            yield (
                np.stack([np.rot90(x, turn) for x, turn in zip(shifted, turns, strict=True)]),
                turns,
            )
        else:
            yield shifted, labels[batch]


def _shifted(images: np.ndarray, reach: int, generator: np.random.Generator) -> np.ndarray:
    _, height, width, _ = images.shape
    padded = np.pad(images, [(0, 0), (reach, reach), (reach, reach), (0, 0)], mode="edge")
    corners = generator.integers(2 * reach + 1, size=(len(images), 2))
    return np.stack(
        [x[i : i + height, j : j + width] for x, (i, j) in zip(padded, corners, strict=True)]
    )


def _checked_images(images: np.ndarray) -> Float32[np.ndarray, "n h w c"]:
    shape = np.shape(images)
    if len(shape) != 4 or min(shape[1:3]) < _SMALLEST_SIDE or shape[3] < 1:
        raise BadInput(
            f"images have shape {shape}; it must be [n, H, W, C] with H and W at least {_SMALLEST_SIDE}: "
            "compare smaller samples directly, as flat rows"
        )
    images = np.asarray(images, np.float32)
    if not np.isfinite(images).all():
        raise BadInput(
            "images hold NaN or infinite values; all must be finite: look for a diverged network"
        )
    return images


def _checked_training_set(images: np.ndarray, labels: np.ndarray, num_classes: int) -> np.ndarray:
    images = _checked_images(images)
    if len(images) == 0 or np.shape(labels) != (len(images),):
        raise BadInput(
            f"labels have shape {np.shape(labels)} for {len(images)} images; there must be one label an image and "
            "at least one image: pass the arrays of one training split"
        )
    low, high = int(np.min(labels)), int(np.max(labels))
    if num_classes == 0:
        if (low, high) != (NO_LABEL, NO_LABEL):
            raise BadInput(
                f"labels lie in [{low}, {high}] and num_classes is 0; without classes all must be {NO_LABEL}: "
                "pass the number of classes"
            )
        if images.shape[1] != images.shape[2]:
            raise BadInput(
                f"images are {images.shape[1]} x {images.shape[2]}; without labels they must be square, because "
                "rotations are learnt: crop them, or give labels"
            )
    elif num_classes < 2 or low < 0 or high >= num_classes:
        raise BadInput(
            f"num_classes is {num_classes} and labels lie in [{low}, {high}]; num_classes must be 0 or at least 2, "
            f"labels in [0, num_classes): number the classes from 0, or use 0 and {NO_LABEL} for none"
        )
    return images


def _cache_key(images: np.ndarray, labels: np.ndarray, num_classes: int, recipe: Recipe) -> str:
    settings = {"version": _VERSION, "num_classes": num_classes, "shape": images.shape}
    digest = hashlib.sha256(
        json.dumps(settings | dataclasses.asdict(recipe), sort_keys=True).encode()
    )
    digest.update(np.ascontiguousarray(images, "<f4"))
    digest.update(np.ascontiguousarray(labels, "<i8"))
    return digest.hexdigest()


def _fingerprint(tensors: Mapping[str, np.ndarray]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(f"{name} {tensors[name].shape} ".encode())
        digest.update(np.ascontiguousarray(tensors[name], "<f4"))
    return digest.hexdigest()[:12]


def _store(path: Path, classifier: Classifier) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    content = save(
        flatten_dict(classifier.params, sep="/"), {"fingerprint": classifier.fingerprint}
    )
    replace_file(path, content)


def _load(path: Path, outputs: int, shape: tuple[int, int, int]) -> PyTree:
    with on_disk(path) as place, safe_open(place, framework="numpy") as file:
        stored = (file.metadata() or {}).get("fingerprint")
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, not a dict
    expected = jax.eval_shape(_Network(outputs).init, jax.random.key(0), jnp.zeros((1, *shape)))
    expected = {name: (x.shape, x.dtype) for name, x in flatten_dict(expected, sep="/").items()}
    if {name: (x.shape, x.dtype) for name, x in tensors.items()} != expected:
        raise ValueError("its parameters have other names or shapes")
    if _fingerprint(tensors) != stored:
        raise ValueError("its parameters do not have the stored fingerprint")
    return unflatten_dict(tensors, sep="/")
