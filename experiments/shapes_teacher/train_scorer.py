"""Trains the scorer of shapes images (lcm_jax/metrics/networks/shapes.py) on renders of the train split.

    python -m experiments.shapes_teacher.train_scorer --out=lcm_jax/assets/shapes_scorer

Samples and VAE reconstructions are softer than renders, so a training image may be blurred (Gaussian, or by dropping
the high frequencies of 8 x 8 blocks as strong JPEG compression does), and gets fine and coarse noise and a small change
of brightness and contrast. The scorer never sees a sampled image. The sum of the heads' cross-entropies is minimised by
AdamW. Accuracies of the stored weights (float16) on the held-out split are printed and kept in the config.
"""

import argparse
import functools
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lcm_jax.data import shapes
from lcm_jax.ending import exit_code
from lcm_jax.metrics import distances as frechet
from lcm_jax.metrics.networks import shapes as shapes_scorer

BLUR_MAX = 1.6  # pixels, standard deviation


def block_lowpass() -> np.ndarray:
    """[6 64 64]: projections onto the first 8, 7, .. 3 cosine modes of each run of eight pixels."""
    n = np.arange(8)
    modes = np.cos(np.pi * (n[None] + 0.5) * n[:, None] / 8)
    modes /= np.linalg.norm(modes, axis=1, keepdims=True)
    return np.stack([np.kron(np.eye(8), modes[:k].T @ modes[:k]) for k in (8, 7, 6, 5, 4, 3)]).astype(np.float32)


def augment(key: jax.Array, images: jax.Array) -> jax.Array:
    """Softer, noisier images [b 64 64 3] in [-1, 1]; one in four keeps its sharpness."""
    keys = jax.random.split(key, 9)
    b, side = images.shape[0], images.shape[1]
    sigma = 0.05 + BLUR_MAX * jax.random.uniform(keys[0], (b, 1, 1)) * (jax.random.uniform(keys[1], (b, 1, 1)) < 0.5)
    gap = jnp.arange(side)[:, None] - jnp.arange(side)[None]
    blur = jnp.exp(-0.5 * (gap / sigma) ** 2)
    blur /= blur.sum(-1, keepdims=True)
    kept = jax.random.randint(keys[2], (b,), 0, 6) * (jax.random.uniform(keys[3], (b,)) < 0.5)
    soften = jnp.asarray(block_lowpass())[kept] @ blur
    x = jnp.einsum("bij,bjkc,blk->bilc", soften, images, soften)
    fine = jax.random.normal(keys[4], x.shape) * 0.08 * jax.random.uniform(keys[5], (b, 1, 1, 1))
    coarse = jax.image.resize(jax.random.normal(keys[6], (b, 8, 8, 3)), x.shape, "linear")
    coarse *= 0.08 * jax.random.uniform(keys[7], (b, 1, 1, 1))
    gain, shift = jax.random.uniform(keys[8], (2, b, 1, 1, 1), minval=-0.04, maxval=0.04)
    return jnp.clip((1.0 + gain) * x + shift + fine + coarse, -1.0, 1.0)


def cross_entropy(module, params, images, labels) -> jax.Array:
    logits, _ = module.apply({"params": params}, images)
    return sum(optax.softmax_cross_entropy_with_integer_labels(logits[k], labels[k]).mean() for k in labels)


def evaluate(scorer: shapes_scorer.Scorer, count: int) -> dict:
    """Accuracies on `count` held-out renders, sharp and softened, and a Frechet distance between renders."""
    specs = [shapes.spec(i, "heldout") for i in range(count)]
    images, labels = shapes.render_batch(specs), shapes.label_arrays(specs)
    parts = (augment(jax.random.key(i), shapes_scorer.to_float(images[i : i + 128])) for i in range(0, count, 128))
    soft = np.concatenate([np.rint((np.asarray(part) + 1.0) * 127.5).astype(np.uint8) for part in parts])
    read, features = shapes_scorer.score(images, scorer)
    read_soft, _ = shapes_scorer.score(soft, scorer)
    _, others = shapes_scorer.score(shapes.examples(count, count, "heldout")[0], scorer)
    return {
        "split": "heldout",
        "count": count,
        "all": shapes_scorer.caption_accuracy(read, labels),
        "attributes": shapes_scorer.attribute_accuracies(read, labels),
        "all_softened": shapes_scorer.caption_accuracy(read_soft, labels),
        "frechet_between_renders": frechet.frechet_distance(features, others),
    }


def train(args) -> shapes_scorer.Scorer:
    module = shapes_scorer.ShapesScorer()
    side = shapes.RESOLUTION
    params = jax.jit(module.init)(jax.random.key(args.seed), jnp.zeros((1, side, side, 3)))["params"]
    rate = optax.warmup_cosine_decay_schedule(0.0, args.learning_rate, args.steps // 20, args.steps)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(rate, weight_decay=1e-2))

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params, state, key, images, labels):
        x = augment(key, shapes_scorer.to_float(images))
        loss, gradient = jax.value_and_grad(functools.partial(cross_entropy, module))(params, x, labels)
        updates, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, updates), state, loss

    state = optimizer.init(params)
    start, start_cpu, losses = time.perf_counter(), time.process_time(), []
    for n in range(args.steps):
        specs = [shapes.spec(i, "train") for i in range(n * args.batch_size, (n + 1) * args.batch_size)]
        key = jax.random.fold_in(jax.random.key(args.seed + 1), n)
        params, state, loss = step(params, state, key, shapes.render_batch(specs), shapes.label_arrays(specs))
        losses.append(float(loss))
        if (n + 1) % 50 == 0:
            seconds = time.perf_counter() - start
            print(f"step {n + 1}/{args.steps}  loss {np.mean(losses[-50:]):.4f}  {seconds:.0f} s", flush=True)
    seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - start_cpu
    # As stored: through float16.
    params = jax.tree.map(lambda p: np.asarray(p, np.float16).astype(np.float32), jax.device_get(params))
    curve = [round(float(np.mean(losses[i : i + 50])), 4) for i in range(0, args.steps, 50)]
    training = {
        "steps": args.steps,
        "batch_size": args.batch_size,
        "learning_rate": args.learning_rate,
        "seed": args.seed,
        "seconds": round(seconds),
        "cpu_seconds": round(cpu_seconds),
        "loss_every_50": curve,
    }
    scorer = shapes_scorer.Scorer(module, params, {})
    return shapes_scorer.Scorer(module, params, {"accuracy": evaluate(scorer, args.eval_count), "training": training})


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", default=str(shapes_scorer.ASSET), help="folder to write")
    parser.add_argument("--steps", type=int, default=2500)
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--learning_rate", type=float, default=2e-3)
    parser.add_argument("--eval_count", type=int, default=2000, help="held-out renders to measure on")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    scorer = train(args)
    print(scorer.config["accuracy"])
    shapes_scorer.save_scorer(args.out, scorer)
    return 0


if __name__ == "__main__":
    sys.exit(exit_code(main))
