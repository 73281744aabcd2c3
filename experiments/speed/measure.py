"""The measurement of one workload: `lcm_jax` and a way of torch by turns, pair by pair.

    turn 1: jax, torch    turn 2: torch, jax    turn 3: jax, torch ...        a turn: runs for TURN_SECONDS

A pair's ratio is torch's time over ours in one turn. Both processes are alive meanwhile, one of them idle; workloads
that fill a card alone have all of a side's turns at once instead, and say so.
"""

import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

from experiments.speed.worker import Worker
from experiments.speed.workloads import Workload

JAX = "lcm_jax"
TURNS = 7
TURN_SECONDS = 1.0
MOST_RUNS = 50

Say = Callable[[str], None]
Start = Callable[[str], Worker]


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


def measure(found: dict[str, Any], workload: Workload, start: Start, keep: Callable[[], None], say: Say) -> None:
    """Fills `found`, the record of a workload, with what is missing; `keep` is called whenever there is more.

    Args:
      found: {"versions": {...}, "code": ..., "jax": {...}, "ways": of torch, "torch": {way: {...}}}; see `pair`. Has
        "versions" of the packages and "code", the hash of our own, alone at first; our side and each way keep those
        with which they were measured.
      start: side -> its worker.

    Raises:
      OutOfTime: as the workers do; what is in `found` then stands.
    """
    found.setdefault("torch", {})
    (_alone if workload.alone else _together)(found, start, keep, say)


def _together(found: dict[str, Any], start: Start, keep: Callable[[], None], say: Say) -> None:
    with start("jax") as jax:
        warm = _warm(jax, JAX, say)
        _note(found, jax, warm)
        keep()
        if "error" in warm:
            return
        with start("torch") as torch:
            if "error" in torch.ready:
                found["error"] = f"torch: {torch.ready['error']}"
                return keep()
            found["ways"] = torch.ready["ways"]
            for way in found["ways"]:
                if way not in found["torch"]:
                    found["torch"][way] = pair(jax, found["jax"], torch, way, say) | _stamp(found)
                    keep()


def _alone(found: dict[str, Any], start: Start, keep: Callable[[], None], say: Say) -> None:
    if "seconds" not in found.get("jax", {}):
        with start("jax") as jax:
            warm = _warm(jax, JAX, say)
            _note(found, jax, warm)
            if "error" not in warm:
                found["jax"] |= _turns(jax, JAX, warm)
            keep()
    if "seconds" not in found.get("jax", {}):
        return
    with start("torch") as torch:
        if "error" in torch.ready:
            found["error"] = f"torch: {torch.ready['error']}"
            return keep()
        found["ways"] = torch.ready["ways"]
        for way in found["ways"]:
            if way in found["torch"]:
                continue
            warm = _warm(torch, way, say)
            if "error" not in warm:
                warm |= _turns(torch, way, warm)
            if "error" not in warm:
                warm |= _ratios(found["jax"]["seconds"], warm["seconds"])
            found["torch"][way] = warm | _stamp(found)
            keep()


def pair(jax: Worker, ours: dict[str, Any], torch: Worker, way: str, say: Say) -> dict[str, Any]:
    """{"seconds", "jax_seconds", "ratios" of each turn, "ratio", "setup_s", "peak_bytes"} or {"error"}."""
    warm = _warm(torch, way, say)
    if "error" in warm:
        return warm
    sides = ((jax, JAX, ours["runs"]), (torch, way, warm["runs"]))
    seconds: dict[str, list[float]] = {JAX: [], way: []}
    for turn in range(TURNS):
        for worker, name, runs in sides[:: 1 if turn % 2 == 0 else -1]:
            answer = worker.time(name, runs)
            if "error" in answer:
                return {"error": f"{name}: {answer['error']}"}
            seconds[name].append(answer["seconds"] / runs)
            (ours if name == JAX else warm)["peak_bytes"] = answer["peak_bytes"]
    found = warm | {"seconds": seconds[way]} | _ratios(seconds[JAX], seconds[way])
    say(f"  {way}: {found['ratio']:.2f} x our time")
    return found


def _ratios(ours: list[float], theirs: list[float]) -> dict[str, Any]:
    """{"jax_seconds", "ratios" of each turn, "ratio", their median}."""
    ratios = [b / a for a, b in zip(ours, theirs, strict=True)]
    return {"jax_seconds": ours, "ratios": ratios, "ratio": statistics.median(ratios)}


def _turns(worker: Worker, way: str, warm: dict[str, Any]) -> dict[str, Any]:
    """{"seconds", "peak_bytes"} of one side's turns by themselves, or {"error"}."""
    seconds, peak = [], 0
    for _ in range(TURNS):
        answer = worker.time(way, warm["runs"])
        if "error" in answer:
            return answer
        seconds.append(answer["seconds"] / warm["runs"])
        peak = answer["peak_bytes"]
    return {"seconds": seconds, "peak_bytes": peak}


def _warm(worker: Worker, way: str, say: Say) -> dict[str, Any]:
    """{"setup_s" of the first run, which compiles, "runs" of a turn, "peak_bytes"} or {"error"}."""
    if "error" in worker.ready:
        return worker.ready
    answers = [worker.time(way, 1) for _ in range(3)]  # the second may still try kernels, or record graphs
    failed = next((answer for answer in answers if "error" in answer), None)
    if failed:
        say(f"  {way}: {failed['error']}")
        return failed
    first, _, last = (answer["seconds"] for answer in answers)
    runs = max(1, min(MOST_RUNS, round(TURN_SECONDS / last)))
    say(f"  {way}: {1e3 * last:.1f} ms, the first run {first:.1f} s")
    return {"setup_s": first, "runs": runs, "peak_bytes": answers[-1]["peak_bytes"]}


def _stamp(found: dict[str, Any]) -> dict[str, Any]:
    return {"versions": found["versions"], "code": found["code"]}


def _note(found: dict[str, Any], jax: Worker, warm: dict[str, Any]) -> None:
    """Our side's warm-up into the record; a failure takes no place of what an earlier command has measured."""
    if "error" in warm and any("ratio" in one for one in found["torch"].values()):
        return
    found["jax"] = found.get("jax", {}) | warm | _stamp(found)
    if "error" not in jax.ready:
        found["flops"] = jax.ready["flops"]
        found["jax"]["prepare_s"] = jax.ready["prepare_s"]


def profile(worker: Worker, folder: Path) -> dict[str, Any]:
    """What our side's process says of where the time goes; its traces are in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    return worker.ready if "error" in worker.ready else worker.ask({"do": "profile", "folder": str(folder)})
