"""The autoencoder of latents: recorded numbers, published names and sizes, and wrong files."""

import hashlib
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import refuses
from flax.traverse_util import flatten_dict, unflatten_dict
from recorded import FOLDER, assert_close
from safetensors.numpy import load_file, save_file

from mf_jax.models.autoencoder import AutoencoderKL, _norm, load_autoencoder

VAE, FILE = FOLDER / "vae", "diffusion_pytorch_model.safetensors"
RECORDED = dict(np.load(VAE / "io.npz"))
OLD_NAMES = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}


@pytest.fixture(scope="module")
def autoencoder():
    return load_autoencoder(VAE)


@pytest.fixture
def rewrite(tmp_path):
    """Return a function that writes the recorded file anew, its arrays or its config changed."""

    def write(change=lambda arrays: arrays, **config):
        settings = json.loads((VAE / "config.json").read_text()) | config
        (tmp_path / "config.json").write_text(json.dumps(settings))
        save_file(change(load_file(VAE / FILE)), tmp_path / FILE)
        return tmp_path

    return write


def test_recorded_latents_and_images_of_the_reference(autoencoder):
    mean, std = autoencoder.encode(RECORDED["in/image"])
    decoded = autoencoder.decode(RECORDED["in/latent"])
    for name, ours in {"mean": mean, "std": std, "decoded": decoded}.items():
        theirs = RECORDED[f"out/{name}"]
        assert ours.dtype == np.float32
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4)
        assert_close(ours, theirs, name)


def test_deviation_is_clipped(autoencoder):
    channels = autoencoder.network.latent_channels
    bias = jnp.float32([0] * channels + [-1e3, 1e3] * (channels // 2))
    params = unflatten_dict(flatten_dict(autoencoder.params) | {("quant_conv", "bias"): bias})
    _, std = autoencoder.replace(params=params).encode(RECORDED["in/image"])
    np.testing.assert_allclose(std[0, 0, 0, :2], np.exp([-15.0, 10.0]), rtol=1e-5)


def test_groups_of_tiny_variance_are_normed_with_the_published_epsilon():
    """The epsilon matters only where the variance is as small, which no recorded one is."""
    x = 1e-3 * np.random.default_rng(0).standard_normal((1, 4, 4, 6), np.float32)
    norm = _norm(2, "norm")
    grouped = x.astype(np.float64).reshape(16, 2, 3)
    deviation = np.sqrt(grouped.var((0, 2), keepdims=True) + 1e-6)
    theirs = (grouped - grouped.mean((0, 2), keepdims=True)) / deviation
    ours = norm.apply(norm.init(jax.random.key(0), x), x)
    np.testing.assert_allclose(ours, theirs.reshape(x.shape), rtol=1e-4, atol=1e-5)


def test_every_product_is_of_the_highest_precision(autoencoder):
    for function, x in ((autoencoder.encode, "in/image"), (autoencoder.decode, "in/latent")):
        program = str(jax.make_jaxpr(function)(RECORDED[x]))
        products = program.count("conv_general_dilated[") + program.count("dot_general[")
        assert program.count("precision=(Precision.HIGHEST, Precision.HIGHEST)") == products > 10


def test_the_published_network():
    network = AutoencoderKL()
    sizes = [leaf.size for leaf in jax.tree.leaves(network.parameter_shapes())]
    assert (sum(sizes), network.factor, network.latent_channels) == (83_653_863, 8, 4)


def test_other_images_and_latents_are_refused(autoencoder):
    message = r"image is float32 .*must be floating point \[B, H, W, 3\], .* by 4"
    for shape in ((1, 30, 32, 3), (1, 32, 30, 3), (1, 32, 32, 1), (32, 32, 3)):
        refuses(message, autoencoder.encode, np.zeros(shape, np.float32))
    refuses("image is uint8", autoencoder.encode, np.zeros((1, 32, 32, 3), np.uint8))
    latent = np.zeros((1, 8, 8, 3), np.float32)
    refuses(r"latent is float32 \[1, 8, 8, 3\]; must be .*4\]", autoencoder.decode, latent)


def test_other_ways_to_write_the_same_file(autoencoder, rewrite):
    """Old names of attention, half precision, and the file itself in place of its folder."""

    def age(arrays):
        aged = {}
        for name, array in arrays.items():
            for new, old in OLD_NAMES.items():
                if f".{new}." in name:
                    name = name.replace(f".{new}.", f".{old}.")
                    array = array[..., None, None] if array.ndim == 2 else array
            aged[name] = np.ascontiguousarray(array.astype(jnp.bfloat16))
        assert sum(".query." in name for name in aged) == 4
        return aged

    same, named = autoencoder.params, load_autoencoder(VAE / FILE)
    rounded = jax.tree.map(lambda a: a.astype(jnp.bfloat16).astype(np.float32), same)
    aged = load_autoencoder(rewrite(age)).params
    jax.tree.map(np.testing.assert_array_equal, aged, rounded)
    jax.tree.map(np.testing.assert_array_equal, named.params, same)
    config = json.loads((VAE / "config.json").read_text())
    assert named.scaling_factor == config["scaling_factor"]
    assert named.sha256 == hashlib.sha256((VAE / FILE).read_bytes()).hexdigest()


def test_sizes_of_weights_without_a_config(tmp_path):
    refuses("no such file", load_autoencoder, tmp_path / "nowhere")
    network = AutoencoderKL((32, 64), 1, 32, 4)
    arrays = {}
    for (*layer, leaf), shape in flatten_dict(network.parameter_shapes()).items():
        axes = {4: (3, 2, 0, 1), 2: (1, 0), 1: (0,)}[len(shape.shape)]
        name = ".".join([*layer, "bias" if leaf == "bias" else "weight"])
        arrays[name] = np.zeros([shape.shape[axis] for axis in axes], np.float32)
    arrays["decoder.conv_in.weight"][5, 2, 0, 1] = 1
    save_file(arrays, tmp_path / FILE)
    (tmp_path / "config.json").write_text(json.dumps({"block_out_channels": [32, 64]}))
    with_config = load_autoencoder(tmp_path)
    assert (with_config.network, with_config.scaling_factor) == (network, 0.18215)
    assert with_config.params["decoder"]["conv_in"]["kernel"][0, 1, 2, 5] == 1
    (tmp_path / "config.json").unlink()
    assert load_autoencoder(tmp_path).network == network
    shutil.copy(VAE / FILE, tmp_path)
    # 16 channels cannot have the 32 groups of a file without a config.
    refuses(r"put the config\.json", load_autoencoder, tmp_path)
    (tmp_path / FILE).write_bytes(b"\x10" * 99)
    refuses("cannot be read", load_autoencoder, tmp_path)


def test_other_parameters_and_configs_of_other_networks_are_refused(rewrite):
    whole = lambda arrays: arrays | {"quant_conv.bias": np.zeros(8, np.int32)}  # noqa: E731
    refuses("no floats: quant_conv.bias is int32", load_autoencoder, rewrite(whole))
    for config, message in (
        ({"shift_factor": 0.1}, r"sets shift_factor=0\.1; must not"),
        ({"norm_num_groups": 5}, r"\(16, 32, 32\); must be divisible by norm_num_groups=5"),
        ({"layers_per_block": 0}, "layers_per_block is 0, and must be at least 1"),
        ({"block_out_channels": None}, "block_out_channels is 'None', not a list"),
        ({"scaling_factor": "no"}, "cannot be read as the config of an autoencoder"),
        ({"layers_per_block": 2}, "missing: .*resnets.2"),
    ):
        refuses(message, load_autoencoder, rewrite(**config))
