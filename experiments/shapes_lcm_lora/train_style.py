"""A style LoRA of the embedded teacher, trained by plain denoising on styled renders.

The teacher's own loss, mean |v_theta(z_t, t, c) - v|^2 with t uniform and 10 % of the captions "", but only adapters on
its frozen UNet are trained. Adam, linear to 0 over the second half; the EMA of the adapters becomes a kohya file.

    python -m experiments.shapes_lcm_lora.train_style --workdir=runs/shapes_lcm_lora/style
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.shapes_teacher.loop import make_state, make_step, noised, run
from lcm_jax import assets
from lcm_jax.data import shapes
from lcm_jax.data.order import batch_indices
from lcm_jax.diffusion import schedule
from lcm_jax.diffusion.denoiser import call
from lcm_jax.ending import exit_code
from lcm_jax.errors import LcmError
from lcm_jax.models import lora
from lcm_jax.pretrained import Pipeline, load_pipeline, lora_files
from lcm_jax.pretrained import text as conditioning
from lcm_jax.pretrained.model import PipelineParams

STYLE = "card"
RANK = 16  # alpha equals the rank, so that weight 1.0 gives the model that was trained
STEPS, LEARNING_RATE = 800, 2e-3
EXAMPLES = 4096
BATCH = 32
FILE = "style_lora.safetensors"


def latents(
    pipeline: Pipeline, params: PipelineParams, style: str, count: int, batch: int = 64
) -> dict[str, np.ndarray]:
    """Scaled posterior moments [n h w c] of the first styled renders, and their captions' conditioning [n l d]."""
    vae = pipeline.vae
    encode = jax.jit(lambda params, images: vae.apply({"params": params}, images, method="encode"))
    params = {name: jax.device_put(tree) for name, tree in params.items() if name != "unet"}
    parts = []
    for start in range(0, count, batch):
        images, captions = shapes.examples(start, batch, style=style)
        mean, logvar = encode(params["vae"], images.astype(np.float32) / 127.5 - 1.0)
        text = conditioning.encode(pipeline, params, captions)["encoder_hidden_states"]
        parts.append(jax.device_get((mean * vae.scaling_factor, jnp.exp(0.5 * logvar) * vae.scaling_factor, text)))
    mean, std, text = (np.concatenate(column)[:count] for column in zip(*parts, strict=True))
    return {"mean": mean, "std": std, "text": text}


def loss_fn(unet: lora.Adapted, noise_schedule: schedule.NoiseSchedule, adapters: Any, batch: Any, key: jax.Array):
    """(loss, {}); batch: rows of `latents`, and the frozen "base" (UNet weights) and "null" [1 l d]."""
    z_t, t, velocity, drop = noised(noise_schedule, batch, key)
    text = jnp.where(drop[:, None, None], batch["null"], batch["text"])
    v = call(unet, {"base": batch["base"], "lora": adapters}, z_t, t, {"encoder_hidden_states": text})
    return jnp.square(v - velocity).mean(), {}


def train(workdir: Path, steps: int = STEPS, rank: int = RANK, learning_rate: float = LEARNING_RATE) -> Path:
    """Trains, or resumes, and writes WORKDIR/style_lora.safetensors. Raises LcmError if the teacher predicts no v."""
    teacher, params = load_pipeline(assets.path("shapes"))
    if teacher.schedule.prediction_type != "v_prediction":
        raise LcmError(f"the loss is of v, but the teacher predicts {teacher.schedule.prediction_type}")
    data = latents(teacher, params, STYLE, EXAMPLES)
    frozen = jax.device_put(
        {"base": params["unet"], "null": conditioning.null(teacher, params)["encoder_hidden_states"]}
    )
    unet = lora.Adapted(teacher.unet, 1.0)
    adapters = lora.init(jax.random.key(0), params["unet"], rank)

    half = steps // 2
    rate = optax.join_schedules(
        [optax.constant_schedule(learning_rate), optax.linear_schedule(learning_rate, 0.0, steps - half)], [half]
    )
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(rate, b2=0.99))
    step = make_step(lambda p, b, k: loss_fn(unet, teacher.schedule, p, b, k), optimizer, ema_decay=0.98)

    def batch(i: int) -> dict[str, Any]:
        rows = batch_indices(0, i, BATCH, EXAMPLES)
        return {**{name: array[rows] for name, array in data.items()}, **frozen}

    state = run(workdir, make_state(adapters, optimizer), step, batch, steps, log_every=20, save_every=200)
    path = workdir / FILE
    path.unlink(missing_ok=True)  # made by this command, from the checkpoint beside it
    words = {"style": STYLE, "steps": str(int(state.step)), "rank": str(rank)}
    return lora_files.write_lora(
        path, jax.device_get(state.ema), teacher.unet, alpha=float(rank), rank=rank, metadata=words
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workdir", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--rank", type=int, default=RANK)
    parser.add_argument("--learning_rate", type=float, default=LEARNING_RATE)
    print(train(**vars(parser.parse_args())))
    return 0


if __name__ == "__main__":
    sys.exit(exit_code(main))
