"""Where the records of metrics.jsonl are shown as well: TensorBoard, and Weights & Biases (extra `wandb`)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from lcm_jax.errors import LcmError
from lcm_jax.runtime.workdir import write_atomic

WANDB_FILE = "wandb.json"


class TensorBoard:
    """Event files in workdir/tensorboard, from `start_step` on: what they say of later steps is hidden."""

    def __init__(self, workdir: Path, start_step: int) -> None:
        from tensorboardX import SummaryWriter

        self._writer = SummaryWriter(str(workdir / "tensorboard"), purge_step=start_step + 1)

    def scalars(self, record: Mapping[str, float]) -> None:
        """Takes a record with its "step"."""
        for name, value in record.items():
            if name != "step":
                self._writer.add_scalar(name, value, record["step"])

    def picture(self, step: int, name: str, grid: np.ndarray) -> None:
        """grid: [h w 3] uint8."""
        self._writer.add_image(name, grid, step, dataformats="HWC")

    def close(self) -> None:
        self._writer.close()


def import_wandb() -> ModuleType:
    """Raises LcmError where the package is missing."""
    try:
        import wandb
    except ImportError:
        raise LcmError("log.wandb needs the package wandb: pip install 'lcm_jax[wandb]'; or leave it out, TensorBoard "
                       "has the same numbers") from None
    return wandb


class WeightsAndBiases:
    """A run of a project on Weights & Biases; a workdir that goes on continues it (its id is in wandb.json).

    Args:
      workdir: of the run.
      project: on Weights & Biases.
      config: nested dict, shown with the run.
    """

    def __init__(self, workdir: Path, project: str, config: Mapping[str, Any] | None = None) -> None:
        self._wandb, path = import_wandb(), workdir / WANDB_FILE
        saved = json.loads(path.read_text()) if path.exists() else {}
        known = saved.get("id") if saved.get("project") == project else None
        self._run = self._wandb.init(project=project, id=known, resume="allow", dir=str(workdir), name=workdir.name,
                                     config=None if config is None else dict(config))
        self._run.define_metric("*", step_metric="step")  # its own count refuses steps that are done again
        if self._run.id != known:
            write_atomic(path, json.dumps({"project": project, "id": self._run.id}) + "\n")

    def scalars(self, record: Mapping[str, float]) -> None:
        self._run.log(dict(record))

    def picture(self, step: int, name: str, grid: np.ndarray) -> None:
        self._run.log({"step": step, name: self._wandb.Image(grid)})

    def close(self) -> None:
        self._run.finish()
