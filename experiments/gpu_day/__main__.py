"""`make gpu-day`: all that a GPU is needed for, in one command that may be cut and repeated.

    python -m experiments.gpu_day [--budget_s=1500] [--out=runs/gpu_day] [--only=step-sdxl]
    python -m experiments.gpu_day --device=cpu             # rehearsed on this machine, on narrow models

Tests marked gpu; the demo; LCM-LoRA and LCD steps of SD1.5 and SDXL; sampling beside diffusers; a step of every config;
traces. Weights are random, models of the published sizes. See `rows`; each row is a process of its own, see `driver`.
Results are in OUT/CARD: table.md and rows/ for the eye, CARD.json for `experiments.speed.run --report`, logs/ and
profiles/ to look closer. Beside it, OUT/cache keeps what the compilers made, so that another call is quicker.

Exit code 0: every row is there (or does not fit the card); 1: some are missing or failed, and the same command resumes.
"""

import argparse
import os
import subprocess
import sys
from pathlib import Path

from experiments import jobs
from experiments.gpu_day import driver, rows
from experiments.speed import run as speed
from experiments.terminal import teller
from lcm_jax import files
from lcm_jax.ending import exit_code
from lcm_jax.errors import LcmError

PLATFORMS = {"gpu": "cuda,cpu", "cpu": "cpu"}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=tuple(PLATFORMS), default="gpu", help="cpu: a rehearsal")
    parser.add_argument("--budget_s", type=float, default=1500, help="seconds until the day ends")
    parser.add_argument("--out", type=Path, default=Path("runs/gpu_day"))
    parser.add_argument("--only", default="", help="rows with this in their names")
    args = parser.parse_args()
    if not rows.CONFIGS.is_dir():
        raise LcmError(f"there is no folder {rows.CONFIGS} here; run this in the repository's folder")
    rehearsal, out = args.device == "cpu", args.out.absolute()
    card = speed.card_name(args.device)
    folder = out / (speed.file_name(card) + "-rehearsal" * rehearsal)
    day = driver.Day(folder, speed.versions(), speed.code(), environment(args.device, out / "cache"))
    listed = [row for row in rows.rows(folder, card, rehearsal) if args.only in row.name]
    if not listed:
        raise LcmError(f"--only={args.only}: no row has that in its name; see {folder / 'table.md'}")
    check_jax(args.device, day)
    complete = False
    try:
        complete = driver.run(listed, day, args.budget_s, teller())
    finally:
        text = f"# {card}\n\n{driver.table(listed, day)}\n{rows.comparison(folder)}"
        files.write_atomic(folder / "table.md", text)
        print(f"\n{text}\n{folder}")
    return 0 if complete else 1


def check_jax(device: str, day: driver.Day) -> None:
    """Raises LcmError if the rows' jax would take the CPU in place of a GPU. This process leaves the card alone."""
    asks = [sys.executable, "-c", "import jax; print(jax.default_backend())"]
    done = subprocess.run(asks, env=os.environ | day.environment, capture_output=True, text=True)
    if done.stdout.strip() != device:
        said = jobs.last_error(done.stderr) or f"its backend is {done.stdout.strip()}"
        raise LcmError(
            f"--device={device}: jax does not find it ({said}); pip install 'lcm_jax[cuda]', or --device=cpu"
        )


def environment(device: str, cache: Path) -> dict[str, str]:
    """Of all rows: their platform, no network, and compilers that keep what they made."""
    found = {
        "PYTHONPATH": os.pathsep.join(filter(None, (os.getcwd(), os.environ.get("PYTHONPATH")))),
        "PYTHONUNBUFFERED": "1",
        "HF_HUB_OFFLINE": "1",
        "JAX_PLATFORMS": PLATFORMS[device],
        "LCM_JAX_TEST_PLATFORMS": PLATFORMS[device],
        "JAX_COMPILATION_CACHE_DIR": str(cache / "jax"),
        "TORCHINDUCTOR_CACHE_DIR": str(cache / "torch"),
    }
    return found | ({"CUDA_VISIBLE_DEVICES": ""} if device == "cpu" else {})


if __name__ == "__main__":
    sys.exit(exit_code(main, left="the rows that are finished are kept, and the same command resumes"))
