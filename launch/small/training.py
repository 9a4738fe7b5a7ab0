"""Small networks trained with some seeds by one compiled program, and what is measured of them.

The method comes from the core alone: draws, objective, sampler and diagnostics. Network, data and
loop are this file's own, as in docs/from_your_own_code.md.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, PyTree

import mf_jax
from launch.small.data import Data, data_of, dealt, normal
from mf_jax.flow.paths import velocity
from mf_jax.flow.records import Draws, Field, Rows

SEEDS = 3
DECAY = 0.99  # of the average that is measured, and of the source `average`
SCHEME = mf_jax.DrawScheme(mf_jax.UniformTimes(), instant_share=0.5, label_drop_share=0.0)
_WAVES, _WIDTHS = (1.0, 2.0, 4.0), (0.1, 0.3, 1.0)
_MOST_STEPS = 2**13


@dataclasses.dataclass(frozen=True)
class Tuned(mf_jax.Objective):
    """An objective and what numbers add to it, so that one program serves all of their values.

    names: of numbers: `target SOURCE` and `tangent SOURCE` are shares of the velocity estimates
    `network`, `average` and `exact` (of all rows of `data`); names of `Controls` and `mmd` are
    factors of terms, the last one of the MMD between one-step samples and data. numbers: a plain 0
    leaves out what it costs.
    """

    objective: mf_jax.Objective
    names: tuple[str, ...] = ()
    numbers: Any = ()
    data: str = ""

    def loss(self, field, params, draws, step=0, target_params=None):
        """See `Objective.loss`."""
        both = zip(self.names, self.numbers, strict=True)
        on = {name: n for name, n in both if not (isinstance(n, float) and n == 0)}
        for name in [name for name in on if " " in name]:
            draws = self._estimated(name, on.pop(name), (field, params, draws, target_params))
        loss, metrics = self.objective.loss(field, params, draws, step)
        if "mmd" in on:
            loss += on.pop("mmd") * discrepancy(field, params, draws)
        for name, factor in on.items():
            control = mf_jax.Controls(**{name: 1.0})
            loss += factor * control.penalty(field, params, draws)[0]
        return loss, metrics

    def _estimated(self, name: str, share: Any, known: tuple) -> Draws:
        place, source = name.split()
        kind = {"exact": "data"}.get(source, source)
        data = data_of(self.data).x if source == "exact" else None
        estimate = mf_jax.VelocityEstimate(kind, **{place: 1.0}, data=data)
        told, draws = estimate.estimated(*known), known[2]

        def mix(rows: Rows, other: Rows) -> Rows:
            v = velocity(rows.x, rows.e)
            own = {"v": v if rows.v is None else rows.v}
            own["tangent"] = v if rows.tangent is None else rows.tangent
            key = {"target": "v"}.get(place, place)
            own[key] = own[key] + share * (getattr(other, key) - v)
            return rows.replace(**own)

        return Draws(*map(mix, (draws.instant, draws.interval), (told.instant, told.interval)))


def discrepancy(field: Field, params: PyTree, draws: Draws) -> Float[Array, ""]:
    """Return the squared MMD of one-step samples and data, up to the data's own part."""
    both = jax.tree.map(lambda *a: jnp.concatenate(a), draws.instant, draws.interval)
    made, n = mf_jax.sample(field, params, both.e), len(both.x)

    def kernel(a: Array, b: Array) -> Array:
        squares = jnp.sum((a[:, None] - b[None]) ** 2, axis=2)
        return sum(jnp.exp(-squares / (2 * width**2)) for width in _WIDTHS) / len(_WIDTHS)

    return (jnp.sum(kernel(made, made)) - n) / (n * (n - 1)) - 2 * jnp.mean(kernel(made, both.x))


@dataclasses.dataclass(frozen=True)
class Training:
    """One setting: data of `data_of`, an objective, and the recipe.

    pairs: `independent`, `dealt ROWS` (optimal transport within so many rows), or `reflow SHARE`
    (of a teacher, which takes half of the steps; the worst share is left out); "" = fresh noise.
    """

    data: str
    objective: Tuned
    steps: int = 4000
    lr: float = 3e-3
    width: int = 64
    batch_size: int = 256
    dtype: str = "float32"
    pairs: str = ""


class Fitted(NamedTuple):
    """One seed's parameters, their average, squared errors by step, and the memory of a step."""

    params: PyTree
    average: PyTree
    errors: np.ndarray
    megabytes: float


def initial(key: Array, size: int, width: int) -> PyTree:
    """Return parameters of the perceptron: three hidden layers, the last layer 0."""
    sizes = [size * (1 + 2 * len(_WAVES)) + 6, *3 * [width], size]
    scales = [*3 * [2.0], 0.0]
    keys = jax.random.split(key, 4)
    return [
        (np.sqrt(s / a) * jax.random.normal(k, (a, b)), jnp.zeros(b))
        for k, a, b, s in zip(keys, sizes[:-1], sizes[1:], scales, strict=True)
    ]


def field(params: PyTree, z: Array, *, r: Array, t: Array, condition: Any, dtype="float32"):
    """Return u of a perceptron, its first layer in float32, hidden ones in `dtype`."""
    flat, t, h = z.reshape(len(z), -1), t[:, None], (t - r)[:, None]
    waves = [wave(k * flat) for k in _WAVES for wave in (jnp.sin, jnp.cos)]
    waves += [wave(4 * time) for time in (t, h) for wave in (jnp.sin, jnp.cos)]
    hidden = jnp.concatenate([flat, t, h, *waves], axis=1)
    for i, (matrix, bias) in enumerate(params):
        hidden = jax.nn.silu(hidden) if i else hidden
        hidden, matrix, bias = (a.astype(dtype if i else a.dtype) for a in (hidden, matrix, bias))
        hidden = hidden @ matrix + bias
    return hidden.astype(z.dtype).reshape(z.shape)


def gradient_of(how: Training, key: Array, numbers: Any, params: PyTree, average: PyTree, *data):
    """Return the gradient of a step and the error of its rows with r < t."""
    rows_key, draw_key = jax.random.split(key)
    rows = jax.random.randint(rows_key, (how.batch_size,), 0, len(data[0]))
    x, e = jax.tree.map(lambda each: each[rows], data)
    draws, objective = SCHEME.draw(draw_key, x, e=e), how.objective
    objective = dataclasses.replace(objective, numbers=numbers)
    own = functools.partial(field, dtype=how.dtype)
    of_params = jax.grad(objective.loss, argnums=1, has_aux=True)
    gradient, metrics = of_params(own, params, draws, 0, average)
    return gradient, metrics["u_error"].compute()


@functools.cache
def step_flops(how: Training) -> float:
    """Return the FLOPs of a gradient, as XLA counts them before it compiles."""
    x = jnp.asarray(data_of(how.data).x)
    params = initial(jax.random.key(0), x[0].size, how.width)
    gradient = functools.partial(gradient_of, how, jax.random.key(0), how.objective.numbers)
    return float(jax.jit(gradient).lower(params, params, x, None).cost_analysis()["flops"])


@functools.lru_cache(4)
def _program(how: Training, rows: int, has_pairs: bool) -> Callable:
    """Return the compiled training of settings that differ in numbers, rate, steps and data."""

    def train(key: Array, num_steps: Array, lr: Array, numbers: Array, *data: Any) -> tuple:
        numbers = [numbers[i] for i in range(len(how.objective.names))]
        params = initial(jax.random.fold_in(key, _MOST_STEPS), data[0][0].size, how.width)
        optimizer = optax.scale_by_adam(b2=0.95)

        def step(i: Array, carry: tuple) -> tuple:
            params, average, state, errors = carry
            own = jax.random.fold_in(key, i)
            gradient, error = gradient_of(how, own, numbers, params, average, *data)
            updates, state = optimizer.update(gradient, state)
            rate = lr * (1 + jnp.cos(jnp.pi * i / num_steps)) / 2
            params = jax.tree.map(lambda p, u: p - rate * u, params, updates)
            average = optax.incremental_update(params, average, 1 - DECAY)
            return params, average, state, errors.at[i].set(error)

        carry = params, params, optimizer.init(params), jnp.zeros(_MOST_STEPS)
        return jax.lax.fori_loop(0, num_steps, step, carry)

    x = jax.ShapeDtypeStruct((rows, *data_of(how.data).x.shape[1:]), jnp.float32)
    arguments = jax.random.key(0), jnp.int32(0), jnp.float32(0)
    numbers = jnp.zeros(len(how.objective.names))
    return jax.jit(train).lower(*arguments, numbers, x, x if has_pairs else None).compile()


def fit(how: Training, num_steps: int, seed: int, data: Data, factor: float = 1.0) -> Fitted:
    """Train one seed, at so many times the learning rate."""
    program = _program(shared(how), len(data.x), data.e is not None)
    numbers = jnp.asarray(how.objective.numbers, jnp.float32)
    arguments = jnp.int32(num_steps), jnp.float32(factor * how.lr), numbers
    result = program(jax.random.key(seed), *arguments, *jax.tree.map(jnp.asarray, (data.x, data.e)))
    params, average, _, errors = result
    memory = program.memory_analysis().temp_size_in_bytes / 1e6
    return Fitted(params, average, np.asarray(errors[:num_steps]), memory)


def shared(how: Training) -> Training:
    """Return a setting without what one program may vary; exact estimates are of their own data."""
    objective = dataclasses.replace(how.objective, numbers=())
    data = how.objective.data or ("digits" if how.data == "digits" else "wide")
    return dataclasses.replace(how, objective=objective, data=data, steps=0, lr=0.0, pairs="")


class Run(NamedTuple):
    """A seed of a setting: what it was trained on and for how long, and noise to sample from."""

    how: Training
    seed: int
    steps: int
    data: Data
    fitted: Fitted
    e: np.ndarray

    def sampled(self, steps: int, *, renoised: bool = False) -> Array:
        """Return a sample of each noise."""
        return sampled(self.fitted.average, self.e, steps, renoised)

    def draws(self, rows: int = 1024) -> Draws:
        """Draw rows for a diagnosis."""
        key = jax.random.key(7)
        places = jax.random.randint(key, (rows,), 0, len(self.data.x))
        e = None if self.data.e is None else jnp.asarray(self.data.e)[places]
        return SCHEME.draw(key, jnp.asarray(self.data.x)[places], e=e)


def run_of(how: Training, num_steps: int, seed: int) -> Run:
    """Train a seed of a setting; a teacher takes half of the steps."""
    data, (kind, _, number) = data_of(how.data), how.pairs.partition(" ")
    if kind == "dealt":
        data = data._replace(e=dealt(how.data, int(number)))
    elif kind:
        data = data._replace(e=normal(data.x.shape, 3))
    if kind == "reflow":
        num_steps //= 2
        teacher = fit(how, num_steps, seed, data).average
        x, once = (np.asarray(sampled(teacher, data.e, steps)) for steps in (16, 1))
        apart = np.linalg.norm(x - once, axis=1)
        kept = np.flatnonzero(apart <= np.quantile(apart, 1 - float(number)))
        kept = np.resize(kept, len(x))  # some of them twice: of one size, for one program
        data = data._replace(x=x[kept], e=data.e[kept])
    e = normal(data.held_out.shape, 100 + seed)
    return Run(how, seed, num_steps, data, fit(how, num_steps, seed, data), e)


@functools.partial(jax.jit, static_argnames=("steps", "renoised"))
def sampled(params: PyTree, e: Array, steps: int, renoised: bool = False) -> Array:
    """Return samples of the perceptron, by composed steps or by steps to the data and back."""
    keys = jax.random.split(jax.random.key(11), steps)

    def fresh(step: Array) -> Array:
        return jax.random.normal(keys[step], e.shape)

    renoise = fresh if renoised else None
    return mf_jax.sample(field, params, jnp.asarray(e), steps=steps, renoise=renoise)
