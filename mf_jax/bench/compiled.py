"""The text of a compiled program of one device: its instructions, and how often each runs."""

import math
import re
from collections.abc import Iterator

_COMPUTATION = re.compile(r"^(?P<entry>ENTRY )?%?(?P<name>[\w.\-]+) \(.*\{$")
_TRIPS = re.compile(r'known_trip_count":\{"n":"(\d+)"')
_NAME = re.compile(r"%([\w.\-]+)")
_ARRAY = re.compile(r"(pred|[a-z]+\d+\w*)\[([\d,]*)\]")
_PRODUCT = re.compile(
    r" = (?P<out>\S+) (?P<kind>dot|convolution)\(%(?P<left>[\w.\-]+), %(?P<right>[\w.\-]+)\)"
)


def executed_lines(text: str) -> Iterator[tuple[str, int]]:
    """Yield the instructions of a program, and how often each runs: the body of a loop as often as XLA knows."""
    computations: dict[str, list[str]] = {}
    lines: list[str] = []
    entry = ""
    for line in text.splitlines():
        if header := _COMPUTATION.match(line):
            lines = computations.setdefault(header["name"], [])
            entry = header["name"] if header["entry"] else entry
        else:
            lines.append(line)

    def walk(name: str, times: int) -> Iterator[tuple[str, int]]:
        for line in computations[name]:
            yield line, times
            trips = _TRIPS.search(line)
            for called in set(_NAME.findall(line)) & computations.keys():
                yield from walk(called, times * (int(trips[1]) if trips else 1))

    yield from walk(entry, 1)


def arrays(result: str) -> list[tuple[tuple[int, ...], int]]:
    """Return (shape, bits of a number) of each array in the type of an instruction, e.g. "(f32[8,2], s32[])"."""
    return [
        (tuple(map(int, filter(None, shape.split(",")))), 8 if kind == "pred" else _bits(kind))
        for kind, shape in _ARRAY.findall(result)
    ]


def _bits(kind: str) -> int:
    return int(re.search(r"\d+", kind)[0])


def product_flops(text: str) -> int:
    """Return the operations of a program's matrix products and convolutions, 2 a multiplication, loops unrolled."""
    shapes = {
        name: arrays(kind)[0][0]
        for name, kind in re.findall(r"%([\w.\-]+) = (\w+\[[\d,]*\])", text)
    }
    total = 0
    for line, times in executed_lines(text):
        if found := _PRODUCT.search(line):
            total += (
                2 * times * math.prod(arrays(found["out"])[0][0]) * _summed(found, shapes, line)
            )
    return total


def _summed(found: re.Match, shapes: dict[str, tuple[int, ...]], line: str) -> int:
    """Return how many products each number of a result is the sum of."""
    if found["kind"] == "dot":
        axes = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", line)[1]
        return math.prod(shapes[found["left"]][int(axis)] for axis in axes.split(",") if axis)
    kernel = shapes[found["right"]]
    return math.prod(kernel) // kernel[re.search(r"dim_labels=\w+_(\w+)->", line)[1].index("o")]
