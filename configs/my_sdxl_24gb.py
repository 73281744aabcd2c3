"""LCM-LoRA of your own fine-tune of SDXL at 1024 pixels on one 24 GB card, from images or from prompts alone.

Command   python -m lcm_jax.train --config=configs/my_sdxl_24gb.py --workdir=runs/my_sdxl_24gb
              --config.model.teacher=MODEL.safetensors --config.data.path=FOLDER
Data      Captioned images in the model's style, a .txt beside each, or metadata.jsonl. Without any: the model makes
          them of your prompts (docs/my_model.md), then --config.data.source=latents --config.data.path=CACHE
Hardware  12.7 GB before activations, as `sdxl_lcm_lora`. Activations are recomputed for gradients, and four images go
          through the networks at a time. Modelled: 15.7 GiB on one rtx4090 (experiments/aot; all 12 at once: 21.7);
          not yet measured. If it does not fit: --config.train.accumulation_steps=6, or 12
Time      Not yet measured
Source    LCM-LoRA report and README of diffusers' scripts: all as in `sdxl_lcm_lora`, from which this config starts.
          Taking the batch of 12 in three parts and recomputing activations are our choice and give the same update.
          No filter of watermarks and sizes, and the VAE is the model's own
Result    Not yet measured

MODEL is a single .safetensors file, a diffusers folder or a hub id; what it predicts is read from it.
"""

import runpy
from pathlib import Path


def get_config():
    config = runpy.run_path(str(Path(__file__).with_name("sdxl_lcm_lora.py")))["get_config"]()
    config.model.vae = None
    config.model.prediction_type = None
    config.data.source = "folder"
    config.data.filters = ()
    config.data.encode_chunk = 1
    config.train.remat = "block"
    config.train.accumulation_steps = 3
    return config
