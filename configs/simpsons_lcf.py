"""LCM_Dreamshaper_v7 fine-tuned (LCF) on captioned images of The Simpsons: the paper's other example.

Command   python -m lcm_jax.train --config=configs/simpsons_lcf.py --workdir=runs/simpsons_lcf
Data      Norod78/simpsons-blip-captions, 755 images, some held out for evaluation. Like `pokemon_lcf` it is for the
          paper's numbers; that one's card names what to use instead
Hardware  As in `pokemon_lcf`; not yet measured
Time      Not yet measured
Source    Paper, LCF: as in `pokemon_lcf`, from which this config starts; only the images differ
Result    Not yet measured; the remark on guidance in `pokemon_lcf` applies
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
