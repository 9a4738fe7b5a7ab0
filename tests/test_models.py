"""Networks: shapes, types, conditions, nothing in them is dead; then what is special."""

import jax
import jax.numpy as jnp
import networks
import numpy as np
import pytest
from conftest import refuses
from flax.traverse_util import flatten_dict, unflatten_dict
from networks import CASES, GUIDANCE, IMAGE, LABELS, ORDER, ROWS, TIMES, answers, draw
from oracle import gaussian_average

from mf_jax import models
from mf_jax.flow.records import NO_LABEL, Condition
from mf_jax.models import as_field, layers, parameter_shapes, unet
from mf_jax.models.dit import DECOUPLED, num_r_blocks
from mf_jax.models.unet import drop_out


@pytest.mark.parametrize("name", CASES)
def test_a_network_is_told_everything_and_wastes_nothing(name):
    (network, shape), out = CASES[name], answers(name)
    exact, in_context = out.exact, name in ("in_context_dit", "pixel")

    def check_types(exact, coarse):
        assert exact.shape == coarse.shape == (len(ROWS), *shape)
        assert exact.dtype == coarse.dtype == jnp.float32
        assert 1e-4 < np.linalg.norm(exact - coarse) / np.linalg.norm(exact) < 0.05, "bfloat16"

    jax.tree.map(check_types, exact, out.coarse)
    for params in (out.fresh_params, parameter_shapes(network.clone(dtype="bfloat16"), shape)):
        assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(params))
    assert not any(map(np.any, jax.tree.leaves(out.fresh))), "a fresh network predicts zero"
    told = ["base", *LABELS, *TIMES, *(GUIDANCE if in_context else ()), "corner"]
    for head in ("u", "v") if in_context else ("u",):
        networks.assert_apart(exact, told, head=head)
    assert not in_context or np.abs(exact.u - exact.v).max() > 1e-3
    for row in ["both times"] if in_context else [*GUIDANCE, "no guidance"]:
        np.testing.assert_allclose(exact.u[ORDER[row]], exact.u[0], rtol=1e-4, atol=1e-4)
    # rows do not see one another
    np.testing.assert_allclose(out.turned.u, exact.u, rtol=1e-4, atol=1e-4)
    for derivative, quotient in zip(out.derivative, out.quotient, strict=True):  # with dropout
        if quotient is not None:
            assert np.linalg.norm(quotient) > 1
            assert np.linalg.norm(derivative - quotient) / np.linalg.norm(quotient) < 0.01
    for path, slope in flatten_dict(out.gradient, sep="/").items():
        told_share = 0 if name == "unet" and "qkv" not in path else 0.5
        dead = np.mean(np.asarray(slope) == 0)
        assert dead <= told_share, f"{path}: {dead:.0%} without a gradient"
    if shape == IMAGE:  # every output sees every corner, in its place
        assert np.abs(exact.u[ORDER["corner"]] - exact.u[0]).min() > 0
        assert not np.allclose(exact.u[0, :2, :2], exact.u[ORDER["swapped"], :2, 2:4], atol=1e-3)


def test_classes_of_networks_say_what_they_can():
    """Without classes they have no parameters for these."""
    for network, shape in CASES.values():
        names = set(flatten_dict(parameter_shapes(network, shape), sep="/"))
        less = set(flatten_dict(parameter_shapes(network.clone(num_classes=0), shape), sep="/"))
        assert names - less
        assert all("label_embedding" in name or "class_tokens" in name for name in names - less)
    for kind, names in {
        "images": ["dit", "in_context_dit", "unet", "affine", "low_rank"],
        "vectors": ["mlp", "affine", "low_rank"],
        "signals": ["dit", "mlp"],
    }.items():
        assert [name for name, network in models.NETWORKS.items() if kind in network.takes] == names
    told = [name for name, network in models.NETWORKS.items() if network.guidance_inputs]
    heads = [name for name, (network, _) in CASES.items() if network.second_head]
    assert (told, heads) == (["dit", "in_context_dit"], ["in_context_dit", "pixel"])
    for name, rows in models.SIZES.items():
        for row in rows.values():
            models.NETWORKS[name](patch_size=2, num_classes=0, **row)


def test_time_conditioning_tells_what_its_name_says():
    letters = {"t": "t_embedding", "r": "r_embedding", "t-r": "h_embedding"}
    r, t = jnp.array([0.2, 0.3, 0.3, 0.2]), jnp.array([0.7, 0.8, 0.7, 0.8])
    for conditioning in layers.TIME_CONDITIONINGS:
        names = {letters[name] for name in conditioning.split(",")}
        embed = layers.ConditionEmbedding(8, conditioning, 0)
        inputs = {"r": r, "t": t, "labels": jnp.zeros(4, int)}
        out, variables = embed.init_with_output(jax.random.key(0), **inputs)
        assert set(variables["params"]) == names
        both, only_r, only_t = (np.abs(out[i] - out[0]).max() < 1e-6 for i in (1, 2, 3))
        assert both == (conditioning == "t-r"), "only t - r alone is blind to a shift of both"
        assert only_r == (conditioning == "t"), "only t alone is blind to r"
        assert not only_t
    names, told = {"t_embedding", "r_embedding"}, {"time_conditioning": "t,r"}
    network, shape = CASES["unet"]  # which embeds them side by side
    shapes = parameter_shapes(network.clone(**told), shape)
    assert shapes["condition"]["hidden"]["kernel"].shape[0] == 2 * network.channels * len(names)
    for name in ("dit", "mlp", "affine", "low_rank"):
        network, shape = CASES[name]
        shapes = parameter_shapes(network.clone(**told), shape)
        assert set((shapes.get("offset") or shapes)["condition"]) == names | {"label_embedding"}
        for part in shapes.keys() & {"matrix", "left", "right"}:
            assert set(shapes[part]["condition"]) == names, "a matrix is not told the class"
    decoupled = CASES["mlp"][0].clone(time_conditioning=DECOUPLED)
    refuses(r"time_conditioning='t\|r': must be one of t,r", parameter_shapes, decoupled, (2,))


def test_times_are_not_scaled_by_1000_and_patches_are_cut_row_by_row_and_put_back():
    slope = jax.jacobian(lambda t: layers.sinusoidal_features(t))(jnp.array([0.3]))
    assert float(jnp.abs(slope).max()) <= 1.0
    z = np.arange(2 * 4 * 6 * 3, dtype=np.float32).reshape(2, 4, 6, 3)
    patches = layers.patches_of(jnp.asarray(z), 2)
    assert patches.shape == (2, 6, 12)
    np.testing.assert_array_equal(patches[1, 2], z[1, :2, 4:].ravel())
    np.testing.assert_array_equal(patches[1, 3], z[1, 2:, :2].ravel())
    np.testing.assert_array_equal(layers.image_of(patches, z.shape, 2), z)


def test_first_blocks_of_a_decoupled_dit_see_t_and_last_ones_r():
    """A block whose modulation is made constant is deaf to the times."""
    network = CASES["dit"][0].clone(depth=3, r_blocks=2, time_conditioning=DECOUPLED)
    run = jax.jit(as_field(network))
    drawn, z = draw(network, IMAGE), jnp.ones((1, *IMAGE))
    modulations = [*((f"block_{i}", "modulation") for i in range(3)), ("final_modulation",)]

    def u(run, params, r, t):
        times = {"r": jnp.full(1, r), "t": jnp.full(1, t)}
        return run(params, z, **times, condition=Condition(jnp.ones(1, int))).u

    for heard in modulations:  # alone
        params = flatten_dict(drawn)
        for name in set(modulations) - {heard}:
            params[*name, "kernel"] = np.zeros_like(params[*name, "kernel"])
        us = [u(run, unflatten_dict(params), *at) for at in ((0.2, 0.7), (0.2, 0.8), (0.1, 0.7))]
        changed = [not np.array_equal(us[0], other) for other in us[1:]]
        assert changed == [heard == modulations[0], heard != modulations[0]]
    flow = jax.jit(as_field(network.clone(time_conditioning="t")))
    np.testing.assert_array_equal(u(run, drawn, 0.7, 0.7), u(flow, drawn, 0.7, 0.7))
    assert not np.allclose(u(run, drawn, 0.2, 0.7), u(flow, drawn, 0.2, 0.7), atol=1e-3)

    assert [num_r_blocks(depth, 0) for depth in (2, 4, 5, 12, 28)] == [1, 1, 2, 3, 7]
    for depth, r_blocks in [(1, 0), (4, 4), (4, 5), (4, -1)]:
        message = f"model.r_blocks={r_blocks}: must be .*depth={depth}"
        refuses(message, num_r_blocks, depth, r_blocks)


def test_sampling_builds_no_second_head_and_predicts_the_same_u_without_guidance():
    network, shape = CASES["in_context_dit"]
    sampling = network.clone(second_head=False)
    params, exact = draw(network, shape), answers("in_context_dit").exact
    assert parameter_shapes(sampling, shape).keys() == params.keys() - {"v_head"}
    (r, t, condition), i = networks.inputs(), ORDER["no guidance"]
    condition = Condition(condition.labels)
    field, z = jax.jit(as_field(sampling)), networks.make_z(shape)
    alone = field(params, z, r=r, t=t, condition=condition)
    assert alone.v is None
    np.testing.assert_allclose(alone.u[i], exact.u[i], rtol=1e-4, atol=1e-5)


def test_fresh_gates_close_the_blocks_and_weights_have_the_published_scale():
    params = flatten_dict(answers("in_context_dit").fresh_params, sep="/")
    assert not any(np.any(leaf) for name, leaf in params.items() if name.endswith("_gate"))
    width = 32
    for name, std in (
        ("block_0/attention/query/kernel", 0.32 * width**-0.5),
        ("block_0/contract/kernel", 0.32 * int(width * 8 / 3) ** -0.5),
        ("class_tokens/tokens", width**-0.5),
        ("h_tokens/tokens", width**-0.5),
        ("class_tokens/embedding/embedding", width**-0.5),
    ):
        assert abs(params[name].std() / std - 1) < 4 / params[name].size ** 0.5, name


@pytest.mark.parametrize(("name", "rank"), [("affine", 6), ("low_rank", 2)])
def test_baselines_are_affine_in_z_of_their_rank_and_start_with_a_gradient(name, rank):
    network, shape = CASES[name]
    drawn, run = draw(network, shape), jax.jit(as_field(network))

    def u(z, label, params=drawn):
        rows = {"r": jnp.full(8, 0.2), "t": jnp.full(8, 0.7)}
        return run(params, z, **rows, condition=Condition(jnp.full(8, label))).u.reshape(8, -1)

    z = np.concatenate([np.zeros((1, 6)), np.eye(6), np.linspace(-2, 1, 6)[None]], dtype=np.float32)
    z = jnp.asarray(z.reshape(8, *shape))
    out = np.asarray(u(z, 1))
    matrix = out[1:7] - out[0]
    expected = out[0] + np.linspace(-2, 1, 6) @ matrix
    np.testing.assert_allclose(out[7], expected, rtol=1e-4, atol=1e-4)
    assert np.linalg.matrix_rank(matrix, tol=1e-4) == rank
    assert np.abs(out[0]).max() > 0.01, "b is missing"
    other = np.asarray(u(z, NO_LABEL))
    np.testing.assert_allclose(other[1:7] - other[0], matrix, atol=1e-5)
    slope = jax.grad(lambda params: jnp.sum(u(z, 1, params)))(answers(name).fresh_params)
    first = {"affine": "matrix", "low_rank": "left"}[name]
    assert np.abs(slope[first]["out"]["kernel"]).max() > 0


def test_baselines_are_exact_on_gaussian_data():
    r, t, mean, shape = 0.2, 0.7, 0.5, (2, 3, 1)
    z, times = jax.random.normal(jax.random.key(0), (4, *shape)), jnp.ones(4)
    offset, end = gaussian_average(np.array([0.0, 1.0], np.float32), r, t, mean)
    one, row = np.eye(6).ravel(), {"r": r * times, "t": t * times}
    for name, more, biases in (
        ("affine", {}, {"matrix": (end - offset) * one}),
        ("low_rank", {"rank": 6}, {"left": (end - offset) * one, "right": one}),
    ):
        network = CASES[name][0].clone(num_classes=0, **more)
        params = jax.tree.map(np.zeros_like, draw(network, shape))
        for part, bias in (biases | {"offset": np.full(6, offset)}).items():
            params[part]["out"]["bias"] += np.float32(bias)
        field = jax.jit(as_field(network))
        u = field(params, z, **row, condition=Condition(jnp.zeros(4, int))).u
        np.testing.assert_allclose(u, gaussian_average(z, r, t, mean), rtol=1e-4, atol=1e-5)


def test_a_fresh_block_adds_nothing_and_every_block_has_its_own_dropout(monkeypatch):
    blocks = [block for block in answers("unet").fresh_params.values() if "conv_2" in block]
    outs = [block["attention"]["out"]["kernel"] for block in blocks if "attention" in block]
    assert (len(blocks), len(outs)) == (10, 3), "attention on the way down, in the middle, and up"
    assert not any(np.any(out) for out in [*outs, *(block["conv_2"]["kernel"] for block in blocks)])
    networks.assert_apart(answers("unet").exact, ["base", "seed"])
    seen, (network, shape) = [], CASES["unet"]
    note = lambda x, seeds, *, layer, rate: seen.append((layer, rate)) or x  # noqa: E731
    monkeypatch.setattr(unet, "drop_out", note)
    parameter_shapes(network.clone(num_classes=4), shape)  # which nobody has traced
    assert seen == [(layer, 0.3) for layer in range(10)]


def test_masks_drop_the_share_keep_the_mean_and_differ():
    seeds, x = jnp.arange(4, dtype=jnp.uint32), jnp.full((4, 50, 50), 2.0)
    out = np.asarray(drop_out(x, seeds, layer=1, rate=0.2))
    kept = out != 0
    np.testing.assert_allclose(out[kept], 2.0 / 0.8, rtol=1e-6)
    np.testing.assert_allclose(kept.mean(axis=(1, 2)), 0.8, atol=0.04)  # five standard deviations
    for other in (drop_out(x, seeds, layer=2, rate=0.2) != 0, np.roll(kept, 1, axis=0)):
        np.testing.assert_allclose((kept & other).mean(axis=(1, 2)), 0.64, atol=0.05)
    np.testing.assert_array_equal(out[2:3], drop_out(x[2:3], seeds[2:3], layer=1, rate=0.2))
    assert drop_out(x, None, layer=1, rate=0.2) is drop_out(x, seeds, layer=1, rate=0.0) is x


def test_sizes_that_do_not_fit_are_refused():
    for name, sizes, message in (
        ("pixel", {"positions": "gird"}, "positions='gird'.*sequence, grid.*did you mean grid"),
        ("pixel", {"patch_size": 0}, "patch_size=0: must divide the size 4x6"),
        ("in_context_dit", {"head_depth": 3}, r"head_depth=3: must be within \[0, 2\]"),
        ("in_context_dit", {"width": 18}, "width=18: must be a multiple of 4 for model"),
        ("pixel", {"width": 12}, "width=12: must be a multiple of 8"),
        ("pixel", {"num_heads": 0}, "num_heads=0"),
        ("dit", {"width": 18}, "model.width=18: must be a multiple of 4"),
        ("dit", {"width": 20, "num_heads": 3}, "a multiple of 12 for model.num_heads=3"),
        ("dit", {"num_heads": 0}, "model.num_heads=0"),
        ("dit", {"width": 0}, "model.width=0"),
        ("dit", {"patch_size": 4}, "patch_size=4: must divide the size 4x6"),
        ("dit", {"remat": "all"}, "model.remat='all'.*none, block, dots"),
        ("unet", {"channel_multipliers": (1, 2, 2)}, "channel_mult.*divisible by 4, not 4x6"),
        ("unet", {"channel_multipliers": ()}, "need 1 level or more"),
    ):
        refuses(message, parameter_shapes, CASES[name][0].clone(**sizes), (4, 6, 3))
    small = CASES["unet"][0]
    three = small.clone(channel_multipliers=(1, 2, 2))
    refuses("divisible by 4, not 6x4", parameter_shapes, three, (6, 4, 3))
    for channels in (2, 36):
        parameter_shapes(small.clone(channels=channels), (6, 8, 3))
