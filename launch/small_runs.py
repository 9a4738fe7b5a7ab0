"""Small networks trained with some seeds by one compiled program, and what is measured of them.

The method comes from the core alone: draws, objective, sampler and diagnostics. Network, data and
loop are this file's own, as in docs/from_your_own_code.md.
"""

import dataclasses
import functools
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float, PyTree
from scipy.optimize import linear_sum_assignment

import mf_jax
from mf_jax.data.digits import Digits
from mf_jax.data.pipeline import read
from mf_jax.data.toy2d import TOYS
from mf_jax.flow.diagnostics import additivity_gap, derivative_at, residual_of
from mf_jax.flow.paths import advance, velocity
from mf_jax.flow.records import Draws, Field, Rows
from mf_jax.metrics.row_pairs import pair_scores
from mf_jax.metrics.two_sample import nearest_distances

SEEDS, POOL, COMPARED = 3, 2**15, 1000
DECAY = 0.99  # of the average that is measured, and of the source `average`
SCHEME = mf_jax.DrawScheme(mf_jax.UniformTimes(), instant_share=0.5, label_drop_share=0.0)
_WAVES, _WIDTHS = (1.0, 2.0, 4.0), (0.1, 0.3, 1.0)
_MOST_STEPS = 2**13
MAPS = {  # optimal transport from N(0, I) to N(0, A^2), A symmetric and positive, is A
    "narrow": 0.5 * np.eye(2),
    "wide": 2.0 * np.eye(2),
    "tilted": np.array([[1.2, 0.6], [0.6, 0.7]]),
}


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


class Data(NamedTuple):
    """Training rows, held-out rows, as many to compare them with, and each x's noise, or None."""

    x: np.ndarray
    held_out: np.ndarray
    other: np.ndarray
    e: np.ndarray | None = None


class Fitted(NamedTuple):
    """One seed's parameters, their average, squared errors by step, time of a step, and memory."""

    params: PyTree
    average: PyTree
    errors: np.ndarray
    milliseconds: float
    megabytes: float


@functools.cache
def data_of(name: str) -> Data:
    """Return `digits`, a Gaussian of `MAPS`, or `TOY` with many rows or `TOY ROWS`."""
    if name == "digits":
        x, held_out = (read(Digits(image_size=8, split=s)).x for s in ("train", "held_out"))
        return Data(x, held_out, np.random.default_rng(0).permutation(x)[: len(held_out)])
    toy, _, rows = name.partition(" ")
    make = TOYS.get(toy, lambda n, seed: _normal((n, 2), seed) @ MAPS[toy])
    sizes = int(rows or POOL), COMPARED, COMPARED
    return Data(*(np.float32(make(n, seed)) for seed, n in enumerate(sizes)))


def _normal(shape: tuple[int, ...], seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


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
    x, e = (None if each is None else each[rows] for each in data)
    draws, objective = SCHEME.draw(draw_key, x, e=e), how.objective
    objective = dataclasses.replace(objective, numbers=numbers)
    own = functools.partial(field, dtype=how.dtype)
    of_params = jax.grad(objective.loss, argnums=1, has_aux=True)
    gradient, metrics = of_params(own, params, draws, 0, average)
    return gradient, metrics["u_error"].compute()


def step_flops(how: Training) -> float:
    """Return the FLOPs of a gradient, as XLA counts them before it compiles."""
    x = jnp.asarray(data_of(how.data).x)
    params = initial(jax.random.key(0), x[0].size, how.width)

    def gradient(params: PyTree, x: Array) -> tuple:
        return gradient_of(how, jax.random.key(0), how.objective.numbers, params, params, x, None)

    return float(jax.jit(gradient).lower(params, x).cost_analysis()["flops"])


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
    program = _program(_shared(how), len(data.x), data.e is not None)
    numbers = jnp.asarray(how.objective.numbers, jnp.float32)
    arguments = jnp.int32(num_steps), jnp.float32(factor * how.lr), numbers
    start = time.monotonic()
    result = program(jax.random.key(seed), *arguments, *map(_on_device, (data.x, data.e)))
    params, average, _, errors = jax.block_until_ready(result)
    pace = 1e3 * (time.monotonic() - start) / num_steps
    memory = program.memory_analysis().temp_size_in_bytes / 1e6
    return Fitted(params, average, np.asarray(errors[:num_steps]), pace, memory)


def _on_device(x: np.ndarray | None) -> Array | None:
    return None if x is None else jnp.asarray(x)


def _shared(how: Training) -> Training:
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
        data = data._replace(e=_dealt(how.data, int(number)))
    elif kind:
        data = data._replace(e=_normal(data.x.shape, 3))
    if kind == "reflow":
        num_steps //= 2
        teacher = fit(how, num_steps, seed, data).average
        x, once = (np.asarray(sampled(teacher, data.e, steps)) for steps in (16, 1))
        apart = np.linalg.norm(x - once, axis=1)
        kept = np.flatnonzero(apart <= np.quantile(apart, 1 - float(number)))
        kept = np.resize(kept, len(x))  # some of them twice: of one size, for one program
        data = data._replace(x=x[kept], e=data.e[kept])
    e = _normal(data.held_out.shape, 100 + seed)
    return Run(how, seed, num_steps, data, fit(how, num_steps, seed, data), e)


@functools.cache
def _dealt(name: str, rows: int) -> np.ndarray:
    """Return noise dealt to the data as `OptimalTransport` does, by scipy, which is faster."""
    x = data_of(name).x
    e = _normal(x.shape, 3)
    for i in range(0, len(x), rows):
        block = slice(i, i + rows)
        e[block] = e[block][assignment(x[block], e[block])[1]]
    return e


def assignment(a: np.ndarray, b: np.ndarray) -> tuple[float, np.ndarray]:
    """Return the root mean square of the cheapest assignment, and the place in b of each a."""
    a, b = (each.reshape(len(each), -1).astype(np.float64) for each in (a, b))
    cost = np.square(a).sum(axis=1)[:, None] + np.square(b).sum(axis=1)[None] - 2 * a @ b.T
    rows, places = linear_sum_assignment(cost)
    return float(np.sqrt(np.maximum(cost[rows, places].mean(), 0))), places


@functools.partial(jax.jit, static_argnames=("steps", "renoised"))
def sampled(params: PyTree, e: Array, steps: int, renoised: bool = False) -> Array:
    """Return samples of the perceptron, by composed steps or by steps to the data and back."""
    key = jax.random.key(11) if renoised else None
    return mf_jax.sample(field, params, jnp.asarray(e), steps=steps, renoise=key)


def sample_scores(x: np.ndarray, data: Data) -> dict[str, float]:
    """Compare as many samples as there are held-out rows with them, and with the training rows."""
    x = np.asarray(x)
    if not np.isfinite(x).all():
        return {}
    rows = [each.reshape(len(each), -1) for each in (x, data.held_out)]
    scores = {"w2": assignment(*rows)[0], "recall": pair_scores(*rows).recall}
    return scores | {"nearest": float(nearest_distances(x, data.x[: 2 * COMPARED]).mean())}


@functools.partial(jax.jit, static_argnames="steps")
def path_of(params: PyTree, e: Array, steps: int = 16) -> Float[Array, "s n d"]:
    """Return the points of the samples' paths, noise first."""

    def move(z: Array, t: Array) -> tuple[Array, Array]:
        times = [jnp.full(len(z), time) for time in (t, t - 1 / steps)]
        u = field(params, z, r=times[1], t=times[0], condition=None)
        z = advance(z, u, r=times[1], t=times[0])
        return z, z

    return jnp.concatenate([e[None], jax.lax.scan(move, e, 1 - jnp.arange(steps) / steps)[1]])


@jax.jit
def exact_average(x: Array, z: Array, r: Array, t: Array) -> Array:
    """Return u of the flow that ends at the rows x, by Runge-Kutta steps from t to r."""
    data, shape = x.reshape(len(x), -1), z.shape

    def v(z: Array, t: Array) -> Array:
        squares = jnp.sum((z[:, None] - (1 - t)[:, None, None] * data) ** 2, axis=2)
        weights = jax.nn.softmax(-squares / (2 * t[:, None] ** 2), axis=1)
        return (z - weights @ data) / t[:, None]

    def step(z: Array, i: Array) -> tuple[Array, None]:
        d = (t - r) / 32
        now, h = t - i * d, d[:, None]
        a = v(z, now)
        b = v(z - h / 2 * a, now - d / 2)
        c = v(z - h / 2 * b, now - d / 2)
        last = v(z - h * c, jnp.maximum(now - d, 1e-4))
        return z - h / 6 * (a + 2 * b + 2 * c + last), None

    flat = z.reshape(len(z), -1)
    end = jax.lax.scan(step, flat, jnp.arange(32))[0]
    return ((flat - end) / jnp.maximum(t - r, 1e-4)[:, None]).reshape(shape)


@functools.partial(jax.jit, static_argnames=("how", "batches"))
def _moments(how: Training, numbers: Any, x: Array, fitted: Sequence[PyTree], batches: int):
    """Return the sum and the summed squares of the gradients of so many batches."""

    def add(sums: tuple, i: Array) -> tuple:
        key = jax.random.fold_in(jax.random.key(5), i)
        g = ravel_pytree(gradient_of(how, key, numbers, *fitted, x, None)[0])[0]
        return (sums[0] + g, sums[1] + g @ g), None

    zeros = jnp.zeros_like(ravel_pytree(fitted[0])[0]), jnp.float32(0)
    return jax.lax.scan(add, zeros, jnp.arange(batches))[0]


def gradient_variance(how: Training, fitted: Fitted, batches: int = 500) -> float:
    """Return the total variance of the gradient at frozen parameters."""
    numbers = [jnp.float32(n) for n in how.objective.numbers]
    known = numbers, jnp.asarray(data_of(how.data).x), (fitted.params, fitted.average)
    total, squares = _moments(_shared(how), *known, batches)
    return float(squares / batches - jnp.sum((total / batches) ** 2))


@jax.jit
def identities(params: PyTree, draws: Draws) -> tuple[Array, Array, Array]:
    """Return identity residual, additivity gap and the largest |du/dt| of the rows with r < t."""
    rows = draws.interval
    v, u, du_dt = derivative_at(field, params, rows)
    largest = jnp.sqrt(jnp.max(jnp.sum(du_dt**2, axis=1)))
    return residual_of(rows, v, u, du_dt), additivity_gap(field, params, rows), largest
