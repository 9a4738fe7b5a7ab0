"""The core as other codes use it: any function, rank, condition and pairs, masks, and its check."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from conftest import refuses
from oracle import STD, gaussian_average, gaussian_velocity, moments

import mf_jax
from mf_jax.flow.paths import advance, per_row
from mf_jax.flow.rows import at_instant, at_time, condition_of, point_of, predict, split_rows
from mf_jax.models import MLP, as_field

assert_same = functools.partial(oracle.assert_same, atol=1e-9)
pytestmark = pytest.mark.usefixtures("float64")
KEY = jax.random.key(0)
SCHEME = mf_jax.DrawScheme(mf_jax.UniformTimes(), instant_share=0.5, label_drop_share=0.0)
OBJECTIVES = {
    "flow_matching": mf_jax.FlowMatching(),
    "meanflow": mf_jax.MeanFlow(mf_jax.Guidance(1.5, 0.3)),
    "mean": mf_jax.MeanFlow(weight=mf_jax.AdaptiveWeight(of="mean")),
    "improved": mf_jax.ImprovedMeanFlow(velocity="boundary"),
    "head": mf_jax.ImprovedMeanFlow(),
    "pixel": mf_jax.PixelMeanFlow(velocity="boundary"),
    "alpha": mf_jax.AlphaFlow(),
    "split": mf_jax.SplitMeanFlow(),
    "terminal": mf_jax.TerminalVelocity(),
    "controlled": mf_jax.Controlled(mf_jax.MeanFlow(), mf_jax.Controls(1.0, 0.1, 1.0)),
}
DIFFERENTIABLE = {
    mf_jax.MeanFlow: {},
    mf_jax.ImprovedMeanFlow: {"velocity": "boundary"},
    mf_jax.PixelMeanFlow: {"velocity": "boundary"},
    mf_jax.AlphaFlow: {"alpha_start": 0.0, "alpha_end": 0.0},
}


def truth(params, z, *, r, t, condition):
    """Return u of Gaussian data around a mean that is the condition, as a plain array."""
    return gaussian_average(z, per_row(r, z), per_row(t, z), per_row(condition, z))


def bent(params, z, **told):
    return truth(None, z, **told) + params * jnp.sin(z + per_row(told["t"] * told["r"], z))


def bent_heads(params, z, **told):
    u = bent(params, z, **told)
    return mf_jax.Prediction(u, u + 0.1)


@jax.jit
def _all_losses(params, draws):

    def of(name):
        field = bent_heads if name == "head" else bent
        loss = functools.partial(OBJECTIVES[name].loss, field, draws=draws)
        (value, metrics), gradient = jax.value_and_grad(loss, has_aux=True)(params)
        return value, gradient, {key: (m.total, m.count) for key, m in metrics.items()}

    return {name: of(name) for name in OBJECTIVES}


def _arrays(shape, seed=0):
    rng = np.random.default_rng(seed)
    return (jnp.asarray(rng.normal(size=shape)) for _ in range(3))


def _draws(x, e, direction, mask=None):
    """Return draws whose directions are given too, since they depend on the shape."""
    draws = SCHEME.draw(KEY, x, jnp.linspace(-1, 1, len(x)), e=e, null=0.0, mask=mask)
    shown = direction if mask is None else direction * mask
    both = zip((draws.instant, draws.interval), split_rows(shown, [len(x) // 2] * 2), strict=True)
    return mf_jax.Draws(*(rows.replace(direction=each) for rows, each in both))


def test_every_objective_takes_any_rank_and_a_padded_batch_has_the_loss_of_its_own_numbers():
    arrays = list(_arrays((8, 12)))
    flat = _all_losses(0.3, _draws(*arrays))
    assert all(np.isfinite(value) and gradient != 0 for value, gradient, _ in flat.values())
    # code that counts axes fails at any other rank
    draws = _draws(*(a.reshape(8, 1, 2, 2, 3) for a in arrays))
    assert_same(_all_losses(0.3, draws), flat)
    padded = [jnp.pad(a, ((0, 0), (0, 5)), constant_values=jnp.nan) for a in arrays[:2]]
    mask = jnp.broadcast_to(jnp.arange(17) < 12, (8, 17))
    direction = jnp.pad(arrays[2], ((0, 0), (0, 5)), constant_values=7.0)
    assert_same(_all_losses(0.3, _draws(*padded, direction, mask=mask)), flat)
    hidden = mask.at[2:4].set(False)
    rest = _all_losses(0.3, _draws(*padded, direction, mask=hidden))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(rest))
    assert rest["meanflow"][2]["v_error"][1] == 3
    rows = _draws(*arrays).interval
    error = jnp.array([1.0, 2.0, 3.0, 4.0])
    weighted = mf_jax.AdaptiveWeight(p=0.5, c=0.1, of="mean")(error, rows)
    np.testing.assert_allclose(weighted, error / 12 / (error / 12 + 0.1) ** 0.5)


def test_pairs_and_a_tree_as_condition():
    """The field gets the caller's own tree; rows without it, and guidance, are told null."""
    x, e, _ = _arrays((400, 3))
    rng = np.random.default_rng(1)
    condition = {"seen": jnp.asarray(rng.normal(size=(400, 3))), "more": (jnp.arange(400.0),)}
    null = {"seen": jnp.array([5.0, 6.0, 7.0]), "more": (-1.0,)}
    scheme = mf_jax.DrawScheme(mf_jax.UniformTimes(), 0.5, label_drop_share=0.3)
    draws = scheme.draw(KEY, x, condition, e=e, null=null)
    rows = draws.instant
    np.testing.assert_array_equal(rows.e, e[::2])
    assert abs(np.mean(rows.dropped) - 0.6) < 0.1
    told, dropped = condition_of(rows), np.asarray(rows.dropped)
    seen = np.where(dropped[:, None], null["seen"], condition["seen"][::2])
    np.testing.assert_array_equal(told["seen"], seen)
    assert rows.dropout is None

    def field(params, z, *, r, t, condition):
        assert jax.tree.structure(condition) == jax.tree.structure(null)
        return condition["seen"] + 0 * z

    _, metrics = mf_jax.MeanFlow(mf_jax.Guidance(omega=2.0)).loss(field, None, draws)
    v = np.asarray(rows.e - rows.x)
    guided = np.where(dropped[:, None], v, 2 * v - null["seen"])
    error = np.mean((told["seen"] - guided) ** 2)
    np.testing.assert_allclose(metrics["v_error"].compute(), error, rtol=1e-6)
    classes = SCHEME.draw(KEY, x, jnp.arange(400) % 3).interval
    assert (classes.null == mf_jax.NO_LABEL).all()
    assert condition_of(SCHEME.draw(KEY, x).instant) is None


@jax.custom_vjp
def _no_forward_mode(z):
    return z


_no_forward_mode.defvjp(lambda z: (z, None), lambda _, gradient: (gradient,))


def without_forward_mode(params, z, **told):
    return _no_forward_mode(bent(params, z, **told))


def test_differences_are_the_jvp_and_need_no_forward_mode():
    draws = _draws(*_arrays((8, 3)))

    @functools.partial(jax.jit, static_argnums=(0, 1))
    def gradients(field, how):
        known = {"derivative": mf_jax.Derivative(*how)}
        objectives = [record(**known, **more) for record, more in DIFFERENTIABLE.items()]
        losses = [lambda p, o=o: o.loss(field, p, draws)[0] for o in objectives]
        return [jax.value_and_grad(loss)(0.3) for loss in losses]

    exact = gradients(bent, ("jvp", 0.0))
    assert_same(gradients(without_forward_mode, ("central", 1e-4)), exact, rtol=1e-5)
    assert_same(gradients(without_forward_mode, ("backward", 1e-6)), exact, rtol=1e-3)
    with pytest.raises((TypeError, NotImplementedError)):  # as JAX says it
        gradients(without_forward_mode, ("jvp", 0.0))
    # over the whole interval u is e - x minus what u changes by
    rows, how = draws.interval, mf_jax.Derivative("backward", 0.999)
    v, z, p = rows.e - rows.x, point_of(rows), mf_jax.AdaptiveWeight(p=0.0)
    end = at_instant(bent, 0.3, at_time(rows, rows.r), advance(z, v, r=rows.r, t=rows.t)).u
    _, metrics = mf_jax.MeanFlow(weight=p, derivative=how).loss(bent, 0.3, draws)
    u = predict(bent, 0.3, rows, z, r=rows.r, t=rows.t).u
    error = np.mean((u - (v - (u - end))) ** 2)
    np.testing.assert_allclose(metrics["u_error"].compute(), error, rtol=1e-6)


def _reread(times=lambda r, t: (r, t), sign=1, condition=1):
    """Return the truth with its times, its sign or its condition misread."""

    def field(params, z, *, r, t, condition, factor=condition):
        r, t = times(r, t)
        return sign * truth(params, z, r=r, t=t, condition=factor * condition)

    return field


def _times_1000(params, z, **told):
    return truth(params, z, **told) + 0.3 * jnp.sin(1000 * per_row(told["t"], z))


def _without_transport(params, z, *, r, t, condition):
    """Solve u = v - (t - r) du/dt with the derivative at fixed z: v averaged there."""
    r, t, mean = (per_row(a, z) for a in (r, t, condition))
    nodes = zip(*np.polynomial.legendre.leggauss(12), strict=True)
    return sum(w / 2 * gaussian_velocity(z, r + (t - r) * (n + 1) / 2, mean) for n, w in nodes)


BROKEN = {
    "intact": (truth, set()),
    "sign": (_reread(sign=-1), {"direction"}),
    "reversed": (_reread(lambda r, t: (1 - r, 1 - t), -1), {"direction", "time_reversed"}),
    "fitted at the other end": (_reread(lambda r, t: (t, r)), {"exchanged"}),
    "without v . du/dz": (_without_transport, {"partial_derivative"}),
    "times 1000": (_times_1000, {"time_scale", "jvp_error"}),
    "condition not used": (_reread(condition=0), {"condition_effect"}),
    "stopped derivative": (_reread(lambda r, t: (r, jax.lax.stop_gradient(t))), {"jvp_error"}),
    "no forward mode": (without_forward_mode, {"jvp_error"}),
}


def test_check_names_each_mistake_and_none_of_the_truth():
    mean = jax.random.normal(KEY, (256,))
    x = mean[:, None] + STD * jax.random.normal(jax.random.key(1), (256, 3))
    draws = SCHEME.draw(KEY, x, mean)
    rules = {"boundary_error", "identity_residual", "additivity_gap", "exact_error"}
    for name, (field, expected) in BROKEN.items():
        found = mf_jax.check(field, 0.0, draws, exact=truth)
        assert found.problems.keys() - rules == expected, f"{name}: {found}"
        assert rules <= found.keys()
        if field is truth:
            assert not found.problems
            assert max(found[rule] for rule in rules - {"boundary_error"}) < 1e-4
        assert ("! direction" in str(found)) == ("direction" in expected)


def q_of(params, z, *, r, t, condition):
    """Return the average divergence of isotropic Gaussians, bent by a parameter."""
    (_, sigma_t), (_, sigma_r) = moments(0, t), moments(0, r)
    limit = (t - (1 - t) * STD**2) / sigma_t**2
    gap = jnp.where(t == r, 1.0, t - r)
    average = jnp.where(t == r, limit, jnp.log(sigma_t / sigma_r) / gap)
    return 3 * average + params * (1 + r)


def test_average_divergence_is_exact_for_gaussian_data():
    draws = _draws(*_arrays((8, 3)))
    divergence, flow = mf_jax.AverageDivergence(), {"flow": truth, "flow_params": None}
    loss = jax.jit(lambda p: divergence.loss(q_of, p, draws, **flow)[0])
    assert loss(0.0) < 1e-18 < 1e-4 < loss(0.1)
    e, mean = next(_arrays((8, 3), seed=2)), jnp.linspace(-1, 1, 8)
    x, log_p = divergence.log_likelihood(q_of, 0.0, e, mean, **flow)
    exact = jax.scipy.stats.norm.logpdf(x, mean[:, None], STD).sum(axis=1)
    np.testing.assert_allclose(log_p, exact, rtol=1e-6)


def test_sampling_with_fresh_noise():
    e, mean = next(_arrays((8, 3))), jnp.linspace(-1, 1, 8)

    def fresh(step: jax.Array) -> jax.Array:
        return jax.random.normal(jax.random.fold_in(KEY, step), e.shape)

    sample = functools.partial(mf_jax.sample, truth, None, e, mean)
    once, renoised = sample(), sample(renoise=fresh)
    np.testing.assert_allclose(once, mean[:, None] + STD * e, rtol=1e-5)
    assert_same(once, renoised)
    twice = sample(times=(1.0, 0.4, 0.0), renoise=fresh)
    z = 0.6 * once + 0.4 * fresh(0)
    u = truth(None, z, r=jnp.zeros(8), t=jnp.full(8, 0.4), condition=mean)
    np.testing.assert_allclose(twice, z - 0.4 * u, rtol=1e-5)


def test_samples_and_likelihoods_know_no_more_than_the_mask_shows():
    e, mask = next(_arrays((8, 3))), jnp.arange(3) < 2
    mixing = lambda p, z, **_: 0.1 * z.sum(1, keepdims=True) * jnp.ones_like(z)  # noqa: E731
    more = {"steps": 2, "renoise": lambda i: e + i}
    shown = mf_jax.sample(mixing, None, e[:, :2], **more | {"renoise": lambda i: e[:, :2] + i})
    whole = mf_jax.sample(mixing, None, e, mask=mask, **more)
    np.testing.assert_allclose(whole, np.pad(shown, ((0, 0), (0, 1))), rtol=1e-6)
    flow = {"flow": mixing, "flow_params": None}
    zero = lambda p, z, *, r, t, condition: 0 * t  # noqa: E731
    x, log_p = mf_jax.AverageDivergence().log_likelihood(zero, None, e, mask=mask, **flow)
    np.testing.assert_array_equal(x[:, 2], 0)
    exact = jax.scipy.stats.norm.logpdf(e[:, :2]).sum(axis=1)
    np.testing.assert_allclose(log_p, exact, rtol=1e-6)


def test_draws_of_narrow_data_and_networks_of_any_precision_fit():
    """Times are as wide as the data, also where JAX takes float64 for usual."""
    x = jnp.float32(next(_arrays((8, 3))))
    condition = jnp.arange(8, dtype=jnp.uint8)
    draws = SCHEME.draw(KEY, x, condition)
    times = (a for rows in (draws.instant, draws.interval) for a in (rows.r, rows.t))
    assert {a.dtype for a in times} == {x.dtype}
    half = SCHEME.draw(KEY, jnp.bfloat16(x), e=-jnp.bfloat16(x)).interval
    assert (half.x.dtype, half.e.dtype) == (jnp.float32, jnp.float32)
    half = lambda p, z, **told: (p["w"] * z).astype(jnp.bfloat16)  # noqa: E731
    params = {"w": jnp.float32(2), "act": jnp.tanh}  # a module has leaves that are no arrays
    for name, objective in OBJECTIVES.items():
        if name not in ("head", "meanflow"):  # which need a second head, and a null
            loss = jax.eval_shape(lambda o=objective: o.loss(half, params, draws)[0])
            assert loss.dtype == x.dtype, name


def test_what_cannot_be_is_named():
    x, e, _ = _arrays((8, 3))
    network = as_field(MLP(depth=1, width=8, num_classes=2))
    draw, vector = functools.partial(SCHEME.draw, KEY), jnp.zeros((8, 2))
    dropping = mf_jax.DrawScheme(mf_jax.UniformTimes(), 0.5, 0.1)
    draws = _draws(x, e, x)
    bare = draws.replace(interval=draws.interval.replace(null=None))
    whole = mf_jax.DrawScheme(mf_jax.UniformTimes(), 1.0, 0.0).draw(KEY, x)
    for build, named in [
        (lambda: draw(x[:7]), "7 rows.*multiple of 2"),
        (lambda: draw(x, jnp.zeros(3)), "condition.*first axis must be 8"),
        (lambda: draw(x, {"a": vector}, null=(0.0, 1.0)), "null"),
        (lambda: draw(x, vector, null=jnp.zeros(5)), "null"),
        (lambda: draw(x, jnp.arange(8), null=0.5), "null.*0.5 is no int"),
        (lambda: draw(x, null=0), "null.*give a condition"),
        (lambda: draw(x, jnp.arange(8, dtype=jnp.uint8), null=-1), "null.*-1 is no uint8"),
        (lambda: mf_jax.sample(network, {}, e, jnp.zeros(8, int)), "told no .*mf_jax.Condition"),
        (lambda: dropping.draw(KEY, x, vector), "null=None.*label_drop_share=0"),
        (lambda: draw(x, e=e[:4]), "e: has shape"),
        (lambda: draw(x, mask=jnp.ones((8, 3))), "mask.*float"),
        (lambda: draw(x, mask=jnp.ones(8, bool)), "mask.*all axes"),
        (lambda: mf_jax.DrawScheme(mf_jax.UniformTimes(), omega_max=2.0), "for_networks"),
        (lambda: mf_jax.Derivative("forward"), "derivative="),
        (lambda: mf_jax.Derivative("jvp", 0.1), "derivative_delta="),
        (lambda: mf_jax.AdaptiveWeight(of="max"), "weight.of"),
        (lambda: mf_jax.check(truth, None, whole), "r < t"),
        (lambda: mf_jax.MeanFlow().loss(lambda p, z, **_: z[:, 0], 0, draws), "field: u is"),
        (lambda: mf_jax.MeanFlow(mf_jax.Guidance(2.0)).loss(bent, 0.0, bare), "null"),
    ]:
        refuses(named, build)
