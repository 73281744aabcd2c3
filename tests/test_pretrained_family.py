"""Full size: keys, shapes and parameter counts of the published family; a round trip of a whole SD 1.5 folder."""

import gc
import json

import diffusers
import family
import jax
import numpy as np
import pytest
import tiny
import torch
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from lcm_jax.diffusion import samplers, timesteps
from lcm_jax.models import clip, unet, vae
from lcm_jax.pretrained import load_pipeline, names, save_pipeline
from lcm_jax.pretrained.tokenizer import tokenize

pytestmark = pytest.mark.slow


def check(module, model, size, prefix=""):
    table = names.torch_table(module)
    expected = {prefix + key: tuple(value.shape) for key, value in model.state_dict().items()}
    assert {key: p.torch_shape for key, p in table.items()} == expected
    assert (names.num_params(module), len(table)) == size


@pytest.mark.parametrize("name", family.UNETS)
def test_unet(name):
    config = family.UNETS[name]
    with torch.device("meta"):
        model = diffusers.UNet2DConditionModel.from_config(config)
    check(unet.from_config(config), model, family.UNET_SIZES[name])


@pytest.mark.parametrize("name", family.VAES)
def test_vae(name):
    config = family.VAES[name]
    with torch.device("meta"):
        model = diffusers.AutoencoderKL.from_config(config)
    module = vae.from_config(config)
    check(module, model, family.VAE_SIZES[name])
    assert module.scaling_factor == model.config.scaling_factor


@pytest.mark.parametrize("name", family.TEXT_ENCODERS)
def test_text_encoder(name):
    config = family.TEXT_ENCODERS[name]
    projects = config["architectures"] == ["CLIPTextModelWithProjection"]
    with torch.device("meta"):
        model = (CLIPTextModelWithProjection if projects else CLIPTextModel)(CLIPTextConfig(**config))
    check(clip.from_config(config), model, family.TEXT_SIZES[name], "" if projects else "text_model.")


def fill(model, seed):
    """Random weights: a Gaussian of 0.02, about 1 for norms."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, p in model.named_parameters():
            p.normal_(float(p.ndim == 1 and "norm" in key and key.endswith("weight")), 0.02, generator=generator)
    return model


def torch_models():
    """part -> function that makes the torch model, always with the same weights."""
    return {
        "unet": lambda: fill(diffusers.UNet2DConditionModel.from_config(family.SD15), 1),
        "vae": lambda: fill(diffusers.AutoencoderKL.from_config(family.VAES["sd15"]), 2),
        "text_encoder": lambda: fill(CLIPTextModel(CLIPTextConfig(**family.TEXT_ENCODERS["clip-l"])), 3),
    }


def generate(pipeline, weights):
    """One DDIM step at 64x64 latents, decoded: [1 512 512 3]."""

    def encode(params, ids):
        return pipeline.text_encoder.apply({"params": params}, ids).last_hidden_state

    def sample(params, x, context):
        def model(x, t):
            return pipeline.unet.apply({"params": params}, x, t, context)

        return samplers.ddim(model, x, None, pipeline.schedule, timesteps.ddim(1, 1000))

    def decode(params, z):
        return pipeline.vae.apply({"params": params}, z / pipeline.vae.scaling_factor, method="decode")

    ids = tokenize(pipeline.tokenizer, ["a red circle"])
    context = jax.jit(encode)(weights["text_encoder"], ids)
    noise = jax.random.normal(jax.random.key(0), (1, 64, 64, 4))
    z = jax.jit(sample)(weights["unet"], noise, context)
    return np.asarray(jax.jit(decode)(weights["vae"], z))


def test_a_round_trip_of_a_whole_sd15_folder(tmp_path):
    source = tmp_path / "source"
    for part, make in torch_models().items():
        make().save_pretrained(source / part)
        gc.collect()
    tiny.write_tokenizer(source / "tokenizer")
    (source / "scheduler").mkdir()
    tiny.write_json(source / "scheduler" / "scheduler_config.json", tiny.scheduler_config("epsilon"))
    tiny.write_json(
        source / "model_index.json",
        {
            "_class_name": "StableDiffusionPipeline",
            "unet": ["diffusers", "UNet2DConditionModel"],
            "vae": ["diffusers", "AutoencoderKL"],
            "text_encoder": ["transformers", "CLIPTextModel"],
            "tokenizer": ["transformers", "CLIPTokenizer"],
            "scheduler": ["diffusers", "PNDMScheduler"],
        },
    )

    pipeline, params = load_pipeline(source)
    image = generate(pipeline, params)
    assert image.shape == (1, 512, 512, 3) and np.isfinite(image).all() and image.std() > 0

    out = save_pipeline(pipeline, params, tmp_path / "out")
    del params
    gc.collect()
    assert json.loads((out / "model_index.json").read_text())["_class_name"] == "StableDiffusionPipeline"
    loaded = diffusers.StableDiffusionPipeline.from_pretrained(out)
    for part, make in torch_models().items():
        expected, found = make().state_dict(), getattr(loaded, part).state_dict()
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            assert found[key].dtype == torch.float32 and torch.equal(found[key], value), key
        del expected
        gc.collect()
