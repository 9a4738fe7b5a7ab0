"""Small networks, and what one compiled function for each says about a batch.

The rows of the batch differ from its first row in one thing each.
"""

import functools
import itertools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import NamedSharding, PartitionSpec

from mf_jax import models
from mf_jax.config import make_network
from mf_jax.flow.records import NO_LABEL, Condition, GuidanceScale, Prediction
from mf_jax.generator import Generator
from mf_jax.models import as_field, initial_params, parameter_shapes
from mf_jax.runtime.sharding import make_mesh

IMAGE, CLASSES = (4, 8, 3), {"num_classes": 3}
_SIZES = CLASSES | {"patch_size": 2, "depth": 2, "width": 32, "num_heads": 2}
_PIXEL = {"head_depth": 1, "bottleneck": 5, "positions": "grid"}
_UNET = {"channels": 8, "channel_multipliers": (1, 2), "num_blocks": 1, "dropout": 0.3}
CASES = {
    "dit": (models.DiT(**_SIZES | {"depth": 1, "width": 16}), IMAGE),
    "in_context_dit": (models.InContextDiT(**_SIZES, head_depth=1), IMAGE),
    "pixel": (models.InContextDiT(**_SIZES | {"depth": 1}, **_PIXEL), IMAGE),
    "unet": (models.UNet(**CLASSES, **_UNET, attention_resolutions=(2,)), IMAGE),
    "mlp": (models.MLP(**CLASSES, depth=2, width=16), (2,)),
    "affine": (models.Affine(**CLASSES, width=16), (2, 3, 1)),
    "low_rank": (models.LowRank(**CLASSES, width=16, rank=2), (2, 3, 1)),
}
LABELS = {f"label {label}": {"label": label} for label in (0, 2, NO_LABEL)}
TIMES = {"later t": {"t": 0.8}, "earlier r": {"r": 0.05}}
GUIDANCE = {"omega": {"omega": 3.0}, "t_min": {"t_min": 0.3}, "t_max": {"t_max": 0.7}}
BASE = {"label": 1, "r": 0.2, "t": 0.7, "omega": 2.0, "t_min": 0.1, "t_max": 0.9, "seed": 5}
ROWS = {
    "base": {},
    **LABELS,
    **TIMES,
    **GUIDANCE,
    "both times": {"r": 0.3, "t": 0.8},
    "no guidance": {"omega": 1.0, "t_min": 0.0, "t_max": 1.0},
    "corner": {},
    "swapped": {},
    "seed": {"seed": 6},
}
STEP = 0.01  # of the difference quotient
ORDER = {name: i for i, name in enumerate(ROWS)}


class Answers(NamedTuple):
    """Predictions of all rows, their derivative along (waves, 0, 1) twice, and a gradient."""

    exact: Prediction
    coarse: Prediction
    fresh: Prediction
    turned: Prediction
    derivative: Prediction
    quotient: Prediction
    gradient: Any
    fresh_params: Any


def draw(network, shape):
    """Return random parameters of a network, none of them zero, those of norms near 1."""
    rng, shapes = np.random.default_rng(1), flatten_dict(parameter_shapes(network, shape), sep="/")
    drawn = {
        name: np.float32(name.endswith("scale") + 0.3 * rng.standard_normal(leaf.shape))
        for name, leaf in shapes.items()
    }
    return unflatten_dict(drawn, sep="/")


def untrained(spec, config):
    """Return a generator with random parameters."""
    network = make_network(config, spec, for_sampling=True)
    replicated = NamedSharding(make_mesh(data=0, fsdp=1), PartitionSpec())
    params = jax.device_put(draw(network, spec.shape), replicated)
    return Generator(config, network, params, spec, step=0, ema="none")


def make_z(shape):
    """Return the same z in every row, but for one number and two exchanged patches."""
    z = np.stack([np.random.default_rng(2).standard_normal(shape, np.float32)] * len(ROWS))
    z[ORDER["corner"]].flat[0] += 1
    if shape == IMAGE:
        i = ORDER["swapped"]
        z[i, :2, :2], z[i, :2, 2:4] = z[0, :2, 2:4], z[0, :2, :2]
    return z


def inputs():
    def column(key, dtype=jnp.float32):
        return jnp.asarray([(BASE | row)[key] for row in ROWS.values()], dtype)

    guidance = GuidanceScale(*map(column, ("omega", "t_min", "t_max")))
    condition = Condition(column("label", int), guidance, column("seed", jnp.uint32))
    return column("r"), column("t"), condition


@functools.cache
def answers(name):
    """Return what the network's one compiled function says of `ROWS`."""
    (network, shape), (r, t, condition) = CASES[name], inputs()
    z = jnp.asarray(make_z(shape))
    waves = jnp.cos(jnp.arange(z.size, dtype=jnp.float32)).reshape(z.shape)

    @jax.jit
    def run(params, z, r, t, condition):
        def value(params, z, t, network=network):
            return as_field(network)(params, z, r=r, t=t, condition=condition)

        def weighted(params):
            both = jax.jvp(lambda *x: value(params, *x), (z, t), (waves, jnp.ones_like(t)))
            heads = [head for head in both[0] if head is not None]
            return sum(jnp.sum(head * waves**k) for k, head in enumerate(heads, 1)), both

        gradient, (exact, derivative) = jax.grad(weighted, has_aux=True)(params)
        return exact, derivative, value(params, z, t, network.clone(dtype="bfloat16")), gradient

    def turn(tree, by):
        return jax.tree.map(lambda x: jnp.roll(x, by, axis=0), tree)

    params = draw(network, shape)
    fresh_params = initial_params(network, shape, jax.random.key(0, impl="rbg"))
    exact, derivative, coarse, gradient = run(params, z, r, t, condition)
    turned = turn(run(params, *turn((z, r, t, condition), 1))[0], -1)
    ahead, behind = (run(params, z + h * waves, r, t + h, condition)[0] for h in (STEP, -STEP))
    quotient = jax.tree.map(lambda a, b: (a - b) / (2 * STEP), ahead, behind)
    fresh = run(fresh_params, z, r, t, condition)[0]
    return Answers(exact, coarse, fresh, turned, derivative, quotient, gradient, fresh_params)


def assert_apart(prediction, names, head="u"):
    """Assert that a prediction differs between any two of these rows."""
    for pair in itertools.combinations(names, 2):
        a, b = (getattr(prediction, head)[ORDER[name]] for name in pair)
        assert np.abs(a - b).max() > 1e-4, pair
