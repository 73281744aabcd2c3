"""The embedded teacher's AutoencoderKL: 64 px renders <-> 8 x 8 x 4 latents.

    loss = mean |x - y| + 4 mean (x - y)^2 + 0.5 mean |grad x - grad y| + 2e-4 KL      (KL: mean over latent values)

The gradients' term is there because shapes differ in their edges. First both halves are trained, then the decoder
alone, on the latents of a fixed encoder: edges become sharper, and the latents stay what they are, so that the UNet can
be trained on them meanwhile. Adam, 2e-3 and 1e-3, cosine.

    python -m experiments.shapes_teacher.train_vae --workdir=/tmp/shapes_teacher
"""

import argparse
import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.shapes_teacher.loop import make_state, make_step, run
from lcm_jax.data import shapes
from lcm_jax.models import vae
from lcm_jax.runtime.checkpoints import list_steps, load_subtree

CONFIG = {
    "block_out_channels": [16, 24, 48, 96],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "layers_per_block": 1,
    "norm_num_groups": 1,  # with a few channels per group, GroupNorm would remove the colours
    "sample_size": 64,
    "force_upcast": False,
}
BATCH = 16
ENCODER = ("encoder", "quant_conv")


@dataclasses.dataclass(frozen=True)
class Stage:
    """One training: its folder in the workdir, its steps, the parts that stay as they are."""

    folder: str
    steps: int
    peak: float
    ema: float
    frozen: tuple[str, ...] = ()


BOTH = Stage("vae", 2_500, 2e-3, 0.99)
DECODER = Stage("decoder", 4_500, 1e-3, 0.999, frozen=ENCODER)


def loss_fn(module, frozen, params, images, key):
    """images [b 64 64 3] in [-1, 1]."""
    params = params | {part: jax.lax.stop_gradient(params[part]) for part in frozen}
    mean, logvar = module.apply({"params": params}, images, method="encode")
    z = mean + jnp.exp(0.5 * logvar) * jax.random.normal(key, mean.shape)
    diff = module.apply({"params": params}, z, method="decode") - images
    l1, mse = jnp.abs(diff).mean(), jnp.square(diff).mean()
    edges = jnp.abs(jnp.diff(diff, axis=1)).mean() + jnp.abs(jnp.diff(diff, axis=2)).mean()
    kl = 0.5 * (jnp.square(mean) + jnp.exp(logvar) - 1.0 - logvar).mean()
    psnr = -10.0 * jnp.log10(mse / 4.0)
    return l1 + 4.0 * mse + 0.5 * edges + 2e-4 * kl, {"l1": l1, "kl": kl, "psnr": psnr}


def batch(i: int) -> np.ndarray:
    images, _ = shapes.examples(i * BATCH, BATCH)
    return images.astype(np.float32) / 127.5 - 1.0


def trained(workdir: Path, stage: Stage) -> Any:
    """EMA weights of a stage's newest checkpoint."""
    folder = workdir / stage.folder / "checkpoints"
    return load_subtree(folder, list_steps(folder)[-1], "ema")


def newest(workdir: Path) -> Any:
    """EMA weights of the stage that has come furthest."""
    return trained(workdir, DECODER if (workdir / DECODER.folder).exists() else BOTH)


def train(workdir: Path, stage: Stage, module: Any, params: Any) -> None:
    """Trains a stage from `params`, or from its newest checkpoint."""
    rate = optax.warmup_cosine_decay_schedule(0.0, stage.peak, 50, stage.steps, stage.peak / 100)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(rate, b2=0.99))
    step = make_step(lambda p, x, k: loss_fn(module, stage.frozen, p, x, k), optimizer, ema_decay=stage.ema)
    first = 0 if stage is BOTH else BOTH.steps  # images that the stage before did not see
    run(
        workdir / stage.folder,
        make_state(params, optimizer),
        step,
        lambda i: batch(first + i),
        stage.steps,
        save_every=200,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workdir", type=Path, required=True)
    args = parser.parse_args()
    module = vae.from_config(CONFIG)
    if not (args.workdir / DECODER.folder).exists():
        train(args.workdir, BOTH, module, jax.jit(module.init)(jax.random.key(0), jnp.zeros((1, 64, 64, 3)))["params"])
    train(args.workdir, DECODER, module, trained(args.workdir, BOTH))


if __name__ == "__main__":
    main()
