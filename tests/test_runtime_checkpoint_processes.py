"""Checkpoints across meshes and real processes: the same arrays bit for bit, one decision for all."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_runtime_distributed import free_port

from lcm_jax.runtime.checkpoints import Checkpoints, list_steps

ROOT = Path(__file__).parents[1]

STATE = """
import sys
import jax, numpy as np
jax.config.update("jax_num_cpu_devices", int(sys.argv[1]))
from jax.sharding import NamedSharding, PartitionSpec as P
from lcm_jax.errors import LcmError
from lcm_jax.runtime.checkpoints import Checkpoints

def host(step):
    rng = np.random.default_rng(step)
    return {"w": rng.normal(size=(16, 24)).astype(np.float32), "b": rng.normal(size=8).astype(np.float32),
            "step": np.int32(step)}

def abstract(mesh, specs):  # {"w": P(...), ...}
    return {name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, specs[name]))
            for name, x in host(0).items()}

def placed(step, target):
    return {name: jax.make_array_from_callback(x.shape, target[name].sharding, lambda index, x=x: x[index])
            for name, x in host(step).items()}

def same(tree, step, target):
    for name, x in host(step).items():
        assert tree[name].sharding == target[name].sharding and tree[name].dtype == x.dtype
        for shard in tree[name].addressable_shards:
            assert np.asarray(shard.data).tobytes() == x[shard.index].tobytes(), (name, shard.index)
"""


def host(step):
    rng = np.random.default_rng(step)
    return {
        "w": rng.normal(size=(16, 24)).astype(np.float32),
        "b": rng.normal(size=8).astype(np.float32),
        "step": np.int32(step),
    }


def same_on_one_device(folder: Path, step: int) -> None:
    with Checkpoints(folder) as checkpoints:
        restored = checkpoints.restore(jax.eval_shape(lambda: jax.tree.map(jnp.asarray, host(0))))
        assert checkpoints.latest_step() == step
    for name, x in host(step).items():
        assert np.asarray(restored[name]).tobytes() == x.tobytes() and restored[name].dtype == x.dtype


def start(code: str, *arguments) -> subprocess.Popen:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    return subprocess.Popen(
        [sys.executable, "-c", STATE + code, *map(str, arguments)],
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def finish(process: subprocess.Popen) -> tuple[str, str]:
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, out + err
    return out, err


MESHES = """
eight = jax.make_mesh((8,), ("fsdp",))
grid = jax.make_mesh((2, 4), ("data", "fsdp"))
first = abstract(eight, {"w": P(None, "fsdp"), "b": P("fsdp"), "step": P()})
second = abstract(grid, {"w": P("fsdp", "data"), "b": P(), "step": P()})
with Checkpoints(sys.argv[2]) as checkpoints:
    checkpoints.save(1, placed(1, first))
with Checkpoints(sys.argv[2]) as checkpoints:
    state = checkpoints.restore(second)
    same(state, 1, second)
    checkpoints.save(2, placed(2, second))
    same(checkpoints.restore(first), 2, first)
"""


def test_eight_devices_to_two_by_four_to_one(tmp_path):
    finish(start(MESHES, 8, tmp_path / "c"))
    assert list_steps(tmp_path / "c") == [1, 2]
    same_on_one_device(tmp_path / "c", 2)


PROCESSES = """
from jax.experimental import multihost_utils
index = int(sys.argv[3])
jax.distributed.initialize(f"127.0.0.1:{sys.argv[4]}", 2, index)
assert jax.process_count() == 2 and jax.device_count() == 4
mesh = jax.make_mesh((2, 2), ("data", "fsdp"))
target = abstract(mesh, {"w": P("data", "fsdp"), "b": P("fsdp"), "step": P()})
if sys.argv[5] == "apart":
    try:
        Checkpoints(f"{sys.argv[2]}/{index}")
    except LcmError as error:
        print("refused:", error)
    sys.exit()
with Checkpoints(sys.argv[2], keep=2, best="loss") as checkpoints:
    same(checkpoints.restore(target), 5, target)  # of one process
    for step in (6, 7, 8):
        assert checkpoints.save(step, placed(step, target), {"position": step}, {"loss": step})
    checkpoints.wait()
    assert checkpoints.steps() == [6, 7, 8] and not checkpoints.save(8, placed(0, target))
multihost_utils.sync_global_devices("saved")
if index == 0:
    from pathlib import Path
    victim = max((p for p in Path(sys.argv[2], "8", "state").rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    data = bytearray(victim.read_bytes())
    data[len(data) // 2] ^= 1
    victim.write_bytes(data)
multihost_utils.sync_global_devices("flipped")
with Checkpoints(sys.argv[2], keep=2, best="loss") as checkpoints:
    try:
        checkpoints.restore(target, 8)
    except LcmError as error:
        print("refused:", error)
    same(checkpoints.restore(target), 7, target)
    assert checkpoints.steps() == [6, 7]
    checkpoints.save(8, placed(8, target))
    checkpoints.wait()
    assert Path(sys.argv[2], "8").is_dir() if index == 0 else True
print("resumed")
"""


def two(folder: Path, what: str) -> list[tuple[str, str]]:
    port = free_port()
    processes = [start(PROCESSES, 2, folder, index, port, what) for index in range(2)]
    try:
        return [finish(process) for process in processes]
    finally:
        for process in processes:
            process.kill()


def test_one_process_to_two_to_one(tmp_path):
    with Checkpoints(tmp_path / "c") as checkpoints:
        checkpoints.save(5, jax.tree.map(jnp.asarray, host(5)))
    (out, said), (other_out, other_said) = two(tmp_path / "c", "together")
    assert "c/8 is damaged: the content of state/" in out and out.endswith("resumed\n")
    assert "c/8 is damaged" in other_out and other_out.endswith("resumed\n"), "process 1 reports it, too"
    assert said.count("DAMAGED") == 1 and "DAMAGED" not in other_said, "one warning"
    assert sorted(os.listdir(tmp_path / "c")) == ["6", "7", "8", "8.damaged"], "6 is kept as the best"
    same_on_one_device(tmp_path / "c", 8)


FAILS = """
import time
from jax.experimental import multihost_utils
from lcm_jax.runtime import checkpoints as checkpoints_module, distributed
from lcm_jax.runtime.workdir import StopSignal
from orbax.checkpoint._src.checkpointers import async_checkpointer
index, who = int(sys.argv[3]), int(sys.argv[5])

def full(*_, **__):  # on process 1 orbax's write in the background, on process 0 what comes after it
    raise OSError(122, "Disk quota exceeded")

def loop():
    mesh = jax.make_mesh((2, 2), ("data", "fsdp"))
    target = abstract(mesh, {"w": P("data", "fsdp"), "b": P("fsdp"), "step": P()})
    with Checkpoints(sys.argv[2]) as checkpoints, StopSignal() as stop:
        checkpoints.save(1, placed(1, target))
        checkpoints.wait()
        if index == who == 0:
            checkpoints_module.write_digests = full
        if index == who == 1:
            async_checkpointer._background_wait_for_commit_futures = full
        checkpoints.save(2, placed(2, target))
        step = 2
        while step < 3000 and not stop.agreed():
            step += 1
            multihost_utils.process_allgather(np.int32(step))
            checkpoints.check()
            time.sleep(0.02)
        print("stopped at", step, flush=True)
        checkpoints.save(step, placed(step, target))

distributed.exit_code(loop, coordinator=f"127.0.0.1:{sys.argv[4]}", num_processes=2, process_id=index)
"""


@pytest.mark.slow
@pytest.mark.parametrize("who", [0, 1])
def test_a_write_that_fails_in_one_process_ends_all_at_the_same_step(tmp_path, who):
    port = free_port()
    processes = [start(FAILS, 2, tmp_path / "c", index, port, who) for index in range(2)]
    try:
        ends = [process.communicate(timeout=300) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [2, 2], ends
    (last,) = {out.splitlines()[-1] for out, _ in ends}
    assert last.startswith("stopped at ") and 2 < int(last.split()[-1]) < 3000, ends
    own = f"saving checkpoint 2 in {tmp_path / 'c'} failed (OSError: [Errno 122] Disk quota exceeded)"
    assert f"error: {own}" in ends[who][1] and f"error: process {who} of 2: {own}" in ends[1 - who][1], ends
    assert list_steps(tmp_path / "c") == [1]


@pytest.mark.slow
def test_processes_that_see_different_folders(tmp_path):
    for out, _ in two(tmp_path, "apart"):
        assert "choose a folder on a file system that all processes share" in out
