"""Couplings: which noise e belongs to which data x.

Independent draws make paths that cross, so that v = e - x varies at a point. Optimal transport
within a batch deals the same e to the same x by the assignment of least total |x_i - e_p(i)|^2.
Paths are then straighter, and v varies less. Rows change places with rows of the same condition and
mask alone; else the noise would tell them.

The flow's identities hold for every coupling. Batches are small samples: the assignment is that of
the distributions only as they grow.

Source: Pooladian et al., arXiv 2304.14772; Tong et al., arXiv 2302.00482; OT-MeanFlow, arXiv
2509.22592.
"""

import dataclasses
from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from mf_jax.flow.errors import BadInput, check_fields
from mf_jax.flow.paths import Points


@runtime_checkable
class Coupling(Protocol):
    """A choice among the pairings of a batch's x and e."""

    def pair(self, x: Points, e: Points, condition: PyTree, mask: Array | None) -> Points:
        """Return e in the order of the rows that it belongs to; a mask tells where x counts."""


@dataclasses.dataclass(frozen=True)
class OptimalTransport:
    """Deal the noise of `rows` consecutive rows among them; 0 = of all rows of the batch.

    Where `rows` divides a device's rows, nothing passes between devices.
    """

    rows: int = 0

    def __post_init__(self) -> None:
        check_fields("coupling", self, rows="[0, inf)")

    def pair(self, x: Points, e: Points, condition: PyTree, mask: Array | None) -> Points:
        """See `Coupling.pair`."""
        num = self.rows or len(x)
        if len(x) % num:
            raise BadInput(f"coupling.rows={num}: must divide the {len(x)} rows of the batch")
        given = x, e, condition, mask
        blocks = jax.tree.map(lambda leaf: leaf.reshape(-1, num, *leaf.shape[1:]), given)
        return jax.vmap(_dealt)(*blocks).reshape(e.shape)


def _dealt(x: Array, e: Array, condition: PyTree, mask: Array | None) -> Array:
    import optax  # which the rest of the core does without

    num = len(x)
    if mask is not None:
        x, e = (jnp.where(mask, each, 0) for each in (x, e))
    flat_x, flat_e = (each.reshape(num, -1) for each in (x, e))
    # |x_i - e_j|^2 but for |x_i|^2, which every e_j pays; both terms are rounded alike
    cost = jnp.matmul(jnp.ones_like(flat_x), (flat_e**2).T, precision="highest")
    cost -= 2 * jnp.matmul(flat_x, flat_e.T, precision="highest")
    unlike = jnp.zeros((num, num), bool)
    for leaf in jax.tree.leaves((condition, mask)):
        pairs = leaf[:, None] != leaf[None]
        unlike |= pairs.reshape(num, num, -1).any(axis=2)
    cost -= cost.min()
    cost += jnp.where(unlike, num * (1 + cost.max()), 0)  # dearer than any others together
    rows, places = optax.assignment.hungarian_algorithm(cost)
    return e[jnp.zeros(num, int).at[rows].set(places)]


COUPLINGS = {"independent": None, "optimal_transport": OptimalTransport}
