"""Latent Consistency Models from Stable Diffusion checkpoints.

model = lcm_jax.load("runs/shapes_lcm/export")
images = model("a large red star at the left on a white background", steps=4, guidance_scale=8, seed=0)
images[0].save("star.png")
"""

import os
import signal
import sys

# `python -m lcm_jax.NAME` imports the package before its program: from here on no signal leaves a traceback.
if sys.argv[:1] == ["-m"] and "lcm_jax." in sys.orig_argv[-len(sys.argv)]:

    def _end(number: int, _: object) -> None:
        os.write(2, b"stopped; nothing was written\n")
        os._exit(128 + number)

    for _number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(_number) != signal.SIG_IGN:  # as `nohup` and a shell's `&` set it
            signal.signal(_number, _end)
    from lcm_jax.cost.chips import POOL
    from lcm_jax.ending import signals

    signals.begin()
    # By default jax takes three quarters of a GPU's memory. It reads either variable as it starts, and refuses both.
    if not {"XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION"} & os.environ.keys():
        os.environ["XLA_CLIENT_MEM_FRACTION"] = str(POOL)

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lcm_jax.sampling.chain import Hires, Refine
    from lcm_jax.sampling.control import Control
    from lcm_jax.sampling.load import load
    from lcm_jax.sampling.plan import Settings

__version__ = "0.1.0"
__all__ = ["Control", "Hires", "Refine", "Settings", "__version__", "load"]

_HOMES = {
    "Control": "lcm_jax.sampling.control",
    "Hires": "lcm_jax.sampling.chain",
    "Refine": "lcm_jax.sampling.chain",
    "load": "lcm_jax.sampling.load",
    "Settings": "lcm_jax.sampling.plan",
}


def __getattr__(name: str) -> Any:  # importing lcm_jax alone imports no jax
    if name not in _HOMES:
        raise AttributeError(f"module 'lcm_jax' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
