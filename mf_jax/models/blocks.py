"""Transformers run blocks one after another or as one loop, and keep more or less for gradients.

Neither changes the numbers. Blocks one after another are named `block_0`, `block_1`, ... As a loop
they are `blocks`, whose parameters have an axis over the blocks in front, and are compiled once.

Source: rematerialisation, arXiv 1604.06174.
"""

import functools
import re
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict
from jaxtyping import PyTree

from mf_jax.flow.errors import BadInput, check_known
from mf_jax.models.attention import attend
from mf_jax.models.layers import Network, Tokens

REMATS = {
    "none": None,
    "block": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}
"""Kept for the gradient: everything; a block's input; a block's input and products with weights."""
Gather = Callable[[tuple[str, ...], PyTree], PyTree]
"""From a block's path and its parameters to the parameters that the block computes with.

The path is the one of all blocks in a loop.
"""

_LOOP, _BLOCK = "blocks", re.compile(r"block_(\d+)")


def is_axis_of_block(path: Sequence[str], axis: int) -> bool:
    """Return whether a parameter belongs to a block, and the block itself sees this axis."""
    return axis > 0 if _LOOP in path else any(map(_BLOCK.fullmatch, path))


class Transformer(Network, kw_only=True):
    """A network whose blocks see the patches of images or latents."""

    patch_size: int  # side of a patch, divides the height and width of z
    depth: int  # number of blocks between z and u
    width: int  # of a token, divisible by num_heads
    num_heads: int
    attention: str = "xla"  # one of attention.ATTENTIONS
    remat: str = "none"  # a key of REMATS
    scan: bool = False  # whether blocks are a loop
    gather: Gather | None = None  # called where a block begins, and where it is computed again

    def check_width(self, multiple: int) -> None:
        """Raise BadInput unless there are heads, and the width is a multiple."""
        if min(self.num_heads, self.width) < 1 or self.width % multiple:
            allowed = f"a multiple of {multiple} for model.num_heads={self.num_heads}"
            raise BadInput(f"model.width={self.width}: must be {allowed}; try 64 per head")


def run_blocks(
    network: Transformer,
    block: type[nn.Module],
    x: Tokens,
    conditions: Sequence[Any],
    *,
    path: tuple[str, ...],
    forward_mode: bool,
    **fields: Any,
) -> Tokens:
    """Apply blocks of a network to x within a compact method, as sub-modules of its module.

    Args:
      block: takes (x, condition) and returns x.
      conditions: one for each block, alike in shape where `network.scan`.
      path: of the module.
      fields: of a block, beside those that all blocks have.
    """
    if not conditions:
        return x
    check_known("model.remat", network.remat, REMATS)
    gather = network.gather
    attention = functools.partial(attend, kind=network.attention, forward_mode=forward_mode)

    def named(name: str) -> nn.Module:
        made = block
        if gather:
            made = nn.map_variables(
                made, "params", lambda given: {"params": gather((*path, name), given["params"])}
            )
        if network.remat != "none":
            # A loop keeps the second computation apart by itself. Elsewhere XLA would merge both.
            made = nn.remat(made, policy=REMATS[network.remat], prevent_cse=not network.scan)
        return made(network.num_heads, network.dtype, attention, name=name, **fields)

    if not network.scan:
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
    """Return nested dicts of numpy arrays, `block_0`, `block_1`, ... stacked to `blocks`."""
    if not isinstance(params, dict):
        return params
    numbers = sorted(int(match[1]) for match in map(_BLOCK.fullmatch, params) if match)
    each = [params[f"block_{i}"] for i in numbers]
    rest = {k: stack_blocks(v) for k, v in params.items() if not _BLOCK.fullmatch(k)}
    return rest | ({_LOOP: jax.tree.map(lambda *a: np.stack(a), *each)} if each else {})


def unstack_blocks(params: PyTree) -> PyTree:
    """Undo `stack_blocks`; parameters without a loop stay as they are."""
    if not isinstance(params, dict):
        return params
    rest = {k: unstack_blocks(v) for k, v in params.items() if k != _LOOP}
    loop = params.get(_LOOP, {})
    depth = len(jax.tree.leaves(loop)[0]) if loop else 0
    return rest | {f"block_{i}": jax.tree.map(lambda a, i=i: a[i], loop) for i in range(depth)}


def laid_out_like(params: PyTree, like: PyTree) -> PyTree:
    """Return parameters with their blocks laid out as in another tree."""
    has_loop = any(_LOOP in path for path in flatten_dict(like))
    return stack_blocks(params) if has_loop else unstack_blocks(params)
