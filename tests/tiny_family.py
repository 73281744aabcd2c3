"""Folders of the whole Stable Diffusion family that training takes: random weights, 64 pixels are 8x8 latents.

UNets are `tiny_configs.UNETS`, whose structure is each model's own, for text of `tiny`'s encoders; VAE and encoders are
`tiny`'s. A `short` one has the first and the last level only: half the time to compile. Folders are built once per
process and never to be written into; names: `FAMILY`.
"""

import functools
import shutil
from pathlib import Path
from typing import Any

import pytest
import tiny
import tiny_configs
from diffusers import AutoencoderKL

_SD = ({"": ("clip", "sd1")}, "factor8", "StableDiffusionPipeline")
_SD2 = ({"": ("openclip", "sd2")}, "factor8", "StableDiffusionPipeline")
_XL = ({"": ("clip", "sd1"), "_2": ("openclip_projection", "sdxl_2")}, "factor8_xl", "StableDiffusionXLPipeline")
# As nested as the published one, with one layer per block.
_SSD_1B = tiny_configs.UNETS["ssd-1b"] | {
    "layers_per_block": 1,
    "transformer_layers_per_block": [1, [1], [2]],
    "reverse_transformer_layers_per_block": [[1, 2], [2, 1], 1],
}
# Name -> UNet, its prediction type, the other parts.
FAMILY = {
    "sd15": (tiny_configs.UNETS["sd15-w"], "epsilon", _SD),  # its w is left out below; one layer per block
    "sd21-base": (tiny_configs.UNETS["sd21-base"], "epsilon", _SD2),
    "sd21-768": (tiny_configs.UNETS["sd21-768"], "v_prediction", _SD2),
    "sdxl": (tiny_configs.UNETS["sdxl-w"], "epsilon", _XL),
    "ssd-1b": (_SSD_1B, "epsilon", _XL),
    "vega": (tiny_configs.UNETS["vega"], "epsilon", _XL),
    "small-sd": (tiny_configs.UNETS["small-sd"], "epsilon", _SD),
    "tiny-sd": (tiny_configs.UNETS["tiny-sd"], "epsilon", _SD),
}
W_DIM = 256  # of the students and the LCMs
VAE_XL = dict(tiny.VAE_8, scaling_factor=0.13025)


def unet_config(name: str, short: bool, w_dim: int | None) -> dict[str, Any]:
    """diffusers' arguments of a family member's UNet, for text of width 32 (SDXL's: 64, pooled 32)."""
    config, _, (encoders, *_) = FAMILY[name]
    config = {key: value for key, value in config.items() if key[0] != "_"}
    config |= {"sample_size": 8, "cross_attention_dim": 32 * len(encoders), "time_cond_proj_dim": w_dim}
    if "_2" in encoders:
        config |= {"projection_class_embeddings_input_dim": 6 * config["addition_time_embed_dim"] + 32}
    levels = len(config["block_out_channels"])
    if short:
        config = {k: [v[0], v[-1]] if isinstance(v, list) and len(v) == levels else v for k, v in config.items()}
    return config


@functools.cache
def folder(name: str, short: bool = False, w_dim: int | None = None) -> Path:
    """The folder of `name`; `w_dim`: of the w embedding that makes it a Latent Consistency Model."""
    _, prediction_type, (encoders, vae, pipeline) = FAMILY[name]
    unet = f"{name}_{short}_{w_dim}"
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(tiny.UNETS, unet, unet_config(name, short, w_dim))
        patch.setitem(tiny.VAES, "factor8_xl", VAE_XL)
        patch.setitem(tiny.FOLDERS, unet, (unet, vae, encoders, prediction_type, pipeline))
        return tiny.build(unet, tiny.folder("sd1").parent / f"family_{unet}")


@functools.cache
def zero_snr_folder() -> Path:
    """The short folder of "sdxl" as a model that predicts v, with zero terminal SNR."""
    target = shutil.copytree(folder("sdxl", short=True), tiny.folder("sd1").parent / "family_zero_snr")
    noise = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
    tiny.change_json(target / "scheduler" / "scheduler_config.json", **noise)
    return target


@functools.cache
def vae_folder() -> Path:
    """A VAE alone, not that of `folder("sdxl")`, as the half-precision one that is published for SDXL."""
    target = tiny.folder("sd1").parent / "family_vae"
    tiny.randomise(AutoencoderKL(**VAE_XL, force_upcast=False), 12).save_pretrained(target)
    return target
