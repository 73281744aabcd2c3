"""Models as diffusers folders and as single files, whose layouts are in `diffusers_folder` and `single_file`.

diffusers and transformers, old and new, load a folder without further arguments. It is written beside its final name,
synced to disk, and renamed: under the final name there is either nothing or all of it. So is a file.
"""

import contextlib
import functools
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from absl import logging
from flax import linen as nn
from jax.typing import DTypeLike

from lcm_jax import files
from lcm_jax.diffusion import schedule
from lcm_jax.errors import LcmError, UnsupportedConfig
from lcm_jax.models import clip
from lcm_jax.models.config import DIFFUSERS_VERSION, to_config
from lcm_jax.pretrained import digests, names, safetensors_io
from lcm_jax.pretrained import single_file_keys as keys
from lcm_jax.pretrained.diffusers_folder import weights_name
from lcm_jax.pretrained.model import (
    SCHEDULER,
    TEXT_ENCODERS,
    TOKENIZER_OF,
    Config,
    Pipeline,
    PipelineParams,
    fold_w,
    make_module,
)
from lcm_jax.pretrained.names import Params, Shape
from lcm_jax.pretrained.single_file import (
    FAMILIES,
    SD2_GUESS,
    SD2_LARGEST_OF_EPSILON,
    Family,
    layouts,
    published_scheduler,
    sd2_guess,
)
from lcm_jax.pretrained.single_file_spellings import UNET

_SLACK = 1 << 20  # bytes for headers, configs and the file system's own rounding
# modelspec.architecture of the Stability AI model specification, by family (SD 2.x: and prediction type).
_ARCHITECTURES = {
    "sdxl": "stable-diffusion-xl-v1-base",
    "sdxl-refiner": "stable-diffusion-xl-v1-refiner",
    "sd1": "stable-diffusion-v1",
    "sd2": "stable-diffusion-v2-512",
    "sd2 v_prediction": "stable-diffusion-v2-768-v",
}
_BASES = {"sd1": "sd_v1", "sd2": "sd_v2", "sdxl": "sdxl_base_v1-0"}  # as sd-scripts calls them in the header of a LoRA

_LCM_SCHEDULER = {
    "_class_name": "LCMScheduler",
    "_diffusers_version": DIFFUSERS_VERSION,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "clip_sample": False,
    "clip_sample_range": 1.0,
    "dynamic_thresholding_ratio": 0.995,
    "num_train_timesteps": 1000,
    "original_inference_steps": 50,
    "prediction_type": "epsilon",
    "rescale_betas_zero_snr": False,
    "sample_max_value": 1.0,
    "set_alpha_to_one": False,
    "steps_offset": 1,  # StableDiffusionPipeline rewrites any other value, with a warning
    "thresholding": False,
    "timestep_scaling": 10.0,
    "timestep_spacing": "leading",
    "trained_betas": None,
}
_LCM_KEYS = ("original_inference_steps", "timestep_scaling")


def scheduler_class(pipeline: Pipeline) -> str:
    """The diffusers scheduler that a distilled model's map is for."""
    return "TCDScheduler" if pipeline.constants.phases else "LCMScheduler"


def lcm_scheduler_config(source: Config, **overrides: Any) -> Config:
    """LCMScheduler's full config with the noise table and prediction type of a scheduler config `source`.

    overrides: values of LCMScheduler's keys, e.g. original_inference_steps=100; TCDScheduler has the same.

    Raises:
      LcmError: LCMScheduler has no such key.
    """
    unknown = overrides.keys() - _LCM_SCHEDULER.keys()
    if unknown:
        raise LcmError(f"LCMScheduler has no {', '.join(sorted(unknown))}; keys: {', '.join(_LCM_SCHEDULER)}")
    is_lcm = source.get("_class_name") in ("LCMScheduler", "TCDScheduler")
    carried = {key: source[key] for key in _LCM_KEYS if is_lcm and source.get(key) is not None}
    return dict(sorted((_LCM_SCHEDULER | schedule.noise_fields(source) | carried | overrides).items()))


def save_pipeline(
    pipeline: Pipeline,
    params: PipelineParams,
    out: str | Path,
    *,
    scheduler_config: Config | None = None,
    model_index_extra: Mapping[str, Any] | None = None,
    dtype: DTypeLike = jnp.float32,
    variant: str | None = None,
    extra_files: Mapping[str, str | bytes] | None = None,
) -> Path:
    """Writes a complete diffusers folder.

    Args:
      out: the folder; must not exist, or be empty.
      scheduler_config: content of scheduler/scheduler_config.json; None: an LCMScheduler's for a UNet with w embedding,
        else the pipeline's own.
      model_index_extra: keys to add to model_index.json.
      dtype: of all weights: float32, float16 or bfloat16.
      variant: suffix of the weight files, e.g. "fp16".
      extra_files: path inside the folder -> content, e.g. {"README.md": card}.

    Returns:
      `out`.

    Raises:
      LcmError: `out` holds something, too little disk space (both before anything is written), parameters that do not
        fit their modules or are not finite in `dtype`, a scheduler with another noise table than the pipeline's.
      OSError: writing failed; nothing is left under `out`.
    """
    scheduler_config = _checked_scheduler(pipeline, scheduler_config)
    texts = {  # configs with every key, because the defaults of the reading program may be others
        f"{part}/config.json": _encoder_config(module, pipeline.configs.get(part, {}))
        if part in TEXT_ENCODERS
        else to_config(module)
        for part, module in pipeline.parts.items()
    }
    texts |= {SCHEDULER: scheduler_config}
    texts |= {"model_index.json": _index(pipeline, scheduler_config["_class_name"]) | dict(model_index_extra or {})}
    texts = {name: _json(config) for name, config in texts.items()}
    for part, tokenizer in pipeline.tokenizers.items():
        if tokenizer is None:
            raise LcmError(f"the pipeline was loaded without its {TOKENIZER_OF[part]}; load it with weights to save it")
        texts |= {f"{TOKENIZER_OF[part]}/{name}": content for name, content in tokenizer.files.items()}
    trees = {
        f"{part}/{safetensors_io.file_name(weights_name(part), variant)}": (module, params[part])
        for part, module in pipeline.parts.items()
    }
    return _write(Path(out), trees, texts, extra_files or {}, dtype)


def save_unet(
    unet: nn.Module,
    params: Params,
    out: str | Path,
    *,
    dtype: DTypeLike = jnp.float32,
    variant: str | None = None,
    extra_files: Mapping[str, str | bytes] | None = None,
) -> Path:
    """Writes a UNet or a ControlNet alone, config and weights at the folder's root. See `save_pipeline`."""
    trees = {safetensors_io.file_name(weights_name("unet"), variant): (unet, params)}
    return _write(Path(out), trees, {"config.json": _json(to_config(unet))}, extra_files or {}, dtype)


def check_folder(out: str | Path, needed: int = 0) -> None:
    """Checks that `needed` bytes can be written to the folder `out`. Programs also call it before their long work.

    Raises:
      LcmError: `out` is a file or not empty, or fewer than `needed` bytes are free.
    """
    out = Path(out)
    if out.is_file() or (out.is_dir() and any(out.iterdir())):
        raise LcmError(f"{out} already exists and is not empty; choose another folder or remove it first")
    files.check_space(out, needed)


def _json(value: Mapping[str, Any]) -> str:
    return json.dumps(value, indent=2, sort_keys=True) + "\n"


def _encoder_config(module: clip.CLIPTextModel, source: Config) -> Config:
    """The source's config (extra keys are harmless) with the module's fields.

    transformers 5 would load the encoder in the dtype of its config, beside a UNet in float32; both spellings count.
    """
    kept = {key: value for key, value in source.items() if key != "_name_or_path"}
    return kept | clip.to_config(module) | {"dtype": "float32", "torch_dtype": "float32"}


def _checked_scheduler(pipeline: Pipeline, config: Config | None) -> Config:
    if config is None:
        config = dict(pipeline.configs["scheduler"])
        if pipeline.has_w_embedding:
            config = lcm_scheduler_config(config, _class_name=scheduler_class(pipeline))
    if "_class_name" not in config:
        raise LcmError("the scheduler config has no _class_name; diffusers needs it, e.g. LCMScheduler")
    made, mine = schedule.from_config(config), pipeline.schedule
    if made != mine:
        raise LcmError(
            f"the scheduler config ({config['_class_name']}) has other noise ({made}) than the model ({mine}); make it "
            "from the model's own with lcm_scheduler_config"
        )
    return config


def _index(pipeline: Pipeline, scheduler_class: str) -> Config:
    source = pipeline.configs["model_index"]
    index = {
        "_class_name": _pipeline_class(pipeline),
        "_diffusers_version": DIFFUSERS_VERSION,
        "feature_extractor": [None, None],
        "image_encoder": [None, None],
        "scheduler": ["diffusers", scheduler_class],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", to_config(pipeline.vae)["_class_name"]],
    }
    for slot in ("", "_2") if pipeline.is_xl else ("",):
        encoder = getattr(pipeline, "text_encoder" + slot)
        kind = None if encoder is None else clip.to_config(encoder)["architectures"][0]
        index["text_encoder" + slot] = ["transformers", kind] if kind else [None, None]
        index["tokenizer" + slot] = ["transformers", "CLIPTokenizer"] if kind else [None, None]
    if not pipeline.is_xl:
        return index | {"requires_safety_checker": False, "safety_checker": [None, None]}
    is_refiner = pipeline.text_encoder is None
    index["force_zeros_for_empty_prompt"] = source.get("force_zeros_for_empty_prompt", not is_refiner)
    if is_refiner:
        index["requires_aesthetics_score"] = source.get("requires_aesthetics_score", True)
    return index


def _pipeline_class(pipeline: Pipeline) -> str:
    inpainting = pipeline.unet.in_channels > pipeline.vae.latent_channels
    if pipeline.is_xl:
        if pipeline.text_encoder is None:
            return "StableDiffusionXLImg2ImgPipeline"
        return "StableDiffusionXLInpaintPipeline" if inpainting else "StableDiffusionXLPipeline"
    if inpainting:
        return "StableDiffusionInpaintPipeline"
    # The former hands its scheduler eta=None, which TCDScheduler does not take; the latter passes w on, too.
    is_lcm = pipeline.has_w_embedding and not pipeline.constants.phases
    return "LatentConsistencyModelPipeline" if is_lcm else "StableDiffusionPipeline"


def _write(
    out: Path,
    trees: Mapping[str, tuple[nn.Module, Params]],
    texts: Mapping[str, str | bytes],
    extra: Mapping[str, str | bytes],
    dtype: DTypeLike,
) -> Path:
    outside = [name for name in extra if Path(name).is_absolute() or ".." in Path(name).parts]
    bad = outside + [name for name in extra if name in texts or name in trees]
    if bad:
        raise LcmError(f"extra file {bad[0]!r} is one of the model's own or not inside the folder; rename it")
    leaves = {name: names.torch_leaves(module, params) for name, (module, params) in trees.items()}
    shapes = {name: {key: p.torch_shape for key, (p, _) in found.items()} for name, found in leaves.items()}
    needed = sum(safetensors_io.weights_size(found, dtype) for found in shapes.values())
    needed += sum(len(text) for text in (*texts.values(), *extra.values())) + _SLACK
    with all_or_nothing(out, needed) as folder:
        for name, text in {**texts, **extra}.items():
            files.write_text(folder / name, text)
        for name, found in leaves.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)

            def tensor(key: str, found=found) -> np.ndarray:
                parameter, leaf = found[key]
                return names.to_torch_layout(leaf, parameter, dtype)

            safetensors_io.write_weights(folder / name, shapes[name], tensor, dtype)
    return out


@contextlib.contextmanager
def all_or_nothing(out: Path, needed: int) -> Iterator[Path]:
    """A new folder beside `out` that gets its name if the block ends well, and is removed if it does not.

    Raises:
      LcmError: `out` holds something, or fewer than `needed` bytes are free.
    """
    check_folder(out, needed)
    with files.new_folder(out.absolute()) as folder:
        yield folder
        digests.add(folder)


def save_single_file(
    pipeline: Pipeline,
    params: PipelineParams,
    out: str | Path,
    *,
    dtype: DTypeLike = jnp.float16,
    metadata: Mapping[str, str] | None = None,
    w: float | None = None,
) -> Path:
    """Writes SD 1.x, SD 2.x, SDXL or its refiner as one file that A1111, ComfyUI and diffusers' from_single_file load.

    Args:
      out: NAME.safetensors; must not exist; appears when it is complete.
      dtype: of all weights: float16, bfloat16 or float32.
      metadata: for the file's header, beside `modelspec.*`; `read_record` reads its `lcm_config.json`.
      w: for a UNet with w embedding: guidance weight to fold (see `fold_w`). None: the embedding is written too, as
        `time_embed.cond_proj.weight`, which those three programs do not use.

    Returns:
      `out`.

    Raises:
      LcmError: `out` exists or is not named .safetensors, too little disk space (before anything is written);
        parameters that do not fit their modules or are not finite in `dtype`.
      UnsupportedConfig: a part that these files cannot hold.
    """
    out, dtype = Path(out), jnp.dtype(dtype)
    if w is not None:
        pipeline, params = fold_w(pipeline, params, w)
    family, noise = family_of(pipeline), pipeline.schedule
    tensors: dict[str, Callable[[], np.ndarray]] = {}
    shapes: dict[str, Shape] = {}
    for part, (layout, prefix) in layouts(family, pipeline.parts).items():
        tensor = keys.write_part(getattr(pipeline, part), layout, params[part], dtype)
        shapes |= {prefix + key: stored.shape for key, stored in layout.tensors.items()}
        tensors |= {prefix + key: functools.partial(tensor, key) for key in layout.tensors}
    _warn(pipeline, family, out, tensors)
    kind = noise.prediction_type
    # ComfyUI goes by these keys for SDXL: by presence, not content.
    for key, marked in (("v_pred", kind == "v_prediction"), ("ztsnr", noise.alphas_cumprod[-1] == 0)):
        if marked:
            shapes[key], tensors[key] = (0,), lambda: np.zeros(0, dtype)
    if not _is_published(noise, family):  # A1111 goes by this table
        shapes["alphas_cumprod"] = noise.alphas_cumprod.shape
        tensors["alphas_cumprod"] = lambda: noise.alphas_cumprod.astype(dtype)
    header = _spec(family, kind) | dict(metadata or {})
    return safetensors_io.save_file(out, shapes, lambda key: tensors[key](), dtype, header)


def _spec(family: Family, kind: str, adapter: str = "") -> dict[str, str]:
    """The fields of the model specification for a header; kind: prediction type."""
    return {
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": _ARCHITECTURES.get(f"{family.name} {kind}", _ARCHITECTURES[family.name]) + adapter,
        "modelspec.prediction_type": "v" if kind == "v_prediction" else kind,
    }


def lora_header(pipeline: Pipeline) -> dict[str, str]:
    """What tells other programs for which models a LoRA of `pipeline` is: fields of sd-scripts.

    A1111 and Forge take a file for SD 1.x if its header has other fields alone, and then hide it from users of SDXL and
    SD 2.x.
    """
    try:
        family = family_of(pipeline)
    except UnsupportedConfig:
        return {}  # no other program knows such a model
    if family.name not in _BASES:
        return {}
    kind, is_sd2 = pipeline.schedule.prediction_type, family.name == "sd2"
    end = "_v" if kind == "v_prediction" and family.name != "sdxl" else ""
    return _spec(family, kind, "/lora") | {"ss_base_model_version": _BASES[family.name] + end, "ss_v2": str(is_sd2)}


def family_of(pipeline: Pipeline) -> Family:
    """The family as which a pipeline is written. Activations tell CLIP from OpenCLIP.

    Raises:
      UnsupportedConfig: no family has these text encoders.
    """

    def kind(config: Config) -> tuple[str, str]:
        return config["hidden_act"], config["architectures"][0]

    kinds = {family.name: {part: kind(family.config(part)) for part in family.encoders} for family in FAMILIES}
    found = {part: kind(clip.to_config(getattr(pipeline, part))) for part in pipeline.tokenizers}
    for family in FAMILIES:
        if found == kinds[family.name]:
            return family
    supported = "; ".join(f"{name}: {list(kinds[name].values())}" for name in kinds)
    raise UnsupportedConfig("text encoders of a single file", list(found.values()), supported)


def _is_published(noise: schedule.NoiseSchedule, family: Family) -> bool:
    """Whether the noise table is the family's, perhaps with zero terminal SNR: what keys can mark."""
    config = published_scheduler(family, "v_prediction")
    tables = (schedule.from_config({**config, "rescale_betas_zero_snr": zero}).alphas_cumprod for zero in (False, True))
    return any(np.array_equal(table, noise.alphas_cumprod) for table in tables)


def _warn(pipeline: Pipeline, family: Family, out: Path, tensors: Mapping[str, Callable[[], np.ndarray]]) -> None:
    """Warns of what a reader of the file cannot know without `config`; tensors: key -> what will be written."""
    factor, published = pipeline.vae.scaling_factor, make_module("vae", family.config("vae")).scaling_factor
    if factor != published:
        logging.warning(
            "%s cannot record that its VAE's scaling_factor is %s: programs use %s for %s; read it with config=",
            out,
            factor,
            published,
            family.name,
        )
    if not _is_published(pipeline.schedule, family):
        logging.warning(
            "%s has another noise table than %s (%s): ComfyUI and diffusers ignore it; read it with config=",
            out,
            family.name,
            pipeline.schedule,
        )
    kind, key = pipeline.schedule.prediction_type, UNET + SD2_GUESS
    if kind == "sample" or (kind == "v_prediction" and family.name == "sd1"):
        logging.warning(
            "%s: ComfyUI takes every %s for epsilon; set %s by hand there (node ModelSamplingDiscrete)",
            out,
            family.name,
            kind,
        )
    elif family.name == "sd2" and key in tensors and pipeline.unet.in_channels == 4:
        guess, spread = sd2_guess(tensors[key]())
        if guess != kind:
            logging.warning(
                "%s predicts %s, but ComfyUI will take it for %s: it goes by the standard deviation of %s, which is "
                "%.3g (v above %g); set %s by hand there (node ModelSamplingDiscrete)",
                out,
                kind,
                guess,
                key,
                spread,
                SD2_LARGEST_OF_EPSILON,
                kind,
            )
    if family.name == "sd2" and kind != "v_prediction":
        logging.warning(
            "%s predicts %s, but InvokeAI and diffusers take every SD 2.x file for v_prediction: set it by hand in "
            "InvokeAI, give diffusers config= or the scheduler of the model card; or give both the folder",
            out,
            kind,
        )
    if pipeline.has_w_embedding:
        logging.warning("%s has a w embedding, which A1111, ComfyUI and diffusers do not use; fold one w for them", out)
