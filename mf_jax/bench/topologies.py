"""Machines to plan for: how many devices, how much each holds and computes, how fast they exchange.

Figures are those of the makers' public pages. TPUs: Cloud TPU documentation, "System architecture" of each version; its
interconnect figure counts both directions, so half of it stands here. Slices are counted as their names count them:
chips (v5e, v6e) or cores, two to a chip and one chip to a JAX device (v4, v5p). Four chips hang on a host. GPUs: the
data sheets of the A100, H100 and H200 SXM and the DGX user guides, at dense rates without sparsity; NVLink is given for
both directions, and a node has one network adapter a GPU.
"""

from typing import NamedTuple

from mf_jax.errors import check_known


class Topology(NamedTuple):
    """A machine.

    devices: as JAX counts them. processes: hosts. memory: bytes of a device. peak: bfloat16 FLOP/s of a device.
    link: bytes/s that a device sends, one direction, to devices it is linked to. outside: the same to devices of other
    hosts; that of `link` where the links cross hosts.
    """

    devices: int
    processes: int
    memory: float
    peak: float
    link: float
    outside: float


TOPOLOGIES = {
    "v5e-16": Topology(
        16, 4, 16e9, 197e12, 200e9, 200e9
    ),  # 16 GB, 197 TFLOP/s, 400 GB/s both ways; 2D mesh
    "v5e-256": Topology(
        256, 64, 16e9, 197e12, 200e9, 200e9
    ),  # the whole pod, a torus: 51.2 TB/s of all-reduce
    "v6e-16": Topology(16, 4, 32e9, 918e12, 400e9, 400e9),  # 32 GB, 918 TFLOP/s, 800 GB/s both ways
    "v4-32": Topology(
        16, 4, 32e9, 275e12, 300e9, 300e9
    ),  # 16 chips of 32 GiB, 275 TFLOP/s, six links of 50 GB/s
    "v5p-64": Topology(
        32, 8, 95e9, 459e12, 600e9, 600e9
    ),  # 32 chips of 95 GB, 459 TFLOP/s, 1,200 GB/s both ways
    "a100-8": Topology(
        8, 1, 80e9, 312e12, 300e9, 300e9
    ),  # 80 GB, 312 TFLOP/s, NVLink 600 GB/s both ways
    "h100-8": Topology(
        8, 1, 80e9, 989e12, 450e9, 450e9
    ),  # 80 GB, 989 TFLOP/s, NVLink 900 GB/s both ways
    "h100-64": Topology(64, 8, 80e9, 989e12, 450e9, 50e9),  # eight of these; adapters of 400 Gbit/s
    "h200-8": Topology(8, 1, 141e9, 989e12, 450e9, 450e9),  # 141 GB, else as the H100
    "cpu-8": Topology(
        8, 1, 4e9, 1e11, 1e10, 1e10
    ),  # eight virtual devices of a round size: for trying things out
}
"""The machines by name. Gigabytes are decimal: of 16 GiB a TPU's runtime keeps some, as a GPU's does."""


def find_topology(name: str) -> Topology:
    """Return the machine with this name.

    Raises:
      BadInput: if there is none; lists those there are.
    """
    check_known("bench.topology", name, TOPOLOGIES)
    return TOPOLOGIES[name]
