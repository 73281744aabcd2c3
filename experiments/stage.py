"""What the experiments on the embedded teacher have in common: a run, trained to its end and exported."""

import shutil
from collections.abc import Callable
from pathlib import Path

from ml_collections import ConfigDict

from lcm_jax import export
from lcm_jax.train import train


def trained_and_exported(config: ConfigDict, workdir: Path, say: Callable[[str], None], *options: str) -> bool:
    """Trains `config` in `workdir`, going on where it was stopped, and writes WORKDIR/export anew.

    Args:
      say: takes lines for the reader of the terminal.
      options: further ones of `lcm_jax.export`.

    Returns:
      False where the training was stopped before its end, or the export failed; both have said so.
    """
    say(f"{config.train.steps} steps of {config.data.batch_size} pictures into {workdir}")
    state = train(config, workdir)
    if int(state.step) < config.train.steps:
        say("stopped; the same command goes on")
        return False
    folder = workdir / "export"
    shutil.rmtree(folder, ignore_errors=True)  # made by this function, from the checkpoint beside it
    say(f"exporting to {folder}")
    return export.main([f"--workdir={workdir}", f"--out={folder}", *options]) == 0
