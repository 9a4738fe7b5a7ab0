"""Mean and covariance of feature rows that arrive batch by batch, on the device and as exact as in float64.

Accelerators without float64 round a sum of 50,000 rows by more than FID allows. Here rows are shifted to a centre near
their mean, at most 256 of them are summed at once, and such sums are added up in pairs of float32, one number and what
its rounding left out, which together hold 48 bits.
"""

import functools
from collections.abc import Callable, Mapping
from typing import TypeVar

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float32, Float64, Int32, Shaped
from scipy.linalg import blas

from mf_jax.errors import BadInput

Sums = TypeVar("Sums")
_ROWS_AT_ONCE = 256
"""Rows of a device whose products are added in plain float32."""


@flax.struct.dataclass
class FeatureSums:
    """Sums over the rows so far; the same on every device.

    count: number of rows. centre: `[d]`, subtracted from each row; NaN until the first row has come. total: sum of the
    shifted rows `[d]`. scatter: sum of their outer products `[d, d]`. total_rest, scatter_rest: what to add to these.
    """

    count: Int32[Array | np.ndarray, ""]
    centre: Float32[Array | np.ndarray, "d"]
    total: Float32[Array | np.ndarray, "d"]
    total_rest: Float32[Array | np.ndarray, "d"]
    scatter: Float32[Array | np.ndarray, "d d"]
    scatter_rest: Float32[Array | np.ndarray, "d d"]


def start_sums(width: int, centre: Shaped[Array | np.ndarray, "d"] | None = None) -> FeatureSums:
    """Return the sums over no rows.

    Args:
      width: features of a row, d.
      centre: `[d]`, any point near the mean, finite; None takes the mean of the first batch.
    """
    vector, matrix = (
        functools.partial(jnp.zeros, width),
        functools.partial(jnp.zeros, (width, width)),
    )
    start = jnp.full(width, jnp.nan) if centre is None else jnp.array(centre, jnp.float32)
    return FeatureSums(jnp.zeros((), jnp.int32), start, vector(), vector(), matrix(), matrix())


def add_rows(
    sums: FeatureSums,
    rows: Shaped[Array | np.ndarray, "b d"],
    weights: Shaped[Array | np.ndarray, "b"],
) -> FeatureSums:
    """Return the sums with more rows in them; compiled, and the sums given are used up.

    Args:
      sums: over the rows before.
      rows: `[B, d]`, which may be split over the devices of a mesh, and so over processes.
      weights: `[B]`, placed like the rows: 1 counts a row, 0 leaves it out, whatever is in it.

    Returns:
      The sums, on the device; on every device of the mesh if the rows lie on one.
    """
    return accumulate(_add, sums, rows, weights)


def mean_and_covariance(
    sums: FeatureSums,
) -> tuple[int, Float64[np.ndarray, "d"], Float64[np.ndarray, "d d"]]:
    """Return the number of rows, their mean `[d]` and their unbiased covariance `[d, d]`, in float64 on the host.

    Raises:
      BadInput: fewer than 2 rows, or a row with a value that is not finite.
    """
    count, mean, covariance = _mean_and_scatter(sums)
    if count < 2:
        raise BadInput(
            f"{count} feature rows have no covariance; there must be at least 2: use more samples"
        )
    if not np.isfinite(np.sum(covariance)):
        raise BadInput(
            f"some of {count} feature rows hold NaN or infinite values; all must be finite: look for a diverged network"
        )
    covariance /= count - 1
    return count, mean, covariance


def merge(a: FeatureSums, b: FeatureSums) -> FeatureSums:
    """Return the sums over the rows of both, for example of two processes or files; neither is used up.

    Args:
      a: sums, whose centre is kept.
      b: sums over rows of the same width.

    Raises:
      BadInput: widths that differ.
    """
    if a.centre.shape != b.centre.shape:
        raise BadInput(
            f"sums over rows of {b.centre.size} features cannot be added to sums over rows of {a.centre.size}; the "
            "widths must agree: use one feature extractor for both"
        )
    first, second = (sums for sums in ((a, b) if int(a.count) else (b, a)))
    if not int(second.count):
        return from_arrays(to_arrays(first))
    centre = np.asarray(first.centre, np.float64)
    count, total, scatter = int(first.count), _exact(first, "total"), _exact(first, "scatter")
    more, mean, own = _mean_and_scatter(second)
    scatter += own
    _add_outer(scatter, mean - centre, more)
    total += more * (mean - centre)
    pairs = (_pair(total), _pair(scatter))
    return FeatureSums(
        jnp.asarray(count + more, jnp.int32),
        jnp.asarray(first.centre),
        *(jnp.asarray(x) for x in pairs[0]),
        *(jnp.asarray(x) for x in pairs[1]),
    )


def to_arrays(sums: FeatureSums) -> dict[str, Shaped[np.ndarray, "..."]]:
    """Return copies of the sums by name, for `np.savez`."""
    return {name: np.array(getattr(sums, name)) for name in FeatureSums.__dataclass_fields__}


def from_arrays(arrays: Mapping[str, Shaped[np.ndarray, "..."]]) -> FeatureSums:
    """Return the sums that `to_arrays` gave.

    Raises:
      BadInput: arrays missing; names them.
    """
    missing = FeatureSums.__dataclass_fields__.keys() - set(arrays)
    if missing:
        raise BadInput(
            f"sums lack {', '.join(sorted(missing))}; they must be those of to_arrays: compute them again"
        )
    return FeatureSums(
        **{name: jnp.array(arrays[name]) for name in FeatureSums.__dataclass_fields__}
    )


def two_sum(
    a: Float32[Array, "*n"], b: Float32[Array, "*n"]
) -> tuple[Float32[Array, "*n"], Float32[Array, "*n"]]:
    """Return a + b rounded, and what the rounding left out; both together are exact.

    Source: Dekker 1971, "A floating-point technique for extending the available precision", section 4.
    """
    # The barrier keeps a compiler from knowing the sum, from which it could conclude that nothing is left out.
    total = jax.lax.optimization_barrier(a + b)
    a_larger = jnp.abs(a) >= jnp.abs(b)
    return total, jnp.where(a_larger, b, a) - (total - jnp.where(a_larger, a, b))


def accumulate(
    add: Callable[..., Sums],
    sums: Sums,
    rows: Shaped[Array | np.ndarray, "b d"],
    *others: Shaped[Array | np.ndarray, "b"],
) -> Sums:
    """Return add(sums, rows, *others, devices=...), compiled; the sums are used up.

    Args:
      add: the same function at every call; `devices` is over how many the rows are split.
      sums: a tree of arrays.
      rows: `[B, d]`, which may be split over the devices of a mesh.
      others: `[B]`, more about each row.

    Returns:
      A tree like the sums, on every device of the mesh.
    """
    sharding = getattr(rows, "sharding", None)
    mesh = sharding.mesh if isinstance(sharding, NamedSharding) and sharding.mesh.size > 1 else None
    if mesh is not None:
        everywhere = NamedSharding(mesh, PartitionSpec())
        sums = jax.tree.map(functools.partial(_placed, where=everywhere), sums)
    return _compiled(add, mesh)(sums, rows, *others)


def _placed(x: Array | np.ndarray, where: NamedSharding) -> Array:
    """Return an array, the same in all processes, on every device; `device_put` would refuse NaN over processes."""
    if getattr(x, "sharding", None) == where:
        return x
    return jax.make_array_from_callback(x.shape, where, np.asarray(x).__getitem__)


@functools.lru_cache
def _compiled(add: Callable[..., Sums], mesh: Mesh | None) -> Callable[..., Sums]:
    where = {} if mesh is None else {"out_shardings": NamedSharding(mesh, PartitionSpec())}
    add = functools.partial(add, devices=1 if mesh is None else mesh.size)
    return jax.jit(add, donate_argnums=0, **where)


def _add(
    sums: FeatureSums, rows: Shaped[Array, "b d"], weights: Shaped[Array, "b"], devices: int
) -> FeatureSums:
    keep = weights != 0
    count = jnp.sum(keep, dtype=jnp.int32)
    rows = jnp.where(keep[:, None], rows.astype(jnp.float32), 0)
    mean = jnp.sum(rows / jnp.maximum(count, 1), 0)
    chosen = jnp.where(jnp.isnan(sums.centre) & (count > 0), mean, sums.centre)
    rows = jnp.where(keep[:, None], rows - chosen, 0)
    # Block k takes rows k, k + blocks, k + 2 blocks, ...: each device finds its share of a block in its own rows.
    blocks = -(-len(rows) // (_ROWS_AT_ONCE * devices))
    each = -(-len(rows) // (blocks * devices)) * devices
    rows = jnp.pad(rows, ((0, blocks * each - len(rows)), (0, 0))).reshape(each, blocks, -1)

    def add_block(carry: tuple[Array, ...], block: Array | int) -> tuple[tuple[Array, ...], None]:
        x = jax.lax.dynamic_index_in_dim(rows, block, axis=1, keepdims=False)
        total, total_left = two_sum(carry[0], jnp.sum(x, 0))
        scatter, scatter_left = two_sum(carry[2], jnp.matmul(x.T, x, precision="highest"))
        return (total, carry[1] + total_left, scatter, carry[3] + scatter_left), None

    carry = (sums.total, sums.total_rest, sums.scatter, sums.scatter_rest)
    if blocks == 1:  # a loop would hold the sums twice
        carry, _ = add_block(carry, 0)
    else:
        carry, _ = jax.lax.scan(add_block, carry, jnp.arange(blocks))
    return FeatureSums(sums.count + count, chosen, *carry)


def _exact(sums: FeatureSums, name: str) -> Float64[np.ndarray, "..."]:
    exact = np.array(getattr(sums, name), np.float64)
    exact += np.asarray(getattr(sums, name + "_rest"))
    return exact


def _pair(exact: Float64[np.ndarray, "..."]) -> tuple[np.ndarray, np.ndarray]:
    rounded = exact.astype(np.float32)
    return rounded, (exact - rounded).astype(np.float32)


def _mean_and_scatter(sums: FeatureSums) -> tuple[int, np.ndarray, np.ndarray]:
    """Return the count, the mean, and the sum of outer products of rows minus the mean, exactly symmetric."""
    count, total, scatter = int(sums.count), _exact(sums, "total"), _exact(sums, "scatter")
    shift = total / max(count, 1)
    _add_outer(scatter, shift, -count)
    for i in range(len(total)):  # a transposed copy would take as much memory again
        scatter[i, i:] += scatter[i:, i]
        scatter[i, i:] /= 2
        scatter[i:, i] = scatter[i, i:]
    return count, np.asarray(sums.centre, np.float64) + shift, scatter


def _add_outer(
    matrix: Float64[np.ndarray, "d d"], vector: Float64[np.ndarray, "d"], factor: int
) -> None:
    """Add factor * vector vector^T to a symmetric matrix, in place."""
    blas.dger(
        factor, vector, vector, a=matrix.T, overwrite_x=False, overwrite_y=False, overwrite_a=True
    )
