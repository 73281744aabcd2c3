"""The published Stable Diffusion family: config.json values from the hub, and the sizes of the models.

UNETS, VAES, TEXT_ENCODERS: name -> config, without the keys that a file leaves out (whose defaults are the readers').
UNET_SIZES, VAE_SIZES, TEXT_SIZES: name -> (parameters, keys of the state dict).
"""

CROSS, PLAIN = "CrossAttnDownBlock2D", "DownBlock2D"
CROSS_UP, PLAIN_UP = "CrossAttnUpBlock2D", "UpBlock2D"

_COMMON = {
    "_class_name": "UNet2DConditionModel",
    "act_fn": "silu",
    "center_input_sample": False,
    "downsample_padding": 1,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "in_channels": 4,
    "layers_per_block": 2,
    "mid_block_scale_factor": 1,
    "norm_eps": 1e-05,
    "norm_num_groups": 32,
    "out_channels": 4,
}

SD15 = _COMMON | {
    "_diffusers_version": "0.6.0",
    "attention_head_dim": 8,
    "block_out_channels": [320, 640, 1280, 1280],
    "cross_attention_dim": 768,
    "down_block_types": [CROSS, CROSS, CROSS, PLAIN],
    "sample_size": 64,
    "up_block_types": [PLAIN_UP, CROSS_UP, CROSS_UP, CROSS_UP],
}
SD21 = SD15 | {
    "_diffusers_version": "0.10.0.dev0",
    "attention_head_dim": [5, 10, 20, 20],
    "cross_attention_dim": 1024,
    "dual_cross_attention": False,
    "num_class_embeds": None,
    "only_cross_attention": False,
    "sample_size": 96,
    "use_linear_projection": True,
    "upcast_attention": True,
}
SDXL = _COMMON | {
    "_diffusers_version": "0.19.0.dev0",
    "addition_embed_type": "text_time",
    "addition_embed_type_num_heads": 64,
    "addition_time_embed_dim": 256,
    "attention_head_dim": [5, 10, 20],
    "block_out_channels": [320, 640, 1280],
    "class_embed_type": None,
    "class_embeddings_concat": False,
    "conv_in_kernel": 3,
    "conv_out_kernel": 3,
    "cross_attention_dim": 2048,
    "cross_attention_norm": None,
    "down_block_types": [PLAIN, CROSS, CROSS],
    "dual_cross_attention": False,
    "encoder_hid_dim": None,
    "encoder_hid_dim_type": None,
    "mid_block_only_cross_attention": None,
    "mid_block_type": "UNetMidBlock2DCrossAttn",
    "num_attention_heads": None,
    "num_class_embeds": None,
    "only_cross_attention": False,
    "projection_class_embeddings_input_dim": 2816,
    "resnet_out_scale_factor": 1.0,
    "resnet_skip_time_act": False,
    "resnet_time_scale_shift": "default",
    "sample_size": 128,
    "time_cond_proj_dim": None,
    "time_embedding_act_fn": None,
    "time_embedding_dim": None,
    "time_embedding_type": "positional",
    "timestep_post_act": None,
    "transformer_layers_per_block": [1, 2, 10],
    "up_block_types": [CROSS_UP, CROSS_UP, PLAIN_UP],
    "upcast_attention": None,
    "use_linear_projection": True,
}
REFINER = SDXL | {
    "attention_head_dim": [6, 12, 24, 24],
    "block_out_channels": [384, 768, 1536, 1536],
    "cross_attention_dim": 1280,
    "down_block_types": [PLAIN, CROSS, CROSS, PLAIN],
    "up_block_types": [PLAIN_UP, CROSS_UP, CROSS_UP, PLAIN_UP],
    "projection_class_embeddings_input_dim": 2560,
    "transformer_layers_per_block": 4,
}
SSD_1B = SDXL | {
    "mid_block_type": "UNetMidBlock2D",
    "transformer_layers_per_block": [1, [2, 2], [4, 4]],
    "reverse_transformer_layers_per_block": [[4, 4, 10], [2, 1, 1], 1],
}
VEGA = SDXL | {"mid_block_type": "UNetMidBlock2D", "transformer_layers_per_block": [1, 1, 2]}
SMALL_SD = SD15 | {"layers_per_block": 1}
TINY_SD = SMALL_SD | {
    "block_out_channels": [320, 640, 1280],
    "down_block_types": [CROSS] * 3,
    "up_block_types": [CROSS_UP] * 3,
    "mid_block_type": None,
}

UNETS = {
    "sd15": SD15,
    "sd15-inpaint": SD15 | {"in_channels": 9},
    "sd21": SD21,
    "sdxl": SDXL,
    "sdxl-refiner": REFINER,
    "ssd-1b": SSD_1B,
    "vega": VEGA,
    "small-sd": SMALL_SD,
    "tiny-sd": TINY_SD,
    "lcm-dreamshaper": SD15 | {"time_cond_proj_dim": 256},
    "lcm-sdxl": SDXL | {"time_cond_proj_dim": 256},
    "lcm-ssd-1b": SSD_1B | {"time_cond_proj_dim": 256},
}
UNET_SIZES = {
    "sd15": (859_520_964, 686),
    "sd15-inpaint": (859_535_364, 686),
    "sd21": (865_910_724, 686),
    "sdxl": (2_567_463_684, 1680),
    "sdxl-refiner": (2_259_526_660, 1220),
    "ssd-1b": (1_331_334_404, 944),
    "vega": (745_225_604, 564),
    "small-sd": (579_384_964, 442),
    "tiny-sd": (323_384_964, 358),
    "lcm-dreamshaper": (859_602_884, 687),
    "lcm-sdxl": (2_567_545_604, 1681),
    "lcm-ssd-1b": (1_331_416_324, 945),
}

_VAE = {
    "_class_name": "AutoencoderKL",
    "_diffusers_version": "0.6.0",
    "act_fn": "silu",
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "in_channels": 3,
    "latent_channels": 4,
    "layers_per_block": 2,
    "norm_num_groups": 32,
    "out_channels": 3,
    "sample_size": 512,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
}
VAES = {"sd15": _VAE, "sdxl": _VAE | {"force_upcast": True, "sample_size": 1024, "scaling_factor": 0.13025}}
VAE_SIZES = {"sd15": (83_653_863, 248), "sdxl": (83_653_863, 248)}

_TEXT = {
    "attention_dropout": 0.0,
    "bos_token_id": 0,
    "dropout": 0.0,
    "eos_token_id": 2,
    "initializer_factor": 1.0,
    "initializer_range": 0.02,
    "layer_norm_eps": 1e-05,
    "max_position_embeddings": 77,
    "model_type": "clip_text_model",
    "pad_token_id": 1,
    "torch_dtype": "float32",
    "vocab_size": 49408,
}
TEXT_ENCODERS = {
    "clip-l": _TEXT
    | {
        "architectures": ["CLIPTextModel"],
        "hidden_act": "quick_gelu",
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_attention_heads": 12,
        "num_hidden_layers": 12,
        "projection_dim": 768,
    },
    "openclip-h": _TEXT
    | {
        "architectures": ["CLIPTextModel"],
        "hidden_act": "gelu",
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_attention_heads": 16,
        "num_hidden_layers": 23,
        "projection_dim": 512,
    },
    "openclip-bigg": _TEXT
    | {
        "architectures": ["CLIPTextModelWithProjection"],
        "hidden_act": "gelu",
        "hidden_size": 1280,
        "intermediate_size": 5120,
        "num_attention_heads": 20,
        "num_hidden_layers": 32,
        "projection_dim": 1280,
        "torch_dtype": "float16",
    },
}
TEXT_SIZES = {"clip-l": (123_060_480, 196), "openclip-h": (340_387_840, 372), "openclip-bigg": (694_659_840, 517)}
