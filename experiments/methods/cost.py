"""What a training step of each model costs, and an image: passes of the teacher's UNet, and time.

The models take turns, so that what else the machine does slows all of them alike.
"""

import functools
import json
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp

import lcm_jax
from experiments import embedded, measuring, results
from experiments.methods.arms import Arm, config_of
from lcm_jax import files
from lcm_jax.cost import flops
from lcm_jax.diffusion import denoiser
from lcm_jax.run import config as config_lib
from lcm_jax.run import models as run_models
from lcm_jax.run import step as run_step
from lcm_jax.runtime import mesh as mesh_lib
from lcm_jax.sampling.generator import Generator
from lcm_jax.sampling.plan import Settings, noise_entries

WARM_UP, STEPS = 3, 30  # of each model: not counted, counted
BATCHES = 7  # of images, counted; one more is not, as it compiles

Cost = dict[str, Any]  # {"model", "units", "seconds"} of a step, or {"model", "steps", "milliseconds"} of an image
Timed = TypeVar("Timed")


def kept(path: Path, measure: Callable[[], list[Cost]]) -> list[Cost]:
    """What `measure` finds; once measured, it is kept in the JSON file `path`."""
    if not path.exists():
        found = measure()
        path.parent.mkdir(parents=True, exist_ok=True)
        files.write_atomic(path, results.to_json(found, 1))
    return json.loads(path.read_text())


def training(arms: Mapping[str, Arm]) -> list[Cost]:
    """Of a step of each arm: passes of the teacher's UNet for an image, and median seconds of `STEPS` steps, each arm
    from its own state, on a batch of zeros."""
    steps = {name: _stepper(config_lib.resolve(config_of(arm, 0))) for name, arm in arms.items()}
    found = _medians(steps, WARM_UP, STEPS)
    return [{"model": n, "units": passes_per_image(arm), "seconds": found[n]} for n, arm in arms.items()]


def sampling(models: Mapping[str, tuple[Path, str]]) -> list[Cost]:
    """Of images of models (name -> folder, sampler), in each number of `measuring.STEPS`: median milliseconds of one in
    `BATCHES` batches of `measuring.BATCH`, decoded, without encoding of captions."""
    draw = {}
    for name, (folder, sampler) in models.items():
        generator = lcm_jax.load(folder)
        cond = generator.encode(embedded.captions_of(measuring.BATCH, 1))
        for n in measuring.STEPS:
            draw[name, n] = functools.partial(_batch, generator, cond, Settings(sampler, n))
    found = _medians(draw, 1, BATCHES)
    return [{"model": m, "steps": n, "milliseconds": 1e3 * s / measuring.BATCH} for (m, n), s in found.items()]


def _batch(model: Generator, cond: Any, settings: Settings) -> None:
    noise = model.noise(0, range(measuring.BATCH), noise_entries(settings), *model.pipeline.default_size)
    jax.block_until_ready(model.decode(model.latents(cond, noise, embedded.HIGH_SCALE, settings)))


def _medians(calls: Mapping[Timed, Callable[[], None]], warm_up: int, count: int) -> dict[Timed, float]:
    """Median seconds of each call; they take turns."""
    seconds: dict[Timed, list[float]] = {key: [] for key in calls}
    for _ in range(warm_up + count):
        for key, call in calls.items():
            begun = time.perf_counter()
            call()
            seconds[key].append(time.perf_counter() - begun)
    return {key: statistics.median(values[warm_up:]) for key, values in seconds.items()}


def passes_per_image(arm: Arm) -> float:
    """Network units of a training step: its products for one image, over those of one pass of the teacher's UNet."""
    config = config_lib.resolve(config_of(arm, 0))
    models = run_models.shapes(config)
    made = run_step.make(config, models, mesh_lib.make_mesh(devices=jax.devices()[:1]))
    batch, *latent = made.batch["mean"].shape
    z, t = jax.ShapeDtypeStruct((1, *latent), "float32"), jax.ShapeDtypeStruct((1,), "int32")
    teacher = functools.partial(denoiser.call, models.teacher.unet)
    one = flops.count(teacher, made.frozen.teacher, z, t, made.frozen.null)
    return made.model_flops() / (batch * one)


def _stepper(config: Any) -> Callable[[], None]:
    """Takes the next step of a training whenever it is called, and waits for its end."""
    mesh = mesh_lib.make_mesh(devices=jax.devices()[:1])
    models = run_models.load(config, mesh_lib.place(mesh))
    made = run_step.make(config, models, mesh)
    state, frozen = made.begin(models.trainable), made.place_frozen(models)
    batch = jax.tree.map(lambda like: jnp.zeros(like.shape, like.dtype, device=like.sharding), made.batch)
    key = jax.random.key(0)

    def step() -> None:
        nonlocal state
        state = jax.block_until_ready(made.step(state, frozen, batch, key)[0])

    return step
