"""The embedded teacher's UNet and CLIP text encoder, trained together on the latents of the VAE.

v-prediction, mean squared error, t uniform; 10 % of the captions are "". An image that comes again is described in
other words. The text encoder learns through the UNet's cross-attention, which alone would take very long to teach it
what a word means that may stand anywhere, or not at all; so its states behind the caption's end also have to tell, by
linear heads that are thrown away, which word of each attribute the caption names (as CLIP's have to tell the image):

    loss = mean (v_theta - v)^2 + 0.05 sum over attributes of the heads' cross-entropies

Adam, EMA 0.999, in two legs. In the first the rate is 1.5e-3 and decays linearly from step 9,500 to 0 at 17,000. The
second takes the UNet and text encoder of the first one's EMA, with new moments and heads: 1e-3, decaying linearly from
step 4,000 to 0 at 9,000.

    python -m experiments.shapes_teacher.train_unet --workdir=/tmp/shapes_teacher
"""

import argparse
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.shapes_teacher import tokenizer, train_vae
from experiments.shapes_teacher.loop import make_state, make_step, noised, run
from lcm_jax.data import shapes
from lcm_jax.data.order import batch_indices
from lcm_jax.diffusion import schedule
from lcm_jax.models import clip, unet, vae
from lcm_jax.runtime.checkpoints import list_steps, load_subtree

SCHEDULER = {
    "_class_name": "DDIMScheduler",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
    "prediction_type": "v_prediction",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
    "timestep_spacing": "trailing",
}
TEXT = {
    "architectures": ["CLIPTextModel"],
    "vocab_size": tokenizer.VOCAB_SIZE,
    "hidden_size": 96,
    "intermediate_size": 192,
    "projection_dim": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": tokenizer.LENGTH,
    "hidden_act": "quick_gelu",
    "bos_token_id": 0,
    "eos_token_id": 2,
    "pad_token_id": 1,
}
UNET = {
    "sample_size": 8,
    "block_out_channels": [64, 128],
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "cross_attention_dim": 96,
    "attention_head_dim": 4,
}
EXAMPLES = 65_536
BATCH = 32
LEGS = {"unet": (1.5e-3, 9_500, 17_000), "unet_second": (1e-3, 4_000, 9_000)}  # rate, start of its decay, steps
BEHIND = 16  # positions from here on are behind the end of every caption
HEADS_WEIGHT = 0.05


def trained_vae(workdir: Path):
    """(module, EMA weights, scaling factor) of the newest VAE checkpoint; the factor gives latents unit variance."""
    module, params = vae.from_config(train_vae.CONFIG), train_vae.newest(workdir)
    images, _ = shapes.examples(0, 1024)
    mean, logvar = encoder(module)(params, images)
    factor = 1.0 / float(np.sqrt(np.var(mean) + np.exp(logvar).mean()))
    return module.clone(scaling_factor=round(factor, 5)), params


def encoder(module):
    return jax.jit(lambda p, x: module.apply({"params": p}, x.astype(jnp.float32) / 127.5 - 1.0, method="encode"))


def cache(workdir: Path) -> dict[str, np.ndarray]:
    """Scaled posterior moments of the training images; computed once, kept beside the run."""
    path = workdir / "latents.npz"
    if not path.exists():
        module, params = trained_vae(workdir)
        encode, parts = encoder(module), []
        for start in range(0, EXAMPLES, 256):
            mean, logvar = jax.device_get(encode(params, shapes.examples(start, 256)[0]))
            parts.append((mean * module.scaling_factor, np.exp(0.5 * logvar) * module.scaling_factor))
        mean, std = (np.concatenate(column) for column in zip(*parts, strict=True))
        np.savez(path, mean=mean.astype(np.float32), std=std.astype(np.float32))
    with np.load(path) as arrays:
        return dict(arrays)


def loss_fn(denoiser, text_encoder, noise_schedule, null_ids, params, batch, key):
    z_t, t, velocity, drop = noised(noise_schedule, batch, key)
    ids = jnp.where(drop[:, None], null_ids, batch["ids"])
    text = text_encoder.apply({"params": params["text_encoder"]}, ids).last_hidden_state
    v = denoiser.apply({"params": params["unet"]}, z_t, t, text)
    mse, read = jnp.square(v - velocity).mean(), 0.0
    for name, kernel in params["heads"].items():
        words = jnp.where(drop, 0, batch[name] + 1)  # 0: not named
        logits = text[:, BEHIND:] @ kernel
        read += optax.softmax_cross_entropy_with_integer_labels(logits, words[:, None]).mean()
    return mse + HEADS_WEIGHT * read, {"mse": mse, "heads": read}


def rate(peak: float, decay: int, steps: int) -> optax.Schedule:
    """Learning rate of a leg: 200 steps of warm-up, `peak` to step `decay`, then linearly to 0 at `steps`."""
    return lambda i: peak * jnp.minimum(1.0, (i + 1) / 200) * jnp.clip((steps - i) / (steps - decay), 0.0, 1.0)


def initial() -> dict[str, Any]:
    """New weights of the UNet, the text encoder and its heads."""
    denoiser, text_encoder = unet.from_config(UNET), clip.from_config(TEXT)
    keys = jax.random.split(jax.random.key(1))
    text = jax.jit(text_encoder.init)(keys[0], tokenizer.encode([""]))["params"]
    hidden = jnp.zeros((1, tokenizer.LENGTH, TEXT["hidden_size"]))
    net = jax.jit(denoiser.init)(keys[1], jnp.zeros((1, 8, 8, 4)), jnp.zeros(1), hidden)["params"]
    return {"unet": net, "text_encoder": text, "heads": heads()}


def heads() -> dict[str, jax.Array]:
    return {name: jnp.zeros((TEXT["hidden_size"], len(words) + 1)) for name, words in shapes.ATTRIBUTES.items()}


def newest(workdir: Path) -> dict[str, Any]:
    """EMA weights of the newest checkpoint of a leg."""
    checkpoints = workdir / "checkpoints"
    return load_subtree(checkpoints, list_steps(checkpoints)[-1], "ema")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workdir", type=Path, required=True)
    args = parser.parse_args()
    data, null_ids, params = cache(args.workdir), tokenizer.encode([""]), initial()
    loss = partial(loss_fn, unet.from_config(UNET), clip.from_config(TEXT), schedule.from_config(SCHEDULER), null_ids)

    def batch(i: int) -> dict[str, np.ndarray]:
        rows, epoch = batch_indices(0, i, BATCH, EXAMPLES), i * BATCH // EXAMPLES
        captions = [shapes.caption(shapes.spec(int(row), wording=epoch)) for row in rows]
        latents = {name: array[rows] for name, array in data.items()}
        return latents | shapes.label_arrays(captions) | {"ids": tokenizer.encode(captions)}

    first = 0  # batches go on where the leg before ended
    for seed, (name, (peak, decay, steps)) in enumerate(LEGS.items()):
        optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(rate(peak, decay, steps), b2=0.99))
        step = make_step(loss, optimizer, ema_decay=0.999)
        run(
            args.workdir / name,
            make_state(params, optimizer),
            step,
            lambda i, first=first: batch(first + i),
            steps,
            seed=seed,
            save_every=500,
        )
        params, first = newest(args.workdir / name) | {"heads": heads()}, first + steps


if __name__ == "__main__":
    main()
