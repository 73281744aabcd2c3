"""A ControlNet for the embedded teacher, from outlines to shapes, in a few minutes: lcm_jax/assets/shapes_controlnet.

The teacher's own loss, mean |v_theta(z_t, t, c, residuals of the net) - v|^2 with t uniform, on plain renders; the
teacher is frozen. The net begins as a copy of the UNet's encoder, with residuals that are zero (Zhang et al. 2023,
section 3.2). As there, half of the captions are "", so that the net learns to read all of an outline, also where a
caption does not name what it shows. Half of the others name another shape, size and position, so that the outline wins.
Adam, linear to 0 over the second half; the EMA is written in diffusers format, float16.

    python -m experiments.shapes_controlnet.train [--workdir=runs/shapes_controlnet] [--publish]

The same command resumes. --publish replaces the asset, and metrics.jsonl and made.json beside this file.
"""

import argparse
import dataclasses
import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments import embedded, results
from experiments.shapes_lcm_lora.train_style import latents
from experiments.shapes_teacher.loop import make_state, make_step, noised, run
from experiments.workflows import cases
from lcm_jax import assets, files
from lcm_jax.data import shapes
from lcm_jax.data.order import batch_indices
from lcm_jax.diffusion import schedule
from lcm_jax.ending import exit_code
from lcm_jax.models.controlnet import ControlNetConditioningEmbedding, ControlNetModel
from lcm_jax.models.unet import Encoder, UNet2DConditionModel
from lcm_jax.pretrained import Pipeline, load_pipeline, names, save_unet
from lcm_jax.pretrained import text as conditioning
from lcm_jax.pretrained.model import PipelineParams

STEPS, LEARNING_RATE = 2000, 1e-3
EXAMPLES = 8192
BATCH = 32
DROP_CAPTION, MISLEAD = 0.5, 0.5  # of the captions; of those that are left
WIDTHS = (8, 16, 32, 64)  # of the outline's embedding, 64 pixels -> 8 latents on a side
ASSET = assets.path("shapes").with_name("shapes_controlnet")


def net_of(unet: UNet2DConditionModel, params: Any) -> tuple[ControlNetModel, Any]:
    """(net, parameters) for a UNet: its encoder's, and a new embedding of the outline; all residuals are zero."""
    fields = {field.name: getattr(unet, field.name) for field in dataclasses.fields(Encoder) if field.name != "name"}
    net = ControlNetModel(**fields | {"parent": None}, conditioning_embedding_out_channels=WIDTHS)
    found = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), names.abstract_params(net))
    embedding = ControlNetConditioningEmbedding(unet.block_out_channels[0], WIDTHS)
    image = jnp.zeros((1, shapes.RESOLUTION, shapes.RESOLUTION, 3))
    found["controlnet_cond_embedding"] = jax.jit(embedding.init)(jax.random.key(0), image)["params"]
    return net, found | {name: params[name] for name in found.keys() & params.keys()}


def outlines(rows: Sequence[int]) -> np.ndarray:
    """Of training images, as the net reads them: float32 [b 64 64 3] in [0, 1]."""
    return np.stack([shapes.outline(shapes.spec(int(row))) for row in rows]).astype(np.float32) / 255


def misleading(number: int) -> str:
    """A training image's caption with another shape, size and position, where it names them."""
    spec = shapes.spec(number)
    return shapes.describe(cases.reworded(spec, spec.named, cases.OUTLINED, number), spec.form)


def encoded(teacher: Pipeline, params: PipelineParams, captions: Sequence[str], batch: int = 64) -> np.ndarray:
    """Conditioning [n l d] of captions."""
    parts = (captions[start : start + batch] for start in range(0, len(captions), batch))
    return np.concatenate([conditioning.encode(teacher, params, part)["encoder_hidden_states"] for part in parts])


def loss_fn(
    unet: UNet2DConditionModel,
    net: ControlNetModel,
    noise_schedule: schedule.NoiseSchedule,
    params: Any,
    batch: Any,
    key: jax.Array,
) -> tuple[jax.Array, dict]:
    """(loss, {}).

    batch: rows of `latents`, with "misleading" [b l d] and "outline"; the frozen "base" (UNet's weights) and "null".
    """
    z_t, t, velocity, drop = noised(noise_schedule, batch, key, DROP_CAPTION)
    mislead = jax.random.bernoulli(jax.random.fold_in(key, 1), MISLEAD, t.shape)
    text = jnp.where(mislead[:, None, None], batch["misleading"], batch["text"])
    text = jnp.where(drop[:, None, None], batch["null"], text)
    residuals = net.apply({"params": params}, z_t, t, text, batch["outline"])
    v = unet.apply({"params": batch["base"]}, z_t, t, text, residuals=residuals)
    return jnp.square(v - velocity).mean(), {}


def train(workdir: Path, steps: int = STEPS, examples: int = EXAMPLES) -> Path:
    """Trains, or resumes, and writes WORKDIR/net."""
    teacher, params = load_pipeline(assets.path("shapes"))
    data = latents(teacher, params, "plain", examples)
    data["misleading"] = encoded(teacher, params, [misleading(number) for number in range(examples)])
    null = conditioning.null(teacher, params)["encoder_hidden_states"]
    frozen = jax.device_put({"base": params["unet"], "null": null})
    net, initial = net_of(teacher.unet, params["unet"])

    half = steps // 2
    rate = optax.join_schedules(
        [optax.constant_schedule(LEARNING_RATE), optax.linear_schedule(LEARNING_RATE, 0.0, steps - half)], [half]
    )
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(rate, b2=0.99))
    step = make_step(lambda p, b, k: loss_fn(teacher.unet, net, teacher.schedule, p, b, k), optimizer, ema_decay=0.99)

    def batch(i: int) -> dict[str, Any]:
        rows = batch_indices(0, i, BATCH, examples)
        return {name: array[rows] for name, array in data.items()} | {"outline": outlines(rows)} | frozen

    state = run(workdir, make_state(initial, optimizer), step, batch, steps, save_every=200)
    out = workdir / "net"
    shutil.rmtree(out, ignore_errors=True)  # made by this command, from the checkpoint beside it
    save_unet(net, jax.device_get(state.ema), out, dtype=np.float16)
    made = {"teacher": embedded.asset_hash(assets.path("shapes")), "steps": int(state.step)}
    files.write_atomic(workdir / "made.json", json.dumps(made, indent=2) + "\n")
    return out


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workdir", type=Path, default=Path("runs/shapes_controlnet"))
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--publish", action="store_true", help="replace the asset, and the records beside the code")
    args = parser.parse_args()
    net = train(args.workdir, args.steps)
    if args.publish:
        shutil.rmtree(ASSET, ignore_errors=True)
        shutil.copytree(net, ASSET)
        results.publish(Path(__file__).parent, {name: args.workdir / name for name in ("metrics.jsonl", "made.json")})
    print(ASSET if args.publish else net)
    return 0


if __name__ == "__main__":
    sys.exit(exit_code(main))
