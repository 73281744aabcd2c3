"""The private parts of jax that the package uses exist and do what it relies on; no other file uses any."""

import re
from pathlib import Path

import jax
import pytest
from test_runtime_distributed import free_port

from lcm_jax.runtime import distributed, jax_private

ROOT = Path(__file__).parents[1]
PRIVATE = re.compile(r"\b_src\b|^\s*(import|from) jaxlib\b", re.MULTILINE)


@pytest.fixture
def joined(monkeypatch):
    """This process as the only one of a run, with its own service."""
    jax.devices()  # created now, so that they do not depend on the service
    state, address = type(jax_private.distributed.global_state)(), f"127.0.0.1:{free_port()}"
    monkeypatch.setattr(jax_private.distributed, "global_state", state)
    jax.config.update("jax_enable_preemption_service", False)  # it would handle this process's SIGTERM for ever
    state.initialize(address, 1, 0, cluster_detection_method="deactivate", coordinator_bind_address=address)
    yield
    state.shutdown()
    jax.config.update("jax_enable_preemption_service", True)


def test_the_service(joined):
    client = jax_private.client()
    client.key_value_set("kept/2", "two")
    client.key_value_set("kept/1", "one")
    assert sorted(client.key_value_dir_get("kept/")) == [("kept/1", "one"), ("kept/2", "two")]
    assert client.key_value_dir_get("other/") == []
    assert client.blocking_key_value_get("kept/1", 1000) == client.key_value_try_get("kept/1") == "one"
    client.wait_at_barrier("met", 1000)
    with pytest.raises(jax.errors.JaxRuntimeError):
        client.key_value_set("kept/1", "another")
    with pytest.raises(jax.errors.JaxRuntimeError):
        client.key_value_try_get("nothing")


def test_cudnn_of_an_absent_gpu():
    """Head sizes above 128 need Hopper; after the block jax asks the devices again."""
    before = jax_private.cudnn.check_compute_capability
    x = jax.ShapeDtypeStruct((2, 64, 8, 160), "bfloat16")

    def traced(capability: tuple[int, int]) -> str:
        with jax_private.absent_gpu(capability, 91000):
            attention = jax.jit(lambda q: jax.nn.dot_product_attention(q, q, q, implementation="cudnn"))
            return attention.trace(x).lower(lowering_platforms=("cuda",)).as_text()

    assert "__cudnn$fmhaSoftmax" in traced((9, 0))
    with pytest.raises(NotImplementedError, match="head dim"):
        traced((8, 9))
    assert jax_private.cudnn.check_compute_capability is before


def test_agreement_of_one_process(joined):
    with pytest.raises(ZeroDivisionError), distributed.together(), distributed.together():
        raise ZeroDivisionError
    assert distributed.broadcast_from_first(lambda: [1, None]) == [1, None]
    assert distributed.any_process(True)
    assert not distributed.any_process(False)
    distributed.assert_same("the seed", 5)
    assert not distributed.stop_asked()
    distributed.ask_to_stop()
    distributed.ask_to_stop()
    assert distributed.stop_asked()
    barrier = distributed.Barrier("save")
    barrier.wait()
    assert barrier.given_up() == ""
    barrier.give_up(OSError("disk full"))
    assert barrier.given_up() == "process 0 of 1: disk full"


def test_no_service_before_processes_join():
    assert jax_private.client() is None


def test_cluster_types():
    kinds = jax_private.cluster_types()
    assert {"ompi", "slurm"} < {kind.name for kind in kinds}
    assert "K8sCluster" in {kind.__name__ for kind in kinds}
    calls = ("is_env_present", "get_process_count", "get_process_id", "get_coordinator_address")
    assert all(callable(getattr(kind, call)) for kind in kinds for call in calls)


def test_one_file_uses_private_parts():
    files = [file for folder in ("lcm_jax", "experiments", "configs") for file in (ROOT / folder).rglob("*.py")]
    users = [file.relative_to(ROOT).as_posix() for file in files if PRIVATE.search(file.read_text())]
    assert users == ["lcm_jax/runtime/jax_private.py"]
