"""Every key of every model's config with values that no writer means: refused in one line, or of the field's type."""

import dataclasses
import json

import jax
import pytest
import tiny_configs

from lcm_jax.errors import LcmError, UnsupportedConfig
from lcm_jax.metrics.networks import dinov2
from lcm_jax.models import clip, unet, vae
from lcm_jax.models.config import RUN_FIELDS
from lcm_jax.pretrained import names
from lcm_jax.typed import field_types, fits

DEEP = json.loads("[" * 500 + "]" * 500)
NUMBERS = (-1, 0, 1, 3, 2.5, float("nan"), float("inf"), 1e30, 10**12, 10**400)
LISTS = ([], [1], [[1]], [0, 0, 0, 0], [1, 1, 1, 1], ["x"], [None], [True] * 4, [float("nan")] * 4, DEEP)
ODD = (None, True, False, "x", "", "true", *NUMBERS, *LISTS, {}, {"a": 1})

DINO = {
    "hidden_act": "gelu",
    "hidden_size": 32,
    "image_size": 28,
    "layer_norm_eps": 1e-6,
    "mlp_ratio": 4,
    "model_type": "dinov2",
    "num_attention_heads": 4,
    "num_channels": 3,
    "num_hidden_layers": 2,
    "patch_size": 7,
    "qkv_bias": True,
    "use_swiglu_ffn": False,
}
MODELS = {
    "sd15": (unet.from_config, tiny_configs.UNETS["sd15"]),
    "ssd-1b": (unet.from_config, tiny_configs.UNETS["ssd-1b"]),
    "vae": (vae.from_config, tiny_configs.VAES["playground"] | {"shift_factor": 0.1, "force_upcast": True}),
    "taesd": (vae.from_config, tiny_configs.TINY_VAES["two-levels"] | {"scaling_factor": 1.0, "latent_shift": 0.5}),
    "text": (clip.from_config, tiny_configs.CLIPS["new-eos-projected"]),
    "vision": (clip.vision_from_config, tiny_configs.VISION),
    "dinov2": (dinov2.from_config, DINO),
}


@pytest.mark.parametrize("name", MODELS)
def test_odd_values_are_refused_by_name_or_have_the_type_of_the_field(name):
    make, config = MODELS[name]
    for key in config:
        for value in ODD:
            try:
                module = make(config | {key: value})
            except LcmError as error:
                assert key in str(error) and "\n" not in str(error) and len(str(error)) < 1000, (key, value)
                continue
            types = {k: v for k, v in field_types(type(module)).items() if k not in RUN_FIELDS}
            assert all(fits(getattr(module, field), kind) for field, kind in types.items()), (key, value)
            hash(module)


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [
        ("sd15", "flip_sin_to_cos", "no"),
        ("sd15", "norm_eps", float("nan")),
        ("sd15", "norm_num_groups", 0),
        ("sd15", "in_channels", True),
        ("sd15", "block_out_channels", [32, 32, 64, 10**12]),
        ("sd15", "_class_name", 3),
        ("sd15", "conv_in_kernel", True),
        ("sd15", "transformer_layers_per_block", [30, 30, 30, 30]),
        ("ssd-1b", "addition_time_embed_dim", None),
        ("ssd-1b", "projection_class_embeddings_input_dim", None),
        ("vae", "scaling_factor", 0),
        ("vae", "scaling_factor", None),
        ("vae", "force_upcast", "no"),
        ("vae", "latents_mean", [0.5]),
        ("vae", "latents_std", [1, 1, 1, 0]),
        ("vae", "in_channels", 1),
        ("vae", "sample_size", 1),
        ("text", "num_attention_heads", 3),
        ("text", "num_hidden_layers", 100_000),
        ("text", "vocab_size", 10**12),
        ("text", "eos_token_id", 100),
        ("text", "architectures", 3),
        ("vision", "patch_size", 29),
        ("vision", "num_channels", 4),
        ("dinov2", "num_attention_heads", 5),
    ],
)
def test_what_cannot_be_meant_is_refused_by_name(name, key, value):
    make, config = MODELS[name]
    with pytest.raises(UnsupportedConfig, match=f"unsupported ({key}|layers_per_block)"):
        make(config | {key: value})


def test_the_largest_sizes_have_shapes_without_taking_memory():
    for name, changes in (
        ("sd15", {"in_channels": 2**14, "cross_attention_dim": 2**14, "layers_per_block": 1}),
        ("text", {"vocab_size": 10**6, "hidden_size": 2**14}),
    ):
        make, config = MODELS[name]
        module = make(config | changes)
        assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(names.abstract_params(module)))


def test_leftovers_of_old_files_are_skipped():
    leftovers = {"decay": 0.9999, "optimization_step": "x", "with_projection": True, "dtype": [3], "name": 3}
    for make, config in MODELS.values():
        assert make(config | leftovers) == make(config)
    assert {f.name for f in dataclasses.fields(unet.UNet2DConditionModel)} >= RUN_FIELDS
