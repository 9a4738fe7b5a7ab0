"""How long a step takes on a machine if all of it is products and rings, one after the other."""

from collections.abc import Sequence

from mf_jax.bench.collectives import Exchange
from mf_jax.bench.measure import Result
from mf_jax.bench.topologies import Topology


def ring_rate(topology: Topology, group: tuple[int, ...]) -> float:
    """Return the bytes/s that each device of a group passes on in a ring.

    A group that spans hosts leaves each through as many adapters as it has devices there, all of them at once.

    Args:
      topology: the machine; devices of a host have consecutive numbers.
      group: numbers of devices.
    """
    per_host = topology.devices // topology.processes
    hosts = [device // per_host for device in group]
    if len(set(hosts)) == 1:
        return topology.link
    return min(topology.link, max(map(hosts.count, hosts)) * topology.outside)


def timed(exchange: Exchange, topology: Topology) -> Result:
    """Return a row about collectives: seconds = payload_bytes * passed_on / rate."""
    rate = ring_rate(topology, exchange.group)
    return {
        "kind": exchange.kind,
        "axis": exchange.axis,
        "devices": len(exchange.group),
        "count": exchange.count,
        "payload_bytes": exchange.payload,
        "passed_on": exchange.passed_on,
        "rate": rate,
        "seconds": exchange.payload * exchange.passed_on / rate,
    }


def predicted(
    flops: float, collectives: Sequence[Result], topology: Topology, utilisation: float
) -> Result:
    """Return how long a step takes if nothing is hidden behind anything else.

    Args:
      flops: of one device.
      collectives: with their seconds.
      topology: the machine.
      utilisation: share of the peak reached while computing, in (0, 1].

    Returns:
      gflop and seconds of computing, at the peak and at the utilisation; seconds of collectives; and the efficiency,
      computing / (computing + collectives), of both.
    """
    floor, exchanging = flops / topology.peak, sum(each["seconds"] for each in collectives)
    computing = floor / utilisation
    return {
        "gflop": flops / 1e9,
        "floor_seconds": floor,
        "compute_seconds": computing,
        "collective_seconds": exchanging,
        "efficiency_at_peak": floor / (floor + exchanging),
        "efficiency": computing / (computing + exchanging),
    }
