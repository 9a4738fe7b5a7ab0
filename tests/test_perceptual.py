"""The perceptual terms of pixel MeanFlow, against recorded numbers of the published code.

Every size and setting comes from the case's own `meta`.
"""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from recorded import FOLDER, perceptual_weights

from mf_jax.flow.crops import crop
from mf_jax.models.convnext import ConvNeXtDistance, ConvNeXtV2
from mf_jax.models.distances import DISTANCES, distance_shapes
from mf_jax.models.lpips import VGG16
from mf_jax.published.torch_file import StateDict, network_params

CASE = dict(np.load(FOLDER / "perceptual.npz"))
META = json.loads(str(CASE["meta"]))
SHAPES = json.loads((FOLDER / "perceptual_state_dict.json").read_text())
VALUES, GRADIENTS = 3e-5, 1e-4  # relative to the largest entry
SHIFTS = 0, 3e-6, -3e-6
PAIR = jnp.asarray(CASE["in/a"]), jnp.asarray(CASE["in/b"])


def assert_close(ours, theirs, tolerance, name):
    error = np.abs(np.asarray(ours, np.float64) - theirs).max() / np.abs(theirs).max()
    assert error < tolerance, f"{name}: relative error {error:.2e}"


@functools.cache
def distance(name):
    """Return a network of pairs of pictures, and its weights drawn by the rule."""
    if name == "lpips":
        network, shapes = DISTANCES["lpips"], META["lpips"]["parameters"]
    else:
        sizes = META["convnext"][name]
        network = ConvNeXtDistance(tuple(sizes["depths"]), tuple(sizes["dims"]))
        shapes = sizes["parameters"] if name == "small" else SHAPES["convnextv2"]
    state = StateDict(name, "", perceptual_weights(shapes, META["seed"]))
    return network, network_params(distance_shapes(network), state)


@pytest.fixture(autouse=True)
def _precision():
    with jax.default_matmul_precision(META["matmul_precision"]):
        yield


def check_distance(prefix, network, params):
    def total(a, b):
        distances = network.apply({"params": params}, a, b)
        return distances.sum(), distances

    (a, b), theirs = PAIR, CASE[f"{prefix}/gradient/a"]
    gradient = jax.jit(jax.grad(total, has_aux=True))
    assert_close(gradient(a, b)[1], CASE[f"{prefix}/out/distance"], VALUES, prefix)
    # a ReLU may lie so near its kink that rounding picks the side: one shift of a picks theirs
    errors = [np.abs(gradient(a + s, b)[0] - theirs).max((1, 2, 3)) for s in SHIFTS]
    assert np.min(errors, axis=0).max() < GRADIENTS * np.abs(theirs).max(), errors


def test_reference_crops():
    image, box = (jnp.asarray(CASE[f"crop/in/{name}"]) for name in ("image", "box"))
    for side in META["crop_sizes"]:
        ours = crop(image, box, side)
        assert_close(ours, CASE[f"crop/out/{side}"], VALUES, side)


def test_reference_lpips():
    network, params = distance("lpips")
    check_distance("lpips", network, params)
    layers = jax.jit(functools.partial(network.apply, method="layers"))({"params": params}, *PAIR)
    recorded = [name for name in CASE if name.startswith("lpips/out/layer/")]
    for name, ours in zip(recorded, layers, strict=True):
        assert_close(ours, CASE[name], VALUES, name)
    vgg = jax.jit(VGG16().apply)
    for picture, image in zip("ab", PAIR, strict=True):
        maps = dict(zip(recorded, vgg({"params": params["features"]}, image), strict=True))
        for name, ours in maps.items():
            kinds = ("mean", "map")
            mean, whole = (f"lpips/out/{picture}/{kind}/{name.split('/')[-1]}" for kind in kinds)
            assert_close(ours.mean((1, 2)), CASE[mean], VALUES, mean)
            if whole in CASE:
                assert_close(ours, CASE[whole], VALUES, whole)


@pytest.mark.parametrize("size", ["small", pytest.param("base", marks=pytest.mark.slow)])
def test_reference_convnext(size):
    network, params = distance(size)
    prefix = f"convnext_{size}"
    check_distance(prefix, network, params)
    backbone = jax.jit(ConvNeXtV2(network.depths, network.widths).apply)
    for picture, image in zip("ab", PAIR, strict=True):
        features, maps = backbone({"params": params["convnextv2"]}, image)
        assert_close(features, CASE[f"{prefix}/out/{picture}/features"], VALUES, prefix)
        for i, x in enumerate(maps):
            if (name := f"{prefix}/out/{picture}/mean/stage{i}") in CASE:
                assert_close(x.mean((1, 2)), CASE[name], VALUES, name)
