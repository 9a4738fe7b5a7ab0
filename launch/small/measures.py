"""What the experiments on open problems measure of a trained seed."""

import dataclasses
import functools
from collections.abc import Sequence
from itertools import product
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float, PyTree

from launch.small.data import COMPARED, MAPS, Data, assignment, data_of
from launch.small.training import Fitted, Run, Training, field, fit, gradient_of, shared
from mf_jax.flow.diagnostics import additivity_gap, derivative_at, residual_of
from mf_jax.flow.paths import advance, interpolate
from mf_jax.flow.records import Draws
from mf_jax.metrics.row_pairs import pair_scores
from mf_jax.metrics.two_sample import nearest_distances

Scores = dict[str, float]


def sample_scores(x: np.ndarray, data: Data) -> dict[str, float]:
    """Compare as many samples as there are held-out rows with them, and with the training rows."""
    x = np.asarray(x)
    if not np.isfinite(x).all():
        return {}
    rows = [each.reshape(len(each), -1) for each in (x, data.held_out)]
    scores = {"w2": assignment(*rows)[0], "recall": pair_scores(*rows).recall}
    return scores | {"nearest": float(nearest_distances(x, data.x[: 2 * COMPARED]).mean())}


def scores_of(run: Run) -> Scores:
    """Return the scores of one-step samples, and of Gaussians the error against their map."""
    scores = sample_scores(made := run.sampled(1), data_of(run.how.data))
    if run.how.data in MAPS:
        apart = np.square(made - run.e @ MAPS[run.how.data])
        scores["map_error"] = float(np.sqrt(np.mean(apart)))
    return scores


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
    total, squares = _moments(shared(how), *known, batches)
    return float(squares / batches - jnp.sum((total / batches) ** 2))


@jax.jit
def identities(params: PyTree, draws: Draws) -> tuple[Array, Array, Array]:
    """Return identity residual, additivity gap and the largest |du/dt| of the rows with r < t."""
    rows = draws.interval
    v, u, du_dt = derivative_at(field, params, rows)
    largest = jnp.sqrt(jnp.max(jnp.sum(du_dt**2, axis=1)))
    return residual_of(rows, v, u, du_dt), additivity_gap(field, params, rows), largest


def of_estimates(run: Run) -> Scores:
    """Return the gradient's variance at frozen parameters, and the error of u."""
    rows = run.draws(256).interval
    z = interpolate(rows.x, rows.e, t=rows.t)
    u = field(run.fitted.average, z, r=rows.r, t=rows.t, condition=None)
    exact = exact_average(run.data.x, z, rows.r, rows.t)
    numbers = (0.0,) * len(run.how.objective.numbers)
    plain = dataclasses.replace(run.how.objective, numbers=numbers)
    frozen = _frozen(dataclasses.replace(run.how, objective=plain), run.seed)
    return {
        "variance": gradient_variance(run.how, frozen),
        "u_error": float(np.sqrt(np.mean(np.square(u - exact)))),
    }


@functools.lru_cache(8)
def _frozen(plain: Training, seed: int) -> Fitted:
    """Return where all settings of a group have the variance of their gradients compared."""
    return fit(plain, plain.steps // 4, seed, data_of(plain.data))


def of_derivative(run: Run) -> Scores:
    """Return the identity residual, and the memory of a step."""
    residual = identities(run.fitted.average, run.draws())[0]
    return {"residual": float(residual), "megabytes": run.fitted.megabytes}


def of_hybrid(run: Run) -> Scores:
    """Return how far samples of some steps are from the data, composed and re-noised."""
    angles, scale, scores = np.arange(8) * np.pi / 4, np.sqrt(1 / 2 + 0.1**2), {}
    centers = np.stack([np.cos(angles), np.sin(angles)], axis=1) / scale
    for kind, steps in product(("composed", "renoised"), (1, 2, 4, 8)):
        x = np.asarray(run.sampled(steps, renoised=kind == "renoised"))
        away = np.linalg.norm(x[:, None] - centers, axis=2).min(axis=1)
        scores[f"{kind}_{steps}_w2"] = assignment(x, run.data.held_out)[0]
        scores[f"{kind}_{steps}_outside"] = float(np.mean(away > 3 * 0.1 / scale))
    return scores


def of_coupling(run: Run) -> Scores:
    """Return how straight and how additive the paths are."""
    path = np.asarray(path_of(run.fitted.average, run.e))
    moves, straight = np.diff(path, axis=0), path[-1] - path[0]
    length = np.linalg.norm(moves, axis=2).sum(axis=0).mean()
    bend = np.square(len(moves) * moves - straight).sum(axis=2).mean()
    gap = identities(run.fitted.average, run.draws())[1]
    ratio = length / np.linalg.norm(straight, axis=1).mean()
    return {"length": float(ratio), "bend": float(bend), "gap": float(gap)}


def of_control(run: Run) -> Scores:
    """Return the largest du/dt, and the steps before four times the rate diverges."""
    errors = fit(run.how, run.how.steps, run.seed, run.data, factor=4.0).errors
    bad = ~(errors < 10 * np.median(run.fitted.errors[:100]))
    first = int(np.argmax(bad)) if bad.any() else run.how.steps
    largest = float(identities(run.fitted.average, run.draws())[2])
    return {"largest": largest, "stable": first}
