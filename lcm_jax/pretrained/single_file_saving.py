"""Writing single-file checkpoints: the names of `single_file`, one tensor at a time, without torch."""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from absl import logging

from lcm_jax import files
from lcm_jax.diffusion import guidance, schedule
from lcm_jax.errors import LcmError, UnsupportedConfig
from lcm_jax.models import clip
from lcm_jax.models.config import to_config
from lcm_jax.pretrained import safetensors_io as weight_files
from lcm_jax.pretrained import single_file_keys as keys
from lcm_jax.pretrained.diffusers_folder import names_of_parts
from lcm_jax.pretrained.model import Config, Pipeline, PipelineParams
from lcm_jax.pretrained.names import Shape
from lcm_jax.pretrained.single_file import FAMILIES, SUFFIX, Family, layouts, published_scheduler

_SLACK = 1 << 20  # bytes for the header and the file system's own rounding
# modelspec.architecture of the Stability AI model specification, by family (SD 2.x: and prediction type).
_ARCHITECTURES = {
    "sdxl": "stable-diffusion-xl-v1-base",
    "sdxl-refiner": "stable-diffusion-xl-v1-refiner",
    "sd1": "stable-diffusion-v1",
    "sd2": "stable-diffusion-v2-512",
    "sd2 v_prediction": "stable-diffusion-v2-768-v",
}


def fold_w(pipeline: Pipeline, params: PipelineParams, w: float) -> tuple[Pipeline, PipelineParams]:
    """The same model at one guidance weight w, without w embedding: for programs that do not know one.

    linear_1(x + P e(w)) = W x + (b + W P e(w)): what the embedding adds becomes part of `linear_1`'s bias. Pure.

    w: guidance_scale - 1, within the range that the model was distilled on.
    """
    if not pipeline.has_w_embedding:
        raise LcmError("the UNet has no w embedding to fold (time_cond_proj_dim is null); leave w out")
    tree = params["unet"]
    time = {name: dict(leaves) for name, leaves in tree["time_embedding"].items()}
    embedding = np.asarray(guidance.w_embedding(jnp.array([w]), pipeline.unet.time_cond_proj_dim), np.float64)[0]
    added = embedding @ np.asarray(time.pop("cond_proj")["kernel"], np.float64)
    bias = np.asarray(time["linear_1"]["bias"])
    added = added @ np.asarray(time["linear_1"]["kernel"], np.float64)
    time["linear_1"]["bias"] = (bias.astype(np.float64) + added).astype(bias.dtype)
    module = pipeline.unet.clone(time_cond_proj_dim=None)
    folded = dataclasses.replace(pipeline, unet=module, configs={**pipeline.configs, "unet": to_config(module)})
    return folded, {**params, "unet": {**tree, "time_embedding": time}}


def save_single_file(
    pipeline: Pipeline,
    params: PipelineParams,
    out: str | Path,
    *,
    dtype: Any = jnp.float16,
    metadata: Mapping[str, str] | None = None,
    w: float | None = None,
) -> Path:
    """Write SD 1.x, SD 2.x, SDXL or its refiner as one file that A1111, ComfyUI and diffusers' from_single_file load.

    Streamed, and renamed into place when complete.

    Args:
      out: NAME.safetensors; must not exist.
      dtype: of all weights: float16, bfloat16 or float32.
      metadata: for the file's header, beside `modelspec.*`; `lcm_config.json` is what `read_record` gives.
      w: for a UNet with w embedding: guidance weight to fold (see `fold_w`). None: the embedding is written too, as
        `time_embed.cond_proj.weight`, which those three programs do not use.

    Returns:
      `out`.

    Raises:
      LcmError: `out` exists or is not named .safetensors, too little disk space (before anything is written);
        parameters that do not fit their modules or are not finite in `dtype`.
      UnsupportedConfig: a part that these files have no place for.
    """
    out = Path(out)
    if w is not None:
        pipeline, params = fold_w(pipeline, params, w)
    family = family_of(pipeline)
    modules = {part: getattr(pipeline, part) for part in ("unet", "vae", *family.encoders)}
    _warn(pipeline, family, out)
    tensors, shapes = {}, {}
    for part, (layout, prefix) in layouts(family, modules).items():
        of_part = keys.write_part(modules[part], layout, params[part], jnp.dtype(dtype))
        shapes |= {prefix + key: stored.shape for key, stored in layout.tensors.items()}
        tensors |= {prefix + key: (of_part, key) for key in layout.tensors}
    kind = pipeline.schedule.prediction_type
    marks = ["v_pred"] if kind == "v_prediction" else []
    marks += ["ztsnr"] if pipeline.schedule.alphas_cumprod[-1] == 0 else []
    for mark in marks:  # what ComfyUI goes by for SDXL: presence, not content
        shapes[mark], tensors[mark] = (0,), (lambda key: np.zeros(0, jnp.dtype(dtype)), mark)
    if not _is_published(pipeline.schedule, family):  # what A1111 goes by
        table = pipeline.schedule.alphas_cumprod.astype(dtype)
        shapes["alphas_cumprod"], tensors["alphas_cumprod"] = table.shape, (lambda key: table, "alphas_cumprod")
    header = {
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": _ARCHITECTURES.get(f"{family.name} {kind}", _ARCHITECTURES[family.name]),
        "modelspec.prediction_type": "v" if kind == "v_prediction" else kind,
    }

    def tensor(key: str) -> np.ndarray:
        of_part, name = tensors[key]
        return of_part(name)

    return _write(out, shapes, tensor, jnp.dtype(dtype), {"format": "pt"} | header | dict(metadata or {}))


def family_of(pipeline: Pipeline) -> Family:
    """The family as which a pipeline is written; CLIP and OpenCLIP are told apart by their activations.

    Raises:
      UnsupportedConfig: text encoders that no family has.
    """
    found = {part: _kind(clip.to_config(getattr(pipeline, part))) for part in names_of_parts(pipeline)[2:]}
    for family in FAMILIES:
        if found == {part: _kind(encoder.config) for part, encoder in family.encoders.items()}:
            return family
    supported = "; ".join(f"{f.name}: {[_kind(e.config) for e in f.encoders.values()]}" for f in FAMILIES)
    raise UnsupportedConfig("text encoders of a single file", list(found.values()), supported)


def _is_published(noise: schedule.NoiseSchedule, family: Family) -> bool:
    """The noise table is the family's, maybe with zero terminal SNR: what keys can mark."""
    config = published_scheduler(family, "v_prediction")
    tables = (schedule.from_config({**config, "rescale_betas_zero_snr": zero}).alphas_cumprod for zero in (False, True))
    return any(np.array_equal(table, noise.alphas_cumprod) for table in tables)


def _kind(config: Config) -> tuple[str, str]:
    return config["hidden_act"], config["architectures"][0]


def _warn(pipeline: Pipeline, family: Family, out: Path) -> None:
    """What a reader of the file cannot know without `config`."""
    factor = getattr(pipeline.vae, "scaling_factor", family.scaling_factor)
    if factor != family.scaling_factor:
        logging.warning(
            "%s cannot say that its VAE's scaling_factor is %s: programs take %s for %s; read it with config=",
            out,
            factor,
            family.scaling_factor,
            family.name,
        )
    if not _is_published(pipeline.schedule, family):
        logging.warning(
            "%s has another noise table than %s (%s): ComfyUI and diffusers do not look at it, read it with config=",
            out,
            family.name,
            pipeline.schedule,
        )
    kind = pipeline.schedule.prediction_type
    if kind == "sample" or (kind == "v_prediction" and family.name == "sd1"):
        logging.warning("%s: ComfyUI takes every %s for epsilon; set %s by hand there", out, family.name, kind)
    if pipeline.has_w_embedding:
        logging.warning("%s has a w embedding, which A1111, ComfyUI and diffusers do not use; fold one w for them", out)


def check_file(out: str | Path, needed: int = 0) -> None:
    """Refuse to write `needed` bytes to the new file `out`. A program calls it before its long work, too.

    Raises:
      LcmError: another suffix, the file exists, or fewer than `needed` bytes are free.
    """
    out = Path(out)
    if out.suffix != SUFFIX:
        raise LcmError(f"{out} does not end in {SUFFIX}; name the single file so")
    if out.exists():
        raise LcmError(f"{out} already exists; choose another name or remove it first")
    files.check_space(out, needed)


def _write(
    out: Path,
    shapes: Mapping[str, Shape],
    tensor: Callable[[str], np.ndarray],
    dtype: np.dtype,
    metadata: Mapping[str, str],
) -> Path:
    check_file(out, weight_files.weights_size(shapes, weight_files.writable(dtype)) + _SLACK)
    with files.new_file(out) as partial:
        weight_files.write_weights(partial, shapes, tensor, dtype, metadata)
        check_file(out)
    return out
