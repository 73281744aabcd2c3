"""Traces of some steps: which ones, and what is refused."""

import jax
import jax.numpy as jnp
import pytest

from lcm_jax.errors import LcmError
from lcm_jax.runtime import profiling


@pytest.mark.parametrize("spec", ["5", "0:3", "7:6", "a:b", "-1:3", "1:2:3", ":4", "4:"])
def test_no_range_of_steps(spec):
    with pytest.raises(LcmError, match=f"--profile={spec} is no range"):
        profiling.parse_steps(spec)


def test_a_range_the_run_does_not_come_by():
    assert profiling.parse_steps("100:110") == (100, 110)
    with pytest.raises(LcmError, match="--profile=100:110: this run ends at step 109"):
        profiling.check("100:110", 109)
    profiling.check("100:110", 110)
    profiling.check("", 10)


@pytest.mark.parametrize("done", [100, 105, 500])
def test_a_run_that_goes_on_beyond_them_says_so_and_trains(tmp_path, monkeypatch, capsys, done):
    monkeypatch.setattr(jax.profiler, "start_trace", lambda folder: pytest.fail("traced"))
    with profiling.Profile(tmp_path, "100:110", done) as profile:
        for step in range(done, done + 20):
            profile.at(step, None)
    assert f"--profile=100:110: {done} steps are done already; no trace" in capsys.readouterr().err
    profiling.Profile(tmp_path, "100:110", 99)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(("spec", "traced"), [("3:4", [3, 4]), ("1:1", [1]), ("6:6", [6]), ("", [])])
def test_which_steps_are_traced(tmp_path, monkeypatch, spec, traced):
    calls = []
    monkeypatch.setattr(jax.profiler, "start_trace", lambda folder: calls.append(folder))
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: calls.append("stop"))
    monkeypatch.setattr(profiling.jax, "block_until_ready", lambda state: calls.append(f"wait for {state}"))
    with profiling.Profile(tmp_path, spec, 0) as profile:
        profile.at(0, "state 0")
        for step in range(1, 7):
            calls.append(step)
            profile.at(step, f"state {step}")
    folder = str(tmp_path / "profile")
    if traced:
        begin, end = calls.index(folder), calls.index("stop")
        assert [call for call in calls[begin:end] if isinstance(call, int)] == traced
        assert calls[begin - 1] == f"wait for state {traced[0] - 1}"
        assert calls[end - 1] == f"wait for state {traced[-1]}"
        calls = [call for call in calls if isinstance(call, int)]
    assert calls == [*range(1, 7)]


def test_a_run_that_stops_early_ends_the_trace(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(jax.profiler, "start_trace", lambda folder: calls.append("start"))
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: calls.append("stop"))
    with pytest.raises(KeyError), profiling.Profile(tmp_path, "2:5", 0) as profile:
        for step in range(4):
            profile.at(step, None)
        raise KeyError
    assert calls == ["start", "stop"]


def test_a_trace_is_written(tmp_path):
    step = jax.jit(lambda x: jnp.sin(x) @ x)
    x = jnp.ones((64, 64))
    with profiling.Profile(tmp_path, "2:3", 0) as profile:
        profile.at(0, x)
        for n in range(1, 5):
            x = step(x)
            profile.at(n, x)
    assert [path for path in (tmp_path / "profile").rglob("*") if path.is_file() and path.stat().st_size > 100]
