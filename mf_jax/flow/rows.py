"""Rows of a step: what a field is told of them, its answer, and their split into sub-batches."""

import itertools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, PyTree

from mf_jax.flow.errors import BadInput
from mf_jax.flow.paths import Points, Scalars, interpolate, per_row, velocity
from mf_jax.flow.records import Condition, Field, Prediction, Rows


def condition_of(rows: Rows, *, is_null: bool = False, forward_mode: bool = False) -> PyTree:
    """Return what a field is told of rows: their own condition, `null` where it is dropped.

    A field of `Rows.for_networks` gets a `Condition`, any other the caller's own tree. With is_null
    every row is told `null`.
    """

    def tell(own: Array, null: Array) -> Array:
        return null if is_null else jnp.where(per_row(rows.dropped, own), null, own)

    if is_null and rows.null is None:
        raise BadInput("guidance: needs what no condition is; give `null` to DrawScheme.draw")
    told = rows.condition
    if rows.null is not None:
        told = jax.tree.map(tell, told, rows.null)
    if not rows.for_networks:
        return told
    return Condition(told, rows.guidance, rows.dropout, rows.augment, forward_mode)


def call(
    field: Field,
    params: PyTree,
    z: Points,
    *,
    r: Scalars,
    t: Scalars,
    condition: PyTree,
    mask: Array | None = None,
) -> Prediction:
    """Return the field's answer, an array or a `Prediction`, as a `Prediction`; 0 where hidden.

    What a mask hides is 0 in x, in e and here. Hence it is 0 in every path, target and error.
    """
    answer = field(params, z, r=r, t=t, condition=condition)
    heads = answer if isinstance(answer, Prediction) else Prediction(answer)
    for name, head in heads._asdict().items():
        if getattr(head, "shape", None) != z.shape and (name == "u" or head is not None):
            raise BadInput(
                f"field: {name} is {getattr(head, 'shape', type(head).__name__)} where z is "
                f"{z.shape}; return u like z, or mf_jax.Prediction(u, v)"
            )
    wide = jnp.promote_types(heads.u.dtype, z.dtype)
    heads = [None if head is None else head.astype(wide) for head in heads]
    if mask is None:
        return Prediction(*heads)
    return Prediction(*(None if head is None else jnp.where(mask, head, 0) for head in heads))


def predict(
    field: Field,
    params: PyTree,
    rows: Rows,
    z: Points,
    *,
    r: Scalars,
    t: Scalars,
    forward_mode: bool = False,
) -> Prediction:
    """Return the field's prediction at (z, r, t) under the condition of rows."""
    condition = condition_of(rows, forward_mode=forward_mode)
    return call(field, params, z, r=r, t=t, condition=condition, mask=rows.mask)


def mask_of(mask: Array | None, x: Points) -> Bool[Array, "b ..."] | None:
    """Return a mask of x's own shape; BadInput unless it is bool and broadcasts to x by axes."""
    if mask is None:
        return None
    mask = jnp.asarray(mask)
    axes = (1,) * (x.ndim - mask.ndim) + mask.shape
    fits = len(axes) == x.ndim and all(m in (1, n) for m, n in zip(axes, x.shape, strict=True))
    of_rows = mask.ndim < x.ndim and mask.shape[:1] == x.shape[:1]  # or of columns, who knows
    if mask.dtype != bool or not fits or of_rows:
        raise BadInput(
            f"mask: is {mask.dtype}{list(mask.shape)} where x is {list(x.shape)}; give bool that "
            "broadcasts to x, a mask of rows with all axes of x, e.g. (mask > 0)[..., None]"
        )
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
    groups = math.gcd(*sizes)
    ends = list(itertools.accumulate(size // groups for size in sizes))[:-1]

    def split(leaf: Array) -> list[Array]:
        grouped = leaf.reshape(groups, -1, *leaf.shape[1:])
        return [part.reshape(-1, *leaf.shape[1:]) for part in jnp.split(grouped, ends, axis=1)]

    leaves, tree = jax.tree.flatten(rows)
    return [tree.unflatten(part) for part in zip(*map(split, leaves), strict=True)]


def join_rows(parts: Sequence[PyTree]) -> PyTree:
    """Undo `split_rows`: interleave the rows of alike trees group by group."""
    groups = math.gcd(*(jax.tree.leaves(part)[0].shape[0] for part in parts))

    def join(*leaves: Array) -> Array:
        shape = leaves[0].shape[1:]
        grouped = [leaf.reshape(groups, leaf.shape[0] // groups, *shape) for leaf in leaves]
        return jnp.concatenate(grouped, axis=1).reshape(-1, *shape)

    return jax.tree.map(join, *parts)
