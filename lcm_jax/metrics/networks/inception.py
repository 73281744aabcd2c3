"""Inception-v3 as FID has used it since 2017: TensorFlow's graph of 2015-12-05 up to pool_3, 2048 features.

Names and shapes are those of the torch ports (pytorch-fid, torch-fidelity), whose weight file is read. This graph
differs from torchvision's Inception-v3 (Szegedy et al. 2015, arXiv:1512.00567):

    average pools leave the zeros at the border out of the mean;  Mixed_7c pools by maximum, not by mean
    inputs are (x - 128) / 128 of x in 0..255

The resize to 299 x 299 is part of the metric (resize variants):

    tf1       bilinear, source position i * in / out, no antialiasing: the original graph, torch-fidelity
    pytorch   bilinear, pixel centres, no antialiasing, inputs 2 x - 1 of x in 0..1: pytorch-fid
    clean     antialiased bicubic of Pillow in floating point (Parmar et al. 2022, arXiv:2104.11222): clean-fid
"""

from __future__ import annotations

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from lcm_jax.metrics import resizing
from lcm_jax.metrics.networks import torch_file, weights
from lcm_jax.metrics.networks.network import Network, resize_variant
from lcm_jax.pretrained.safetensors_io import open_file

SIDE, DIM = 299, 2048
NORM_EPS = 1e-3

# One convolution with norm and ReLU: (name, features, (kernel height, width), stride). Stride 1 keeps the size.
Unit = tuple[str, int, tuple[int, int], int]


def _unit(name: str, features: int, kernel: int | tuple[int, int] = 1, stride: int = 1) -> Unit:
    return name, features, (kernel, kernel) if isinstance(kernel, int) else kernel, stride


def _chain(name: str, *units: tuple) -> tuple[Unit, ...]:
    """Units NAME_1, NAME_2, ... one after another."""
    return tuple(_unit(f"{name}_{i}", *unit) for i, unit in enumerate(units, 1))


class BatchNorm(nn.Module):
    """(x - mean) / sqrt(var + eps) * scale + bias with stored mean and variance, all of them parameters."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        c, ones, zeros = (x.shape[-1],), nn.initializers.ones, nn.initializers.zeros
        scale, bias = self.param("scale", ones, c), self.param("bias", zeros, c)
        mean, var = self.param("mean", zeros, c), self.param("var", ones, c)
        return (x - mean) * (scale * jax.lax.rsqrt(var + NORM_EPS)) + bias


class ConvNorm(nn.Module):
    """Convolution without bias, batch norm, ReLU: [b h w c] -> [b h' w' features]."""

    features: int
    kernel: tuple[int, int]
    stride: int = 1
    same: bool = True

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        padding = [((k - 1) // 2 if self.same else 0,) * 2 for k in self.kernel]
        conv = nn.Conv(self.features, self.kernel, (self.stride,) * 2, padding=padding, use_bias=False, name="conv")
        return nn.relu(BatchNorm(name="bn")(conv(x)))


def _apply(unit: Unit, x: jax.Array) -> jax.Array:
    name, features, kernel, stride = unit
    return ConvNorm(features, kernel, stride, same=stride == 1, name=name)(x)


class Mixed(nn.Module):
    """Branches side by side, joined along channels: chains of units, then the pool.

    Attributes:
      branches: each a chain of units; if its last entry is a pair of units, both are applied and joined.
      pool: "mean" or "max" of 3 x 3 with stride 1, before the unit `branch_pool`; "shrink": max with stride 2, alone.
      pool_features: of `branch_pool`.
    """

    branches: tuple[tuple, ...]
    pool: str
    pool_features: int = 0

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        outputs = []
        for chain in self.branches:
            y = x
            for unit in chain:
                heads = unit if isinstance(unit[0], tuple) else (unit,)
                y = jnp.concatenate([_apply(head, y) for head in heads], axis=-1)
            outputs.append(y)
        if self.pool == "shrink":
            outputs.append(nn.max_pool(x, (3, 3), (2, 2)))
        else:
            average = functools.partial(nn.avg_pool, count_include_pad=False)
            y = (average if self.pool == "mean" else nn.max_pool)(x, (3, 3), padding="SAME")
            outputs.append(_apply(_unit("branch_pool", self.pool_features), y))
        return jnp.concatenate(outputs, axis=-1)


def _a(name: str, pool_features: int) -> Mixed:
    five, three = _chain("branch5x5", (48,), (64, 5)), _chain("branch3x3dbl", (64,), (96, 3), (96, 3))
    return Mixed(((_unit("branch1x1", 64),), five, three), "mean", pool_features, name=name)


def _b(name: str) -> Mixed:
    return Mixed(
        ((_unit("branch3x3", 384, 3, 2),), _chain("branch3x3dbl", (64,), (96, 3), (96, 3, 2))), "shrink", name=name
    )


def _c(name: str, c7: int) -> Mixed:
    row, column = (1, 7), (7, 1)
    seven = _chain("branch7x7", (c7,), (c7, row), (192, column))
    double = _chain("branch7x7dbl", (c7,), (c7, column), (c7, row), (c7, column), (192, row))
    return Mixed(((_unit("branch1x1", 192),), seven, double), "mean", 192, name=name)


def _d(name: str) -> Mixed:
    three = _chain("branch3x3", (192,), (320, 3, 2))
    seven = _chain("branch7x7x3", (192,), (192, (1, 7)), (192, (7, 1)), (192, 3, 2))
    return Mixed((three, seven), "shrink", name=name)


def _e(name: str, pool: str) -> Mixed:
    def split(name: str) -> tuple[Unit, Unit]:
        return _unit(f"{name}a", 384, (1, 3)), _unit(f"{name}b", 384, (3, 1))

    three = *_chain("branch3x3", (384,)), split("branch3x3_2")
    double = *_chain("branch3x3dbl", (448,), (384, 3)), split("branch3x3dbl_3")
    return Mixed(((_unit("branch1x1", 320),), three, double), pool, 192, name=name)


class FIDInception(nn.Module):
    """Normalised images [b h w 3] -> pool_3 features [b 2048]; 299 x 299 in the metric, any size from 75 works."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = ConvNorm(32, (3, 3), 2, same=False, name="Conv2d_1a_3x3")(x)
        x = ConvNorm(32, (3, 3), same=False, name="Conv2d_2a_3x3")(x)
        x = ConvNorm(64, (3, 3), name="Conv2d_2b_3x3")(x)
        x = nn.max_pool(x, (3, 3), (2, 2))
        x = ConvNorm(80, (1, 1), name="Conv2d_3b_1x1")(x)
        x = ConvNorm(192, (3, 3), same=False, name="Conv2d_4a_3x3")(x)
        x = nn.max_pool(x, (3, 3), (2, 2))
        for block in (
            *(_a("Mixed_5b", 32), _a("Mixed_5c", 64), _a("Mixed_5d", 64)),
            *(_b("Mixed_6a"), _c("Mixed_6b", 128), _c("Mixed_6c", 160), _c("Mixed_6d", 160), _c("Mixed_6e", 192)),
            *(_d("Mixed_7a"), _e("Mixed_7b", "mean"), _e("Mixed_7c", "max")),
        ):
            x = block(x)
        return x.mean((1, 2))


def _tf1(images: np.ndarray) -> np.ndarray:
    return (resizing.bilinear(images, SIDE, centres=False) - 128) / 128


def _pytorch(images: np.ndarray) -> np.ndarray:
    return resizing.bilinear(images, SIDE, centres=True) / 127.5 - 1


def _clean(images: np.ndarray) -> np.ndarray:
    return (resizing.bicubic_float(images, SIDE) - 128) / 128


# variant -> (part of the network's name, function, the same in words for the hash)
RESIZES = {
    "tf1": ("tf1-bilinear", _tf1, "tf1 bilinear 299; (x - 128) / 128"),
    "pytorch": ("pytorch-bilinear", _pytorch, "half-pixel bilinear 299; x / 127.5 - 1"),
    "clean": ("clean-bicubic", _clean, "pillow bicubic float 299, clipped; (x - 128) / 128"),
}


def load(path: str | Path | None, resize: str | None = None) -> Network:
    """The network with the weights of a file: the published .pth, or the same tensors as .safetensors.

    Raises:
      LcmError: no such file or variant, a damaged file, or another network's.
    """
    label, prepare, words = RESIZES[resize_variant("inception", resize, RESIZES)]
    params = read(weights.existing("inception", path))
    return Network(f"inception-2015/{label}-{SIDE}", DIM, FIDInception(), params, prepare, words)


def read(path: Path) -> dict:
    """The parameter tree of a .pth or .safetensors file with the torch ports' keys; the classifier is left out."""
    weights.check_named_hash("inception", path)
    table = weights.torch_table(FIDInception(), (1, 75, 75, 3))
    if path.suffix == ".safetensors":
        with open_file(path) as stored:
            return weights.read_params(table, _used(stored.shapes), stored.read, str(path))
    tensors = torch_file.read(path)
    return weights.read_params(table, _used({k: v.shape for k, v in tensors.items()}), tensors.__getitem__, str(path))


def _used(shapes: dict) -> dict:
    """Without the classifier over 1008 classes and the counters of training batches."""
    return {
        key: tuple(shape)
        for key, shape in shapes.items()
        if not key.startswith("fc.") and not key.endswith(".num_batches_tracked")
    }
