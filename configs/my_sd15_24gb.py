"""LCM-LoRA of your own fine-tune of Stable Diffusion 1.5 on one 24 GB card, from images or from prompts alone.

Command   python -m lcm_jax.train --config=configs/my_sd15_24gb.py --workdir=runs/my_sd15_24gb
              --config.model.teacher=MODEL.safetensors --config.data.path=FOLDER
Data      Captioned images in the model's style, a .txt beside each, or metadata.jsonl. Without any: the model makes
          them of your prompts (docs/my_model.md), then --config.data.source=latents --config.data.path=CACHE
Hardware  3.9 GB before activations. Modelled: 18.0 GiB on one rtx4090 (experiments/aot); not yet measured. If it does
          not fit: --config.train.accumulation_steps=2, or 3
Time      Not yet measured
Source    LCM-LoRA report and README of diffusers' scripts: all as in `sd15_lcm_lora`, from which this config starts,
          but for the images, of which the VAE encodes four at a time
Result    Not yet measured

MODEL is a single .safetensors file, a diffusers folder or a hub id; what it predicts is read from it.
"""

import runpy
from pathlib import Path


def get_config():
    config = runpy.run_path(str(Path(__file__).with_name("sd15_lcm_lora.py")))["get_config"]()
    config.model.prediction_type = None
    config.data.source = "folder"
    config.data.encode_chunk = 4
    return config
