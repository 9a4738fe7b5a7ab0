"""FLOPs of a step: each objective's docstring against XLA's own count, without compiling."""

import importlib
import re

import jax
import jax.numpy as jnp
import pytest
from steps import lowered_step, parts_of

from mf_jax.flow.couplings import OptimalTransport
from mf_jax.flow.derivative import Derivative
from mf_jax.flow.draws import DrawScheme
from mf_jax.flow.guidance import Guidance
from mf_jax.flow.records import Condition
from mf_jax.flow.times import UniformTimes
from mf_jax.flow.velocities import VelocityEstimate
from mf_jax.models import SIZES as PUBLISHED_SIZES
from mf_jax.models import DiT, InContextDiT, as_field, initial_params
from mf_jax.objectives import OBJECTIVES, Controlled, Controls, Estimated
from mf_jax.objectives.alpha_flow import AlphaFlow
from mf_jax.objectives.flow_matching import FlowMatching
from mf_jax.objectives.improved_meanflow import ImprovedMeanFlow
from mf_jax.objectives.meanflow import MeanFlow
from mf_jax.objectives.shortcut import Shortcut
from mf_jax.objectives.split_meanflow import SplitMeanFlow
from mf_jax.objectives.terminal_velocity import TerminalVelocity

SHAPE, BATCH = (16, 16, 4), 8
SIZES = {"patch_size": 2, "depth": 2, "width": 96, "num_heads": 2, "num_classes": 10}


def _flops(function, *arguments):
    return jax.jit(function).lower(*arguments).cost_analysis()["flops"]


def _network(network):
    params = jax.eval_shape(lambda key: initial_params(network, SHAPE, key), jax.random.key(0))
    return as_field(network), params


def _forward(field, params, head="u"):
    """Return the operations of one forward pass of a batch that ends in one head, or in both."""
    z, t = (
        jax.ShapeDtypeStruct((BATCH, *SHAPE), jnp.float32),
        jax.ShapeDtypeStruct((BATCH,), jnp.float32),
    )

    def forward(params, z, r, t):
        prediction = field(params, z, r=r, t=t, condition=Condition(jnp.zeros(BATCH, jnp.int32)))
        return prediction if head == "both" else prediction.u

    return _flops(forward, params, z, t, t)


def _step(objective, field, params, *, instant_share=0.75, **more):
    """Return the operations of loss and gradient, the draws made beforehand."""
    more |= {"instant_share": instant_share, "for_networks": True}
    scheme = DrawScheme(UniformTimes(), **more)
    x = jax.ShapeDtypeStruct((BATCH, *SHAPE), jnp.float32)

    def loss(params, x):
        draws = scheme.draw(jax.random.key(0), x, jnp.zeros(BATCH, jnp.int32))
        return objective.loss(field, params, draws, jnp.int32(0), params)[0]

    return _flops(jax.grad(loss), params, x)


def _stated(name, q):
    """Return the number that an objective's docstring gives for a share q of rows with r < t."""
    text = " ".join(importlib.import_module(f"mf_jax.objectives.{name}").__doc__.split())
    (cost,) = re.findall(
        r"forward-equivalents of the whole batch[^:]*: ([\d q+]+?)"
        r"[ ,;(.]*(?:\(|;|,|\.|without|in either|more)",
        text,
    )
    return eval(re.sub(r"(\d) q", r"\1 * q", cost), {"q": q})


@pytest.fixture(scope="module")
def dit():
    field, params = _network(DiT(**SIZES))
    return field, params, _forward(field, params)


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


@pytest.mark.parametrize(("name", "objective", "more"), CASES, ids=lambda v: str(v)[:60])
def test_cost_is_the_stated_one(dit, name, objective, more):
    field, params, forward = dit
    measured = _step(objective, field, params) / forward
    stated = _stated(name, 0.25) + more
    assert abs(measured / stated - 1) < 0.05


def test_every_objective_states_its_cost():
    assert set(OBJECTIVES) - {"pixel_meanflow"} <= {name for name, *_ in CASES}


def test_seams_add_the_forwards_that_they_state(dit):
    """Of the whole batch, with a quarter of the rows r < t; a plug-in and a coupling add none."""
    field, params, forward = dit
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
        measured = _step(objective, field, params, **draws) / forward
        assert abs(measured - (3.25 + more)) < 0.05 * 3.25, (objective, draws, measured)


def test_meanflow_costs_hardly_more_than_flow_matching():
    """Where matrix products are nearly all of the work: 3.25 / 3 and 4.5 / 3, to two decimals."""
    field, params = _network(DiT(**SIZES | {"depth": 3, "width": 384, "num_heads": 6}))
    flow_matching, plain, guided = (
        _step(objective, field, params)
        for objective in (FlowMatching(), MeanFlow(), MeanFlow(Guidance(omega=1.0, kappa=0.5)))
    )
    assert plain <= 1.10 * flow_matching
    assert round(guided / flow_matching, 2) <= 1.50


def test_improved_meanflow_with_second_head_costs_little_more_than_its_network():
    """Both passes of 12 blocks, of which 8 exist twice, are 3 forwards through both heads."""
    field, params = _network(InContextDiT(**SIZES | {"depth": 6}, head_depth=4))

    def both(params, z, t):
        prediction = field(params, z, r=t, t=t, condition=Condition(jnp.zeros(BATCH, jnp.int32)))
        return jnp.sum(prediction.u**2) + jnp.sum(prediction.v**2)

    z, t = (
        jax.ShapeDtypeStruct((BATCH, *SHAPE), jnp.float32),
        jax.ShapeDtypeStruct((BATCH,), jnp.float32),
    )
    own = _flops(jax.grad(both), params, z, t)
    step = _step(ImprovedMeanFlow(), field, params, instant_share=0.5, omega_max=8.0)
    assert step <= 1.45 * own


LATENTS = (32, 32, 4)


def _program(network, objective, batch, **draws):
    """Return the whole step of training on latents of 256-pixel images, lowered."""
    return lowered_step(parts_of(network, objective, shape=LATENTS, batch=batch, **draws))


def _giga_flops(network, objective, **draws):
    return _program(network, objective, 16, **draws).cost_analysis()["flops"] / 1e9


def _dit(size, **more):
    return DiT(**PUBLISHED_SIZES["dit"][size] | {"num_classes": 1000} | more)


GUIDED = MeanFlow(Guidance(omega=1.0, kappa=0.5))


def test_guided_step_of_small_dit():
    """GFLOP of a step of 16 rows, linear in the 12 blocks; the published code needs 274."""
    one, two = (_dit("S", patch_size=4, depth=depth) for depth in (1, 2))
    guided, flow_matching = (
        11 * _giga_flops(two, objective) - 10 * _giga_flops(one, objective)
        for objective in (GUIDED, FlowMatching())
    )
    assert guided < 206
    assert guided / flow_matching < 1.51


def test_improved_step_with_heads_of_8_blocks():
    """GFLOP of a step of 16 rows, linear in 4 shared blocks and 8 of each head; published: 539."""
    sizes = {"patch_size": 4, "width": 384, "num_heads": 6, "num_classes": 1000}
    draws = {"instant_share": 0.5, "omega_max": 8.0}
    base, shared, heads = (
        _giga_flops(InContextDiT(**sizes, depth=n, head_depth=m), ImprovedMeanFlow(), **draws)
        for n, m in ((2, 1), (3, 1), (3, 2))
    )
    assert base + 3 * (shared - base) + 7 * (heads - base) < 426


def test_memory_of_a_guided_step_that_computes_blocks_again():
    """Temporary bytes of B/2 with 32 rows; the published code needs 14.8 GB."""
    program = _program(_dit("B", patch_size=2, remat="block", scan=True), GUIDED, 32)
    assert program.compile().memory_analysis().temp_size_in_bytes < 4e9
