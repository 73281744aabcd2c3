"""LCM_Dreamshaper_v7 fine-tuned (LCF) on captioned pictures of The Simpsons: the paper's other example.

Command   python -m lcm_jax.train --config=configs/simpsons_lcf.py --workdir=runs/simpsons_lcf
Data      Norod78/simpsons-blip-captions, some held back to judge by
Hardware  As `pokemon_lcf`; not yet measured
Time      Not yet measured
Source    Paper, LCF: as `pokemon_lcf`, which this config starts from; only the pictures are others
Result    Not yet measured; the remark on guidance of `pokemon_lcf` holds
"""

import runpy
from pathlib import Path


def get_config():
    config = runpy.run_path(str(Path(__file__).with_name("pokemon_lcf.py")))["get_config"]()
    config.data.path = "Norod78/simpsons-blip-captions"
    config.sample.prompts = (
        "a cartoon character standing in front of a house",
        "two cartoon characters sitting on a couch",
        "a cartoon boy with a skateboard",
        "a cartoon man eating a donut",
    )
    return config
