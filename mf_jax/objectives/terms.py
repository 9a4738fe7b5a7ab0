"""Terms that objectives share: their interface, calls of the network, errors, weights and metrics.

An adaptive weight with p = 1 holds the loss near 1. So the metrics are unweighted errors, apart for
r = t and r < t, and by quarter of t. Steps and devices add a metric's sum and count.
"""

import abc
import dataclasses
import math
import operator
from typing import Any, ClassVar

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PyTree

from mf_jax.flow.derivative import Derivative
from mf_jax.flow.errors import check_known, check_within
from mf_jax.flow.paths import Points, Scalars
from mf_jax.flow.records import Draws, Field, Prediction, Rows, Step
from mf_jax.flow.rows import num_counted, point_of, predict

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


class Objective(abc.ABC):
    """A method's loss, a frozen record; its class attributes or properties state its needs."""

    learns_average: ClassVar[bool] = True
    """Whether the network learns u(z, r, t) for r < t, not u(z, t, t) alone."""
    needs_second_head: ClassVar[bool] = False
    """Whether the network must return `Prediction.v`."""
    predicts: ClassVar[str] = "velocity"
    """`data` where the network must predict x."""
    guidable: ClassVar[bool] = True
    """Whether its target can hold guidance."""
    interval_data: ClassVar[bool] = True
    """Whether its rows with r < t see the data, not the network alone."""
    has_tangent: ClassVar[bool] = True
    """Whether a direction of du/dt, or a finite step, is along the velocity of such rows."""
    second_order: ClassVar[bool] = False
    """Whether its gradient passes through a derivative of the network."""
    target_ema: ClassVar[float] = 0.0
    """Decay of the average of the parameters that targets use, in [0, 1); 0 = no average."""
    frozen: ClassVar[PyTree] = None
    """Arrays that the loss reads and nobody trains, or their shapes."""

    def with_frozen(self, frozen: PyTree) -> "Objective":
        """Return the objective with arrays in place of the shapes in `frozen`."""
        del frozen
        return self

    @abc.abstractmethod
    def loss(
        self, field: Field, params: PyTree, draws: Draws, step: Step = 0, target_params: Any = None
    ) -> Loss:
        """Return loss and metrics of one step; the loss is a mean over rows, as devices average it.

        Args:
          step: number of the step, by which schedules go; left out they stay at their start.
          target_params: parameters of the targets, averaged by `target_ema`; None = params.
        """


@dataclasses.dataclass(frozen=True)
class Around(Objective):
    """An objective around another one, whose needs are its own."""

    objective: Objective

    def with_frozen(self, frozen: PyTree) -> "Around":
        """See `Objective`."""
        return dataclasses.replace(self, objective=self.objective.with_frozen(frozen))


for _name in Objective.__annotations__:
    setattr(Around, _name, property(operator.attrgetter(f"objective.{_name}")))


def at_instant(field: Field, params: PyTree, rows: Rows, z: Points | None = None) -> Prediction:
    """Return the prediction at (z, t, t), at the rows' own z_t unless given; rows may be none."""
    if rows.t.shape[0] == 0:
        return Prediction(u=rows.x, v=rows.x)
    z = point_of(rows) if z is None else z
    return predict(field, params, rows, z, r=rows.t, t=rows.t)


def with_derivative(
    field: Field,
    params: PyTree,
    rows: Rows,
    velocity: Points,
    *,
    tangent: tuple[float, float, float] = (1.0, 0.0, 1.0),
    with_gradient: bool = False,
    how: Derivative = Derivative(),
) -> tuple[Prediction, Points]:
    """Return the prediction at (z_t, r, t), and du/dt along a path of the given velocity dz_t/dt.

    Args:
      tangent: of (z, r, t), in units of (velocity, 1, 1); the total derivative in t is (1, 0, 1).
      with_gradient: whether the JVP's own gradient follows; fused attention refuses it.
      how: differences have no gradient.
    """
    if rows.t.shape[0] == 0:
        return Prediction(u=rows.x, v=rows.x), rows.x
    forward_mode = how.is_jvp and not with_gradient

    def u(z: Array, r: Array, t: Array, params: PyTree = params) -> tuple[Array, Prediction]:
        prediction = predict(field, params, rows, z, r=r, t=t, forward_mode=forward_mode)
        return prediction.u, prediction

    dz, dr, dt = tangent
    point = point_of(rows), rows.r, rows.t
    direction = dz * velocity, dr * jnp.ones_like(rows.r), dt * jnp.ones_like(rows.t)

    def still(*point: Array) -> tuple[Array, Prediction]:  # for differences alone
        return u(*point, params=jax.lax.stop_gradient(params))

    return how.along(u, still, point, direction)


def squared_error(prediction: Points, target: Points) -> Scalars:
    """Return |prediction - stop_gradient(target)|^2 of each row."""
    error = prediction - jax.lax.stop_gradient(target)
    return jnp.sum(error**2, axis=tuple(range(1, error.ndim)))


@dataclasses.dataclass(frozen=True)
class AdaptiveWeight:
    """Weight a row's error l by stop_gradient((l + c)^-p).

    Args:
      p: at least 0; 0 weights all rows alike, 1 makes the loss nearly scale-free.
      c: above 0, in the units of l: published for sums, one for means is smaller by D, the number
        of counted entries of a row.
      of: l is the `sum` of a row's squared errors, as published, or their `mean`.
      of_interval: power of t - r that multiplies l, at least 0; AYF has 1 and p = 0. Above 0 no
        row with r = t counts.

    Source: MeanFlow, arXiv 2505.13447, equation 22; AYF, arXiv 2506.14603.
    """

    p: float = 1.0
    c: float = 0.01
    of: str = "sum"
    of_interval: float = 0.0

    def __post_init__(self) -> None:
        check_within("weight.of_interval", self.of_interval, 0, math.inf, "[)")
        check_within("weight.p", self.p, 0, math.inf, "[)", "MeanFlow uses 1.0")
        check_within("weight.c", self.c, 0, math.inf, "()", "MeanFlow uses 0.01")
        check_known("weight.of", self.of, ("sum", "mean"))

    def __call__(self, error: Scalars, rows: Rows) -> Scalars:
        """Return the weighted error of each row, given its sum of squared errors."""
        error = error / num_counted(rows) if self.of == "mean" else error
        if self.of_interval:
            error = error * (rows.t - rows.r) ** self.of_interval
        return error * jax.lax.stop_gradient((error + self.c) ** -self.p)

    def mean(
        self, draws: Draws, v_error: Float[Array, "b1"], u_error: Float[Array, "b2"]
    ) -> Float[Array, ""]:
        """Return the `row_mean` of the weighted errors of rows with r = t and with r < t."""
        return row_mean(self(v_error, draws.instant), self(u_error, draws.interval))


def row_mean(*values: Float[Array, "_"]) -> Float[Array, ""]:
    """Return the mean over the rows of all sub-batches together; some may have no rows, not all."""
    return sum(jnp.sum(value) for value in values) / sum(value.shape[0] for value in values)


def average(values: Scalars, mask: Bool[Array, "b"] | None = None) -> Average:
    """Return the mean of values where mask is set; there may be no rows."""
    mask = jnp.ones(values.shape, bool) if mask is None else mask
    return Average(
        total=jnp.sum(jnp.where(mask, values, 0.0), dtype=jnp.float32),
        count=jnp.sum(mask, dtype=jnp.float32),
    )


def average_over(value: Float[Array, ""], draws: Draws) -> Average:
    """Return a number of all rows together as the mean of that many."""
    num = sum(rows.x.shape[0] for rows in (draws.instant, draws.interval))
    return average(jnp.broadcast_to(value, (num,)))


def binned_errors(name: str, error: Scalars, rows: Rows) -> Metrics:
    """Return the mean squared error per number, `name`, and `name_t0` .. `_t3` by quarter of t."""
    bins = jnp.clip((rows.t * NUM_BINS).astype(jnp.int32), 0, NUM_BINS - 1)
    metrics = {f"{name}_t{i}": per_number(error, rows, bins == i) for i in range(NUM_BINS)}
    return {name: per_number(error, rows), **metrics}


def per_number(error: Scalars, rows: Rows, where: Bool[Array, "b"] | None = None) -> Average:
    """Return the mean squared error per counted number, over rows that have any."""
    return _over_counted(error / num_counted(rows), rows, where)


def _over_counted(values: Scalars, rows: Rows, where: Bool[Array, "b"] | None = None) -> Average:
    if rows.mask is not None:
        counts = jnp.any(rows.mask, axis=tuple(range(1, rows.mask.ndim)))
        where = counts if where is None else counts & where
    return average(values, where)


def step_metrics(
    draws: Draws,
    *,
    v_error: Float[Array, "b1"],
    u_error: Float[Array, "b2"],
    du_dt: Float[Array, "b2 ..."],
) -> Metrics:
    """Return the binned errors of r = t and of r < t, and the size of du/dt or of its quotient."""
    squares = jnp.sum(du_dt**2, axis=tuple(range(1, du_dt.ndim)))
    return {
        **binned_errors("u_error", u_error, draws.interval),
        **binned_errors("v_error", v_error, draws.instant),
        "du_dt": _over_counted(jnp.sqrt(squares / num_counted(draws.interval)), draws.interval),
    }
