"""From latents that a network generates to pictures."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from recorded import FOLDER

from configs.digits import get_config
from mf_jax.config import make_network
from mf_jax.data.pixels import to_pixels
from mf_jax.errors import BadInput
from mf_jax.flow.records import DataSpec
from mf_jax.generator import Generator, load_decoder
from mf_jax.models import initial_params
from mf_jax.models.autoencoder import load_autoencoder
from mf_jax.runtime.sharding import make_mesh

VAE = FOLDER / "vae"
SPEC = DataSpec((4, 4, 4), 10, tuple("0123456789"))


@pytest.fixture(scope="module")
def config():
    config = get_config()
    config.data.name, config.data.autoencoder = "latents", str(VAE)
    config.data.latent_mean, config.data.latent_std = (0.5, -0.25, 0.0, 1.0), (2.0, 3.0, 4.0, 5.0)
    config.model.depth, config.model.width, config.model.num_heads, config.model.patch_size = (
        1,
        16,
        2,
        2,
    )
    return config


@pytest.fixture(scope="module")
def generator(config):
    network = make_network(config, SPEC)
    params = initial_params(network, SPEC.shape, jax.random.key(0))
    params = jax.device_put(params, NamedSharding(make_mesh(data=0, fsdp=1), PartitionSpec()))
    return Generator(config, network, params, SPEC, step=0, ema="none")


def test_pictures_are_the_decoded_latents(config, generator):
    labels = np.arange(11) % 10
    latents = generator.sample_raw(labels)
    assert latents.shape == (11, *SPEC.shape)
    unscaled = latents * np.asarray(config.data.latent_std) + np.asarray(config.data.latent_mean)
    decoded = load_autoencoder(VAE).decode(jnp.asarray(unscaled, jnp.float32))
    pictures = generator.sample(labels, batch_size=6)
    assert pictures.dtype == np.uint8
    assert pictures.shape == decoded.shape
    assert (
        np.abs(pictures.astype(int) - np.asarray(to_pixels(decoded))).max() <= 1
    )  # rounded the other way at a half


def test_bytes_of_numpy_and_of_the_device_are_the_same():
    x = np.random.default_rng(0).uniform(-1.2, 1.2, (4, 3, 3, 3)).astype(np.float32)
    on_device = jax.jit(to_pixels)(jnp.asarray(x))
    assert on_device.dtype == jnp.uint8
    np.testing.assert_array_equal(on_device, to_pixels(x))


def test_another_autoencoder_than_that_of_the_latents_is_refused(config):
    sha256 = load_autoencoder(VAE).sha256
    assert load_decoder(config, origin=sha256).autoencoder.sha256 == sha256
    with pytest.raises(BadInput, match=f"data.autoencoder=.*{sha256}.*0123abc"):
        load_decoder(config, origin="0123abc")


def test_pictures_need_no_decoder():
    assert load_decoder(get_config(), origin="") is None


def test_a_decoder_that_is_missing_is_named_when_pictures_are_wanted(config, generator):
    config = config.copy_and_resolve_references()
    config.data.autoencoder = "sd-vae-ft-mse"
    lost = Generator(config, generator.network, generator.params, SPEC, step=0, ema="none")
    assert lost.sample_raw(num=1).shape == (1, *SPEC.shape)
    with pytest.raises(BadInput, match="sd-vae-ft-mse"):
        lost.sample(num=1)


def test_pictures_do_not_depend_on_the_batch(generator):
    one_by_one = np.concatenate(
        [generator.sample(labels=[3, 4, 5, 6])[i : i + 1] for i in range(4)]
    )
    np.testing.assert_array_equal(generator.sample(labels=[3, 4, 5, 6], batch_size=2), one_by_one)
