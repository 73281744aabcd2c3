"""Feature extractors: pictures [n h w 3] in [0, 1] to feature vectors [n d], by networks of the field or by our scorer.

    kind        features                                             dim    path
    inception   pool_3 of the FID Inception-v3 graph of 2015         2048   .pth or .safetensors file
    clip        projected picture embedding, not normalised          768..  CLIP folder in transformers format
    dinov2      normalised class token                               1024.. DINOv2 folder in transformers format
    shapes      what enters the scorer's last nonlinearity           64     folder of a scorer; None: the package's own

    pictures --round to 8 bits--> uint8 --prepare, on the host--> float32 [b s s 3] --network, on devices--> [b d]

A distance depends on how pictures are resized as much as on the network, so the resize variant is a part of the
extractor's name, and its hash covers weights and preprocessing. Networks run in float32 with full-precision products
on every platform: features must not depend on the card.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jax.sharding import Mesh

from lcm_jax.errors import LcmError
from lcm_jax.metrics.networks.network import Network
from lcm_jax.runtime import mesh as mesh_lib

KINDS = ("inception", "clip", "dinov2", "shapes")


@dataclasses.dataclass(frozen=True, eq=False)
class Extractor:
    """A function from pictures to features, with a name and a hash that say which function it is.

    Attributes:
      name: network and resize variant, to stand beside every number made with it.
      hash: sha256 (hex) over weights, preprocessing and name.
      dim: features per picture.
      batch_size: pictures per call of the network, over all devices.
    """

    name: str
    hash: str
    dim: int
    batch_size: int
    prepare: Callable[[np.ndarray], np.ndarray]
    run: Callable[[np.ndarray], jax.Array]

    def __call__(self, images: np.ndarray) -> np.ndarray:
        """Features float32 [n dim] of pictures [n h w 3]: float in [0, 1], rounded to 8 bits, or uint8.

        Batches are filled up with their last picture, so that one program serves any n >= 1.

        Raises:
          LcmError: shape or type is another, or values are outside [0, 1] or not finite.
        """
        images = to_bytes(images)
        pending = [self.run(self.prepare(part)) for part in filled(images, self.batch_size)]
        return np.concatenate([np.asarray(features, np.float32) for features in pending])[: len(images)]


def load_extractor(
    kind: str,
    path: str | Path | None = None,
    *,
    resize: str | None = None,
    mesh: Mesh | None = None,
    batch_size: int = 32,
) -> Extractor:
    """The extractor of a kind with weights from local files.

    Args:
      kind: one of `KINDS`.
      path: file or folder of weights, see the module's table. Only "shapes" goes without.
      resize: variant of preprocessing; None: the kind's first. inception: "tf1" (the original graph's bilinear),
        "pytorch" (pytorch-fid's bilinear), "clean" (clean-fid's antialiased bicubic). dinov2: "square" (dgm-eval),
        "processor" (the folder's preprocessor_config.json). clip: "processor", "cmmd". shapes: "none".
      mesh: devices that share each batch; None: the default device. The network is whole on every device.
      batch_size: pictures per call, raised to a multiple of the devices.

    Raises:
      LcmError: unknown kind or variant; weights missing (the error tells where to get them and their sha256), damaged,
        or of another network.
    """
    if kind not in KINDS:
        raise LcmError(f"feature extractor {kind!r} is unknown; choose one of {', '.join(KINDS)}")
    if batch_size < 1:
        raise LcmError(f"batch_size = {batch_size} pictures per call of the network: give at least 1")
    return make_extractor(_LOADERS[kind](path, resize), mesh, batch_size)


def make_extractor(network: Network, mesh: Mesh | None = None, batch_size: int = 32) -> Extractor:
    """`network` on the devices of `mesh` (None: the default device), compiled at the first call for each size."""
    mesh = one_device() if mesh is None else mesh
    batch_size = -(-batch_size // mesh.size) * mesh.size
    params = jax.device_put(dict(network.params), mesh_lib.replicated(mesh))

    def apply(params: Any, inputs: jax.Array) -> jax.Array:
        with jax.default_matmul_precision("highest"):
            return network.apply(params, inputs).astype(jnp.float32)

    # Replicated, so that every process of a multi-host run can read all features.
    compiled = jax.jit(apply, out_shardings=mesh_lib.replicated(mesh))
    digest = weights_hash(network)
    return Extractor(
        network.name,
        digest,
        network.dim,
        batch_size,
        network.prepare,
        lambda inputs: compiled(params, mesh_lib.spread(mesh, inputs)),
    )


def one_device() -> Mesh:
    return mesh_lib.make_mesh(devices=jax.local_devices()[:1])


def weights_hash(network: Network) -> str:
    """sha256 (hex) over name, preprocessing, and the path, shape and float32 bytes of every weight, in path order."""
    digest = hashlib.sha256(f"{network.name}\n{network.preprocessing}\n".encode())
    for path, leaf in sorted(traverse_util.flatten_dict(network.params, sep="/").items()):
        value = np.ascontiguousarray(leaf, np.dtype("<f4"))
        digest.update(f"{path} {value.shape}\n".encode())
        digest.update(value.data)
    return digest.hexdigest()


def to_bytes(images: np.ndarray) -> np.ndarray:
    """Pictures as uint8 [n h w 3]: from uint8, or from float in [0, 1], rounded as saving them would.

    Raises:
      LcmError: shape or type is another, or values are outside [0, 1] or not finite.
    """
    images = np.asarray(images)
    if images.ndim != 4 or images.shape[-1] != 3 or 0 in images.shape:
        raise LcmError(f"pictures of shape {list(images.shape)}: give [n h w 3] with n at least 1")
    if images.dtype == np.uint8:
        return images
    if not jnp.issubdtype(images.dtype, jnp.floating):
        raise LcmError(f"pictures of type {images.dtype}: give float in [0, 1] or uint8")
    images = images.astype(np.float32)
    low, high = images.min(), images.max()
    if not (low >= -1e-3 and high <= 1 + 1e-3):  # also false where NaN
        raise LcmError(f"pictures with values from {low:.3g} to {high:.3g}: give float in [0, 1], or uint8")
    return np.round(np.clip(images, 0, 1) * 255).astype(np.uint8)


def filled(images: np.ndarray, batch_size: int) -> Iterator[np.ndarray]:
    """Rows [n ...] in parts of `batch_size`, the last filled up with copies of its last row."""
    for start in range(0, len(images), batch_size):
        part = images[start : start + batch_size]
        yield np.concatenate([part, np.repeat(part[-1:], batch_size - len(part), axis=0)])


def _inception(path: str | Path | None, resize: str | None) -> Network:
    from lcm_jax.metrics.networks import inception

    return inception.load(path, resize)


def _clip(path: str | Path | None, resize: str | None) -> Network:
    from lcm_jax.metrics.networks import clip

    return clip.load(path, resize)


def _dinov2(path: str | Path | None, resize: str | None) -> Network:
    from lcm_jax.metrics.networks import dinov2

    return dinov2.load(path, resize)


def _shapes(path: str | Path | None, resize: str | None) -> Network:
    from lcm_jax.data.shapes import RESOLUTION
    from lcm_jax.metrics.networks import shapes as shapes_scorer

    if resize not in (None, "none"):
        raise LcmError(f"the shapes scorer reads pictures as they are; resize={resize!r} must be left out")
    scorer = shapes_scorer.load_scorer(shapes_scorer.ASSET if path is None else path)
    side = RESOLUTION

    def prepare(images: np.ndarray) -> np.ndarray:
        height, width = images.shape[1:3]
        if (height, width) != (side, side):
            raise LcmError(f"pictures of {height} x {width}: the shapes scorer reads {side} x {side}")
        return images.astype(np.float32) / 127.5 - 1.0

    def apply(params: Any, inputs: jax.Array) -> jax.Array:
        return scorer.module.apply({"params": params}, inputs)[1]

    dim = scorer.module.feature_dim
    return Network(f"shapes-scorer/none-{side}", dim, prepare, apply, scorer.params, "x / 127.5 - 1")


_LOADERS = {"inception": _inception, "clip": _clip, "dinov2": _dinov2, "shapes": _shapes}
