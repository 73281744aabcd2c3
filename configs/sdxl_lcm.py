"""SDXL-base 1.0 distilled at 1024 pixels: the recipe of diffusers' `consistency_distillation` README.

Command   python -m lcm_jax.train --config=configs/sdxl_lcm.py --workdir=runs/sdxl_lcm
              --config.data.path='SHARDS/{00000..00999}.tar'
Data      Captioned images of at least 1024 pixels; the README uses CC12M, enlarged. As in the script, images
          smaller than 700 pixels or with a watermark score above 0.5 are left out
Hardware  56.5 GB before activations (22 bytes for each of 2.57 billion weights), 3.6 GB of VAE and text encoders;
          `sdxl_lcm_lora` needs far less. Modelled: 113.1 GiB on one h200 (experiments/aot); not yet measured
Time      Not yet measured
Source    README: teacher, fp16-fix VAE, and all else as in `sd15_lcm`, from which this config starts. Defaults of its
          script: 1024 pixels, w in [3, 15]
Deviates  Sizes are given height first, as when the model was trained (the script swaps them), and stay float32
Result    Not yet measured
"""

import runpy
from pathlib import Path


def get_config():
    config = runpy.run_path(str(Path(__file__).with_name("sd15_lcm.py")))["get_config"]()
    config.model.teacher = "stabilityai/stable-diffusion-xl-base-1.0"
    config.model.vae = "madebyollin/sdxl-vae-fp16-fix"
    config.data.resolution = 1024
    config.data.filters = ("side >= 700", "pwatermark <= 0.5 or missing")
    config.distill.w_min = 3.0
    return config
