"""Networks: shapes, types, what they are told, and that nothing in them is dead."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

from mf_jax.errors import BadInput
from mf_jax.flow.records import NO_LABEL, Condition
from mf_jax.models import MLP, DiT, as_field, initial_params
from mf_jax.models.dit import DECOUPLED, num_r_blocks
from mf_jax.models.layers import TIME_CONDITIONINGS, sinusoidal_features

SMALL_DIT = {"patch_size": 2, "depth": 1, "width": 16, "num_heads": 2}
SMALL_MLP = {"depth": 2, "width": 16}


def _network(kind, **more):
    shape = (4, 6, 3) if kind is DiT else (2,)
    network = kind(**{**(SMALL_DIT if kind is DiT else SMALL_MLP), "num_classes": 3, **more})
    params = initial_params(network, shape, jax.random.key(0))
    keys = iter(jax.random.split(jax.random.key(1), 200))
    drawn = jax.tree.map(lambda p: 0.3 * jax.random.normal(next(keys), p.shape), params)
    return as_field(network), params, drawn, jax.random.normal(jax.random.key(2), (5, *shape))


def _u(field, params, z, r=0.2, t=0.7, label=1):
    return field(
        params, z, r=jnp.full(5, r), t=jnp.full(5, t), condition=Condition(jnp.full(5, label))
    ).u


@pytest.mark.parametrize("kind", [DiT, MLP])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_output_and_parameters_are_float32(kind, dtype):
    field, params, drawn, z = _network(kind, dtype=dtype)
    u = _u(field, drawn, z)
    assert u.shape == z.shape
    assert u.dtype == jnp.float32
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(params))


@pytest.mark.parametrize("kind", [DiT, MLP])
def test_bfloat16_is_really_used_and_close(kind):
    (field, _, drawn, z), (rough, _, _, _) = _network(kind), _network(kind, dtype="bfloat16")
    exact, coarse = _u(field, drawn, z), _u(rough, drawn, z)
    error = float(jnp.linalg.norm(exact - coarse) / jnp.linalg.norm(exact))
    assert 1e-4 < error < 0.05


@pytest.mark.parametrize("kind", [DiT, MLP])
def test_a_fresh_network_predicts_zero(kind):
    field, params, _, z = _network(kind)
    assert jnp.all(_u(field, params, z) == 0)


@pytest.mark.parametrize("kind", [DiT, MLP])
def test_labels_change_the_output_and_no_label_is_one_of_them(kind):
    field, _, drawn, z = _network(kind)
    outputs = [_u(field, drawn, z, label=label) for label in (0, 1, 2, NO_LABEL)]
    for i, a in enumerate(outputs):
        assert all(float(jnp.abs(a - b).max()) > 1e-3 for b in outputs[:i])


@pytest.mark.parametrize("kind", [DiT, MLP])
def test_unconditional_network_has_no_class_parameters(kind):
    field, params, drawn, z = _network(kind, num_classes=0)
    assert "label_embedding" not in params["condition"]
    np.testing.assert_array_equal(_u(field, drawn, z, label=2), _u(field, drawn, z, label=NO_LABEL))


@pytest.mark.parametrize("kind", [DiT, MLP])
@pytest.mark.parametrize("conditioning", TIME_CONDITIONINGS)
def test_time_conditioning_tells_what_its_name_says(kind, conditioning):
    field, params, drawn, z = _network(kind, time_conditioning=conditioning)
    told = {"t": "t_embedding", "r": "r_embedding", "t-r": "h_embedding"}
    names = {told[name] for name in conditioning.split(",")}
    assert {name for name in params["condition"] if name != "label_embedding"} == names
    shifted = np.allclose(_u(field, drawn, z, 0.2, 0.7), _u(field, drawn, z, 0.3, 0.8), atol=1e-5)
    assert shifted == (conditioning == "t-r"), (
        "only the network that sees t - r alone is blind to a shift of both"
    )
    blind = np.array_equal(_u(field, drawn, z, 0.2, 0.7), _u(field, drawn, z, 0.3, 0.7))
    assert blind == (conditioning == "t"), "only the network that sees t alone is blind to r"
    assert not np.allclose(_u(field, drawn, z, 0.2, 0.7), _u(field, drawn, z, 0.2, 0.8), atol=1e-5)


def test_decoupled_dit_is_a_flow_matching_dit_where_r_is_t():
    field, params, drawn, z = _network(DiT, depth=2, time_conditioning=DECOUPLED)
    flow, flow_params, _, _ = _network(DiT, depth=2, time_conditioning="t")
    jax.tree.map(np.testing.assert_array_equal, params, flow_params)
    np.testing.assert_array_equal(_u(field, drawn, z, 0.7, 0.7), _u(flow, drawn, z, 0.7, 0.7))
    assert not np.allclose(_u(field, drawn, z, 0.2, 0.7), _u(flow, drawn, z, 0.2, 0.7), atol=1e-3)


@pytest.mark.parametrize(("r_blocks", "last"), [(0, 2), (1, 1), (4, 4)])
def test_first_blocks_of_a_decoupled_dit_see_t_and_last_ones_r(r_blocks, last):
    """A block whose modulation is made constant is deaf to the times."""
    field, _, drawn, z = _network(DiT, depth=5, time_conditioning=DECOUPLED, r_blocks=r_blocks)
    modulations = [*((f"block_{i}", "modulation") for i in range(5)), ("final_modulation",)]

    def heard(names):
        """Return whether u depends on t, and on r, where only these modulations hear anything."""
        params = flatten_dict(drawn)
        for name in set(modulations) - set(names):
            params[*name, "kernel"] = jnp.zeros_like(params[*name, "kernel"])
        params = unflatten_dict(params)
        u = _u(field, params, z)
        changed = (_u(field, params, z, t=0.8), _u(field, params, z, r=0.1))
        return tuple(not np.array_equal(u, other) for other in changed)

    assert [heard([name]) for name in modulations] == [(True, False)] * (5 - last) + [
        (False, True)
    ] * (last + 1)


def test_decoupled_dit_leaves_a_block_for_each_time():
    assert [num_r_blocks(depth, 0) for depth in (2, 4, 5, 12, 28)] == [1, 1, 2, 3, 7]
    for depth, r_blocks in [(1, 0), (4, 4), (4, 5), (4, -1)]:
        with pytest.raises(BadInput, match=f"model.r_blocks={r_blocks}: .* of {depth} blocks.*use"):
            num_r_blocks(depth, r_blocks)


def test_only_a_dit_can_be_decoupled():
    with pytest.raises(BadInput, match=r"time_conditioning='t\|r': must be one of t,r"):
        _network(MLP, time_conditioning=DECOUPLED)


def test_dit_sees_every_pixel_in_its_place():
    """Each output depends on each input, and swapping two patches of the input is not swapping them in the output."""
    field, _, drawn, z = _network(DiT)
    jacobian = jax.jacobian(lambda z: _u(field, drawn, jnp.broadcast_to(z, (5, *z.shape)))[0])(z[0])
    assert float(jnp.abs(jacobian).min()) > 0
    swapped = z.at[:, :2, :2].set(z[:, :2, 2:4]).at[:, :2, 2:4].set(z[:, :2, :2])
    u, u_swapped = _u(field, drawn, z), _u(field, drawn, swapped)
    assert not np.allclose(u[:, :2, :2], u_swapped[:, :2, 2:4], atol=1e-3)


def test_dit_writes_each_patch_where_it_read_it():
    """With a linear map from patch to patch the output must be the input, pixel for pixel."""
    network = DiT(patch_size=2, depth=0, width=16, num_heads=2, num_classes=0)
    params = initial_params(network, (4, 6, 1), jax.random.key(0))
    z = jax.random.normal(jax.random.key(1), (1, 4, 6, 1))
    gradient = jax.grad(
        lambda z, p: as_field(network)(
            p, z, r=jnp.zeros(1), t=jnp.ones(1), condition=Condition(jnp.zeros(1, int))
        ).u[0, 1, 4, 0],
    )(z, jax.tree.map(lambda p: p + 0.1 * jax.random.normal(jax.random.key(2), p.shape), params))
    touched = np.abs(gradient[0, :, :, 0]) > 1e-6
    expected = np.zeros((4, 6), bool)
    expected[0:2, 4:6] = True  # without attention an output pixel sees its own patch alone
    np.testing.assert_array_equal(touched, expected)


def test_time_features_are_not_scaled_by_1000():
    slope = jax.jacobian(lambda t: sinusoidal_features(t, 256))(jnp.array([0.3]))
    assert float(jnp.abs(slope).max()) <= 1.0
