"""Scorer of shapes images: which shape, colour, size, position and background the image of one object shows.

A small convolutional classifier with one head per attribute on a common feature vector, trained on renders only
(experiments/shapes_teacher/train_scorer.py), never on samples. It gives two measures of generated images:

    caption accuracy = share of images that show every attribute that their caption names
    Frechet distance = between the features of generated images and those of held-out renders (metrics/distances.py)

The features are the inputs of the last nonlinearity, which would cut them off at zero.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors import SafetensorError

from lcm_jax import assets, foreign
from lcm_jax.data.shapes import ATTRIBUTES, RESOLUTION
from lcm_jax.errors import LcmError
from lcm_jax.files import write_atomic
from lcm_jax.metrics.networks.network import Network, filled
from lcm_jax.runtime import kernels

ASSET = Path(assets.__file__).resolve().parent / "shapes_scorer"
WEIGHTS_NAME, CONFIG_NAME = "model.safetensors", "config.json"


class ShapesScorer(nn.Module):
    """Images [b 64 64 3] in [-1, 1] -> (logits {attribute: [b classes]}, features [b feature_dim])."""

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
        x = x.reshape(x.shape[0], -1)  # unlike a mean, keeps positions
        features = nn.Dense(self.feature_dim, name="features")(x)
        h = nn.gelu(features)
        logits = {name: nn.Dense(len(words), name=f"head_{name}")(h) for name, words in ATTRIBUTES.items()}
        return logits, features


@dataclasses.dataclass(frozen=True)
class Scorer:
    """The module, its parameters (float32), and the stored config (widths, attribute words, measured accuracy)."""

    module: ShapesScorer
    params: Mapping[str, Any]
    config: Mapping[str, Any]


def load_scorer(folder: str | Path = ASSET) -> Scorer:
    """The scorer of a folder; default: the package's own. Raises LcmError if it is missing or does not fit."""
    folder = Path(folder)
    try:
        config = foreign.read_json(folder / CONFIG_NAME)
        tensors = safetensors.numpy.load_file(folder / WEIGHTS_NAME)
    except (OSError, LcmError, SafetensorError) as error:
        raise LcmError(
            f"no readable scorer in {folder}: {error}; train one with experiments/shapes_teacher/train_scorer.py"
        ) from error
    if {name: tuple(words) for name, words in config["attributes"].items()} != ATTRIBUTES:
        raise LcmError(
            f"the scorer in {folder} was trained for other attribute words than data/shapes.py has; train it again "
            "with experiments/shapes_teacher/train_scorer.py"
        )
    module = ShapesScorer(tuple(config["channels"]), config["feature_dim"])
    tree = jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, RESOLUTION, RESOLUTION, 3)))["params"]
    wanted = {name: leaf.shape for name, leaf in flatten_dict(tree, sep=".").items()}
    found = {name: value.shape for name, value in tensors.items()}
    if wrong := sorted(name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name)):
        raise LcmError(f"the scorer in {folder} has missing, unexpected or mis-shaped tensors: {', '.join(wrong)}")
    params = unflatten_dict({name: value.astype(np.float32) for name, value in tensors.items()}, sep=".")
    return Scorer(module, params, config)


def save_scorer(folder: str | Path, scorer: Scorer) -> None:
    """Writes weights (float16) and config."""
    tensors = {name: np.asarray(value, np.float16) for name, value in flatten_dict(scorer.params, sep=".").items()}
    config = {
        "_class_name": "ShapesScorer",
        "channels": list(scorer.module.channels),
        "feature_dim": scorer.module.feature_dim,
        "attributes": {name: list(words) for name, words in ATTRIBUTES.items()},
        **scorer.config,
    }
    write_atomic(Path(folder) / WEIGHTS_NAME, safetensors.numpy.save(tensors, {"format": "np"}))
    write_atomic(Path(folder) / CONFIG_NAME, json.dumps(config, indent=2) + "\n")


def load(path: str | Path | None, resize: str | None = None) -> Network:
    """The scorer as a network of features. Raises LcmError: as `load_scorer`; any `resize` but "none"."""
    if resize not in (None, "none"):
        raise LcmError(f"the shapes scorer does not resize images; resize={resize!r} must be left out")
    scorer = load_scorer(ASSET if path is None else path)
    name, dim = f"shapes-scorer/none-{RESOLUTION}", scorer.module.feature_dim
    return Network(name, dim, scorer.module, scorer.params, _prepare, "x / 127.5 - 1", _features)


def _prepare(images: np.ndarray) -> np.ndarray:
    height, width = images.shape[1:3]
    if (height, width) != (RESOLUTION, RESOLUTION):
        raise LcmError(f"images of {height} x {width}: the shapes scorer reads {RESOLUTION} x {RESOLUTION}")
    return images.astype(np.float32) / 127.5 - 1.0


def _features(output: tuple[dict[str, jax.Array], jax.Array]) -> jax.Array:
    return output[1]


def to_float(images: jax.Array) -> jax.Array:
    """uint8 0..255 as float32 in [-1, 1]."""
    return images.astype(jnp.float32) / 127.5 - 1.0


@functools.cache
def _program() -> Callable:
    """(module, params, images) -> its output, jitted. Not made at import: the compiler's options need a device."""

    @functools.partial(jax.jit, static_argnums=0, compiler_options=kernels.inference())
    def read(module: ShapesScorer, params: Any, images: jax.Array) -> tuple[dict[str, jax.Array], jax.Array]:
        return module.apply({"params": params}, to_float(images))

    return read


def score(
    images: np.ndarray, scorer: Scorer | None = None, batch_size: int = 64
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Predicted class indices {attribute: int32 [n]} and features float32 [n d] of images [n 64 64 3].

    Args:
      images: uint8. Floats are refused: whether they lie in [0, 1] or in [-1, 1] cannot be told from a few of them.
      scorer: None: the package's own.
      batch_size: images per call; the last call is padded, so that one program serves all n.

    Raises:
      LcmError: another shape or type.
    """
    images = np.asarray(images)
    if images.ndim != 4 or len(images) == 0 or images.shape[1:] != (RESOLUTION, RESOLUTION, 3):
        raise LcmError(f"images of shape {images.shape}: the scorer reads [n {RESOLUTION} {RESOLUTION} 3]")
    if images.dtype != np.uint8:
        raise LcmError(f"images of type {images.dtype}: give uint8 in 0..255, as sampling.png.to_uint8 makes them")
    scorer = scorer or _packaged()
    batches = [jax.device_get(_program()(scorer.module, scorer.params, part)) for part in filled(images, batch_size)]
    logits, features = jax.tree.map(lambda *parts: np.concatenate(parts)[: len(images)], *batches)
    return {name: value.argmax(-1).astype(np.int32) for name, value in logits.items()}, features


@functools.cache
def _packaged() -> Scorer:
    return load_scorer()


def caption_accuracy(predicted: Mapping[str, np.ndarray], labels: Mapping[str, np.ndarray]) -> float:
    """Share (0..1) of images with all named attributes right.

    Args:
      predicted: class indices [n] of each attribute.
      labels: class indices [n] of each attribute, -1 where it is not named (`data.shapes.label_arrays`).

    Raises:
      LcmError: the lengths differ.
    """
    return float(np.mean(all_right(predicted, labels)))


def all_right(predicted: Mapping[str, np.ndarray], labels: Mapping[str, np.ndarray]) -> np.ndarray:
    """Whether all named attributes of an image are right, bool [n]; as for `caption_accuracy`."""
    return np.all(list(_right(predicted, labels).values()), axis=0)


def attribute_accuracies(
    predicted: Mapping[str, np.ndarray], labels: Mapping[str, np.ndarray]
) -> dict[str, float | None]:
    """For each attribute the share (0..1) of images with it right among those whose caption names it, None for none.

    Arguments and errors as for `caption_accuracy`.
    """
    named = {name: np.asarray(labels[name]) >= 0 for name in ATTRIBUTES}
    return {
        name: float(np.mean(right[named[name]])) if named[name].any() else None
        for name, right in _right(predicted, labels).items()
    }


def _right(predicted: Mapping[str, np.ndarray], labels: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    right = {}
    for name in ATTRIBUTES:
        found, want = np.asarray(predicted[name]), np.asarray(labels[name])
        if found.shape != want.shape:
            raise LcmError(f"{found.shape[0]} predictions of {name} for {want.shape[0]} labels: give as many of both")
        right[name] = (found == want) | (want < 0)
    return right
