"""Results as files: Markdown tables, and copies beside an experiment's code."""

import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lcm_jax.metrics.table import to_json as to_json  # results have the layout of the tables of `lcm_jax.evaluate`


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
