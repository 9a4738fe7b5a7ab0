"""The training state and the one pure step that advances it."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax.flatten_util import ravel_pytree
from jax.sharding import Mesh
from jaxtyping import Array, Int, PyTree

from mf_jax.data import Batch, Stored
from mf_jax.flow.draws import DrawScheme, key_of
from mf_jax.flow.records import NOTHING_TOLD, Draws, Told
from mf_jax.models import as_field, initial_params, parameter_shapes, with_gather
from mf_jax.models.blocks import is_axis_of_block
from mf_jax.objectives import Objective
from mf_jax.objectives.terms import Average, average, average_over
from mf_jax.optim import average_name, update_averages
from mf_jax.runtime.sharding import gather_late, per_device

NEVER = -1


@flax.struct.dataclass
class TrainState:
    """All that changes from step to step and is in a checkpoint, or its shapes or shardings."""

    step: PyTree
    params: PyTree
    ema: dict[str, PyTree]  # averages by name
    opt_state: PyTree
    metrics: dict[str, Average]  # since the last row of metrics.jsonl
    first_bad_step: PyTree  # from 1, with a metric that is not finite, or `NEVER`; metrics stay
    frozen: PyTree = None  # see `Objective`; it stays the same, and no checkpoint has it


@dataclasses.dataclass(frozen=True)
class StepParts:
    """Parts of a training step, fixed for a run."""

    network: nn.Module
    shape: tuple[int, ...]  # of one data element
    objective: Objective
    scheme: DrawScheme
    optimizer: optax.GradientTransformation
    ema_names: tuple[str, ...]
    seed: int
    log_every_steps: int  # over which metrics are averaged
    batch_size: int
    stored: Stored | None = None  # see `Source`
    more: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # see `DataSpec`
    gather: str = "step"  # one of `sharding.GATHERS`
    ema_rampup: float = 0.0  # see `update_averages`
    ema_every_steps: int = 1
    augment: Callable | None = None  # see `mf_jax.data.augment`
    microbatch: int = 0  # rows, over all devices, with a gradient at once; 0 = all of the batch

    @property
    def batch(self) -> Batch:
        """Shapes of the rows, as the data have them, of their labels and of all else they bring."""
        row = self.stored.rows if self.stored else jax.ShapeDtypeStruct(self.shape, jnp.float32)
        rows = {"x": (row.shape, row.dtype), "labels": ((), jnp.int32), **self.more}
        size, struct = self.batch_size, jax.ShapeDtypeStruct
        return Batch(**{k: struct((size, *shape), dtype) for k, (shape, dtype) in rows.items()})

    def draw(self, step: Int[Array, ""] | int, *batch: PyTree) -> Draws:
        """Draw a step from the fields of a `Batch`; its key is a pure function of (seed, step)."""
        x, labels, condition, e, mask = Batch(*batch)
        key, more = jax.random.fold_in(_keys(self.seed)[1], step), {"e": e, "mask": mask}
        if self.stored:
            key, stored_key = jax.random.split(key)
            x = self.stored.draw(stored_key, x)
        if self.augment:
            key, augment_key = jax.random.split(key)
            x, more["augment"] = self.augment(augment_key, x)
        if condition is not None:
            labels, more["null"] = Told(labels, condition), NOTHING_TOLD
        return self.scheme.draw(key, x, labels, **more)

    @functools.cached_property
    def gradient_of_rows(self) -> Callable:
        """Gradient and metrics of rows by a network, traced once for all who ask for the same."""

        @functools.partial(jax.jit, static_argnums=0, inline=True)
        def of_rows(
            network: nn.Module, whole: tuple[PyTree, ...], draws: Draws, step: Int[Array, ""]
        ) -> tuple[PyTree, dict[str, Average]]:
            params, target_params, frozen = whole
            objective, field = self.objective.with_frozen(frozen), as_field(network)
            of_params = jax.value_and_grad(objective.loss, argnums=1, has_aux=True)
            (loss, metrics), gradient = of_params(field, params, draws, step, target_params)
            return gradient, {"loss": average_over(loss, draws), **metrics}

        return of_rows

    @functools.cached_property
    def metric_names(self) -> tuple[str, ...]:
        """Names of what a step measures, which the loss alone knows."""

        def measure(params: PyTree, frozen: PyTree, *batch: PyTree) -> dict[str, Average]:
            whole = params, params if self.objective.target_ema else None, frozen
            draws = self.draw(0, *batch)
            return _in_turn(self, self.network, whole, draws, jnp.int32(0))[1]

        shapes = parameter_shapes(self.network, self.shape), self.objective.frozen
        return ("grad_norm", *jax.eval_shape(measure, *shapes, *self.batch))


def _keys(seed: int) -> tuple[Array, Array]:
    """Return the key of the initial parameters and the key of the steps."""
    return tuple(jax.random.split(key_of(seed)))


def initial_state(parts: StepParts, params: PyTree | None = None) -> TrainState:
    """Return the state before the first step; params None = drawn from the seed.

    Of what is frozen it has zeros, which take no time to load and as long to compute with.
    """
    if params is None:
        params = initial_params(parts.network, parts.shape, _keys(parts.seed)[0])
    return TrainState(
        step=jnp.int32(0),
        params=params,
        ema={name: jax.tree.map(jnp.copy, params) for name in parts.ema_names},
        opt_state=parts.optimizer.init(params),
        metrics={name: Average(jnp.float32(0), jnp.float32(0)) for name in parts.metric_names},
        first_bad_step=jnp.int32(NEVER),
        frozen=jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), parts.objective.frozen),
    )


def _gradient(
    parts: StepParts, state: TrainState, batch: tuple[PyTree, ...], mesh: Mesh | None = None
) -> tuple[PyTree, dict[str, Average]]:
    """Return gradient and metrics of one step."""
    target_ema, network, late = parts.objective.target_ema, parts.network, None
    target_params = state.ema[average_name(target_ema)] if target_ema else None
    whole, draws = (state.params, target_params, state.frozen), parts.draw(state.step, *batch)
    if mesh is None or mesh.size == 1:
        gradient, metrics = _in_turn(parts, network, whole, draws, state.step)
    else:
        if parts.gather == "block":
            late = is_axis_of_block
            network = with_gather(network, gather_late(mesh, state.params, late))
        of_rows = functools.partial(_in_turn, parts, network, step=state.step)
        gradient, metrics = per_device(of_rows, mesh, whole, draws, late=late)
    return gradient, {**metrics, "grad_norm": average(optax.tree.norm(gradient)[None])}


def _in_turn(
    parts: StepParts, network: nn.Module, whole: PyTree, draws: Draws, step: Int[Array, ""]
) -> tuple[PyTree, PyTree]:
    """Return the mean gradient and the summed metrics of rows, a microbatch at a time."""
    num = parts.batch_size // (parts.microbatch or parts.batch_size)
    if num == 1:
        return parts.gradient_of_rows(network, whole, draws, step)
    leaves, form = jax.tree.flatten(draws)
    turns = [x.reshape(num, len(x) // num, *x.shape[1:]) for x in leaves]

    def of_part(part: list[Array]) -> tuple[PyTree, PyTree]:
        return parts.gradient_of_rows(network, whole, form.unflatten(part), step)

    def add(sums: PyTree, part: list[Array]) -> tuple[PyTree, None]:
        return optax.tree.add(sums, of_part(part)), None

    zeros = optax.tree.zeros_like(jax.eval_shape(of_part, [x[0] for x in turns]))
    (gradient, metrics), _ = jax.lax.scan(add, zeros, turns)
    return jax.tree.map(lambda x: x / num, gradient), metrics


def make_train_step(parts: StepParts, mesh: Mesh | None = None) -> Callable[..., TrainState]:
    """Return the pure function of one step: (state, x, labels, and what else) -> state."""

    rates = {"rampup": parts.ema_rampup, "every_steps": parts.ema_every_steps}
    rates |= {"batch_size": parts.batch_size, "fixed": average_name(parts.objective.target_ema)}

    def train_step(state: TrainState, *batch: PyTree) -> TrainState:
        gradient, metrics = _gradient(parts, state, batch, mesh)
        updates, opt_state = parts.optimizer.update(gradient, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        ema = update_averages(state.ema, params, step=state.step, **rates)
        logged = _collect(parts, state, metrics)
        return TrainState(state.step + 1, params, ema, opt_state, *logged, state.frozen)

    return train_step


def _collect(
    parts: StepParts, state: TrainState, metrics: dict[str, Average]
) -> tuple[dict[str, Average], Int[Array, ""]]:
    """Add a step's metrics to the log's, and note the first step that is not finite."""
    starts_anew = state.step % parts.log_every_steps == 0
    stands_still = state.first_bad_step != NEVER
    # one array of all sums and counts; an operation on each would be a small program of its own
    before, unravel = ravel_pytree(state.metrics)
    more, _ = ravel_pytree(metrics)
    collected = unravel(jnp.where(stands_still, before, more + jnp.where(starts_anew, 0, before)))
    is_bad = jnp.any(jnp.stack([~jnp.isfinite(metric.total) for metric in metrics.values()]))
    first_bad_step = jnp.where(~stands_still & is_bad, state.step + 1, state.first_bad_step)
    return collected, first_bad_step
