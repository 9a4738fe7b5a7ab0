"""Where arrays live: one mesh with the axes `data` and `fsdp`, the batch split over both, parameters over `fsdp`."""

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import PyTree, Shaped

from mf_jax.types import BadInput

_REPLICATE_BELOW = 2**14
"""Arrays with fewer numbers are kept whole on every device: sharding them costs more than it saves."""


def make_mesh(*, data: int, fsdp: int) -> Mesh:
    """Return the mesh over all devices.

    Args:
      data: devices along `data`; 0 = all that remain.
      fsdp: devices along `fsdp`, at least 1.

    Raises:
      BadInput: if the sizes do not multiply to the number of devices.
    """
    count = jax.device_count()
    if data < 0 or fsdp < 1 or count % fsdp or (data and data * fsdp != count):
        raise BadInput(
            f"mesh.data={data}, mesh.fsdp={fsdp}: must multiply to the {count} devices here; use 0 and 1"
        )
    return jax.make_mesh((count // fsdp, fsdp), ("data", "fsdp"), axis_types=(AxisType.Auto, AxisType.Auto))


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Return the sharding of arrays `[B, ...]` whose rows are split over all devices."""
    return NamedSharding(mesh, PartitionSpec(("data", "fsdp")))


def state_sharding(mesh: Mesh | AbstractMesh, state: PyTree) -> PyTree:
    """Return shardings for parameters and whatever is shaped like them: the largest axis that divides over `fsdp`.

    Args:
      mesh: the mesh.
      state: a tree of arrays or of their shapes.

    Returns:
      The same tree of shardings.
    """
    size = mesh.shape["fsdp"]

    def rule(leaf: jax.ShapeDtypeStruct) -> NamedSharding:
        axes = [i for i, n in enumerate(leaf.shape) if n % size == 0]
        if size == 1 or not axes or np.prod(leaf.shape) < _REPLICATE_BELOW:
            return NamedSharding(mesh, PartitionSpec())
        largest = max(axes, key=lambda i: leaf.shape[i])
        return NamedSharding(
            mesh, PartitionSpec(*("fsdp" if i == largest else None for i in range(largest + 1)))
        )

    return jax.tree.map(rule, state)


def put_batch(mesh: Mesh, batch: PyTree[Shaped[np.ndarray, "_ ..."]]) -> PyTree:
    """Return this process's rows of a batch as part of the global batch on the devices."""
    sharding = batch_sharding(mesh)
    return jax.tree.map(lambda rows: jax.make_array_from_process_local_data(sharding, rows), batch)
