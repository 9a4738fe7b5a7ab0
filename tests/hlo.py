"""What devices exchange in a compiled program, read from its text."""

import math
import re
from collections import Counter

_HEADER = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*\{$")
_KINDS = "all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter|collective-broadcast"
_COLLECTIVE = re.compile(rf" = (.*?) ({_KINDS})(?:-start)?\(")
_TRIPS = re.compile(r'known_trip_count":\{"n":"(\d+)"')
_GROUP = re.compile(r"replica_groups=(?:\{\{([\d,]+)\}|\[\d+,(\d+)\])")


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
