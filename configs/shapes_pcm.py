"""The embedded teacher distilled by a phased map, for 4 steps, on two CPU cores in a few minutes.

Method        As `shapes_lcm`, from which it differs in nothing but the map: 4 phases, on 40 solver steps

    python -m lcm_jax.train --config=configs/shapes_pcm.py --workdir=runs/shapes_pcm

Results: not yet measured.
"""

import runpy
from pathlib import Path


def get_config():
    full = runpy.run_path(str(Path(__file__).with_name("shapes_lcm.py")))["get_config"]()
    return runpy.run_path(str(Path(__file__).with_name("sd15_pcm_lora.py")))["phased"](full)
