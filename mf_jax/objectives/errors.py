"""What training reports about its errors: unweighted, apart for r = t and r < t, and by bins of t.

The weighted loss says little (an adaptive weight with p = 1 holds it near 1), so these are the numbers to watch.
Each metric is a sum and a count, so that it can be averaged over steps and over bins that are sometimes empty.
"""

import jax.numpy as jnp
from clu.metrics import Average
from jaxtyping import Array, Bool, Float

from mf_jax.flow.records import Draws, Rows

NUM_BINS = 4
Metrics = dict[str, Average]


def average(values: Float[Array, "b"], mask: Bool[Array, "b"] | None = None) -> Average:
    """Return the mean of values, where mask is set, as something that can be merged with more of its kind.

    Args:
      values: `[B]`; B may be 0.
      mask: bool `[B]`; all rows where it is None.

    Returns:
      The sum and the count as float32 scalars.
    """
    mask = jnp.ones(values.shape, bool) if mask is None else mask
    return Average(
        total=jnp.sum(jnp.where(mask, values, 0.0), dtype=jnp.float32),
        count=jnp.sum(mask, dtype=jnp.float32),
    )


def average_over(value: Float[Array, ""], draws: Draws) -> Average:
    """Return a number of all rows together as the mean of that many, so that it counts as each of them does."""
    num = sum(rows.x.shape[0] for rows in (draws.instant, draws.interval))
    return average(jnp.broadcast_to(value, (num,)))


def binned_errors(name: str, error: Float[Array, "b"], rows: Rows) -> Metrics:
    """Report a sub-batch's mean squared error per number, over all t and by quarter of t.

    Args:
      name: `u_error` or `v_error`.
      error: squared error of each row, summed over its axes, `[B]`.
      rows: the sub-batch.

    Returns:
      `{name, name_t0 (t in [0, 1/4)), ..., name_t3}`.
    """
    per_number = error / rows.x[0].size if rows.x.shape[0] else error
    bins = jnp.clip((rows.t * NUM_BINS).astype(jnp.int32), 0, NUM_BINS - 1)
    metrics = {f"{name}_t{i}": average(per_number, bins == i) for i in range(NUM_BINS)}
    return {name: average(per_number), **metrics}


def step_metrics(
    draws: Draws,
    *,
    v_error: Float[Array, "b1"],
    u_error: Float[Array, "b2"],
    du_dt: Float[Array, "b2 ..."],
) -> Metrics:
    """Return what every objective with rows r < t reports.

    Args:
      draws: the step's draws.
      v_error, u_error: squared errors of the rows with r = t and of the rows with r < t, not weighted.
      du_dt: the total derivative of the rows with r < t, or a difference quotient in its place.

    Returns:
      u_error and v_error, both by bins of t; du_dt, the root mean square of the derivative.
    """
    return {
        **binned_errors("u_error", u_error, draws.interval),
        **binned_errors("v_error", v_error, draws.instant),
        "du_dt": average(jnp.sqrt(jnp.mean(du_dt**2, axis=tuple(range(1, du_dt.ndim))))),
    }
