"""Files of one JSON object per line, each with its "step", which a crash may have cut off in the last one."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lcm_jax import files
from lcm_jax.errors import LcmError
from lcm_jax.files import write_atomic


def read(path: str | Path) -> list[dict[str, Any]]:
    """The objects in order, none if there is no file; a last line that was cut off is left out.

    Raises:
      LcmError: another line is not JSON, or no object with a whole number "step".
    """
    return [record for _, record in _lines(Path(path)) if record is not None]


def keep(path: str | Path, wanted: Callable[[dict[str, Any]], bool] = lambda record: True) -> list[dict[str, Any]]:
    """Drops the other objects, and a half line at the end, in one atomic replacement; returns what is left.

    What is dropped is appended to NAME.cut.jsonl before.
    """
    path = Path(path)
    lines = _lines(path)
    kept = [(line, record) for line, record in lines if record is not None and wanted(record)]
    cut = [line for line, record in lines if record is None or not wanted(record)]
    if cut:
        with open(path.with_suffix(".cut.jsonl"), "ab") as file:
            file.write(b"".join(line + b"\n" for line in cut))
            files.sync(file)
    text = b"".join(line + b"\n" for line, _ in kept)
    if path.exists() and text != path.read_bytes():
        write_atomic(path, text)
    return [record for _, record in kept]


def _lines(path: Path) -> list[tuple[bytes, dict[str, Any] | None]]:
    """(line, its object); None for a last one that was cut off."""
    data = path.read_bytes() if path.exists() else b""
    lines, found = data.splitlines(), []
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
            if not isinstance(record, dict) or not isinstance(record.get("step"), int):
                raise ValueError
        except (ValueError, RecursionError):
            if number < len(lines) or data.endswith(b"\n"):
                raise LcmError(
                    f"{path} line {number} is not a JSON object with a step; repair or remove that line"
                ) from None
            record = None
        found.append((line, record))
    return found
