"""The Inception-v3 of FID and Inception Score: the network of 2015-12-05, in float32.

It differs from later Inception-v3 networks: average pools leave the padding out, the last block
pools with a maximum, there are 1008 logits, and images are resized as TensorFlow 1 did, without
centring the pixels. Batch norm is folded into the convolutions when the weights are read.

Source: Szegedy et al., arXiv 1512.00567; the graph `classify_image_graph_def.pb`
(inception-2015-12-05) in the form and under the names of torch-fidelity and pytorch-fid, whose
weight files these are.
"""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jaxtyping import Array, Float, Float32, PyTree, Shaped, UInt8

from mf_jax.flow.errors import BadInput
from mf_jax.published.torch_file import fit_state_dict, read_state_dict

FEATURES = {
    "64": 64,
    "192": 192,
    "768": 768,
    "spatial": 2023,
    "2048": 2048,
    "logits_unbiased": 1008,
    "logits": 1008,
}
"""Names of the features, and how many numbers of each an image has."""
_SIDE = 299
_BATCH_NORM = ("weight", "bias", "running_mean", "running_var")


@dataclasses.dataclass(frozen=True, eq=False)
class Inception:
    """Weights for `inception_features`; numbers from files of different sha256 do not compare."""

    params: PyTree[Float32[Array, "..."]]
    sha256: str


def load_inception(path: epath.PathLike) -> Inception:
    """Read published weights of this network, a `.pth` or `.safetensors` file.

    They are published as `weights-inception-2015-12-05-6726825d.pth` (torch-fidelity, v0.2.0), and
    the same bytes as `pt_inception-2015-12-05-6726825d.pth` (pytorch-fid, fid_weights).
    """
    state = read_state_dict(path)
    # some versions of PyTorch write it, and it has no effect
    arrays = {k: v for k, v in state.arrays.items() if not k.endswith(".num_batches_tracked")}
    image = jnp.zeros((1, _SIDE, _SIDE, 3))
    layers = jax.eval_shape(_Network().init, jax.random.key(0), image)["params"]
    last, last_bias = layers.pop("fc"), layers.pop("fc_bias")
    wanted = {"fc.weight": last["kernel"].shape[::-1], "fc.bias": last_bias.shape}
    for name, layer in layers.items():
        height, width, inputs, outputs = layer["kernel"].shape
        wanted[f"{name}.conv.weight"] = (outputs, inputs, height, width)
        wanted |= {f"{name}.bn.{part}": (outputs,) for part in _BATCH_NORM}
    arrays = fit_state_dict(state._replace(arrays=arrays), wanted)
    params = {"fc": {"kernel": arrays["fc.weight"].T}, "fc_bias": arrays["fc.bias"]}
    for name in layers:
        batch_norm = (arrays[f"{name}.bn.{part}"] for part in _BATCH_NORM)
        params[name] = _folded(arrays[f"{name}.conv.weight"], *batch_norm)
    return Inception(jax.tree.map(jnp.asarray, params), state.sha256)


def inception_features(
    params: PyTree[Float32[Array, "..."]], images: Shaped[Array | np.ndarray, "..."]
) -> dict[str, Float32[Array, "b _"]]:
    """Return all features of images; one compilation of the network serves images of any size.

    `64`, `192`, `768` are means over the pixels after the first pool, after the second pool and
    before the last reduction; `2048` is for FID. `logits_unbiased` lack the bias of the last layer;
    Inception Score takes their softmax. `spatial` is for sFID: the first 7 channels of
    `mixed_6/conv:0` pixel by pixel (`Mixed_6d.branch1x1` after its ReLU).

    Source: FID, arXiv 1706.08500; Inception Score, arXiv 1606.03498; sFID, Nash et al., arXiv
    2103.03841, section 5; the published evaluation of ADM.
    """
    if images.dtype != jnp.uint8 or images.ndim != 4 or images.shape[-1] != 3 or 0 in images.shape:
        raise BadInput(
            f"images are {images.dtype} {list(images.shape)}; must be uint8 [B, H, W, 3]: "
            "scale and round them, and repeat a single channel three times"
        )
    return _features(params, _resized(images))


@jax.jit
def _resized(images: UInt8[Array, "b h w c"]) -> Float32[Array, "b side side c"]:
    x = images.astype(jnp.float32)
    for axis in (2, 1):
        size = x.shape[axis]
        at = np.arange(_SIDE, dtype=np.float32) * np.float32(size / _SIDE)
        low = at.astype(np.int32)
        share = np.expand_dims(at - low, tuple(range(1, x.ndim - axis))).astype(np.float32)
        a = jnp.take(x, low, axis)
        x = a + (jnp.take(x, np.minimum(low + 1, size - 1), axis) - a) * share
    return (x - 128) / 128


@jax.jit
def _features(params: PyTree, x: Float32[Array, "b h w c"]) -> dict[str, Float32[Array, "b _"]]:
    # Features must not depend on how an accelerator rounds its inputs.
    with jax.default_matmul_precision("highest"):
        return _Network().apply({"params": params}, x)


def _folded(
    kernel: np.ndarray, weight: np.ndarray, bias: np.ndarray, mean: np.ndarray, variance: np.ndarray
) -> dict[str, Float32[np.ndarray, "..."]]:
    """Return kernel and bias of a convolution that includes the batch norm after it."""
    scale = weight / np.sqrt(variance.astype(np.float64) + 1e-3)  # the epsilon of batch norm
    kernel = (kernel.transpose(2, 3, 1, 0) * scale).astype(np.float32)
    return {"kernel": kernel, "bias": (bias - mean * scale).astype(np.float32)}


def _conv(
    x: Float[Array, "b h w c"],
    name: str,
    features: int,
    size: int | tuple[int, int],
    stride: int = 1,
    padding: str = "SAME",
) -> Float[Array, "b h2 w2 f"]:
    size = (size, size) if isinstance(size, int) else size
    return nn.relu(nn.Conv(features, size, stride, padding, name=name)(x))


def _chain(
    x: Float[Array, "b h w c"], name: str, *layers: tuple, halve: bool = False
) -> Float[Array, "b h2 w2 f"]:
    """Apply convolutions (features, size) numbered from 1, the last perhaps with stride 2."""
    for i, layer in enumerate(layers, 1):
        last = {"stride": 2, "padding": "VALID"} if halve and i == len(layers) else {}
        x = _conv(x, f"{name}_{i}", *layer, **last)
    return x


_halved = functools.partial(nn.max_pool, window_shape=(3, 3), strides=(2, 2))
_averaged = functools.partial(
    nn.avg_pool, window_shape=(3, 3), padding="SAME", count_include_pad=False
)


def _join(*branches: Float[Array, "b h w _"]) -> Float[Array, "b h w c"]:
    return jnp.concatenate(branches, axis=-1)


def _block_35(x: Float[Array, "b h w c"], name: str, pooled: int) -> Float[Array, "b h w c2"]:
    return _join(
        _conv(x, f"{name}.branch1x1", 64, 1),
        _chain(x, f"{name}.branch5x5", (48, 1), (64, 5)),
        _chain(x, f"{name}.branch3x3dbl", (64, 1), (96, 3), (96, 3)),
        _conv(_averaged(x), f"{name}.branch_pool", pooled, 1),
    )


def _block_17(x: Float[Array, "b h w c"], name: str, narrow: int) -> Float[Array, "b h w c2"]:
    row, column = (1, 7), (7, 1)
    across = ((narrow, 1), (narrow, row), (192, column))
    twice = ((narrow, 1), (narrow, column), (narrow, row), (narrow, column), (192, row))
    return _join(
        _conv(x, f"{name}.branch1x1", 192, 1),
        _chain(x, f"{name}.branch7x7", *across),
        _chain(x, f"{name}.branch7x7dbl", *twice),
        _conv(_averaged(x), f"{name}.branch_pool", 192, 1),
    )


def _block_8(
    x: Float[Array, "b h w c"], name: str, pooled: Float[Array, "b h w c"]
) -> Float[Array, "b h w c2"]:
    def cross(x, branch):
        return _conv(x, f"{branch}a", 384, (1, 3)), _conv(x, f"{branch}b", 384, (3, 1))

    return _join(
        _conv(x, f"{name}.branch1x1", 320, 1),
        *cross(_chain(x, f"{name}.branch3x3", (384, 1)), f"{name}.branch3x3_2"),
        *cross(_chain(x, f"{name}.branch3x3dbl", (448, 1), (384, 3)), f"{name}.branch3x3dbl_3"),
        _conv(pooled, f"{name}.branch_pool", 192, 1),
    )


class _Network(nn.Module):
    """Inception-v3, its layers under their published names."""

    @nn.compact
    def __call__(self, x: Float[Array, "b h w 3"]) -> dict[str, Float[Array, "b _"]]:
        """Return the features of images of side 299, scaled to [-1, 1]."""
        features = {}
        x = _conv(x, "Conv2d_1a_3x3", 32, 3, 2, "VALID")
        x = _conv(x, "Conv2d_2a_3x3", 32, 3, 1, "VALID")
        x = _halved(_conv(x, "Conv2d_2b_3x3", 64, 3))
        features["64"] = jnp.mean(x, (1, 2))
        x = _conv(x, "Conv2d_3b_1x1", 80, 1)
        x = _halved(_conv(x, "Conv2d_4a_3x3", 192, 3, 1, "VALID"))
        features["192"] = jnp.mean(x, (1, 2))
        for name, pooled in {"Mixed_5b": 32, "Mixed_5c": 64, "Mixed_5d": 64}.items():
            x = _block_35(x, name, pooled)
        x = _join(
            _conv(x, "Mixed_6a.branch3x3", 384, 3, 2, "VALID"),
            _chain(x, "Mixed_6a.branch3x3dbl", (64, 1), (96, 3), (96, 3), halve=True),
            _halved(x),
        )
        for name, narrow in {"Mixed_6b": 128, "Mixed_6c": 160, "Mixed_6d": 160}.items():
            x = _block_17(x, name, narrow)
        features["spatial"] = x[..., :7].reshape(len(x), -1)  # 7 of its channels
        x = _block_17(x, "Mixed_6e", 192)
        features["768"] = jnp.mean(x, (1, 2))
        layers = (192, 1), (192, (1, 7)), (192, (7, 1)), (192, 3)
        x = _join(
            _chain(x, "Mixed_7a.branch3x3", (192, 1), (320, 3), halve=True),
            _chain(x, "Mixed_7a.branch7x7x3", *layers, halve=True),
            _halved(x),
        )
        x = _block_8(x, "Mixed_7b", _averaged(x))
        x = _block_8(x, "Mixed_7c", nn.max_pool(x, (3, 3), padding="SAME"))
        x = jnp.mean(x, (1, 2))
        features["2048"] = x
        features["logits_unbiased"] = nn.Dense(FEATURES["logits"], use_bias=False, name="fc")(x)
        bias = self.param("fc_bias", nn.initializers.zeros, (FEATURES["logits"],))
        features["logits"] = features["logits_unbiased"] + bias
        return features
