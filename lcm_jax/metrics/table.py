"""The rows of an evaluation, each kept in a file of its own as soon as it is there, and the table made of them.

    FOLDER/rows/<sampler>_<steps>_<scale>_<model>.json     one `Row`; <sampler>-<spacing> where it is not trailing
    FOLDER/rows/before/<the same name>_<hash>.json         what a row of other pictures replaced, if it had more metrics
    FOLDER/table.json, FOLDER/table.md                     all of them that belong together

Rows are compared with each other, so all of a folder share seed, prompts, number of pictures and resolution, and
measure a thing with the same network against the same reference (`Row.comparison`). What a number also depends on, and
may differ from row to row, is in `Row.settings`: a row is taken as it is only where both are what they would be now.
Metrics that are asked for later are added to those that a row has.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lcm_jax import files
from lcm_jax.errors import LcmError

FLAGS = {
    "seed": "--seed",
    "pictures": "--count",
    "prompts": "--prompts or --source",
    "height": "--height",
    "width": "--width",
}
FLAGS_OF_ROWS = ("dtype", "spacing", "negative_prompt", "tiled")  # which the notes name
STATE = ("model", "program")  # of `Row.settings`: what rows of one model share in a table
LATENCY = ("batch_size", "device", "fsdp", "timings")  # of a program: the time depends on it, the pictures do not


@dataclasses.dataclass(frozen=True)
class Column:
    """A measured value: its title, how it is written, and which way is better."""

    title: str
    form: str
    higher_is_better: bool = False


COLUMNS = {
    "caption_accuracy": Column("caption accuracy", "{:.1%}", True),
    "shapes_frechet": Column("Frechet distance (shapes)", "{:.2f}"),
    "endpoint_error": Column("one-step error", "{:.3f}"),
    "fid": Column("FID", "{:.2f}"),
    "clip_score": Column("CLIP score", "{:.2f}", True),
    "cmmd": Column("CMMD", "{:.3f}"),
    "fd_dinov2": Column("FD-DINOv2", "{:.1f}"),
}


VALUES = {"shapes": ("caption_accuracy", "shapes_frechet", "endpoint_error")}  # of a metric, if not one of its name


@dataclasses.dataclass(frozen=True)
class Row:
    """What one sampler, number of steps and guidance scale gave.

    Attributes:
      model: its name in the table.
      evaluations: of the UNet, for one picture.
      values: by key of `COLUMNS`; None where it does not apply.
      milliseconds: per picture, median over batches, text encoding not included.
      quartiles: of the same.
      timings: batches behind them.
      compile_seconds: what the first batch took longer: the sampler's compilation, or reading a compiled one.
      comparison: what all rows of a table share; "metrics": by name, the network and reference behind it.
      settings: what else the numbers depend on: "model" and "program" of a command, "sampling" of the row.
    """

    model: str
    sampler: str
    steps: int
    guidance_scale: float
    evaluations: int
    values: Mapping[str, float | None]
    milliseconds: float
    quartiles: tuple[float, float]
    timings: int
    compile_seconds: float
    comparison: Mapping[str, Any]
    settings: Mapping[str, Any]


def plain(value: Any) -> Any:
    """`value` as it comes back from JSON."""
    return json.loads(json.dumps(value))


def sampler_of(row: Row) -> str:
    """The row's sampler, with the spacing of its timesteps if a baseline's and not trailing: "ddim-leading"."""
    spacing = row.settings.get("sampling", {}).get("spacing", "trailing")
    return row.sampler if row.sampler == "lcm" or spacing == "trailing" else f"{row.sampler}-{spacing}"


def file_of(folder: Path, row: Row) -> Path:
    """Where a row is kept."""
    name = hashlib.sha256(row.model.encode()).hexdigest()[:12]
    return folder / "rows" / f"{sampler_of(row)}_{row.steps}_{row.guidance_scale:g}_{name}.json"


def keep(folder: Path, row: Row) -> Path | None:
    """Writes the row's file, whole or not at all; one of the same model, sampler, steps and scale is replaced.

    That one's values of metrics that the new row has not are taken over where both are of the same pictures. Where
    they are not, the old file is kept aside, and its new place returned.
    """
    path, aside = file_of(folder, row), None
    if path.exists():
        old = _read(path)
        row = with_metrics_of(row, old)
        if old.comparison["metrics"].keys() - row.comparison["metrics"].keys():
            text = path.read_bytes()
            aside = path.parent / "before" / f"{path.stem}_{hashlib.sha256(text).hexdigest()[:8]}.json"
            files.write_text(aside, text)
    with files.new_file(path) as partial:
        partial.write_text(json.dumps(dataclasses.asdict(row), indent=1) + "\n", encoding="utf-8")
    return aside


def kept(folder: Path) -> list[Row]:
    """The rows that a folder keeps, in the order of model, sampler, scale and steps.

    Raises:
      LcmError: a file that is no row.
    """
    rows = [_read(path) for path in sorted((folder / "rows").glob("*.json"))]
    return sorted(rows, key=lambda row: (row.model, sampler_of(row), row.guidance_scale, row.steps))


def read(folder: Path) -> list[Row]:
    """The rows of a folder's table as it was written last, in its order; [] where there is none.

    Raises:
      LcmError: table.json is no table.
    """
    path = folder / "table.json"
    try:
        return [_row(found) for found in files.read_json(path)["rows"]] if path.exists() else []
    except (TypeError, KeyError):
        raise LcmError(f"{path} is no table of lcm_jax.evaluate; delete it, and it is made again") from None


def _read(path: Path) -> Row:
    try:
        return _row(files.read_json(path))
    except (TypeError, KeyError):
        raise LcmError(f"{path} is no row of a table; delete it, and it is measured again") from None


def _row(found: Mapping[str, Any]) -> Row:
    return Row(**{**found, "quartiles": tuple(found["quartiles"])})


def with_metrics_of(row: Row, old: Row) -> Row:
    """`row` with the values of metrics that `old` has alone, where their pictures are the same."""
    if _pictures(old) != _pictures(row):
        return row
    metrics = row.comparison["metrics"]
    added = {name: about for name, about in old.comparison["metrics"].items() if name not in metrics}
    keys = {key for name in added for key in VALUES.get(name, (name,))}
    values = {key: value for key, value in old.values.items() if key in keys} | dict(row.values)
    return dataclasses.replace(row, values=values, comparison={**row.comparison, "metrics": added | dict(metrics)})


def _pictures(row: Row) -> Any:
    """What a row's pictures depend on."""
    drawn = {key: value for key, value in row.comparison.items() if key != "metrics"}
    program = {key: value for key, value in row.settings["program"].items() if key not in LATENCY}
    return same_origin([drawn, {**row.settings, "program": program}])


def check_comparable(folder: Path, rows: Sequence[Row], comparison: Mapping[str, Any]) -> None:
    """Raises LcmError where a folder's rows were drawn or measured otherwise: they must not stand in one table."""
    for row in rows:
        name = f"{row.model}, {row.sampler}, {row.steps} steps"
        for key, flag in FLAGS.items():
            before, now = row.comparison[key], comparison[key]
            if same_origin(before) != same_origin(now):
                raise LcmError(
                    f"--out={folder} holds a row ({name}) of {key} {_short(before)}, this command's is "
                    f"{_short(now)}; rows of one table share it: give the same {flag}, or another --out"
                )
        for metric in row.comparison["metrics"].keys() & comparison["metrics"].keys():
            if same_origin(row.comparison["metrics"][metric]) != same_origin(comparison["metrics"][metric]):
                raise LcmError(
                    f"--out={folder} holds a row ({name}) whose {metric} was measured with another network, "
                    "reference or --endpoint_steps; give the same ones, or another --out"
                )


def same_origin(value: Any) -> Any:
    """`value` without what is for the reader alone: the path ("from") of what a hash tells apart."""
    if isinstance(value, Mapping):
        return {key: same_origin(item) for key, item in value.items() if key != "from"}
    return [same_origin(item) for item in value] if isinstance(value, list) else value


def _short(value: Any) -> str:
    """A value for a message: of several things, the one that tells prompts apart."""
    return f"{value['from']} (sha256 {value['sha256'][:12]})" if isinstance(value, Mapping) else str(value)


def is_current(row: Row, comparison: Mapping[str, Any], settings: Mapping[str, Any]) -> bool:
    """Whether measuring the row again would give nothing else and nothing more."""
    has = row.comparison["metrics"]
    of_row = {**row.comparison, "metrics": {name: has[name] for name in comparison["metrics"] if name in has}}
    return same_origin([of_row, row.settings]) == same_origin([dict(comparison), settings])


def states(rows: Sequence[Row]) -> dict[str, dict[str, Any]]:
    """Of each model of a table, by name: what all its rows share of `Row.settings`."""
    return {row.model: {part: row.settings[part] for part in STATE} for row in rows}


def belongs(row: Row, current: Mapping[str, Mapping[str, Any]]) -> bool:
    """Whether the row is of its model's `current` state, of `states`, or of a model that has none yet."""
    state = current.get(row.model)
    return state is None or all(same_origin(row.settings[part]) == same_origin(state[part]) for part in STATE)


def columns(rows: Sequence[Row]) -> list[str]:
    """Keys of the values that any of the rows has, in the order of `COLUMNS`."""
    return [key for key in COLUMNS if any(row.values.get(key) is not None for row in rows)]


def markdown(rows: Sequence[Row], latency: bool = True) -> str:
    """The table as Markdown, and what its numbers are of; latency: with the times, and what they are of."""
    keys = columns(rows)
    heads = [
        "model",
        "sampler",
        "steps",
        "guidance scale",
        "network evaluations",
        *(COLUMNS[key].title for key in keys),
        *(("ms per image", "compile s") if latency else ()),
    ]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for row in rows:
        values = (row.values.get(key) for key in keys)
        cells = [row.model, sampler_of(row), str(row.steps), f"{row.guidance_scale:g}", str(row.evaluations)]
        cells += ["" if v is None else COLUMNS[k].form.format(v) for k, v in zip(keys, values, strict=True)]
        cells += [f"{row.milliseconds:.1f}", f"{row.compile_seconds:.1f}"] if latency else []
        lines.append(f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |")
    return "\n".join(lines) + "\n\n" + "\n".join(notes(rows, latency)) + "\n"


def notes(rows: Sequence[Row], latency: bool = True) -> list[str]:
    """What the numbers of a table are of, one line each; latency: the times, too."""
    shared = rows[0].comparison
    lines = [
        f"{shared['pictures']} pictures per row, {shared['width']} x {shared['height']} pixels, seed "
        f"{shared['seed']}, the same initial noise in every row; prompts: {_short(shared['prompts'])}."
    ]
    metrics = {name: about for row in rows for name, about in row.comparison["metrics"].items()}
    for name, about in metrics.items():
        lines.append(f"- {name}: " + "; ".join(f"{key} {_note(value)}" for key, value in about.items()) + ".")
    lines.append("- " + "; ".join(filter(None, (_of_rows(rows, key) for key in FLAGS_OF_ROWS))) + ".")
    if not latency:
        return lines
    timed = {(row.settings["program"]["batch_size"], row.settings["program"]["device"]) for row in rows}
    where = ", ".join(f"batches of {size} on {device}" for size, device in sorted(timed))
    lines.append(
        f"- ms per image: median of {min(row.timings for row in rows)} or more batches, sampler and VAE, without the "
        f"text encoder; {where}. compile: the sampler's, once."
    )
    return lines


def _of_rows(rows: Sequence[Row], key: str) -> str:
    """What the rows were drawn with, by model where they differ: "dtype float32 (a), bfloat16 (b)".

    Empty where the flag is of none of them.
    """
    found: dict[str, list[str]] = {}
    for row in rows:
        if key == "spacing" and row.sampler == "lcm":  # its timesteps are those it was distilled at
            continue
        part = row.settings["sampling" if key == "spacing" else "program"]
        names = found.setdefault("none" if part[key] is None else str(part[key]), [])
        if row.model not in names:
            names.append(row.model)
    if len(found) < 2:
        return f"{key} {next(iter(found))}" if found else ""
    return f"{key} " + ", ".join(f"{value} ({', '.join(names)})" for value, names in found.items())


def _note(value: Any) -> str:
    if isinstance(value, Mapping):
        return " ".join(f"{key} {_note(item)}" for key, item in value.items())
    return value[:12] if isinstance(value, str) and len(value) == 64 else str(value)  # a hash: enough to tell apart


def write(folder: Path, rows: Sequence[Row]) -> None:
    """table.json and table.md."""
    shared = {key: value for key, value in rows[0].comparison.items() if key != "metrics"}
    whole = {**shared, "notes": notes(rows), "rows": [dataclasses.asdict(row) for row in rows]}
    texts = {"table.json": json.dumps(whole, indent=1) + "\n", "table.md": markdown(rows)}
    for name, text in texts.items():
        with files.new_file(folder / name) as partial:
            partial.write_text(text, encoding="utf-8")
