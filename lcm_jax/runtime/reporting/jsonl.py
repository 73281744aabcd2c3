"""Files of one JSON object per line, which a crash may have cut off in the last one."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lcm_jax.errors import LcmError
from lcm_jax.runtime.workdir import write_atomic


def read(path: str | Path) -> list[dict[str, Any]]:
    """The objects in order, none if there is no file; a last line that was cut off is left out.

    Raises:
      LcmError: another line is not JSON.
    """
    path = Path(path)
    lines = path.read_text().splitlines() if path.exists() else []
    records = []
    for number, line in enumerate(lines, 1):
        try:
            records.append(json.loads(line))
        except ValueError:
            if number < len(lines):
                raise LcmError(f"{path} line {number} is not JSON; repair or remove that line") from None
    return records


def keep(path: str | Path, wanted: Callable[[dict[str, Any]], bool] = lambda record: True) -> list[dict[str, Any]]:
    """Drops the other objects, and a half line at the end, in one atomic replacement; returns what is left."""
    path = Path(path)
    records = [record for record in read(path) if wanted(record)]
    if path.exists():
        text = "".join(json.dumps(record) + "\n" for record in records)
        if text != path.read_text():
            write_atomic(path, text)
    return records
