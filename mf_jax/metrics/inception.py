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
    last, last_bias = layers["fc"]["kernel"], layers["fc_bias"]
    wanted = {"fc.weight": last.shape[::-1], "fc.bias": last_bias.shape}
    convolutions = [name for name in layers if not name.startswith("fc")]
    for name in convolutions:
        *sides, inputs, outputs = layers[name]["kernel"].shape
        wanted[f"{name}.conv.weight"] = (outputs, inputs, *sides)
        wanted |= {f"{name}.bn.{part}": (outputs,) for part in _BATCH_NORM}
    arrays = fit_state_dict(state._replace(arrays=arrays), wanted)
    params = {"fc": {"kernel": arrays["fc.weight"].T}, "fc_bias": arrays["fc.bias"]}
    for name in convolutions:
        weight, bias, mean, variance = (arrays[f"{name}.bn.{part}"] for part in _BATCH_NORM)
        scale = weight / np.sqrt(variance.astype(np.float64) + 1e-3)  # the epsilon of batch norm
        kernel = arrays[f"{name}.conv.weight"].transpose(2, 3, 1, 0) * scale
        folded = {"kernel": kernel, "bias": bias - mean * scale}
        params[name] = {key: array.astype(np.float32) for key, array in folded.items()}
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
    shape, wanted = images.shape, "uint8 [B, H, W, 3 or 1]: scale and round them"
    if images.dtype != jnp.uint8 or len(shape) != 4 or shape[-1] not in (1, 3) or 0 in shape:
        raise BadInput(f"images are {images.dtype} {list(shape)}; must be {wanted}")
    return _features(params, _resized(images))


@jax.jit
def _resized(images: UInt8[Array, "b h w c"]) -> Float32[Array, "b side side 3"]:
    x = jnp.broadcast_to(images.astype(jnp.float32), (*images.shape[:3], 3))
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


_Maps = Float[Array, "_ _ _ _"]
_Layers = tuple[tuple[int, int | tuple[int, int]], ...]
"""The channels and the size of convolutions one after the other."""
_halved = functools.partial(nn.max_pool, window_shape=(3, 3), strides=(2, 2))
_averaged = functools.partial(
    nn.avg_pool, window_shape=(3, 3), padding="SAME", count_include_pad=False
)


def _branch(
    x: _Maps, name: str, layers: _Layers, *, halve: bool = False, padding: str = "SAME"
) -> _Maps:
    """Apply convolutions, numbered from 1 if there are several, the last perhaps with stride 2."""
    for i, (features, size) in enumerate(layers, 1):
        size = (size, size) if isinstance(size, int) else size
        name_i = f"{name}_{i}" if len(layers) > 1 else name
        last = {"strides": 2, "padding": "VALID"} if halve and i == len(layers) else {}
        fields = {"padding": padding, "name": name_i} | last
        x = nn.relu(nn.Conv(features, size, **fields)(x))
    return x


def _mixed(
    x: _Maps, name: str, branches: dict[str, _Layers], *, pooled: int = 0, halve: bool = False
) -> _Maps:
    """Join branches, and the maxima of what comes in or a convolution of its means."""
    outputs = [_branch(x, f"{name}.{key}", layers, halve=halve) for key, layers in branches.items()]
    last = _halved(x) if halve else _branch(_averaged(x), f"{name}.branch_pool", ((pooled, 1),))
    return jnp.concatenate([*outputs, last], axis=-1)


def _mixed_35(x: _Maps, name: str, pooled: int) -> _Maps:
    twice = (64, 1), (96, 3), (96, 3)
    branches = {"branch1x1": ((64, 1),), "branch5x5": ((48, 1), (64, 5)), "branch3x3dbl": twice}
    return _mixed(x, name, branches, pooled=pooled)


def _mixed_17(x: _Maps, name: str, n: int) -> _Maps:
    row, column = (1, 7), (7, 1)
    twice = (n, 1), (n, column), (n, row), (n, column), (192, row)
    across = (n, 1), (n, row), (192, column)
    branches = {"branch1x1": ((192, 1),), "branch7x7": across, "branch7x7dbl": twice}
    return _mixed(x, name, branches, pooled=192)


def _mixed_8(x: _Maps, name: str, pooled: _Maps) -> _Maps:
    outputs = [_branch(x, f"{name}.branch1x1", ((320, 1),))]
    for inner, last in (
        (_branch(x, f"{name}.branch3x3_1", ((384, 1),)), "branch3x3_2"),
        (_branch(x, f"{name}.branch3x3dbl", ((448, 1), (384, 3))), "branch3x3dbl_3"),
    ):
        outputs.append(_branch(inner, f"{name}.{last}a", ((384, (1, 3)),)))
        outputs.append(_branch(inner, f"{name}.{last}b", ((384, (3, 1)),)))
    outputs.append(_branch(pooled, f"{name}.branch_pool", ((192, 1),)))
    return jnp.concatenate(outputs, axis=-1)


class _Network(nn.Module):
    """Inception-v3, its layers under their published names."""

    @nn.compact
    def __call__(self, x: Float[Array, "b h w 3"]) -> dict[str, Float[Array, "b _"]]:
        """Return the features of images of side 299, scaled to [-1, 1]."""
        features = {}
        x = _branch(x, "Conv2d_1a_3x3", ((32, 3),), halve=True)
        x = _branch(x, "Conv2d_2a_3x3", ((32, 3),), padding="VALID")
        x = _halved(_branch(x, "Conv2d_2b_3x3", ((64, 3),)))
        features["64"] = jnp.mean(x, (1, 2))
        x = _branch(x, "Conv2d_3b_1x1", ((80, 1),))
        x = _halved(_branch(x, "Conv2d_4a_3x3", ((192, 3),), padding="VALID"))
        features["192"] = jnp.mean(x, (1, 2))
        for name, pooled in {"Mixed_5b": 32, "Mixed_5c": 64, "Mixed_5d": 64}.items():
            x = _mixed_35(x, name, pooled)
        branches = {"branch3x3": ((384, 3),), "branch3x3dbl": ((64, 1), (96, 3), (96, 3))}
        x = _mixed(x, "Mixed_6a", branches, halve=True)
        for name, narrow in {"Mixed_6b": 128, "Mixed_6c": 160, "Mixed_6d": 160}.items():
            x = _mixed_17(x, name, narrow)
        features["spatial"] = x[..., :7].reshape(len(x), -1)  # 7 of its channels
        x = _mixed_17(x, "Mixed_6e", 192)
        features["768"] = jnp.mean(x, (1, 2))
        layers = (192, 1), (192, (1, 7)), (192, (7, 1)), (192, 3)
        branches = {"branch3x3": ((192, 1), (320, 3)), "branch7x7x3": layers}
        x = _mixed(x, "Mixed_7a", branches, halve=True)
        x = _mixed_8(x, "Mixed_7b", _averaged(x))
        x = _mixed_8(x, "Mixed_7c", nn.max_pool(x, (3, 3), padding="SAME"))
        x = jnp.mean(x, (1, 2))
        features["2048"] = x
        features["logits_unbiased"] = nn.Dense(FEATURES["logits"], use_bias=False, name="fc")(x)
        bias = self.param("fc_bias", nn.initializers.zeros, (FEATURES["logits"],))
        features["logits"] = features["logits_unbiased"] + bias
        return features
