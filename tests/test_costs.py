"""FLOPs of a step: each objective's docstring against XLA's own count, without compiling."""

import importlib
import re

import jax
import jax.numpy as jnp
import pytest
from steps import lowered_step, parts_of

from launch import textbook
from mf_jax.flow.couplings import OptimalTransport
from mf_jax.flow.derivative import Derivative
from mf_jax.flow.draws import DrawScheme
from mf_jax.flow.guidance import Guidance
from mf_jax.flow.records import Prediction
from mf_jax.flow.times import UniformTimes
from mf_jax.flow.velocities import VelocityEstimate
from mf_jax.models import SIZES as PUBLISHED_SIZES
from mf_jax.models import DiT, InContextDiT
from mf_jax.objectives import OBJECTIVES, Controlled, Controls, Estimated
from mf_jax.objectives.alpha_flow import AlphaFlow
from mf_jax.objectives.flow_matching import FlowMatching
from mf_jax.objectives.improved_meanflow import ImprovedMeanFlow
from mf_jax.objectives.meanflow import MeanFlow
from mf_jax.objectives.shortcut import Shortcut
from mf_jax.objectives.split_meanflow import SplitMeanFlow
from mf_jax.objectives.terminal_velocity import TerminalVelocity

SIZE, WIDTH, BATCH = 4, 1024, 8


def _shape(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def _params(num_heads=1):
    square = _shape(WIDTH, WIDTH)
    ends = {"in": _shape(SIZE, WIDTH), "times": _shape(2, WIDTH), "out": _shape(WIDTH, SIZE)}
    return ends | {"hidden": [square] * 3, "heads": [square] * num_heads}


def _field(params, z, *, r, t, condition):
    """Predict by square matrices, whose products are nearly all of the work."""
    x = jnp.tanh(z @ params["in"] + jnp.stack([r, t], axis=1) @ params["times"])
    for w in params["hidden"]:
        x = jnp.tanh(x @ w)
    return Prediction(*(jnp.tanh(x @ w) @ params["out"] for w in params["heads"]))


def _flops(function, *arguments):
    return jax.jit(function).lower(*arguments).cost_analysis()["flops"]


def _forward(params):
    """Return the operations of one forward pass of a batch."""
    z, t = _shape(BATCH, SIZE), _shape(BATCH)
    return _flops(lambda p, z, t: _field(p, z, r=t, t=t, condition=None), params, z, t)


def _step(objective, params, **more):
    """Return the operations of a step's draws, loss and gradient; 6 of 8 rows have r = t."""
    scheme = DrawScheme(UniformTimes(), 0.75, for_networks=True, **more)

    def loss(params, x):
        draws = scheme.draw(jax.random.key(0), x, jnp.zeros(BATCH, jnp.int32))
        return objective.loss(_field, params, draws, jnp.int32(0), params)[0]

    return _flops(jax.grad(loss), params, _shape(BATCH, SIZE))


def _stated(name, q):
    """Return the number that an objective's docstring gives for a share q of rows with r < t."""
    text = " ".join(importlib.import_module(f"mf_jax.objectives.{name}").__doc__.split())
    (cost,) = re.findall(
        r"forward-equivalents of the whole batch[^:]*: ([\d q+]+?)"
        r"[ ,;(.]*(?:\(|;|,|\.|without|in either|more)",
        text,
    )
    return eval(re.sub(r"(\d) q", r"\1 * q", cost), {"q": q})


CASES = [
    ("flow_matching", FlowMatching(), 0.0),
    ("meanflow", MeanFlow(), 0.0),
    ("meanflow", MeanFlow(Guidance(omega=2.0)), 1.0),
    ("meanflow", MeanFlow(Guidance(omega=1.0, kappa=0.5)), 1.25),
    ("improved_meanflow", ImprovedMeanFlow(velocity="boundary"), 0.0),
    ("improved_meanflow", ImprovedMeanFlow(Guidance(omega=2.0), velocity="boundary"), 1.0),
    ("alpha_flow", AlphaFlow(alpha_start=0.1, alpha_end=0.1, derivative_below=0.0), 0.0),
    ("split_meanflow", SplitMeanFlow(), 0.0),
    ("split_meanflow", SplitMeanFlow(Guidance(omega=2.0)), 0.75),
    ("shortcut", Shortcut(), 0.0),
    ("shortcut", Shortcut(Guidance(omega=2.0)), 0.5),
    ("terminal_velocity", TerminalVelocity(), 0.0),
    ("terminal_velocity", TerminalVelocity(Guidance(omega=2.0)), 0.75),
    ("controls", Controlled(FlowMatching(), Controls(monotone=1.0)), 3.0),
]


def test_every_objective_costs_what_it_states():
    params = _params()
    for name, objective, more in CASES:
        measured = _step(objective, params) / _forward(params)
        assert abs(measured / (_stated(name, 0.25) + more) - 1) < 0.05, (objective, measured)
    assert set(OBJECTIVES) - {"pixel_meanflow"} <= {name for name, *_ in CASES}
    two = _step(ImprovedMeanFlow(), _params(num_heads=2))
    assert abs(two / (3 * _forward(_params(num_heads=2)) + 0.5 * _forward(params)) - 1) < 0.05, two


def test_seams_add_the_forwards_that_they_state():
    """Of the whole batch, with a quarter of the rows r < t; a plug-in and a coupling add none."""
    plain, average = MeanFlow(), VelocityEstimate("average", tangent=1.0)
    for objective, draws, more in (
        (Estimated(plain, VelocityEstimate("batch", target=0.2, tangent=0.2)), {}, 0),
        (Estimated(plain, VelocityEstimate("network", tangent=1.0)), {}, 0.25),
        (Estimated(plain, VelocityEstimate("network", target=0.5)), {}, 0.25),
        (Estimated(plain, average, ema=0.9), {}, 0.25),
        (Estimated(plain, VelocityEstimate("average", target=0.5), ema=1.0), {}, 1),
        (MeanFlow(derivative=Derivative("backward")), {}, 0),
        (MeanFlow(derivative=Derivative("central")), {}, 0.25),
        (plain, {"coupling": OptimalTransport()}, 0),
        (plain, {"coupling": OptimalTransport(4)}, 0),
    ):
        measured = _step(objective, _params(), **draws) / _forward(_params())
        assert abs(measured / (3.25 + more) - 1) < 0.02, (objective, draws, measured)


def _program(size, batch, **sizes):
    """Return the whole guided step of training on latents of 256-pixel images, lowered."""
    network = DiT(**PUBLISHED_SIZES["dit"][size] | {"num_classes": 1000} | sizes)
    guided = MeanFlow(Guidance(omega=1.0, kappa=0.5))
    return lowered_step(parts_of(network, guided, shape=(32, 32, 4), batch=batch))


def test_guided_step_of_small_dit():
    """GFLOP of a step of 16 rows, linear in the 12 blocks; the published code needs 274."""
    steps = (_program("S", 16, patch_size=4, depth=depth) for depth in (1, 2))
    one, two = (step.cost_analysis()["flops"] / 1e9 for step in steps)
    assert one + 11 * (two - one) < 206


def test_textbook_steps_have_the_flops_of_the_published_ones(monkeypatch):
    """The published ones of 12 blocks need 274 and, with heads of 8, 539 GFLOP."""

    def gflop(kind, depth, head_depth):
        monkeypatch.setattr(textbook, "DEPTH", depth)
        monkeypatch.setattr(textbook, "HEAD_DEPTH", head_depth)
        return textbook.lowered(kind)[0].cost_analysis()["flops"] / 1e9

    one, two = (gflop("guided", n, 0) for n in (1, 2))
    assert one + 11 * (two - one) == pytest.approx(274.6, abs=0.1)
    # a shared block adds 34.9, a block of each head 49.8: 538.8 of 4 and 8
    assert gflop("improved", 2, 1) == pytest.approx(85.7, abs=0.1)


def test_improved_step_with_two_heads():
    """GFLOP of a step of 16 rows; a shared block adds 24.9, a block of each head 14.9.

    So 4 and 8 need 419, where the published code needs 539.
    """
    sizes = {"patch_size": 4, "width": 384, "num_heads": 6, "num_classes": 1000}
    network = InContextDiT(**sizes, depth=2, head_depth=1)
    more = {"shape": (32, 32, 4), "batch": 16, "instant_share": 0.5, "omega_max": 8.0}
    step = lowered_step(parts_of(network, ImprovedMeanFlow(), **more))
    assert step.cost_analysis()["flops"] / 1e9 < 66


def test_memory_of_a_guided_step_that_computes_blocks_again():
    """Temporary bytes of B/2 with 32 rows; the published code needs 14.8 GB."""
    program = _program("B", 32, patch_size=2, remat="block", scan=True)
    assert program.compile().memory_analysis().temp_size_in_bytes < 4e9
