"""What the training loop costs beside its step: reading, encoding, telemetry, against the jitted step alone.

    python -m experiments.overhead.run [--steps=200] [--out=experiments/overhead]

The embedded teacher is distilled as configs/shapes_lcm.py says, from a latent cache on disk. One state goes through
three ways of doing a step in turn:

    bare   the jitted step on a batch that lies on the device; the next begins when it has ended
    loop   the loop's step: the next batch from the loader, its encoding, the step, `Telemetry.update`, a line in
           metrics.jsonl and TensorBoard every `log.every` steps; it ends as `bare` does, though the loop does not wait
    lean   `bare` by a program that gives the loss alone, no norms and bins

Times are medians. A logged step of the loop comes once in `log.every`, so the loop's time per step is that of the
others plus the difference over `log.every`. Writes overhead.json and table.md.
"""

import argparse
import contextlib
import functools
import json
import os
import runpy
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from lcm_jax import precompute
from lcm_jax.data import encoding, loader
from lcm_jax.distill import step as step_lib
from lcm_jax.files import write_text
from lcm_jax.run import config as config_lib
from lcm_jax.run import data as training_data
from lcm_jax.run import models as student_lib
from lcm_jax.run import step as training_step
from lcm_jax.runtime import mesh as mesh_lib
from lcm_jax.runtime.telemetry import LAG, RunInfo, Telemetry
from lcm_jax.train import to_device

CONFIG = "configs/shapes_lcm.py"
EXAMPLES = 512
WARM_UP = 10  # steps of each way that are not counted


def make_config(folder: Path) -> ConfigDict:
    """The demo's config, from a latent cache that is made in `folder`."""
    config = runpy.run_path(CONFIG)["get_config"]()
    config.data.num_examples = EXAMPLES
    precompute.latents(config, folder / "cache", precompute.Options())
    config.data.update(source="latents", path=str(folder / "cache"), encode="step")
    config_lib.validate(config)
    return config_lib.resolve(config)


@contextlib.contextmanager
def opened(config: ConfigDict, workdir: Path, steps: int) -> Iterator[dict[str, Callable[[Any], Any]]]:
    """Name -> a way of doing a step, state -> state; and "begin", which gives the first state."""
    mesh = mesh_lib.make_mesh()
    teacher = student_lib.load_teacher(config, mesh_lib.place(mesh))
    student = student_lib.load_student(config, teacher, mesh_lib.place(mesh))
    made = training_step.make(config, teacher, student, mesh)
    frozen, key = made.place_frozen(teacher, student), step_lib.named_key(config.seed, "draws")
    encode = encoding.make_encode(teacher, mesh)
    watch = training_data.Watch(loader.BadRecordLog(0.0, print), lambda line: print(line, file=sys.stderr))
    examples, order = training_data.open_examples(config, training_data.open_parts(config), teacher, encode, watch)
    lean_step = jax.jit(functools.partial(with_loss_alone, made.step), donate_argnums=0)
    put = functools.partial(to_device, mesh, watch)
    with (
        contextlib.closing(loader.batches(examples, order, bad_records=watch.bad_records, put=put)) as batches,
        Telemetry(
            workdir,
            RunInfo(
                steps,
                config.data.batch_size,
                flops_per_step=made.model_flops(),
                keys_of=functools.partial(training_data.keys_of, examples, order),
            ),
            every=config.log.every,
            spike=100.0,
        ) as telemetry,
    ):
        held = training_step.as_batch(encode(next(batches)))
        done = 0

        def bare(state: Any) -> Any:
            return made.step(state, frozen, held, key)[0]

        def lean(state: Any) -> Any:
            return lean_step(state, frozen, held, key)[0]

        def loop(state: Any) -> Any:
            nonlocal done
            with telemetry.waiting():
                rows = next(batches)
            state, metrics = made.step(state, frozen, training_step.as_batch(encode(rows)), key)
            done += 1
            telemetry.update(done, metrics)
            return state

        yield {"begin": lambda _: made.begin(student_lib.theta(student)), "bare": bare, "loop": loop, "lean": lean}


def with_loss_alone(step: Callable, *args: Any) -> tuple[Any, jax.Array]:
    state, metrics = step(*args)
    return state, metrics["loss"]


def timed(ways: dict[str, Callable[[Any], Any]], steps: int) -> dict[str, list[float]]:
    """Seconds of each of `steps` steps of every way, one of each after another, the first of them in turn."""
    names = ["bare", "loop", "lean"]
    state = jax.block_until_ready(ways["begin"](None))
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for number in range(WARM_UP + steps):
        for name in names[number % 3 :] + names[: number % 3]:
            begun = time.perf_counter()
            state = jax.block_until_ready(ways[name](state))
            seconds[name].append(time.perf_counter() - begun)
    return {name: values[WARM_UP:] for name, values in seconds.items()}


def summary(seconds: dict[str, list[float]], log_every: int) -> dict[str, Any]:
    """Medians in seconds, and shares of the bare step's."""
    median = {name: statistics.median(values) for name, values in seconds.items()}
    # A step's line is written LAG steps later, when its numbers are checked.
    logged = [s for number, s in enumerate(seconds["loop"], WARM_UP + 1) if (number - LAG) % log_every == 0]
    line = statistics.median(logged) - median["loop"]
    loop = median["loop"] + line / log_every
    return {
        "median_s": median,
        "line_s": line,
        "loop_s": loop,
        "overhead": loop / median["bare"] - 1,
        "metrics": median["bare"] / median["lean"] - 1,
        "loop_steps": len(seconds["loop"]),
        "log_every": log_every,
    }


def table(found: dict[str, Any]) -> str:
    """The summary as Markdown."""
    median = {name: f"{1e3 * value:.1f} ms" for name, value in found["median_s"].items()}
    return "\n".join(
        [
            f"| {found['device']}, median of {found['loop_steps']} interleaved steps | time per step | |",
            "|---|---|---|",
            f"| the jitted step alone | {median['bare']} | |",
            f"| the loop's step, everything on, a line every {found['log_every']} | {1e3 * found['loop_s']:.1f} ms "
            f"| {100 * found['overhead']:+.1f} % |",
            f"| the jitted step without norms and bins | {median['lean']} | the metrics cost "
            f"{100 * found['metrics']:+.1f} % |",
            f"| one line in metrics.jsonl and TensorBoard | {1e3 * found['line_s']:.1f} ms | |",
            "",
        ]
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=200, help="of each way")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="folder of overhead.json and table.md")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        config = make_config(folder)
        (folder / "run").mkdir()
        with opened(config, folder / "run", WARM_UP + args.steps) as ways:
            found = summary(timed(ways, args.steps), config.log.every)
    found |= {"device": f"{jax.default_backend()}, {os.cpu_count()} cores", "batch_size": config.data.batch_size}
    args.out.mkdir(parents=True, exist_ok=True)
    write_text(args.out / "overhead.json", json.dumps(found, indent=2) + "\n")
    write_text(args.out / "table.md", table(found))
    print(table(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
