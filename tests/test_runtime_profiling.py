"""Traces of some steps: which steps, and which ranges are refused."""

import jax
import jax.numpy as jnp
import pytest

from lcm_jax.errors import LcmError
from lcm_jax.runtime import profiling


def test_parse_and_check():
    assert profiling.parse_steps("100:110") == (100, 110)
    for spec in ("5", "0:3", "7:6", "a:b", "-1:3", "1:2:3", ":4", "4:"):
        with pytest.raises(LcmError, match=f"--profile={spec} is not a range of steps; write FIRST:LAST"):
            profiling.parse_steps(spec)
    with pytest.raises(LcmError, match="--profile=100:110: this run ends at step 109"):
        profiling.check("100:110", 109)
    profiling.check("100:110", 110)
    profiling.check("", 10)


@pytest.fixture
def calls(monkeypatch):
    """The calls of jax's profiler, and of waiting for a state."""
    calls = []
    monkeypatch.setattr(jax.profiler, "start_trace", calls.append)
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: calls.append("stop"))
    monkeypatch.setattr(profiling.jax, "block_until_ready", lambda state: calls.append(f"wait for {state}"))
    return calls


@pytest.mark.parametrize("done", [100, 105, 500])
def test_a_run_that_resumes_after_the_first_step_does_not_trace(tmp_path, calls, capsys, done):
    with profiling.Profile(tmp_path, "100:110", done) as profile:
        for step in range(done, done + 20):
            profile.at(step, None)
    assert f"--profile=100:110: no trace, because {done} steps are already done" in capsys.readouterr().err
    profiling.Profile(tmp_path, "100:110", 99)
    assert capsys.readouterr().err == "" and not calls


@pytest.mark.parametrize(("spec", "traced"), [("3:4", [3, 4]), ("1:1", [1]), ("6:6", [6]), ("", [])])
def test_the_trace_holds_these_steps_whole(tmp_path, calls, spec, traced):
    with profiling.Profile(tmp_path, spec, 0) as profile:
        profile.at(0, "state 0")
        for step in range(1, 7):
            calls.append(step)
            profile.at(step, f"state {step}")
    folder = str(tmp_path / "profile")
    want = [*range(1, 7)]
    if traced:
        first, last = traced[0], traced[-1]
        before, after = [f"wait for state {first - 1}", folder], [f"wait for state {last}", "stop"]
        want = [*range(1, first), *before, *traced, *after, *range(last + 1, 7)]
    assert calls == want


def test_a_run_that_fails_ends_the_trace(tmp_path, calls):
    with pytest.raises(KeyError), profiling.Profile(tmp_path, "2:5", 0) as profile:
        for step in range(4):
            profile.at(step, None)
        raise KeyError
    assert calls == ["wait for None", str(tmp_path / "profile"), "stop"]


def test_a_trace_is_written(tmp_path):
    step = jax.jit(lambda x: jnp.sin(x) @ x)
    x = jnp.ones((64, 64))
    with profiling.Profile(tmp_path, "2:3", 0) as profile:
        profile.at(0, x)
        for n in range(1, 5):
            x = step(x)
            profile.at(n, x)
    assert [path for path in (tmp_path / "profile").rglob("*") if path.is_file() and path.stat().st_size > 100]
