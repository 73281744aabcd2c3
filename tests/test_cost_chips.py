"""Chips by jax's names, and the slices that a name stands for."""

import pytest

from lcm_jax.cost import chips
from lcm_jax.errors import LcmError


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("TPU v4", "v4"),
        ("TPU v5 lite", "v5e"),
        ("TPU v5", "v5p"),
        ("TPU v5p", "v5p"),
        ("TPU v6 lite", "v6e"),
        ("NVIDIA A100-SXM4-80GB", "A100"),
        ("NVIDIA A100-SXM4-40GB", "A100-40GB"),
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA H200", "H200"),
    ],
)
def test_device_kinds(kind, name):
    assert chips.lookup(kind).name == name


@pytest.mark.parametrize("kind", ["cpu", "TPU v3", "NVIDIA GeForce RTX 4090"])
def test_unknown_devices_have_no_constants(kind):
    assert chips.lookup(kind) is None


@pytest.mark.parametrize(
    ("topology", "name", "count"),
    [
        ("v5e:4x4", "v5e", 16),
        ("v5p:2x2x4", "v5p", 16),
        ("v6e:4x4", "v6e", 16),
        ("v4:2x2x4", "v4", 16),
        ("v5e:16x16", "v5e", 256),
        ("v5p:4x8x8", "v5p", 256),
    ],
)
def test_a_topology_counts_chips(topology, name, count):
    chip, found = chips.of_topology(topology)
    assert (chip.name, found) == (name, count)


@pytest.mark.parametrize("topology", ["v5e:4x5", "v7:2x2", "v5e", "v5p:4x4", "", "v5e:16"])
def test_an_unknown_topology_is_told_the_known_ones(topology):
    with pytest.raises(LcmError, match=r"topology .* is not known; .*v5e:\{2x2,2x4,4x4.*v5p:\{2x2x1"):
        chips.of_topology(topology)


def test_no_chip_moves_memory_faster_than_it_computes_or_slower_than_its_network():
    for chip in chips.CHIPS.values():
        assert chip.peak_flops > chip.hbm_bandwidth > chip.link_bandwidth > chip.dcn_bandwidth > 1e9
        assert 15 * chips.GIB < chip.hbm_bytes < 200 * chips.GIB
