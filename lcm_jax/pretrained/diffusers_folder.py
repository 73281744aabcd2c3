"""Diffusers folders of whole models, read and written.

    FOLDER/model_index.json  scheduler/  tokenizer[_2]/  text_encoder[_2]/  unet/  vae/

Reading: what a config leaves out has diffusers' defaults; what does not fit (tensors, widths, classes) is refused.
Safety checkers, feature extractors and Flax weights are ignored.

Writing: diffusers and transformers, old and new, load the folder without further arguments. It is written beside its
final name, synced to disk, and renamed: under the final name there is either nothing or all of it.
"""

import contextlib
import functools
import json
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from absl import logging
from flax import linen as nn
from jax.typing import DTypeLike

from lcm_jax import assets, files, foreign
from lcm_jax.diffusion import schedule
from lcm_jax.diffusion.schedule import NoiseSchedule
from lcm_jax.errors import LcmError, UnsupportedConfig
from lcm_jax.models import clip
from lcm_jax.models.config import DIFFUSERS_VERSION, class_name, to_config
from lcm_jax.models.vae import AutoencoderKL
from lcm_jax.pretrained import digests, hub, names, safetensors_io, taesd_file
from lcm_jax.pretrained.model import (
    PARTS,
    RECORD,
    SCHEDULER,
    TEXT_ENCODERS,
    TOKENIZER_OF,
    TOKENIZER_PATTERNS,
    Config,
    Pipeline,
    PipelineParams,
    check_fit,
    make_module,
    parts_read,
)
from lcm_jax.pretrained.names import Params, PartChangeFn, PutFn
from lcm_jax.pretrained.tokenizer import load_tokenizer
from lcm_jax.typed import checked, config_of

_ENCODER_CLASSES = ("CLIPTextModel", "CLIPTextModelWithProjection")
_CLASSES = {"unet": ("UNet2DConditionModel",), "vae": ("AutoencoderKL", "AutoencoderTiny")}
_XL_FACTOR = 0.13025  # scaling_factor of SDXL's VAE
_SLACK = 1 << 20  # bytes for headers, configs and the file system's own rounding


def load_folder(
    source: str | Path,
    variant: str | None = None,
    dtype: DTypeLike = jnp.float32,
    param_dtype: DTypeLike | None = jnp.float32,
    *,
    unet: str | Path | None = None,
    vae: str | Path | None = None,
    put: PutFn | None = None,
    change: PartChangeFn | None = None,
    weights: bool | Collection[str] = True,
) -> tuple[Pipeline, PipelineParams]:
    """(pipeline, params) of a diffusers folder; see `load.load_pipeline`."""
    read, others = parts_read(weights), {part: other for part, other in (("unet", unet), ("vae", vae)) if other}
    demanded = [part for part in PARTS if part not in others]
    folder = _local(source, _pipeline_patterns(demanded, read, variant), bool(read))
    with config_of(folder):
        index = _model_index(folder, source, others)
        encoders = _encoders(folder, index)
    configs = {"model_index": index, "scheduler": scheduler_config(folder, index)}
    noise = schedule.from_config(configs["scheduler"])
    for origin in filter(None, (folder, unet)):
        check_noise(origin, noise, str(source), bool(read))

    folders = {}
    for part in ("unet", "vae"):
        own = folder / part
        folders[part] = part_folder(others[part], part, variant, part in read) if part in others else own
        if part not in others and not (own / "config.json").exists():
            missing = f"{own / 'config.json'} is missing; the folder is incomplete"
            raise LcmError(f"{missing}: copy or download it again, or give another {part} with {hub.ARGUMENTS[part]}")
        configs[part] = _config(folders[part], part)
    for part, (name, kind) in encoders.items():
        folders[part] = folder / name
        configs[part] = _config(folders[part], part) | {"architectures": [kind]}
    modules = dict.fromkeys(PARTS)
    modules |= {part: make_module(part, configs[part], dtype, path / "config.json") for part, path in folders.items()}
    check_parts(modules, source, others)
    if "vae" in others and "vae" in read:
        with contextlib.suppress(LcmError):  # the model's own need not be there
            warn_of_scale(modules["vae"], foreign.read_json(folder / "vae" / "config.json"), source, others["vae"])
    tokenizers = dict.fromkeys(TOKENIZER_OF.values())
    for part, (name, _) in encoders.items() if read else ():
        tokenizer = folder / name.replace("text_encoder", "tokenizer")
        tokenizers[TOKENIZER_OF[part]] = load_tokenizer(tokenizer, modules[part])
    # All are found before minutes go into reading the first.
    origins = {part: (others.get(part, source), path) for part, path in folders.items() if part in read}
    variants = find_variants(origins, variant, or_without=len(origins) < len(folders))
    record = folder_record(unet or folder, bool(read))
    with config_of(folder):
        pipeline = Pipeline(**modules, **tokenizers, schedule=noise, configs=configs, record=record)
    params = {
        part: _params(part, modules[part], path, variants[part], param_dtype, put, change)
        if part in read
        else names.param_shapes(modules[part], param_dtype)
        for part, path in folders.items()
    }
    return pipeline, params


def load_parts(
    sources: Mapping[str, str | Path],
    variant: str | None,
    dtype: DTypeLike,
    param_dtype: DTypeLike | None,
    put: PutFn | None,
    read: Collection[str],
    or_without: bool = False,
    change: PartChangeFn | None = None,
) -> dict[str, tuple[nn.Module, Params]]:
    """Part -> (module, params), each from a source of its own; see `load.load_unet`. read: parts to read weights of."""
    folders = {part: part_folder(source, part, variant, part in read) for part, source in sources.items()}
    modules = {
        part: make_module(part, _config(folder, part), dtype, folder / "config.json")
        for part, folder in folders.items()
    }
    origins = {part: (source, folders[part]) for part, source in sources.items() if part in read}
    variants = find_variants(origins, variant, or_without or len(origins) < len(sources))
    return {
        part: (
            module,
            _params(part, module, folders[part], variants[part], param_dtype, put, change)
            if part in read
            else names.param_shapes(module, param_dtype),
        )
        for part, module in modules.items()
    }


def find_variants(
    origins: Mapping[str, tuple[str | Path, Path]], variant: str | None, or_without: bool = False
) -> dict[str, str | None]:
    """Part -> the variant of its weights to read: `variant`, or None if only other parts have it, as in diffusers.

    origins: part -> (folder or hub id, local folder of the part). A file has no variant.
    or_without: None, too, if none of them has it, as when a part that is not read may have it.

    Raises:
      LcmError: no part has the variant, or a part has no weights to read.
    """
    singles = [part for part, (_, path) in origins.items() if path.is_file()]
    origins = {part: origin for part, origin in origins.items() if part not in singles}
    having = {p for p, (_, path) in origins.items() if safetensors_io.has_weights(path, _weights_name(p), variant)}
    found = dict.fromkeys(singles)
    for part, (source, path) in origins.items():
        name = _weights_name(part)
        found[part] = variant if part in having or not (having or or_without) else None
        if found[part] != variant:
            logging.info("%s of %s has no variant %s: its weights without a variant are read", part, source, variant)
            plain = safetensors_io.download_patterns(name, None)  # from the hub, only the variant was fetched
            _local(source, [prefix + pattern for prefix in ("", f"{path.name}/") for pattern in plain], weights=True)
        safetensors_io.find_weights(path, name, found[part])
    return found


def check_parts(modules: Mapping[str, Any], source: str | Path, others: Mapping[str, str | Path]) -> None:
    """`check_fit`, with errors that name the model and where its `others` are from."""
    try:
        check_fit(modules)
    except LcmError as error:
        taken = "".join(f" with the {part} of {other}" for part, other in others.items())
        raise LcmError(f"{source}{taken}: {error}") from None


def warn_of_scale(vae: nn.Module, own: Config, source: str | Path, other: str | Path) -> None:
    """Warns if the `vae` of `other` takes latents of another scale than that of `source`, of the config `own`."""
    if class_name(own, "AutoencoderKL") != "AutoencoderKL":
        return  # a tiny one takes them as the UNet does
    factor = own.get("scaling_factor", AutoencoderKL.scaling_factor)
    if not isinstance(vae, AutoencoderKL):
        if taesd_file.is_xl(other) not in (None, factor == _XL_FACTOR):
            logging.warning("%s is, by its name, for another family than %s: if so, colours are wrong", other, source)
    elif vae.scaling_factor != factor:
        logging.warning(
            "the VAE of %s has scaling_factor %s, that of %s %s: if it is for another family, images will be wrong; if "
            "not, correct its config.json",
            other,
            vae.scaling_factor,
            source,
            factor,
        )


def folder_record(source: str | Path, weights: bool = True) -> Config:
    """Content of the `lcm_config.json` of a folder or hub repository; {} if it has none.

    A part's folder, as EXPORT/unet, has that of its pipeline.

    weights: False: if the hub cannot be asked, the package's own configs are used.
    """
    return digests.without(_first_of(_local(source, [RECORD], weights), RECORD))


def folder_scheduler(source: str | Path, weights: bool = True) -> Config:
    """The same for scheduler_config.json."""
    return _first_of(_local(source, [SCHEDULER], weights), SCHEDULER)


def _first_of(folder: Path, name: str) -> Config:
    """Content of the JSON file `name` in the first of `_roots` that has it; {} if none has."""
    return next(filter(None, (foreign.read_optional(root / name) for root in _roots(folder))), {})


def _roots(folder: Path) -> tuple[Path, ...]:
    """`folder`; of a part, as EXPORT/unet, then its pipeline's: what stands there is of this part, too."""
    above = folder.absolute().parent
    is_part = (folder / "config.json").is_file() and (above / "model_index.json").is_file()
    return (folder, above) if is_part else (folder,)


def scheduler_config(folder: Path, index: Config) -> Config:
    """The scheduler's config; if it names no class, with that of model_index.json.

    Raises:
      UnsupportedConfig: one of the two classes is unknown to `schedule.from_config`.
      LcmError: the file is missing or not a noise schedule, or diffusers, which goes by model_index.json, would read
        another one.
    """
    config, kind = foreign.read_json(folder / SCHEDULER), _class_in_index(index, "scheduler")
    config = {"_class_name": kind, **config} if kind else config
    try:
        with config_of(f"scheduler of {folder}"):
            noise = schedule.from_config(config)
            theirs = schedule.from_config(config | {"_class_name": kind}) if kind else noise
    except UnsupportedConfig:
        raise
    except LcmError as error:
        raise LcmError(f"{folder / SCHEDULER}: {error}") from None
    if theirs != noise:
        raise LcmError(
            f"{folder / SCHEDULER} names {config['_class_name']} and leaves betas out, but model_index.json names "
            f"{kind}, whose defaults differ; write the betas that the model was trained with into it"
        )
    return config


def check_noise(source: str | Path, noise: NoiseSchedule, model: str, weights: bool = True) -> None:
    """Refuses a UNet from `source` if the scheduler or the record there says that it was trained on other noise.

    Args:
      source: folder or hub id, of a pipeline or of its `unet/`.
      noise: that the UNet would be used with, of the model named `model`.
      weights: False: if the hub cannot be asked, the package's own configs are used.

    Raises:
      LcmError: it was trained on other noise.
    """
    folder = _local(source, ["model_index.json", SCHEDULER, RECORD], weights, "unet")
    for root in _roots(folder):
        index, record = (foreign.read_optional(root / name) for name in ("model_index.json", RECORD))
        found = []
        if (root / SCHEDULER).is_file():
            theirs = schedule.from_config(scheduler_config(root, index))
            found = [] if theirs == noise else [f"{SCHEDULER} says {theirs}"]
        if record.get("prediction_type", noise.prediction_type) != noise.prediction_type:
            found.append(f"{RECORD} says {record['prediction_type']}")
        if found:
            raise LcmError(
                f"{root}: {' and '.join(found)}, but {model} is used with {noise}; take the UNet and the rest from "
                "one model, or correct the wrong file"
            )


def _local(source: str | Path, patterns: Sequence[str], weights: bool, part: str | None = None) -> Path:
    """The local folder of `source`. If only configs are needed and the hub cannot be asked: the package's own."""
    try:
        return hub.local_folder(source, patterns, part)
    except LcmError:
        embedded = None if weights else assets.architecture(str(source))
        if embedded is None:
            raise
        return embedded


def part_folder(source: str | Path, part: str, variant: str | None, weights: bool) -> Path:
    """Folder of one part: SOURCE/part if there is one, else SOURCE itself; or the file of a TAESD."""
    if part == "vae" and taesd_file.is_taesd(file := files.expanded(source)):
        return file
    tensors = safetensors_io.download_patterns(_weights_name(part), variant) if weights else []
    patterns = [prefix + pattern for prefix in ("", f"{part}/") for pattern in ("config.json", *tensors)]
    folder = _local(source, ["model_index.json", RECORD, *patterns], weights, part)
    inside = folder / part
    if (inside / "config.json").is_file() or (folder / "model_index.json").is_file():
        return inside
    return folder


def _pipeline_patterns(parts: Iterable[str], read: Collection[str], variant: str | None) -> list[str]:
    """Globs of what `parts` of a pipeline need: configs, and the weights of those that are `read`."""
    patterns = ["model_index.json", RECORD, SCHEDULER]
    patterns += TOKENIZER_PATTERNS
    for part in parts:
        tensors = safetensors_io.download_patterns(_weights_name(part), variant) if part in read else []
        patterns += [f"{part}/{file}" for file in ("config.json", *tensors)]
    return patterns


def _weights_name(part: str) -> str:
    return safetensors_io.TRANSFORMERS_NAME if part in TEXT_ENCODERS else safetensors_io.DIFFUSERS_NAME


def _model_index(folder: Path, source: str | Path, replaced: Collection[str]) -> Config:
    if not (folder / "model_index.json").is_file():
        if (folder / "config.json").is_file():
            raise LcmError(f"{source} holds a single model without model_index.json; give the folder of its pipeline")
        # In the hub's cache the model itself is further in.
        snapshots = sorted(str(path.parent) for path in folder.glob("snapshots/*/model_index.json"))
        inside = f"{' or '.join(snapshots[:3])}, " if snapshots else ""
        raise LcmError(f"{source} has no model_index.json; give a diffusers folder, {inside}which holds that file")
    index = foreign.read_json(folder / "model_index.json")
    if "unet" not in replaced and _class_in_index(index, "unet") is None:
        kind = index.get("_class_name")
        other = "" if "transformer" in index else f", or the UNet of one with {hub.ARGUMENTS['unet']}"
        raise LcmError(f"{source} is a {kind} without a unet; a model of the Stable Diffusion family is needed{other}")
    return index


def _class_in_index(index: Config, part: str) -> str | None:
    """Class name that model_index gives a part (without "Flax"); None: the part is declared absent."""
    entry = index.get(part)
    if entry is None or entry == [None, None]:
        return None
    library, kind = checked(f"{part} of model_index.json", entry, tuple[str | None, str | None])
    return kind and kind.removeprefix("Flax")


def _encoders(folder: Path, index: Config) -> dict[str, tuple[str, str]]:
    """Part -> (name of its folder, class). A refiner's only encoder is "text_encoder_2", whatever its folder's name."""
    found = {}
    for part in TEXT_ENCODERS:
        kind = _class_in_index(index, part)
        if kind is not None:
            if kind not in _ENCODER_CLASSES:
                raise UnsupportedConfig(f"{part} in model_index.json", kind, _ENCODER_CLASSES)
            found[part] = part, kind
    if not found:
        raise LcmError(
            f"{folder} is a {index.get('_class_name')} without a text encoder (text_encoder, text_encoder_2 in "
            "model_index.json); a text-to-image model of the Stable Diffusion family is needed"
        )
    if list(found) == ["text_encoder"] and found["text_encoder"][1] == "CLIPTextModelWithProjection":
        return {"text_encoder_2": found["text_encoder"]}
    return found


def _config(folder: Path, part: str) -> Config:
    if folder.is_file():
        return taesd_file.CONFIG
    config, supported = foreign.read_json(folder / "config.json"), _CLASSES.get(part, _ENCODER_CLASSES)
    kind = config.get("_class_name")
    if kind is not None and str(kind).removeprefix("Flax") not in supported:
        raise UnsupportedConfig(f"_class_name of {folder / 'config.json'}", kind, supported)
    return config


def _params(
    part: str,
    module: nn.Module,
    folder: Path,
    variant: str | None,
    dtype: DTypeLike | None,
    put: PutFn | None,
    change: PartChangeFn | None = None,
) -> Params:
    change = change and functools.partial(change, part)
    if folder.is_file():
        opened = taesd_file.open_both(folder)
    else:
        opened = safetensors_io.open_weights(folder, _weights_name(part), variant)
    with opened as weights:
        return names.read_params(module, weights.shapes, weights.read, dtype, str(weights.source), put, change)


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
        f"{part}/{safetensors_io.file_name(_weights_name(part), variant)}": (module, params[part])
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
    trees = {safetensors_io.file_name(_weights_name("unet"), variant): (unet, params)}
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
