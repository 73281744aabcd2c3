"""The rows of an evaluation, each kept in a file as soon as it is measured, and the table made of them.

    FOLDER/rows/<sampler>_<steps>_<scale>_<model>.json   one `Row`; <sampler>-<spacing> unless the spacing is trailing
    FOLDER/rows/before/<the same name>_<hash>.json       a row that was replaced by one of other images
    FOLDER/table.json, FOLDER/table.md                   all rows that go together

Two records decide which numbers may stand side by side:

    Row.comparison   seed, prompts, number and size of the images, and for each metric its network and reference. All
                     rows of a folder share it: a command that differs in it is refused.
    Row.settings     what else a row depends on: "model" (hashes) and "program" (flags), the state of its model, and
                     "sampling". Rows are measured again if it has changed; a table has one state of each model.

Metrics that a later command asks for are added to the row. Rows that were measured before there were intervals stay,
and are shown without; delete them to have them measured again.
"""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lcm_jax import files, foreign, typed
from lcm_jax.errors import LcmError
from lcm_jax.metrics import intervals

FLAGS = {  # of `Row.comparison`, but for its metrics
    "seed": "--seed",
    "pictures": "--count",
    "prompts": "--prompts or --source",
    "height": "--height",
    "width": "--width",
}
NOTED = ("dtype", "spacing", "negative_prompt", "tiled", "sliced", "weights")  # flags in the notes
LATENCY = ("batch_size", "device", "fsdp", "timings", "offload")  # flags on which the time depends, but not the images


@dataclasses.dataclass(frozen=True)
class Column:
    """A measured value: its title, its format, and which way is better."""

    title: str
    form: str
    higher_is_better: bool = False


COLUMNS = {
    "caption_accuracy": Column("caption accuracy", "{:.1%}", True),
    "shapes_frechet": Column("Frechet distance (shapes)", "{:.2f}"),
    "coverage_distance": Column("coverage distance", "{:.3f}"),
    "collapsed": Column("collapsed captions", "{:.1%}"),
    "diversity": Column("diversity", "{:.1%}", True),
    "endpoint_error": Column("one-step error", "{:.3f}"),
    "fid": Column("FID", "{:.2f}"),
    "clip_score": Column("CLIP score", "{:.2f}", True),
    "pickscore": Column("PickScore", "{:.2f}", True),
    "cmmd": Column("CMMD", "{:.3f}"),
    "fd_dinov2": Column("FD-DINOv2", "{:.1f}"),
}


@dataclasses.dataclass(frozen=True)
class Row:
    """Measurements of one model, sampler, number of steps and guidance scale.

    Attributes:
      model: its name in the table.
      evaluations: of the UNet, for one image.
      values: by key of `COLUMNS`; None if it does not apply.
      milliseconds: per image, median over batches, without text encoding.
      quartiles: of the same.
      timings: number of these batches.
      compile_seconds: by which the first batch took longer: compiling the sampler, or reading a compiled one.
      comparison, settings: see the module.
      intervals: (low, high) of values that have one, see metrics/intervals.py.
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
    intervals: Mapping[str, tuple[float, float]] = dataclasses.field(default_factory=dict)

    @property
    def state(self) -> dict[str, Any]:
        return {key: value for key, value in self.settings.items() if key != "sampling"}


def plain(value: Any) -> Any:
    """`value` as it comes back from JSON."""
    return json.loads(json.dumps(value))


def same(a: Any, b: Any) -> bool:
    """Whether two records are equal apart from "from", a path for the reader whose content a hash identifies."""
    return _without_from(a) == _without_from(b)


def _without_from(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_from(item) for key, item in value.items() if key != "from"}
    return value


def sampler_of(row: Row) -> str:
    """The row's sampler, with the spacing of its timesteps unless it is trailing, or its gamma unless it is 0.

    As "ddim-leading", "tcd-0.3".
    """
    sampling = row.settings.get("sampling", {})
    spacing, gamma = sampling.get("spacing", "trailing"), sampling.get("gamma", 0.0)
    if gamma:
        return f"{row.sampler}-{gamma:g}"
    return row.sampler if row.sampler == "lcm" or spacing == "trailing" else f"{row.sampler}-{spacing}"


def save_row(folder: Path, row: Row) -> Path | None:
    """Writes a row's file; it replaces the row of the same model, sampler, steps and scale.

    If both rows are of the same images, the new one takes over the values of metrics that it lacks. Otherwise the old
    file is moved aside, and its new path is returned.
    """
    name = hashlib.sha256(row.model.encode()).hexdigest()[:12]
    path = folder / "rows" / f"{sampler_of(row)}_{row.steps}_{row.guidance_scale:g}_{name}.json"
    aside = None
    if path.exists():
        old = _read_row(path)
        if same(_images(old), _images(row)):
            metrics = {**old.comparison["metrics"], **row.comparison["metrics"]}
            comparison = {**row.comparison, "metrics": metrics}
            values, ends = {**old.values, **row.values}, {**old.intervals, **row.intervals}
            row = dataclasses.replace(row, values=values, intervals=ends, comparison=comparison)
        else:
            text = path.read_bytes()
            aside = path.parent / "before" / f"{path.stem}_{hashlib.sha256(text).hexdigest()[:8]}.json"
            files.write_atomic(aside, text)
    files.write_atomic(path, json.dumps(dataclasses.asdict(row), indent=1) + "\n")
    return aside


def _images(row: Row) -> dict[str, Any]:
    """What a row's images depend on."""
    program = {key: value for key, value in row.settings["program"].items() if key not in LATENCY}
    return {**row.comparison, "metrics": None, "settings": {**row.settings, "program": program}}


def read_rows(folder: Path) -> list[Row]:
    """The rows of a folder's files, ordered by model, sampler, scale and steps. Raises LcmError for another file."""
    return sorted(map(_read_row, _files(folder)), key=_place)


def _files(folder: Path) -> list[Path]:
    """The files of rows, the one that was written last at the end."""
    return sorted((folder / "rows").glob("*.json"), key=lambda path: path.stat().st_mtime_ns)


def _place(row: Row) -> tuple[str, str, float, int]:
    return row.model, sampler_of(row), row.guidance_scale, row.steps


def _read_row(path: Path) -> Row:
    remedy = "delete it, and it will be measured again"
    with foreign.reading(path, "a row of a table", remedy):
        row = _row(foreign.read_json(path, remedy))
        for name, kind in typed.field_types(Row).items():
            typed.checked(name, getattr(row, name), kind)
        markdown([row]), [_short(row.comparison[key]) for key in FLAGS]  # whether what is shown and compared is there
        return row


def _row(found: Mapping[str, Any]) -> Row:
    ends = {key: tuple(pair) for key, pair in found.get("intervals", {}).items()}
    return Row(**{**found, "quartiles": tuple(found["quartiles"]), "intervals": ends})


def check_comparable(folder: Path, rows: Sequence[Row], comparison: Mapping[str, Any]) -> None:
    """Raises LcmError if a row of the folder has another `comparison` than this command's."""
    for row in rows:
        name = f"{row.model}, {row.sampler}, {row.steps} steps"
        for key, flag in FLAGS.items():
            before, now = row.comparison[key], comparison[key]
            if not same(before, now):
                raise LcmError(
                    f"--out={folder} holds a row ({name}) with another {flag}: {_short(before)} there, {_short(now)} "
                    "here; rows of one table share it: give the same, or another --out"
                )
        for metric in row.comparison["metrics"].keys() & comparison["metrics"].keys():
            if not same(row.comparison["metrics"][metric], comparison["metrics"][metric]):
                raise LcmError(
                    f"--out={folder} holds a row ({name}) whose {metric} was measured with another network, reference "
                    "or --endpoint_steps; give the same ones, or another --out"
                )


def _short(value: Any) -> str:
    return f"{value['from']} (sha256 {value['sha256'][:12]})" if isinstance(value, Mapping) else str(value)


def is_current(row: Row, comparison: Mapping[str, Any], settings: Mapping[str, Any]) -> bool:
    """Whether measuring the row again would give the same values and no more."""
    metrics = row.comparison["metrics"]
    wanted = {name: metrics.get(name) for name in comparison["metrics"]}
    return same({**row.comparison, "metrics": wanted}, comparison) and same(row.settings, settings)


def newest(folder: Path, model: str, state: Mapping[str, Any]) -> tuple[list[Row], dict[str, int]]:
    """(rows of a folder that go together, {model: how many others it has}).

    Those rows go together that are of their model's newest state: `state` for the `model` of this command, for others
    the one in the table as it was written last or, if a command was stopped before it, that of their last row.
    """
    found = list(map(_read_row, _files(folder)))
    states = {row.model: row.state for row in (*found, *read(folder))} | {model: state}
    rows, others = [], collections.Counter()
    for row in sorted(found, key=_place):
        if same(row.state, states[row.model]):
            rows.append(row)
        else:
            others[row.model] += 1
    return rows, others


def columns(rows: Sequence[Row]) -> list[str]:
    """Keys of the values that any of the rows has, in the order of `COLUMNS`."""
    return [key for key in COLUMNS if any(row.values.get(key) is not None for row in rows)]


def shown(form: str, value: float, interval: Sequence[float] | None = None) -> str:
    """A value with its interval, if it has one: "94.5% (93.1 to 95.8)"."""
    text = form.format(value)
    if interval is None:
        return text
    low, high = (form.format(end).removesuffix("%") for end in interval)
    return f"{text} ({low} to {high})"


def markdown(rows: Sequence[Row], latency: bool = True) -> str:
    """The table as Markdown with its notes; latency: with the times."""
    keys = columns(rows)
    heads = ["model", "sampler", "steps", "guidance scale", "network evaluations", *(COLUMNS[k].title for k in keys)]
    heads += ["ms per image", "compile s"] if latency else []
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for row in rows:
        values = ((key, row.values.get(key)) for key in keys)
        cells = [row.model, sampler_of(row), str(row.steps), f"{row.guidance_scale:g}", str(row.evaluations)]
        cells += ["" if v is None else shown(COLUMNS[k].form, v, row.intervals.get(k)) for k, v in values]
        cells += [f"{row.milliseconds:.1f}", f"{row.compile_seconds:.1f}"] if latency else []
        lines.append(f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |")
    return "\n".join(lines) + "\n\n" + "\n".join(notes(rows, latency)) + "\n"


def notes(rows: Sequence[Row], latency: bool = True) -> list[str]:
    """How the numbers of a table were measured, one line each; latency: the times, too."""
    shared = rows[0].comparison
    lines = [
        f"{shared['pictures']} images per row, {shared['width']} x {shared['height']} pixels, seed {shared['seed']}, "
        f"the same initial noise in every row; prompts: {_short(shared['prompts'])}."
    ]
    metrics = {name: about for row in rows for name, about in row.comparison["metrics"].items()}
    for name, about in metrics.items():
        lines.append(f"- {name}: " + "; ".join(f"{key} {_note(value)}" for key, value in about.items()) + ".")
    if any(row.intervals for row in rows):
        lines.append(f"- {intervals.NOTE}")
    lines.append("- " + "; ".join(filter(None, (_flag_note(rows, key) for key in NOTED))) + ".")
    if latency:
        batches = ", ".join(f"batches of {way}" for way in sorted({_way(row.settings["program"]) for row in rows}))
        lines.append(
            f"- ms per image: median of {min(row.timings for row in rows)} or more batches, sampler and VAE, without "
            f"the text encoder; {batches}. compile: the sampler's, once."
        )
    return lines


def _way(program: Mapping[str, Any]) -> str:
    """What a time depends on: "16 on 1 x cpu", and flags that are not the default."""
    flags = [f"--{key}={value}" for key in ("fsdp", "offload") if (value := program.get(key)) not in (None, 1)]
    return " ".join([f"{program['batch_size']} on {program['device']}", *flags])


def _flag_note(rows: Sequence[Row], key: str) -> str:
    """A flag's value, by model if they differ: "dtype float32 (a), bfloat16 (b)"; "" if no row depends on it."""
    found: dict[str, dict[str, None]] = {}
    for row in rows:
        if key == "spacing" and row.sampler == "lcm":  # its timesteps are those it was distilled at
            continue
        value = row.settings["sampling" if key == "spacing" else "program"].get(key)
        found.setdefault("none" if value is None else str(value), {})[row.model] = None
    if key in ("sliced", "weights") and set(found) == {"none"}:  # recorded only if given
        return ""
    if len(found) < 2:
        return f"{key} {next(iter(found))}" if found else ""
    return f"{key} " + ", ".join(f"{value} ({', '.join(models)})" for value, models in found.items())


def _note(value: Any) -> str:
    if isinstance(value, Mapping):
        return " ".join(f"{key} {_note(item)}" for key, item in value.items())
    return value[:12] if isinstance(value, str) and len(value) == 64 else str(value)  # of a hash, enough to identify it


def write(folder: Path, rows: Sequence[Row]) -> None:
    """table.md, and table.json with a line for each row.

    The comparison of the first row and the state of each model stand at the top; rows hold what differs from them.
    """
    comparison, states, lines = rows[0].comparison, {}, []
    for row in rows:
        found = dataclasses.asdict(row)
        state = states.setdefault(row.model, row.state)
        found["settings"] = {key: value for key, value in row.settings.items() if state.get(key) != value}
        if row.comparison == comparison:
            del found["comparison"]
        lines.append(found)
    whole = {**comparison, "notes": notes(rows), "models": states, "rows": lines}
    files.write_atomic(folder / "table.json", to_json(whole, 2))
    files.write_atomic(folder / "table.md", markdown(rows))


def read(folder: Path) -> list[Row]:
    """The rows of a folder's table.json, in its order, also of older versions; [] if there is none.

    Raises:
      LcmError: another file.
    """
    path = folder / "table.json"
    if not path.exists():
        return []
    remedy = "delete it, and it will be made again"
    found = foreign.read_json(path, remedy)
    with foreign.reading(path, "a table of lcm_jax.evaluate", remedy):
        shared = found.get("comparison", found)
        comparison = {key: shared[key] for key in (*FLAGS, "metrics") if key in shared}
        states = found.get("models", {})
        return [
            _row({"comparison": comparison, **row, "settings": {**states.get(row["model"], {}), **row["settings"]}})
            for row in found["rows"]
        ]


def to_json(value: Any, depth: int) -> str:
    """JSON with a line for each item of objects and lists down to `depth` levels."""
    return _lines(value, depth, "\n") + "\n"


def _lines(value: Any, depth: int, newline: str) -> str:
    if depth == 0 or not value or not isinstance(value, (Mapping, list, tuple)):
        return json.dumps(value)
    inner = newline + " "
    if isinstance(value, Mapping):
        items, ends = [f"{json.dumps(str(key))}: {_lines(item, depth - 1, inner)}" for key, item in value.items()], "{}"
    else:
        items, ends = [_lines(item, 0, inner) for item in value], "[]"
    return f"{ends[0]}{inner}{f',{inner}'.join(items)}{newline}{ends[1]}"
