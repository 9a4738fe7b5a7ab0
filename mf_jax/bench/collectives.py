"""What the devices exchange in a compiled program, read from its text: kinds, counts, bytes, and over which axes."""

import math
import re
from collections import Counter
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from mf_jax.bench.compiled import arrays, executed_lines

_KINDS = "all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter|collective-broadcast"
_INSTRUCTION = re.compile(rf" = (?P<result>.*?) (?P<kind>{_KINDS})(?:-start)?\(")
_LISTED = re.compile(r"replica_groups=\{\{([\d,{}]*)\}\}")
_MADE = re.compile(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")


class Exchange(NamedTuple):
    """A kind of collective among the same groups of devices.

    kind: XLA's name. group: the devices of the first group, as the mesh counts them. axis: of the mesh that the groups
    lie along, "data", "fsdp" or "data fsdp", and "other" for none of these and for pairs. count: executions in a
    run, loops included. numbers, payload: of the whole array, what a device has after a gather or before a
    reduction, in numbers and in bytes, summed over all executions.
    """

    kind: str
    group: tuple[int, ...]
    axis: str
    count: int
    numbers: int
    payload: int

    @property
    def passed_on(self) -> float:
        """The share of the payload that a device passes on in a ring."""
        share = (len(self.group) - 1) / len(self.group)
        return {"all-reduce": 2 * share, "collective-permute": 1.0}.get(self.kind, share)


def exchanges(text: str, mesh: Mapping[str, int]) -> list[Exchange]:
    """Return all collectives of a compiled program, those alike added up.

    Args:
      text: of the program, after all of XLA's passes.
      mesh: sizes of its axes.
    """
    totals: dict[tuple[str, tuple[int, ...], str], Counter] = {}
    for line, times in executed_lines(text):
        if not (found := _INSTRUCTION.search(line)):
            continue
        groups = _groups(line, math.prod(mesh.values()))
        scale = times * (len(groups[0]) if found["kind"] == "reduce-scatter" else 1)
        sizes = [(scale * math.prod(shape), bits) for shape, bits in arrays(found["result"])]
        numbers, bits = sum(num for num, _ in sizes), sum(num * bits for num, bits in sizes)
        axis = "other" if found["kind"] == "collective-permute" else _axis(groups, mesh)
        key = found["kind"], groups[0], axis
        totals.setdefault(key, Counter()).update(count=times, numbers=numbers, payload=bits // 8)
    return [Exchange(*key, **total) for key, total in sorted(totals.items())]


def _groups(line: str, num_devices: int) -> list[tuple[int, ...]]:
    """Return the groups of devices of a collective, written out or as a reshaped and transposed range."""
    if listed := _LISTED.search(line):
        return [tuple(map(int, group.split(","))) for group in listed[1].split("},{")]
    if not (made := _MADE.search(line)):  # all of them, or pairs
        return [tuple(range(num_devices))]
    shape, source, order = (
        tuple(map(int, part.split(","))) if part else () for part in made.groups()
    )
    ids = np.arange(math.prod(source)).reshape(source)
    ids = ids.transpose(order) if order else ids
    return [tuple(group) for group in ids.reshape(shape).tolist()]


def _axis(groups: list[tuple[int, ...]], mesh: Mapping[str, int]) -> str:
    ids = np.arange(math.prod(mesh.values())).reshape(tuple(mesh.values()))
    first, second = mesh
    along = {first: ids.T, second: ids, f"{first} {second}": ids.reshape(1, -1)}
    for name, rows in along.items():
        if rows.shape[1] > 1 and {frozenset(row) for row in rows.tolist()} == set(
            map(frozenset, groups)
        ):
            return name
    return "other"
