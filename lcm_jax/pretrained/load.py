"""Models from wherever they are: a diffusers folder, a hub repository, a single file, or one part of them."""

from collections.abc import Collection
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from flax import linen as nn

from lcm_jax import files
from lcm_jax.errors import LcmError
from lcm_jax.models import unet
from lcm_jax.pretrained import diffusers_folder, hub, names, single_file
from lcm_jax.pretrained.model import RECORD, Config, Pipeline, PipelineParams

Dtype = Any


def load_pipeline(
    source: str | Path,
    variant: str | None = None,
    dtype: Dtype = jnp.float32,
    param_dtype: Dtype = jnp.float32,
    *,
    unet: str | Path | None = None,
    vae: str | Path | None = None,
    config: str | Path | None = None,
    place: names.Place | None = None,
    weights: bool | Collection[str] = True,
) -> tuple[Pipeline, PipelineParams]:
    """(pipeline, params) of a diffusers folder, or a single-file checkpoint, of the Stable Diffusion family.

    params: part -> parameter tree (numpy on the host, or whatever `place` returned), for the parts that there are.

    Args:
      source: folder or hub id; or NAME.safetensors with the original key names (see `load_single_file`).
      variant: weights to take, e.g. "fp16"; None: those without a suffix.
      dtype: compute dtype of the modules.
      param_dtype: dtype of the parameters, whatever the files hold.
      unet, vae: folders or hub ids whose UNet or VAE takes the place of the source's, which is then not even read.
      config: for a single file: folder or hub id with what it lacks, tokenizers and configs.
      place: takes each parameter as soon as it is read and converted, as `runtime.mesh.place` to its shards; None:
        parameters stay on the host as numpy arrays.
      weights: False: configs alone are read, parameters are ShapeDtypeStructs. No weight file has to exist, and the
        configs of the published models come with the package (assets/architectures/hub.json). Names of parts
        (`ENCODERS`): those alone are read, the parameters of the others are ShapeDtypeStructs.

    Raises:
      LcmError: folder missing, incomplete, damaged or of another kind; each names the file and the remedy.
      UnsupportedConfig: a config asks for something outside the Stable Diffusion family.
    """
    if single_file.is_single_file(source):
        return single_file.load_single_file(
            source, variant, dtype, param_dtype, config=config, unet=unet, vae=vae, place=place, weights=weights
        )
    if config is not None:
        raise LcmError(f"config {config} goes with a single .safetensors file; {source} has its own, leave config out")
    return diffusers_folder.load_folder(
        source, variant, dtype, param_dtype, unet=unet, vae=vae, place=place, weights=weights
    )


def load_unet(
    source: str | Path,
    variant: str | None = None,
    dtype: Dtype = jnp.float32,
    param_dtype: Dtype = jnp.float32,
    *,
    place: names.Place | None = None,
    weights: bool = True,
) -> tuple[unet.UNet2DConditionModel, names.Params]:
    """(module, params) of a pipeline's `unet/`, or of a folder or hub repository that holds only a UNet, at its root.

    place, weights: as `load_pipeline`'s.

    Raises: as `load_pipeline`.
    """
    return diffusers_folder.load_part("unet", source, variant, dtype, param_dtype, place, weights)


def load_vae(
    source: str | Path,
    variant: str | None = None,
    dtype: Dtype = jnp.float32,
    param_dtype: Dtype = jnp.float32,
    *,
    place: names.Place | None = None,
    weights: bool = True,
) -> tuple[nn.Module, names.Params]:
    """(module, params) of a pipeline's `vae/`, or of a folder or hub repository that holds only a VAE, at its root.

    place, weights: as `load_pipeline`'s.

    Raises: as `load_pipeline`.
    """
    return diffusers_folder.load_part("vae", source, variant, dtype, param_dtype, place, weights)


def read_record(source: str | Path) -> Config:
    """What the `lcm_config.json` of a folder, hub repository or single file says of its distillation; else {}."""
    if single_file.is_single_file(source):
        return single_file.read_record(source)
    path = hub.local_folder(source, [RECORD]) / RECORD
    return files.read_json(path) if path.is_file() else {}
