"""Where arrays live: a mesh of the axes `data` and `fsdp` splits rows, `fsdp` parameters too.

A step computes its gradient from each device's own rows: `per_device`. Parameters are gathered once
before, gradients are reduced once after. Nothing else crosses from device to device, whatever the
network and the objective do with rows. Where the parameters do not fit a device, each block can
gather its own (`gather_late`).

Source: parameters split over devices, arXiv 1910.02054 (stage 3) and arXiv 2004.13336.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import (
    AbstractMesh,
    AxisType,
    Mesh,
    NamedSharding,
    PartitionSpec,
    Sharding,
    SingleDeviceSharding,
)
from jax.tree_util import DictKey, KeyPath, tree_map_with_path
from jaxtyping import Array, PyTree, Shaped

from mf_jax.flow.errors import BadInput

_REPLICATE_BELOW = 2**14  # numbers: to split a smaller array costs more than it saves
ROWS = ("data", "fsdp")
"""The axes of a mesh, which together split rows."""
GATHERS = ("step", "block")
"""When a device gathers split parameters: all once a step, or each block's as it is computed."""
Names = tuple[str, ...]
Late = Callable[[Names, int], bool]
"""From a parameter's path and the axis that it is split along to whether it is gathered late."""


def make_mesh(*, data: int, fsdp: int, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Return the mesh over all devices, a process's beside one another, as the rows that it reads.

    `jax.make_mesh` would follow the torus of a TPU slice, on which processes alternate.

    Args:
      data, fsdp: devices along each axis; data=0 are all that remain.
    """
    devices = jax.devices() if devices is None else devices
    count = len(devices)
    if data < 0 or fsdp < 1 or count % fsdp or (data and data * fsdp != count):
        told = f"mesh.data={data}, mesh.fsdp={fsdp}"
        raise BadInput(f"{told}: must multiply to the {count} devices here; use 0 and 1")
    in_order = sorted(devices, key=lambda device: (device.process_index, device.id))
    grid = np.array(in_order).reshape(count // fsdp, fsdp)
    return Mesh(grid, ROWS, axis_types=(AxisType.Auto, AxisType.Auto))


def _along(mesh: Mesh | AbstractMesh, *axes: Any) -> Sharding:
    """Return the sharding along axes of a mesh.

    One device has none: the types of arrays show a mesh, and a loss traced without it is traced
    again.
    """
    if isinstance(mesh, Mesh) and mesh.size == 1:
        return SingleDeviceSharding(mesh.devices.item())
    return NamedSharding(mesh, PartitionSpec(*axes))


def everywhere() -> Sharding:
    """Return the sharding of arrays that every device holds whole."""
    return _along(make_mesh(data=0, fsdp=1))


def batch_sharding(mesh: Mesh) -> Sharding:
    """Return the sharding of arrays `[B, ...]` whose rows are split over all devices."""
    return _along(mesh, ROWS)


def put_batch(mesh: Mesh, batch: PyTree[Shaped[np.ndarray, "_ ..."]]) -> PyTree:
    """Return this process's rows of a batch as part of the global batch on the devices."""
    sharding = batch_sharding(mesh)
    return jax.tree.map(lambda rows: jax.make_array_from_process_local_data(sharding, rows), batch)


def state_sharding(mesh: Mesh | AbstractMesh, state: PyTree) -> PyTree:
    """Split the largest axis that divides of each array or shape over `fsdp`."""
    size = mesh.shape["fsdp"]

    def rule(leaf: Any) -> Sharding:
        axes = [i for i, n in enumerate(leaf.shape) if n % size == 0]
        if size == 1 or not axes or np.prod(leaf.shape) < _REPLICATE_BELOW:
            return _along(mesh)
        largest = max(axes, key=lambda i: leaf.shape[i])
        return _along(mesh, *[None] * largest, "fsdp")

    return jax.tree.map(rule, state)


def placed(shapes: PyTree, shardings: PyTree) -> PyTree:
    """Return shapes with their shardings, for compiling and restoring."""
    return jax.tree.map(
        lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where),
        shapes,
        shardings,
    )


def per_device(
    gradient: Callable[[PyTree, PyTree], tuple[PyTree, PyTree]],
    mesh: Mesh,
    params: PyTree,
    rows: PyTree,
    *,
    late: Late | None = None,
) -> tuple[PyTree, PyTree]:
    """Return a gradient, placed like the parameters, and sums over rows; each device takes its own.

    Args:
      gradient: from whole parameters and some rows to the gradient of the rows' mean with respect
        to the first entry of the parameters, and to sums over the rows.
      params: a tuple of trees of parameters, placed by `state_sharding`.
      rows: a tree of arrays `[B, ...]`, placed by `batch_sharding`.
      late: which parameters `gradient` gathers itself with `gather_late`; None for none.
    """
    specs = jax.tree.map(lambda sharding: sharding.spec, state_sharding(mesh, params))
    axes = _split_axes(mesh, params, late, is_late=False)
    gather = functools.partial(jax.tree.map, functools.partial(_gather, mesh))

    def reduce(part: Array, spec: PartitionSpec) -> Array:
        axes = [axis for axis in ROWS if mesh.shape[axis] > 1 and axis not in spec]
        return jax.lax.psum(part, axes) / mesh.size

    def local(params: PyTree, rows: PyTree) -> tuple[PyTree, PyTree]:
        first, scatter = jax.vjp(lambda part: gather(part, axes[0]), params[0])
        whole, sums = gradient((first, *gather(params[1:], axes[1:])), rows)
        return jax.tree.map(reduce, *scatter(whole), specs[0]), jax.lax.psum(sums, ROWS)

    in_specs, out_specs = (specs, PartitionSpec(ROWS)), (specs[0], PartitionSpec())
    # gradients differ from device to device until `reduce`
    split = jax.shard_map(local, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)
    return split(params, rows)


def gather_late(mesh: Mesh, params: PyTree, late: Late) -> Callable[[Names, PyTree], PyTree]:
    """Return a function that gathers parameters within the gradient of `per_device`.

    The function takes a path and this device's part of the parameters under it, and returns them
    whole. Its derivative sums over `fsdp` and leaves each device its part.
    """
    axes = _split_axes(mesh, params, late, is_late=True)

    def gather(path: Names, part: PyTree) -> PyTree:
        under = functools.reduce(lambda tree, name: tree[name], path, axes)
        return jax.tree.map(functools.partial(_gather, mesh), part, under)

    return gather


def _split_axes(mesh: Mesh, params: PyTree, late: Late | None, *, is_late: bool) -> PyTree:
    """Return the axis, from the end, that each early or late parameter is split along, 0 for none.

    A loop over blocks moves axes that are counted from the front.
    """

    def axis_of(path: KeyPath, leaf: Any, sharding: NamedSharding) -> int:
        axis = len(sharding.spec) - 1
        names = tuple(entry.key for entry in path if isinstance(entry, DictKey))
        if axis < 0 or (late is not None and late(names, axis)) != is_late:
            return 0
        return axis - leaf.ndim

    return tree_map_with_path(axis_of, params, state_sharding(mesh, params))


def _gather(mesh: Mesh, part: Shaped[Array, "..."], axis_from_end: int) -> Shaped[Array, "..."]:
    """Return a whole array; the derivative sums over `fsdp` and leaves each device its part."""
    axis = part.ndim + axis_from_end
    if not axis_from_end:
        return part
    if not jax.distributed.is_initialized() or mesh.devices.flat[0].platform != "cpu":
        return jax.lax.all_gather(part, "fsdp", axis=axis, tiled=True)
    # a sum, whose derivative is a sum: gloo, between CPUs of a job, scatters sums wrongly. Now and
    # then the first process gets the end of its part before it is summed (jax-ml/jax#40830)
    parts = jnp.zeros((mesh.shape["fsdp"], *part.shape), part.dtype)
    parts = jax.lax.psum(parts.at[jax.lax.axis_index("fsdp")].set(part), "fsdp")
    return jnp.concatenate(parts, axis)
