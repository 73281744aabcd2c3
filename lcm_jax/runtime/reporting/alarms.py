"""When a run must stop: a loss that is NaN, infinite or far above its mean; and which records were in that batch."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path

from lcm_jax.errors import LcmError
from lcm_jax.files import write_atomic

BAD_BATCH_FILE = "bad_batch.json"
HORIZON = 100  # losses in the running mean
WARMUP = 20  # losses before the mean is one


def not_finite(step: int, loss: float, grad_norm: float | None = None) -> str | None:
    """What is wrong where the loss or the gradient's norm of `step` is NaN or infinite, else None."""
    for name, value in (("loss", loss), ("gradient norm", grad_norm)):
        if value is not None and not math.isfinite(value):
            return f"{name} of step {step} is {float(value)}"
    return None


class Spikes:
    """Tells a loss that is more than `factor` times the mean of those before it.

    The mean after n losses is m_n = m_(n-1) + (loss_n - m_(n-1)) / min(n, HORIZON): of all of them at first, then with
    weights that fall by exp(-1 / HORIZON) per loss. Nothing is told before n = WARMUP.

    Args:
      factor: 0: never.
      before: losses that the mean begins with, of a run that goes on.
    """

    def __init__(self, factor: float, before: Iterable[float] = ()) -> None:
        self.factor, self.mean, self.count = factor, 0.0, 0
        for loss in before:
            self._add(loss)

    def check(self, step: int, loss: float) -> str | None:
        """What is wrong with this loss, else None, and it counts for the mean. Losses are finite."""
        if self.factor and self.count >= WARMUP and loss > self.factor * self.mean:
            return (
                f"loss of step {step} is {loss:.6g}, {loss / self.mean:.1f} times its running mean {self.mean:.6g} "
                f"(log.spike = {self.factor:g})"
            )
        self._add(loss)
        return None

    def _add(self, loss: float) -> None:
        self.count += 1
        self.mean += (loss - self.mean) / min(self.count, HORIZON)


def stop(workdir: Path, step: int, what: str, keys: Sequence[tuple[str, str]] | None, write: bool) -> LcmError:
    """The error that ends the run; with `write`, `keys`, (shard, key) of the step's records, go to bad_batch.json."""
    advice = "Lower train.learning_rate, and see metrics.jsonl for where it began"
    if keys is not None:
        path = workdir / BAD_BATCH_FILE
        if write:
            records = [{"shard": shard, "key": key} for shard, key in keys]
            write_atomic(path, json.dumps({"step": step, "reason": what, "records": records}, indent=1) + "\n")
        advice += f"; the step's records are listed in {path}"
    return LcmError(f"{what}; training stopped, no checkpoint was made of it. {advice}")
