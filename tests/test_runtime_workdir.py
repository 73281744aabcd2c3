"""The workdir: config guard, lock, atomic files, stopping by signal."""

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
from pathlib import Path

import pytest

from lcm_jax import files
from lcm_jax.errors import LcmError
from lcm_jax.run import config as config_lib
from lcm_jax.runtime import workdir as owner
from lcm_jax.runtime import workdir as workdir_lib


@pytest.fixture
def config():
    config = config_lib.default_config()
    config.model.teacher = "a/teacher"
    return config


def test_first_time_writes_config_then_the_same_goes_on(tmp_path, config):
    with workdir_lib.locked(tmp_path / "new" / "run") as folder:
        config_lib.prepare_workdir(folder, config)
    (folder / ".lock").unlink()
    before = (folder / "config.json").read_bytes()
    assert json.loads(before)["model"]["teacher"] == "a/teacher"
    config_lib.prepare_workdir(folder, config)
    assert (folder / "config.json").read_bytes() == before
    assert os.listdir(folder) == ["config.json"], "no temporary files stay"


def test_other_config_is_refused_with_both_values(tmp_path, config):
    config_lib.prepare_workdir(tmp_path, config)
    (tmp_path / "metrics.jsonl").write_text("{}\n")
    before = (tmp_path / "config.json").read_bytes()
    config.train.learning_rate, config.distill.loss = 0.5, "l2"
    with pytest.raises(LcmError) as info:
        config_lib.prepare_workdir(tmp_path, config)
    text = str(info.value)
    assert all(word in text for word in ("train.learning_rate", "8e-06", "0.5", "'huber'", "'l2'"))
    assert (tmp_path / "config.json").read_bytes() == before


def test_workdir_without_a_run_takes_another_config(tmp_path, config):
    """A first command that failed before training (a mistyped teacher, say) must not bar the corrected one."""
    config_lib.prepare_workdir(tmp_path, config)
    config.train.learning_rate = 0.5
    config_lib.prepare_workdir(tmp_path, config)
    assert workdir_lib.read_config(tmp_path)["train"]["learning_rate"] == 0.5


def test_steps_and_intervals_may_differ_and_are_recorded(tmp_path, config):
    config_lib.prepare_workdir(tmp_path, config)
    config.train.steps, config.sample.every = 12, 3
    config_lib.prepare_workdir(tmp_path, config)
    saved = workdir_lib.read_config(tmp_path)
    assert (saved["train"]["steps"], saved["sample"]["every"]) == (12, 3)


@pytest.mark.parametrize("content", ["{half", "[1]", b"\xff\xfe"])
def test_broken_config_json(tmp_path, config, content):
    (tmp_path / "metrics.jsonl").write_text("{}\n")
    (tmp_path / "config.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(LcmError, match="config.json"):
        config_lib.prepare_workdir(tmp_path, config)


def test_places_that_are_no_workdir(tmp_path, config):
    (tmp_path / "file").write_text("")
    with pytest.raises(LcmError, match="is a file"):
        with workdir_lib.locked(tmp_path / "file"):
            pass
    (tmp_path / "metrics.jsonl").write_text("{}\n")
    with pytest.raises(LcmError, match="holds a run but no config.json"):
        config_lib.prepare_workdir(tmp_path, config)
    with pytest.raises(LcmError, match="does not exist"):
        workdir_lib.read_config(tmp_path / "nowhere")


def test_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    files.write_atomic(path, "old")

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(workdir_lib.os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        files.write_atomic(path, "new")
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["a.json"]


def test_lock_is_exclusive_and_freed(tmp_path):
    with workdir_lib.locked(tmp_path):
        with pytest.raises(LcmError, match="in use by another process"):
            with workdir_lib.locked(tmp_path):
                pass
    with workdir_lib.locked(tmp_path):
        pass


def test_lock_holds_until_the_last_process_of_a_run_has_ended(tmp_path):
    with open(tmp_path / ".lock", "w+") as file:
        fcntl.flock(file, fcntl.LOCK_SH)  # as the others of several processes hold it
        with pytest.raises(LcmError, match="in use by another process"):
            with workdir_lib.locked(tmp_path):
                pass


@pytest.fixture
def no_locks(monkeypatch):
    def flock(*_):
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(workdir_lib.fcntl, "flock", flock)


def test_an_owner_file_where_the_file_system_has_no_locks(tmp_path, no_locks, capsys):
    with workdir_lib.locked(tmp_path):
        assert "has no locks (Function not implemented)" in capsys.readouterr().err
        with pytest.raises(LcmError) as refused:
            with workdir_lib.locked(tmp_path):
                pass
        for words in (f"{tmp_path} is in use", socket.gethostname(), f"pid {os.getpid()}", f"delete {tmp_path}/.owner"):
            assert words in str(refused.value)
    with workdir_lib.locked(tmp_path):
        pass
    assert os.listdir(tmp_path) == [".lock"]


def test_the_owner_file_of_a_run_that_was_killed(tmp_path, no_locks, monkeypatch):
    (tmp_path / ".owner").write_text('{"host": "node7", "pid": 5, "token": "a"}')
    with pytest.raises(LcmError, match="host node7, pid 5"), workdir_lib.locked(tmp_path):
        pass
    long_ago = time.time() - owner.STALE - 1
    os.utime(tmp_path / ".owner", (long_ago, long_ago))
    (tmp_path / ".owner.taken").touch()  # by another run, at this moment
    with pytest.raises(LcmError, match="node7.*owner.taken"), workdir_lib.locked(tmp_path):
        pass
    (tmp_path / ".owner.taken").unlink()
    monkeypatch.setattr(owner, "REFRESH", 0.01)
    with workdir_lib.locked(tmp_path):
        assert json.loads((tmp_path / ".owner").read_text())["pid"] == os.getpid()
        os.utime(tmp_path / ".owner", (long_ago, long_ago))
        while (tmp_path / ".owner").stat().st_mtime == long_ago:
            time.sleep(0.01)
    assert os.listdir(tmp_path) == [".lock"]


def test_a_run_whose_place_was_taken_ends(tmp_path, no_locks, monkeypatch, capfd):
    monkeypatch.setattr(owner, "REFRESH", 0.01)
    ended = threading.Event()
    monkeypatch.setattr(owner.os, "_exit", lambda code: ended.set())
    with workdir_lib.locked(tmp_path):
        (tmp_path / ".owner").write_text('{"host": "node7", "pid": 5, "token": "a"}')
        assert ended.wait(60)
    assert "belongs to another run now" in capfd.readouterr().err and (tmp_path / ".owner").exists()


def test_signal_sets_the_flag_once_and_handlers_come_back():
    before = signal.getsignal(signal.SIGTERM)
    with workdir_lib.StopSignal() as stop:
        assert not stop and not stop.agreed()
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop and stop.agreed() and stop.name == "SIGTERM"
        assert signal.getsignal(signal.SIGTERM) is before, "a second one must work as usual"
    assert signal.getsignal(signal.SIGTERM) is before


def test_second_signal_ends_the_process():
    code = (
        "import os, signal, time\nfrom lcm_jax.runtime.workdir import StopSignal\n"
        "with StopSignal() as stop:\n"
        "    os.kill(os.getpid(), signal.SIGTERM); print('once', bool(stop), flush=True)\n"
        "    os.kill(os.getpid(), signal.SIGTERM); time.sleep(5); print('alive')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
    )
    assert done.stdout == "once True\n" and done.returncode == -signal.SIGTERM
