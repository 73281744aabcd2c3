"""Single-file checkpoints: one .safetensors with the original key names, as A1111 and ComfyUI read and write them.

    model.diffusion_model.                     UNet
    first_stage_model.                         VAE
    cond_stage_model.transformer.              SD 1.x     CLIP ViT-L
    cond_stage_model.model.                    SD 2.x     OpenCLIP ViT-H
    conditioner.embedders.{0.transformer,1.model}.   SDXL  CLIP ViT-L, OpenCLIP bigG; refiner: embedders.0.model.

Keys outside these prefixes (an EMA's copy, ...) are not looked at, but for the marks of `noise_marks`. A file holds
neither tokenizers nor configs: the UNet's is read off its tensors, the others are known for each family, and a
diffusers folder given as `config` has the last word. Noise is the exception: v prediction and zero terminal SNR that
the file is marked with win over the folder's scheduler (with a warning), since the folder may be given for its
tokenizers alone. If neither says a prediction type: for SD 2.x, as diffusers has it, v unless `global_step` is 875000
(with a warning); else epsilon.
"""

import dataclasses
import json
import re
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
from absl import logging
from flax import linen as nn

from lcm_jax import files
from lcm_jax.diffusion import schedule
from lcm_jax.errors import LcmError, UnsupportedConfig
from lcm_jax.models import clip, unet, vae
from lcm_jax.models.config import to_config
from lcm_jax.pretrained import diffusers_folder, hub, names, noise_marks, tokenizer
from lcm_jax.pretrained import safetensors_io as weight_files
from lcm_jax.pretrained import single_file_keys as keys
from lcm_jax.pretrained.model import RECORD, SCHEDULER, Pipeline, PipelineParams, check_fit, parts_read
from lcm_jax.pretrained.names import Shape

Config = dict[str, Any]

UNET, VAE = "model.diffusion_model.", "first_stage_model."
SUFFIX = ".safetensors"

_HUB_FILE = re.compile(
    r"(?:https?://(?:huggingface\.co|hf\.co)/)?(?P<repository>[\w-][\w.-]*/[\w-][\w.-]*)/"
    r"(?:(?:blob|resolve)/(?P<revision>[^/]+)/)?(?P<file>[^?]+\.safetensors)(?:\?.*)?"
)
_SD2_BASE_STEPS = 875000  # the only mark by which diffusers tells SD 2.0 base (epsilon) from SD 2.x 768 (v)

_TEXT = {
    "bos_token_id": 0,
    "eos_token_id": 2,
    "pad_token_id": 1,
    "layer_norm_eps": 1e-5,
    "max_position_embeddings": 77,
    "model_type": "clip_text_model",
    "vocab_size": 49408,
}
_VIT_L = _TEXT | {
    "architectures": ["CLIPTextModel"],
    "hidden_act": "quick_gelu",
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_attention_heads": 12,
    "num_hidden_layers": 12,
    "projection_dim": 768,
}
_VIT_H = _TEXT | {
    "architectures": ["CLIPTextModel"],
    "hidden_act": "gelu",
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_attention_heads": 16,
    "num_hidden_layers": 23,
    "projection_dim": 512,
}
_BIG_G = _TEXT | {
    "architectures": ["CLIPTextModelWithProjection"],
    "hidden_act": "gelu",
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_attention_heads": 20,
    "num_hidden_layers": 32,
    "projection_dim": 1280,
}
_VAE_CONFIG = {
    "_class_name": "AutoencoderKL",
    "act_fn": "silu",
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "in_channels": 3,
    "latent_channels": 4,
    "layers_per_block": 2,
    "norm_num_groups": 32,
    "out_channels": 3,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
}
_SCHEDULER = {
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "clip_sample": False,
    "num_train_timesteps": 1000,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "trained_betas": None,
}
_EULER = {"interpolation_type": "linear", "timestep_spacing": "leading", "use_karras_sigmas": False}


@dataclasses.dataclass(frozen=True)
class Encoder:
    """A text encoder's place in a file. `key`, one that only it has, tells its family."""

    prefix: str
    key: str
    layout: Callable[[clip.CLIPTextModel], keys.Layout]
    config: Config


@dataclasses.dataclass(frozen=True)
class Family:
    """One kind of file.

    Attributes:
      encoders: part -> Encoder.
      context: width of the text that published UNets attend to.
      hub: repository that has the tokenizers (the one that diffusers' loader takes).
      pixels: size of the pictures; scaling_factor: of the VAE; model_index: its entries that count.
    """

    name: str
    encoders: Mapping[str, Encoder]
    context: int
    hub: str
    pixels: int
    scaling_factor: float
    model_index: Config


def _clip(prefix: str) -> Encoder:
    # Some fine-tunes lack `text_model.`, so the key is told by its end.
    return Encoder(prefix, "embeddings.token_embedding.weight", keys.clip_layout, _VIT_L)


def _open_clip(prefix: str, config: Config) -> Encoder:
    return Encoder(prefix, "token_embedding.weight", keys.open_clip_layout, config)


FAMILIES = (
    Family(
        "sdxl",
        {
            "text_encoder": _clip("conditioner.embedders.0.transformer."),
            "text_encoder_2": _open_clip("conditioner.embedders.1.model.", _BIG_G),
        },
        2048,
        "stabilityai/stable-diffusion-xl-base-1.0",
        1024,
        0.13025,
        {"_class_name": "StableDiffusionXLPipeline", "force_zeros_for_empty_prompt": True},
    ),
    Family(
        "sdxl-refiner",
        {"text_encoder_2": _open_clip("conditioner.embedders.0.model.", _BIG_G)},
        1280,
        "stabilityai/stable-diffusion-xl-refiner-1.0",
        1024,
        0.13025,
        {
            "_class_name": "StableDiffusionXLImg2ImgPipeline",
            "force_zeros_for_empty_prompt": False,
            "requires_aesthetics_score": True,
        },
    ),
    Family(
        "sd1",
        {"text_encoder": _clip("cond_stage_model.transformer.")},
        768,
        "stable-diffusion-v1-5/stable-diffusion-v1-5",
        512,
        0.18215,
        {"_class_name": "StableDiffusionPipeline"},
    ),
    Family(
        "sd2",
        {"text_encoder": _open_clip("cond_stage_model.model.", _VIT_H)},
        1024,
        "stabilityai/stable-diffusion-2-1",
        768,
        0.18215,
        {"_class_name": "StableDiffusionPipeline"},
    ),
)


def is_single_file(source: str | Path) -> bool:
    """`source` names one .safetensors, here or on the hub (owner/name/FILE, or its address), and no folder."""
    return str(source).split("?")[0].endswith(SUFFIX) and not Path(source).expanduser().is_dir()


def load_single_file(
    source: str | Path,
    variant: str | None = None,
    dtype: Any = jnp.float32,
    param_dtype: Any = jnp.float32,
    *,
    config: str | Path | None = None,
    unet: str | Path | None = None,
    vae: str | Path | None = None,
    place: names.Place | None = None,
    weights: bool | Collection[str] = True,
) -> tuple[Pipeline, PipelineParams]:
    """Load a checkpoint of SD 1.x, SD 2.x, SDXL or its refiner, also pruned or with 9 channels (inpainting).

    Args:
      source: file, or on the hub `owner/name/FILE.safetensors` or its address.
      variant: of the folders `unet` and `vae`; a single file has none.
      dtype, param_dtype: as `load_pipeline`.
      config: diffusers folder or hub id of the family. Its tokenizers are taken, and each config that it has, but for
        what the tensors themselves settle (input channels, w embedding). None: tokenizers of the family's repository on
        the hub, configs as the module's docstring says.
      unet, vae, place, weights: as `load_pipeline`; the file must be there, as its header says what it holds.

    Raises:
      LcmError: no such file, unknown family (names the keys looked for), tokenizers not to be had, tensors that do not
        fit the configs.
      UnsupportedConfig: a config asks for something outside the Stable Diffusion family.
    """
    if variant is not None and unet is None and vae is None:
        raise LcmError(f"{source} is a single file and has no variant {variant!r}; leave the variant out")
    path = local_file(source)
    with weight_files.open_weights(path.parent, path.stem) as stored:
        read, dtype = parts_read(weights), jnp.dtype(dtype)  # modules with the same dtype must be equal

        def no_tensor(key: str) -> np.ndarray:
            return np.broadcast_to(np.float32(0), stored.shapes[key])

        family = _family(stored.shapes, path)
        folder = _config_folder(config, family, path)
        given = None if config is None else folder
        replaced = {
            part: diffusers_folder.load_part(part, other, variant, dtype, param_dtype, place, part in read)
            for part, other in (("unet", unet), ("vae", vae))
            if other
        }
        configs = _configs(given, family, stored, _metadata(path), {part: m for part, (m, _) in replaced.items()})
        noise = schedule.from_config(configs["scheduler"])
        if unet:
            diffusers_folder.check_noise(unet, noise, str(path), "unet" in read)
        modules = dict.fromkeys(("text_encoder", "text_encoder_2"))
        modules |= {part: _FROM_CONFIG[part](configs[part], dtype=dtype) for part in ("unet", "vae", *family.encoders)}
        modules |= {part: module for part, (module, _) in replaced.items()}
        tokenizers = dict.fromkeys(("tokenizer", "tokenizer_2"))
        for part in family.encoders:
            length = modules[part].max_position_embeddings
            slot = part.replace("text_encoder", "tokenizer")
            tokenizers[slot] = tokenizer.load_tokenizer(_slot(folder, slot), length)
        check_fit(modules)
        params = {part: tree for part, (_, tree) in replaced.items()}
        for part, (layout, prefix) in layouts(family, modules, stored.shapes).items():
            if part not in params:
                what = f"{part.replace('_', ' ')} of {path}"
                tensor, put = (stored.read, place) if part in read else (no_tensor, _shape)
                source = prefix, stored.shapes, tensor
                params[part] = keys.read_part(modules[part], layout, *source, param_dtype, what, put)
    record = diffusers_folder.folder_record(unet, "unet" in read) if unet else read_record(path)
    return Pipeline(**modules, **tokenizers, schedule=noise, configs=configs, record=record), params


def _shape(value: np.ndarray) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(value.shape, value.dtype)


def read_record(source: str | Path) -> Config:
    """What a file that `save_single_file` wrote says of its distillation (metadata `lcm_config.json`), else {}."""
    path = local_file(source)
    with weight_files.open_weights(path.parent, path.stem):  # says what is wrong with a file that cannot be read
        text = _metadata(path).get(RECORD, "{}")
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise LcmError(f"{path}: its metadata {RECORD} is not valid JSON ({error}); write it again") from None


def local_file(source: str | Path) -> Path:
    """The file `source`, or the local copy of a file on the hub.

    Raises:
      LcmError: neither there nor to be fetched.
    """
    path = Path(source).expanduser()
    if path.is_file():
        return path
    match = _HUB_FILE.fullmatch(str(source))
    if not match:
        raise LcmError(f"{source} does not exist; give a .safetensors file, or owner/name/FILE.safetensors on the hub")
    import huggingface_hub  # here, because a run from a local file needs none of it

    try:
        return Path(huggingface_hub.hf_hub_download(match["repository"], match["file"], revision=match["revision"]))
    except Exception as error:  # the hub's client raises its own, httpx's, the system's and more
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise LcmError(
            f"no file {source} here, and it cannot be fetched from the hub ({type(error).__name__}: {reason}); "
            "check name, access and network, or give a local file"
        ) from error


def _metadata(path: Path) -> dict[str, str]:
    with safetensors.safe_open(path, framework="np") as handle:
        return handle.metadata() or {}


def _family(shapes: Mapping[str, Shape], path: Path) -> Family:
    """The family whose text encoders the file holds beside a UNet and a VAE."""
    looked_for = [UNET + "input_blocks.0.0.weight", VAE + "encoder.conv_in.weight"]
    missing = [key for key in looked_for if key not in shapes]
    for family in FAMILIES:
        if not missing and all(_holds(shapes, encoder) for encoder in family.encoders.values()):
            _check_known(family, shapes, path)
            return family
    encoders = [f"{e.prefix}...{e.key}" for family in FAMILIES for e in family.encoders.values()]
    sample = ", ".join(sorted(shapes)[:3]) or "nothing"
    raise LcmError(
        f"{path} is no checkpoint of a known family (SD 1.x, SD 2.x, SDXL, SDXL refiner): it needs "
        f"{', '.join(looked_for)} and a text encoder under {' or '.join(dict.fromkeys(encoders))}; it holds {sample}, "
        "...; give a whole checkpoint of one of these, or a diffusers folder"
    )


def _holds(shapes: Mapping[str, Shape], encoder: Encoder) -> bool:
    middles = ("", "text_model.")
    return any(encoder.prefix + middle + encoder.key in shapes for middle in middles)


def _check_known(family: Family, shapes: Mapping[str, Shape], path: Path) -> None:
    """Refuse what has the family's text encoder but another kind of model."""
    label = UNET + "label_emb.0.0.weight" in shapes
    if label != family.name.startswith("sdxl"):
        raise LcmError(
            f"{path} has the text encoders of {family.name}, but {'a' if label else 'no'} {UNET}label_emb.0.0.weight; "
            "give a checkpoint of SD 1.x, SD 2.x, SDXL or the SDXL refiner"
        )


def _config_folder(config: str | Path | None, family: Family, path: Path) -> Path:
    slots = [f"{slot}/{name}" for slot in ("tokenizer", "tokenizer_2") for name in ("*.json", "*.txt")]
    if config is not None:
        parts = ("unet", "vae", "text_encoder", "text_encoder_2")
        patterns = ["model_index.json", "scheduler/scheduler_config.json", *(f"{part}/config.json" for part in parts)]
        return hub.local_folder(config, patterns + slots)
    try:
        return hub.local_folder(family.hub, slots)
    except LcmError as error:
        raise LcmError(
            f"{path} holds no tokenizer, and that of its family ({family.name}) is not to be had: {error}; "
            f"give config=, a local folder of a {family.name} model in diffusers format"
        ) from error


def _slot(folder: Path, name: str) -> Path:
    """`folder/name`; a refiner's only encoder and tokenizer may also stand under the first name."""
    place = folder / name
    return place if place.is_dir() else folder / name.removesuffix("_2")


def _configs(
    folder: Path | None, family: Family, weights: weight_files.Weights, metadata: Mapping[str, str], replaced: Mapping
) -> dict[str, Config]:
    """Part -> config: the folder's where it has one, else the family's; also "scheduler" and "model_index"."""

    def of(place: str, known: Callable[[], Config]) -> Config:
        path = None if folder is None else folder / place
        return files.read_json(path) if path is not None and path.is_file() else known()

    shapes = {key.removeprefix(UNET): shape for key, shape in weights.shapes.items() if key.startswith(UNET)}
    index = of("model_index.json", lambda: family.model_index)
    given = folder is not None and (folder / SCHEDULER).is_file()
    given = diffusers_folder.scheduler_config(folder, index) if given else None
    configs = {"model_index": index, "scheduler": _scheduler(family, weights, metadata, given, folder)}
    is_base = family.name == "sd2" and configs["scheduler"].get("prediction_type", "epsilon") == "epsilon"
    pixels = 512 if is_base else family.pixels
    configs["vae"] = of(
        "vae/config.json",
        lambda: _VAE_CONFIG | {"sample_size": pixels, "scaling_factor": family.scaling_factor},
    )
    config = of("unet/config.json", lambda: keys.unet_config(shapes) | {"sample_size": pixels // 8})
    configs["unet"] = config | keys.file_fields(shapes)
    for part, encoder in family.encoders.items():
        place = f"{part}/config.json" if folder is None else f"{_slot(folder, part).name}/config.json"
        known = encoder.config
        configs[part] = of(place, lambda known=known: known) | {"architectures": known["architectures"]}
    return configs | {part: to_config(module) for part, module in replaced.items()}


def _scheduler(
    family: Family,
    weights: weight_files.Weights,
    metadata: Mapping[str, str],
    given: Config | None,
    folder: Path | None,
) -> Config:
    """The scheduler's config: `given`, that of `folder`, unless the file is marked otherwise.

    Raises:
      LcmError: marks and `given` contradict each other, and the marks do not settle it.
    """
    source, marks = weights.source, noise_marks.read(weights.source, weights.shapes, metadata)
    config = published_scheduler(family, marks.prediction_type or _guess(family, weights)) if given is None else given
    fields = schedule.noise_fields(config)
    says, rescale = fields["prediction_type"], bool(fields["rescale_betas_zero_snr"])
    kind = marks.prediction_type or says
    if kind not in (says, "v_prediction"):
        raise LcmError(
            f"{source} is marked {marks.said}, but {SCHEDULER} of {folder} says {says}; correct the one that "
            "is wrong, or give config= a folder without a scheduler"
        )
    said, zero = marks.said, marks.zero_snr or rescale
    stored = noise_marks.table(weights)
    if stored is not None:
        key, fits = stored[0], noise_marks.fits(stored[1], fields)
        if not fits:
            raise LcmError(
                f"{source} holds a noise table ({key}) other than {'the published one' if given is None else folder}; "
                f"give config= a folder whose scheduler has it, or remove {key} if it is left over from another model"
            )
        if fits == [True]:
            said, zero = ", ".join([*filter(None, [said]), f"{key} (zero terminal SNR)"]), True
        elif zero and True not in fits:
            logging.warning("%s holds a noise table (%s) without zero terminal SNR, taken for left over", source, key)
    if zero and kind == "epsilon" and not rescale:
        raise LcmError(
            f"{source} is marked {said}, which goes with v prediction, but "
            f"{'nothing says so' if given is None else f'{SCHEDULER} of {folder} says epsilon'}; add an empty "
            "tensor v_pred to the file if its model predicts v, else remove the mark"
        )
    if (kind, zero) == (says, rescale):
        return config
    made = published_scheduler(family, kind) | fields | {"prediction_type": kind, "rescale_betas_zero_snr": zero}
    if given is not None:
        logging.warning(
            "%s is marked %s, but %s of %s says %s: the marks are taken, %s",
            source,
            said,
            SCHEDULER,
            folder,
            schedule.from_config(given),
            schedule.from_config(made),
        )
    return made


def published_scheduler(family: Family, kind: str) -> Config:
    """The scheduler as the family's models are published, with a prediction type."""
    config = _SCHEDULER | {"prediction_type": kind}
    if family.name.startswith("sdxl"):
        return {"_class_name": "EulerDiscreteScheduler"} | config | _EULER
    return {"_class_name": "PNDMScheduler" if kind == "epsilon" else "DDIMScheduler"} | config


def _guess(family: Family, weights: weight_files.Weights) -> str:
    """The prediction type of a file that does not say it."""
    if family.name != "sd2" or weights.shapes[UNET + "input_blocks.0.0.weight"][1] == 9:
        return "epsilon"
    steps = int(weights.read("global_step").item()) if "global_step" in weights.shapes else None
    kind = "epsilon" if steps == _SD2_BASE_STEPS else "v_prediction"
    logging.warning(
        "%s: an SD 2.x file does not say what it predicts; taken for %s (global_step %s), as diffusers does. For the "
        "other kind give config=, the diffusers folder of the model it comes from",
        weights.source,
        kind,
        steps,
    )
    return kind


_FROM_CONFIG: dict[str, Callable[..., nn.Module]] = {
    "unet": unet.from_config,
    "vae": vae.from_config,
    "text_encoder": clip.from_config,
    "text_encoder_2": clip.from_config,
}


def layouts(family: Family, modules: Mapping[str, Any], shapes: Mapping[str, Shape] | None = None) -> dict[str, tuple]:
    """Part -> (layout, prefix). shapes: those of a file to be read, which may lack `text_model.`."""
    if not isinstance(modules["vae"], vae.AutoencoderKL):
        kind = type(modules["vae"]).__name__
        raise UnsupportedConfig("VAE of a single file", kind, "AutoencoderKL; export a diffusers folder")
    found = {"unet": (keys.unet_layout(modules["unet"]), UNET), "vae": (keys.vae_layout(modules["vae"]), VAE)}
    for part, encoder in family.encoders.items():
        layout, prefix = encoder.layout(modules[part]), encoder.prefix
        if shapes is not None and prefix + encoder.key in shapes:
            tensors = {key.removeprefix("text_model."): stored for key, stored in layout.tensors.items()}
            layout = dataclasses.replace(layout, tensors=tensors)
        found[part] = layout, prefix
    return found
