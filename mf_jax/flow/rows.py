"""Rows of a step: what a field is told of them, its answer, and their split into sub-batches."""

import itertools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, PyTree

from mf_jax.flow.errors import BadInput
from mf_jax.flow.paths import Points, Scalars, interpolate, per_row, velocity
from mf_jax.flow.records import Condition, Field, Prediction, Rows


def condition_of(rows: Rows) -> PyTree:
    """Return what a field is told of rows: their own condition, `null` where it is dropped.

    A field of `Rows.for_networks` gets a `Condition`, any other the caller's own tree.
    """

    def tell(own: Array, null: Array) -> Array:
        return jnp.where(per_row(rows.dropped, own), null, own)

    told = rows.condition
    if rows.null is not None:
        told = jax.tree.map(tell, told, rows.null)
    if not rows.for_networks:
        return told
    return Condition(told, rows.guidance, rows.dropout, rows.augment, rows.forward_mode)


def unconditional(rows: Rows) -> Rows:
    """Return rows that all have lost their condition."""
    if rows.null is None:
        raise BadInput("guidance: needs what no condition is; give `null` to DrawScheme.draw")
    return rows.replace(dropped=jnp.ones_like(rows.dropped))


def call(
    field: Field, params: PyTree, z: Points, mask: Array | None = None, **told: PyTree
) -> Prediction:
    """Return the field's answer, an array or a `Prediction`, as a `Prediction`; 0 where hidden.

    What a mask hides is 0 in x, in e and here. Hence it is 0 in every path, target and error.
    told: r, t and condition.
    """
    if z.shape[0] == 0:  # nothing is asked of no rows; an exported number of rows has no `len`
        return Prediction(z, z)
    answer = field(params, z, **told)
    heads = answer if isinstance(answer, Prediction) else Prediction(answer)
    for name, head in heads._asdict().items():
        if getattr(head, "shape", None) != z.shape and (name == "u" or head is not None):
            found = getattr(head, "shape", type(head).__name__)
            fix = "return u like z, or mf_jax.Prediction(u, v)"
            raise BadInput(f"field: {name} is {found} where z is {z.shape}; {fix}")
    wide = jnp.promote_types(heads.u.dtype, z.dtype)
    heads = jax.tree.map(lambda head: head.astype(wide), heads)
    return heads if mask is None else jax.tree.map(lambda head: jnp.where(mask, head, 0), heads)


def predict(field: Field, params: PyTree, rows: Rows, z: Points, **times: Scalars) -> Prediction:
    """Return the field's prediction at z and the times r and t, under the condition of rows."""
    return call(field, params, z, rows.mask, **times, condition=condition_of(rows))


def at_instant(field: Field, params: PyTree, rows: Rows, z: Points | None = None) -> Prediction:
    """Return the prediction at (z, t, t), at the rows' own z_t unless given."""
    z = point_of(rows) if z is None else z
    return predict(field, params, rows, z, r=rows.t, t=rows.t)


def is_mask(mask: Any, x: Any) -> bool:
    """Return whether an array is bool, and broadcasts to x by axes."""
    pairs = zip(mask.shape[::-1], x.shape[::-1], strict=False)
    fits = mask.ndim <= x.ndim and all(m in (1, n) for m, n in pairs)
    of_rows = mask.ndim < x.ndim and mask.shape[:1] == x.shape[:1]  # or of columns, who knows
    return mask.dtype == bool and fits and not of_rows


def mask_of(mask: Array | None, x: Points) -> Bool[Array, "b ..."] | None:
    """Return a mask of x's own shape; BadInput unless it `is_mask`."""
    if mask is None:
        return None
    mask = jnp.asarray(mask)
    if not is_mask(mask, x):
        fix = "give bool that broadcasts to x, of rows with all axes: (mask > 0)[..., None]"
        raise BadInput(f"mask: is {mask.dtype}{list(mask.shape)} where x is {list(x.shape)}; {fix}")
    return jnp.broadcast_to(mask, x.shape)


def velocity_of(rows: Rows) -> Points:
    """Return the velocity of rows for targets: their estimate, else e - x."""
    return velocity(rows.x, rows.e) if rows.v is None else rows.v


def point_of(rows: Rows) -> Points:
    """Return the point z_t of each row."""
    return interpolate(rows.x, rows.e, t=rows.t)


def num_counted(rows: Rows) -> Int[Array, "b"] | int:
    """Return how many numbers of each row count, at least 1."""
    if rows.mask is None:
        return math.prod(rows.x.shape[1:])
    return jnp.maximum(jnp.sum(rows.mask, axis=tuple(range(1, rows.x.ndim))), 1)


def at_time(rows: Rows, t: Scalars) -> Rows:
    """Return rows with r = t at the given times, whose guidance holds for all t.

    Their velocity is e - x: an estimate was at another time.
    """
    guidance = rows.guidance
    if guidance is not None:
        guidance = guidance.replace(t_min=jnp.zeros_like(t), t_max=jnp.ones_like(t))
    own = None if rows.v is None else velocity(rows.x, rows.e)
    return rows.replace(r=t, t=t, guidance=guidance, v=own, tangent=own)


def split_rows(rows: PyTree, sizes: Sequence[int]) -> list[PyTree]:
    """Deal the rows of a tree into parts of these sizes, group by group."""
    groups = math.gcd(*sizes) or 1
    ends = itertools.accumulate((size // groups for size in sizes), initial=0)

    def part(start: int, end: int) -> PyTree:
        def take(leaf: Array) -> Array:
            grouped = leaf.reshape(groups, -1, *leaf.shape[1:])
            return grouped[:, start:end].reshape(-1, *leaf.shape[1:])

        return jax.tree.map(take, rows)

    return [part(*between) for between in itertools.pairwise(ends)]


def join_rows(parts: Sequence[PyTree]) -> PyTree:
    """Undo `split_rows`: interleave the rows of alike trees group by group."""
    groups = math.gcd(*(len(jax.tree.leaves(part)[0]) for part in parts)) or 1

    def join(*leaves: Array) -> Array:
        shape = leaves[0].shape[1:]
        grouped = [leaf.reshape(groups, len(leaf) // groups, *shape) for leaf in leaves]
        return jnp.concatenate(grouped, axis=1).reshape(-1, *shape)

    return jax.tree.map(join, *parts)
