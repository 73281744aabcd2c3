"""What collectives move inside an island of fast links, and what between islands."""

import types

import numpy as np
import pytest

from lcm_jax.cost import hlo, roofline


def moved(monkeypatch, platform, shape, groups, size=1.0):
    device = types.SimpleNamespace(platform=platform)
    mesh = types.SimpleNamespace(shape=shape, devices=np.array([device]))
    one = hlo.Collective("all-gather", size, 1, groups, "")
    monkeypatch.setattr(hlo, "collectives", lambda program: [one])
    return roofline._collectives(None, mesh)[1:]


def test_gpus_beyond_a_node_pay_for_the_network(monkeypatch):
    """32 GPUs are 4 nodes of 8: of a ring's 31/32 payloads, 7/8 go inside, and an eighth of 3/4 between them."""
    shape = {"slice": 1, "data": 1, "fsdp": 32}
    link, dcn = moved(monkeypatch, "gpu", shape, (tuple(range(32)),), 31.0)
    assert (link, dcn) == pytest.approx((32 * 7 / 8, 32 * 3 / 4 / 8))
    link, dcn = moved(monkeypatch, "tpu", shape, (tuple(range(32)),), 31.0)
    assert (link, dcn) == (31.0, 0.0)


def test_gpus_of_one_node_do_not(monkeypatch):
    shape = {"slice": 1, "data": 4, "fsdp": 8}
    groups = tuple(tuple(range(8 * i, 8 * i + 8)) for i in range(4))
    assert moved(monkeypatch, "gpu", shape, groups, 7.0) == (7.0, 0.0)
    across = tuple(tuple(range(i, 32, 8)) for i in range(8))  # one of each node
    assert moved(monkeypatch, "gpu", shape, across, 3.0) == pytest.approx((0.0, 3.0))


def test_slices_pay_for_the_network(monkeypatch):
    shape = {"slice": 2, "data": 1, "fsdp": 4}
    assert moved(monkeypatch, "tpu", shape, (tuple(range(8)),), 7.0) == pytest.approx((8 * 3 / 4, 8 / 2 / 4))
