"""What experiments were measured on: digests of all that their numbers depend on, kept in experiments/evidence.json.

    {"experiments": {NAME: {"command", "minutes", "machine", "date", "depends", "code", "files"}}, "code": {KEY: ...}}

"depends" and the entry of "code" that a record names are {file: digest}: assets, configs, programs; and modules of the
package, which most records share. "files" are the published ones.
"""

import ast
import datetime
import functools
import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from experiments import embedded, results, stage
from experiments.evidence.listed import Experiment
from experiments.speed import run as speed
from lcm_jax import files, foreign
from lcm_jax.run import config as config_lib

RECORDS = "experiments/evidence.json"
DIGITS = 12  # of a digest

Digests = dict[str, str]
Record = dict[str, Any]


def depends(one: Experiment, root: Path) -> Digests:
    """All that an experiment's numbers depend on, as it is now."""
    found = {folder: embedded.asset_hash(root / folder)[:DIGITS] for folder in one.assets}
    found |= {name: digest(config_lib.to_json(stage.read_config(root / name))) for name in one.configs}
    return found | {name: of_file(root / name) for name in _matching(root, (*one.code, *one.asking))}


def _matching(root: Path, patterns: tuple[str, ...]) -> list[str]:
    return [str(path.relative_to(root)) for pattern in patterns for path in sorted(root.glob(pattern))]


def digest(content: str | bytes) -> str:
    return hashlib.sha256(content.encode() if isinstance(content, str) else content).hexdigest()[:DIGITS]


def of_file(path: Path) -> str:
    """Of a Python file what it does counts, not its comments, docstrings and layout; of any other, every byte."""
    return _of_code(path.read_text()) if path.suffix == ".py" else digest(path.read_bytes())


@functools.cache
def _of_code(source: str) -> str:
    return digest(repr(_plain(ast.parse(source))))


def _plain(node: Any) -> Any:
    """A syntax tree as tuples and lists, without texts that stand as statements and without empty fields, whose number
    differs between versions of Python."""
    if isinstance(node, ast.AST):
        fields = [(name, _plain(value)) for name, value in ast.iter_fields(node) if value not in (None, [])]
        return type(node).__name__, fields
    if isinstance(node, list):
        return [_plain(item) for item in node if not _is_text(item)]
    return node


def _is_text(node: Any) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


def trained_by(one: Experiment, found: Mapping[str, str], root: Path) -> Digests:
    """The part of `depends` with which an experiment begins from its start."""
    asking = _matching(root, one.asking)
    return {name: value for name, value in found.items() if name not in asking}


def changed(one: Experiment, record: Record | None, root: Path) -> list[str]:
    """What is not as it was when the experiment was recorded; nothing if its published files are current."""
    if record is None:
        return ["no record"]
    now = depends(one, root) | published(one, root)
    then = record["depends"] | record["files"]
    found = [name for name in {**now, **then} if now.get(name) != then.get(name)]
    return found + ["its command"] * (record["command"] != one.command)


def published(one: Experiment, root: Path) -> Digests:
    """The published files that are there."""
    return {name: of_file(root / name) for name in one.published if (root / name).exists()}


def make(one: Experiment, found: Digests, minutes: float, root: Path) -> Record:
    """The record of an experiment that has published its files, measured on what `found` says."""
    return {
        "command": one.command,
        "minutes": round(minutes, 1),
        "machine": speed.card_name("cpu"),
        "date": datetime.date.today().isoformat(),
        "depends": found,
        "files": published(one, root),
    }


def read(root: Path) -> dict[str, Record]:
    """All records, by the experiments' names. Raises LcmError: the file is broken."""
    if not (root / RECORDS).exists():
        return {}
    found = foreign.read_json(root / RECORDS)
    return {
        name: record | {"depends": record["depends"] | found["code"][record["code"]]}
        for name, record in found["experiments"].items()
    }


def write(records: Mapping[str, Record], root: Path) -> None:
    experiments, code = {}, {}
    for name, record in records.items():
        modules = {path: value for path, value in record["depends"].items() if path.startswith("lcm_jax/")}
        modules = {path: value for path, value in sorted(modules.items()) if path.endswith(".py")}
        key = digest(repr(modules))
        own = {path: value for path, value in record["depends"].items() if path not in modules}
        experiments[name], code[key] = record | {"depends": own, "code": key}, modules
    files.write_atomic(root / RECORDS, results.to_json({"experiments": experiments, "code": code}, 3))
