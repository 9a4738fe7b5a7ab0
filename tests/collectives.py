"""Print the collectives of programs for several devices as JSON: a script, see test_sharding.py."""

import dataclasses
import functools
import json
import math
import re
from collections import Counter

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict
from jax.sharding import NamedSharding, PartitionSpec
from steps import lowered_step, parts_of

from mf_jax.bench.step import placed_step
from mf_jax.models import DiT, parameter_shapes
from mf_jax.models.attention import attend
from mf_jax.models.blocks import is_axis_of_block
from mf_jax.objectives.flow_matching import FlowMatching
from mf_jax.objectives.meanflow import MeanFlow
from mf_jax.objectives.terminal_velocity import TerminalVelocity
from mf_jax.runtime.sharding import batch_sharding, make_mesh, state_sharding
from mf_jax.step import initial_state

_HEADER = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*\{$")
_KINDS = "all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter|collective-broadcast"
_COLLECTIVE = re.compile(rf" = (.*?) ({_KINDS})(?:-start)?\(")
_TRIPS = re.compile(r'known_trip_count":\{"n":"(\d+)"')
_GROUP = re.compile(r"replica_groups=(?:\{\{([\d,]+)\}|\[\d+,(\d+)\])")
SHAPE, BATCH = (8, 8, 4), 256
DIT = DiT(patch_size=4, depth=1, width=128, num_heads=2, num_classes=10)
CASES = {
    "flow": (DIT, FlowMatching()),
    "loop": (DIT.clone(depth=2, scan=True, remat="block"), MeanFlow()),
    "terminal": (DIT, TerminalVelocity(target_ema=0.9)),
}
MESHES = {"data": (8, 1), "both": (4, 2), "fsdp": (1, 8)}
CHOSEN = ["data/flow/step", "both/loop/step", "both/loop/block", "fsdp/terminal/step"]


def exchanged(text):
    """Return {kind of collective: numbers of the whole arrays}, a loop's as often as it runs."""
    computations, entry, total = {}, "", Counter()
    for line in text.splitlines():
        if header := _HEADER.match(line):
            lines = computations[header[2]] = []
            entry = header[2] if header[1] else entry
        elif computations:
            lines.append(line)

    def walk(name, times):
        for line in computations[name]:
            if found := _COLLECTIVE.search(line):
                shapes = re.findall(r"\w+\[([\d,]*)\]", found[1])
                numbers = sum(math.prod(map(int, filter(None, s.split(",")))) for s in shapes)
                listed, size = _GROUP.search(line).groups() if "scatter" in found[2] else ("", 1)
                size = len(listed.split(",")) if listed else int(size)
                total[found[2]] += times * numbers * size
            trips = _TRIPS.search(line)
            for called in set(re.findall(r"%([\w.\-]+)", line)) & computations.keys():
                walk(called, times * (int(trips[1]) if trips else 1))

    walk(entry, 1)
    return dict(total)


def first_moments(parts, mesh, compiled):
    """Return Adam's first moment, a multiple of the gradient, after a step without zeros."""
    state, x = initial_state(parts), jax.random.normal(jax.random.key(1), (BATCH, *SHAPE))
    wave = lambda a: a + 0.02 * jnp.cos(jnp.arange(a.size)).reshape(a.shape)  # noqa: E731
    state = state.replace(params=jax.tree.map(wave, state.params))
    places = jax.tree.map(lambda leaf: leaf.sharding, placed_step(parts, mesh)[1:])
    given = jax.device_put((state, x, jnp.arange(BATCH) % 10, None, None, None), places)
    return jax.tree.leaves(jax.device_get(compiled(*given).opt_state[0].mu))


def relative(ours, theirs):
    """Return the largest difference of arrays, each relative to its largest number."""
    pairs = zip(ours, theirs, strict=True)
    return max(float(jnp.abs(a - b).max() / jnp.abs(a).max()) for a, b in pairs)


def attention_on_four():
    """Return what fused attention with rows and heads, or rows and tokens, split exchanges.

    Its values and tangents must be those of plain attention on one device.
    """

    def run(kind, inputs):
        fused = functools.partial(attend, kind=kind, forward_mode=True)
        both = jax.jit(lambda *inputs: jax.jvp(fused, inputs[:3], inputs[3:]))
        compiled = both.lower(*inputs).compile()
        return compiled(*inputs), exchanged(compiled.as_text())

    mesh = make_mesh(data=2, fsdp=2, devices=jax.devices()[:4])
    inputs = list(jax.random.normal(jax.random.key(0), (6, 4, 20, 2, 16)))
    expected, _ = run("xla", inputs)
    exchanges = []
    for place in (batch_sharding(mesh), NamedSharding(mesh, PartitionSpec("data", "fsdp"))):
        got, exchange = run("fused", jax.device_put(inputs, place))
        assert all(jnp.allclose(a, b, atol=1e-4) for a, b in zip(got, expected, strict=True))
        exchanges.append(exchange)
    return exchanges


def main():
    """Print {mesh/case/gather: {"collectives", "split", "in_blocks", "whole", "apart"}}.

    "split" and "whole" count numbers in the parameters, "in_blocks" the split ones of blocks.
    "apart" is the largest relative difference between the gradients of a loop and one device's, "in
    parts" the same of a batch and of its quarters in turn.
    """
    out = {"attention": attention_on_four()}
    for chosen in CHOSEN:
        mesh_name, name, gather = chosen.split("/")
        data, fsdp = MESHES[mesh_name]
        mesh, (network, objective) = make_mesh(data=data, fsdp=fsdp), CASES[name]
        parts = parts_of(network, objective, shape=SHAPE, batch=BATCH)
        parts = dataclasses.replace(parts, gather=gather)
        shapes = parameter_shapes(network, SHAPE)
        compiled = lowered_step(parts, mesh).compile()
        named, places = flatten_dict(shapes), flatten_dict(state_sharding(mesh, shapes))
        split = {path: len(place.spec) - 1 for path, place in places.items() if place.spec}
        in_blocks = [path for path, axis in split.items() if is_axis_of_block(path, axis)]
        out[chosen] = {
            "collectives": exchanged(compiled.as_text()),
            "split": sum(named[path].size for path in split),
            "in_blocks": sum(named[path].size for path in in_blocks),
            "whole": sum(leaf.size for path, leaf in named.items() if path not in split),
        }
        if name == "loop":
            if gather == "step":  # one device has nothing to gather
                alone = make_mesh(data=1, fsdp=1, devices=jax.devices()[:1])
                of_one = first_moments(parts, alone, lowered_step(parts, alone).compile())
            of_all = first_moments(parts, mesh, compiled)
            out[chosen]["apart"] = relative(of_one, of_all)
        if name == "flow":
            split = dataclasses.replace(parts, microbatch=BATCH // 4)
            both = (parts, compiled), (split, lowered_step(split, mesh).compile())
            out["in parts"] = relative(*(first_moments(p, mesh, step) for p, step in both))
    print(json.dumps(out))


if __name__ == "__main__":
    main()
