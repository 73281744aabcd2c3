"""A whole model folder as one small record: modules, parameters, tokenizers, noise schedule.

    FOLDER/model_index.json  scheduler/  tokenizer[_2]/  text_encoder[_2]/  unet/  vae/

What a config leaves out has diffusers' defaults; what does not fit (tensors, widths, classes) is refused. Safety
checkers, feature extractors and Flax weights in the folder are not looked at.

Writing model folders that diffusers and transformers, old and new, load without a further word.

A folder is written beside its final name, seen onto the disk, and renamed: under the final name there is either nothing
or all of it. Configs are written in full, text encoders with `text_model.` in their keys (transformers 4 reads nothing
else), and dtypes in configs as float32 (transformers 5 would otherwise load the text encoder in another than the UNet).
"""

import contextlib
import json
import os
import shutil
import uuid
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from lcm_jax import assets, files
from lcm_jax.diffusion import schedule
from lcm_jax.diffusion.schedule import NoiseSchedule
from lcm_jax.errors import LcmError, UnsupportedConfig
from lcm_jax.models import clip, unet, vae
from lcm_jax.models.config import DIFFUSERS_VERSION, to_config
from lcm_jax.pretrained import hub, names, tokenizer
from lcm_jax.pretrained import safetensors_io as weight_files
from lcm_jax.pretrained.model import PARTS, RECORD, SCHEDULER, Config, Pipeline, PipelineParams, check_fit, parts_read

Dtype = Any

_TEXT_ENCODERS = ("CLIPTextModel", "CLIPTextModelWithProjection")
_CLASSES = {
    "unet": ("UNet2DConditionModel",),
    "vae": ("AutoencoderKL", "AutoencoderTiny"),
    "text_encoder": _TEXT_ENCODERS,
    "text_encoder_2": _TEXT_ENCODERS,
}


def load_folder(
    source: str | Path,
    variant: str | None = None,
    dtype: Dtype = jnp.float32,
    param_dtype: Dtype = jnp.float32,
    *,
    unet: str | Path | None = None,
    vae: str | Path | None = None,
    place: names.Place | None = None,
    weights: bool | Collection[str] = True,
) -> tuple[Pipeline, PipelineParams]:
    """(pipeline, params) of a diffusers folder; see `load.load_pipeline`."""
    read, dtype = parts_read(weights), jnp.dtype(dtype)  # modules with the same dtype must be equal
    wanted = {"text_encoder", "text_encoder_2"} | {p for p, other in (("unet", unet), ("vae", vae)) if other is None}
    folder = _folder(source, _pipeline_patterns(wanted, read, variant), bool(read))
    index = _model_index(folder, str(source))
    encoders = _encoder_slots(folder, index)
    configs = {"model_index": index, "scheduler": scheduler_config(folder, index)}
    noise = schedule.from_config(configs["scheduler"])
    for one in (folder, unet or folder):
        check_noise(one, noise, str(source), bool(read))

    modules: dict[str, Any] = dict.fromkeys(PARTS)
    tokenizers: dict[str, Any] = dict.fromkeys(("tokenizer", "tokenizer_2"))
    sources: dict[str, tuple[Path, str, str | None]] = {}
    for part, other in (("unet", unet), ("vae", vae)):
        own = folder / part if other is None else _part_folder(other, part, variant, part in read)
        configs[part] = _config(own, part)
        modules[part] = _module(part, configs[part], dtype)
        sources[part] = own, weight_files.DIFFUSERS_NAME, variant
    for part, (own, kind) in encoders.items():
        configs[part] = _config(own, part) | ({"architectures": [kind]} if kind else {})
        modules[part] = _module(part, configs[part], dtype)
        sources[part] = own, weight_files.TRANSFORMERS_NAME, variant
        slot = own.name.replace("text_encoder", "tokenizer")
        length = modules[part].max_position_embeddings
        if read:
            tokenizers[part.replace("text_encoder", "tokenizer")] = tokenizer.load_tokenizer(folder / slot, length)
    check_fit(modules)
    for part in (part for part in sources if part in read):  # all there, before minutes go into reading the first
        weight_files.weight_files(*sources[part])
    params = {
        part: _params(modules[part], *sources[part], param_dtype, place)
        if part in read
        else _shapes(modules[part], param_dtype)
        for part in sources
    }
    record = folder_record(unet, bool(read)) if unet else _record(folder)
    return Pipeline(**modules, **tokenizers, schedule=noise, configs=configs, record=record), params


def load_part(
    part: str,
    source: str | Path,
    variant: str | None,
    dtype: Dtype,
    param_dtype: Dtype,
    place: names.Place | None,
    weights: bool,
) -> tuple[nn.Module, names.Params]:
    """(module, params) of one part; see `load.load_unet`."""
    folder = _part_folder(source, part, variant, weights)
    module = _module(part, _config(folder, part), jnp.dtype(dtype))
    if not weights:
        return module, _shapes(module, param_dtype)
    return module, _params(module, folder, weight_files.DIFFUSERS_NAME, variant, param_dtype, place)


def _folder(source: str | Path, patterns: Sequence[str], weights: bool) -> Path:
    """The local folder of `source`. Where only configs are wanted and the hub cannot be asked: the package's own."""
    patterns = [pattern for pattern in patterns if weights or ".safetensors" not in pattern]
    try:
        return hub.local_folder(source, patterns)
    except LcmError:
        embedded = None if weights else assets.architecture(str(source))
        if embedded is None:
            raise
        return embedded


def folder_record(source: str | Path, weights: bool = True) -> Config:
    """Content of the `lcm_config.json` of a folder or hub repository; {} if it has none.

    weights: False: if the hub cannot be asked, the package's own configs count.
    """
    return _record(_folder(source, [RECORD], weights))


def _record(folder: Path) -> Config:
    return files.read_json(folder / RECORD) if (folder / RECORD).is_file() else {}


def _shapes(module: nn.Module, dtype: Dtype) -> names.Params:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.dtype(dtype)), names.abstract_params(module))


def _part_folder(source: str | Path, part: str, variant: str | None, weights: bool = True) -> Path:
    """Folder of one part: SOURCE/part where that is, else SOURCE itself."""
    patterns = ["config.json", "model_index.json", RECORD, f"{part}/config.json"]
    tensors = weight_files.download_patterns(weight_files.DIFFUSERS_NAME, variant)
    patterns += [prefix + pattern for prefix in ("", f"{part}/") for pattern in tensors]
    folder = _folder(source, patterns, weights)
    inside = folder / part
    if (inside / "config.json").is_file() or (folder / "model_index.json").is_file():
        return inside
    return folder


def _pipeline_patterns(parts: set[str], read: set[str], variant: str | None) -> list[str]:
    """Globs of what `parts` of a pipeline need: configs, and the weights of those that are `read`."""
    patterns = ["model_index.json", RECORD, SCHEDULER]
    patterns += [f"{slot}/{name}" for slot in ("tokenizer", "tokenizer_2") for name in ("*.json", "*.txt")]
    for part in sorted(parts):
        name = weight_files.TRANSFORMERS_NAME if part.startswith("text_encoder") else weight_files.DIFFUSERS_NAME
        tensors = weight_files.download_patterns(name, variant) if part in read else []
        patterns += [f"{part}/{file}" for file in ("config.json", *tensors)]
    return patterns


def _model_index(folder: Path, source: str) -> Config:
    if not (folder / "model_index.json").is_file():
        if (folder / "config.json").is_file():
            raise LcmError(f"{source} holds a single model, no pipeline (no model_index.json); give its whole pipeline")
        raise LcmError(f"{source} is no diffusers folder (no model_index.json); give the folder that holds that file")
    index = files.read_json(folder / "model_index.json")
    if "unet" not in index:
        kind = index.get("_class_name")
        raise LcmError(f"{source} is a {kind} without a unet; a model of the Stable Diffusion family is needed")
    return index


def _entry_class(index: Config, part: str) -> str | None:
    """Class name that model_index gives a part (without "Flax"); None: the part is declared absent."""
    entry = index.get(part)
    if not (isinstance(entry, list) and len(entry) == 2 and entry[1]):
        return None
    return entry[1].removeprefix("Flax")


def _encoder_slots(folder: Path, index: Config) -> dict[str, tuple[Path, str | None]]:
    """Part -> (folder, class). A refiner's only encoder becomes "text_encoder_2" wherever its folder puts it."""
    found = {}
    for part in ("text_encoder", "text_encoder_2"):
        kind = _entry_class(index, part)
        if kind is not None:
            if kind not in _TEXT_ENCODERS:
                raise UnsupportedConfig(f"{part} in model_index.json", kind, _TEXT_ENCODERS)
            found[part] = folder / part, kind
    if not found:
        raise LcmError(f"{folder} has no text encoder (text_encoder, text_encoder_2 in model_index.json); add one")
    if list(found) == ["text_encoder"] and found["text_encoder"][1] == "CLIPTextModelWithProjection":
        return {"text_encoder_2": found["text_encoder"]}
    return found


def _config(folder: Path, part: str) -> Config:
    config = files.read_json(folder / "config.json")
    kind = config.get("_class_name")
    if isinstance(kind, str) and kind.removeprefix("Flax") not in _CLASSES[part]:
        raise UnsupportedConfig(f"_class_name of {folder / 'config.json'}", kind, _CLASSES[part])
    return config


def _module(part: str, config: Config, dtype: Dtype) -> nn.Module:
    return _FROM_CONFIG[part](config, dtype=dtype)


_FROM_CONFIG: dict[str, Callable[..., nn.Module]] = {
    "unet": unet.from_config,
    "vae": vae.from_config,
    "text_encoder": clip.from_config,
    "text_encoder_2": clip.from_config,
}


def _params(
    module: nn.Module, folder: Path, name: str, variant: str | None, dtype: Dtype, place: names.Place | None
) -> names.Params:
    with weight_files.open_weights(folder, name, variant) as weights:
        return names.read_params(module, weights.shapes, weights.read, jnp.dtype(dtype), str(weights.source), place)


def scheduler_config(folder: Path, index: Config) -> Config:
    """The scheduler's config, with the class that model_index.json gives it where it names none itself.

    Raises:
      UnsupportedConfig: either class is none that `schedule.from_config` takes.
      LcmError: the file is missing or no noise schedule, or diffusers, which goes by model_index.json, reads another.
    """
    config, kind = files.read_json(folder / SCHEDULER), _entry_class(index, "scheduler")
    config = {"_class_name": kind, **config} if kind else config
    try:
        noise = schedule.from_config(config)
        theirs = schedule.from_config(config | {"_class_name": kind}) if kind else noise
    except UnsupportedConfig as error:
        raise UnsupportedConfig(error.field, error.value, f"{error.supported} (scheduler of {folder})") from None
    except LcmError as error:
        raise LcmError(f"{folder / SCHEDULER}: {error}") from None
    if theirs != noise:
        raise LcmError(
            f"{folder / SCHEDULER} names {config['_class_name']} and leaves betas out, but model_index.json names "
            f"{kind}, which has others; write the betas that the model was trained with into it"
        )
    return config


def check_noise(source: str | Path, noise: NoiseSchedule, model: str, weights: bool = True) -> None:
    """Refuse a UNet from `source` if the scheduler or the record there says that it was trained on other noise.

    Args:
      source: folder or hub id.
      noise: what the UNet would be used with, of `model`.
      weights: False: where the hub cannot be asked, the package's own configs.
    """
    folder = _folder(source, ["model_index.json", SCHEDULER, RECORD], weights)
    above = folder.absolute().parent
    for place in (folder, above) if (above / "model_index.json").is_file() else (folder,):
        index, record = (
            files.read_json(place / name) if (place / name).is_file() else {} for name in ("model_index.json", RECORD)
        )
        said = []
        if (place / SCHEDULER).is_file():
            theirs = schedule.from_config(scheduler_config(place, index))
            said = [] if theirs == noise else [f"{SCHEDULER} says {theirs}"]
        if record.get("prediction_type", noise.prediction_type) != noise.prediction_type:
            said.append(f"{RECORD} says {record['prediction_type']}")
        if said:
            raise LcmError(
                f"{place}: {' and '.join(said)}, but {model} is used with {noise}; take the UNet and the rest from one "
                "model, or correct what is wrong"
            )


_SLACK = 1 << 20  # bytes for headers, configs and the file system's own rounding

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
    "steps_offset": 1,  # anything else makes StableDiffusionPipeline rewrite the config with a warning
    "thresholding": False,
    "timestep_scaling": 10.0,
    "timestep_spacing": "leading",
    "trained_betas": None,
}
_LCM_KEYS = ("original_inference_steps", "timestep_scaling")


def lcm_scheduler_config(source: Config, **overrides: Any) -> Config:
    """LCMScheduler's full config with the noise table and prediction type of a scheduler config `source`.

    overrides: keys to set, e.g. original_inference_steps=100; unknown ones are refused by name.
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
    dtype: Any = jnp.float32,
    variant: str | None = None,
    extra_files: Mapping[str, str | bytes] | None = None,
) -> Path:
    """Write a complete diffusers folder.

    Args:
      out: the folder; must not exist, or be empty.
      scheduler_config: scheduler/scheduler_config.json; None: LCMScheduler for a UNet with w embedding, else the
        pipeline's own.
      model_index_extra: keys to add to model_index.json.
      dtype: of all weights.
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
    parts = {part: getattr(pipeline, part) for part in names_of_parts(pipeline)}
    texts = {
        f"{part}/config.json": _json(_text_config(module, pipeline.configs.get(part, {})))
        if isinstance(module, clip.CLIPTextModel)
        else _json(to_config(module))
        for part, module in parts.items()
    }
    texts["scheduler/scheduler_config.json"] = _json(scheduler_config)
    index = _written_index(pipeline, scheduler_config["_class_name"]) | dict(model_index_extra or {})
    texts["model_index.json"] = _json(index)
    for part, tokens in pipeline.tokenizers.items():
        slot = part.replace("text_encoder", "tokenizer")
        if tokens is None:
            raise LcmError(f"the pipeline was loaded without its {slot}; load it with weights to save it")
        texts |= {f"{slot}/{name}": content for name, content in tokens.files.items()}
    trees = {
        f"{part}/{weight_files.single_file(_weights_name(module), variant)}": (module, params[part])
        for part, module in parts.items()
    }
    return _write(Path(out), trees, texts, extra_files or {}, dtype)


def save_unet(
    unet: nn.Module,
    params: names.Params,
    out: str | Path,
    *,
    dtype: Any = jnp.float32,
    variant: str | None = None,
    extra_files: Mapping[str, str | bytes] | None = None,
) -> Path:
    """Write only a UNet, config and weights at the folder's root (the layout of `lcm-sdxl`). See `save_pipeline`."""
    trees = {weight_files.single_file(weight_files.DIFFUSERS_NAME, variant): (unet, params)}
    return _write(Path(out), trees, {"config.json": _json(to_config(unet))}, extra_files or {}, dtype)


def names_of_parts(pipeline: Pipeline) -> tuple[str, ...]:
    """The parts with weights that the pipeline has."""
    present = (part for part in ("text_encoder", "text_encoder_2") if getattr(pipeline, part) is not None)
    return "unet", "vae", *present


def check_target(out: str | Path, needed: int = 0) -> None:
    """Refuse to write `needed` bytes to the folder `out` if it is in use or the disk too full.

    A program calls it before its long work, too.

    Raises:
      LcmError: `out` is a file or not empty, or fewer than `needed` bytes are free.
    """
    out = Path(out)
    if out.is_file() or (out.is_dir() and any(out.iterdir())):
        raise LcmError(f"{out} already exists and is not empty; choose another folder or remove it first")
    files.check_space(out, needed)


def _weights_name(module: nn.Module) -> str:
    return weight_files.TRANSFORMERS_NAME if isinstance(module, clip.CLIPTextModel) else weight_files.DIFFUSERS_NAME


def _json(value: Mapping[str, Any]) -> str:
    return json.dumps(value, indent=2, sort_keys=True) + "\n"


def _text_config(module: clip.CLIPTextModel, source: Config) -> Config:
    """The source's config (extra keys are harmless) with the module's fields; dtype in both spellings."""
    kept = {key: value for key, value in source.items() if key != "_name_or_path"}
    return kept | clip.to_config(module) | {"dtype": "float32", "torch_dtype": "float32"}


def _checked_scheduler(pipeline: Pipeline, config: Config | None) -> Config:
    if config is None:
        config = dict(pipeline.configs["scheduler"])
        if pipeline.has_w_embedding:
            config = lcm_scheduler_config(config)
    if "_class_name" not in config:
        raise LcmError("the scheduler config has no _class_name; diffusers needs it, e.g. LCMScheduler")
    made = schedule.from_config(config)
    mine = pipeline.schedule
    if made != mine:
        raise LcmError(
            f"the scheduler config ({config['_class_name']}, {made.prediction_type}, {made.num_train_timesteps} steps) "
            f"has another noise table or prediction type than the model ({mine.prediction_type}, "
            f"{mine.num_train_timesteps} steps); make it from the model's own by lcm_scheduler_config"
        )
    return config


def _written_index(pipeline: Pipeline, scheduler_class: str) -> Config:
    source = pipeline.configs.get("model_index", {})
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
    return "LatentConsistencyModelPipeline" if pipeline.has_w_embedding else "StableDiffusionPipeline"


def _write(
    out: Path,
    trees: Mapping[str, tuple[nn.Module, names.Params]],
    texts: Mapping[str, str | bytes],
    extra: Mapping[str, str | bytes],
    dtype: Any,
) -> Path:
    outside = [name for name in extra if Path(name).is_absolute() or ".." in Path(name).parts]
    bad = outside + [name for name in extra if name in texts or name in trees]
    if bad:
        raise LcmError(f"extra file {bad[0]!r} is one of the model's own or not inside the folder; rename it")
    leaves = {name: names.torch_leaves(module, params) for name, (module, params) in trees.items()}
    shapes = {name: {key: p.torch_shape for key, (p, _) in found.items()} for name, found in leaves.items()}
    needed = sum(weight_files.weights_size(found, dtype) for found in shapes.values())
    needed += sum(len(text) for text in (*texts.values(), *extra.values())) + _SLACK
    with all_or_nothing(out, needed) as folder:
        for name, text in {**texts, **extra}.items():
            files.write_text(folder / name, text)
        for name, found in leaves.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)

            def tensor(key: str, found=found) -> np.ndarray:
                parameter, leaf = found[key]
                return names.to_torch_layout(leaf, parameter, jnp.dtype(dtype))

            weight_files.write_weights(folder / name, shapes[name], tensor, jnp.dtype(dtype))
    return out


@contextlib.contextmanager
def all_or_nothing(out: Path, needed: int) -> Iterator[Path]:
    """A new folder beside `out` that takes its name when the block ends well, and is removed when it does not."""
    check_target(out, needed)
    out = out.absolute()
    out.parent.mkdir(parents=True, exist_ok=True)
    folder = out.parent / f".{out.name}.{uuid.uuid4().hex[:8]}.partial"
    folder.mkdir()
    try:
        yield folder
        for place in (folder, *(p for p in folder.rglob("*") if p.is_dir())):
            files.sync_folder(place)
        os.rename(folder, out)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    files.sync_folder(out.parent)
