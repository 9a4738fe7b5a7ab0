"""Terms that objectives share: their interface, calls of the network, errors, weights and metrics.

An adaptive weight with p = 1 holds the loss near 1. So the metrics are unweighted errors, apart for
r = t and r < t, and by quarter of t. Steps and devices add a metric's sum and count.
"""

import abc
import dataclasses
from typing import Any, ClassVar

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from mf_jax.flow.derivative import with_derivative as with_derivative
from mf_jax.flow.errors import check_fields
from mf_jax.flow.paths import Points, Scalars
from mf_jax.flow.records import Draws, Field, Rows, Step
from mf_jax.flow.rows import at_instant as at_instant
from mf_jax.flow.rows import num_counted

NUM_BINS = 4


@flax.struct.dataclass
class Average:
    """A mean in the making, its fields float32 scalars."""

    total: Any
    count: Any

    def compute(self) -> Any:  # a scalar of numpy or of jax
        """Return the mean."""
        return self.total / self.count


Metrics = dict[str, Average]
Loss = tuple[Float[Array, ""], Metrics]
Pair = tuple[Array, Array]
"""A prediction and its target."""


class Objective(abc.ABC):
    """A method's loss, a frozen record; its class attributes or properties state its needs."""

    learns_average: ClassVar[bool] = True  # u(z, r, t) for r < t, not u(z, t, t) alone
    needs_second_head: ClassVar[bool] = False  # the network must return `Prediction.v`
    predicts: ClassVar[str] = "velocity"  # `data` where the network must predict x
    guidable: ClassVar[bool] = True  # its target can hold guidance
    interval_data: ClassVar[bool] = True  # rows with r < t see the data, not the network alone
    has_tangent: ClassVar[bool] = True  # du/dt, or a step, is along the velocity of such rows
    second_order: ClassVar[bool] = False  # its gradient passes through a derivative of the network
    target_ema: ClassVar[float] = 0.0  # decay of the averaged parameters of targets; 0 = none
    frozen: ClassVar[PyTree] = None  # arrays that the loss reads and nobody trains, or their shapes

    def with_frozen(self, frozen: PyTree) -> "Objective":
        """Return the objective with arrays in place of the shapes in `frozen`."""
        return self

    @abc.abstractmethod
    def loss(
        self, field: Field, params: PyTree, draws: Draws, step: Step = 0, target_params: Any = None
    ) -> Loss:
        """Return loss and metrics of one step; the loss is a mean over rows, as devices average it.

        Args:
          step: by which schedules go; left out they stay at their start.
          target_params: of the targets, averaged by `target_ema`; None = params.
        """


def squared_error(prediction: Points, target: Points) -> Scalars:
    """Return |prediction - stop_gradient(target)|^2 of each row."""
    error = prediction - jax.lax.stop_gradient(target)
    return jnp.sum(error**2, axis=tuple(range(1, error.ndim)))


@dataclasses.dataclass(frozen=True)
class AdaptiveWeight:
    """Weight a row's error l by stop_gradient((l + c)^-p).

    Source: MeanFlow, arXiv 2505.13447, equation 22; AYF, arXiv 2506.14603.
    """

    p: float = 1.0  # 0 weights all rows alike, 1 makes the loss nearly scale-free
    # in the units of l: published for sums, one for means is smaller by the row's counted entries
    c: float = 0.01
    of: str = "sum"  # l is the sum of a row's squared errors, as published, or their `mean`
    of_interval: float = 0.0  # power of t - r that multiplies l; above 0 no row with r = t counts

    def __post_init__(self) -> None:
        check_fields("weight", self, p="[0, inf)", c="(0, inf)", of=("sum", "mean"))
        check_fields("weight", self, of_interval="[0, inf)")

    def __call__(self, error: Scalars, rows: Rows) -> Scalars:
        """Return the weighted error of each row, given its sum of squared errors."""
        error = error / num_counted(rows) if self.of == "mean" else error
        if self.of_interval:
            error = error * (rows.t - rows.r) ** self.of_interval
        return error * jax.lax.stop_gradient((error + self.c) ** -self.p)

    def mean(self, draws: Draws, v_error: Array, u_error: Array) -> Float[Array, ""]:
        """Return the `row_mean` of the weighted errors of rows with r = t and with r < t."""
        return row_mean(self(v_error, draws.instant), self(u_error, draws.interval))

    def regression(self, draws: Draws, at_t: Pair, at_r: Pair, du_dt: Array) -> Loss:
        """Return loss and metrics of predictions and targets of rows with r = t, and with r < t."""
        v_error, u_error = squared_error(*at_t), squared_error(*at_r)
        metrics = step_metrics(draws, v_error=v_error, u_error=u_error, du_dt=du_dt)
        return self.mean(draws, v_error, u_error), metrics


def row_mean(*values: Float[Array, "_"]) -> Float[Array, ""]:
    """Return the mean over the rows of all sub-batches together; some may have no rows, not all."""
    return sum(jnp.sum(value) for value in values) / sum(value.shape[0] for value in values)


def average(values: Scalars, where: Array | None = None, rows: Rows | None = None) -> Average:
    """Return the mean of values where a mask is set, over rows that any number counts of."""
    where = jnp.ones(values.shape, bool) if where is None else where
    if rows is not None and rows.mask is not None:
        where &= jnp.any(rows.mask, axis=tuple(range(1, rows.mask.ndim)))
    total = jnp.sum(jnp.where(where, values, 0.0), dtype=jnp.float32)
    return Average(total, jnp.sum(where, dtype=jnp.float32))


def average_over(value: Float[Array, ""], draws: Draws) -> Average:
    """Return a number of all rows together as the mean of that many."""
    num = len(draws.instant.t) + len(draws.interval.t)
    return average(jnp.broadcast_to(value, (num,)))


def binned_errors(name: str, error: Scalars, rows: Rows) -> Metrics:
    """Return the mean squared error per number, `name`, and `name_t0` .. `_t3` by quarter of t."""
    bins = jnp.clip((rows.t * NUM_BINS).astype(jnp.int32), 0, NUM_BINS - 1)
    error = error / num_counted(rows)
    metrics = {f"{name}_t{i}": average(error, bins == i, rows=rows) for i in range(NUM_BINS)}
    return {name: average(error, rows=rows), **metrics}


def step_metrics(draws: Draws, *, v_error: Array, u_error: Array, du_dt: Array) -> Metrics:
    """Return the binned errors of r = t and of r < t, and the size of du/dt or of its quotient."""
    squares = jnp.sum(du_dt**2, axis=tuple(range(1, du_dt.ndim)))
    size = jnp.sqrt(squares / num_counted(draws.interval))
    return {
        **binned_errors("u_error", u_error, draws.interval),
        **binned_errors("v_error", v_error, draws.instant),
        "du_dt": average(size, rows=draws.interval),
    }
