"""The autoencoder of Stable Diffusion, between images and the latents that networks train on.

Source: Rombach et al., arXiv 2112.10752, section 3.1 and appendix G; layers and names as in
`AutoencoderKL` of diffusers, whose weight files these are.
"""

import difflib
import re
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from etils import epath
from jaxtyping import Array, Float, Float32, PyTree

from mf_jax.flow.errors import BadInput
from mf_jax.models.layers import Image
from mf_jax.published import reading
from mf_jax.published.torch_file import StateDict, network_params, read_state_dict
from mf_jax.runtime.files import absolute
from mf_jax.runtime.json_files import parse_json

_FILE = "diffusion_pytorch_model.safetensors"
_DEFAULTS = {"layers_per_block": 1, "latent_channels": 4, "norm_num_groups": 32}
_DEFAULTS |= {"scaling_factor": 0.18215}
"""The values of keys that a config.json leaves out."""
_ROWS_AT_ONCE = 8  # pictures decoded on a device: one of 256x256 takes about 0.3 GB on the way
_UNKNOWN = ("shift_factor", "latents_mean", "latents_std")
"""Keys that a config.json must not set: latents would then be scaled by more than a factor."""
_OLD_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


@flax.struct.dataclass
class Autoencoder:
    """A trained autoencoder: a pytree of parameters and two pure, compiled functions of arrays.

    scaling_factor: multiplies latents before a network is trained on them, and divides them before
    they are decoded; neither function does it. sha256: of the weight file.
    """

    params: PyTree
    network: nn.Module = flax.struct.field(pytree_node=False)
    scaling_factor: float = flax.struct.field(pytree_node=False)
    sha256: str = flax.struct.field(pytree_node=False)

    @jax.jit
    def encode(self, image: Array) -> tuple[Float32[Array, "b h w c"], Float32[Array, "b h w c"]]:
        """Return mean and standard deviation of the latents of images [B, H, W, 3] in [-1, 1]."""
        # Not left to the platform: latents must not depend on how an accelerator rounds.
        with jax.default_matmul_precision("highest"):
            return self.network.apply({"params": self.params}, image, method="encode")

    @jax.jit
    def decode(self, latent: Array) -> Float32[Array, "b h w 3"]:
        """Return the images of unscaled latents, about in [-1, 1] but not clipped."""
        with jax.default_matmul_precision("highest"):
            return self.network.apply({"params": self.params}, latent, method="decode")


@flax.struct.dataclass
class Decoder:
    """An autoencoder, and the mean and standard deviation `[C]` or `[1]` of its latents."""

    autoencoder: Autoencoder
    mean: Float32[Array, "_"]
    std: Float32[Array, "_"]

    def __call__(self, x: Float[Array, "n h w c"]) -> Float[Array, "n h2 w2 3"]:
        """Return the pictures, about in [-1, 1], of latents of mean 0 and deviation 1."""

        def decode(row: Array) -> Array:
            return self.autoencoder.decode((row * self.std + self.mean)[None])[0]

        return jax.lax.map(decode, x, batch_size=_ROWS_AT_ONCE)


def load_autoencoder(path: epath.PathLike) -> Autoencoder:
    """Read a published autoencoder, for example `sd-vae-ft-mse`, from its file or folder.

    Sizes come from the `config.json` beside it; without one from the weights and `_DEFAULTS`.
    """
    path = absolute(path)
    path = path / _FILE if path.is_dir() else path
    state = _with_new_names(read_state_dict(path))
    network, scaling_factor = _network(path, state)
    params = network_params(network.parameter_shapes(), state)
    return Autoencoder(params, network, scaling_factor, state.sha256)


class AutoencoderKL(nn.Module):
    """Convolutional encoder and decoder, their layers under the published names."""

    block_out_channels: tuple[int, ...] = (128, 256, 512, 512)  # of levels, each half the last
    layers_per_block: int = 2  # residual ones of the encoder; one more in the decoder
    norm_num_groups: int = 32  # divides all channels
    latent_channels: int = 4

    def setup(self):
        channels, groups = self.block_out_channels, self.norm_num_groups
        self.encoder = _Encoder(channels, self.layers_per_block, groups, 2 * self.latent_channels)
        self.decoder = _Decoder(channels, self.layers_per_block + 1, groups)
        self.quant_conv = nn.Conv(2 * self.latent_channels, (1, 1))
        self.post_quant_conv = nn.Conv(self.latent_channels, (1, 1))

    @property
    def factor(self) -> int:
        """Return how many times narrower than its image a latent is."""
        return 2 ** (len(self.block_out_channels) - 1)

    def encode(self, image: Array) -> tuple[Image, Image]:
        """See `Autoencoder.encode`."""
        _check_batch("image", image, channels=3, factor=self.factor)
        mean, log_variance = jnp.split(self.quant_conv(self.encoder(image)), 2, axis=-1)
        return mean, jnp.exp(jnp.clip(log_variance, -30.0, 20.0) / 2)

    def decode(self, latent: Array) -> Float[Array, "b h w 3"]:
        """See `Autoencoder.decode`."""
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
    def __call__(self, x: Image) -> Float[Array, "b h2 w2 c2"]:
        x = _conv(self.channels[0], 3, "conv_in")(x)
        for level, features in enumerate(self.channels):
            if level > 0:  # padded at the end alone
                name = f"down_blocks.{level - 1}.downsamplers.0.conv"
                x = _conv(x.shape[-1], 3, name, strides=2, padding=((0, 1), (0, 1)))(x)
            for i in range(self.layers):
                x = _residual(x, features, self.groups, f"down_blocks.{level}.resnets.{i}")
        x = _middle(x, self.groups)
        return _conv(self.num_out, 3, "conv_out")(nn.silu(_norm(self.groups, "conv_norm_out")(x)))


class _Decoder(nn.Module):
    channels: tuple[int, ...]
    layers: int
    groups: int

    @nn.compact
    def __call__(self, x: Image) -> Float[Array, "b h2 w2 3"]:
        x = _middle(_conv(self.channels[-1], 3, "conv_in")(x), self.groups)
        for level, features in enumerate(reversed(self.channels)):
            if level > 0:
                double = jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2)
                x = _conv(x.shape[-1], 3, f"up_blocks.{level - 1}.upsamplers.0.conv")(double)
            for i in range(self.layers):
                x = _residual(x, features, self.groups, f"up_blocks.{level}.resnets.{i}")
        return _conv(3, 3, "conv_out")(nn.silu(_norm(self.groups, "conv_norm_out")(x)))


def _conv(features: int, size: int, name: str, **more: Any) -> nn.Conv:
    return nn.Conv(features, (size, size), name=name, **more)


def _norm(groups: int, name: str) -> nn.GroupNorm:
    return nn.GroupNorm(groups, epsilon=1e-6, use_fast_variance=False, name=name)


def _residual(x: Image, features: int, groups: int, name: str) -> Float[Array, "b h w f"]:
    hidden = _conv(features, 3, f"{name}.conv1")(nn.silu(_norm(groups, f"{name}.norm1")(x)))
    hidden = _conv(features, 3, f"{name}.conv2")(nn.silu(_norm(groups, f"{name}.norm2")(hidden)))
    if x.shape[-1] != features:
        x = _conv(features, 1, f"{name}.conv_shortcut")(x)
    return x + hidden


def _middle(x: Image, groups: int) -> Image:
    x = _residual(x, x.shape[-1], groups, "mid_block.resnets.0")
    x = x + _attention(x, groups, "mid_block.attentions.0")
    return _residual(x, x.shape[-1], groups, "mid_block.resnets.1")


def _attention(x: Image, groups: int, name: str) -> Image:
    """Let the pixels attend to one another, with one head."""
    batch, height, width, channels = x.shape
    pixels = _norm(groups, f"{name}.group_norm")(x).reshape(batch, height * width, 1, channels)
    q, k, v = (nn.Dense(channels, name=f"{name}.to_{letter}")(pixels) for letter in "qkv")
    attended = jax.nn.dot_product_attention(q, k, v, implementation="xla")
    return nn.Dense(channels, name=f"{name}.to_out.0")(attended.reshape(x.shape))


def _check_batch(name: str, x: Array, *, channels: int, factor: int) -> None:
    fits = x.ndim == 4 and x.shape[-1] == channels and not any(n % factor for n in x.shape[1:3])
    if not fits or 0 in x.shape or not jnp.issubdtype(x.dtype, jnp.floating):
        needed = f"floating point [B, H, W, {channels}], H and W divisible by {factor}"
        raise BadInput(f"{name} is {x.dtype} {list(x.shape)}; must be {needed}")


def _with_new_names(state: StateDict) -> StateDict:
    """Return the parameters with attention as newer files name and shape it."""
    arrays = {}
    for name, array in state.arrays.items():
        new = re.sub(r"(?<=\.attentions\.0\.)\w+", lambda m: _OLD_NAMES.get(m[0], m[0]), name)
        if ".attentions." in name and array.shape[2:] == (1, 1):
            array = array[..., 0, 0]
        arrays[name if new in state.arrays else new] = array
    return state._replace(arrays=arrays)


def _network(path: epath.Path, state: StateDict) -> tuple[AutoencoderKL, float]:
    """Return network and scaling factor of the config beside the weights, or of the weights."""
    beside = path.parent / "config.json"
    told = _read_config(beside) if beside.exists() else _sizes(state)
    sizes = {key: told.get(key, usual) for key, usual in _DEFAULTS.items()}
    scaling_factor, groups = sizes.pop("scaling_factor"), sizes["norm_num_groups"]
    channels = tuple(told["block_out_channels"])
    if not channels or any(n % groups for n in channels):
        needed = f"must be divisible by norm_num_groups={groups}: put the config.json beside them"
        raise BadInput(f"{path}: block_out_channels={channels}; {needed}")
    return AutoencoderKL(channels, **sizes), scaling_factor


def _read_config(path: epath.Path) -> dict[str, Any]:
    known = (*_DEFAULTS, *_UNKNOWN, "block_out_channels")
    like = {f"{key}?": min(1, usual) for key, usual in _DEFAULTS.items()}  # sizes from 1 on
    with reading(path, "the config of an autoencoder"):
        config = parse_json(path.read_bytes(), {"block_out_channels": [1], **like})
        for key in set(config) - set(known):
            if meant := difflib.get_close_matches(key, known, cutoff=0.9):
                raise BadInput(f"sets {key}, which is damaged or misspelt; must be {meant[0]}")
        if others := [f"{k}={config[k]}" for k in _UNKNOWN if config.get(k) is not None]:
            raise BadInput(f"sets {', '.join(others)}; must not: use one of Stable Diffusion 1, 2")
    return config


def _sizes(state: StateDict) -> dict[str, Any]:
    """Return the sizes that a config of these weights would have."""
    blocks = re.compile(r"encoder\.down_blocks\.(\d+)\.resnets\.(\d+)\.conv1\.weight")
    names = filter(None, map(blocks.fullmatch, state.arrays))
    found = sorted((int(m[1]), int(m[2]), state.arrays[m[0]].shape[0]) for m in names)
    channels = [num for _, layer, num in found if layer == 0]
    return {"block_out_channels": channels, "layers_per_block": len(found) // max(len(channels), 1)}
