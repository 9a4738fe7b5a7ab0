"""The index of a checkpoint: name, shape, type and fingerprint of every array of a tree.

A fingerprint is a sum of the array's bits modulo 2^32, weighted by position. It does not depend on
how devices share the array.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from mf_jax.flow.errors import BadInput, listed


def _named_leaves(tree: PyTree) -> dict[str, Any]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path): leaf for path, leaf in leaves}


@jax.jit
def _fingerprints(tree: PyTree) -> list[jax.Array]:
    @jax.jit  # traced once for all arrays of a shape
    def fingerprint(leaf: jax.Array) -> jax.Array:
        bits = jax.lax.bitcast_convert_type(leaf, jnp.uint32).ravel()
        return jnp.sum(bits * (2 * jnp.arange(bits.size, dtype=jnp.uint32) + 1), dtype=jnp.uint32)

    return [fingerprint(leaf) for leaf in jax.tree.leaves(tree)]


def index_of(tree: PyTree) -> dict[str, list]:
    """Return {name: [shape, type, fingerprint]}; all processes of a job must call it."""
    prints = jax.device_get(_fingerprints(tree))
    return {
        name: [list(leaf.shape), str(leaf.dtype), int(value)]
        for (name, leaf), value in zip(_named_leaves(tree).items(), prints, strict=True)
    }


def check_same_model(path: str, index: dict[str, list], like: PyTree) -> None:
    """Raise BadInput unless the index of the checkpoint at a path fits a tree by name and shape."""
    ours = {name: list(leaf.shape) for name, leaf in _named_leaves(like).items()}
    theirs = {name: entry[0] for name, entry in index.items()}
    wrong = [
        f"{name} is {theirs.get(name, 'missing')}, not {ours.get(name, 'expected')}"
        for name in dict.fromkeys([*ours, *theirs])
        if ours.get(name) != theirs.get(name)
    ]
    if wrong:
        problem = f"checkpoint {path} is of another model: {listed(wrong, most=4)}"
        raise BadInput(f"{problem}; use its own config, or another --workdir")
