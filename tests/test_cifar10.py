"""The recipe of CIFAR-10: the recorded U-Net through its config row, its weights, augmentation."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import refuses
from recorded import FOLDER, assert_close, assert_gradients, draws_of, load_case

from configs import cifar10
from mf_jax.bench.step import Noise
from mf_jax.config import make_network, make_objective
from mf_jax.data.augment import augmented
from mf_jax.flow.paths import interpolate
from mf_jax.flow.records import NO_LABEL, Condition, DataSpec
from mf_jax.loading import load_initial
from mf_jax.models import as_field
from mf_jax.published.checkpoints import load_published, read_published
from mf_jax.train import step_parts

FILE = FOLDER / "torch_checkpoints" / "py_meanflow_checkpoint-last.pth"
SIDE = 16
PLACES = np.float32(np.stack(np.indices((SIDE, SIDE))[::-1], axis=-1) - (SIDE - 1) / 2)
"""A picture whose two channels are the column and the row of each pixel, from the centre."""


def _config(sizes, path=""):
    """Return the published row with a network of these sizes."""
    config = cifar10.get_config()
    config.data.image_size, config.init.path = sizes["img_resolution"], str(path)
    config.data.augment = "edm" if sizes["augment_dim"] else "none"
    config.model.channels, config.model.num_blocks = sizes["model_channels"], sizes["num_blocks"]
    config.model.channel_multipliers = tuple(sizes["channel_mult"])
    config.model.attention_resolutions = tuple(sizes["attn_resolutions"])
    return config


def _u(field, params, z, r, t, augment=None):
    told = Condition(jnp.full(len(z), NO_LABEL), augment=augment)
    return field(params, z, r=r, t=t, condition=told).u


@pytest.mark.parametrize("path", sorted(FOLDER.glob("unet*.npz")), ids=lambda path: path.stem)
def test_reference_unet_has_the_recorded_values_loss_and_gradients(path):
    meta, case, params, theirs = load_case(path)
    config, num = _config(meta["model"]), len(case["in/x"])
    config.weight.p, config.weight.c = (meta["objective"][f"norm_{k}"] for k in ("p", "eps"))
    field = as_field(make_network(config, DataSpec(case["in/x"].shape[1:])))
    case |= {"in/y": np.full(num, NO_LABEL), "in/dropped": np.zeros(num, bool)}
    draws, names = draws_of(meta, case), ("x", "e", "r", "t", "augment")
    x, noise, r, t, told = (jnp.asarray(case[f"in/{name}"]) for name in names)
    z, e = interpolate(x, noise, t=t), jnp.asarray(case["sample/e"])
    ends = jnp.ones(len(e))
    asked = (z, r, t, told), (z, r, t, 0 * told), (e, 0 * ends, ends, 0 * told[: len(e)])

    @jax.jit
    def run(params, draws, *asked):
        loss = jax.value_and_grad(lambda p: make_objective(config).loss(field, p, draws)[0])
        return _u(field, params, *asked), *loss(params)

    with jax.default_matmul_precision("highest"):
        u, loss, ours = run(params, draws, *map(jnp.concatenate, zip(*asked, strict=True)))
    assert_close(loss, case["out/loss"], "loss")
    assert_close(u[:num], case["out/u"], "u")
    assert_close(u[num : 2 * num], case["out/u_without_augment"], "u without augmentation")
    assert_close(e - u[2 * num :], case["sample/one_step"], "sample")
    assert_gradients(ours, theirs)


def test_reference_unet_is_loaded_from_a_checkpoint_and_goes_back(tmp_path, capsys):
    """Every average that the file holds; the buffers of filters beside them are left out."""
    case = np.load(FILE.with_name("py_meanflow.npz"))
    config = _config(json.loads(str(case["meta"]))["config"], FILE)
    generator = load_initial(config)
    assert "weights of py_meanflow" in capsys.readouterr().out
    field = jax.jit(as_field(generator.network))
    inputs = [jnp.asarray(case[f"in/{name}"]) for name in ("z", "r", "t")]
    for recorded in (name.removeprefix("out/") for name in case if name.startswith("out/")):
        which = recorded.removesuffix("_augmented")
        told = () if which == recorded else (jnp.asarray(case["in/augment"]),)
        params = load_published(FILE, "py_meanflow", generator.params, section=which)
        if which == "net_ema":  # the average that is taken unless another is named
            jax.tree.map(np.testing.assert_array_equal, params, generator.params)
        with jax.default_matmul_precision("highest"):
            assert_close(_u(field, params, *inputs, *told), case[f"out/{recorded}"], recorded)
    generator.export(tmp_path / "weights.safetensors", kind="py_meanflow")
    stored, ours = (
        read_published(path, "py_meanflow") for path in (FILE, tmp_path / "weights.safetensors")
    )
    stored = {name: array for name, array in stored.items() if "resample_filter" not in name}
    jax.tree.map(np.testing.assert_array_equal, ours, stored)
    for key, value, message in (
        ("init.which", "net_ema3", "section='net_ema3': must be, .* one of .*net_ema2"),
        ("data.augment", "none", "left over: map_augment.weight"),
    ):
        config.update_from_flattened_dict({key: value})
        refuses(message, load_initial, config)
        config.init.which = ""


def test_pictures_move_as_their_labels_say():
    """A picture of places shows where each pixel comes from, but for what the edges mirror."""
    key, pictures = jax.random.key(0), np.broadcast_to(PLACES, (4000, *PLACES.shape))
    x, labels = map(np.asarray, jax.jit(augmented)(key, pictures))
    shares = (labels != 0).mean(axis=0)
    np.testing.assert_allclose(shares, [0.5, 0.12, 0.12, 0.06, 0.12, 0.12], atol=0.02)
    np.testing.assert_allclose(labels[:, [1, 4, 5]].std(axis=0), 0.12**0.5, atol=0.04)
    x = np.where(labels[:, 0, None, None, None] == 1, x * [-1, 1], x)
    still, large = ~labels[:, 1:].any(axis=1), np.abs(labels).max(axis=1) > 1.5
    assert (x[still] == PLACES).all()
    middle, (a, along, across, *shift) = slice(SIDE // 2 - 1, SIDE // 2 + 1), labels[:, 1:].T
    inner = x[:, middle, middle]
    slopes = [np.diff(inner, axis=axis).mean(axis=(1, 2)) for axis in (2, 1)]
    matrix, longer = np.stack(slopes, axis=-1), 2 ** (0.2 * np.hypot(along, across))
    centre = -np.einsum("nij,jn->ni", matrix, np.array(shift) * SIDE / 8)
    for ours, expected in (
        (np.trace(matrix, axis1=1, axis2=2), 2 ** (-0.2 * a) * (longer + 1 / longer)),
        (np.linalg.det(matrix), 2 ** (-0.4 * a)),
        (inner.mean(axis=(1, 2)), centre),
    ):
        np.testing.assert_allclose(ours[~still & ~large], expected[~still & ~large], atol=0.05)


def test_each_row_is_told_its_own_labels_and_a_step_repeats_them():
    config = cifar10.get_config()
    config.train.batch_size = 64
    draw = jax.jit(step_parts(config, Noise(DataSpec(PLACES.shape))).draw)
    batch = np.broadcast_to(PLACES, (64, *PLACES.shape)), jnp.full(64, NO_LABEL)
    first, again, other = (draw(step, *batch) for step in (3, 3, 4))
    for a, b in zip(*map(jax.tree.leaves, (first, again)), strict=True):
        np.testing.assert_array_equal(a, b)
    assert not np.array_equal(first.interval.augment, other.interval.augment)
    for rows, size in ((first.instant, 16), (first.interval, 48)):
        mirrored = jnp.diff(rows.x[:, SIDE // 2, SIDE // 2 :, 0])[:, 0] < 0
        assert rows.augment.shape == (size, 6)
        np.testing.assert_array_equal(mirrored, rows.augment[:, 0] == 1)
