"""The Stable Diffusion family at toy widths, as `config.json`s, and torch models with random weights to compare with.

Structure (blocks, depths, heads per level, projections, conditioning) is each model's own; widths are 32 and 64 with
8 norm groups. `torch_model` fills every parameter, also those that start at zero or one. Importing this module needs
neither torch nor jax.
"""

from collections.abc import Mapping
from typing import Any

_SD1 = {
    "_class_name": "UNet2DConditionModel",
    "_diffusers_version": "0.6.0",
    "act_fn": "silu",
    "attention_head_dim": 4,
    "block_out_channels": [32, 32, 64, 64],
    "center_input_sample": False,
    "cross_attention_dim": 24,
    "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
    "downsample_padding": 1,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "in_channels": 4,
    "layers_per_block": 2,
    "mid_block_scale_factor": 1,
    "norm_eps": 1e-5,
    "norm_num_groups": 8,
    "out_channels": 4,
    "sample_size": 16,
    "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
}
_SD2 = _SD1 | {
    "_diffusers_version": "0.10.0.dev0",
    "attention_head_dim": [1, 2, 4, 4],
    "cross_attention_dim": 40,
    "dual_cross_attention": False,
    "num_class_embeds": None,
    "only_cross_attention": False,
    "use_linear_projection": True,
}
# Keys that newer files write out although they are unset.
_NULLS = {
    "addition_embed_type": None,
    "addition_time_embed_dim": None,
    "class_embed_type": None,
    "cross_attention_norm": None,
    "encoder_hid_dim": None,
    "encoder_hid_dim_type": None,
    "mid_block_only_cross_attention": None,
    "num_attention_heads": None,
    "num_class_embeds": None,
    "projection_class_embeddings_input_dim": None,
    "resnet_out_scale_factor": 1.0,
    "resnet_skip_time_act": False,
    "resnet_time_scale_shift": "default",
    "reverse_transformer_layers_per_block": None,
    "time_cond_proj_dim": None,
    "time_embedding_act_fn": None,
    "time_embedding_dim": None,
    "time_embedding_type": "positional",
    "timestep_post_act": None,
    "upcast_attention": None,
}
_SDXL = (
    _SD2
    | _NULLS
    | {
        "_diffusers_version": "0.19.0.dev0",
        "addition_embed_type": "text_time",
        "addition_embed_type_num_heads": 64,
        "addition_time_embed_dim": 8,
        "attention_head_dim": [1, 2, 4],
        "block_out_channels": [32, 32, 64],
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
        "mid_block_type": "UNetMidBlock2DCrossAttn",
        "projection_class_embeddings_input_dim": 16 + 6 * 8,
        "transformer_layers_per_block": [1, 2, 3],
        "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    }
)

UNETS: dict[str, dict[str, Any]] = {
    "sd15": _SD1,
    "sd15-w": _SD1 | {"time_cond_proj_dim": 16, "layers_per_block": 1},
    "sd15-inpaint": _SD1 | {"in_channels": 9, "layers_per_block": 1},
    "sd21-base": _SD2 | {"layers_per_block": 1},
    "sd21-768": _SD2 | {"upcast_attention": True, "layers_per_block": 1, "sample_size": 24},
    "sd-turbo": _SD2 | _NULLS | {"transformer_layers_per_block": 1, "layers_per_block": 1},
    "sdxl": _SDXL,
    "sdxl-w": _SDXL | {"time_cond_proj_dim": 16, "transformer_layers_per_block": [1, 1, 2], "layers_per_block": 1},
    "sdxl-refiner": _SDXL
    | {
        "attention_head_dim": [1, 2, 4, 4],
        "block_out_channels": [32, 32, 64, 64],
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
        "layers_per_block": 1,
        "projection_class_embeddings_input_dim": 16 + 5 * 8,
        "transformer_layers_per_block": 2,
        "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    },
    "ssd-1b": _SDXL
    | {
        "mid_block_type": "UNetMidBlock2D",
        "reverse_transformer_layers_per_block": [[2, 2, 3], [2, 1, 1], 1],
        "transformer_layers_per_block": [1, [2, 2], [2, 2]],
    },
    "vega": _SDXL
    | {
        "mid_block_type": "UNetMidBlock2D",
        "transformer_layers_per_block": [1, 1, 2],
        "layers_per_block": 1,
    },
    "small-sd": _SD1 | {"layers_per_block": 1},
    "tiny-sd": _SD1
    | {
        "block_out_channels": [32, 32, 64],
        "down_block_types": ["CrossAttnDownBlock2D"] * 3,
        "layers_per_block": 1,
        "mid_block_type": None,
        "up_block_types": ["CrossAttnUpBlock2D"] * 3,
    },
    # Not published models: the spellings and per-level lists that files may use.
    "prefixed": _NULLS
    | {
        "block_out_channels": [32, 64],
        "cross_attention_dim": [24, 24],
        "down_block_types": ["UNetResCrossAttnDownBlock2D", "UNetResDownBlock2D"],
        "flip_sin_to_cos": False,
        "freq_shift": 1,
        "layers_per_block": [1, 2],
        "norm_num_groups": 8,
        "up_block_types": ["UNetResUpBlock2D", "UNetResCrossAttnUpBlock2D"],
        "sample_size": None,
    },
}

_KL = {
    "_class_name": "AutoencoderKL",
    "_diffusers_version": "0.6.0",
    "act_fn": "silu",
    "block_out_channels": [32, 32, 64],
    "down_block_types": ["DownEncoderBlock2D"] * 3,
    "in_channels": 3,
    "latent_channels": 4,
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "out_channels": 3,
    "sample_size": 32,
    "up_block_types": ["UpDecoderBlock2D"] * 3,
}
VAES: dict[str, dict[str, Any]] = {
    "sd": _KL,
    "sdxl": _KL | {"force_upcast": True, "scaling_factor": 0.13025, "layers_per_block": 2},
    "playground": _KL
    | {
        "latents_mean": [-1.6574, 1.886, -1.383, 2.5155],
        "latents_std": [8.4927, 5.9022, 6.5498, 5.2299],
        "scaling_factor": 0.5,
    },
    "bare": _KL
    | {
        "use_quant_conv": False,
        "use_post_quant_conv": False,
        "mid_block_add_attention": False,
        "latent_channels": 16,
        "shift_factor": 0.1159,
    },
}
TINY_VAES: dict[str, dict[str, Any]] = {
    "taesd": {
        "_class_name": "AutoencoderTiny",
        "act_fn": "relu",
        "block_out_channels": [16, 16, 16, 16],
        "decoder_block_out_channels": [16, 16, 16, 16],
        "encoder_block_out_channels": [16, 16, 16, 16],
        "force_upcast": False,
        "upsample_fn": "nearest",
    },
    "two-levels": {
        "_class_name": "AutoencoderTiny",
        "decoder_block_out_channels": [16, 16],
        "encoder_block_out_channels": [8, 8],
        "latent_channels": 16,
        "num_decoder_blocks": [2, 1],
        "num_encoder_blocks": [1, 2],
    },
}

_CLIP = {
    "architectures": ["CLIPTextModel"],
    "attention_dropout": 0.0,
    "bos_token_id": 0,
    "dropout": 0.0,
    "eos_token_id": 2,
    "hidden_act": "quick_gelu",
    "hidden_size": 32,
    "initializer_factor": 1.0,
    "initializer_range": 0.02,
    "intermediate_size": 64,
    "layer_norm_eps": 1e-5,
    "max_position_embeddings": 20,
    "model_type": "clip_text_model",
    "num_attention_heads": 4,
    "num_hidden_layers": 3,
    "pad_token_id": 1,
    "projection_dim": 24,
    "torch_dtype": "float32",
    "transformers_version": "4.25.0.dev0",
    "vocab_size": 100,
}
CLIPS: dict[str, dict[str, Any]] = {
    "vit-l": _CLIP,
    "vit-h": _CLIP | {"hidden_act": "gelu", "num_attention_heads": 2},
    "bigg": _CLIP | {"architectures": ["CLIPTextModelWithProjection"], "hidden_act": "gelu", "projection_dim": 32},
    "new-eos": _CLIP | {"eos_token_id": 97, "bos_token_id": 96},
    "new-eos-projected": _CLIP | {"architectures": ["CLIPTextModelWithProjection"], "eos_token_id": 97},
}

VISION: dict[str, Any] = {
    "hidden_act": "quick_gelu",
    "hidden_size": 32,
    "image_size": 28,
    "intermediate_size": 48,
    "layer_norm_eps": 1e-5,
    "model_type": "clip_vision_model",
    "num_attention_heads": 4,
    "num_channels": 3,
    "num_hidden_layers": 3,
    "patch_size": 7,
    "projection_dim": 24,
}


def torch_model(config: Mapping[str, Any], seed: int = 0) -> Any:
    """The diffusers or transformers model of a config, float32, eval; no parameter has its initial constant.

    diffusers' matrices and kernels keep torch's initial values (cond_proj is random there); scales get 1 + 0.2 n,
    biases 0.2 n.
    """
    import diffusers
    import torch
    import transformers

    torch.manual_seed(seed)
    spread = 0.15  # with transformers' own 0.02 attention would be uniform
    if "architectures" in config:
        cls = getattr(transformers, config["architectures"][0])
        model = cls(transformers.CLIPTextConfig(**{k: v for k, v in config.items() if k != "torch_dtype"}))
    elif config.get("model_type") == "clip_vision_model":
        model = transformers.CLIPVisionModelWithProjection(transformers.CLIPVisionConfig(**config))
    else:
        model = getattr(diffusers, config.get("_class_name", "UNet2DConditionModel")).from_config(dict(config))
        spread = None
    with torch.no_grad():
        for name, value in model.named_parameters():
            if value.ndim == 1:
                value.copy_(0.2 * torch.randn_like(value) + (1.0 if name.endswith("weight") else 0.0))
            elif spread is not None:
                value.copy_(spread * torch.randn_like(value))
    return model.eval()
