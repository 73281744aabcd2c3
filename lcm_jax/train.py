"""Distil a Stable Diffusion into a Latent Consistency Model, or fine-tune one: the life of a run, top to bottom.

    python -m lcm_jax.train --config=configs/shapes_lcm.py --workdir=runs/shapes_lcm [--config.train.steps=2000]

The workdir receives config.json, metrics.jsonl, TensorBoard events, sample grids and checkpoints/<step>/. The same
command on the same workdir goes on from the newest checkpoint, bit for bit as if it had never stopped.
"""

import contextlib
import dataclasses
import functools
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags

from lcm_jax import config as config_lib
from lcm_jax import encoding, training_data
from lcm_jax import generate as generate_lib
from lcm_jax import student as student_lib
from lcm_jax.data import loader
from lcm_jax.diffusion import solvers
from lcm_jax.distill import losses, objectives
from lcm_jax.distill import state as state_lib
from lcm_jax.distill import step as step_lib
from lcm_jax.errors import LcmError, exit_code
from lcm_jax.models.lora import Adapted
from lcm_jax.pretrained import Pipeline, conditioning
from lcm_jax.runtime import mesh as mesh_lib
from lcm_jax.runtime.checkpoint import Checkpoints
from lcm_jax.runtime.telemetry import BadRecords, Telemetry
from lcm_jax.runtime.workdir import StopSignal, locked, prepare_workdir, same_as_before

GRID_COLUMNS = 4  # pictures per prompt in a sample grid


def train(config: ConfigDict, workdir: str | Path) -> state_lib.TrainState:
    """Runs, or goes on with, the training that `config` describes; returns the state at its end.

    Raises:
      LcmError: a bad config, model or workdir, before anything long has begun; NaN or Inf during training.
    """
    config_lib.validate(config)
    config = config_lib.resolve(config)
    workdir = Path(workdir).expanduser().absolute()
    if workdir.exists() and not workdir.is_dir():
        raise LcmError(f"workdir {workdir} is a file; choose a folder")
    workdir.mkdir(parents=True, exist_ok=True)
    with locked(workdir):  # first of all: config.json is the running process's
        prepare_workdir(workdir, config)
        parts = training_data.open_parts(config)
        teacher = student_lib.load_teacher(config)
        check_fit(config, teacher)
        training_data.check_caches(config, parts, teacher)
        student = student_lib.load_student(config, teacher)
        check_student(config, teacher, student)
        return run(config, workdir, parts, teacher, student)


def run(
    config: ConfigDict, workdir: Path, parts: Sequence[training_data.Part], teacher: Pipeline, student: Pipeline
) -> state_lib.TrainState:
    """The training loop. `student` is the teacher's pipeline with the student's UNet and initial weights.

    What is trained and saved is `student_lib.theta`: all of the UNet, or adapters alone.
    """
    problem = make_problem(config, teacher, student)
    rate = step_lib.learning_rate_schedule(
        config.train.learning_rate,
        config.train.lr_warmup_steps,
        config.train.lr_decay_start,
        config.train.lr_decay_steps,
    )
    optimizer = step_lib.make_optimizer(
        rate,
        b1=config.train.adam_b1,
        b2=config.train.adam_b2,
        eps=config.train.adam_eps,
        weight_decay=config.train.weight_decay,
        max_grad_norm=config.train.max_grad_norm,
    )
    mesh = mesh_lib.make_mesh()
    teacher, student = place_encoders(mesh, teacher, student)
    theta = student_lib.theta(student)
    abstract = jax.eval_shape(lambda p: state_lib.create(p, optimizer), theta)
    shardings = mesh_lib.state_shardings(mesh, abstract)
    step_fn = jax.jit(
        step_lib.make_step(problem, optimizer, config.train.ema_decay, config.train.accumulation_steps),
        donate_argnums=0,
        out_shardings=(shardings, None),
    )
    key = step_lib.named_key(config.seed, "draws")

    with Checkpoints(workdir / "checkpoints", keep=config.checkpoint.keep) as checkpoints:
        if checkpoints.latest_step() is not None:
            state = checkpoints.restore(mesh_lib.abstract_state(mesh, abstract))
        else:
            state = jax.device_put(state_lib.create(theta, optimizer), shardings)
        step = int(state.step)
        if step >= config.train.steps:
            print(f"{workdir} is trained to step {step} already; raise --config.train.steps to go on", file=sys.stderr)
            return state

        frozen = make_frozen(problem, teacher, student)
        frozen = jax.device_put(frozen, mesh_lib.state_shardings(mesh, frozen))
        draw_grid = make_grid_drawer(config, student, functools.partial(objectives.student_weights, problem, frozen))
        encode = encoding.make_encode(teacher)
        watch = training_data.Watch(loader.Faults(config.data.max_bad_fraction, BadRecords(workdir)), say)
        examples, order = training_data.open_examples(config, parts, teacher, encode, watch)
        same_as_before(workdir, "data.json", training_data.describe(order))
        with (
            contextlib.closing(
                loader.batches(
                    examples,
                    order,
                    step,
                    faults=watch.faults,
                    put=functools.partial(to_device, mesh, watch),
                    workers=0 if config.data.encode == "start" else config.data.workers,  # rows in memory stay here
                    process_index=jax.process_index(),
                    process_count=jax.process_count(),
                )
            ) as batches,
            Telemetry(
                workdir,
                config.train.steps,
                batch_size=config.data.batch_size,
                start_step=step,
                log_every=config.log.every,
            ) as telemetry,
            StopSignal() as stop,
        ):

            def save() -> None:
                telemetry.settle()  # a step whose loss or gradient was not finite raises here and is never saved
                checkpoints.save(step, state)

            while step < config.train.steps and not stop:
                try:
                    with telemetry.waiting():
                        rows = next(batches)
                except (LcmError, OSError):  # the data gave out: what was trained until here is not lost
                    if jax.process_count() == 1 and checkpoints.latest_step() != step > 0:
                        save()  # by one of several hosts it would wait for the others
                    raise
                state, metrics = step_fn(state, frozen, as_batch(encode(rows)), key)
                step += 1
                telemetry.update(step, {**metrics, "learning_rate": rate(step - 1)})
                if step == config.train.steps or step % config.checkpoint.every == 0:
                    save()
                if draw_grid and step % config.sample.every == 0:
                    telemetry.settle()
                    telemetry.images(step, draw_grid(state.ema_params))
            if stop:
                save()
                telemetry.message(f"{stop.name}: saved step {step}; the same command goes on from there")
    return state


def check_fit(config: ConfigDict, teacher: Pipeline) -> None:
    """Raises LcmError where config, teacher and devices do not go together."""
    devices = jax.device_count()
    if config.data.batch_size % devices:
        raise LcmError(
            f"config.data.batch_size = {config.data.batch_size} does not split over {devices} devices; use a multiple"
        )
    training_data.check_sizes(config, teacher)
    found, asked = teacher.schedule.prediction_type, config.model.prediction_type
    if asked not in (None, found):
        raise LcmError(
            f"config.model.prediction_type = {asked!r}, but the model's scheduler_config.json says {found!r}, and its "
            "UNet was trained so; leave it None, or correct that file if it is wrong"
        )
    if config_lib.asks_teacher(config) and teacher.has_w_embedding:
        raise LcmError(
            f"config.model.teacher = {config.model.teacher!r} is a Latent Consistency Model itself "
            "(it has a w embedding); give the diffusion model that it was made from"
        )
    if teacher.unet.in_channels != teacher.vae.latent_channels:
        raise LcmError(
            f"config.model.teacher = {config.model.teacher!r} takes {teacher.unet.in_channels} channels "
            f"(inpainting); {config.objective.upper()} needs a text-to-image model with {teacher.vae.latent_channels}"
        )


def check_student(config: ConfigDict, teacher: Pipeline, student: Pipeline) -> None:
    """Raises LcmError where the student's UNet cannot take what the teacher's takes."""
    for field in ("in_channels", "out_channels", "addition_embed_type", "cross_attention_dim"):
        has, needs = ({*unet.per_level(field)} for unet in (student.unet, teacher.unet))
        if has != needs:
            raise LcmError(
                f"config.model.student = {config.model.student!r} has {field} {_list(has)}, the teacher "
                f"{_list(needs)}; start from a model of the teacher's family"
            )


def _list(values: set) -> str:
    return ", ".join(sorted(map(str, values)))


def make_problem(config: ConfigDict, teacher: Pipeline, student: Pipeline) -> objectives.Problem:
    distance = {
        "l2": losses.l2,
        "huber": functools.partial(losses.pseudo_huber, c=config.distill.huber_c),
    }[config.distill.loss]
    return objectives.Problem(
        student=student.unet,
        teacher=teacher.unet if config_lib.asks_teacher(config) else None,
        schedule=teacher.schedule,
        grid=solvers.solver_grid(teacher.schedule, config.distill.solver_steps),
        distance=distance,
        w_min=config.distill.w_min,
        w_max=config.distill.w_max,
        scaling_factor=teacher.vae.scaling_factor,
        sigma_data=config.distill.sigma_data,
        timestep_scaling=config.distill.timestep_scaling,
        objective=config.objective,
        lcd_weight=config.distill.lcd_weight,
    )


def make_frozen(problem: objectives.Problem, teacher: Pipeline, student: Pipeline) -> objectives.Frozen:
    """The frozen arrays of the problem, each once: adapters on the teacher's own weights bring none beside them."""
    asked = problem.teacher is not None
    weights = teacher.params["unet"] if asked else None
    base = student.params["unet"]["base"] if isinstance(student.unet, Adapted) else None
    return objectives.Frozen(
        teacher=weights,
        null=conditioning.null(teacher) if asked else None,
        base=None if base is weights else base,
    )


def place_encoders(mesh: jax.sharding.Mesh, *pipelines: Pipeline) -> tuple[Pipeline, ...]:
    """The pipelines of one family with what they share, all but the UNets, on every device of the mesh, once."""
    shared = {name: tree for name, tree in pipelines[0].params.items() if name != "unet"}
    shared = jax.device_put(shared, mesh_lib.replicated(mesh))
    return tuple(dataclasses.replace(p, params={**shared, "unet": p.params["unet"]}) for p in pipelines)


def to_device(mesh: jax.sharding.Mesh, watch: training_data.Watch, rows: encoding.Rows) -> dict[str, jax.Array]:
    """This process's rows -> global arrays on the mesh."""
    return mesh_lib.put_batch(mesh, watch.captions(rows))


def as_batch(arrays: dict[str, jax.Array]) -> dict[str, Any]:
    """Encoded rows -> the step's batch: the posterior's moments, and "cond"."""
    arrays = dict(arrays)
    moments = {name: arrays.pop(name) for name in ("mean", "logvar")}
    return {**moments, "cond": arrays}


def make_grid_drawer(config: ConfigDict, student: Pipeline, weights: Callable[[Any], Any]):
    """theta -> picture [h w 3] uint8 with a row per prompt of `config.sample`, from noise that never changes.

    `weights` makes the UNet's weights of theta. None where the config asks for no pictures.
    """
    if not config.sample.every or not config.sample.prompts:
        return None
    encoders = {name: tree for name, tree in student.params.items() if name != "unet"}
    generate = generate_lib.Generator(dataclasses.replace(student, params=encoders))
    side = config.data.resolution // student.vae.factor
    captions = [prompt for prompt in config.sample.prompts for _ in range(GRID_COLUMNS)]
    cond = generate.encode(captions)
    noise = generate_lib.draw_noise(
        config.seed, range(len(captions)), config.sample.steps, (side, side, student.unet.in_channels)
    )
    settings = generate_lib.Settings(
        steps=config.sample.steps,
        original_steps=config.distill.solver_steps,
        timestep_scaling=config.distill.timestep_scaling,
        sigma_data=config.distill.sigma_data,
    )

    def draw(params: Any) -> np.ndarray:
        images = generate(cond, noise, config.sample.guidance_scale, settings, unet_params=weights(params))
        return generate_lib.grid(generate_lib.to_uint8(images), GRID_COLUMNS)

    return draw


def say(line: str) -> None:
    """A line for the reader of the terminal, from one process of all."""
    if jax.process_index() == 0:
        print(line, file=sys.stderr, flush=True)


_CONFIG = config_flags.DEFINE_config_file("config", None, "the run's config file, as configs/shapes_lcm.py")
_WORKDIR = flags.DEFINE_string("workdir", None, "folder of the run: metrics, samples, checkpoints")


def main(argv: list[str]) -> int:
    del argv
    if not flags.FLAGS["verbosity"].present:
        logging.set_verbosity(logging.WARNING)  # orbax tells its life otherwise

    def program() -> None:
        train(_CONFIG.value, _WORKDIR.value)

    return exit_code(program)


if __name__ == "__main__":
    flags.mark_flags_as_required(["config", "workdir"])
    app.run(main, flags_parser=config_lib.parse_flags)
