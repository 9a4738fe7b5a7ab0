"""Where arrays live: one mesh with the axes `data` and `fsdp`, the batch split over both, parameters over `fsdp`.

A step computes its gradient from each device's own rows, on parameters gathered once before and with one reduction
after: `per_device`. Nothing else crosses from device to device, whatever the network and the objective do with rows.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, PyTree, Shaped

from mf_jax.types import BadInput

_REPLICATE_BELOW = 2**14
"""Arrays with fewer numbers are kept whole on every device: sharding them costs more than it saves."""


def make_mesh(*, data: int, fsdp: int, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Return the mesh over all devices.

    Args:
      data: devices along `data`; 0 = all that remain.
      fsdp: devices along `fsdp`, at least 1.
      devices: in the place of all.

    Raises:
      BadInput: if the sizes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    count = len(devices)
    if data < 0 or fsdp < 1 or count % fsdp or (data and data * fsdp != count):
        raise BadInput(
            f"mesh.data={data}, mesh.fsdp={fsdp}: must multiply to the {count} devices here; use 0 and 1"
        )
    axes = {"axis_names": ("data", "fsdp"), "axis_types": (AxisType.Auto, AxisType.Auto)}
    return jax.make_mesh((count // fsdp, fsdp), **axes, devices=devices)


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

    def rule(leaf: Any) -> NamedSharding:
        axes = [i for i, n in enumerate(leaf.shape) if n % size == 0]
        if size == 1 or not axes or np.prod(leaf.shape) < _REPLICATE_BELOW:
            return NamedSharding(mesh, PartitionSpec())
        largest = max(axes, key=lambda i: leaf.shape[i])
        return NamedSharding(
            mesh, PartitionSpec(*("fsdp" if i == largest else None for i in range(largest + 1)))
        )

    return jax.tree.map(rule, state)


def placed(shapes: PyTree, shardings: PyTree) -> PyTree:
    """Return the shapes of arrays that will lie where shardings say, for compiling and restoring."""
    return jax.tree.map(
        lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where), shapes, shardings
    )


def per_device(
    gradient: Callable[[PyTree, PyTree], tuple[PyTree, PyTree]], mesh: Mesh, params: PyTree, rows: PyTree
) -> tuple[PyTree, PyTree]:
    """Return the gradient of a mean over all rows, and sums over all rows, from each device's own rows.

    Args:
      gradient: from whole parameters and some rows to (gradient of the mean over these rows with respect to the first
        entry of the parameters, sums over these rows).
      mesh: the mesh.
      params: a tuple of trees of parameters, placed by `state_sharding`.
      rows: a tree of arrays `[B, ...]`, placed by `batch_sharding`.

    Returns:
      (gradient placed like the parameters, sums on every device).
    """
    specs = jax.tree.map(lambda sharding: sharding.spec, state_sharding(mesh, params))

    def local(params: PyTree, rows: PyTree) -> tuple[PyTree, PyTree]:
        own, sums = gradient(jax.tree.map(_gather, params, specs), rows)
        own = jax.tree.map(lambda g, spec: _reduce(g, spec, mesh) / mesh.size, own, specs[0])
        return own, jax.lax.psum(sums, ("data", "fsdp"))

    rows_spec = batch_sharding(mesh).spec
    split = jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(specs, rows_spec),
        out_specs=(specs[0], PartitionSpec()),
        check_vma=False,  # `_reduce` makes the gradients alike, which differ from device to device before
    )
    return split(params, rows)


def _gather(param: Shaped[Array, "..."], spec: PartitionSpec) -> Shaped[Array, "..."]:
    return jax.lax.all_gather(param, "fsdp", axis=len(spec) - 1, tiled=True) if spec else param


def _reduce(gradient: Shaped[Array, "..."], spec: PartitionSpec, mesh: Mesh) -> Shaped[Array, "..."]:
    if not spec:
        return jax.lax.psum(gradient, ("data", "fsdp"))
    axis = len(spec) - 1
    if _scatters_wrongly(mesh):
        whole = jax.lax.psum(gradient, ("data", "fsdp"))
        size = whole.shape[axis] // mesh.shape["fsdp"]
        return jax.lax.dynamic_slice_in_dim(whole, size * jax.lax.axis_index("fsdp"), size, axis)
    own = jax.lax.psum_scatter(gradient, "fsdp", scatter_dimension=axis, tiled=True)
    return jax.lax.psum(own, "data") if mesh.shape["data"] > 1 else own


def _scatters_wrongly(mesh: Mesh) -> bool:
    """Return whether sums that are scattered may be wrong: those of gloo, between CPUs of a job.

    Now and then the first process gets the end of its part before it has been summed (jax-ml/jax#40830).
    """
    return jax.distributed.is_initialized() and mesh.devices.flat[0].platform == "cpu"


def put_batch(mesh: Mesh, batch: PyTree[Shaped[np.ndarray, "_ ..."]]) -> PyTree:
    """Return this process's rows of a batch as part of the global batch on the devices."""
    sharding = batch_sharding(mesh)
    return jax.tree.map(lambda rows: jax.make_array_from_process_local_data(sharding, rows), batch)
