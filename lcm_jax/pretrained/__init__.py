"""Model folders of diffusers and transformers <-> parameter trees, without torch.

    pipeline, params = load_pipeline("stabilityai/sdxl-turbo", variant="fp16")
    save_pipeline(pipeline, params, "out/my-model")

and single-file checkpoints:

    pipeline, params = load_pipeline("dreamshaper_8.safetensors", config="a/diffusers/folder/of/SD-1.5")
    save_single_file(pipeline, params, "out/my-model.safetensors")
"""

from lcm_jax.pretrained.hub import is_single_file
from lcm_jax.pretrained.load import load_pipeline, load_unet, load_vae, read_record
from lcm_jax.pretrained.model import ENCODERS, RECORD, Pipeline
from lcm_jax.pretrained.save import save_pipeline, save_single_file, save_unet
from lcm_jax.pretrained.single_file import load_single_file

__all__ = [
    "ENCODERS",
    "RECORD",
    "Pipeline",
    "is_single_file",
    "load_pipeline",
    "load_single_file",
    "load_unet",
    "load_vae",
    "read_record",
    "save_pipeline",
    "save_single_file",
    "save_unet",
]
