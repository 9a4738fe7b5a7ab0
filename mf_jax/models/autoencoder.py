"""The autoencoder of Stable Diffusion, between images and the latents that latent-space networks are trained on.

Source: Rombach et al., arXiv 2112.10752, section 3.1 and appendix G; layers and names are those of `AutoencoderKL` of
diffusers, whose weight files these are.
"""

import itertools
import json
import re
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from etils import epath
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Array, Float, Float32, PyTree

from mf_jax.errors import BadInput
from mf_jax.models.unet import double
from mf_jax.published.torch_file import StateDict, fit_state_dict, read_state_dict

_FILE = "diffusion_pytorch_model.safetensors"
_DEFAULTS = {
    "layers_per_block": 1,
    "latent_channels": 4,
    "norm_num_groups": 32,
    "scaling_factor": 0.18215,
}
"""What a config.json that does not say means."""
_UNKNOWN = ("shift_factor", "latents_mean", "latents_std")
"""What a config.json must not set: latents would then be scaled by more than a factor."""
_OLD_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
_EPSILON = 1e-6  # of GroupNorm
_LOG_VARIANCE = (-30.0, 20.0)


@flax.struct.dataclass
class Autoencoder:
    """A trained autoencoder: a pytree of parameters and two pure, compiled functions of arrays.

    params: the parameter tree. network: its layers. scaling_factor: what latents are multiplied by before a network is
    trained on them, and divided by before they are decoded; neither function does it. sha256: of the weight file.
    """

    params: PyTree
    network: nn.Module = flax.struct.field(pytree_node=False)
    scaling_factor: float = flax.struct.field(pytree_node=False)
    sha256: str = flax.struct.field(pytree_node=False)

    @jax.jit
    def encode(self, image: Array) -> tuple[Float32[Array, "b h w c"], Float32[Array, "b h w c"]]:
        """Return mean and standard deviation of the latents of images.

        Args:
          image: float `[B, H, W, 3]` in [-1, 1], as many as fit into memory; H and W divisible by 8 (by 2 for every
            level after the first).

        Returns:
          Mean and standard deviation, each `[B, H/8, W/8, 4]`.

        Raises:
          BadInput: if images have another shape or are integers.
        """
        # Not left to the platform: latents must not depend on how an accelerator rounds its inputs.
        with jax.default_matmul_precision("highest"):
            return self.network.apply({"params": self.params}, image, method="encode")

    @jax.jit
    def decode(self, latent: Array) -> Float32[Array, "b h w 3"]:
        """Return the images of latents.

        Args:
          latent: float `[B, H/8, W/8, 4]`, not scaled, as many as fit into memory.

        Returns:
          Images `[B, H, W, 3]`, about in [-1, 1] but not clipped.

        Raises:
          BadInput: if latents have another shape or are integers.
        """
        with jax.default_matmul_precision("highest"):
            return self.network.apply({"params": self.params}, latent, method="decode")


def load_autoencoder(path: epath.PathLike) -> Autoencoder:
    """Read a published autoencoder.

    The usual one is `stabilityai/sd-vae-ft-mse` of the Hugging Face hub, 334643276 bytes, SHA-256
    a1d993488569e928462932c8c38a0760b874d166399b14414135bd9c42df5815.

    Args:
      path: of `diffusion_pytorch_model.safetensors`, or of the folder that holds it. Sizes come from the `config.json`
        beside it; without one from the weights, with 32 groups in each norm and a scaling factor of 0.18215.

    Returns:
      The autoencoder.

    Raises:
      BadInput: if a file cannot be read, the config asks for another network, or the parameters are not those of the
        network; names them.
    """
    path = epath.Path(path).expanduser().absolute()
    path = path / _FILE if path.is_dir() else path
    state = _with_new_names(read_state_dict(path))
    network, scaling_factor = _network(path, state)
    shapes = {keys: leaf.shape for keys, leaf in flatten_dict(network.parameter_shapes()).items()}
    arrays = fit_state_dict(
        state, {_published(keys): _turned(shape) for keys, shape in shapes.items()}
    )
    params = {}
    for keys in shapes:
        array = arrays[_published(keys)]
        params[keys] = jnp.asarray(array.transpose(2, 3, 1, 0) if array.ndim == 4 else array.T)
    return Autoencoder(unflatten_dict(params), network, scaling_factor, state.sha256)


class AutoencoderKL(nn.Module):
    """Convolutional encoder and decoder, their layers under the published names.

    Args:
      block_out_channels: channels of each level; every level after the first halves the image.
      layers_per_block: residual blocks of a level of the encoder; one more in the decoder.
      norm_num_groups: groups of every GroupNorm; divides all channels.
      latent_channels: channels of a latent.
    """

    block_out_channels: tuple[int, ...] = (128, 256, 512, 512)
    layers_per_block: int = 2
    norm_num_groups: int = 32
    latent_channels: int = 4

    def setup(self):
        channels, layers, groups = (
            self.block_out_channels,
            self.layers_per_block,
            self.norm_num_groups,
        )
        self.encoder = _Encoder(channels, layers, groups, 2 * self.latent_channels)
        self.decoder = _Decoder(channels, layers + 1, groups)
        self.quant_conv = nn.Conv(2 * self.latent_channels, (1, 1))
        self.post_quant_conv = nn.Conv(self.latent_channels, (1, 1))

    @property
    def factor(self) -> int:
        """Return by how much a latent is narrower than its image."""
        return 2 ** (len(self.block_out_channels) - 1)

    def encode(self, image: Array) -> tuple[Float[Array, "b h w c"], Float[Array, "b h w c"]]:
        """Return mean and standard deviation; as `Autoencoder.encode`."""
        _check_batch("image", image, channels=3, factor=self.factor)
        mean, log_variance = jnp.split(self.quant_conv(self.encoder(image)), 2, axis=-1)
        return mean, jnp.exp(jnp.clip(log_variance, *_LOG_VARIANCE) / 2)

    def decode(self, latent: Array) -> Float[Array, "b h w 3"]:
        """Return images; as `Autoencoder.decode`."""
        _check_batch("latent", latent, channels=self.latent_channels, factor=1)
        return self.decoder(self.post_quant_conv(latent))

    def __call__(self, image: Array) -> Float[Array, "b h w 3"]:
        """Return images that went through the mean of their latents."""
        return self.decode(self.encode(image)[0])

    def parameter_shapes(self) -> PyTree:
        """Return the shapes and types of the parameters, computing nothing."""
        image = jnp.zeros((1, self.factor, self.factor, 3))
        return jax.eval_shape(self.init, jax.random.key(0), image)["params"]


class _Encoder(nn.Module):
    channels: tuple[int, ...]
    layers: int
    groups: int
    num_out: int

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 c2"]:
        x = _conv(self.channels[0], 3, "conv_in")(x)
        for level, features in enumerate(self.channels):
            if level > 0:  # padded at the end alone
                halve = f"down_blocks.{level - 1}.downsamplers.0.conv"
                x = _conv(x.shape[-1], 3, halve, strides=2, padding=((0, 1), (0, 1)))(x)
            for i in range(self.layers):
                x = _residual(x, features, self.groups, f"down_blocks.{level}.resnets.{i}")
        x = _middle(x, self.groups)
        return _conv(self.num_out, 3, "conv_out")(nn.silu(_norm(self.groups, "conv_norm_out")(x)))


class _Decoder(nn.Module):
    channels: tuple[int, ...]
    layers: int
    groups: int

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 3"]:
        x = _middle(_conv(self.channels[-1], 3, "conv_in")(x), self.groups)
        for level, features in enumerate(reversed(self.channels)):
            if level > 0:
                x = _conv(x.shape[-1], 3, f"up_blocks.{level - 1}.upsamplers.0.conv")(double(x))
            for i in range(self.layers):
                x = _residual(x, features, self.groups, f"up_blocks.{level}.resnets.{i}")
        return _conv(3, 3, "conv_out")(nn.silu(_norm(self.groups, "conv_norm_out")(x)))


def _conv(features: int, size: int, name: str, **more: Any) -> nn.Conv:
    return nn.Conv(features, (size, size), name=name, **more)


def _norm(groups: int, name: str) -> nn.GroupNorm:
    return nn.GroupNorm(groups, epsilon=_EPSILON, use_fast_variance=False, name=name)


def _residual(
    x: Float[Array, "b h w c"], features: int, groups: int, name: str
) -> Float[Array, "b h w f"]:
    hidden = _conv(features, 3, f"{name}.conv1")(nn.silu(_norm(groups, f"{name}.norm1")(x)))
    hidden = _conv(features, 3, f"{name}.conv2")(nn.silu(_norm(groups, f"{name}.norm2")(hidden)))
    if x.shape[-1] != features:
        x = _conv(features, 1, f"{name}.conv_shortcut")(x)
    return x + hidden


def _middle(x: Float[Array, "b h w c"], groups: int) -> Float[Array, "b h w c"]:
    x = _residual(x, x.shape[-1], groups, "mid_block.resnets.0")
    x = x + _attention(x, groups, "mid_block.attentions.0")
    return _residual(x, x.shape[-1], groups, "mid_block.resnets.1")


def _attention(x: Float[Array, "b h w c"], groups: int, name: str) -> Float[Array, "b h w c"]:
    """Return what the pixels attend to, with one head."""
    batch, height, width, channels = x.shape
    pixels = _norm(groups, f"{name}.group_norm")(x).reshape(batch, height * width, 1, channels)
    q, k, v = (nn.Dense(channels, name=f"{name}.to_{letter}")(pixels) for letter in "qkv")
    attended = jax.nn.dot_product_attention(q, k, v, implementation="xla")
    return nn.Dense(channels, name=f"{name}.to_out.0")(attended.reshape(x.shape))


def _check_batch(name: str, x: Array, *, channels: int, factor: int) -> None:
    fits = (
        x.ndim == 4
        and x.shape[-1] == channels
        and not x.shape[1] % factor
        and not x.shape[2] % factor
    )
    if not fits or 0 in x.shape or not jnp.issubdtype(x.dtype, jnp.floating):
        raise BadInput(
            f"{name} is {x.dtype} {list(x.shape)}; must be floating point [B, H, W, {channels}], H and W divisible by"
            f" {factor}: scale and crop it first"
        )


def _published(keys: tuple[str, ...]) -> str:
    *layer, leaf = keys
    return ".".join([*layer, "bias" if leaf == "bias" else "weight"])


def _turned(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the published shape of a parameter of ours."""
    return (shape[3], shape[2], shape[0], shape[1]) if len(shape) == 4 else shape[::-1]


def _with_new_names(state: StateDict) -> StateDict:
    """Return the parameters with attention as newer files name and shape it."""
    arrays = {}
    for name, array in state.arrays.items():
        new = re.sub(
            r"(?<=\.attentions\.0\.)\w+", lambda match: _OLD_NAMES.get(match[0], match[0]), name
        )
        squeezed = (
            array[..., 0, 0] if ".attentions." in name and array.shape[2:] == (1, 1) else array
        )
        arrays[name if new in state.arrays else new] = squeezed
    return state._replace(arrays=arrays)


def _network(path: epath.Path, state: StateDict) -> tuple[AutoencoderKL, float]:
    """Return the network and the scaling factor that the config beside the weights says, or the weights themselves."""
    beside = path.parent / "config.json"
    config = _DEFAULTS | (_read_config(beside) if beside.exists() else _sizes(state))
    sizes = {
        key: config.get(key)
        for key in ("block_out_channels", *_DEFAULTS)
        if key != "scaling_factor"
    }
    channels, *others = sizes.values()
    counts = [*channels, *others] if channels and isinstance(channels, list) else []
    fits = counts and all(isinstance(n, int) and n > 0 for n in counts)
    if not fits or any(n % sizes["norm_num_groups"] for n in channels):
        raise BadInput(
            f"{path}: its sizes are {sizes}; must be above 0, and block_out_channels divisible by norm_num_groups:"
            " put the config.json that belongs to the weights beside them"
        )
    return AutoencoderKL(**sizes | {"block_out_channels": tuple(channels)}), float(
        config["scaling_factor"]
    )


def _read_config(path: epath.Path) -> dict[str, Any]:
    try:
        config = dict(json.loads(path.read_text()))
        float(config.get("scaling_factor", 1))
    except (OSError, ValueError, TypeError) as error:
        raise BadInput(
            f"{path}: is no config of an autoencoder ({error}); fetch it again"
        ) from error
    if others := [f"{key}={config[key]}" for key in _UNKNOWN if config.get(key) is not None]:
        raise BadInput(
            f"{path}: sets {', '.join(others)}; must not: use an autoencoder of Stable Diffusion 1 or 2"
        )
    return config


def _sizes(state: StateDict) -> dict[str, Any]:
    """Return what the config of weights without one would say."""

    def channels(block: str) -> list[int]:
        names = (f"encoder.down_blocks.{block.format(i)}.conv1.weight" for i in itertools.count())
        return [
            state.arrays[name].shape[0]
            for name in itertools.takewhile(state.arrays.__contains__, names)
        ]

    return {
        "block_out_channels": channels("{}.resnets.0"),
        "layers_per_block": len(channels("0.resnets.{}")),
    }
