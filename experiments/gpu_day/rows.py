"""The rows of the day, what is worth most first: commands, and what is read of their results."""

import json
import re
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from experiments import stage
from experiments.gpu_day.driver import Row
from experiments.speed import report, side, workloads
from experiments.speed.workloads import Workload
from lcm_jax import assets
from lcm_jax.cost import chips
from lcm_jax.cost.chips import GIB

TRAINING = ("lora-sd15-512-b8", "lcd-sd15-512-b8", "lora-sdxl-1024-b4", "lcd-sdxl-1024-b4")
SAMPLING = ("sample-sd15-512-b1", "sample-sdxl-1024-b1", "sample-sd15-512-b4", "sample-sdxl-1024-b4")
CONFIGS, TESTS = Path("configs"), Path("tests")
REHEARSED_STEPS = 20  # of the demo's training

Read = Callable[[Path, str], dict[str, Any]]


def rows(folder: Path, card: str, rehearsal: bool) -> list[Row]:
    """The rows of a day on a card, in the order of their value.

    rehearsal: on this machine's CPU, by the same programs, on narrow models and small images; of the rows that differ
      in sizes alone, and of the configs of one model, there is one.
    """
    listed = workloads.gpu()
    product = [work for work in listed if work.kind == "matmul"]
    training, sampling = (
        [next(work for work in listed if work.name.startswith(f"{name}-")) for name in names]
        for names in (TRAINING, SAMPLING)
    )
    configs = sorted(CONFIGS.glob("*.py"), key=lambda path: (side.of_config(path, False).size, path))
    if rehearsal:
        configs = list({_models(path): path for path in configs}.values())  # one of each model
        product, training, sampling = (
            list(dict.fromkeys(work.narrowed() for work in found)) for found in (product, training, sampling)
        )
    steps = [side.of_config(path, rehearsal) for path in configs]
    flags = (f"--device={'cpu' if rehearsal else 'gpu'}", f"--results={folder}", f"--profiles={folder / 'profiles'}")
    flags += ("--narrow",) * rehearsal

    def beside(work: Workload) -> Row:
        return _row(f"beside-{work.name}", "experiments.speed.run", *flags, f"--only={work.name}", read=_beside(work))

    def alone(work: Workload) -> Row:
        chosen = f"--config={CONFIGS / work.model}.py" if work.kind == "step" else f"--only={work.name}"
        return _row(work.name, "experiments.speed.run", *flags, "--profile", chosen, read=_alone(work, card))

    # Other files may need packages that this machine lacks.
    tests = [str(path) for path in sorted(TESTS.glob("test_*.py")) if re.search(r"mark\.gpu\b", path.read_text())]
    demo = (f"--workdir={folder / 'demo'}", *[f"--steps={REHEARSED_STEPS}"] * rehearsal)
    return [
        _row("tests", "pytest", "-m", "gpu", "-rfE", "--continue-on-collection-errors", *tests, read=_tests),
        _row("demo", "experiments.shapes_lcm.demo", *demo, read=_demo),
        *map(beside, product),
        *map(alone, training),
        *map(beside, sampling),
        *map(alone, steps),
        *map(alone, sampling),
    ]


def _models(config: Path) -> tuple[Any, ...]:
    """Teacher and student, by their architectures."""
    model = stage.read_config(config).model
    return tuple(assets.architecture(str(name)) or name for name in (model.teacher, model.student))


def _row(name: str, module: str, *flags: str, read: Read) -> Row:
    return Row(name, (sys.executable, "-m", module, *flags), read)


def _tests(folder: Path, log: str) -> dict[str, Any]:
    """pytest's last line, the tests that failed, and the files that it could not import."""
    (summary,) = re.findall(r"^=+ (.* in [\d.]+s.*?) =+$", log, re.MULTILINE)[-1:]
    failed = re.findall(r"^(?:FAILED|ERROR) (\S+)", log, re.MULTILINE)
    missing = re.findall(r"^E +(ModuleNotFoundError: .*)$", log, re.MULTILINE)
    error = {"error": f"failed: {', '.join([*failed, *dict.fromkeys(missing)])}"} if failed else {}
    return {"result": summary, "tests": failed} | error


def _demo(folder: Path, log: str) -> dict[str, Any]:
    table = json.loads((folder / "demo" / "table.json").read_text())
    (best,) = [row for row in table["rows"] if row["method"] == "LCM" and row["steps"] == 4][:1]
    return {"result": f"LCM, 4 steps: caption accuracy {best['accuracy']:.1%}, {best['milliseconds']:.1f} ms an image"}


def _beside(work: Workload) -> Read:
    def read(folder: Path, log: str) -> dict[str, Any]:
        (path,) = folder.glob("*.json")
        card = json.loads(path.read_text())
        found = card["workloads"][work.name]
        jax = found["jax"]
        ways = {name: one for name, one in found.get("torch", {}).items() if "ratio" in one}
        texts = [f"{name} {1e3 * statistics.median(one['seconds']):.4g} ms" for name, one in ways.items()]
        ours = [one["jax_seconds"] for one in ways.values()] or [jax.get("seconds", ())]
        texts = [f"lcm_jax {1e3 * statistics.median(ours[0]):.4g} ms", *texts] if ours[0] else texts
        if ways:
            texts.append(f"gain over the best {min(one['ratio'] for one in ways.values()):.2f}")
        sides = [found, jax, *found.get("torch", {}).values()]
        errors = [one["error"] for one in sides if "error" in one]
        return {"result": ", ".join(texts)} | ({"error": "; ".join(errors)} if errors else {})

    return read


def _alone(work: Workload, card: str) -> Read:
    def read(folder: Path, log: str) -> dict[str, Any]:
        found = json.loads((folder / "profiles" / work.name / "summary.json").read_text())
        texts, memory = [], found.get("cost", {}).get("memory", {})
        if "seconds" in found:
            seconds, chip = statistics.median(found["seconds"]), chips.lookup(card)
            texts += [f"{1e3 * seconds:.4g} ms ± {100 * report.spread(found['seconds']):.0f} %"]
            texts += [f"{work.batch / seconds:.3g} images/s", f"peak {found['peak_bytes'] / GIB:.2f} GiB"]
            texts += [f"utilisation {found['flops'] / seconds / chip.peak_flops:.1%}"] if chip else []
        if memory:
            available = f" of {memory['available'] / GIB:.2f}" if "available" in memory else ""
            texts += [f"lcm_jax.aot's model {memory['needed'] / GIB:.2f} GiB{available}"]
        texts += [f"{name} {1e3 * one:.4g} ms" for name, one in found.get("stage_seconds", {}).items()]
        return {"result": ", ".join(texts)} | ({"error": found["error"]} if "error" in found else {})

    return read


def comparison(folder: Path) -> str:
    """The tables of `experiments.speed` of what the day has measured beside torch, as Markdown."""
    cards = [json.loads(path.read_text()) for path in folder.glob("*.json")]
    return "\n".join(report.markdown(card) for card in cards if report.lines(card))
