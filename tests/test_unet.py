"""U-Net: the size of the published one, what it is told, dropout that is one function, and its derivatives."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mf_jax.errors import BadInput
from mf_jax.flow.records import NO_LABEL, Condition
from mf_jax.models import UNet, as_field, initial_params
from mf_jax.models.unet import Block, double, drop_out, halve

SHAPE = (4, 8, 3)
SMALL = {
    "channels": 8,
    "channel_multipliers": (1, 2),
    "num_blocks": 1,
    "attention_resolutions": (2,),
}
QUICK = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
"""Most of the time of these tests goes into compiling."""


def _shapes(shape=SHAPE, **more):
    network = UNet(**{"num_classes": 0, **more})
    return jax.eval_shape(lambda key: initial_params(network, shape, key), jax.random.key(0))


@pytest.fixture(scope="module")
def fresh():
    """Return fresh parameters of the small network."""
    key = jax.random.key(0, impl="rbg")  # compiles in a fifth of the default's time
    return initial_params(UNet(**SMALL, num_classes=3), SHAPE, key)


@pytest.fixture(scope="module")
def drawn():
    """Return random parameters of the small network."""
    rng = np.random.default_rng(1)
    shapes = _shapes(**SMALL, num_classes=3)
    return jax.tree.map(lambda p: jnp.asarray(0.3 * rng.normal(size=p.shape), jnp.float32), shapes)


@functools.cache
def _field(**more):
    return QUICK(as_field(UNet(**{**SMALL, "num_classes": 3, **more})))


def _z(rows=3):
    return jax.random.normal(jax.random.key(2), (rows, *SHAPE))


def _u(field, params, z, *, r=0.2, t=0.7, label=1, seeds=None):
    told = {"r": jnp.full(len(z), r), "t": jnp.full(len(z), t)}
    dropout = None if seeds is None else jnp.asarray(seeds, jnp.uint32)
    return field(params, z, **told, condition=Condition(jnp.full(len(z), label), dropout=dropout)).u


def _count(**more):
    return sum(leaf.size for leaf in jax.tree.leaves(_shapes((32, 32, 3), **more)))


def test_has_the_size_of_the_published_network():
    """EDM prints 55,733,891 for its unconditional CIFAR-10 DDPM++, 9 * 128 of them for its augmentation labels."""
    assert _count(time_conditioning="t") == 55_733_891 - 9 * 128
    per_time = 128 * 512 + 512 + 512 * 512 + 512
    assert _count(time_conditioning="t,t-r") == _count(time_conditioning="t") + per_time
    assert _count(num_classes=10) == _count() + 11 * 512


def test_a_fresh_network_predicts_zero(fresh):
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(fresh))
    assert jnp.all(_u(_field(), fresh, _z()) == 0)


def test_a_fresh_block_adds_nothing(fresh):
    blocks = [block for block in fresh.values() if "conv_2" in block]
    assert len(blocks) == 10
    assert all(not np.any(block["conv_2"]["kernel"]) for block in blocks)
    outs = [block["attention"]["out"]["kernel"] for block in blocks if "attention" in block]
    assert len(outs) == 3, "one on the way down, one in the middle, one on the way up"
    assert not any(np.any(out) for out in outs)


@pytest.mark.parametrize(("attention", "share"), [(False, 0.5**0.5), (True, 0.5)])
def test_a_fresh_block_scales_its_input(attention, share):
    """By sqrt(1/2) for each of the sums in it, with the zero of its last layers."""
    block = Block(features=8, layer=0, dropout=0.0, dtype="float32", attention=attention)
    x, c = jax.random.normal(jax.random.key(0), (2, 4, 4, 8)), jnp.ones((2, 5))
    out, _ = QUICK(lambda: block.init_with_output(jax.random.key(0, impl="rbg"), x, c, None))()
    np.testing.assert_allclose(out, share * x, rtol=1e-5)


def test_halving_averages_and_doubling_repeats():
    x = jnp.arange(32.0).reshape(1, 4, 8, 1)
    small = halve(x)
    np.testing.assert_array_equal(small[0, :, :, 0], np.add.outer([4.5, 20.5], [0, 2, 4, 6]))
    np.testing.assert_array_equal(halve(double(small)), small)
    np.testing.assert_array_equal(double(small)[0, 0, :4, 0], [4.5, 4.5, 6.5, 6.5])


def test_labels_and_both_times_change_the_output(drawn):
    z, field = _z(), _field()
    told = [{"label": 0}, {"label": 1}, {"label": 2}, {"label": NO_LABEL}, {"t": 0.8}, {"r": 0.1}]
    outputs = [_u(field, drawn, z, **one) for one in told]
    for i, a in enumerate(outputs):
        assert all(float(jnp.abs(a - b).max()) > 1e-3 for b in outputs[:i])


def test_every_output_sees_opposite_corners(drawn):
    z = jnp.broadcast_to(_z()[0], (3, *SHAPE)).at[1, 0, 0, 0].add(1).at[2, -1, -1, -1].add(1)
    u = _u(_field(), drawn, z)
    assert float(jnp.abs(u[1:] - u[0]).min()) > 0


def test_rows_do_not_see_one_another(drawn):
    z, field = _z(), _field(dropout=0.3)
    u, other = (
        _u(field, drawn, z, seeds=[1, 2, 3]),
        _u(field, drawn, z.at[1].add(1), seeds=[1, 9, 3]),
    )
    np.testing.assert_allclose(u[0], other[0], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(u[2], other[2], rtol=1e-5, atol=1e-5)
    assert float(jnp.abs(u[1] - other[1]).max()) > 1e-3


def test_dropout_is_a_function_of_the_seed(drawn):
    z, field = jnp.broadcast_to(_z()[0], (3, *SHAPE)), _field(dropout=0.3)
    u = _u(field, drawn, z, seeds=[5, 5, 6])
    np.testing.assert_allclose(u[0], u[1], rtol=1e-5, atol=1e-5)
    assert float(jnp.abs(u[0] - u[2]).max()) > 1e-3
    np.testing.assert_array_equal(u, _u(field, drawn, z, seeds=[5, 5, 6]))
    whole = _u(_field(), drawn, z)
    assert float(jnp.abs(u - whole).max()) > 1e-3
    np.testing.assert_array_equal(_u(field, drawn, z), whole, "no seeds, no dropout")
    np.testing.assert_array_equal(
        _u(_field(), drawn, z, seeds=[5, 5, 6]), whole, "rate 0 drops nothing"
    )


def test_masks_drop_the_share_keep_the_mean_and_differ():
    seeds, x = jnp.arange(4, dtype=jnp.uint32), jnp.full((4, 50, 50), 2.0)
    out = drop_out(x, seeds, layer=1, rate=0.2)
    kept = np.asarray(out) != 0
    np.testing.assert_allclose(np.asarray(out)[kept], 2.0 / 0.8, rtol=1e-6)
    np.testing.assert_allclose(kept.mean(axis=(1, 2)), 0.8, atol=0.04)  # five standard deviations
    others = [np.asarray(drop_out(x, seeds, layer=2, rate=0.2)) != 0, np.roll(kept, 1, axis=0)]
    for other in others:
        np.testing.assert_allclose((kept & other).mean(axis=(1, 2)), 0.64, atol=0.05)
    np.testing.assert_array_equal(out[2:3], drop_out(x[2:3], seeds[2:3], layer=1, rate=0.2))


def test_every_block_has_its_own_mask(monkeypatch):
    from mf_jax.models import unet

    layers = []
    monkeypatch.setattr(
        unet, "drop_out", lambda x, seeds, *, layer, rate: layers.append(layer) or x
    )
    _count(**SMALL)
    assert layers == list(range(10))


def test_derivative_agrees_with_differences(drawn):
    """With dropout: were its masks not the same in all three evaluations, the differences would be noise."""
    with jax.enable_x64(True):
        params = jax.tree.map(lambda p: jnp.asarray(p, jnp.float64), drawn)
        rng = np.random.default_rng(3)
        z, dz = jnp.asarray(rng.normal(size=(2, 2, *SHAPE)))
        r, t = jnp.array([0.2, 0.5]), jnp.array([0.7, 0.5])
        condition = Condition(jnp.array([0, NO_LABEL]), dropout=jnp.array([7, 8], jnp.uint32))
        field = as_field(UNet(**SMALL, num_classes=3, dtype="float64", dropout=0.3))

        def u(z, r, t):
            return field(params, z, r=r, t=t, condition=condition).u

        derivative = QUICK(lambda point, direction: jax.jvp(u, point, direction))
        point, one, step = (z, r, t), jnp.ones(2), 1e-5
        for direction in [(dz, 0 * one, 0 * one), (0 * dz, one, 0 * one), (0 * dz, 0 * one, one)]:
            value, slope = derivative(point, direction)
            ends = [
                tuple(p + s * d for p, d in zip(point, direction, strict=True))
                for s in (step, -step)
            ]
            ahead, behind = (derivative(end, direction)[0] for end in ends)
            np.testing.assert_allclose(slope, (ahead - behind) / (2 * step), rtol=1e-5, atol=1e-6)
            assert float(jnp.abs(slope).max()) > 1e-3
            assert value.dtype == jnp.float64


def test_bfloat16_is_really_used_and_close(drawn):
    exact, coarse = (_u(_field(dtype=dtype), drawn, _z()) for dtype in ("float32", "bfloat16"))
    assert coarse.dtype == jnp.float32
    error = float(jnp.linalg.norm(exact - coarse) / jnp.linalg.norm(exact))
    assert 1e-4 < error < 0.05


def test_every_parameter_receives_a_gradient(drawn):
    z, field = _z(4), as_field(UNet(**SMALL, num_classes=3))
    condition = Condition(jnp.array([0, 1, 2, NO_LABEL]), dropout=jnp.arange(4, dtype=jnp.uint32))

    def loss(params):
        u = field(
            params, z, r=jnp.linspace(0, 0.3, 4), t=jnp.linspace(0.4, 1, 4), condition=condition
        ).u
        return jnp.mean((u - z) ** 2)

    for path, slope in jax.tree_util.tree_leaves_with_path(QUICK(jax.grad(loss))(drawn)):
        dead = float(jnp.mean(slope == 0))
        assert dead == 0 or "qkv" in str(path), (
            f"{jax.tree_util.keystr(path)}: {dead:.0%} without a gradient"
        )
        assert dead < 0.5, jax.tree_util.keystr(path)


@pytest.mark.parametrize("channels", [2, 12, 36])
def test_takes_any_number_of_channels(channels):
    assert _shapes(**{**SMALL, "channels": channels})["first"]["kernel"].shape == (
        3,
        3,
        3,
        channels,
    )


@pytest.mark.parametrize("shape", [(6, 8, 3), (8, 6, 3)])
def test_refuses_a_side_that_cannot_be_halved(shape):
    with pytest.raises(
        BadInput, match="channel_multipliers.*divisible by 4.*" + "x".join(map(str, shape[:2]))
    ):
        _shapes(shape, **SMALL | {"channel_multipliers": (1, 2, 2)})
    with pytest.raises(BadInput, match="there must be a first"):
        _shapes(shape, **SMALL | {"channel_multipliers": ()})
