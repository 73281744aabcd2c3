"""SIGKILL at random moments of a run that only saves: listed checkpoints are whole, and none that is kept is lost."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# One process imports jax, then forks the runs that it kills, because starting each one takes seconds.
KILLS = """
import json, os, random, signal, sys, time
import jax, jax.numpy as jnp, numpy as np
from pathlib import Path
from lcm_jax.runtime.checkpoints import Checkpoints, find_damage, list_steps

folder, kills, keep, seed = sys.argv[1], *map(int, sys.argv[2:])

def state(step):
    rng = np.random.default_rng(step)
    return {"x": rng.normal(size=(300, 200)).astype(np.float32), "y": {"z": np.float32(step)}}

def run(report):  # a run: resumes from the newest, saves each step, reports what is surely on disk
    with Checkpoints(folder, keep=keep) as checkpoints:
        first = 1
        if checkpoints.steps():
            newest = checkpoints.latest_step()
            found = checkpoints.restore(state(0))
            assert jax.tree.all(jax.tree.map(lambda a, b: np.array_equal(a, b), found, state(newest))), newest
            assert checkpoints.latest_step() == newest and checkpoints.extra() == {"position": newest}
            first = newest + 1
        assert all(name.isdigit() for name in os.listdir(folder)), os.listdir(folder)
        for step in range(first, 10**9):
            begun = time.monotonic()
            checkpoints.save(step, jax.tree.map(jnp.asarray, state(step)), {"position": step})
            if step % 2 or step < first + 2:  # else the next save begins before it is done
                checkpoints.wait()
                os.write(report, b"%d %f\\n" % (step, time.monotonic() - begun))

chance = random.Random(seed)
caught = {}
for number in range(kills):
    listen, report = os.pipe()
    child = os.fork()
    if not child:
        os.close(listen)
        try:
            run(report)
        finally:
            os._exit(1)
    os.close(report)
    reports = os.fdopen(listen)
    lines = [reports.readline(), reports.readline()]  # the first save of a process takes longer
    assert lines[1], "the run failed by itself"
    time.sleep(chance.uniform(0, 3 * float(lines[1].split()[1])))
    os.kill(child, signal.SIGKILL)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    sure = max(int(line.split()[0]) for line in [*lines, *reports])
    steps = list_steps(folder)
    newest = max(steps)
    assert newest >= sure, (steps, sure)
    assert set(range(max(1, newest - keep + 1), newest + 1)) <= set(steps), (steps, "one of the newest is lost")
    for step in steps:
        assert find_damage(Path(folder), step) is None
    left = [name.split(".", 2)[2] for name in os.listdir(folder) if not name.isdigit()]
    for kind in left or ["nothing"]:  # partial.orbax...: arrays, partial: digests, removed: the one before
        caught[kind] = caught.get(kind, 0) + 1
print(json.dumps({"newest": newest, "left": caught}))
"""


def kill(folder, kills: int, keep: int, seed: int) -> dict:
    done = subprocess.run(
        [sys.executable, "-W", "ignore::RuntimeWarning", "-c", KILLS, *map(str, (folder, kills, keep, seed))],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize(
    ("kills", "keep"),
    [
        (8, 1),
        pytest.param(100, 1, marks=pytest.mark.slow),
        pytest.param(100, 3, marks=pytest.mark.slow),
    ],
)
def test_killed_while_saving(tmp_path, kills, keep):
    found = kill(tmp_path / "checkpoints", kills, keep, seed=kills + keep)
    print(found)
    assert found["newest"] >= 2 * kills, "each run resumed where the one before was killed"
    assert found["left"].keys() - {"nothing"}, f"no kill came during a save: {found}"
