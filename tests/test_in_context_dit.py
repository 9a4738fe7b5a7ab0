"""InContextDiT: the recorded outputs and sizes of the published networks, what it is told, and its second head."""

import functools
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict
from recorded import FOLDER

from mf_jax.errors import BadInput
from mf_jax.flow.paths import interpolate
from mf_jax.flow.records import NO_LABEL, Condition, GuidanceScale
from mf_jax.models import SIZES, DataPrediction, InContextDiT, as_field, initial_params
from mf_jax.models.in_context_dit import rotary_angles
from mf_jax.published.names import from_published

CASES = sorted([*FOLDER.glob("imf_*.npz"), *FOLDER.glob("pmf_*.npz")])
COUNTS = json.loads((FOLDER / "parameter_counts.json").read_text())
IN_CONTEXT_COUNTS = {
    name: count for name, count in COUNTS.items() if name.startswith(("imf", "pmf"))
}
TOLERANCE = 1e-5  # relative to the norm
SMALL = {
    "patch_size": 2,
    "depth": 2,
    "width": 16,
    "num_heads": 2,
    "head_depth": 1,
    "num_classes": 3,
}
PIXEL = {"bottleneck": 5, "positions": "grid"}
SHAPE = (4, 6, 3)
each_variant = pytest.mark.parametrize("variant", [{}, PIXEL], ids=["latent", "pixel"])


def _size(tree):
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def _names(tree):
    return set(flatten_dict(tree, sep="/"))


@functools.cache
def _build(settings):
    network = InContextDiT(**{**SMALL, **dict(settings)})
    shapes = jax.eval_shape(lambda key: initial_params(network, SHAPE, key), jax.random.key(0))
    random = np.random.default_rng(1)
    drawn = {
        name: jnp.asarray(
            name.endswith("scale") + 0.3 * random.standard_normal(leaf.shape), jnp.float32
        )
        for name, leaf in flatten_dict(shapes, sep="/").items()
    }
    return network, jax.jit(as_field(network)), shapes, unflatten_dict(drawn, sep="/")


def _network(**settings):
    """Return the field of a small network, the shapes of its parameters and random ones."""
    return _build(tuple(sorted(settings.items())))[1:]


@functools.cache
def _build_fresh(settings):
    return initial_params(_build(settings)[0], SHAPE, jax.random.key(0))


def _fresh(**settings):
    """Return the fresh parameters of a small network."""
    return _build_fresh(tuple(sorted(settings.items())))


def _predict(field, params, z=None, *, r=0.2, t=0.7, label=1, guidance=(2.0, 0.1, 0.9)):
    if z is None:
        z = jax.random.normal(jax.random.key(2), (3, *SHAPE))
    told = guidance and GuidanceScale(*(jnp.full(len(z), value) for value in guidance))
    condition = Condition(jnp.full(len(z), label), guidance=told)
    return field(params, z, r=jnp.full(len(z), r), t=jnp.full(len(z), t), condition=condition)


def _recorded_network(meta):
    model, pixel = meta["model"], meta["kind"] == "pmf"
    network = InContextDiT(
        patch_size=model["patch_size"],
        depth=model["depth"],
        width=model["hidden_size"],
        num_heads=model["num_heads"],
        head_depth=model["aux_head_depth"],
        num_classes=model["num_classes"],
        bottleneck=128 if pixel else 0,
        positions="grid" if pixel else "sequence",
    )
    return DataPrediction(network) if pixel else network


def test_recorded_cases_are_there():
    kinds = {path.name.split("_")[0] for path in CASES}
    assert kinds == {"imf", "pmf"}, f"imf_*.npz and pmf_*.npz are not both in {FOLDER}"


@pytest.mark.parametrize("path", CASES, ids=lambda p: p.stem)
def test_recorded_outputs(path):
    case = dict(np.load(path))
    meta = json.loads(str(case["meta"]))
    prefix = "params/net/"
    params = from_published(
        meta["kind"], {k.removeprefix(prefix): v for k, v in case.items() if k.startswith(prefix)}
    )
    x, e, r, t, labels, *guidance = (
        jnp.asarray(case[f"in/{name}"])
        for name in ("x", "e", "r", "t", "y", "omega", "t_min", "t_max")
    )
    network = _recorded_network(meta)
    fresh = jax.eval_shape(lambda key: initial_params(network, x.shape[1:], key), jax.random.key(0))
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, fresh)
    with jax.default_matmul_precision(meta["matmul_precision"]):
        condition = Condition(labels, guidance=GuidanceScale(*guidance))
        ours = jax.jit(as_field(network))(
            params, interpolate(x, e, t=t), r=r, t=t, condition=condition
        )
    for name in ("u", "v"):
        theirs = case[f"out/{name}"]
        error = np.linalg.norm(getattr(ours, name) - theirs) / np.linalg.norm(theirs)
        assert error < TOLERANCE, f"{name}: relative error {error:.2e}"


def _published_network(name, *, second_head):
    """Return the network and data shape of a published name, e.g. pmfDiT_B_16."""
    kind, size, patch = name.split("_")
    pixel = kind == "pmfDiT"
    sizes = SIZES["in_context_dit"]["pixel_" * pixel + size]
    network = InContextDiT(
        patch_size=int(patch), num_classes=1000, second_head=second_head, **sizes
    )
    return network, (16 * int(patch), 16 * int(patch), 3 if pixel else 4)


@pytest.mark.parametrize("name", sorted({name.split(":")[0] for name in IN_CONTEXT_COUNTS}))
def test_parameter_counts(name):
    network, shape = _published_network(name, second_head=True)
    params = jax.eval_shape(lambda key: initial_params(network, shape, key), jax.random.key(0))
    assert _size(params) == COUNTS[f"{name}:training"]
    head = params.pop("v_head")
    # published imf networks keep the output layer of the second head in sampling, where nothing reads it
    dead = _size([head["norm"], head["final"]]) if name.startswith("imf") else 0
    assert _size(params) + dead == COUNTS[f"{name}:sampling"]


def test_every_size_is_counted():
    counted = {name.split("_")[1] for name in IN_CONTEXT_COUNTS if name.startswith("imf")}
    pixel = {"pixel_" + name.split("_")[1] for name in IN_CONTEXT_COUNTS if name.startswith("pmf")}
    assert set(SIZES["in_context_dit"]) - {"digits"} == counted | pixel


@each_variant
def test_sampling_builds_no_second_head_and_predicts_the_same_u(variant):
    field, params, drawn = _network(**variant)
    sampling_field, sampling_params, _ = _network(**variant, second_head=False)
    lacking = _names(params) - _names(sampling_params)
    assert _names(sampling_params) < _names(params)
    assert lacking == {name for name in _names(params) if name.startswith("v_head/")}
    both, alone = _predict(field, drawn), _predict(sampling_field, drawn)
    assert alone.v is None
    assert jnp.abs(both.v - both.u).max() > 1e-3
    np.testing.assert_allclose(alone.u, both.u, rtol=1e-5, atol=1e-6)


@each_variant
def test_a_fresh_network_predicts_zero(variant):
    field, _, _ = _network(**variant)
    prediction = _predict(field, _fresh(**variant))
    assert jnp.all(prediction.u == 0)
    assert jnp.all(prediction.v == 0)


def test_fresh_gates_close_the_blocks():
    gates = {
        name: leaf
        for name, leaf in flatten_dict(_fresh(), sep="/").items()
        if name.endswith("_gate")
    }
    assert len(gates) == 2 * (SMALL["depth"] + SMALL["head_depth"])
    assert all(jnp.all(leaf == 0) and leaf.shape == (SMALL["width"],) for leaf in gates.values())


def test_fresh_weights_have_the_published_scale():
    params = _fresh(width=64, num_heads=2)
    width = 64
    for name, std in (
        ("block_0/attention/query/kernel", 0.32 * width**-0.5),
        ("block_0/contract/kernel", 0.32 * int(width * 8 / 3) ** -0.5),
        ("class_tokens/tokens", width**-0.5),
        ("h_tokens/tokens", width**-0.5),
        ("class_tokens/embedding/embedding", width**-0.5),
    ):
        leaf = flatten_dict(params, sep="/")[name]
        assert abs(float(leaf.std()) / std - 1) < 4 / leaf.size**0.5, name


@each_variant
def test_everything_told_changes_both_predictions(variant):
    field, _, drawn = _network(**variant)
    base = _predict(field, drawn)
    told = [{"label": label} for label in (0, 2, NO_LABEL)]
    told += [
        {"guidance": changed} for changed in ((3.0, 0.1, 0.9), (2.0, 0.3, 0.9), (2.0, 0.1, 0.7))
    ]
    others = [_predict(field, drawn, **change) for change in [*told, {"r": 0.4}]]
    for i, a in enumerate(others):
        for b in (base, *others[:i]):
            assert jnp.abs(a.u - b.u).max() > 1e-4
            assert jnp.abs(a.v - b.v).max() > 1e-4


def test_it_is_told_only_the_difference_of_the_times():
    field, _, drawn = _network()
    np.testing.assert_allclose(
        _predict(field, drawn, r=0.1, t=0.6).u, _predict(field, drawn, r=0.4, t=0.9).u, atol=1e-5
    )


def test_no_guidance_is_omega_1_in_the_whole_interval():
    field, _, drawn = _network()
    told = _predict(field, drawn, guidance=(1.0, 0.0, 1.0))
    np.testing.assert_array_equal(_predict(field, drawn, guidance=None).u, told.u)


@each_variant
def test_unconditional_network_has_no_class_tokens(variant):
    field, params, drawn = _network(**variant, num_classes=0)
    _, conditional, _ = _network(**variant)
    assert set(conditional) - set(params) == {"class_tokens"}
    np.testing.assert_array_equal(
        _predict(field, drawn, label=2).u, _predict(field, drawn, label=NO_LABEL).u
    )


@each_variant
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_output_and_parameters_are_float32(variant, dtype):
    field, params, drawn = _network(**variant, dtype=dtype)
    prediction = _predict(field, drawn)
    assert prediction.u.shape == prediction.v.shape == (3, *SHAPE)
    assert prediction.u.dtype == prediction.v.dtype == jnp.float32
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(params))


@each_variant
def test_bfloat16_is_really_used_and_close(variant):
    field, _, drawn = _network(**variant)
    rough, _, _ = _network(**variant, dtype="bfloat16")
    exact, coarse = _predict(field, drawn), _predict(rough, drawn)
    for name in ("u", "v"):
        a, b = getattr(exact, name), getattr(coarse, name)
        assert 1e-4 < float(jnp.linalg.norm(a - b) / jnp.linalg.norm(a)) < 0.05


def test_only_the_embeddings_multiply_matrices_in_float32():
    field, shapes, _ = _network(dtype="bfloat16")
    program = str(
        jax.make_jaxpr(lambda params: _predict(field, params, jnp.zeros((1, *SHAPE))))(shapes)
    )
    assert (
        "bf16[1,26,16] = dot_general" in program
    )  # linear layers, on 20 tokens told and 6 patches
    assert (
        len(re.findall(r"f32\[[\d,]*\] = dot_general", program)) == 2 * 4
    )  # two layers for each number told


@each_variant
def test_no_parameter_is_dead(variant):
    field, _, drawn = _network(**variant)
    weights = jax.random.normal(jax.random.key(3), (2, 3, *SHAPE))

    def value(params):
        prediction = _predict(field, params)
        return jnp.sum(weights[0] * prediction.u + weights[1] * prediction.v)

    gradients = flatten_dict(jax.jit(jax.grad(value))(drawn), sep="/")
    assert [name for name, leaf in gradients.items() if not jnp.abs(leaf).max() > 1e-6] == []


@each_variant
def test_it_sees_every_pixel_in_its_place(variant):
    """Each output depends on each input, and swapping two patches of the input is not swapping them in the output."""
    field, _, drawn = _network(**variant)
    z = jax.random.normal(jax.random.key(2), SHAPE)
    jacobian = jax.jit(jax.jacobian(lambda z: _predict(field, drawn, z[None]).u[0]))(z)
    assert float(jnp.abs(jacobian).min()) > 0
    swapped = z.at[:2, :2].set(z[:2, 2:4]).at[:2, 2:4].set(z[:2, :2])
    u, u_swapped = (_predict(field, drawn, value[None]).u[0] for value in (z, swapped))
    assert not np.allclose(u[:2, :2], u_swapped[:2, 2:4], atol=1e-3)


@each_variant
def test_it_writes_each_patch_where_it_read_it(variant):
    """Without blocks an output pixel sees its own patch alone."""
    field, _, drawn = _network(**variant, depth=0, head_depth=0)
    z = jax.random.normal(jax.random.key(2), (1, *SHAPE))
    gradient = jax.grad(lambda z: _predict(field, drawn, z).u[0, 1, 4, 0])(z)
    expected = np.zeros(SHAPE, bool)
    expected[0:2, 4:6] = True
    np.testing.assert_array_equal(np.abs(gradient[0]) > 1e-6, expected)


def test_rotary_angles_tell_the_difference_of_positions():
    more = {"num_prefix": 3, "rows": 2, "columns": 5, "head_width": 8}
    line, grid = (rotary_angles(positions, **more) for positions in ("sequence", "grid"))
    assert line.shape == grid.shape == (13, 4)
    np.testing.assert_allclose(line[12] - line[7], line[5])
    assert np.all(grid[:3] == 0), "what is told has no place on the grid"
    patches = grid[3:].reshape(2, 5, 4)
    np.testing.assert_allclose(patches[1, 4], [1, 1e-2, 4, 4e-2])
    np.testing.assert_allclose(line[4], [4, 4e-1, 4e-2, 4e-3])


def test_data_prediction_is_the_network_read_as_velocity():
    network = InContextDiT(**SMALL)
    field, params, drawn = _network()
    wrapped = DataPrediction(network, t_clip=0.25)
    fresh = jax.eval_shape(lambda key: initial_params(wrapped, SHAPE, key), jax.random.key(0))
    assert jax.tree.map(jnp.shape, fresh) == jax.tree.map(jnp.shape, params)
    z = jax.random.normal(jax.random.key(2), (3, *SHAPE))
    read_as_velocity = jax.jit(as_field(wrapped))
    for t, divisor in ((0.5, 0.5), (0.1, 0.25)):
        x = _predict(field, drawn, z, r=0.0, t=t)
        velocity = _predict(read_as_velocity, drawn, z, r=0.0, t=t)
        np.testing.assert_allclose(velocity.u, (z - x.u) / divisor, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(velocity.v, (z - x.v) / divisor, rtol=1e-4, atol=1e-5)
    alone = DataPrediction(InContextDiT(**SMALL, second_head=False))
    assert _predict(as_field(alone), drawn, z).v is None


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"positions": "gird"}, "positions='gird'.*sequence, grid.*did you mean grid"),
        ({"patch_size": 4}, "patch_size=4: must divide the image size 4x6"),
        ({"patch_size": 0}, "patch_size=0"),
        ({"head_depth": 3}, "head_depth=3: must be from 0 to depth=2"),
        ({"head_depth": -1}, "head_depth=-1"),
        ({"width": 18}, "width=18: must be a multiple of 4 for num_heads=2"),
        ({"width": 12, "positions": "grid"}, "width=12: must be a multiple of 8"),
        ({"num_heads": 0}, "num_heads=0"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(settings, message):
    with pytest.raises(BadInput, match=message):
        initial_params(InContextDiT(**{**SMALL, **settings}), SHAPE, jax.random.key(0))
