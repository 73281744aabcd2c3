"""What the training loop costs beside its step: reading, encoding and telemetry against the jitted step alone.

    python -m experiments.overhead.run [--steps=200] [--out=experiments/overhead]

The embedded teacher is distilled as configs/shapes_lcm.py says, from a latent cache on disk. Three kinds of step take
turns on one state:

    bare   the jitted step on a batch that is on the device already; the next step waits for its end
    loop   the loop's step: the next batch from the loader, its encoding, the step, `Telemetry.update`, a line in
           metrics.jsonl and TensorBoard every `log.every` steps; its end is awaited, too, which the loop does not do
    lean   `bare` with a program that returns only the loss, no norms and bins

Times are medians. One step of the loop in `log.every` is logged, so the loop's time per step is that of the others
plus the difference over `log.every`. Writes overhead.json and table.md.
"""

import argparse
import contextlib
import functools
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from experiments import results, stage
from lcm_jax import files, precompute
from lcm_jax.data import encoding, loader
from lcm_jax.distill import step as step_lib
from lcm_jax.run import config as config_lib
from lcm_jax.run import data as training_data
from lcm_jax.run import models as student_lib
from lcm_jax.run import step as training_step
from lcm_jax.runtime import kernels
from lcm_jax.runtime import mesh as mesh_lib
from lcm_jax.runtime.telemetry import LAG, RunInfo, Telemetry

CONFIG = "configs/shapes_lcm.py"
EXAMPLES = 512
WARM_UP = 10  # steps of each kind that are not counted
KINDS = ("bare", "loop", "lean")


def make_config(folder: Path) -> ConfigDict:
    """The demo's config with its data in a latent cache, which is made in `folder`."""
    config = stage.read_config(CONFIG)
    config.data.num_examples = EXAMPLES
    precompute.latents(config, folder / "cache", precompute.Options())
    config.data.update(source="latents", path=str(folder / "cache"), encode="step")
    config_lib.validate(config)
    return config_lib.resolve(config)


@contextlib.contextmanager
def opened(config: ConfigDict, workdir: Path, steps: int) -> Iterator[tuple[Any, dict[str, Callable[[Any], Any]]]]:
    """The initial state, and the step of each of KINDS, state -> state."""
    mesh = mesh_lib.make_mesh()
    models = student_lib.load(config, mesh_lib.place(mesh))
    teacher = models.teacher
    made = training_step.make(config, models, mesh)
    frozen, key = made.place_frozen(models), step_lib.named_key(config.seed, "draws")
    encode = encoding.make_encode(teacher, models.teacher_params, mesh)
    log = training_data.DataLog(loader.BadRecordLog(0.0, print), lambda line: print(line, file=sys.stderr))
    examples, order = training_data.open_examples(config, training_data.open_parts(config), teacher, encode, log)

    def loss_alone(*args: Any) -> tuple[Any, jax.Array]:
        state, metrics = made.step.__wrapped__(*args)  # not jitted, as options of the compiler are the outermost jit's
        return state, metrics["loss"]

    options = kernels.training(mesh.devices.flat[0].platform, mesh.size)
    lean_step = jax.jit(loss_alone, donate_argnums=0, compiler_options=options)

    def put(rows: encoding.Rows) -> dict[str, jax.Array]:
        return mesh_lib.put_batch(mesh, log.count_cut_tokens(rows))

    with (
        contextlib.closing(loader.batches(examples, order, bad_records=log.bad_records, put=put)) as batches,
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

        yield made.begin(models.trainable), {"bare": bare, "loop": loop, "lean": lean}


def timed(state: Any, step_of: dict[str, Callable[[Any], Any]], steps: int) -> dict[str, list[float]]:
    """Seconds of `steps` steps of each kind, interleaved; the kind that comes first rotates."""
    seconds: dict[str, list[float]] = {kind: [] for kind in KINDS}
    state = jax.block_until_ready(state)
    for number in range(WARM_UP + steps):
        for kind in KINDS[number % 3 :] + KINDS[: number % 3]:
            begun = time.perf_counter()
            state = jax.block_until_ready(step_of[kind](state))
            seconds[kind].append(time.perf_counter() - begun)
    return {kind: values[WARM_UP:] for kind, values in seconds.items()}


def summary(seconds: dict[str, list[float]], log_every: int) -> dict[str, Any]:
    """Medians in seconds, and what the loop and the metrics add to a step, as shares."""
    median = {kind: statistics.median(values) for kind, values in seconds.items()}
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
    median = found["median_s"]
    overhead, metrics = (f"{100 * found[key]:+.1f} %" for key in ("overhead", "metrics"))
    rows = [
        ("the jitted step alone", median["bare"], ""),
        (f"the loop's step, everything on, a line every {found['log_every']}", found["loop_s"], overhead),
        ("the jitted step without norms and bins", median["lean"], f"the metrics cost {metrics}"),
        ("one line in metrics.jsonl and TensorBoard", found["line_s"], ""),
    ]
    heads = [f"{found['device']}, median of {found['loop_steps']} interleaved steps", "time per step", ""]
    return results.table(heads, [(name, f"{1e3 * seconds:.1f} ms", share) for name, seconds, share in rows])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=200, help="of each kind")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="folder of overhead.json and table.md")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        config = make_config(folder)
        (folder / "run").mkdir()
        with opened(config, folder / "run", WARM_UP + args.steps) as (state, step_of):
            found = summary(timed(state, step_of, args.steps), config.log.every)
    found |= {"device": f"{jax.default_backend()}, {os.cpu_count()} cores", "batch_size": config.data.batch_size}
    files.write_atomic(args.out / "overhead.json", results.to_json(found, 1))
    files.write_atomic(args.out / "table.md", table(found))
    print(table(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
