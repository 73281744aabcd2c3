"""Milliseconds from a key to the image on the page of `lcm_jax.app`, in a headless browser.

    python -m experiments.page.run [--model=runs/shapes_lcm/export] [--out=experiments/page]
                                   [--shot=docs/page.png]

Each letter of a prompt is typed after the image of the one before is there. The time is from the key's own, as the
browser has it, to the frame that shows the image: browser, server, text encoder, sampler, decoder and back. Writes
latency.json, and a screenshot for docs/workflows.md.
"""

import argparse
import os
import platform
import statistics
import sys
from pathlib import Path

from experiments import results
from experiments.page import browser
from lcm_jax.ending import exit_code

TEXT = " and a small blue circle at the right on a black background"
KEYS = 50
STEPS = (1, 2, 4)
DEFAULT = "runs/shapes_lcm/export"


def set_steps(page, steps: int) -> None:
    """Types a number of steps, and waits for its image."""
    field = page.locator("#steps input[type=number]")
    field.fill(str(steps))
    field.blur()
    page.wait_for_function(
        "(flag) => document.querySelector('#command textarea').value.includes(flag)", arg=f"--steps={steps} "
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=DEFAULT, help="what `make demo` exports")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    parser.add_argument("--shot", type=Path, default=Path("docs/page.png"))
    args = parser.parse_args()
    rows = []
    flags = (f"--model={args.model}", f"--max_steps={max(STEPS)}", f"--prompt={browser.PROMPT}")
    with (
        browser.served(*flags) as address,
        browser.browsing() as chromium,
        browser.opened(chromium, address) as page,
    ):
        browser.wait_for_image(page, browser.PROMPT)
        page.screenshot(path=str(args.shot), animations="disabled")
        for steps in STEPS:
            field = page.locator("#prompt textarea")
            field.fill(browser.PROMPT)
            set_steps(page, steps)
            browser.wait_for_image(page, browser.PROMPT)
            times = sorted(browser.key_times(page, TEXT[: KEYS + 1])[1:])  # the first key also wakes the page
            row = {"steps": steps, "keys": len(times), "median_ms": round(statistics.median(times), 1)}
            rows.append(
                row | {"p10_ms": round(times[len(times) // 10], 1), "p90_ms": round(times[-len(times) // 10], 1)}
            )
            print(rows[-1], flush=True)
    about = {"cores": len(os.sched_getaffinity(0)), "machine": platform.machine(), "load": os.getloadavg()[0]}
    (args.out / "latency.json").write_text(results.to_json({"about": about, "rows": rows}, 2))
    return 0


if __name__ == "__main__":
    sys.exit(exit_code(main))
