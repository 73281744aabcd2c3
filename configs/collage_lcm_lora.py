"""LCM-LoRA of one's own fine-tune of Stable Diffusion 1.5 on one 24 GB card; here a public collage-style model.

Command   python -m lcm_jax.train --config=configs/collage_lcm_lora.py --workdir=runs/collage_lcm_lora
              --config.model.teacher=FOLDER_OR_HUB_ID --config.data.path=FOLDER
Data      Captioned images in the model's style: those it was fine-tuned on, or a few thousand that it generated; a
          .txt beside each, or metadata.jsonl
Hardware  3.9 GB before activations, with VAE and text encoder, four images at a time. Modelled: 9.7 GiB on one
          rtx3060 (experiments/aot); not yet measured. If it does not fit: --config.train.accumulation_steps=6, or 12
Time      Not yet measured
Source    LCM-LoRA report and README of diffusers' scripts: all as in `sd15_lcm_lora`, from which this config starts;
          taking the batch of 12 in three parts is our choice and gives the same update
Result    Not yet measured
"""

import runpy
from pathlib import Path


def get_config():
    config = runpy.run_path(str(Path(__file__).with_name("sd15_lcm_lora.py")))["get_config"]()
    config.model.teacher = "wavymulder/collage-diffusion"
    config.data.source = "folder"
    config.train.accumulation_steps = 3
    config.sample.prompts = (
        "collage style, a child looking at the night sky, full of stars",
        "collage style, a city street in the rain",
        "collage style, a portrait of a woman with flowers",
        "collage style, a whale above the mountains",
    )
    return config
