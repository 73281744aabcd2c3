"""Models from wherever they are: a diffusers folder, a hub repository, a single file, or one part of them."""

from collections.abc import Collection
from pathlib import Path

import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike

from lcm_jax import assets
from lcm_jax.errors import LcmError
from lcm_jax.models.unet import UNet2DConditionModel
from lcm_jax.pretrained import diffusers_folder, hub, single_file
from lcm_jax.pretrained.hub import is_single_file
from lcm_jax.pretrained.model import Config, Pipeline, PipelineParams, parts_read
from lcm_jax.pretrained.names import Params, PartChangeFn, PutFn


def load_pipeline(
    source: str | Path,
    variant: str | None = None,
    dtype: DTypeLike = jnp.float32,
    param_dtype: DTypeLike | None = jnp.float32,
    *,
    unet: str | Path | None = None,
    vae: str | Path | None = None,
    config: str | Path | None = None,
    put: PutFn | None = None,
    change: PartChangeFn | None = None,
    weights: bool | Collection[str] = True,
) -> tuple[Pipeline, PipelineParams]:
    """(pipeline, params) of a diffusers folder, or a single-file checkpoint, of the Stable Diffusion family.

    params: part -> parameter tree (numpy arrays, or whatever `put` returned), for the parts that the model has.

    Args:
      source: folder or hub id; or NAME.safetensors with the original key names (see `load_single_file`).
      variant: weights to read, e.g. "fp16", of every part that has them, as in diffusers; None: those without a suffix.
      dtype: compute dtype of the modules.
      param_dtype: dtype of the parameters, whatever the files hold; None: that in which the network uses each
        (`layers.dtypes_in_use`), which in 16 bits is half the memory for the same numbers.
      unet, vae: folders or hub ids of a UNet or VAE to use instead of the source's, which need not be there then; for
        the VAE also a file, in diffusers' names or the original's, that is read with the config of the source's own
        (`single_file_spellings.open_vae`), or the file of a TAESD (`taesd_file`).
      config: for a single file: folder or hub id with what it lacks, tokenizers and configs.
      put: takes each parameter as soon as it is read and converted, as `runtime.mesh.place` does to its shards; None:
        parameters stay on the host as numpy arrays.
      change: (part, path, float32 tensor) -> tensor, applied to each before it is rounded and put, to merge LoRAs.
      weights: False: only configs are read, and parameters are ShapeDtypeStructs. No weight file has to exist, and the
        configs of the published models come with the package (assets/architectures/hub.json). Names of parts
        (`ENCODERS`): only their weights are read, and the parameters of the others are ShapeDtypeStructs.

    Raises:
      LcmError: folder missing, incomplete, damaged or of another kind; each names the file and what to do.
      UnsupportedConfig: a config asks for something outside the Stable Diffusion family.
    """
    options = {"unet": unet, "vae": vae, "put": put, "change": change, "weights": weights}
    if is_single_file(source) and (known := _published(source, weights)):
        return diffusers_folder.load_folder(known, variant, dtype, param_dtype, **options)
    if is_single_file(source):
        return single_file.load_single_file(source, variant, dtype, param_dtype, config=config, **options)
    if config is not None:
        raise LcmError(f"config {config} is for a single .safetensors file, but {source} is a folder; leave it out")
    return diffusers_folder.load_folder(source, variant, dtype, param_dtype, **options)


def _published(source: str | Path, weights: bool | Collection[str]) -> Path | None:
    """If only configs are needed and the hub cannot be asked for a single file: the package's own configs of it."""
    if weights:
        return None
    try:
        hub.local_file(source)
    except LcmError:
        return assets.architecture(str(source))
    return None


def load_unet(
    source: str | Path,
    variant: str | None = None,
    dtype: DTypeLike = jnp.float32,
    param_dtype: DTypeLike = jnp.float32,
    *,
    put: PutFn | None = None,
    weights: bool = True,
    or_without: bool = False,
) -> tuple[UNet2DConditionModel, Params]:
    """(module, params) of a pipeline's `unet/`, or of a folder or hub repository that holds only a UNet, at its root.

    or_without: if it has no such variant, its weights without one are read.

    Other arguments and errors are those of `load_pipeline`.
    """
    read = parts_read(weights)
    return diffusers_folder.load_parts({"unet": source}, variant, dtype, param_dtype, put, read, or_without)["unet"]


def load_vae(
    source: str | Path,
    variant: str | None = None,
    dtype: DTypeLike = jnp.float32,
    param_dtype: DTypeLike = jnp.float32,
    *,
    put: PutFn | None = None,
    weights: bool = True,
) -> tuple[nn.Module, Params]:
    """(module, params) of a pipeline's `vae/`, of a folder or hub repository with a VAE alone, or of a TAESD's file.

    Arguments and errors are those of `load_pipeline`.
    """
    return diffusers_folder.load_parts({"vae": source}, variant, dtype, param_dtype, put, parts_read(weights))["vae"]


def read_record(source: str | Path, weights: bool = True) -> Config:
    """The `lcm_config.json` of a folder or hub repository, or what stands for it in a single file's header; else {}.

    weights: False: if the hub cannot be asked, the package's own configs are used.
    """
    if is_single_file(source):
        return single_file.read_record(source)
    return diffusers_folder.folder_record(source, weights)
