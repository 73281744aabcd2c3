"""LCM-LoRA of SDXL on 833 captioned images: diffengine's `lcm_xl_lora_pokemon_blip`.

Command   python -m lcm_jax.train --config=configs/lcm_xl_lora_pokemon_blip.py --workdir=runs/lcm_xl_lora_pokemon_blip
              --config.data.path=FOLDER_OR_HUB_ID
Data      As in `lcm_xl_pokemon_blip`, to repeat diffengine's run; for a model and images of your own: `my_sdxl_24gb`
Hardware  9.3 GB before activations, two images at a time: the base once in bfloat16, 20 bytes for each of 25 million
          adapter weights, VAE and text encoders. Modelled: 26.7 GiB on one rtx5090 (experiments/aot); not yet measured
Time      Not yet measured
Source    diffengine, lcm_xl_lora: rank 8, alpha 8, the 14 kinds of layers, lr 1e-5, no target network; the rest,
          including w in [3, 15], as in `lcm_xl_pokemon_blip`, from which this config starts
Deviates  As in `lcm_xl_pokemon_blip`
Result    Not yet measured
"""

import runpy
from pathlib import Path


def get_config():
    config = runpy.run_path(str(Path(__file__).with_name("lcm_xl_pokemon_blip.py")))["get_config"]()
    config.lora.rank = 8
    config.lora.alpha = 8.0
    config.train.learning_rate = 1e-5
    config.train.ema_decay = 0.0
    return config
