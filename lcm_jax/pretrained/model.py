"""A whole model as one small record: modules, parameters, tokenizers, noise schedule."""

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any

from flax import linen as nn

from lcm_jax.diffusion.schedule import NoiseSchedule
from lcm_jax.errors import LcmError
from lcm_jax.models import clip, unet
from lcm_jax.pretrained import names

Config = dict[str, Any]

TEXT_ENCODERS = ("text_encoder", "text_encoder_2")
PARTS = ("unet", "vae", *TEXT_ENCODERS)
ENCODERS = PARTS[1:]  # what pictures and captions are encoded with
SCHEDULER = "scheduler/scheduler_config.json"
RECORD = "lcm_config.json"  # what an export of ours says about its training: w range, solver steps, scalings


@dataclasses.dataclass(frozen=True, eq=False)
class Pipeline:
    """The parts of one text-to-image model. `dataclasses.replace` exchanges one. Hashed by identity: static under jit.

    Attributes:
      unet, vae: Linen modules.
      text_encoder, text_encoder_2: Linen modules or None. SD has the first, SDXL both, its refiner only the second.
      params: part -> parameter tree (numpy on the host, or where `place` put it), for the parts that are not None.
        A part whose weights were not asked for: a tree of ShapeDtypeStructs; none asked for: no tokenizers either.
      tokenizer, tokenizer_2: transformers' CLIPTokenizer beside each text encoder, or None.
      schedule: noise table and prediction type.
      configs: part -> raw JSON; also "scheduler" and "model_index".
      source: local folder; saving copies the tokenizers' files from there.
    """

    unet: unet.UNet2DConditionModel
    vae: nn.Module
    text_encoder: clip.CLIPTextModel | None
    text_encoder_2: clip.CLIPTextModel | None
    params: Mapping[str, names.Params]
    tokenizer: Any
    tokenizer_2: Any
    schedule: NoiseSchedule
    configs: Mapping[str, Config]
    source: str

    @property
    def is_xl(self) -> bool:
        """SDXL and its refiner: context from hidden_states[-2], pooled text and sizes beside it."""
        return self.text_encoder_2 is not None

    @property
    def has_w_embedding(self) -> bool:
        """The UNet takes the guidance scale as an input: a latent consistency model."""
        return self.unet.time_cond_proj_dim is not None


def parts_read(weights: bool | Collection[str]) -> set[str]:
    """Parts that `load_pipeline`'s argument `weights` asks for. Raises LcmError for a name that no part has."""
    read = set(PARTS if weights is True else weights or ())
    if read - set(PARTS):
        raise LcmError(f"weights of {', '.join(sorted(read - set(PARTS)))}: parts are {', '.join(PARTS)}")
    return read


def check_fit(modules: Mapping[str, Any]) -> None:
    """The parts' widths agree, so that a mixed-up folder fails here and not inside a compiled program."""
    encoders = [modules[part] for part in ("text_encoder", "text_encoder_2") if modules[part] is not None]
    text = sum(encoder.hidden_size for encoder in encoders)
    for width in set(modules["unet"].per_level("cross_attention_dim")) - {text}:
        raise LcmError(
            f"the UNet attends to text of width {width}, the text encoders give {text}; take both from the same model"
        )
    latent, channels = modules["vae"].latent_channels, modules["unet"].in_channels
    if channels not in (latent, 2 * latent + 1):  # plain, or inpainting: latents, masked image's latents, mask
        raise LcmError(f"the UNet takes {channels} channels, the VAE's latents have {latent}; choose another VAE")
