"""The mesh, the sharding rule, and both on eight CPU devices in a process of its own."""

import os
import subprocess
import sys
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, PartitionSpec

from lcm_jax.errors import LcmError
from lcm_jax.runtime import mesh as mesh_lib


@pytest.mark.parametrize(
    ("shape", "want"),
    [
        ((3, 3, 320, 640), PartitionSpec(None, None, None, "fsdp")),
        ((3, 3, 640, 320), PartitionSpec(None, None, "fsdp", None)),
        ((1280, 1280), PartitionSpec(None, "fsdp")),
        ((49408, 770), PartitionSpec("fsdp", None)),
        ((1021, 77), PartitionSpec()),
        ((320,), PartitionSpec()),
        ((), PartitionSpec()),
    ],
)
def test_rule(shape, want):
    assert mesh_lib.param_sharding(AbstractMesh((2, 4), ("data", "fsdp")), shape).spec == want
    assert mesh_lib.param_sharding(AbstractMesh((8, 1), ("data", "fsdp")), shape).spec == PartitionSpec()


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((1, 3, 1), "mesh.slices = 1, mesh.data = 1, mesh.fsdp = 3 multiply to 3, .* 1 devices; change one of them$"),
        ((3, 1, 1), "mesh.data = 3, mesh.fsdp = 1 multiply to 3, not to the 1 devices; .*, or set mesh.data = -1$"),
        ((-1, 2, 1), "mesh.slices = 1, mesh.data = -1, mesh.fsdp = 2 do not divide the 1 devices; change one of them$"),
        ((-1, 1, 2), "mesh.slices = 2, mesh.data = -1, mesh.fsdp = 1 do not divide the 1 devices"),
        ((-1, -1, 1), "one of mesh.data and mesh.fsdp may be -1"),
        ((0, 1, 1), "sizes must be at least 1"),
        ((1, 1, -1), "sizes must be at least 1"),
    ],
)
def test_sizes_that_are_not_a_mesh(sizes, message):
    with pytest.raises(LcmError, match=message):
        mesh_lib.make_mesh(*sizes, devices=jax.devices()[:1])


@pytest.mark.parametrize("slices", [1, 4])
def test_slices_must_be_those_of_the_chips(slices):
    chips = [types.SimpleNamespace(platform="tpu", slice_index=i // 4) for i in range(8)]
    with pytest.raises(LcmError, match=f"mesh.slices = {slices}, but the 8 chips form 2 slices"):
        mesh_lib.make_mesh(slices=slices, devices=chips)


def test_batch_splits_over_devices_and_accumulation():
    mesh = AbstractMesh((2, 2, 2), mesh_lib.AXES)
    mesh_lib.check_batch(mesh, 48, 3)
    with pytest.raises(LcmError, match=r"data.batch_size = 12 does not split over 8 devices; use a multiple of 8"):
        mesh_lib.check_batch(mesh, 12)
    with pytest.raises(LcmError, match=r"batch_size = 24 in 2 parts .* over 8 devices; use a multiple of 16"):
        mesh_lib.check_batch(mesh, 24, 2)


def test_process_rows_are_those_of_its_devices():
    devices = np.array([types.SimpleNamespace(process_index=i) for i in (0, 1, 1, 0)]).reshape(1, 2, 2)
    mesh = types.SimpleNamespace(devices=devices, size=4)
    assert mesh_lib.process_rows(mesh, 8, 0) == (0, 1, 6, 7)
    assert mesh_lib.process_rows(mesh, 8, 1) == (2, 3, 4, 5)


def test_report_unsharded():
    mesh = AbstractMesh((1, 1, 4), mesh_lib.AXES)
    struct = jax.ShapeDtypeStruct
    tree = {
        "odd": struct((257, 257), np.float32),
        "small": {"a": struct((8,), np.float32)},
        "b": struct((4,), np.float16),
        "split": struct((512, 512), np.float32),
    }
    assert mesh_lib.report_unsharded(mesh, tree) == (
        f"not split over fsdp = 4, whole on every device: {4 * 257**2 + 40} bytes: odd [257, 257] {4 * 257**2} bytes, "
        "2 small ones of 40 bytes"
    )
    assert mesh_lib.report_unsharded(mesh, {"split": tree["split"]}) == ""
    assert mesh_lib.report_unsharded(AbstractMesh((1, 4, 1), mesh_lib.AXES), tree) == ""


def test_gathers_of_one_mesh_and_dtype_are_equal():
    """Modules have them as a field, and so are equal, too."""
    gather, same, other_dtype, other_mesh, none = (
        mesh_lib.gather_weights(AbstractMesh((1, 8 // fsdp, fsdp), mesh_lib.AXES), dtype)
        for fsdp, dtype in ((4, jnp.bfloat16), (4, "bfloat16"), (4, np.float32), (2, jnp.bfloat16), (1, np.float32))
    )
    assert gather == same and hash(gather) == hash(same)
    assert gather != other_dtype and gather != other_mesh and none is None


EIGHT = """
import jax, numpy as np
jax.config.update("jax_num_cpu_devices", 8)
import jax.numpy as jnp
from lcm_jax.errors import LcmError
from lcm_jax.runtime import checkpoints as checkpoint
from lcm_jax.runtime import mesh as m
import sys
mesh = m.make_mesh(fsdp=4)
assert dict(mesh.shape) == {"slice": 1, "data": 2, "fsdp": 4}
assert dict(m.make_mesh(2, -1, 2).shape) == {"slice": 2, "data": 2, "fsdp": 2}
assert [d.id for d in m.make_mesh(2, -1, 2).devices[1].flat] == [4, 5, 6, 7]
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
put = m.place(mesh)
for value in (w, jnp.asarray(w)):
    array = put(value)
    assert array.sharding == placed["w"].sharding and np.asarray(array).tobytes() == w.tobytes()
assert put(array) is array
assert put(jax.eval_shape(lambda: array)).sharding == array.sharding
rows = m.spread(mesh, np.arange(10).reshape(5, 2))
assert rows.sharding == m.batch_sharding(mesh)
np.testing.assert_array_equal(rows, [[0, 1], [2, 3], [4, 5], [6, 7], [8, 9], [8, 9], [8, 9], [8, 9]])
w[:] = 0  # the shards are copies
assert np.asarray(put(array)).any()
print("fine")
"""

COLLECTIVES = """
import jax, numpy as np, re
jax.config.update("jax_num_cpu_devices", 8)
import jax.numpy as jnp
from flax import linen as nn
from lcm_jax.runtime import mesh as m

class Net(nn.Module):
    weights_fn: object = None

    @nn.compact
    def __call__(self, x):
        def whole(layer):
            return layer if self.weights_fn is None else nn.map_variables(layer, "params", trans_in_fn=self.weights_fn)
        x = whole(nn.Conv)(256, (3, 3), name="a")(x)
        x = x + whole(nn.Dense)(256, name="b")(nn.silu(nn.GroupNorm(32)(x)))
        return whole(nn.Dense)(512, name="c")(x)

x = np.random.default_rng(0).normal(size=(16, 7, 7, 64)).astype(np.float32)
params = Net().init(jax.random.key(0), x[:1])

def loss(p, x, net):
    return (net.apply(p, x) ** 2).mean()

want = jax.jit(jax.grad(loss), static_argnums=2)(params, x, Net())
for sizes in ((2, 2, 2), (2, 4, 1), (1, 8, 1)):
    mesh = m.make_mesh(*sizes)
    shardings, rows = m.state_shardings(mesh, params), m.batch_sharding(mesh)
    grad = jax.jit(jax.grad(loss), static_argnums=2, in_shardings=(shardings, rows), out_shardings=shardings)
    compiled = grad.lower(params, x, Net(m.gather_weights(mesh, np.float32))).compile()
    found = {}
    for shapes, kind in re.findall(r" = (.*?) (all-gather|all-reduce|all-to-all|reduce-scatter|collective-permute)"
                                   r"(?:-start)?\\(", compiled.as_text()):
        found.setdefault(kind, set()).update(
            tuple(map(int, filter(None, s.split(",")))) for s in re.findall(r"\\[([\\d,]*)\\]", shapes))
    assert found.keys() == {"all-gather", "all-reduce"}, found
    assert found["all-gather"] == {(3, 3, 64, 256), (256, 256), (256, 512)}, found
    dimensions = {size for shape in found["all-reduce"] for size in shape}
    assert not any(size % 7 == 0 for size in dimensions), found  # every size of an activation is a multiple of 7
    place = m.place(mesh)
    got = compiled(jax.tree.map(place, params), jax.device_put(x, rows))
    jax.tree.map(lambda g, w: np.testing.assert_allclose(g, w, rtol=1e-4, atol=1e-6), got, want)
    assert got["params"]["b"]["kernel"].sharding.shard_shape((256, 256)) == (256, 256 // mesh.shape["fsdp"])
print("fine")
"""


@pytest.mark.parametrize("program", [EIGHT, COLLECTIVES], ids=["placing", "collectives"])
def test_eight_devices(program, tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "c")],
        capture_output=True,
        text=True,
        env={**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(Path(__file__).parents[1])},
    )
    assert done.stdout == "fine\n", done.stderr[-2000:]
