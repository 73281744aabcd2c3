"""Results as files: Markdown tables, and copies beside an experiment's code."""

import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lcm_jax.metrics import intervals
from lcm_jax.metrics.intervals import Estimate
from lcm_jax.metrics.table import shown
from lcm_jax.metrics.table import to_json as to_json  # results have the layout of the tables of `lcm_jax.evaluate`


def table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    head, *lines = [f"| {' | '.join(cells)} |\n" for cells in (heads, *rows)]
    return "".join([head, "|---" * len(heads), "|\n", *lines])


def table_of(columns: Mapping[str, tuple[str, str]], rows: Iterable[Mapping[str, Any]]) -> str:
    """A Markdown table of rows; columns: title -> (key of a row, format). A row without a value has an empty cell.

    row["intervals"], which rows that were stored before have not, is {key: (low, high)}.
    """

    def cell(row: Mapping[str, Any], key: str, form: str) -> str:
        return "" if row.get(key) is None else shown(form, row[key], row.get("intervals", {}).get(key))

    return table(list(columns), [[cell(row, key, form) for key, form in columns.values()] for row in rows])


def of_estimates(found: Mapping[str, Estimate]) -> dict[str, Any]:
    """Values and "intervals" of a row."""
    ends = {key: estimate.interval for key, estimate in found.items() if estimate.interval}
    return {key: estimate.value for key, estimate in found.items()} | {"intervals": ends}


def noted(note: str, rows: Iterable[Mapping[str, Any]]) -> str:
    """A table's note, with what its brackets are if a row has intervals."""
    found = any(row.get("intervals") for row in rows)
    return " ".join(filter(None, (note, intervals.NOTE if found else "")))


def publish(folder: Path, sources: Mapping[str, Path]) -> None:
    """Copies the results that exist into an experiment's folder; sources: name in `folder` -> file."""
    for name, source in sources.items():
        if source.exists():
            shutil.copyfile(source, folder / name)
