"""A pipeline is equal by content: models of one architecture share programs, and none is kept by them."""

import dataclasses
import gc
import json
import weakref

import jax
import pytest
import safetensors.numpy
import tiny

from lcm_jax.pretrained import RECORD, load_pipeline, text

SCHEDULER = "scheduler/scheduler_config.json"


def edit(folder, name, **changes):
    tiny.write_json(folder / name, json.loads((folder / name).read_text()) | changes)


@pytest.fixture
def other(tmp_path):
    """The folder "micro lcm" with other weights in its text encoder, and with what decides nothing changed."""
    folder = tiny.copy("micro lcm", tmp_path / "other")
    weights = folder / "text_encoder" / "model.safetensors"
    tensors = {key: 2 * value for key, value in safetensors.numpy.load_file(weights).items()}
    safetensors.numpy.save_file(tensors, weights, metadata={"format": "pt"})
    edit(folder, SCHEDULER, _class_name="DDPMScheduler", clip_sample_range=3.0, skip_prk_steps=True)
    edit(folder, "model_index.json", scheduler=["diffusers", "DDPMScheduler"], _name_or_path="elsewhere")
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


@pytest.mark.parametrize("what", DIFFERENT)
def test_what_decides_images_makes_another_pipeline(other, what):
    same, _ = load_pipeline(other)
    name, changes = DIFFERENT[what]
    edit(other, name, **changes)
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
