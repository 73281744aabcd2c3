"""The measurement of one workload: `lcm_jax` and each way of torch, interleaved.

    turn 1: jax, torch    turn 2: torch, jax    turn 3: jax, torch ...        a turn: runs for TURN_SECONDS

A pair's ratio is torch's time over ours in one turn. Both processes are alive meanwhile, one of them idle. If a
workload needs the whole card (`alone`), all turns of our side come first, then those of torch.
"""

import contextlib
import statistics
from collections.abc import Callable
from typing import Any

from experiments.speed.worker import Failed, Worker
from experiments.speed.workloads import Workload

JAX = "lcm_jax"
TURNS = 7
TURN_SECONDS = 1.0
MOST_RUNS = 50

Say = Callable[[str], None]


def complete(found: dict[str, Any]) -> bool:
    """Whether nothing of a workload is left to measure."""
    if "error" in found.get("jax", {}) or "error" in found:
        return True
    return "ways" in found and set(found["ways"]) <= set(found["torch"])


def current(found: dict[str, Any], versions: dict[str, str]) -> dict[str, Any]:
    """A record without what was measured, or failed, with other versions of the packages."""
    kept = {name: value for name, value in found.items() if name != "error" or found["versions"] == versions}
    if "jax" in kept and kept["jax"].get("versions") != versions:
        del kept["jax"]
    ways = found.get("torch", {}).items()
    return kept | {"torch": {way: one for way, one in ways if one.get("versions") == versions}}


def measure(
    found: dict[str, Any], workload: Workload, start: Callable[[str], Worker], keep: Callable[[], None], say: Say
) -> None:
    """Fills `found`, the record of a workload, with what is missing; `keep` is called whenever there is more.

    Args:
      found: {"versions", "code", "jax": {...}, "ways": of torch, "torch": {way: {...}}}. Initially only "versions" of
        the packages and "code", the hash of our own; our side and each way keep those with which they were measured.
      start: side -> its worker.

    Raises:
      OutOfTime: as the workers do; what is in `found` then stands.
    """
    stamp = {"versions": found["versions"], "code": found["code"]}
    found.setdefault("torch", {})
    with contextlib.ExitStack() as stack:
        if not (workload.alone and "seconds" in found.get("jax", {})):  # else: measured by an earlier command
            try:
                jax = stack.enter_context(start("jax"))
                ours = (alone(jax, say) if workload.alone else _warm_up(jax, JAX, say)) | stamp
                ours["prepare_s"] = jax.ready["prepare_s"]
            except Failed as error:
                if not any("ratio" in one for one in found["torch"].values()):  # it does not replace measurements
                    found["jax"] = {"error": str(error)} | stamp
                return keep()
            found["jax"] = found.get("jax", {}) | ours
            found["flops"] = jax.ready["flops"]
            keep()
        if workload.alone:
            stack.close()
        try:
            torch = stack.enter_context(start("torch"))
        except Failed as error:  # as where it is not installed; then our side has its numbers nevertheless
            found["error"] = f"torch: {error}"
            if not workload.alone:
                with contextlib.suppress(Failed):
                    found["jax"]["seconds"] = [_turn(jax, JAX, found["jax"]) for _ in range(TURNS)]
            return keep()
        found["ways"] = torch.ready["ways"]
        for way in found["ways"]:
            if way in found["torch"]:
                continue
            try:
                theirs = _warm_up(torch, way, say)
                if workload.alone:
                    theirs |= _compared(found["jax"]["seconds"], [_turn(torch, way, theirs) for _ in range(TURNS)])
                else:
                    theirs |= _interleaved(jax, found["jax"], torch, way, theirs)
                say(f"  {way}: {theirs['ratio']:.2f} x our time")
            except Failed as error:  # out of memory, a compiler that gives up: the other ways may still work
                say(f"  {way}: {error}")
                theirs = {"error": str(error)}
            found["torch"][way] = theirs | stamp
            keep()


def alone(jax: Worker, say: Say) -> dict[str, Any]:
    """What our side needs without another beside it: as `_warm_up`, and "seconds" of a run in each turn."""
    ours = _warm_up(jax, JAX, say)
    return ours | {"seconds": [_turn(jax, JAX, ours) for _ in range(TURNS)]}


def _interleaved(jax: Worker, ours: dict[str, Any], torch: Worker, way: str, theirs: dict[str, Any]) -> dict[str, Any]:
    sides = ((jax, JAX, ours), (torch, way, theirs))
    seconds: dict[str, list[float]] = {JAX: [], way: []}
    for turn in range(TURNS):
        for worker, name, record in sides[:: 1 if turn % 2 == 0 else -1]:
            seconds[name].append(_turn(worker, name, record))
    return _compared(seconds[JAX], seconds[way])


def _compared(ours: list[float], theirs: list[float]) -> dict[str, Any]:
    """Both sides' seconds, and the ratio of each turn and their median."""
    ratios = [b / a for a, b in zip(ours, theirs, strict=True)]
    return {"seconds": theirs, "jax_seconds": ours, "ratios": ratios, "ratio": statistics.median(ratios)}


def _warm_up(worker: Worker, way: str, say: Say) -> dict[str, Any]:
    """{"setup_s" of the first run, which compiles, "runs" of a turn, "peak_bytes"}."""
    first, _, last = (worker.time(way, 1) for _ in range(3))  # the second may still try kernels, or record graphs
    say(f"  {way}: {1e3 * last['seconds']:.1f} ms, the first run {first['seconds']:.1f} s")
    runs = max(1, min(MOST_RUNS, round(TURN_SECONDS / last["seconds"])))
    return {"setup_s": first["seconds"], "runs": runs, "peak_bytes": last["peak_bytes"]}


def _turn(worker: Worker, way: str, record: dict[str, Any]) -> float:
    """Seconds per run of one turn; updates the record's "peak_bytes"."""
    try:
        answer = worker.time(way, record["runs"])
    except Failed as error:
        raise Failed(f"{way}: {error}") from None
    record["peak_bytes"] = answer["peak_bytes"]
    return answer["seconds"] / record["runs"]
