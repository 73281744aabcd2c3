"""Results as files: compact JSON, Markdown tables, and copies beside an experiment's code."""

import json
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any


def to_json(value: Any, depth: int) -> str:
    """JSON with one line per key down to `depth` levels of keys, and one line per item of a list at such a level."""
    return _lines(value, depth, "\n") + "\n"


def _lines(value: Any, depth: int, newline: str) -> str:
    if depth == 0 or not value or not isinstance(value, (Mapping, list, tuple)):
        return json.dumps(value)
    inner = newline + " "
    if isinstance(value, Mapping):
        items = [f"{json.dumps(str(key))}: {_lines(item, depth - 1, inner)}" for key, item in value.items()]
        return f"{{{inner}{f',{inner}'.join(items)}{newline}}}"
    return f"[{inner}{f',{inner}'.join(map(json.dumps, value))}{newline}]"


def without_repeats(found: Mapping[str, Any]) -> dict[str, Any]:
    """A table.json of `lcm_jax.evaluate` that holds once what its rows have in common; nothing is lost.

    The "comparison" of the first row and, under "models", the "settings" of each model's first row stand at the top.
    Rows keep what differs from them.
    """
    comparison, models, rows = found["rows"][0]["comparison"], {}, []
    for row in found["rows"]:
        shared = {key: value for key, value in row["settings"].items() if key != "sampling"}
        shared = models.setdefault(row["model"], shared)
        settings = {key: value for key, value in row["settings"].items() if shared.get(key) != value}
        rows.append(row | {"settings": settings})
        if row["comparison"] == comparison:
            del rows[-1]["comparison"]
    return {"notes": found["notes"], "comparison": comparison, "models": models, "rows": rows}


def publish_table(path: Path, folder: Path) -> None:
    """Writes the table.json that `lcm_jax.evaluate` keeps in `folder` to `path`, `without_repeats`."""
    path.write_text(to_json(without_repeats(json.loads((folder / "table.json").read_text())), 2))


def table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    head, *lines = [f"| {' | '.join(cells)} |\n" for cells in (heads, *rows)]
    return "".join([head, "|---" * len(heads), "|\n", *lines])


def table_of(columns: Mapping[str, tuple[str, str]], rows: Iterable[Mapping[str, Any]]) -> str:
    """A Markdown table of rows; columns: title -> (key of a row, format). A row without a value has an empty cell."""
    return table(
        list(columns),
        [["" if row.get(key) is None else form.format(row[key]) for key, form in columns.values()] for row in rows],
    )


def publish(folder: Path, sources: Mapping[str, Path]) -> None:
    """Copies the results that exist into an experiment's folder; sources: name in `folder` -> file."""
    for name, source in sources.items():
        if source.exists():
            shutil.copyfile(source, folder / name)
