"""How a network runs its blocks: one after another or as one loop, and what it keeps for the gradient.

Neither changes what is computed. Blocks one after another are named `block_0`, `block_1`, ...; as a loop they are
`blocks`, whose parameters have an axis over the blocks in front. A loop is compiled once, not once for each block.

Source: rematerialisation, arXiv 1604.06174.
"""

import contextlib
import contextvars
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree

from mf_jax.errors import check_known

REMATS = {
    "none": None,
    "block": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}
"""What is kept for the gradient: everything; what goes into a block; and also its products with weights."""

_LOOP = "blocks"
_PreparesBlock = Callable[[tuple[str, ...], PyTree], PyTree]
_prepares: contextvars.ContextVar[_PreparesBlock | None] = contextvars.ContextVar(
    "prepares", default=None
)


@contextlib.contextmanager
def preparing_blocks(prepare: _PreparesBlock) -> Iterator[None]:
    """Have each block's parameters prepared where the block begins, and again where it is computed again.

    Args:
      prepare: from the path of a block's parameters (of a loop: of those of all of its blocks), and those of one
        block, to what the block computes with.
    """
    token = _prepares.set(prepare)
    try:
        yield
    finally:
        _prepares.reset(token)


def is_axis_of_block(path: Sequence[str], axis: int) -> bool:
    """Return whether a parameter with this path belongs to a block, and this axis is one that the block itself sees."""
    return axis > 0 if _LOOP in path else any(re.fullmatch(r"block_\d+", name) for name in path)


def run_blocks(
    block: type[nn.Module],
    x: Float[Array, "b n d"],
    conditions: Sequence[Any],
    *,
    path: tuple[str, ...],
    remat: str,
    scan: bool,
    **fields: Any,
) -> Float[Array, "b n d"]:
    """Apply blocks to x within a compact method, as sub-modules of its module.

    Args:
      block: takes (x, condition) and returns x.
      x: `[B, tokens, width]`.
      conditions: of each block; one block for each.
      path: of the module.
      remat: a key of `REMATS`.
      scan: whether to loop; the conditions must be alike in shape then.
      fields: of the blocks.

    Returns:
      x after the last block.
    """
    if not conditions:
        return x
    check_known("model.remat", remat, REMATS)

    def named(name: str) -> nn.Module:
        made, prepare = block, _prepares.get()
        if prepare:
            made = nn.map_variables(
                made,
                "params",
                lambda variables: {"params": prepare((*path, name), variables["params"])},
            )
        if remat != "none":
            # a loop keeps its computing-again apart by itself; without a loop XLA would merge it with the first time
            made = nn.remat(made, policy=REMATS[remat], prevent_cse=not scan)
        return made(**fields, name=name)

    if not scan:
        for i, condition in enumerate(conditions):
            x = named(f"block_{i}")(x, condition)
        return x
    alike = all(condition is conditions[0] for condition in conditions)
    loop = nn.scan(
        lambda module, x, condition: (module(x, condition), None),
        variable_axes={"params": 0},
        split_rngs={"params": True},
        in_axes=nn.broadcast if alike else 0,
        length=len(conditions),
    )
    together = conditions[0] if alike else jax.tree.map(lambda *each: jnp.stack(each), *conditions)
    return loop(named(_LOOP), x, together)[0]


def stack_blocks(params: PyTree) -> PyTree:
    """Return the parameters of blocks one after another as those of a loop: `block_0`, `block_1`, ... -> `blocks`.

    Args:
      params: nested dicts of arrays `[...]`; those without blocks stay as they are.

    Returns:
      Nested dicts; the arrays under `blocks` are `[blocks, ...]`.
    """
    if not isinstance(params, dict):
        return params
    numbered = {int(name[6:]): name for name in params if re.fullmatch(r"block_\d+", name)}
    rest = {
        name: stack_blocks(value) for name, value in params.items() if name not in numbered.values()
    }
    if not numbered:
        return rest
    each = [params[numbered[i]] for i in sorted(numbered)]
    return rest | {_LOOP: jax.tree.map(lambda *leaves: np.stack(leaves), *each)}


def unstack_blocks(params: PyTree) -> PyTree:
    """Undo `stack_blocks`: `blocks` -> `block_0`, `block_1`, ...; parameters without a loop stay as they are."""
    if not isinstance(params, dict):
        return params
    rest = {name: unstack_blocks(value) for name, value in params.items() if name != _LOOP}
    if _LOOP not in params:
        return rest
    depth = len(jax.tree.leaves(params[_LOOP])[0])
    return rest | {
        f"block_{i}": jax.tree.map(lambda a, i=i: a[i], params[_LOOP]) for i in range(depth)
    }


def laid_out_like(params: PyTree, like: PyTree) -> PyTree:
    """Return parameters with their blocks as another tree has them, one after another or as a loop.

    Args:
      params: nested dicts of arrays.
      like: nested dicts of arrays or of their shapes.
    """
    if _has_loop(params) == _has_loop(like):
        return params
    return stack_blocks(params) if _has_loop(like) else unstack_blocks(params)


def _has_loop(params: PyTree) -> bool:
    return isinstance(params, dict) and (_LOOP in params or any(map(_has_loop, params.values())))
