"""A text-to-image model as a static description, equal by content; its weights are a tree beside it.

    pipeline, params = load_pipeline("runs/shapes_lcm/export")

`pipeline` holds modules, tokenizers, the noise schedule and the constants that sampling must match: it can be a static
argument of `jax.jit`, so models of one architecture share every compiled program. `params` is always an argument, so
the weights of a model are freed when nobody holds them any more.
"""

import dataclasses
import functools
import hashlib
import math
from collections.abc import Collection, Mapping
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax.traverse_util import flatten_dict
from jax.experimental import multihost_utils
from jax.typing import DTypeLike

from lcm_jax.diffusion import guidance
from lcm_jax.diffusion.consistency import SIGMA_DATA, TIMESTEP_SCALING
from lcm_jax.diffusion.schedule import NoiseSchedule
from lcm_jax.errors import LcmError, UnsupportedConfig
from lcm_jax.models import clip, unet, vae
from lcm_jax.models.clip import CLIPTextModel
from lcm_jax.models.config import to_config
from lcm_jax.models.unet import UNet2DConditionModel
from lcm_jax.pretrained.names import Params
from lcm_jax.pretrained.tokenizer import Tokenizer
from lcm_jax.typed import Positive, Range, checked, config_of, field_types

Config = dict[str, Any]
PipelineParams = Mapping[str, Params]  # part -> parameter tree

TEXT_ENCODERS = ("text_encoder", "text_encoder_2")
TOKENIZERS = ("tokenizer", "tokenizer_2")
TOKENIZER_OF = dict(zip(TEXT_ENCODERS, TOKENIZERS, strict=True))
TOKENIZER_PATTERNS = [f"{name}/{file}" for name in TOKENIZERS for file in ("*.json", "*.txt")]  # on the hub
PARTS = ("unet", "vae", *TEXT_ENCODERS)
ENCODERS = PARTS[1:]  # what images and captions are encoded with
SCHEDULER = "scheduler/scheduler_config.json"
RECORD = "lcm_config.json"  # what an export of ours records of its distillation: w range, solver steps, scalings

MAX_TWO_PASS_SCALE = 2.0  # guidance of an LCM without w embedding: images above it are oversaturated
GUIDANCE_SCALE = 8.0  # the default of a model that does not record another range


_GuidanceWeight = Annotated[float, Range(0, 1000)]


@dataclasses.dataclass(frozen=True)
class Constants:
    """What sampling must match of the training of a model.

    Attributes:
      solver_steps: N of the solver's grid, from which `lcm` takes its timesteps.
      timestep_scaling, sigma_data: of the boundary scalings (`diffusion.consistency`).
      phases: of a phased map, whose sampler takes as many steps (`diffusion.phases`); 0: the map goes to the origin.
      w_min, w_max: the range of guidance weights of the distillation; the user's guidance scale is w + 1.
      set_alpha_to_one: whether DDIM ends at abar = 1, or at abar_0.
      zero_null: whether the null text of SDXL is zeros instead of the encoded "".
    """

    solver_steps: Annotated[int, Range(1, 10_000)] = 50
    timestep_scaling: Positive = TIMESTEP_SCALING
    sigma_data: Positive = SIGMA_DATA
    phases: Annotated[int, Range(0, 10_000)] = 0
    w_min: _GuidanceWeight = 0.0
    w_max: _GuidanceWeight = math.inf
    set_alpha_to_one: bool = True
    zero_null: bool = True


# Where constants are found: key in the file -> field of `Constants`.
_IN_SCHEDULER = {
    "original_inference_steps": "solver_steps",
    "timestep_scaling": "timestep_scaling",
    "set_alpha_to_one": "set_alpha_to_one",
}
_IN_INDEX = {"force_zeros_for_empty_prompt": "zero_null"}
_IN_RECORD = {key: key for key in ("solver_steps", "timestep_scaling", "sigma_data", "phases", "w_min", "w_max")}


def recorded(record: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of `Constants` that a record (the content of `lcm_config.json`) gives.

    Raises:
      LcmError: a value of a wrong type or out of range.
    """
    found = _fields(RECORD, record, _IN_RECORD)
    if found.get("w_min", 0.0) > found.get("w_max", math.inf):
        raise LcmError(f"w_min={found['w_min']} of {RECORD} is above w_max={found['w_max']}; correct them")
    checked(f"prediction_type of {RECORD}", record.get("prediction_type", ""), str)
    way = record.get("map") or ("phased" if found.get("phases") else "origin")
    if way != ("phased" if found.get("phases") else "origin"):
        supported = "origin without phases, or phased with phases of 1 or more; correct it, or copy the file again"
        raise UnsupportedConfig(f"map of {RECORD}", way, supported)
    return found


def _fields(file: str, content: Mapping[str, Any], keys: Mapping[str, str]) -> dict[str, Any]:
    """Fields of `Constants` that a file gives; null is nothing. Raises UnsupportedConfig, which names file and key."""
    kinds = field_types(Constants)
    given = {key: content[key] for key in keys if content.get(key) is not None}
    return {keys[key]: checked(f"{key} of {file}", value, kinds[keys[key]]) for key, value in given.items()}


@dataclasses.dataclass(frozen=True, eq=False)
class Pipeline:
    """The parts of a text-to-image model, without weights. `dataclasses.replace` exchanges one.

    Two pipelines are equal if modules, tokenizers, noise schedule and constants are. Raises LcmError for constants of a
    wrong type or out of range.

    Attributes:
      unet, vae: Linen modules.
      text_encoder, text_encoder_2: Linen modules or None. SD has the first, SDXL both, its refiner only the second.
      tokenizer, tokenizer_2: beside each text encoder, or None; None as well if no weights were read.
      schedule: noise table and prediction type.
      configs: part -> raw JSON; also "scheduler" and "model_index".
      record: content of `lcm_config.json`, or of its copy in a single file's header; {} if there is none.
      may_be_lcm: whether a LoRA or another UNet was put in, which may be distilled without any record of it.
    """

    unet: UNet2DConditionModel
    vae: nn.Module
    text_encoder: CLIPTextModel | None
    text_encoder_2: CLIPTextModel | None
    tokenizer: Tokenizer | None
    tokenizer_2: Tokenizer | None
    schedule: NoiseSchedule
    configs: Mapping[str, Config]
    record: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    may_be_lcm: bool = False

    def __post_init__(self):
        _ = self.constants  # wrong ones are refused here

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Pipeline) and self._content == other._content

    def __hash__(self) -> int:
        return hash(self._content)

    @functools.cached_property
    def _content(self) -> tuple[Any, ...]:
        return *(getattr(self, name) for name in (*PARTS, *TOKENIZERS, "schedule")), self.constants

    @functools.cached_property
    def constants(self) -> Constants:
        """What the record gives, else the scheduler's config, else the defaults."""
        known = _fields(SCHEDULER, self.configs["scheduler"], _IN_SCHEDULER)
        known |= _fields("model_index.json", self.configs["model_index"], _IN_INDEX) | recorded(self.record)
        steps, total = known.get("solver_steps", 1), self.schedule.num_train_timesteps
        if steps > total:
            raise LcmError(
                f"solver_steps={steps} ({RECORD}, or original_inference_steps of {SCHEDULER}) exceeds the {total} "
                "training timesteps; correct it"
            )
        return Constants(**known)

    @property
    def is_lcm(self) -> bool:
        """Whether the w embedding, the record or the scheduler shows that the model was distilled."""
        of_distilled = self.configs["scheduler"].get("_class_name") in ("LCMScheduler", "TCDScheduler")
        return self.has_w_embedding or bool(self.record) or of_distilled

    @property
    def is_xl(self) -> bool:
        """Whether it is SDXL or its refiner: conditioned on hidden_states[-2], pooled text and sizes."""
        return self.text_encoder_2 is not None

    @property
    def purpose(self) -> str:
        """What the model makes images from, by its inputs: "text-to-image", "inpainting" or "refining"."""
        if self.is_xl and self.text_encoder is None:
            return "refining"
        return _purpose(self.unet.in_channels, self.vae.latent_channels)

    @property
    def has_w_embedding(self) -> bool:
        """Whether the UNet is conditioned on the guidance weight w, as a latent consistency model is."""
        return self.unet.time_cond_proj_dim is not None

    @property
    def parts(self) -> dict[str, nn.Module]:
        """Part -> module, for the parts that the model has."""
        return {part: module for part in PARTS if (module := getattr(self, part)) is not None}

    @property
    def text_encoders(self) -> tuple[CLIPTextModel | None, CLIPTextModel | None]:
        return self.text_encoder, self.text_encoder_2

    @property
    def tokenizers(self) -> dict[str, Tokenizer]:
        """Text encoder's name -> its tokenizer."""
        return {name: getattr(self, TOKENIZER_OF[name]) for name in TEXT_ENCODERS if getattr(self, name) is not None}

    @property
    def default_size(self) -> tuple[int, int]:
        """Height and width in pixels of the images that the model was made for."""
        size = self.unet.sample_size or 64
        height, width = (size, size) if isinstance(size, int) else size
        return height * self.vae.factor, width * self.vae.factor

    @property
    def default_sampler(self) -> str:
        """The one that the weights are for: "tcd" of a phased map, or if the model comes with that; else "lcm"."""
        comes_with_tcd = self.configs["scheduler"].get("_class_name") == "TCDScheduler"
        return "tcd" if self.constants.phases or comes_with_tcd else "lcm"

    @property
    def default_steps(self) -> int:
        """The phases of a phased map, else 4."""
        return self.constants.phases or 4

    def default_guidance_scale(self, sampler: str = "lcm") -> float:
        """The guidance scale to take if the user gives none.

        1 for an LCM without w embedding, whatever the sampler, and for the samplers of LCMs: guidance is distilled in.
        Else 8, or the middle of the recorded range if 8 was not trained.
        """
        if not self.has_w_embedding:
            return 1.0 if self.is_lcm or sampler in ("lcm", "tcd") else GUIDANCE_SCALE
        low, high = self.constants.w_min + 1.0, self.constants.w_max + 1.0
        if low <= GUIDANCE_SCALE <= high:
            return GUIDANCE_SCALE
        return low if math.isinf(high) else (low + high) / 2.0


_FROM_CONFIG = {
    "unet": unet.from_config,
    "vae": vae.from_config,
    "text_encoder": clip.from_config,
    "text_encoder_2": clip.from_config,
}


def make_module(part: str, config: Config, dtype: DTypeLike = jnp.float32, file: object = None) -> nn.Module:
    """The module of a part's `config.json`; file: where it is from, for errors.

    A VAE that overflows in float16 (SDXL's) computes in float32 if that is asked for.

    Raises:
      UnsupportedConfig: the config asks for something outside the Stable Diffusion family.
    """
    with config_of(file or f"config of the {part.replace('_', ' ')}"):
        module = _FROM_CONFIG[part](config, dtype=jnp.dtype(dtype))  # one form, so that modules compare equal
    overflows = module.dtype == jnp.float16 and getattr(module, "force_upcast", False)
    return module.clone(dtype=jnp.dtype("float32")) if overflows else module


def in_half_precision(pipeline: Pipeline, half: bool = True) -> Pipeline:
    """The pipeline for training in 16 bits, if `half`: a VAE that overflows in float16 (SDXL's) computes in float32."""
    if not (half and getattr(pipeline.vae, "force_upcast", False)):
        return pipeline
    return dataclasses.replace(pipeline, vae=pipeline.vae.clone(dtype=jnp.dtype("float32")))


def fold_w(pipeline: Pipeline, params: PipelineParams, w: float) -> tuple[Pipeline, PipelineParams]:
    """The same model at one guidance weight w, without w embedding: for programs that cannot pass one.

    linear_1(x + P e(w)) = W x + (b + W P e(w)): what the embedding adds becomes part of `linear_1`'s bias. Pure.

    w: guidance_scale - 1, within the range that the model was distilled on.
    """
    if not pipeline.has_w_embedding:
        raise LcmError("the UNet has no w embedding to fold (time_cond_proj_dim is null); leave w out")
    tree = params["unet"]
    time = {name: dict(leaves) for name, leaves in tree["time_embedding"].items()}
    embedding = np.asarray(guidance.w_embedding(jnp.array([w]), pipeline.unet.time_cond_proj_dim), np.float64)[0]
    added = embedding @ np.asarray(time.pop("cond_proj")["kernel"], np.float64)
    added = added @ np.asarray(time["linear_1"]["kernel"], np.float64)
    bias = np.asarray(time["linear_1"]["bias"])
    time["linear_1"]["bias"] = (bias.astype(np.float64) + added).astype(bias.dtype)
    module = pipeline.unet.clone(time_cond_proj_dim=None)
    folded = dataclasses.replace(pipeline, unet=module, configs={**pipeline.configs, "unet": to_config(module)})
    return folded, {**params, "unet": {**tree, "time_embedding": time}}


def weights_hash(params: Params) -> str:
    """SHA-256 (hex) of a tree's names, dtypes, shapes and bytes: what latent caches and tables record of weights."""
    digest = hashlib.sha256()
    for name, value in sorted(flatten_dict(params, sep="/").items()):
        if isinstance(value, jax.Array) and not value.is_fully_addressable:  # its shards are on several processes
            value = multihost_utils.process_allgather(value, tiled=True)
        array = np.ascontiguousarray(jax.device_get(value))
        digest.update(f"{name} {array.dtype} {array.shape}\n".encode())
        digest.update(array.reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def parts_read(weights: bool | Collection[str]) -> set[str]:
    """The parts that `load_pipeline`'s argument `weights` asks for. Raises LcmError for an unknown part."""
    read = set(PARTS if weights is True else weights or ())
    if read - set(PARTS):
        raise LcmError(f"weights of {', '.join(sorted(read - set(PARTS)))}: parts are {', '.join(PARTS)}")
    return read


def check_fit(modules: Mapping[str, Any]) -> None:
    """Checks that the parts fit each other, so that a mixed-up folder fails here, not inside a compiled program.

    Raises:
      LcmError: they do not, or the UNet is for a task that is not known here.
    """
    unet, vae, first, second = (modules[part] for part in PARTS)
    text = sum(encoder.hidden_size for encoder in (first, second) if encoder is not None)
    for width in set(unet.per_level("cross_attention_dim")) - {text}:
        raise LcmError(
            f"the UNet attends to text of width {width}, the text encoders give {text}; take both from the same model"
        )
    if (unet.addition_embed_type is not None) != (second is not None):
        raise LcmError(
            f"the UNet has addition_embed_type={unet.addition_embed_type!r}, which is for the pooled text of "
            f"text_encoder_2, and the model has {'none' if second is None else 'one'}; take both from the same model"
        )
    if second is not None:
        pooled = second.projection_dim if second.with_projection else second.hidden_size
        total, one = unet.projection_class_embeddings_input_dim, unet.addition_time_embed_dim
        if total not in [pooled + sizes * one for sizes in ((5, 6) if first is None else (6,))]:
            raise LcmError(
                f"the UNet takes {total} features of pooled text and sizes, text_encoder_2 gives {pooled} and 6 sizes "
                f"have {one} each; take both from the same model"
            )
    latent, channels = vae.latent_channels, unet.in_channels
    purpose = _purpose(channels, latent)
    if purpose is None:
        raise LcmError(f"the UNet takes {channels} channels, the VAE's latents have {latent}; choose another VAE")
    if purpose not in ("text-to-image", "inpainting"):
        raise LcmError(
            f"the UNet takes {channels} channels, as {purpose} models do (the VAE's latents have {latent}); give a "
            "text-to-image model"
        )
    if unet.out_channels != latent:
        raise LcmError(
            f"the UNet gives {unet.out_channels} channels, the VAE's latents have {latent}; take both from one model"
        )
    for key in ("shift_factor", "latents_mean", "latents_std"):
        if getattr(vae, key):
            raise LcmError(
                f"the VAE has {key}={getattr(vae, key)}, but latents of Stable Diffusion are scaled by scaling_factor "
                "alone; choose another VAE"
            )


def _purpose(channels: int, latent: int) -> str | None:
    """What a UNet of `channels` inputs, `latent` of them noisy latents, is for; None: unknown."""
    known = {
        0: "text-to-image",
        1: "depth-to-image",
        3: "upscaling",
        latent: "InstructPix2Pix",
        latent + 1: "inpainting",
    }
    return known.get(channels - latent)


def check_generates(pipeline: Pipeline, name: str) -> None:
    """Raises LcmError for an SDXL refiner; others make images from text, or from text, an image and a mask."""
    if pipeline.purpose == "refining":
        problem = "is an SDXL refiner, which improves the images of another model; give a text-to-image model"
        raise LcmError(f"{name} {problem}")


def check_text_to_image(pipeline: Pipeline, name: str, instead: str = "") -> None:
    """Raises LcmError, which says what the model `name` is instead, unless it makes images from text alone.

    instead: what else may be given to an inpainting model, for the message.
    """
    check_generates(pipeline, name)
    channels, latent = pipeline.unet.in_channels, pipeline.vae.latent_channels
    if pipeline.purpose == "inpainting":
        what = f"an inpainting model (its UNet takes {channels} channels, the VAE's latents have {latent})"
        raise LcmError(f"{name} is {what}; give {instead}a text-to-image model")
