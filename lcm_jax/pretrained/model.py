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
from typing import Any

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
from lcm_jax.errors import LcmError
from lcm_jax.models import clip, unet, vae
from lcm_jax.models.clip import CLIPTextModel
from lcm_jax.models.config import to_config
from lcm_jax.models.unet import UNet2DConditionModel
from lcm_jax.pretrained.names import Params
from lcm_jax.pretrained.tokenizer import Tokenizer

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


@dataclasses.dataclass(frozen=True)
class Constants:
    """What sampling must match of the training of a model.

    Attributes:
      solver_steps: N of the solver's grid, from which `lcm` takes its timesteps.
      timestep_scaling, sigma_data: of the boundary scalings (`diffusion.consistency`).
      w_min, w_max: the range of guidance weights of the distillation; the user's guidance scale is w + 1.
      set_alpha_to_one: whether DDIM ends at abar = 1, or at abar_0.
      zero_null: whether the null text of SDXL is zeros instead of the encoded "".
    """

    solver_steps: int = 50
    timestep_scaling: float = TIMESTEP_SCALING
    sigma_data: float = SIGMA_DATA
    w_min: float = 0.0
    w_max: float = math.inf
    set_alpha_to_one: bool = True
    zero_null: bool = True


@dataclasses.dataclass(frozen=True, eq=False)
class Pipeline:
    """The parts of a text-to-image model, without weights. `dataclasses.replace` exchanges one.

    Two pipelines are equal if modules, tokenizers, noise schedule and constants are.

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
        scheduler = self.configs["scheduler"]
        known = {
            "solver_steps": scheduler.get("original_inference_steps"),
            "timestep_scaling": scheduler.get("timestep_scaling"),
            "set_alpha_to_one": scheduler.get("set_alpha_to_one"),
            "zero_null": self.configs["model_index"].get("force_zeros_for_empty_prompt"),
        }
        recorded = ("solver_steps", "timestep_scaling", "sigma_data", "w_min", "w_max")
        known |= {key: self.record[key] for key in recorded if key in self.record}
        return Constants(**{key: value for key, value in known.items() if value is not None})

    @property
    def is_lcm(self) -> bool:
        """Whether the w embedding, the record or the scheduler shows that the model was distilled."""
        is_lcm_scheduler = self.configs["scheduler"].get("_class_name") == "LCMScheduler"
        return self.has_w_embedding or bool(self.record) or is_lcm_scheduler

    @property
    def is_xl(self) -> bool:
        """Whether it is SDXL or its refiner: conditioned on hidden_states[-2], pooled text and sizes."""
        return self.text_encoder_2 is not None

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

    def default_guidance_scale(self, sampler: str = "lcm") -> float:
        """The guidance scale to take if the user gives none.

        1 for an LCM without w embedding: its guidance is distilled in. Else 8, or the middle of the recorded range if
        8 was not trained.
        """
        if not self.has_w_embedding:
            return 1.0 if sampler == "lcm" else GUIDANCE_SCALE
        low, high = self.constants.w_min + 1.0, self.constants.w_max + 1.0
        return GUIDANCE_SCALE if low <= GUIDANCE_SCALE <= high else (low + high) / 2.0


_FROM_CONFIG = {
    "unet": unet.from_config,
    "vae": vae.from_config,
    "text_encoder": clip.from_config,
    "text_encoder_2": clip.from_config,
}


def make_module(part: str, config: Config, dtype: DTypeLike = jnp.float32) -> nn.Module:
    """The module of a part's `config.json`.

    Raises:
      UnsupportedConfig: the config asks for something outside the Stable Diffusion family.
    """
    return _FROM_CONFIG[part](config, dtype=jnp.dtype(dtype))  # one form, so that modules compare equal


def in_half_precision(pipeline: Pipeline, half: bool = True) -> Pipeline:
    """The pipeline for networks in 16 bits, if `half`: a VAE that overflows in them (SDXL's) computes in float32."""
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
    """Checks that the parts' widths agree, so that a mixed-up folder fails here, not inside a compiled program.

    Raises:
      LcmError: they do not.
    """
    text = sum(modules[part].hidden_size for part in TEXT_ENCODERS if modules[part] is not None)
    for width in set(modules["unet"].per_level("cross_attention_dim")) - {text}:
        raise LcmError(
            f"the UNet attends to text of width {width}, the text encoders give {text}; take both from the same model"
        )
    latent, channels = modules["vae"].latent_channels, modules["unet"].in_channels
    if channels not in (latent, 2 * latent + 1):  # inpainting: latents, masked image's latents, mask
        raise LcmError(f"the UNet takes {channels} channels, the VAE's latents have {latent}; choose another VAE")
