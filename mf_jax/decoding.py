"""From what a network generates to pictures: bytes, by way of the autoencoder where it generates latents."""

import functools

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float, Float32, Shaped, UInt8
from ml_collections import ConfigDict

from mf_jax.errors import BadInput
from mf_jax.models.autoencoder import Autoencoder, load_autoencoder
from mf_jax.published.fetch import find_weights, verify
from mf_jax.runtime.sharding import batch_sharding

_ROWS_AT_ONCE = 8
"""Pictures that a device decodes at the same time: a picture of 256x256 pixels takes about 0.3 GB on the way."""


@flax.struct.dataclass
class Decoder:
    """An autoencoder, and how its latents were scaled for training.

    autoencoder: of the run. mean, std: taken from latents and divided by, `[C]` or `[1]`.
    """

    autoencoder: Autoencoder
    mean: Float32[Array, "_"]
    std: Float32[Array, "_"]

    def __call__(self, x: Float[Array, "n h w c"]) -> Float[Array, "n h2 w2 3"]:
        """Return pictures, about in [-1, 1], of what a network generates; few at once, to save memory."""

        def decode(row: Array) -> Array:
            return self.autoencoder.decode((row * self.std + self.mean)[None])[0]

        return jax.lax.map(decode, x, batch_size=_ROWS_AT_ONCE)


def to_pixels(x: Float[Array | np.ndarray, "n h w c"]) -> UInt8[Array | np.ndarray, "n h w c"]:
    """Return pictures in [-1, 1] as bytes: round((x + 1) * 127.5), clipped to [0, 255].

    Args:
      x: an array of numpy or of jax; what is returned is of the same kind.
    """
    xp = x.__array_namespace__()
    return xp.clip(xp.round((x + 1) * 127.5), 0, 255).astype(xp.uint8)


QUANTISATION = "round((x + 1) * 127.5), clipped to a byte"
"""What `to_pixels` does, for the protocol of an evaluation."""


def load_decoder(config: ConfigDict, *, origin: str) -> Decoder | None:
    """Return the decoder of a run's latents, or None if its network generates pictures or vectors.

    Args:
      config: `data` says what the network was trained on, `weights_dir` where published weights are.
      origin: SHA-256 of the autoencoder that made the latents, "" where it is not known.

    Raises:
      BadInput: if the autoencoder cannot be found or read, or is another one.
    """
    if config.data.name != "latents":
        return None
    path = find_weights(config.data.autoencoder, config.weights_dir, key="data.autoencoder")
    autoencoder = _read(str(path))
    verify(config.data.autoencoder, autoencoder.sha256)
    if origin not in ("", autoencoder.sha256):
        raise BadInput(
            f"data.autoencoder={config.data.autoencoder!r}: {path} has the SHA-256 {autoencoder.sha256}, but the run's "
            f"latents come from {origin}; use the autoencoder that made them"
        )
    mean, std = (
        jnp.asarray(config.data[key], jnp.float32) for key in ("latent_mean", "latent_std")
    )
    return Decoder(autoencoder, mean, std)


@functools.lru_cache(1)
def _read(path: str) -> Autoencoder:
    return load_autoencoder(epath.Path(path))


@functools.partial(jax.jit, static_argnums=0)
def pixels_of(
    mesh: Mesh, decoder: Decoder | None, x: Shaped[Array, "n ..."]
) -> UInt8[Array, "n h w c"]:
    """Return what a network generated as pictures of bytes, each device decoding its own rows.

    Args:
      mesh: that the rows are split over.
      decoder: of latents; None for pictures.
      x: as generated.
    """
    if decoder is not None:
        rows = batch_sharding(mesh).spec
        decode = jax.shard_map(
            lambda decoder, x: decoder(x),
            mesh=mesh,
            in_specs=(PartitionSpec(), rows),
            out_specs=rows,
            check_vma=False,
        )
        x = decode(decoder, x)
    return to_pixels(x)
