"""What a training step of each model costs: passes of the teacher's UNet, and seconds."""

import json
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from experiments import results
from experiments.methods.arms import Arm, config_of
from lcm_jax import files
from lcm_jax.cost import flops
from lcm_jax.diffusion.denoiser import call
from lcm_jax.run import config as config_lib
from lcm_jax.run import models as run_models
from lcm_jax.run import step as run_step
from lcm_jax.runtime import mesh as mesh_lib

WARM_UP, STEPS = 3, 30  # of each model: not counted, counted

Cost = dict[str, Any]  # {"model", "units", "seconds"}


def kept(path: Path, arms: Mapping[str, Arm]) -> list[Cost]:
    """Costs of the arms, in their order; measured once, kept in the JSON file `path`."""
    found = {one["model"]: one for one in json.loads(path.read_text())} if path.exists() else {}
    if not found.keys() >= arms.keys():
        seconds = seconds_per_step(arms)
        found = {n: {"model": n, "units": passes_per_image(arm), "seconds": seconds[n]} for n, arm in arms.items()}
        path.parent.mkdir(parents=True, exist_ok=True)
        files.write_atomic(path, results.to_json(list(found.values()), 1))
    return [found[name] for name in arms]


def passes_per_image(arm: Arm) -> float:
    """Network units of a training step: its products for one image, over those of one pass of the teacher's UNet."""
    config = config_lib.resolve(config_of(arm, 0))
    models = run_models.shapes(config)
    made = run_step.make(config, models, mesh_lib.make_mesh(devices=jax.devices()[:1]))
    batch, *latent = made.batch["mean"].shape
    z, t = jax.ShapeDtypeStruct((1, *latent), "float32"), jax.ShapeDtypeStruct((1,), "int32")
    unet, null = models.teacher.unet, made.frozen.null
    one = flops.count(lambda params, z, t, null: call(unet, params, z, t, null), made.frozen.teacher, z, t, null)
    return made.model_flops() / (batch * one)


def seconds_per_step(arms: Mapping[str, Arm]) -> dict[str, float]:
    """Medians over `STEPS` steps of each model; the models take turns, each from its own state, on a batch of zeros."""
    steps = {name: _stepper(config_lib.resolve(config_of(arm, 0))) for name, arm in arms.items()}
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    for _ in range(WARM_UP + STEPS):
        for name, step in steps.items():
            begun = time.perf_counter()
            step()
            seconds[name].append(time.perf_counter() - begun)
    return {name: statistics.median(values[WARM_UP:]) for name, values in seconds.items()}


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
