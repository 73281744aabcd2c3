"""Model folders of diffusers and transformers <-> parameter trees, without torch.

    pipeline = load_pipeline("stabilityai/sdxl-turbo", variant="fp16")
    save_pipeline(pipeline, "out/my-model")
"""

from lcm_jax.pretrained.pipeline import RECORD, Pipeline, load_pipeline, load_unet, load_vae, read_record
from lcm_jax.pretrained.saving import save_pipeline, save_unet

__all__ = [
    "RECORD",
    "Pipeline",
    "load_pipeline",
    "load_unet",
    "load_vae",
    "read_record",
    "save_pipeline",
    "save_unet",
]
