"""Peak FLOP/s, memory and bandwidths of chips, and the TPU slices that have a name.

    peak_flops      dense bfloat16 FLOP/s
    hbm_bytes       memory per chip that XLA may use (its error says "of 15.75G hbm" on a v5e)
    hbm_bandwidth   bytes/s
    link_bandwidth  bytes/s that a chip receives over the inter-chip network in a collective: one direction of one link
                    per dimension of the torus, which is all that a corner chip of a slice without wrap-around has
    dcn_bandwidth   bytes/s per chip between slices (TPU) or between nodes of eight (GPU)

Sources. TPU: cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e}: peak 275, 197, 459, 918 TFLOP/s; HBM 32, 16, 95, 32 GB at
1200, 819, 2765, 1638 GB/s; bidirectional bandwidth of all links 600 (v4: 6 of 50 GB/s each way), 400, 1200, 800 GB/s
over 6, 4, 6, 4 ports; data-centre network v5p 50 Gbit/s a chip, v5e 6.4 Tbit/s a pod of 256, v6e 4 x 200 Gbit/s a host
of 8, v4 assumed equal to v5p. GPU: NVIDIA's data sheets, SXM: peak 312, 989, 989 TFLOP/s; HBM 80 (A100 also 40), 80,
141 GB at 2.04 (1.56), 3.35, 4.8 TB/s; NVLink one way 300, 450, 450 GB/s; network 200, 400, 400 Gbit/s a GPU.
"""

import dataclasses
import math
import re

from lcm_jax.errors import LcmError

GIB = 2**30
GPUS_PER_NODE = 8  # joined by NVLink; their numbers are consecutive


@dataclasses.dataclass(frozen=True)
class Chip:
    """Constants of one chip (not of one of its cores) in FLOP/s, bytes and bytes/s; see the module."""

    name: str
    peak_flops: float
    hbm_bytes: float
    hbm_bandwidth: float
    link_bandwidth: float
    dcn_bandwidth: float


CHIPS = {
    chip.name: chip
    for chip in (
        Chip("v4", 275e12, 30.75 * GIB, 1200e9, 3 * 50e9, 6.25e9),
        Chip("v5e", 197e12, 15.75 * GIB, 819e9, 2 * 50e9, 3.125e9),
        Chip("v5p", 459e12, 95.74 * GIB, 2765e9, 3 * 100e9, 6.25e9),
        Chip("v6e", 918e12, 31.25 * GIB, 1638e9, 2 * 100e9, 12.5e9),
        Chip("A100-40GB", 312e12, 40e9, 1555e9, 300e9, 25e9),
        Chip("A100", 312e12, 80e9, 2039e9, 300e9, 25e9),
        Chip("H100", 989e12, 80e9, 3350e9, 450e9, 50e9),
        Chip("H200", 989e12, 141e9, 4800e9, 450e9, 50e9),
    )
}

# Words in jax's device_kind -> chip; the first match counts.
_KINDS = {
    "TPU v4": "v4",
    "TPU v5 lite": "v5e",
    "TPU v5e": "v5e",
    "TPU v5p": "v5p",
    "TPU v5": "v5p",
    "TPU v6 lite": "v6e",
    "TPU v6e": "v6e",
    "H200": "H200",
    "H100": "H100",
    "A100-SXM4-40GB": "A100-40GB",
    "A100": "A100",
}

_FLAT = ("2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_CUBES = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8")
TOPOLOGIES = {"v4": _CUBES, "v5e": _FLAT, "v5p": _CUBES, "v6e": _FLAT}


def lookup(device_kind: str) -> Chip | None:
    """The chip with jax's `device_kind`; None if its constants are unknown, as for a CPU."""
    if re.search(r"\b(PCIe|NVL)\b", device_kind):  # slower than the SXM chips of the same name
        return None
    return next((CHIPS[name] for kind, name in _KINDS.items() if re.search(rf"\b{kind}\b", device_kind)), None)


def of_topology(topology: str) -> tuple[Chip, int]:
    """Chip and number of chips of a slice: "v5e:4x4" -> (v5e, 16).

    Raises:
      LcmError: unknown topology; the message lists the known ones.
    """
    chip, _, shape = topology.partition(":")
    if shape not in TOPOLOGIES.get(chip, ()):
        known = "; ".join(f"{name}:{{{','.join(shapes)}}}" for name, shapes in TOPOLOGIES.items())
        raise LcmError(f"unknown topology {topology!r}; choose one of {known}")
    return CHIPS[chip], math.prod(map(int, shape.split("x")))
