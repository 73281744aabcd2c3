"""Reads pictures of the shapes set: which shape, colour, size, position and background a one-object picture shows.

A small convolutional classifier with one head per attribute on a common feature vector, trained on renders only
(experiments/shapes_teacher/train_scorer.py), never on samples. Two measures of sampled pictures follow from it:

    caption accuracy = share of pictures whose attributes, all five, are those of their caption
    Frechet distance = between the features of samples and those of held-out renders (metrics/frechet.py)

The features are the values that enter the last nonlinearity, so that they are not cut off at zero.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import pathlib
from collections.abc import Callable, Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from safetensors import SafetensorError

from lcm_jax import assets
from lcm_jax.data import shapes
from lcm_jax.errors import LcmError
from lcm_jax.runtime import kernels as compiler

ASSET = pathlib.Path(assets.__file__).resolve().parent / "shapes_scorer"
WEIGHTS_NAME = "model.safetensors"
CONFIG_NAME = "config.json"


class ShapesScorer(nn.Module):
    """Pictures [b 64 64 3] in [-1, 1] to (logits {attribute: [b classes]}, features [b feature_dim])."""

    channels: tuple[int, ...] = (24, 48, 64, 96)
    feature_dim: int = 64

    @nn.compact
    def __call__(self, images: jax.Array) -> tuple[dict[str, jax.Array], jax.Array]:
        # No normalisation at the first layer: the background's shade is an answer, not a nuisance.
        x = nn.gelu(nn.Conv(self.channels[0], (4, 4), strides=(2, 2), name="conv_in")(images))
        for level, width in enumerate(self.channels[1:]):
            x = nn.Conv(width, (3, 3), strides=(2, 2), name=f"down_{level}")(x)
            x = nn.gelu(nn.GroupNorm(num_groups=8, name=f"down_norm_{level}")(x))
            h = nn.GroupNorm(num_groups=8, name=f"norm_{level}")(nn.Conv(width, (3, 3), name=f"conv_{level}")(x))
            x = x + nn.gelu(h)
        x = x.reshape(x.shape[0], -1)  # keeps where things are
        features = nn.Dense(self.feature_dim, name="features")(x)
        h = nn.gelu(features)
        logits = {name: nn.Dense(len(words), name=f"head_{name}")(h) for name, words in shapes.ATTRIBUTES.items()}
        return logits, features


@dataclasses.dataclass(frozen=True)
class Scorer:
    """The module, its parameters (float32), and the stored config (widths, attribute words, measured accuracy)."""

    module: ShapesScorer
    params: Mapping
    config: Mapping


def load_scorer(folder: str | pathlib.Path = ASSET) -> Scorer:
    """The scorer stored in a folder; default: the one that comes with the package."""
    folder = pathlib.Path(folder)
    try:
        config = json.loads((folder / CONFIG_NAME).read_text())
        tensors = safetensors.numpy.load_file(folder / WEIGHTS_NAME)
    except (OSError, ValueError, SafetensorError) as error:
        raise LcmError(
            f"no readable scorer in {folder}: {error}; train one with experiments/shapes_teacher/train_scorer.py"
        ) from error
    stored = {name: tuple(words) for name, words in config["attributes"].items()}
    if stored != shapes.ATTRIBUTES:
        raise LcmError(
            f"the scorer in {folder} was trained for other attribute words than data/shapes.py has: "
            "train it again with experiments/shapes_teacher/train_scorer.py"
        )
    module = ShapesScorer(tuple(config["channels"]), config["feature_dim"])
    params: dict = {}
    for name, value in tensors.items():
        layer, leaf = name.split(".")
        params.setdefault(layer, {})[leaf] = value.astype(np.float32)
    want = jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, shapes.RESOLUTION, shapes.RESOLUTION, 3)))
    want_shapes = {f"{a}.{b}": v.shape for a, leaves in want["params"].items() for b, v in leaves.items()}
    wrong = sorted(
        k for k in want_shapes.keys() | tensors.keys() if k not in tensors or want_shapes.get(k) != tensors[k].shape
    )
    if wrong:
        raise LcmError(f"the scorer in {folder} has missing, unexpected or mis-shaped tensors: {', '.join(wrong)}")
    return Scorer(module, params, config)


def save_scorer(folder: str | pathlib.Path, scorer: Scorer) -> None:
    """Writes weights (float16) and config, each under its final name only when complete."""
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {
        f"{layer}.{leaf}": np.asarray(value, np.float16)
        for layer, leaves in scorer.params.items()
        for leaf, value in leaves.items()
    }
    config = {
        "_class_name": "ShapesScorer",
        "channels": list(scorer.module.channels),
        "feature_dim": scorer.module.feature_dim,
        "attributes": {name: list(words) for name, words in shapes.ATTRIBUTES.items()},
        **scorer.config,
    }
    for name, content in (
        (WEIGHTS_NAME, safetensors.numpy.save(tensors, {"format": "np"})),
        (CONFIG_NAME, (json.dumps(config, indent=2) + "\n").encode()),
    ):
        partial = folder / (name + ".partial")
        partial.write_bytes(content)
        partial.replace(folder / name)


def to_float(images: np.ndarray | jax.Array) -> jax.Array:
    """Pictures as float32 in [-1, 1]: from uint8 0..255, or from float in [-1, 1] (clipped)."""
    if images.dtype == np.uint8:
        return jnp.asarray(images).astype(jnp.float32) / 127.5 - 1.0
    return jnp.clip(jnp.asarray(images).astype(jnp.float32), -1.0, 1.0)


@functools.cache
def _compiled(module: ShapesScorer) -> Callable:
    """(params, pictures [b 64 64 3]) -> (logits {attribute: [b classes]}, features [b d]), jitted."""
    return jax.jit(
        lambda params, images: module.apply({"params": params}, to_float(images)), compiler_options=compiler.inference()
    )


def score(
    images: np.ndarray, scorer: Scorer | None = None, batch_size: int = 64
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Predicted class indices {attribute: int32 [n]} and features float32 [n d] of any number of pictures.

    Pictures [n 64 64 3], uint8 or float in [-1, 1]. The last batch is filled up, so one program serves all counts.
    """
    images = np.asarray(images)
    side = shapes.RESOLUTION
    if images.ndim != 4 or images.shape[0] == 0 or images.shape[1:] != (side, side, 3):
        raise LcmError(f"pictures of shape {images.shape}: the scorer reads [n {side} {side} 3]")
    if images.dtype != np.uint8 and not jnp.issubdtype(images.dtype, jnp.floating):
        raise LcmError(f"pictures of type {images.dtype}: give uint8 in 0..255 or float in [-1, 1]")
    scorer = scorer or _packaged()
    predicted: dict[str, list[np.ndarray]] = {name: [] for name in shapes.ATTRIBUTES}
    features = []
    for start in range(0, len(images), batch_size):
        part = images[start : start + batch_size]
        count = len(part)
        full = np.concatenate([part, np.repeat(part[-1:], batch_size - count, axis=0)])
        logits, f = _compiled(scorer.module)(scorer.params, full)
        features.append(np.asarray(f)[:count])
        for name, value in logits.items():
            predicted[name].append(np.asarray(value).argmax(-1)[:count].astype(np.int32))
    return {name: np.concatenate(v) for name, v in predicted.items()}, np.concatenate(features)


@functools.cache
def _packaged() -> Scorer:
    return load_scorer()


def _right(predicted: Mapping[str, np.ndarray], labels: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """{attribute: bool [n]}: is it read right. `predicted`: class indices [n] or logits [n classes]."""
    right = {}
    for name in shapes.ATTRIBUTES:
        p, want = np.asarray(predicted[name]), np.asarray(labels[name])
        p = p.argmax(-1) if p.ndim == 2 else p
        if p.shape != want.shape:
            raise LcmError(f"{p.shape[0]} predictions of {name} for {want.shape[0]} labels: give as many of both")
        right[name] = p == want
    return right


def caption_accuracy(predicted: Mapping[str, np.ndarray], labels: Mapping[str, np.ndarray]) -> float:
    """Share (0..1) of pictures with all attributes right; `predicted` holds class indices [n] or logits [n classes].

    `labels` as of `data.shapes.label_arrays`, which takes captions, too.
    """
    return float(np.mean(np.all(list(_right(predicted, labels).values()), axis=0)))


def attribute_accuracies(predicted: Mapping[str, np.ndarray], labels: Mapping[str, np.ndarray]) -> dict[str, float]:
    """Share (0..1) of pictures with this attribute right, for each attribute; arguments as `caption_accuracy`."""
    return {name: float(np.mean(r)) for name, r in _right(predicted, labels).items()}
