"""The workdir: its config, its lock, and stopping by signal."""

import errno
import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent import futures
from pathlib import Path

import filelock
import jax
import numpy as np
import pytest

from lcm_jax.diffusion.schedule import from_betas, make_betas
from lcm_jax.diffusion.solvers import solver_grid
from lcm_jax.distill.state import update_ema
from lcm_jax.distill.step import learning_rate_schedule
from lcm_jax.errors import LcmError
from lcm_jax.run import config as config_lib
from lcm_jax.runtime import workdir
from lcm_jax.runtime.workdir import StopSignal, locked, read_config


@pytest.fixture
def config():
    config = config_lib.default_config()
    config.model.teacher = "a/teacher"
    return config


def test_prepare_workdir_writes_the_config_then_accepts_the_same(tmp_path, config):
    with locked(tmp_path / "new" / "run") as folder:
        config_lib.prepare_workdir(folder, config)
    (folder / ".lock").unlink()
    before = (folder / "config.json").read_bytes()
    assert json.loads(before)["model"]["teacher"] == "a/teacher"
    config_lib.prepare_workdir(folder, config)
    assert (folder / "config.json").read_bytes() == before
    assert os.listdir(folder) == ["config.json"], "no temporary files are left"


def test_prepare_workdir_refuses_another_config_with_both_values(tmp_path, config):
    config_lib.prepare_workdir(tmp_path, config)
    (tmp_path / "metrics.jsonl").write_text("{}\n")
    before = (tmp_path / "config.json").read_bytes()
    config.train.learning_rate, config.distill.loss = 0.5, "l2"
    with pytest.raises(LcmError) as refused:
        config_lib.prepare_workdir(tmp_path, config)
    for words in ("train.learning_rate", "8e-06", "0.5", "'huber'", "'l2'"):
        assert words in str(refused.value)
    assert (tmp_path / "config.json").read_bytes() == before


def test_prepare_workdir_records_what_may_differ(tmp_path, config):
    config_lib.prepare_workdir(tmp_path, config)
    (tmp_path / "metrics.jsonl").write_text("{}\n")
    config.train.steps, config.sample.every = 12, 3
    config_lib.prepare_workdir(tmp_path, config)
    saved = read_config(tmp_path)
    assert (saved["train"]["steps"], saved["sample"]["every"]) == (12, 3)
    (tmp_path / "metrics.jsonl").unlink()
    config.train.learning_rate = 0.5  # a first command that failed before training must not block the corrected one
    config_lib.prepare_workdir(tmp_path, config)
    assert read_config(tmp_path)["train"]["learning_rate"] == 0.5


@pytest.mark.parametrize("content", [b"{half", b"[1]", b"\xff\xfe"])
def test_prepare_workdir_refuses_a_broken_config_json(tmp_path, config, content):
    (tmp_path / "metrics.jsonl").write_text("{}\n")
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(LcmError, match="config.json"):
        config_lib.prepare_workdir(tmp_path, config)


@pytest.mark.parametrize("content", ['{"in_channels": 4, "sample_size": 64}', "no JSON", '["train", "data"]'])
def test_a_config_that_is_none_of_a_run_is_not_replaced(tmp_path, config, content):
    """As of the folder of a UNet that is given as --workdir. An attempt that failed early is replaced."""
    path = tmp_path / "config.json"
    path.write_text(content)
    with pytest.raises(LcmError, match="config.json is not the config of a run, and would be replaced; choose another"):
        config_lib.prepare_workdir(tmp_path, config)
    assert path.read_text() == content
    path.write_text(json.dumps({key: {} for key in json.loads(config_lib.to_json(config)) if key != "sample"}))
    config_lib.prepare_workdir(tmp_path, config)
    assert read_config(tmp_path)["seed"] == config.seed


def test_moved_models_and_data_resume_if_their_digests_can_be_compared(tmp_path, config):
    config_lib.prepare_workdir(tmp_path, config)
    (tmp_path / "metrics.jsonl").write_text("{}\n")
    config.model.teacher = "b/teacher"
    with pytest.raises(LcmError, match=r"model.teacher: 'a/teacher' there, 'b/teacher' now.*put a link in its old pl"):
        config_lib.prepare_workdir(tmp_path, config)
    workdir.same_as_before(tmp_path, "models.json", {"unet": workdir.digest_entry("12", "teacher a/teacher")})
    moved = config_lib.prepare_workdir(tmp_path, config)
    assert moved == {"model.teacher": ("a/teacher", "b/teacher"), "model.student": ("a/teacher", "b/teacher")}
    assert read_config(tmp_path)["model"]["teacher"] == "a/teacher", "written before anything is compared"
    config.seed = 5
    with pytest.raises(LcmError, match="seed: 0 there, 5 now"):
        config_lib.prepare_workdir(tmp_path, config)


def test_steps_after_the_decay_of_the_learning_rate_are_warned_of(tmp_path, config, capsys):
    """As of `configs/shapes_lcm.py` whose train.steps alone is raised: its rate is 0 from step 800 on."""
    config.train.lr_decay_start, config.train.lr_decay_steps = 400, 400
    for steps, warned in ((800, False), (801, True), (500, False)):
        config.train.steps = steps
        config_lib.prepare_workdir(tmp_path, config)
        said = f"train.steps = {steps}, but the learning rate is 0 after step 800"
        assert (said in capsys.readouterr().err) is warned
    rate = learning_rate_schedule(1.0, decay_start=400, decay_steps=400)
    assert rate(799) > 0 == rate(800), "the rates of steps 800 and 801"


def test_sample_grids_of_guidance_that_is_not_trained_are_warned_of(tmp_path, config, capsys):
    config.distill.w_min, config.distill.w_max, config.sample.prompts = 0.5, 7.0, ("a star",)
    for scale, warned in ((1.5, False), (8.0, False), (8.5, True), (1.0, True)):
        config.sample.guidance_scale = scale
        config_lib.prepare_workdir(tmp_path, config)
        assert ("but this run trains 1.5 to 8 (distill.w_min" in capsys.readouterr().err) is warned


@pytest.mark.parametrize(
    ("decay", "steps", "warned"), [(0.999943, 1000, True), (0.999943, 30_000, False), (0.0, 1, False)]
)
def test_an_ema_that_hardly_moves_is_warned_of(tmp_path, config, capsys, decay, steps, warned):
    """As of `configs/pokemon_lcf.py` in a thirtieth of its steps."""
    config.train.ema_decay, config.train.steps = decay, steps
    config_lib.prepare_workdir(tmp_path, config)
    assert ("has 94% of the initial weights; lower it" in capsys.readouterr().err) is warned
    if warned:
        ema = np.ones(1)
        for _ in range(steps):
            ema = update_ema(ema, np.zeros(1), decay)
        assert ema == pytest.approx(0.94, abs=0.005)


@pytest.mark.parametrize(("steps", "last"), [(50, None), (30, None), (130, None), (150, 899), (600, 599)])
def test_a_grid_that_ends_long_before_pure_noise_is_warned_of(tmp_path, config, capsys, steps, last):
    config.distill.solver_steps = steps
    config_lib.prepare_workdir(tmp_path, config)
    said = f"solver_steps = {steps}: the solver's grid ends at timestep {last} of 999"
    assert (said in capsys.readouterr().err) is (last is not None)
    grid = solver_grid(from_betas(make_betas("scaled_linear", 1000, 0.00085, 0.012)), steps)
    assert last in (None, grid.timesteps[-1])


@pytest.mark.parametrize(
    ("changes", "then", "said"),
    [
        ({"lora.alpha": 8.0, "lora.targets": ("to_q",)}, {"lora.rank": 4}, "lora.alpha = 8.0, config.lora.targets = "),
        ({"train.lr_decay_start": 50}, {"train.lr_decay_steps": 100_000}, "config.train.lr_decay_start = 50: without"),
        ({"distill.huber_c": 0.1, "distill.loss": "l2"}, {"distill.loss": "huber"}, "config.distill.huber_c = 0.1: "),
        ({"data.bucket_step": 32}, {"data.aspect_buckets": True}, "config.data.bucket_step = 32: without effect, "),
        ({"data.workers": 2, "data.encode": "start"}, {"data.encode": "step"}, "config.data.workers = 2: without "),
        (
            {"distill.w_max": 9.0, "objective": "lcf", "model.student": "/lcm", "distill.w_embedding_dim": 0},
            {"distill.lcd_weight": 0.5},
            "config.distill.w_max = 9.0: without effect, because no teacher is guided",
        ),
    ],
)
def test_keys_without_effect_are_warned_of(tmp_path, config, capsys, changes, then, said):
    for more, warned in ((changes, True), (then, False)):
        config.update_from_flattened_dict(more)
        config_lib.prepare_workdir(tmp_path, config)
        found = capsys.readouterr().err
        assert (said in found) is warned and found.count("without effect") == warned


def test_same_as_before_compares_digests_and_not_places(tmp_path, capsys):
    def check(**found):
        workdir.same_as_before(tmp_path, "models.json", found)
        return json.loads((tmp_path / "models.json").read_text())

    check(unet=workdir.digest_entry("99", "teacher /x"))
    check(unet=workdir.digest_entry("12", "teacher /a"))  # the run had not begun
    (tmp_path / "metrics.jsonl").write_text("{}\n")
    moved = workdir.digest_entry("12", "teacher /b")
    assert check(unet=moved) == {"unet": moved} and capsys.readouterr().err == ""
    with pytest.raises(LcmError) as refused:
        check(unet=workdir.digest_entry("34", "teacher /c"))
    assert str(refused.value) == (
        f"{tmp_path}/models.json: unet was teacher /b (digest 12) when this run began, and is teacher /c (digest 34) "
        f"now; restore what it began with, choose another workdir, or delete {tmp_path}/models.json to continue anyway"
    )
    assert check(unet=moved, records=[[4]]) == {"unet": moved, "records": [[4]]}
    assert "does not record with which records this run began" in capsys.readouterr().err
    for content in (b"[1]", b"{", b"\xff", b"[" * 100_000, b'{"unet": 5}', b'{"unet": {"digest": [1]}}'):
        (tmp_path / "models.json").write_bytes(content)
        with pytest.raises(LcmError, match="models.json"):
            check(unet=moved)


def test_folders_that_are_not_a_workdir(tmp_path, config):
    (tmp_path / "file").write_text("")
    with pytest.raises(LcmError, match="is a file"), locked(tmp_path / "file"):
        pass
    (tmp_path / "metrics.jsonl").write_text("{}\n")
    with pytest.raises(LcmError, match="holds a run but no config.json"):
        config_lib.prepare_workdir(tmp_path, config)
    with pytest.raises(LcmError, match="does not exist"):
        read_config(tmp_path / "nowhere")


def test_locked_refuses_another_run_until_it_ends(tmp_path):
    with locked(tmp_path):
        with pytest.raises(LcmError, match="in use by another process"), locked(tmp_path):
            pass
    with locked(tmp_path):
        pass


def test_locked_holds_until_the_last_process_of_a_run_has_ended(tmp_path):
    """The first process was killed, one of the others is still there."""
    with filelock.FileLock(tmp_path / ".lock-1"):
        with pytest.raises(LcmError, match="in use by another process"), locked(tmp_path):
            pass
    with locked(tmp_path):
        assert os.listdir(tmp_path) == [".lock"], "unused locks are removed"


@pytest.fixture
def no_locks(monkeypatch):
    def flock(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", flock)


def owned_by(folder, host, pid):
    """Writes the owner file of a run on another machine."""
    record = ["filelock/2", f"pid={pid}", f"host={host}", "mode=lease", "token=a", f"duration={workdir.STALE:.1f}"]
    (folder / ".owner").write_text("\n".join(record) + "\n")


def test_locked_without_locks_keeps_an_owner_file(tmp_path, no_locks, capsys):
    with locked(tmp_path):
        assert "has no locks (No locks available)" in capsys.readouterr().err
        with pytest.raises(LcmError) as refused, locked(tmp_path):
            pass
    who = f"pid {os.getpid()} on {socket.gethostname()}"
    for words in (f"{tmp_path} is in use by another run ({who}; ", f"delete {tmp_path}/.owner"):
        assert words in str(refused.value)
    assert "\n" not in str(refused.value)
    with locked(tmp_path):
        pass
    assert os.listdir(tmp_path) == [".lock"]


def test_locked_without_locks_replaces_the_owner_file_of_a_dead_run(tmp_path, no_locks, monkeypatch):
    owned_by(tmp_path, "node7", 5)
    with pytest.raises(LcmError, match="pid 5 on node7; last sign of life 0 s ago"), locked(tmp_path):
        pass
    long_ago = time.time() - workdir.STALE - 1
    os.utime(tmp_path / ".owner", (long_ago, long_ago))
    with filelock.SoftFileLock(tmp_path / ".owner.taken"):  # by another run, at this moment
        with pytest.raises(LcmError, match="node7.* just now, see .*owner.taken"), locked(tmp_path):
            pass
    monkeypatch.setattr(workdir, "REFRESH", 0.01)
    with locked(tmp_path):
        assert f"pid={os.getpid()}" in (tmp_path / ".owner").read_text()
        os.utime(tmp_path / ".owner", (long_ago, long_ago))
        while (tmp_path / ".owner").stat().st_mtime == long_ago:
            time.sleep(0.01)
    assert os.listdir(tmp_path) == [".lock"]


def test_locked_without_locks_replaces_the_owner_file_of_a_killed_process(tmp_path, no_locks):
    """At once, as it was on this machine."""
    killed = python(
        "import os, sys\nfrom pathlib import Path\nfrom lcm_jax.runtime import workdir\n"
        "owned = workdir._owned(Path(sys.argv[1]))\nowned.__enter__()\nos._exit(9)",
        tmp_path / ".owner",
    )
    assert killed.returncode == 9 and (tmp_path / ".owner").exists(), killed.stderr
    with locked(tmp_path):
        assert f"pid={os.getpid()}" in (tmp_path / ".owner").read_text()


def test_a_run_whose_owner_file_was_replaced_ends(tmp_path, no_locks, monkeypatch, capfd):
    monkeypatch.setattr(workdir, "REFRESH", 0.01)
    ended = threading.Event()
    monkeypatch.setattr(os, "_exit", lambda code: ended.set())
    with locked(tmp_path):
        (tmp_path / ".owner").unlink()
        owned_by(tmp_path, "node7", 5)
        assert ended.wait(60)
    assert "no longer belongs to this run (owner-changed)" in capfd.readouterr().err and (tmp_path / ".owner").exists()


def test_stop_signal_sets_the_flag_once_and_restores_the_handlers():
    before = signal.getsignal(signal.SIGTERM)
    with StopSignal() as stop:
        assert not stop and not stop.agreed()
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop and stop.agreed() and stop.name == "SIGTERM"
        assert signal.getsignal(signal.SIGTERM) is before, "a second one must have its usual effect"
    assert signal.getsignal(signal.SIGTERM) is before


def test_stop_signal_outside_of_the_main_thread_leaves_signals_alone():
    """As of a training that a server or a notebook runs in a thread: Python refuses handlers there."""

    def work() -> bool:
        with StopSignal() as stop:
            return stop.agreed()

    before = signal.getsignal(signal.SIGTERM)
    with futures.ThreadPoolExecutor(1) as pool:
        assert pool.submit(work).result() is False and signal.getsignal(signal.SIGTERM) is before


def test_further_signals_to_one_of_several_processes_have_no_effect(monkeypatch):
    """A terminal sends SIGINT to each process and a launcher passes it on: the second must not keep it from saving.

    SIGTERM is jax's then, which tells the others.
    """
    sent = []
    monkeypatch.setattr(jax.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(os, "kill", lambda pid, number: sent.append((pid, number)))
    before = signal.getsignal(signal.SIGINT)
    with StopSignal() as stop:
        for _ in range(3):
            signal.raise_signal(signal.SIGINT)
    assert sent == [(os.getpid(), signal.SIGTERM)] * 3 and stop.name == "SIGINT"
    assert signal.getsignal(signal.SIGINT) is before


def test_a_second_signal_ends_the_process():
    done = python(
        "import os, signal, time\nfrom lcm_jax.runtime.workdir import StopSignal\n"
        "with StopSignal() as stop:\n"
        "    os.kill(os.getpid(), signal.SIGTERM); print('once', bool(stop), flush=True)\n"
        "    os.kill(os.getpid(), signal.SIGTERM); time.sleep(5); print('alive')\n"
    )
    assert done.stdout == "once True\n" and done.returncode == -signal.SIGTERM


def python(code, *arguments):
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=environment)
