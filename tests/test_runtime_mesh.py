"""The sharding rule, on a made-up mesh, and real placement on eight CPU devices in a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest
from jax.sharding import AbstractMesh, PartitionSpec

from lcm_jax.errors import LcmError
from lcm_jax.runtime import mesh as mesh_lib


@pytest.mark.parametrize(("shape", "want"), [
    ((3, 3, 320, 640), PartitionSpec(None, None, None, "fsdp")),
    ((3, 3, 640, 320), PartitionSpec(None, None, "fsdp", None)),
    ((1280, 1280), PartitionSpec(None, "fsdp")),
    ((49408, 770), PartitionSpec("fsdp", None)),
    ((1021, 77), PartitionSpec()),
    ((320,), PartitionSpec()),
    ((), PartitionSpec()),
])
def test_rule(shape, want):
    mesh = AbstractMesh((2, 4), ("data", "fsdp"))
    assert mesh_lib.param_sharding(mesh, shape).spec == want


def test_one_way_fsdp_replicates():
    assert mesh_lib.param_sharding(AbstractMesh((8, 1), ("data", "fsdp")), (4096, 4096)).spec == PartitionSpec()


def test_fsdp_must_divide_the_devices():
    with pytest.raises(LcmError, match="fsdp = 3 does not divide the 1 devices"):
        mesh_lib.make_mesh(3, devices=jax.devices()[:1])


EIGHT = """
import jax, numpy as np
jax.config.update("jax_num_cpu_devices", 8)
import jax.numpy as jnp
from lcm_jax.errors import LcmError
from lcm_jax.runtime import checkpoint, mesh as m
import sys
mesh = m.make_mesh(fsdp=4)
assert dict(mesh.shape) == {"data": 2, "fsdp": 4}
batch = m.put_batch(mesh, {"x": np.arange(32.0).reshape(16, 2)})
assert {s.data.shape for s in batch["x"].addressable_shards} == {(2, 2)}
try:
    m.put_batch(mesh, {"x": np.zeros((9, 2))})
except LcmError as error:
    assert "batch of 9" in str(error)
else:
    raise AssertionError("9 rows over 8 devices")
w = np.random.default_rng(0).normal(size=(512, 256)).astype(np.float32)
state = {"w": w}
placed = jax.device_put(state, m.state_shardings(mesh, state))
assert {s.data.shape for s in placed["w"].addressable_shards} == {(128, 256)}
total = jax.jit(lambda s, b: (b["x"] @ jnp.ones((2, 512)) @ s["w"]).sum())(placed, batch)
np.testing.assert_allclose(total, batch["x"].sum() * w.sum(), rtol=1e-4)
with checkpoint.Checkpoints(sys.argv[1]) as c:  # saved on one mesh, restored on another
    c.save(1, placed)
    c.wait()
    other = m.make_mesh(fsdp=8)
    back = c.restore(m.abstract_state(other, state))
    assert {s.data.shape for s in back["w"].addressable_shards} == {(64, 256)}
    assert np.asarray(back["w"]).tobytes() == w.tobytes()
print("fine")
"""


def test_eight_devices(tmp_path):
    done = subprocess.run([sys.executable, "-c", EIGHT, str(tmp_path / "c")], capture_output=True, text=True,
                          env={**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(Path(__file__).parents[1])})
    assert done.stdout == "fine\n", done.stderr[-2000:]
