"""Tiny random models made by torch diffusers and transformers, and diffusers folders of them.

Models: `torch_unet(name)`, `torch_vae(name)`, `torch_text_encoder(name)`, all seeded and in eval mode, with random
norms and biases (torch's ones and zeros would hide a swapped tensor). Folders: `folder(name)`, built once per process,
read only, and `loaded(name)`; `copy(name, target)` for tests that change files. Names of folders: `FOLDERS`.
"""

import atexit
import functools
import json
import shutil
import tempfile
from pathlib import Path

import torch
from diffusers import AutoencoderKL, AutoencoderTiny, LCMScheduler, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection
from transformers.utils import logging as transformers_logging

from lcm_jax.pretrained import load_pipeline

# A model is built in whichever test needs it first, and that test may read what a program writes to stderr.
transformers_logging.disable_progress_bar()

CROSS, PLAIN = "CrossAttnDownBlock2D", "DownBlock2D"
CROSS_UP, PLAIN_UP = "CrossAttnUpBlock2D", "UpBlock2D"

_UNET = dict(sample_size=8, block_out_channels=(32, 64), norm_num_groups=8, layers_per_block=1)
_SD = dict(_UNET, down_block_types=(CROSS, PLAIN), up_block_types=(PLAIN_UP, CROSS_UP), cross_attention_dim=32)
_MICRO = dict(
    _UNET,
    block_out_channels=(16,),
    down_block_types=(CROSS,),
    up_block_types=(CROSS_UP,),
    mid_block_type=None,
    attention_head_dim=2,
    cross_attention_dim=32,
)
_XL = dict(
    _UNET,
    down_block_types=(PLAIN, CROSS),
    up_block_types=(CROSS_UP, PLAIN_UP),
    cross_attention_dim=64,
    attention_head_dim=(2, 4),
    use_linear_projection=True,
    transformer_layers_per_block=(1, 2),
    addition_embed_type="text_time",
    addition_time_embed_dim=8,
    projection_class_embeddings_input_dim=6 * 8 + 32,
)
UNETS = {
    "sd1": dict(_SD, attention_head_dim=4),
    "lcm": dict(_SD, attention_head_dim=4, time_cond_proj_dim=16),
    "micro lcm": dict(_MICRO, time_cond_proj_dim=16),
    "middle lcm": dict(_MICRO, time_cond_proj_dim=16, mid_block_type="UNetMidBlock2DCrossAttn"),  # all that nets add to
    "micro": _MICRO,  # for programs, whose tests do not depend on depth: compiles in half the time of "small"
    "small": dict(_SD, attention_head_dim=2, block_out_channels=(16, 32)),
    "inpainting": dict(_MICRO, in_channels=9),
    "sd2": dict(_SD, attention_head_dim=(2, 4), use_linear_projection=True),
    "sdxl": _XL,
    "refiner": dict(_XL, cross_attention_dim=32, projection_class_embeddings_input_dim=5 * 8 + 32),
}

VAE = dict(
    block_out_channels=(16, 32),
    down_block_types=("DownEncoderBlock2D",) * 2,
    up_block_types=("UpDecoderBlock2D",) * 2,
    norm_num_groups=8,
    sample_size=16,
)
VAE_8 = dict(
    block_out_channels=(8, 8, 8, 16),
    down_block_types=("DownEncoderBlock2D",) * 4,
    up_block_types=("UpDecoderBlock2D",) * 4,
    norm_num_groups=4,
    sample_size=64,
)
VAES = {"sd": VAE, "sdxl": dict(VAE, scaling_factor=0.13025), "factor8": VAE_8}
TINY_VAE = dict(
    encoder_block_out_channels=(16,) * 3,
    decoder_block_out_channels=(16,) * 3,
    num_encoder_blocks=(1, 1, 1),
    num_decoder_blocks=(1, 1, 1),
)

TEXT = dict(
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    max_position_embeddings=77,
    projection_dim=32,
    bos_token_id=0,
    eos_token_id=2,
    pad_token_id=1,
)
TEXT_ENCODERS = {
    "clip": (CLIPTextModel, dict(TEXT, hidden_act="quick_gelu")),
    "openclip": (CLIPTextModel, dict(TEXT, hidden_act="gelu", num_hidden_layers=3)),
    "openclip_projection": (CLIPTextModelWithProjection, dict(TEXT, hidden_act="gelu")),
}

# Folder -> UNet, VAE, {slot: (text encoder, tokenizer)}, prediction type, pipeline class.
FOLDERS = {
    "sd1": ("sd1", "sd", {"": ("clip", "sd1")}, "epsilon", "StableDiffusionPipeline"),
    "lcm": ("lcm", "sd", {"": ("clip", "sd1")}, "epsilon", "LatentConsistencyModelPipeline"),
    "micro lcm": ("micro lcm", "sd", {"": ("clip", "sd1")}, "epsilon", "LatentConsistencyModelPipeline"),
    "middle lcm": ("middle lcm", "sd", {"": ("clip", "sd1")}, "epsilon", "LatentConsistencyModelPipeline"),
    "sd2": ("sd2", "sd", {"": ("openclip", "sd2")}, "v_prediction", "StableDiffusionPipeline"),
    "sdxl": (
        "sdxl",
        "sdxl",
        {"": ("clip", "sd1"), "_2": ("openclip_projection", "sdxl_2")},
        "epsilon",
        "StableDiffusionXLPipeline",
    ),
    "refiner": (
        "refiner",
        "sdxl",
        {"_2": ("openclip_projection", "sdxl_2")},
        "epsilon",
        "StableDiffusionXLImg2ImgPipeline",
    ),
}

# For training: 64 pixels are 8x8 latents. "teacher" has one level and compiles fastest; "deep teacher" has all the
# layers that the default adapters are on.
TRAINING_FOLDERS = {
    "teacher": ("micro", "factor8", {"": ("clip", "sd1")}, "epsilon", "StableDiffusionPipeline"),
    "deep teacher": ("small", "factor8", {"": ("clip", "sd1")}, "epsilon", "StableDiffusionPipeline"),
    "inpainting": ("inpainting", "factor8", {"": ("clip", "sd1")}, "epsilon", "StableDiffusionInpaintPipeline"),
}

WORDS = ("a", "red", "blue", "circle", "square", "hello", "small", "large", "on", "the", "left", "right")
START, END = "<|startoftext|>", "<|endoftext|>"


def in_float64(model: torch.nn.Module, *args, **kwargs):
    """A torch model's output for tensors, in float64: any difference is the rounding of the other side."""

    def widen(x):
        if isinstance(x, dict):
            return {key: widen(value) for key, value in x.items()}
        return x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x

    try:
        with torch.no_grad():
            return model.double()(*map(widen, args), **widen(kwargs))
    finally:
        model.float()  # restores the weights exactly


def randomise(model: torch.nn.Module, seed: int) -> torch.nn.Module:
    """Gives every parameter random values: matrices about 1/sqrt(fan in), norms' scales about 1, biases about 0."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=generator)
            if p.ndim > 1:
                p.copy_(noise / p[0].numel() ** 0.5)
            else:
                p.copy_(0.1 * noise + float(name.endswith("weight")))
    return model.eval().requires_grad_(False)


@functools.cache
def torch_unet(name: str) -> UNet2DConditionModel:
    return randomise(UNet2DConditionModel(**UNETS[name]), 1)


@functools.cache
def torch_vae(name: str = "sd") -> AutoencoderKL:
    return randomise(AutoencoderKL(**VAES[name]), 2)


@functools.cache
def torch_tiny_vae() -> AutoencoderTiny:
    return randomise(AutoencoderTiny(**TINY_VAE), 3)


@functools.cache
def torch_text_encoder(name: str) -> CLIPTextModel | CLIPTextModelWithProjection:
    kind, fields = TEXT_ENCODERS[name]
    return randomise(kind(CLIPTextConfig(vocab_size=len(vocabulary()[0]), **fields)), 4)


@functools.cache
def vocabulary() -> tuple[dict[str, int], list[str]]:
    """CLIP's layout: 256 bytes, 256 bytes at a word's end, merges, start, end (the largest id); and the merges."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    letters = [chr(b) for b in printable] + [chr(256 + i) for i in range(256 - len(printable))]
    tokens, merges = letters + [letter + "</w>" for letter in letters], []
    for word in WORDS:
        parts = [*word[:-1], word[-1] + "</w>"]
        left = parts[0]
        for right in parts[1:]:
            if left + right not in tokens:
                merges.append(f"{left} {right}")
                tokens.append(left + right)
            left += right
    return {token: i for i, token in enumerate([*tokens, START, END])}, merges


def write_tokenizer(target: Path, kind: str = "sd1") -> Path:
    """The four files of a published tokenizer.

    kind: "sd1" pads with the end token; "sd2" with "!", but only according to special_tokens_map.json; "sdxl_2" with
    "!" according to both files.
    """
    vocab, merges = vocabulary()
    special = {"bos_token": START, "eos_token": END, "unk_token": END}
    added = {
        key: {"content": text, "lstrip": False, "normalized": True, "rstrip": False, "single_word": False}
        for key, text in special.items()
    }
    config = {
        "add_prefix_space": False,
        "do_lower_case": True,
        "errors": "replace",
        "model_max_length": 77,
        "tokenizer_class": "CLIPTokenizer",
        "pad_token": "!" if kind == "sdxl_2" else END,
        **{key: {"__type": "AddedToken", **token} for key, token in added.items()},
    }
    target.mkdir(parents=True, exist_ok=True)
    (target / "vocab.json").write_text(json.dumps(vocab))
    (target / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]), encoding="utf-8")
    write_json(target / "tokenizer_config.json", config)
    write_json(target / "special_tokens_map.json", added | {"pad_token": END if kind == "sd1" else "!"})
    return target


def write_json(path: Path, value: dict) -> None:
    path.write_text(json.dumps(value, indent=2))


def scheduler_config(prediction_type: str) -> dict:
    return {
        "_class_name": "DDIMScheduler",
        "_diffusers_version": "0.8.0",
        "beta_end": 0.012,
        "beta_start": 0.00085,
        "beta_schedule": "scaled_linear",
        "clip_sample": False,
        "num_train_timesteps": 1000,
        "steps_offset": 1,
        "set_alpha_to_one": False,
        "trained_betas": None,
        "prediction_type": prediction_type,
    }


def build(name: str, target: Path, variant: str | None = None, max_shard_size: str = "5GB") -> Path:
    """The folder `name`, written by torch diffusers and transformers (variant "fp16": in half precision)."""
    unet, vae, encoders, prediction_type, pipeline = (FOLDERS | TRAINING_FOLDERS)[name]

    def prepared(model):
        if variant != "fp16":
            return model
        half = (
            type(model)(model.config)
            if isinstance(model, CLIPTextModel | CLIPTextModelWithProjection)
            else (type(model).from_config(model.config))
        )
        half.load_state_dict(model.state_dict())
        return half.half()

    index = {
        "_class_name": pipeline,
        "_diffusers_version": "0.19.0",
        "requires_safety_checker": False,
        "safety_checker": [None, None],
        "feature_extractor": [None, None],
        "scheduler": ["diffusers", "DDIMScheduler"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    if "XL" in pipeline:
        index["force_zeros_for_empty_prompt"] = "_2" in encoders and "" in encoders
    options = dict(variant=variant, max_shard_size=max_shard_size)
    prepared(torch_unet(unet)).save_pretrained(target / "unet", **options)
    prepared(torch_vae(vae)).save_pretrained(target / "vae", **options)
    for slot, (encoder, tokenizer) in encoders.items():
        model = torch_text_encoder(encoder)
        index["text_encoder" + slot] = ["transformers", type(model).__name__]
        index["tokenizer" + slot] = ["transformers", "CLIPTokenizer"]
        prepared(model).save_pretrained(target / ("text_encoder" + slot), **options)
        write_tokenizer(target / ("tokenizer" + slot), tokenizer)
    (target / "scheduler").mkdir()
    write_json(target / "scheduler" / "scheduler_config.json", scheduler_config(prediction_type))
    write_json(target / "model_index.json", index)
    return target


@functools.cache
def _root() -> Path:
    root = Path(tempfile.mkdtemp(prefix="lcm_jax_tiny_"))
    atexit.register(shutil.rmtree, root, ignore_errors=True)
    return root


@functools.cache
def folder(name: str) -> Path:
    """The folder `name` in float32, shared by all tests of this process: read only."""
    return build(name, _root() / name)


@functools.cache
def loaded(name: str):
    """(pipeline, params) of `folder(name)`, read only as well."""
    return load_pipeline(folder(name))


def copy(name: str, target: Path) -> Path:
    """A copy of `folder(name)` to change."""
    return Path(shutil.copytree(folder(name), target))


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def torch_pipeline(kind, folder: Path, scheduler=LCMScheduler, **parts):
    """diffusers' pipeline of a folder with another scheduler, whose timesteps are trailing if it has a choice."""
    pipe = kind.from_pretrained(folder, **parts)
    pipe.scheduler = scheduler.from_config(pipe.scheduler.config, timestep_spacing="trailing")
    pipe.set_progress_bar_config(disable=True)
    return pipe


def change_json(path: Path, **changes) -> None:
    """Changes keys of a JSON object in place; those that become `...` are removed."""
    found = json.loads(path.read_text()) | changes
    write_json(path, {key: value for key, value in found.items() if value is not ...})
