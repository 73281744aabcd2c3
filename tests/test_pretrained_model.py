"""A pipeline is equal by content: models of one architecture share programs, and none is kept by them.

Parts and records that do not fit each other or the program are refused before weights are read.
"""

import dataclasses
import functools
import gc
import weakref

import jax
import numpy as np
import pytest
import safetensors.numpy
import tiny
from flax.traverse_util import flatten_dict

from lcm_jax.errors import LcmError
from lcm_jax.pretrained import RECORD, load_pipeline, text
from lcm_jax.pretrained.model import check_fit
from lcm_jax.sampling.load import load
from lcm_jax.sampling.request import make_request

SCHEDULER = "scheduler/scheduler_config.json"


@pytest.fixture
def other(tmp_path):
    """The folder "micro lcm" with other weights in its text encoder, and with what decides nothing changed."""
    folder = tiny.copy("micro lcm", tmp_path / "other")
    weights = folder / "text_encoder" / "model.safetensors"
    tensors = {key: 2 * value for key, value in safetensors.numpy.load_file(weights).items()}
    safetensors.numpy.save_file(tensors, weights, metadata={"format": "pt"})
    tiny.change_json(folder / SCHEDULER, _class_name="DDPMScheduler", clip_sample_range=3.0, skip_prk_steps=True)
    tiny.change_json(folder / "model_index.json", scheduler=["diffusers", "DDPMScheduler"], _name_or_path="elsewhere")
    tiny.write_json(folder / RECORD, {"objective": "lcf", "solver_steps": 50})
    return folder


DIFFERENT = {
    "noise table": (SCHEDULER, {"beta_end": 0.013}),
    "prediction type": (SCHEDULER, {"prediction_type": "v_prediction"}),
    "end of DDIM": (SCHEDULER, {"set_alpha_to_one": True}),
    "tokenizer": ("tokenizer/special_tokens_map.json", {"pad_token": "!"}),
    "text encoder": ("text_encoder/config.json", {"hidden_act": "gelu"}),
    "VAE": ("vae/config.json", {"scaling_factor": 0.5}),
    "timestep_scaling": (RECORD, {"timestep_scaling": 5.0}),
    "range of w": (RECORD, {"w_max": 14.0}),
}


def test_models_of_one_architecture_are_equal(other):
    pipeline, params = load_pipeline(tiny.folder("micro lcm"))
    same, weights = load_pipeline(other)
    assert pipeline == same and hash(pipeline) == hash(same) and pipeline.record != same.record
    leaf = "text_encoder", "final_layer_norm", "bias"
    assert (params[leaf[0]][leaf[1]][leaf[2]] != weights[leaf[0]][leaf[1]][leaf[2]]).any()
    assert pipeline != dataclasses.replace(pipeline, unet=pipeline.unet.clone(time_cond_proj_dim=None))


def test_weights_held_as_they_are_used_compute_the_same_bits():
    """With norms and embeddings rounded as well it would not be so."""
    read = functools.partial(load_pipeline, tiny.folder("micro lcm"), dtype="bfloat16")
    pipeline, whole = read()
    held, shapes = (read(param_dtype=None, weights=weights)[1] for weights in (True, False))
    assert jax.tree.map(lambda x: (x.shape, x.dtype), held) == jax.tree.map(lambda x: (x.shape, x.dtype), shapes)
    for path, value in flatten_dict(held).items():
        exact = "norm" in path[-2] or path[-1] == "embedding"
        assert value.dtype == ("float32" if exact else "bfloat16"), path

    draw, width = np.random.default_rng(0).standard_normal, pipeline.unet.cross_attention_dim
    inputs = {
        "unet": (draw((1, 8, 8, 4)), np.array([500.0]), draw((1, 7, width))),
        "text_encoder": (np.arange(7)[None],),
    }

    def leaves(part, params):
        return jax.tree.leaves(jax.jit(pipeline.parts[part].apply)({"params": params}, *inputs[part]))

    for part in inputs:
        want = leaves(part, whole[part])
        jax.tree.map(np.testing.assert_array_equal, leaves(part, held[part]), want)
    rounded = leaves(part, jax.tree.map(lambda x: x.astype("bfloat16"), whole[part]))
    assert any((one != other).any() for one, other in zip(rounded, want, strict=True))


@pytest.mark.parametrize(("dtype", "of_vae"), [("float16", "float32"), ("bfloat16", "bfloat16")])
def test_a_vae_that_overflows_in_float16_computes_and_is_held_in_float32(dtype, of_vae):
    pipeline, shapes = load_pipeline(tiny.folder("micro lcm"), dtype=dtype, param_dtype=None, weights=False)
    assert pipeline.vae.force_upcast and (pipeline.unet.dtype, pipeline.vae.dtype) == (dtype, of_vae)
    assert shapes["vae"]["decoder"]["conv_in"]["kernel"].dtype == of_vae


@pytest.mark.parametrize("what", DIFFERENT)
def test_what_decides_images_makes_another_pipeline(other, what):
    same, _ = load_pipeline(other)
    name, changes = DIFFERENT[what]
    tiny.change_json(other / name, **changes)
    assert load_pipeline(other)[0] != same


def test_a_second_model_compiles_nothing_and_a_dropped_one_is_freed(other):
    pipeline, params = load_pipeline(tiny.folder("micro lcm"), put=jax.device_put)
    text.encode(pipeline, params, ["a red circle"])
    text.null(pipeline, params)
    compiled = text._encode_tokens._cache_size()
    pipeline, second = load_pipeline(other, put=jax.device_put)
    found = text.encode(pipeline, second, ["a red circle"]), text.null(pipeline, second)
    assert text._encode_tokens._cache_size() == compiled
    leaf = weakref.ref(jax.tree.leaves(second["text_encoder"])[0])
    del pipeline, second
    gc.collect()
    assert leaf() is None and found


def change(part, **fields):
    return lambda modules: modules | {part: modules[part].clone(**fields)}


UNFIT = {
    "another VAE": ("sd1", change("vae", latent_channels=16), "takes 4 channels, the VAE's latents have 16"),
    "InstructPix2Pix": (
        "sd1",
        change("unet", in_channels=8),
        "takes 8 channels, as InstructPix2Pix models do .*have 4",
    ),
    "depth": ("sd1", change("unet", in_channels=5), "takes 5 channels, as depth-to-image models do"),
    "upscaler": ("sd1", change("unet", in_channels=7), "takes 7 channels, as upscaling models do"),
    "learned variance": ("sd1", change("unet", out_channels=8), "gives 8 channels, the VAE's latents have 4"),
    "width of text": ("sd1", change("text_encoder", hidden_size=64), "text of width 32, the text encoders give 64"),
    "shifted latents": ("sd1", change("vae", shift_factor=0.1), "the VAE has shift_factor=0.1"),
    "normalised latents": ("sd1", change("vae", latents_std=(2.0,) * 4), r"the VAE has latents_std=\(2.0"),
    "no sizes": ("sdxl", change("unet", addition_embed_type=None), "addition_embed_type=None.*text_encoder_2.*has one"),
    "no second encoder": (
        "sdxl",
        lambda m: change("text_encoder", hidden_size=64)(m) | {"text_encoder_2": None},
        "addition_embed_type='text_time'.*has none",
    ),
    "pooled text": ("sdxl", change("text_encoder_2", projection_dim=40), "takes 80 features .*text_encoder_2 gives 40"),
    "sizes of a refiner": (
        "sdxl",
        change("unet", projection_class_embeddings_input_dim=72),
        "takes 72 features .*gives 32 and 6 sizes have 8 each",
    ),
}


@pytest.mark.parametrize("what", UNFIT)
def test_parts_that_do_not_fit_are_refused_by_name(what):
    name, changed, message = UNFIT[what]
    pipeline, _ = load_pipeline(tiny.folder(name), weights=False)
    parts = {part: getattr(pipeline, part) for part in ("unet", "vae", "text_encoder", "text_encoder_2")}
    check_fit(parts)
    with pytest.raises(LcmError, match=message) as caught:
        check_fit(changed(parts))
    assert "\n" not in str(caught.value)


def test_models_for_other_tasks_are_refused_before_weights_are_read(tmp_path):
    """Refining, by name, in `load` and in a request; inpainting, also by an exchanged UNet, without an image."""
    refiner, base = tiny.copy("refiner", tmp_path / "refiner"), tiny.copy("sd1", tmp_path / "base")
    inpainting = tiny.build("inpainting", tmp_path / "inpainting")
    for weights in tmp_path.rglob("*.safetensors"):
        weights.unlink()
    with pytest.raises(LcmError, match="refiner is an SDXL refiner, which .*; give a text-to-image model"):
        load(refiner)
    for source, unet, message in (
        (
            inpainting,
            None,
            r"is an inpainting model \(its UNet takes 9 channels, the VAE's latents have 4\); give an image",
        ),
        (base, inpainting, "is an inpainting model .*; give an image and a mask, or a text-to-image model"),
        (refiner, None, "give a text-to-image model"),
    ):
        with pytest.raises(LcmError, match=message):
            make_request(load_pipeline(source, unet=unet, weights=False)[0])


BAD_CONSTANTS = [
    (RECORD, {"solver_steps": "x"}, "solver_steps of lcm_config.json='x'; supported: a whole number from 1 to 10000"),
    (RECORD, {"solver_steps": 2000}, "solver_steps=2000 .* exceeds the 1000 training timesteps"),
    (RECORD, {"solver_steps": True}, "solver_steps of lcm_config.json=True"),
    (RECORD, {"sigma_data": float("nan")}, "sigma_data of lcm_config.json=nan"),
    (RECORD, {"timestep_scaling": 0}, "timestep_scaling of lcm_config.json=0"),
    (RECORD, {"w_max": float("inf")}, "w_max of lcm_config.json=inf"),
    (RECORD, {"w_min": [2]}, "w_min of lcm_config.json="),
    (RECORD, {"map": "phased"}, "map of lcm_config.json='phased'; supported: origin without phases, or phased with"),
    (RECORD, {"map": "origin", "phases": 4}, "map of lcm_config.json='origin'"),
    (RECORD, {"map": "straight"}, "map of lcm_config.json='straight'"),
    (RECORD, {"w_min": 5, "w_max": 3}, "w_min=5 of lcm_config.json is above w_max=3"),
    (
        SCHEDULER,
        {"original_inference_steps": 10**12},
        "original_inference_steps of scheduler/scheduler_config.json=1000",
    ),
    (SCHEDULER, {"timestep_scaling": -1}, "timestep_scaling of scheduler"),
    (SCHEDULER, {"set_alpha_to_one": "no"}, "set_alpha_to_one of scheduler.*='no'; supported: true or false"),
    (
        "model_index.json",
        {"force_zeros_for_empty_prompt": "no"},
        "force_zeros_for_empty_prompt of model_index.json='no'",
    ),
    ("model_index.json", {"text_encoder": ["transformers", 3]}, "text_encoder of model_index.json="),
    ("unet/config.json", {"flip_sin_to_cos": "no"}, r"flip_sin_to_cos='no'.*other/unet/config.json\)"),
]


@pytest.mark.parametrize(("file", "changes", "message"), BAD_CONSTANTS)
def test_constants_of_a_wrong_type_or_range_are_refused_by_file_and_key(other, file, changes, message):
    if file == RECORD:
        tiny.write_json(other / RECORD, changes)
    else:
        tiny.change_json(other / file, **changes)
    with pytest.raises(LcmError, match=message):
        load_pipeline(other, weights=False)
