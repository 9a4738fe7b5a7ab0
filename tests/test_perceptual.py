"""The perceptual terms of pixel MeanFlow, against recorded numbers of the published code.

Every size and setting comes from the case's own `meta`. What takes long, the loss and a gradient
through the full-size networks, is recorded in the folder that `MF_REFERENCE_DIR` names alone.
"""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import recorded
import scipy.special
import scipy.stats
from conftest import refuses
from recorded import FOLDER, assert_close, assert_gradients, below, config_of, draws_of
from safetensors.numpy import save_file

from configs import imagenet
from mf_jax.config import make_network, make_objective, make_scheme
from mf_jax.flow.records import DataSpec, Draws, Rows
from mf_jax.loading import load_frozen
from mf_jax.models import as_field
from mf_jax.models.distances import DISTANCES, VGG16, ConvNeXtDistance, ConvNeXtV2, distance_shapes
from mf_jax.objectives.perceptual import Distance, Perceptual, crop
from mf_jax.objectives.terms import AdaptiveWeight
from mf_jax.published.torch_file import StateDict, network_params
from mf_jax.runtime.files import sha256_of

CASE = dict(np.load(FOLDER / "perceptual.npz"))
META = json.loads(str(CASE["meta"]))
SHAPES = json.loads((FOLDER / "perceptual_state_dict.json").read_text())
GRADIENTS = 1e-4  # relative to the largest entry
TOLERANCES = {"loss_full": 1e-2, "loss_small": 1e-3}
SHIFTS = 0, 3e-6, -3e-6
"""A ReLU may lie so near its kink that rounding picks the side: one shift of a picks theirs."""
PAIR = jnp.asarray(CASE["in/a"]), jnp.asarray(CASE["in/b"])


@functools.cache
def distance(name):
    if name == "lpips":
        network, shapes = DISTANCES["lpips"], META["lpips"]["parameters"]
    else:
        sizes = META["convnext"][name]
        network = ConvNeXtDistance(ConvNeXtV2(tuple(sizes["depths"]), tuple(sizes["dims"])))
        shapes = sizes["parameters"] if name == "small" else SHAPES["convnextv2"]
    state = StateDict(name, "", recorded.drawn_weights(shapes, META["seed"]))
    return network, network_params(distance_shapes(network), state)


@pytest.fixture(autouse=True)
def _precision():
    with jax.default_matmul_precision(META["matmul_precision"]):
        yield


def check_distance(prefix, network, params, shifts=(0,)):
    @jax.jit
    @functools.partial(jax.grad, has_aux=True)
    def gradient(a, b, params):
        distances = network.apply({"params": params}, a, b)
        return distances.sum(), distances

    (a, b), theirs = PAIR, CASE[f"{prefix}/gradient/a"]
    found = [gradient(a + s, b, params) for s in shifts]
    assert_close(found[0][1], CASE[f"{prefix}/out/distance"], prefix)
    errors = [np.abs(ours - theirs).max((1, 2, 3)) for ours, _ in found]
    assert np.min(errors, axis=0).max() < GRADIENTS * np.abs(theirs).max(), errors


def test_reference_crops():
    image, box = (jnp.asarray(CASE[f"crop/in/{name}"]) for name in ("image", "box"))
    for side in META["crop_sizes"]:
        ours = crop(image, box, side)
        assert_close(ours, CASE[f"crop/out/{side}"], f"crop to {side}")


def test_reference_lpips():
    network, params = distance("lpips")
    check_distance("lpips", network, params, SHIFTS)
    layers = jax.jit(functools.partial(network.apply, method="layers"))({"params": params}, *PAIR)
    recorded = [name for name in CASE if name.startswith("lpips/out/layer/")]
    for name, ours in zip(recorded, layers, strict=True):
        assert_close(ours, CASE[name], name)
    vgg = jax.jit(VGG16().apply)
    for picture, image in zip("ab", PAIR, strict=True):
        maps = vgg({"params": params["features"]}, image)
        for name, ours in zip(recorded, maps, strict=True):
            at, layer = f"lpips/out/{picture}", name.split("/")[-1]
            assert_close(ours.mean((1, 2)), CASE[f"{at}/mean/{layer}"], "mean")
            if (whole := f"{at}/map/{layer}") in CASE:
                assert_close(ours, CASE[whole], whole)


@pytest.mark.parametrize("size", ["small", pytest.param("base", marks=pytest.mark.slow)])
def test_reference_convnext(size):
    network, params = distance(size)
    prefix = f"convnext_{size}"
    if f"{prefix}/gradient/a" in CASE:
        check_distance(prefix, network, params)
    backbone = jax.jit(network.convnextv2.apply)
    out = backbone({"params": params["convnextv2"]}, jnp.concatenate(PAIR))
    for k, picture in enumerate("ab"):
        features, maps = jax.tree.map(lambda x, k=k: jnp.split(x, 2)[k], out)
        assert_close(features, CASE[f"{prefix}/out/{picture}/features"], prefix)
        for i, x in enumerate(maps):
            if (name := f"{prefix}/out/{picture}/mean/stage{i}") in CASE:
                assert_close(x.mean((1, 2)), CASE[name], name)


def _row(settings, case, params):
    """Return the field and the objective of the shipped row, with the sizes of a recorded loss."""
    sizes, said = META["model"], settings["objective"]
    config = config_of("pmf_b16", sizes, params, remat="none")
    config.perceptual.update(max_t=said["perceptual_max_t"], crop_size=settings["crop_size"])
    objective = make_objective(config)
    ours = {distance.name: distance.factor for distance in objective.perceptual.distances}
    assert ours == {"lpips": said["lpips_weight"], "convnext": said["convnext_weight"]}
    assert (objective.weight.p, objective.weight.c) == (said["norm_p"], said["norm_eps"])
    drawn = {"lpips": distance("lpips"), "convnext": distance(settings["convnext"])}
    distances = [
        each.replace(params={"params": weights}, between=network.apply)
        for each in objective.perceptual.distances
        for network, weights in [drawn[each.name]]
    ]
    frozen = objective.frozen.replace(distances=tuple(distances))
    spec = DataSpec(case["in/x"].shape[1:], sizes["num_classes"])
    return as_field(make_network(config, spec)), objective, frozen


@pytest.mark.parametrize("name", [name for name in TOLERANCES if f"{name}/out/loss" in CASE])
def test_reference_loss_through_the_row(name):
    case, settings = CASE | below(CASE, f"{name}/"), META["losses"][name]
    params, theirs = recorded.trees_of("pmf", case)
    field, shaped, frozen = _row(settings, case, params)
    draws = draws_of(META | settings, case)

    @jax.jit
    def evaluate(params, frozen):
        loss = shaped.with_frozen(frozen).loss
        return jax.value_and_grad(loss, argnums=1, has_aux=True)(field, params, draws)

    (loss, metrics), ours = evaluate(params, frozen)
    assert_close(loss, case["out/loss"], "loss")
    for key in ("lpips", "convnext"):
        assert_close(metrics[key].compute(), case[f"out/metric/aux_loss_{key}"], key)
    assert_gradients(ours, theirs, TOLERANCES[name])


def test_published_files_become_what_the_loss_reads(tmp_path):
    """VGG16's file has a classifier beside, which is left out; the checksum of a path is free."""
    shapes = META["lpips"]["parameters"]
    drawn = recorded.drawn_weights(shapes, META["seed"])
    drawn["classifier.0.bias"] = np.zeros(3, np.float32)
    linear = {name: drawn.pop(name) for name in list(drawn) if name.startswith("lin")}
    config = imagenet.get_config("pmf_b16")
    config.perceptual.convnext, config.perceptual.lpips_weights = 0.0, str(tmp_path)
    frozen = make_objective(config).frozen
    refuses(r"vgg16-397923af.pth: no such file", load_frozen, config, frozen)
    save_file(drawn, tmp_path / "vgg16-397923af.pth")
    save_file(linear, tmp_path / "vgg.pth")
    known, digests = load_frozen(config, frozen)
    vgg16 = tmp_path / "vgg16-397923af.pth"
    assert digests == {"perceptual.lpips_weights": sha256_of(vgg16)}
    (loaded,) = known.distances
    jax.tree.map(np.testing.assert_array_equal, loaded.params["params"], distance("lpips")[1])
    save_file(dict(list(linear.items())[1:]), tmp_path / "vgg.pth")
    refuses(r"missing: lin0.model.1.weight", load_frozen, config, frozen)


def test_batches_change_nothing_and_rows_beyond_the_limit_see_no_network():
    """The distance is NaN for rows beyond the limit; they are 0 all the same, in any batch."""
    rng, count = np.random.default_rng(0), 10
    x, e = (jnp.asarray(rng.normal(size=(count, 8, 8, 3)), jnp.float32) for _ in "xe")
    t = jnp.asarray(np.linspace(0.05, 0.95, count), jnp.float32)
    limit = float(t[4])
    far = jnp.where(t < limit, 1, jnp.nan)[:, None, None, None] * e
    seen = []

    def between(params, a, b):
        jax.debug.callback(lambda: seen.append(len(a)))
        return params * jnp.abs(a - b).sum((1, 2, 3))

    def loss(u, rows_at_once):
        terms = Perceptual((Distance(2.0, "l1", 0.5, between),), limit, 32, rows_at_once)
        box = jnp.tile(jnp.asarray([1, 2, 5, 4]), (count, 1))
        rows = Rows(x=x, e=e, t=t, r=t, dropped=t < 0, box=box)
        parts = [jax.tree.map(lambda a, s=s: a[s], rows) for s in (slice(5), slice(5, None))]
        return terms.loss(Draws(*parts), (u[:5], u[5:]), AdaptiveWeight(p=0.0))[0]

    both = jax.jit(jax.value_and_grad(loss), static_argnums=1)
    values = [both(far, size) for size in (10, 3)]
    jax.effects_barrier()
    assert sum(seen) == 10 + 2 * 3  # of 4 rows, in batches of 3
    (value, slope), (value_again, slope_again) = values
    np.testing.assert_allclose(value_again, value, rtol=1e-5)
    np.testing.assert_allclose(slope_again, slope, rtol=1e-4, atol=1e-6)
    assert np.isfinite(value) & np.isfinite(slope).all()
    assert slope[:4].any(axis=(1, 2, 3)).all()
    assert not slope[4:].any()


def test_boxes_and_times_are_drawn_as_published():
    draws = jax.jit(make_scheme(imagenet.get_config("pmf_h16")).draw)(
        jax.random.key(0), jnp.zeros((4000, 20, 30, 1)), jnp.zeros(4000, jnp.int32)
    )
    top, left, height, width = np.concatenate([draws.instant.box, draws.interval.box]).T
    assert min(top.min(), left.min()) == 0
    assert ((top + height).max(), (left + width).max()) == (20, 30)
    assert 0.08 * 600 * 0.8 < (height * width).min() < 0.1 * 600
    ratio = np.log(width / height)[height < 20]
    assert abs(np.quantile(ratio, [0.02, 0.98]) - np.log([3 / 4, 4 / 3])).max() < 0.05
    for rows in (draws.instant, draws.interval):
        assert 0.95 < rows.e.std() / 2 < 1.05
    t, share = np.asarray(draws.instant.t), 0.1
    normal = scipy.stats.norm.cdf(scipy.special.logit([0.05, 0.95]) / 0.8)
    expected = share * 0.05 + (1 - share) * normal[0]
    assert abs((t < 0.05).mean() - expected) < 0.006
    assert abs(scipy.special.logit(t[(t > 0.05) & (t < 0.95)]).mean()) < 0.05
