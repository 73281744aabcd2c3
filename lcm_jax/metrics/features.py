"""Feature extractors: images [n h w 3] -> feature vectors [n d], by published networks or by our scorer of shapes.

    kind        features                                             dim    path
    inception   pool_3 of the FID Inception-v3 graph of 2015         2048   .pth or .safetensors file
    clip        projected image embedding, not normalised            768..  CLIP folder in transformers format
    dinov2      normalised class token                               1024.. DINOv2 folder in transformers format
    shapes      input of the scorer's last nonlinearity              64     folder of a scorer; None: the package's own

    images --round to 8 bits--> uint8 --prepare, on the host--> float32 [b s s 3] --network, on devices--> [b d]

A distance depends on how images are resized as much as on the network. So the resize variant is part of an extractor's
name, and its hash covers weights, config and preprocessing. Networks run in float32 with full-precision products on
every platform: features must not depend on the card.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jax.sharding import Mesh

from lcm_jax.errors import LcmError
from lcm_jax.metrics.networks import clip, dinov2, inception, shapes
from lcm_jax.metrics.networks.network import Network, filled
from lcm_jax.runtime.mesh import make_mesh, replicated, spread

KINDS = {"inception": inception.load, "clip": clip.load, "dinov2": dinov2.load, "shapes": shapes.load}


@dataclasses.dataclass(frozen=True, eq=False)
class Extractor:
    """A function from images to features, with a name and a hash that identify it.

    Attributes:
      network: its weights are on the devices of `mesh`.
      mesh: devices that share each batch. The network is whole on every device.
      batch_size: images per call of the network, over all devices.
      hash: sha256 (hex) of weights, config, preprocessing and name.
    """

    network: Network
    mesh: Mesh
    batch_size: int
    hash: str

    @property
    def name(self) -> str:
        """Network and resize variant, to stand beside every number made with it."""
        return self.network.name

    @property
    def dim(self) -> int:
        return self.network.dim

    def __call__(self, images: np.ndarray) -> np.ndarray:
        """Features float32 [n dim] of images [n h w 3]: float in [0, 1], rounded to 8 bits, or uint8; n >= 1.

        Raises:
          LcmError: another shape or type, or values that are outside [0, 1] or not finite.
        """
        return self.features(to_bytes(images))

    def features(self, rows: np.ndarray) -> np.ndarray:
        """Features float32 [n dim] of rows [n ...] that the network's `prepare` takes."""
        network, program = self.network, _program(self.mesh)
        pending = [
            program(network.module, network.select, network.params, spread(self.mesh, network.prepare(part)))
            for part in filled(rows, self.batch_size)  # one shape, hence one program for any n
        ]
        return np.concatenate([np.asarray(part) for part in pending])[: len(rows)]


@functools.lru_cache
def _program(mesh: Mesh) -> Callable[..., jax.Array]:
    """(module, select, params, inputs) -> features, jitted for a mesh.

    Weights are an argument and what is static is equal by content: a second network of an architecture compiles
    nothing, and the weights of an extractor that is no longer used are freed.
    """

    # Replicated, so that every process of a multi-host run can read all features.
    @functools.partial(jax.jit, static_argnums=(0, 1), out_shardings=replicated(mesh))
    def features(module: Any, select: Any, params: Any, inputs: jax.Array) -> jax.Array:
        with jax.default_matmul_precision("highest"):
            return select(module.apply({"params": params}, inputs)).astype(jnp.float32)

    return features


def load_extractor(
    kind: str,
    path: str | Path | None = None,
    *,
    resize: str | None = None,
    mesh: Mesh | None = None,
    batch_size: int = 32,
) -> Extractor:
    """The extractor of a kind, with weights from local files.

    Args:
      kind: one of `KINDS`.
      path: file or folder of weights, see the module's table. Only "shapes" needs none.
      resize: variant of preprocessing; None: the kind's first. inception: "tf1" (the original graph's bilinear),
        "pytorch" (pytorch-fid's bilinear), "clean" (clean-fid's antialiased bicubic). dinov2: "square" (dgm-eval),
        "processor" (the folder's preprocessor_config.json). clip: "processor", "cmmd". shapes: "none".
      mesh: devices that share each batch; None: the default device.
      batch_size: images per call, raised to a multiple of the devices.

    Raises:
      LcmError: unknown kind or variant; weights that are missing (the error names their source and sha256), damaged,
        or of another network.
    """
    if kind not in KINDS:
        raise LcmError(f"feature extractor {kind!r} is unknown; choose one of {', '.join(KINDS)}")
    if batch_size < 1:
        raise LcmError(f"batch_size = {batch_size} images per call of the network: give at least 1")
    return make_extractor(KINDS[kind](path, resize), mesh, batch_size)


def make_extractor(network: Network, mesh: Mesh | None = None, batch_size: int = 32) -> Extractor:
    """`network` on the devices of `mesh` (None: the default device), compiled at the first call for each size."""
    mesh = make_mesh(devices=jax.local_devices()[:1]) if mesh is None else mesh
    params = jax.device_put(dict(network.params), replicated(mesh))
    batch_size = -(-batch_size // mesh.size) * mesh.size
    return Extractor(dataclasses.replace(network, params=params), mesh, batch_size, weights_hash(network))


def weights_hash(network: Network) -> str:
    """sha256 (hex) of name, preprocessing, and the path, shape and float32 bytes of every weight, in path order."""
    digest = hashlib.sha256(f"{network.name}\n{network.preprocessing}\n".encode())
    for path, leaf in sorted(traverse_util.flatten_dict(network.params, sep="/").items()):
        value = np.ascontiguousarray(leaf, np.dtype("<f4"))
        digest.update(f"{path} {value.shape}\n".encode())
        digest.update(value.data)
    return digest.hexdigest()


def to_bytes(images: np.ndarray) -> np.ndarray:
    """Images as uint8 [n h w 3]: uint8 as it is, float in [0, 1] rounded as by saving it.

    Raises:
      LcmError: another shape or type, or values that are outside [0, 1] or not finite.
    """
    images = np.asarray(images)
    if images.ndim != 4 or images.shape[-1] != 3 or 0 in images.shape:
        raise LcmError(f"images of shape {list(images.shape)}: give [n h w 3] with n at least 1")
    if images.dtype == np.uint8:
        return images
    if not jnp.issubdtype(images.dtype, jnp.floating):
        raise LcmError(f"images of type {images.dtype}: give float in [0, 1] or uint8")
    images = images.astype(np.float32)
    low, high = images.min(), images.max()
    if not (low >= -1e-3 and high <= 1 + 1e-3):  # also false for NaN
        raise LcmError(f"images with values from {low:.3g} to {high:.3g}: give float in [0, 1], or uint8")
    return np.round(np.clip(images, 0, 1) * 255).astype(np.uint8)
