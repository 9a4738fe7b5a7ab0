"""Attention: fused computes what plain expressions compute, both ways, and its kernel fits GPUs and TPUs."""

import functools
import os
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ROOT
from jax.experimental.pallas import tpu as pltpu

from mf_jax.errors import BadInput
from mf_jax.models import fused_attention
from mf_jax.models.attention import attend
from mf_jax.models.fused_attention import attention_tangent

SHAPES = [
    (4, 16),
    (64, 64),
    (84, 72),
    (276, 16),
]  # tokens, numbers of a head; blocks are of 64 and 128 tokens
TOLERANCE = 2e-5  # relative to the norm, in float32
each_shape = pytest.mark.parametrize(("length", "head_size"), SHAPES)
tangent_of = jax.jit(attention_tangent, static_argnames="backend")
each_backend = pytest.mark.parametrize("backend", ["gpu", "tpu"])


def _inputs(length, head_size, *, dtype=jnp.float32, scale=1.0, offset=0.0):
    """Return q, k, v and their tangents; scores have a standard deviation of scale, keys a mean of offset."""
    random = np.random.default_rng(length)
    q, k, v, *tangents = random.standard_normal((6, 2, length, 3, head_size))
    k += offset * random.standard_normal(head_size)
    return [jnp.asarray(x, dtype) for x in (q * scale * head_size**-0.5, k, v, *tangents)]


def _plain(*inputs):
    """Return the value and the tangent of attention by their equations, in float64."""
    q, k, v, dq, dk, dv = (np.asarray(x, np.float64) for x in inputs)
    scores, slopes = (np.einsum("bqhd,bkhd->bhqk", *pair) for pair in ((q, k), (dq, k)))
    slopes += np.einsum("bqhd,bkhd->bhqk", q, dk)
    p = np.exp(scores - scores.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    dp = p * (slopes - (p * slopes).sum(-1, keepdims=True))
    out, by_weights, by_values = (
        np.einsum("bhqk,bkhd->bqhd", *pair) for pair in ((p, v), (dp, v), (p, dv))
    )
    return out, by_weights + by_values


def _error(a, b):
    a, b = (np.asarray(x, np.float64) for x in (a, b))
    assert a.shape == b.shape
    return np.linalg.norm(a - b) / np.linalg.norm(b)


def _step(wrap=lambda layer: layer):
    """Return a function that returns u, du/dt and the gradient of a MeanFlow loss around attention."""

    def step(params, z, dz, kind):
        def layer(z, params):
            q, k, v = (z @ w.astype(z.dtype) for w in params)
            return z + attend(q * z.shape[-1] ** -0.5, jnp.sin(k), v, kind=kind, forward_mode=True)

        def loss(params):
            u = jax.jvp(lambda z: wrap(layer)(z, params), (z,), (dz,))
            value, derivative = (x.astype(jnp.float32) for x in u)
            target = jax.lax.stop_gradient(dz.astype(jnp.float32) - derivative)
            return jnp.mean((value - target) ** 2), (value, derivative)

        gradient, (value, derivative) = jax.grad(loss, has_aux=True)(params)
        return value, derivative, gradient

    return jax.jit(step, static_argnames="kind")


def _scanned(layer):
    return lambda z, params: jax.lax.scan(lambda z, _: (layer(z, params), None), z, None, length=2)[
        0
    ]


def _arguments(length, head_size, dtype=jnp.float32):
    z, dz, *_ = _inputs(length, head_size, dtype=dtype)
    params = np.random.default_rng(1).standard_normal((3, head_size, head_size)) * head_size**-0.5
    return jnp.asarray(params, jnp.float32), z, dz


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_plain_expressions_stay_as_they_were(dtype):
    q, k, v, *_ = _inputs(84, 72, dtype=dtype)
    scores = jnp.einsum("bqhd,bkhd->bhqk", q, k)
    weights = jax.nn.softmax(scores.astype(jnp.float32)).astype(dtype)
    expected = jnp.einsum("bhqk,bkhd->bqhd", weights, v)
    for forward_mode in (False, True):
        out = attend(q, k, v, kind="xla", forward_mode=forward_mode)
        assert out.dtype == dtype
        np.testing.assert_array_equal(out, expected)


@each_shape
def test_value_tangent_and_gradient(length, head_size):
    step, arguments = _step(), _arguments(length, head_size)
    for fused, plain in zip(step(*arguments, "fused"), step(*arguments, "xla"), strict=True):
        assert _error(fused, plain) < TOLERANCE


@pytest.mark.parametrize("wrap", [jax.checkpoint, lambda layer: _scanned(jax.checkpoint(layer))])
def test_within_checkpoint_and_scan(wrap):
    step, arguments = _step(wrap), _arguments(84, 16)
    for fused, plain in zip(step(*arguments, "fused"), step(*arguments, "xla"), strict=True):
        assert _error(fused, plain) < TOLERANCE


def test_bfloat16_loses_no_more_than_plain_expressions_do():
    step = _step()
    params, *points = _arguments(84, 72, jnp.bfloat16)
    exact = step(params, *(x.astype(jnp.float32) for x in points), "xla")
    fused, plain = (step(params, *points, kind) for kind in ("fused", "xla"))
    for a, b, c in zip(fused, plain, exact, strict=True):
        assert 1e-4 < _error(a, c) < 1.2 * _error(b, c)


@each_backend
@each_shape
def test_kernel_of_the_tangent(backend, length, head_size):
    inputs = _inputs(length, head_size)
    assert _error(tangent_of(*inputs, backend=backend), _plain(*inputs)[1]) < 2e-6


@each_backend
@pytest.mark.parametrize("moved", [(), (0,), (1,), (2,)])
def test_kernel_with_one_tangent_or_none(backend, moved):
    inputs = _inputs(84, 72)
    inputs[3:] = [x if i in moved else jnp.zeros_like(x) for i, x in enumerate(inputs[3:])]
    tangent = tangent_of(*inputs, backend=backend)
    if moved:
        assert _error(tangent, _plain(*inputs)[1]) < 2e-6
    else:
        assert not tangent.any()


@pytest.mark.parametrize("moved", range(3))
def test_tangent_of_one_input(moved):
    inputs = _inputs(4, 16)

    def of_one(x):
        return attend(*inputs[:moved], x, *inputs[moved + 1 : 3], kind="fused", forward_mode=True)

    got = jax.jit(lambda x, dx: jax.jvp(of_one, (x,), (dx,)))(inputs[moved], inputs[3 + moved])
    inputs[3:] = [x if i == moved else jnp.zeros_like(x) for i, x in enumerate(inputs[3:])]
    for a, b in zip(got, _plain(*inputs), strict=True):
        assert _error(a, b) < 2e-6


@each_backend
@pytest.mark.parametrize("hard", [{"scale": 50.0}, {"offset": 10.0}])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_large_scores_and_large_slopes(backend, hard, dtype):
    inputs = _inputs(84, 72, dtype=dtype, **hard)
    exact = _plain(*inputs)[1]
    plain = jax.jit(lambda *x: jax.jvp(functools.partial(attend, kind="xla"), x[:3], x[3:])[1])(
        *inputs
    )
    assert _error(tangent_of(*inputs, backend=backend), exact) < 2 * _error(plain, exact)
    for sign in (-1, 1):
        huge = tangent_of(sign * 1e4 * inputs[0], *inputs[1:], backend=backend)
        assert np.all(np.isfinite(np.asarray(huge, np.float32)))


@pytest.mark.parametrize("forward_mode", [False, True])
def test_gradient_without_a_tangent(forward_mode):
    q, k, v, weights, *_ = _inputs(84, 72)

    def gradients(kind, which):
        def value(*inputs):
            return jnp.sum(weights * attend(*inputs, kind=kind, forward_mode=forward_mode))

        return jax.jit(jax.grad(value, which))(q, k, v)

    plain = gradients("xla", (0, 1, 2))
    for a, b in zip(gradients("fused", (0, 1, 2)), plain, strict=True):
        assert _error(a, b) < TOLERANCE
    assert _error(gradients("fused", 1), plain[1]) < TOLERANCE


def test_no_gradient_flows_through_a_tangent():
    inputs = _inputs(4, 16)

    def tangent(*inputs):
        attention = functools.partial(attend, kind="fused", forward_mode=True)
        return jnp.sum(jax.jvp(attention, inputs[:3], inputs[3:])[1])

    assert not any(x.any() for x in jax.jit(jax.grad(tangent, range(6)))(*inputs))


def test_forward_mode_must_be_asked_for():
    q, k, v, dq, *_ = _inputs(4, 16)
    with pytest.raises(TypeError, match="forward-mode"):
        jax.jvp(lambda q: attend(q, k, v, kind="fused"), (q,), (dq,))


def test_float64_is_kept():
    with jax.enable_x64(True):
        inputs = _inputs(20, 16, dtype=jnp.float64)
        for kind, tolerance in (
            ("xla", 1e-14),
            ("fused", 1e-6),
        ):  # JAX's own has a softmax in float32
            function = functools.partial(attend, kind=kind, forward_mode=True)
            got = jax.jit(lambda *x, f=function: jax.jvp(f, x[:3], x[3:]))(*inputs)
            for a, b in zip(got, _plain(*inputs), strict=True):
                assert a.dtype == jnp.float64
                assert _error(a, b) < tolerance


def _lowered(function, platform, *, length=84, head_size=72, dtype=jnp.float32, num_inputs=6):
    shapes = [jax.ShapeDtypeStruct((2, length, 3, head_size), dtype)] * num_inputs
    try:
        return jax.jit(function).trace(*shapes).lower(lowering_platforms=(platform,)).as_text()
    except RuntimeError as error:
        if "GPU devices" not in str(error):
            raise
        pytest.skip("this JAX lowers to Triton only where there is a GPU")


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@each_shape
@pytest.mark.parametrize(
    ("backend", "platform", "call"), [("gpu", "cuda", "triton"), ("tpu", "tpu", "tpu_custom")]
)
def test_kernel_lowers(backend, platform, call, length, head_size, dtype):
    def tangent(*inputs):
        return attention_tangent(*inputs, backend=backend, interpret=False)

    assert call in _lowered(tangent, platform, length=length, head_size=head_size, dtype=dtype)


def test_cudnn_serves_half_precision_on_gpus(monkeypatch):
    """There is no GPU here: another implementation stands in for cuDNN's, which takes multiples of 8 numbers."""
    library, asked = jax.nn.dot_product_attention, []

    def dot_product_attention(q, *more, implementation, **options):
        asked.append((implementation, q.shape[-1]))
        return library(q, *more, implementation="xla", **options)

    monkeypatch.setattr(jax.nn, "dot_product_attention", dot_product_attention)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    for dtype, head_size in (
        (jnp.bfloat16, 20),
        (jnp.float16, 72),
        (jnp.float32, 20),
        (jnp.bfloat16, 136),
    ):
        inputs = _inputs(4, head_size, dtype=dtype)
        assert _error(attend(*inputs[:3], kind="fused"), _plain(*inputs)[0]) < 5e-3
    assert asked == [("cudnn", 24), ("cudnn", 72), ("xla", 20), ("xla", 136)]


@pytest.mark.parametrize(("length", "kernels"), [(84, 1), (100, 2), (276, 2)])
def test_flash_attention_serves_lengths_near_a_multiple_of_128_on_tpus(
    monkeypatch, length, kernels
):
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")

    def both(*inputs):
        return jax.jvp(
            lambda *x: attend(*x, kind="fused", forward_mode=True), inputs[:3], inputs[3:]
        )

    assert _lowered(both, "tpu", length=length).count("tpu_custom_call(") == kernels


def test_padded_flash_attention():
    q, k, v, weights, *_ = (x[:1, :, :1] for x in _inputs(100, 16))
    with pltpu.force_tpu_interpret_mode():
        out, transpose = jax.vjp(fused_attention._flash_on_tpu, q, k, v)
        gradients = transpose(weights)
    plain, transpose = jax.vjp(lambda *x: attend(*x, kind="xla"), q, k, v)
    for a, b in zip((out, *gradients), (plain, *transpose(weights)), strict=True):
        assert _error(a, b) < TOLERANCE


MANY_DEVICES = """
import re
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from mf_jax.models.attention import attend
from mf_jax.runtime.sharding import batch_sharding, make_mesh

def run(kind, inputs):
    def both(*inputs):
        return jax.jvp(lambda *x: attend(*x, kind=kind, forward_mode=True), inputs[:3], inputs[3:])
    compiled = jax.jit(both).lower(*inputs).compile()
    return compiled(*inputs), compiled.as_text()

mesh = make_mesh(data=2, fsdp=2)
inputs = [jnp.asarray(x, jnp.float32) for x in np.random.default_rng(0).standard_normal((6, 4, 20, 2, 16))]
expected, _ = run("xla", inputs)
for sharding in (batch_sharding(mesh), NamedSharding(mesh, PartitionSpec("data", "fsdp"))):
    got, program = run("fused", jax.device_put(inputs, sharding))
    for a, b in zip(got, expected):
        np.testing.assert_allclose(a, b, atol=1e-4)
    print(any(re.findall("all-gather|all-reduce|all-to-all|collective-permute", program)))
"""


def test_each_device_computes_its_rows_alone(monkeypatch):
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=4"
    monkeypatch.setenv("XLA_FLAGS", flags)
    result = subprocess.run(
        [sys.executable, "-c", MANY_DEVICES], cwd=ROOT, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == ["False", "True"], (
        "rows split need no communication, tokens split do"
    )


def test_unknown_kinds_are_refused():
    q, k, v, *_ = _inputs(4, 16)
    with pytest.raises(
        BadInput, match=re.escape("kind='fussed': must be one of xla, fused (did you mean fused?)")
    ):
        attend(q, k, v, kind="fussed")
