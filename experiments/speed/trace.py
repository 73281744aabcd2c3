"""Where the time of some runs went, by kernel, from a trace of JAX's profiler, which TensorBoard can show, too."""

import collections
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

MOST = 40  # kernels that are listed


def best_of(repeats: int, function: Callable[[], Any]) -> float:
    """Seconds of the quickest of some calls, after one that is not counted."""
    jax.block_until_ready(function())
    seconds = []
    for _ in range(repeats):
        begun = time.perf_counter()
        jax.block_until_ready(function())
        seconds.append(time.perf_counter() - begun)
    return min(seconds)


def kernels(folder: str, function: Callable[[], Any], repeats: int) -> dict[str, Any]:
    """{"kernels": [{"name", "calls", "seconds", "share"}]} of one run of `function`, the most expensive first.

    A GPU's kernels are those of its streams; on a CPU they are the operations of XLA's threads, whose times are summed
    over threads. Shares are of the sum of all.
    """
    jax.block_until_ready(function())
    with jax.profiler.trace(folder):
        for _ in range(repeats):
            last = function()
        jax.block_until_ready(last)
    path = max(Path(folder).rglob("*.xplane.pb"), key=lambda path: path.stat().st_mtime)
    return {"kernels": summed(events(jax.profiler.ProfileData.from_file(str(path))), repeats)}


def events(data: Any) -> list[tuple[str, float]]:
    """(name, seconds) of every kernel in a `ProfileData`."""
    found = []
    for plane in data.planes:
        for line in plane.lines:
            if plane.name.startswith("/device:"):
                chosen = line.events if "Stream" in line.name else ()
            elif plane.name == "/host:CPU":
                chosen = (event for event in line.events if any(name == "hlo_op" for name, _ in event.stats))
            else:
                chosen = ()
            found += [(event.name, event.duration_ns * 1e-9) for event in chosen]
    return found


def summed(found: list[tuple[str, float]], repeats: int) -> list[dict[str, Any]]:
    """The kernels by name, per run."""
    seconds, calls = collections.Counter(), collections.Counter()
    for name, one in found:
        seconds[name] += one / repeats
        calls[name] += 1
    total = sum(seconds.values())
    return [
        {"name": name, "calls": calls[name] / repeats, "seconds": value, "share": value / total}
        for name, value in seconds.most_common(MOST)
    ]
