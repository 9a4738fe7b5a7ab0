"""Affine and low-rank networks: affine in z whatever the parameters, and exact for Gaussian data once trained."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from oracle import gaussian_average

from mf_jax.flow.paths import per_row
from mf_jax.flow.records import NO_LABEL, Condition
from mf_jax.models import Affine, LowRank, as_field, initial_params
from mf_jax.models.layers import TIME_CONDITIONINGS

NETWORKS = {"affine": (Affine, {}), "low_rank": (LowRank, {"rank": 2})}
SHAPES = [(3,), (2, 4, 1)]
MEANS = jnp.array([-0.7, 0.4])  # of the data of each class


def _network(kind, shape, **more):
    network, sizes = NETWORKS[kind]
    network = network(**{"width": 16, "num_classes": 3, **sizes, **more})
    params = initial_params(network, shape, jax.random.key(0))
    rng = np.random.default_rng(1)
    drawn = jax.tree.map(lambda p: jnp.asarray(0.3 * rng.normal(size=p.shape), jnp.float32), params)
    return jax.jit(as_field(network)), params, drawn


def _u(field, params, z, r=0.2, t=0.7, label=1):
    told = {"r": jnp.full(len(z), r), "t": jnp.full(len(z), t)}
    return field(params, z, **told, condition=Condition(jnp.full(len(z), label))).u


def _matrix(field, params, shape, **told):
    """Return A, the derivative of u with respect to z, both as vectors."""
    size = int(np.prod(shape))
    slope = jax.jacobian(lambda z: _u(field, params, z[None], **told)[0])(jnp.zeros(shape))
    return np.asarray(slope).reshape(size, size)


@pytest.mark.parametrize("kind", NETWORKS)
@pytest.mark.parametrize("shape", SHAPES)
def test_is_affine_in_z(kind, shape):
    field, _, drawn = _network(kind, shape)
    z = jax.random.normal(jax.random.key(2), (2, *shape))
    (a, b), c = _u(field, drawn, z), _u(field, drawn, (0.3 * z[0] + 0.7 * z[1])[None])[0]
    np.testing.assert_allclose(c, 0.3 * a + 0.7 * b, rtol=1e-4, atol=1e-4)
    assert float(jnp.abs(_u(field, drawn, jnp.zeros_like(z))).max()) > 0.01, "b is missing"
    assert c.shape == shape


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("kind", "rank"), [("affine", None), ("low_rank", 1), ("low_rank", 2)])
def test_rank_of_the_matrix(kind, rank, shape):
    field, _, drawn = _network(kind, shape, **({"rank": rank} if rank else {}))
    found = np.linalg.matrix_rank(_matrix(field, drawn, shape), tol=1e-4)
    assert found == (rank or np.prod(shape))


@pytest.mark.parametrize("kind", NETWORKS)
def test_matrix_sees_the_times_and_offset_the_class_too(kind):
    shape = (3,)
    field, _, drawn = _network(kind, shape)
    first = _matrix(field, drawn, shape, label=0)
    np.testing.assert_array_equal(first, _matrix(field, drawn, shape, label=NO_LABEL))
    for times in ({"t": 0.9}, {"r": 0.0}):
        assert np.abs(first - _matrix(field, drawn, shape, **times)).max() > 1e-3
    offsets = [
        _u(field, drawn, jnp.zeros((1, *shape)), label=label) for label in (0, 1, 2, NO_LABEL)
    ]
    for i, a in enumerate(offsets):
        assert all(float(jnp.abs(a - b).max()) > 1e-3 for b in offsets[:i])
    later = _u(field, drawn, jnp.zeros((1, *shape)), label=0, t=0.9)
    assert float(jnp.abs(offsets[0] - later).max()) > 1e-3


@pytest.mark.parametrize("kind", NETWORKS)
def test_starts_at_zero_with_a_gradient(kind):
    field, params, _ = _network(kind, (3,))
    z = jax.random.normal(jax.random.key(2), (5, 3))
    assert jnp.all(_u(field, params, z) == 0)
    slope = jax.grad(lambda params: jnp.sum(_u(field, params, z) * z))(params)
    assert (
        float(jnp.abs(slope[{"affine": "matrix", "low_rank": "left"}[kind]]["out"]["kernel"]).max())
        > 1e-4
    )


@pytest.mark.parametrize("conditioning", TIME_CONDITIONINGS)
def test_takes_every_time_conditioning(conditioning):
    field, _, drawn = _network("low_rank", (3,), time_conditioning=conditioning)
    z = jnp.ones((2, 3))
    shifted = np.allclose(_u(field, drawn, z, 0.2, 0.7), _u(field, drawn, z, 0.3, 0.8), atol=1e-5)
    assert shifted == (conditioning == "t-r")


@pytest.mark.parametrize("kind", NETWORKS)
def test_bfloat16_is_used_close_and_returned_as_float32(kind):
    shape = (2, 4, 1)
    z = jax.random.normal(jax.random.key(2), (5, *shape))
    (field, _, drawn), (rough, fresh, _) = (
        _network(kind, shape),
        _network(kind, shape, dtype="bfloat16"),
    )
    exact, coarse = _u(field, drawn, z), _u(rough, drawn, z)
    assert coarse.dtype == jnp.float32
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(fresh))
    assert 1e-4 < float(jnp.linalg.norm(exact - coarse) / jnp.linalg.norm(exact)) < 0.05


def _gaussian_batch(key):
    noise, times, classes = jax.random.split(key, 3)
    r, t = jnp.sort(jax.random.uniform(times, (2, 256)), axis=0)
    labels = jax.random.randint(classes, (256,), 0, 2)
    z = jax.random.normal(noise, (256, 2))
    target = gaussian_average(z, per_row(r, z), per_row(t, z), per_row(MEANS[labels], z))
    return z, r, t, labels, target


@pytest.mark.parametrize("kind", NETWORKS)
def test_regression_finds_the_average_velocity_of_gaussian_data(kind):
    network, sizes = NETWORKS[kind]
    network = network(width=64, num_classes=2, **sizes)
    field = as_field(network)
    optimiser = optax.adam(optax.cosine_decay_schedule(5e-3, 1200), b2=0.99)

    def loss(params, key):
        z, r, t, labels, target = _gaussian_batch(key)
        u = field(params, z, r=r, t=t, condition=Condition(labels)).u
        return jnp.mean((u - target) ** 2) / jnp.mean(target**2)

    def step(state, key):
        params, moments = state
        value, slope = jax.value_and_grad(loss)(params, key)
        updates, moments = optimiser.update(slope, moments)
        return (optax.apply_updates(params, updates), moments), value

    params = initial_params(network, (2,), jax.random.key(0))
    start = (params, optimiser.init(params))
    (params, _), errors = jax.jit(lambda *a: jax.lax.scan(step, *a))(
        start, jax.random.split(jax.random.key(1), 1200)
    )
    assert float(errors[0]) == pytest.approx(1.0)
    assert float(loss(params, jax.random.key(2))) < 2e-4
