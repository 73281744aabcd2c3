"""The embedded teacher distilled for longer than a demo takes; otherwise `configs/shapes_lcm.py`.

Data          8,192 pictures
Length        2,000 steps of 32 pictures; lr 1e-3, linear to 0 over the last 1,000

    python -m experiments.shapes_lcm.demo --config=configs/shapes_lcm_long.py --workdir=runs/shapes_lcm_long

Results: experiments/shapes_lcm/.
"""

import runpy
from pathlib import Path


def get_config():
    config = runpy.run_path(str(Path(__file__).with_name("shapes_lcm.py")))["get_config"]()
    config.data.num_examples = 8_192
    config.train.steps = 2_000
    config.train.lr_decay_start = 1_000
    config.train.lr_decay_steps = 1_000
    config.checkpoint.every = 500
    config.sample.every = 500
    return config
