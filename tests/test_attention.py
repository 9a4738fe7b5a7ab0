"""Attention: fused computes what plain expressions compute, and its kernel fits GPUs and TPUs."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import refuses
from jax.experimental.pallas import tpu as pltpu

from mf_jax.models import fused_attention
from mf_jax.models.attention import attend
from mf_jax.models.fused_attention import attention_tangent

SHAPES = [(4, 16), (84, 72), (276, 16)]  # tokens, numbers of a head; blocks have 64 or 128 tokens
TOLERANCE = 2e-5  # relative to the norm, in float32
tangent_of = jax.jit(attention_tangent, static_argnames="backend")


def _inputs(length, head_size, *, dtype=jnp.float32, scale=1.0, offset=0.0):
    """Return q, k, v and their tangents; scores have this deviation, keys a mean of offset."""
    random = np.random.default_rng(length)
    q, k, v, *tangents = random.standard_normal((6, 2, length, 3, head_size))
    k += offset * random.standard_normal(head_size)
    return [jnp.asarray(x, dtype) for x in (q * scale * head_size**-0.5, k, v, *tangents)]


def _plain(*inputs):
    """Return the value and the tangent of attention by their equations, in float64."""
    q, k, v, dq, dk, dv = (np.asarray(x, np.float64) for x in inputs)
    times = functools.partial(np.einsum, "bqhd,bkhd->bhqk")
    scores, slopes = times(q, k), times(dq, k) + times(q, dk)
    p = np.exp(scores - scores.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    dp = p * (slopes - (p * slopes).sum(-1, keepdims=True))
    of = functools.partial(np.einsum, "bhqk,bkhd->bqhd")
    return of(p, v), of(dp, v) + of(p, dv)


def _error(a, b):
    a, b = (np.asarray(x, np.float64) for x in (a, b))
    assert a.shape == b.shape
    return np.linalg.norm(a - b) / np.linalg.norm(b)


def _jvp(*inputs, kind, forward_mode=True):
    function = functools.partial(attend, kind=kind, forward_mode=forward_mode)
    return jax.jvp(function, inputs[:3], inputs[3:])


def _scanned(layer):
    def twice(z, params):
        return jax.lax.scan(lambda z, _: (jax.checkpoint(layer)(z, params), None), z, None, 2)[0]

    return twice


@functools.cache
def _step(wrap=lambda layer: layer):
    """Return a function that returns u, du/dt and the gradient of a MeanFlow loss."""

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


def _arguments(length, head_size, dtype=jnp.float32):
    z, dz, *_ = _inputs(length, head_size, dtype=dtype)
    params = np.random.default_rng(1).standard_normal((3, head_size, head_size)) * head_size**-0.5
    return jnp.asarray(params, jnp.float32), z, dz


def test_plain_expressions_stay_as_they_were_and_unknown_kinds_are_refused():
    for dtype in (jnp.float32, jnp.bfloat16):
        q, k, v, *_ = _inputs(84, 72, dtype=dtype)
        scores = jnp.einsum("bqhd,bkhd->bhqk", q, k)
        weights = jax.nn.softmax(scores.astype(jnp.float32)).astype(dtype)
        out = attend(q, k, v, kind="xla")
        assert out.dtype == dtype
        np.testing.assert_array_equal(out, jnp.einsum("bhqk,bkhd->bqhd", weights, v))
    refuses("kind='fussed': must be one of xla, plain, fused", attend, q, k, v, kind="fussed")


def test_value_tangent_and_gradient():
    for step, shape in ((_step(), (276, 16)), (_step(_scanned), (84, 72))):
        arguments = _arguments(*shape)
        for fused, plain in zip(step(*arguments, "fused"), step(*arguments, "xla"), strict=True):
            assert _error(fused, plain) < TOLERANCE


def test_head_by_head_is_the_same_and_needs_less_memory():
    """Of long sequences on a CPU."""
    arguments = _arguments(260, 16)
    steps = [_step().lower(*arguments, kind).compile() for kind in ("plain", "xla")]
    memory = [step.memory_analysis().temp_size_in_bytes for step in steps]
    assert memory[1] < 0.5 * memory[0]
    for whole, parts in zip(*(step(*arguments) for step in steps), strict=True):
        assert _error(parts, whole) < 1e-6


def test_bfloat16_loses_no_more_than_plain_expressions_do():
    params, *points = _arguments(276, 16, jnp.bfloat16)
    exact = _step()(params, *(x.astype(jnp.float32) for x in points), "xla")
    fused, plain = (_step()(params, *points, kind) for kind in ("fused", "xla"))
    for a, b, c in zip(fused, plain, exact, strict=True):
        assert 1e-4 < _error(a, c) < 1.2 * _error(b, c)


def test_kernel_of_the_tangent():
    for backend, shape in itertools.product(("gpu", "tpu"), SHAPES):
        inputs = _inputs(*shape)
        assert _error(tangent_of(*inputs, backend=backend), _plain(*inputs)[1]) < 2e-6


def test_tangent_of_one_input():
    for moved in range(3):
        inputs = _inputs(4, 16)

        def of_one(x, before=inputs[:moved], after=inputs[moved + 1 : 3]):
            return attend(*before, x, *after, kind="fused", forward_mode=True)

        got = jax.jvp(of_one, (inputs[moved],), (inputs[3 + moved],))
        inputs[3:] = [x if i == moved else jnp.zeros_like(x) for i, x in enumerate(inputs[3:])]
        for a, b in zip(got, _plain(*inputs), strict=True):
            assert _error(a, b) < 2e-6


def test_large_scores_and_large_slopes():
    plain, hard = jax.jit(functools.partial(_jvp, kind="xla")), ({"scale": 50.0}, {"offset": 10.0})
    for dtype, how in itertools.product((jnp.float32, jnp.bfloat16), hard):
        inputs = _inputs(84, 72, dtype=dtype, **how)
        exact = _plain(*inputs)[1]
        allowed = 2 * _error(plain(*inputs)[1], exact)
        for backend in ("gpu", "tpu"):
            assert _error(tangent_of(*inputs, backend=backend), exact) < allowed
            for scale in (-1e4, 1e4):
                huge = tangent_of(scale * inputs[0], *inputs[1:], backend=backend)
                assert jnp.isfinite(huge).all()


def test_gradient_without_a_tangent_and_none_through_one():
    q, k, v, weights, *_ = _inputs(84, 72)

    def gradient(**how):
        of_value = jax.grad(lambda *inputs: jnp.sum(weights * attend(*inputs, **how)), (0, 1, 2))
        return jax.jit(of_value)(q, k, v)

    plain = gradient(kind="xla")
    for forward_mode in (False, True):
        for a, b in zip(gradient(kind="fused", forward_mode=forward_mode), plain, strict=True):
            assert _error(a, b) < TOLERANCE
    inputs = _inputs(4, 16)
    of_tangent = jax.grad(lambda *x: jnp.sum(_jvp(*x, kind="fused")[1]), range(6))
    assert not any(x.any() for x in jax.jit(of_tangent)(*inputs))
    with pytest.raises(TypeError, match="forward-mode"):
        _jvp(*inputs, kind="fused", forward_mode=False)


def test_float64_is_kept():
    with jax.enable_x64(True):
        inputs = _inputs(20, 16, dtype=jnp.float64)
        # JAX's own attention has a softmax in float32.
        for kind, tolerance in (("xla", 1e-14), ("fused", 1e-6)):
            got = jax.jit(functools.partial(_jvp, kind=kind))(*inputs)
            for a, b in zip(got, _plain(*inputs), strict=True):
                assert a.dtype == jnp.float64
                assert _error(a, b) < tolerance


def _lowered(function, platform, *, length=84, head_size=72, dtype=jnp.float32):
    shapes = [jax.ShapeDtypeStruct((2, length, 3, head_size), dtype)] * 6
    try:
        return jax.jit(function).trace(*shapes).lower(lowering_platforms=(platform,)).as_text()
    except RuntimeError as error:
        if "GPU devices" not in str(error):
            raise
        pytest.skip("this JAX lowers to Triton only where there is a GPU")


@pytest.mark.parametrize("backend", ["gpu", "tpu"])
def test_kernel_lowers(backend):
    platform, call = {"gpu": ("cuda", "triton"), "tpu": ("tpu", "tpu_custom")}[backend]
    tangent = functools.partial(attention_tangent, backend=backend, interpret=False)
    for i, (length, size) in enumerate(SHAPES):
        more = {"head_size": size, "dtype": ("float32", "bfloat16")[i % 2]}
        assert call in _lowered(tangent, platform, length=length, **more)


def test_cudnn_serves_half_precision_on_gpus(monkeypatch):
    """Another implementation stands in for cuDNN's, which takes multiples of 8 numbers."""
    library, asked = jax.nn.dot_product_attention, []

    def dot_product_attention(q, *more, implementation, **options):
        asked.append((implementation, q.shape[-1]))
        return library(q, *more, implementation="xla", **options)

    monkeypatch.setattr(jax.nn, "dot_product_attention", dot_product_attention)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    for dtype, head_size in (("bfloat16", 20), ("float16", 72), ("float32", 20), ("bfloat16", 136)):
        inputs = _inputs(4, head_size, dtype=dtype)
        assert _error(attend(*inputs[:3], kind="fused"), _plain(*inputs)[0]) < 5e-3
    assert asked == [("cudnn", 24), ("cudnn", 72), ("xla", 20), ("xla", 136)]


def test_flash_attention_serves_lengths_near_a_multiple_of_128_on_tpus(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    for length, kernels in ((84, 1), (100, 2), (276, 2)):
        program = _lowered(functools.partial(_jvp, kind="fused"), "tpu", length=length)
        assert program.count("tpu_custom_call(") == kernels


def test_padded_flash_attention():
    """Its gradient is of JAX's own kernels."""
    inputs = [x[:1, :, :1] for x in _inputs(100, 16)[:3]]
    with pltpu.force_tpu_interpret_mode():
        out = fused_attention._flash_on_tpu(*inputs)
    assert _error(out, attend(*inputs, kind="xla")) < TOLERANCE
