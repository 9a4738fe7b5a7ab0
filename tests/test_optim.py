"""Schedules, clipping, muon and moving averages."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
from conftest import refuses
from flax.traverse_util import flatten_dict
from recorded import FOLDER

from configs.default import get_config
from mf_jax import optim
from mf_jax.config import averages
from mf_jax.models import DiT, InContextDiT, UNet, parameter_shapes
from mf_jax.models.blocks import stack_blocks
from mf_jax.optim import choose_ema, forgetful, make_optimizer, muon_dimensions
from mf_jax.published.names import our_name


def test_schedules():
    def rates(steps, **more):
        rate = optim.learning_rate(lr=2.0, num_steps=10, **more)
        return np.array([rate(step) for step in steps])

    warm = rates(range(7), warmup_steps=4, schedule="constant")
    np.testing.assert_allclose(warm, [0.5, 1.0, 1.5, 2.0, 2.0, 2.0, 2.0])
    cosine = rates([0, 5, 10], warmup_steps=0, schedule="cosine")
    np.testing.assert_allclose(cosine, [2.0, 1.0, 0.0], atol=1e-6)
    for warmup_steps in (1, 10):
        extreme = rates(range(12), warmup_steps=warmup_steps, schedule="cosine")
        assert np.isfinite(extreme).all()
        assert extreme.max() <= 2


def _optimizer(rate=0.1, **more):
    settings = {"b1": 0.9, "b2": 0.95, "weight_decay": 0.0, "clip_norm": 0.0} | more
    return make_optimizer(lambda step: rate, **settings)


def test_clipping_bounds_the_gradient_that_adam_sees():
    params, gradient = {"w": jnp.zeros(2)}, {"w": jnp.array([3.0, 4.0])}
    for clip_norm, seen in {1.0: [0.6, 0.8], 0.0: [3.0, 4.0], 10.0: [3.0, 4.0]}.items():
        optimizer = _optimizer(b1=0.0, clip_norm=clip_norm)
        _, state = optimizer.update(gradient, optimizer.init(params), params)
        np.testing.assert_allclose(optax.tree.get(state, "mu")["w"], seen, rtol=1e-6)


def test_weight_decay_is_decoupled():
    params = {"w": jnp.array([10.0])}
    for name in ("adamw", "radam"):
        optimizer = _optimizer(weight_decay=0.5, name=name)
        updates, _ = optimizer.update({"w": jnp.zeros(1)}, optimizer.init(params), params)
        np.testing.assert_allclose(updates["w"], -0.1 * 0.5 * 10.0, rtol=1e-6)
    gradient, plain = {"w": jnp.array([3.0])}, optax.radam(0.1, 0.9, 0.95)
    moved = _step(params, gradient, name="radam")["w"] / 10  # at ten times the rate
    np.testing.assert_allclose(moved, plain.update(gradient, plain.init(params))[0]["w"], rtol=1e-6)


def _left(names, steps, **settings):
    """Return what is left of the start, 1, after steps towards 0, by the name of an average."""
    averages = {name: {"w": jnp.array(1.0)} for name in names}
    for step in steps:
        averages = optim.update_averages(averages, {"w": jnp.array(0.0)}, step=step, **settings)
    return [average["w"] for average in averages.values()]


def test_averages_move_as_their_names_say():
    """A half-life halves the distance in that many thousand images, here five steps of 100."""
    left = _left(("0.9", "0.5kimg"), range(5), batch_size=100)
    np.testing.assert_allclose(left, [0.9**5, 0.5], rtol=1e-6)
    decay = optim.decay_of("2000kimg", batch_size=1024)
    np.testing.assert_allclose(decay ** (2e6 / 1024), 0.5, rtol=1e-9)
    assert optim.decay_of("0.9999", batch_size=1024) == 0.9999


def test_averages_forget_their_start_by_a_ramp():
    """Their half-life is at most a share of the steps done; the average of targets has no limit."""
    ramp = {"batch_size": 1, "rampup": 0.05, "fixed": "0.99"}
    for step, slow in ((0, 0), (200, 0.5**0.1), (10**6, 0.9999)):
        left = _left(("0.9999", "0.5", "0.99"), [step], **ramp)
        np.testing.assert_allclose(left, [slow, min(slow, 0.5), 0.99], rtol=1e-6)
    told = forgetful(("0.995", "0.9999"), num_steps=4000, batch_size=1)
    assert told.startswith("after 4,000 steps 67% of 0.9999 will still be the initial parameters")
    assert forgetful(("0.995",), num_steps=4000, batch_size=1) == ""
    assert forgetful(("1.0",), num_steps=4000, batch_size=1, fixed="1.0") == ""


def test_averages_that_move_every_few_steps_move_as_far():
    """By decay^4 after the 4th step and the 8th; the average of targets moves at each step."""
    more = {"batch_size": 100, "every_steps": 4, "fixed": "0.99"}
    for steps in range(10):
        left = _left(("0.9", "0.5kimg", "0.99"), range(steps), **more)
        moves = steps // 4 * 4
        np.testing.assert_allclose(left, [0.9**moves, 0.5 ** (moves / 5), 0.99**steps], rtol=1e-5)
    left = _left(("0.9999",), [199], batch_size=1, rampup=0.05, every_steps=4)
    np.testing.assert_allclose(left, 0.5 ** (4 / (0.05 * 199)), rtol=1e-5)


def test_averages_are_named_by_decay_or_half_life():
    config = get_config()
    config.ema.decays, config.ema.halflives_kimg = (0.99,), (500.0, 1e6, 0.25)
    config.objective.name, config.objective.target_ema = "terminal_velocity", 0.95
    assert averages(config) == ("0.99", "500kimg", "1000000kimg", "0.25kimg", "0.95")
    assert choose_ema("sample.ema", "500kimg", averages(config)) == "500kimg"
    config.ema.decays = ()
    assert choose_ema("sample.ema", "", averages(config)) == "500kimg"
    assert choose_ema("sample.ema", "", ("1.0",)) == "none"  # a frozen teacher is not the run's own
    known = r"sample.ema='1000kimg': this run has 500kimg, 1000000kimg"
    refuses(known, choose_ema, "sample.ema", "1000kimg", averages(config))


SHAPE = (8, 8, 3)
_SMALL = {"patch_size": 2, "depth": 2, "width": 16, "num_heads": 2, "num_classes": 3}
NETWORKS = {
    "dit": DiT(**_SMALL),
    "imf": InContextDiT(**_SMALL, head_depth=1),
    "pmf": InContextDiT(**_SMALL, head_depth=1, bottleneck=5, positions="grid"),
    "unet": UNet(num_classes=0, channels=8, channel_multipliers=(1, 1), num_blocks=1),
}


def test_muon_moves_what_is_a_matrix_in_the_published_code():
    """The published optimiser takes what has two axes; ours have other shapes, so names decide.

    Tables, norms, biases and convolutions are left to Adam.
    """
    case = np.load(FOLDER / "pmf_no_perceptual.npz")
    published = [name for name in case if name.startswith("params/net/") and case[name].ndim == 2]
    matrices = {our_name("pmf", name.removeprefix("params/net/"))[0] for name in published}
    ours = flatten_dict(muon_dimensions(parameter_shapes(NETWORKS["pmf"], SHAPE)), sep="/")
    moved = {name for name, dimensions in ours.items() if dimensions is not None}
    assert moved == {name for name in matrices if name in ours}
    assert len(moved) > 20
    assert {"u_head/final/kernel", "h_tokens/embedding/out/kernel"} <= moved
    for network in NETWORKS.values():
        shapes = flatten_dict(parameter_shapes(network, SHAPE), sep="/")
        dimensions = flatten_dict(muon_dimensions(parameter_shapes(network, SHAPE)), sep="/")
        for leaf, shape in shapes.items():
            sees_data = "patch_embedding" in leaf or "bottleneck" in leaf
            if not leaf.endswith("kernel") or sees_data or len(shape.shape) > 2:
                assert dimensions[leaf] is None, leaf
            elif "qkv" not in leaf:  # asked for in its split form alone
                assert dimensions[leaf] is not None, leaf


def _step(params, gradient, *, name="muon"):
    optimizer = _optimizer(1.0, name=name, momentum=0.9)
    return jax.jit(lambda g, p: optimizer.update(g, optimizer.init(p), p)[0])(gradient, params)


def _moved(kernel, name="layer"):
    """Return how muon moves a kernel whose gradient it is itself."""
    params = {name: {"kernel": jnp.asarray(kernel, jnp.float32)}}
    return _step(params, params)[name]["kernel"]


def _random(shapes, seed):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda s: jnp.asarray(rng.standard_normal(s.shape), jnp.float32), shapes)


def test_muon_moves_a_matrix_by_a_nearly_orthogonal_one():
    """By itself and not by its square, twice as far where there are four outputs for each input."""
    rng = np.random.default_rng(0)
    left, right = (np.linalg.qr(rng.standard_normal((n, 4)))[0] for n in (4, 16))
    along = -left.T @ np.asarray(_moved(left * [10.0, 3.0, 1.0, 0.5] @ right.T)) @ right
    assert 2 * 0.6 < np.diag(along).min() < np.diag(along).max() < 2 * 1.3
    np.testing.assert_allclose(along, np.diag(np.diag(along)), atol=1e-4)


def test_blocks_in_a_loop_move_as_blocks_one_after_another():
    """Each layer's matrix, and each part of a fused one, is made orthogonal by itself."""
    params, gradient = (_random(parameter_shapes(NETWORKS["dit"], SHAPE), seed) for seed in (0, 1))
    apart = stack_blocks(_step(params, gradient))
    together = _step(stack_blocks(params), stack_blocks(gradient))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), apart, together)


def test_fused_projections_are_three_matrices():
    rng = np.random.default_rng(0)
    parts = [rng.standard_normal((6, 6)) * scale for scale in (1, 1e-3, 10)]
    apart = np.concatenate([_moved(part) for part in parts], axis=1)
    np.testing.assert_allclose(_moved(np.concatenate(parts, axis=1), "qkv"), apart, atol=5e-5)


def test_what_muon_leaves_moves_as_under_adam_with_nesterov_momentum():
    params = {"norm": {"scale": jnp.array([1.0, 2.0, 3.0])}, "layer": {"kernel": jnp.eye(3)}}
    gradient = {"norm": {"scale": jnp.array([0.1, -2.0, 0.0])}, "layer": {"kernel": jnp.eye(3)}}
    adam = optax.nadam(1.0, b1=0.9, b2=0.95)
    expected, _ = adam.update(gradient, adam.init(params), params)
    moved = _step(params, gradient)["norm"]["scale"]
    np.testing.assert_allclose(moved, expected["norm"]["scale"], rtol=1e-6)

    known = r"optim.name='moun': must be one of adamw, muon.*mean muon"
    refuses(known, _optimizer, name="moun")
