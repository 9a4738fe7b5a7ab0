"""A whole training step as a program, for tests of what it costs and exchanges."""

import jax
import optax
from jax.sharding import Mesh

from mf_jax.bench.step import placed_step
from mf_jax.flow.draws import DrawScheme
from mf_jax.flow.times import LogitNormalTimes
from mf_jax.step import StepParts, initial_state, make_train_step


def parts_of(network, objective, *, shape, batch, **draws):
    """Return the parts of a step with adamw and one moving average."""
    return StepParts(
        network=network,
        shape=shape,
        objective=objective,
        scheme=DrawScheme(LogitNormalTimes(), for_networks=True, **draws),
        optimizer=optax.adamw(1e-4),
        ema_names=("0.9",),
        seed=0,
        log_every_steps=100,
        batch_size=batch,
    )


def lowered_step(parts, mesh: Mesh | None = None):
    """Return the step lowered, for a mesh or for one device."""
    if mesh is None:
        state = jax.eval_shape(lambda: initial_state(parts))
        return jax.jit(make_train_step(parts), donate_argnums=0).lower(state, *parts.batch)
    step, *arguments = placed_step(parts, mesh)
    return step.lower(*arguments)
