"""Distil a Stable Diffusion into a Latent Consistency Model, or fine-tune one: a run from top to bottom.

    python -m lcm_jax.train --config=configs/shapes_lcm.py --workdir=runs/shapes_lcm [--config.log.every=1]

The workdir receives config.json, metrics.jsonl, TensorBoard events, sample grids and checkpoints/<step>/. The same
command on the same workdir resumes from the newest checkpoint, bit for bit as if it had never stopped. It is the same
command on one device, on many (config.mesh) and in many processes (docs/clusters.md).

    --aot_report        compile the step for these devices, report its memory and how fast it could be, and end
    --profile=10:13     write a trace of these steps to WORKDIR/profile
"""

import contextlib
import functools
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import app, flags, logging
from jax.sharding import Mesh
from ml_collections import ConfigDict, config_flags

from lcm_jax.cost import chips, roofline
from lcm_jax.data import encoding, loader
from lcm_jax.data.loader import BadRecordFile, BadRecordLog
from lcm_jax.distill.objective import Frozen, student_weights
from lcm_jax.distill.state import TrainState
from lcm_jax.distill.step import named_key
from lcm_jax.errors import LcmError
from lcm_jax.files import expanded, write_atomic
from lcm_jax.pretrained.model import Pipeline, PipelineParams
from lcm_jax.run import data as run_data
from lcm_jax.run import models as run_models
from lcm_jax.run import report
from lcm_jax.run import step as run_step
from lcm_jax.run.config import (
    flag_help,
    parse_flags,
    prepare_workdir,
    resolve,
    to_json,
    validate,
)
from lcm_jax.run.keys import DATA_FILE, MODELS_FILE
from lcm_jax.runtime import boards, distributed, lost, profiling, waiting
from lcm_jax.runtime.checkpoints import Checkpoints
from lcm_jax.runtime.mesh import check_batch, make_mesh, place, process_rows, put_batch, report_unsharded
from lcm_jax.runtime.telemetry import RunInfo, Telemetry
from lcm_jax.runtime.workdir import StopSignal, check_same, locked, same_as_before, write_config
from lcm_jax.sampling.generator import Generator
from lcm_jax.sampling.plan import Settings
from lcm_jax.sampling.png import grid, to_uint8

READ_HERE = 20.0  # seconds that one of several processes may take to read a batch, so that it stops with the others
SMALLER = (
    "use a smaller --config.data.batch_size, or more --config.train.accumulation_steps, --config.train.remat=block, "
    "--config.model.dtype=bfloat16, a smaller --config.data.encode_chunk, or more devices with --config.mesh.fsdp=-1"
)
GRID_COLUMNS = 4  # images per prompt in a sample grid


def train(config: ConfigDict, workdir: str | Path, profile: str = "") -> TrainState:
    """Runs, or resumes, the training that `config` describes; returns the state at its end.

    Args:
      profile: "FIRST:LAST", steps to write a trace of; "": none.

    Raises:
      LcmError: a bad config, model or workdir, before anything long has begun; NaN or Inf during training.
    """
    began = time.time()
    with contextlib.ExitStack() as stack:
        # ---- Set-up. In a `together` block an error on one process is an error on all of them.
        with distributed.together():
            config, mesh = prepared(config, profile)
        workdir = stack.enter_context(locked(workdir))  # first: config.json belongs to the process that runs
        with distributed.together():
            lost.check(workdir, config.checkpoint.every)  # before config.json is written
            moved = prepare_workdir(workdir, config)
            parts = run_data.open_parts(config)
            check_same(workdir, DATA_FILE, sources := run_data.digests(parts))
            program = run_step.make(config, run_models.shapes(config), mesh)

        # ---- Resume.
        kept = {name: config.checkpoint[name] for name in ("keep", "keep_every", "best")}
        checkpoints = stack.enter_context(Checkpoints(workdir / "checkpoints", **kept))
        state = checkpoints.restore(program.state) if checkpoints.steps() else None
        if state is not None and int(state.step) >= config.train.steps:
            say(f"{workdir} is already trained to step {int(state.step)}; raise --config.train.steps to train further")
            return state

        # ---- Models. The UNets' weights move into the state and the frozen arrays; only the other parts stay beside.
        with distributed.together():
            models = run_models.load(config, place(mesh))
        same_as_before(workdir, MODELS_FILE, models.digests)
        run_data.check_caches(config, parts, models.teacher, models.teacher_params)
        state = program.begin(models.trainable) if state is None else state
        frozen = program.place_frozen(models)
        teacher, student = models.teacher, models.student
        params = {part: tree for part, tree in models.teacher_params.items() if part != "unet"}
        del models
        make_grid = sample_grid(config, program, student, params, frozen, mesh)
        encode = encoding.make_encode(teacher, params, mesh, config.data.encode_chunk)
        say(report_unsharded(mesh, (program.state, program.frozen)))

        # ---- Data.
        first = step = int(state.step)
        log = run_data.DataLog(BadRecordLog(config.data.max_bad_fraction, BadRecordFile(workdir)), say)
        examples, order = run_data.open_examples(config, parts, teacher, encode, log)
        same_as_before(workdir, DATA_FILE, {"records": [list(groups) for groups in order.streams], **sources})
        for key, (old, new) in moved.items():
            say(f"config.{key} = {new!r} is the same as {old!r} was, by its digests; the run goes on")
        if moved:
            write_config(workdir, to_json(config))
        stop = StopSignal()
        batches = loader.batches(
            examples,
            order,
            step,
            bad_records=log.bad_records,
            put=lambda rows: put_batch(mesh, log.count_cut_tokens(rows)),
            workers=0 if config.data.encode == "start" else config.data.workers,  # rows in memory stay in this process
            rows=process_rows(mesh, config.data.batch_size, jax.process_index()),
            stop=lambda: stop,
        )
        stack.enter_context(contextlib.closing(batches))

        # ---- Loop.
        about = RunInfo(
            config.train.steps,
            config.data.batch_size,
            start_step=step,
            began=began,
            keys_of=functools.partial(run_data.keys_of, examples, order),
            config=config.to_dict(),
            **speed_limits(program, mesh),
        )
        telemetry = stack.enter_context(Telemetry(workdir, about, **config.log))
        profiled = stack.enter_context(profiling.Profile(workdir, profile, step))
        stack.enter_context(stop)
        key = jax.jit(lambda: named_key(config.seed, "draws"), out_shardings=program.key.sharding)()
        alone, failure, late = jax.process_count() == 1, None, False  # late: no data are read ahead any longer

        @contextlib.contextmanager
        def survived() -> Iterator[None]:
            """What fails beside the step leaves the state intact, so it is saved before the error is raised.

            One process of several cannot stop alone, because the others have begun the next step: it asks them to
            stop, and reads for itself until they do.
            """
            nonlocal failure
            try:
                yield
            except Exception as error:
                if failure:
                    raise
                failure = error
                if not alone:
                    distributed.ask_to_stop()

        def encoded(rows: encoding.Rows) -> dict[str, Any]:
            with jax.transfer_guard("disallow"):
                return run_step.as_batch(encode(rows))

        def save() -> None:
            telemetry.settle()  # a step whose loss or gradient was not finite raises here, and is never saved
            if checkpoints.latest_step() != step:
                with telemetry.pause("checkpoint"):
                    checkpoints.save(step, state, contents(config, step), telemetry.means() or None)

        while step < config.train.steps and not stop.agreed() and not (failure and alone):
            checkpoints.check()
            telemetry.saved(checkpoints.whole)
            batch = None
            with survived(), contextlib.suppress(waiting.Stopped):
                profiled.at(step, state)
                if not late:
                    with telemetry.waiting():
                        rows = next(batches)
                    batch = encoded(rows)
            if batch is None:
                if alone:
                    continue
                late = True
                batch = encoded(read_here(batches, step - first, failure))
            with jax.transfer_guard("disallow"):
                state, metrics = program.step(state, frozen, batch, key)
            step += 1
            telemetry.update(step, metrics)
            if step == config.train.steps or step % config.checkpoint.every == 0:
                save()
            if make_grid and step % config.sample.every == 0:
                telemetry.settle()
                with survived(), telemetry.pause("evaluation"):
                    telemetry.images(step, make_grid(state.ema_params))

        # ---- End.
        if step < config.train.steps and (step > 0 or not failure or not alone):
            save()
        with telemetry.pause("checkpoint"):
            checkpoints.wait()  # before `stop` is left, so that a first signal does not interrupt it
        telemetry.saved(checkpoints.whole)
        if checkpoints.whole == step < config.train.steps:
            why = "an error" if failure else stop.name
            telemetry.message(f"{why}: saved step {step}; the same command resumes from there")
        with distributed.together():
            if failure:
                raise failure
    return state


def prepared(config: ConfigDict, profile: str = "") -> tuple[ConfigDict, Mesh]:
    """The config, checked and resolved, and the mesh over all devices that it asks for."""
    validate(config)
    profiling.check(profile, config.train.steps)
    config = resolve(config)
    if config.log.wandb:
        boards.import_wandb()  # fails now, not when everything has been read
    if config.compilation_cache:
        jax.config.update("jax_compilation_cache_dir", config.compilation_cache)
    mesh = make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.slices)
    check_batch(mesh, config.data.batch_size, config.train.accumulation_steps)
    return config, mesh


def read_here(batches: loader.Prefetched, number: int, failure: Exception | None) -> encoding.Rows:
    """Batch `number`, read by this process in at most READ_HERE seconds. Raises `failure` if it does not come."""
    late = time.monotonic() + READ_HERE
    try:
        return waiting.in_thread(lambda: batches.make(number), lambda: "data", stop=lambda: time.monotonic() > late)
    except waiting.Stopped:
        raise failure or LcmError(
            "no data arrive, and without them this process cannot save with the others; the same command resumes from "
            "the last checkpoint"
        ) from None


def contents(config: ConfigDict, step: int) -> dict[str, Any]:
    """What a checkpoint records beside its arrays: the position in the data, which is the step, and the config."""
    return {"step": step, "images": step * config.data.batch_size, "config": json.loads(to_json(config))}


def speed_limits(program: run_step.TrainingStep, mesh: Mesh) -> dict[str, float]:
    """FLOPs of a step and of a second, if the devices are known."""
    chip = chips.lookup(mesh.devices.flat[0].device_kind)
    return {"flops_per_step": program.model_flops(), "peak_flops": chip.peak_flops * mesh.size} if chip else {}


def sample_grid(
    config: ConfigDict,
    program: run_step.TrainingStep,
    student: Pipeline,
    params: PipelineParams,
    frozen: Frozen,
    mesh: Mesh,
) -> Callable[[Any], np.ndarray] | None:
    """A function: trained weights -> image uint8 [h w 3] with a row for each prompt of `config.sample`; fixed noise.

    None if the config asks for no images. params: of the parts other than the UNet.
    """
    if not config.sample.every or not config.sample.prompts:
        return None
    captions = [prompt for prompt in config.sample.prompts for _ in range(GRID_COLUMNS)]
    side = config.data.resolution
    # As of SDXL, whose decoder takes GBs an image, beside a state.
    large = len(captions) * side**2 > encoding.ENCODE_PIXELS
    generator = Generator(student, params, mesh, sliced=large)
    noise = generator.noise(config.seed, range(len(captions)), config.sample.steps, side, side)
    cond = generator.encode(captions)
    settings, scale = Settings(student.default_sampler, config.sample.steps), config.sample.guidance_scale

    def make_grid(trained: Any) -> np.ndarray:
        weights = student_weights(program.problem, frozen, trained)
        images = generator.decode(generator.latents(cond, noise, scale, settings, unet_params=weights))
        return grid(to_uint8(images), GRID_COLUMNS)

    return make_grid


def aot_report(config: ConfigDict, workdir: str | Path) -> None:
    """Compiles the step for these devices and reports its memory and speed, also in WORKDIR/aot_report.json.

    Raises:
      LcmError: as `train`; the step does not fit.
    """
    found = report.report(*prepared(config), {})
    say(roofline.text(found))
    if jax.process_index() == 0:
        write_atomic(expanded(workdir) / "aot_report.json", json.dumps(found, indent=2) + "\n")


def say(line: str) -> None:
    """Prints a line on stderr, unless it is empty, from the first process only."""
    if line and jax.process_index() == 0:
        waiting.say(line)  # above the progress bar: captions that are cut are reported during the loop


def define_flags() -> None:
    """Those of the program; not at import: somebody else's program that trains has a --workdir of its own."""
    config_flags.DEFINE_config_file("config", None, flag_help("configs/shapes_lcm.py"))
    flags.DEFINE_string("workdir", None, "folder of the run: metrics, samples, checkpoints")
    flags.DEFINE_bool("aot_report", False, "compile the step, report its memory and speed, and end")
    flags.DEFINE_string("profile", "", "FIRST:LAST, steps to write a trace of, to WORKDIR/profile")
    distributed.define_flags()


def main(argv: list[str]) -> int:
    del argv
    given = flags.FLAGS
    if not given["verbosity"].present:
        logging.set_verbosity(logging.WARNING)  # orbax logs every step at INFO

    def program() -> None:
        if given.aot_report:
            aot_report(given.config, given.workdir)
        else:
            train(given.config, given.workdir, given.profile)

    left = (
        "nothing was written"
        if given.aot_report
        else "the same command continues from the newest checkpoint, if there is one"
    )
    return distributed.exit_code(program, left, SMALLER, **distributed.from_flags())


if __name__ == "__main__":
    define_flags()
    flags.mark_flags_as_required(["config", "workdir"])
    app.run(distributed.end_process_after(main), flags_parser=parse_flags)
