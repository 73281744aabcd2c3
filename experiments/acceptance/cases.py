"""The table of published repositories, and what becomes of each: rows of `experiments.gpu_day.driver`.

A table is a JSON file, as published.json:

    {"families": {NAME: {FACT: value}}, "rows": [{"name", "model", ...}, ...]}      the fields of `Case`

What a row finds is in OUT/found/NAME.json, its images in OUT/images.
"""

import dataclasses
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments import results
from experiments.gpu_day.driver import Day, Row
from lcm_jax import files, foreign
from lcm_jax.cost.chips import GIB
from lcm_jax.errors import LcmError
from lcm_jax.typed import checked, config_of, field_types

PUBLISHED = Path(__file__).with_name("published.json")
PROMPT, SEED = "a lighthouse on a cliff above a stormy sea, highly detailed", 0
CHECK, TRAIN = "experiments.acceptance.check", "experiments.acceptance.train"
STARTING_S = 1800  # that a training may take beside its own time: downloads, compiling, its last checkpoint


@dataclasses.dataclass(frozen=True)
class Case:
    """One row of a table.

    Attributes:
      name: of its files, too.
      model, unet, vae, variant, model_config, lora: as the flags of `lcm_jax.sample`.
      about: for readers of the table.
      family: whose facts it also has.
      gigabytes: of its downloads, if nothing of it is in the cache.
      preset: of `sampling.presets`; sampler, guidance_scale: in its place.
      steps: numbers of sampling steps; (): it is only looked at.
      size: pixels of an edge; 0: the model's own.
      expects: fact -> value that it must have, see `check.facts`.
      refuses: part of the error with which it is to be refused; "": it is to be loaded.
      without_diffusers: why its images are not compared; "": they are.
      config: of configs/, of a row that trains the model by it; "": it is loaded and sampled.
      flags: more of `lcm_jax.train`.
      limit_s: seconds that it may take, downloads included; of a training, beside its own time.
    """

    name: str
    model: str
    about: str = ""
    family: str = ""
    gigabytes: float = 0.0
    unet: str | None = None
    vae: str | None = None
    variant: str | None = None
    model_config: str | None = None
    lora: tuple[str, ...] = ()
    preset: str | None = None
    sampler: str | None = None
    guidance_scale: float | None = None
    steps: tuple[int, ...] = (1, 2, 4, 8)
    size: int = 0
    expects: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    refuses: str = ""
    without_diffusers: str = ""
    config: str = ""
    flags: tuple[str, ...] = ()
    limit_s: float = 3600.0

    @property
    def sources(self) -> list[str]:
        """All that it reads."""
        return [*filter(None, (self.model, self.unet, self.vae, self.model_config)), *self.lora]


def read(path: Path) -> list[Case]:
    """The rows of a table, with the facts of their families. Raises LcmError: the file is none."""
    content = foreign.read_json(path, "correct it")
    with config_of(path):
        families = checked("families", content.get("families", {}), Mapping[str, dict])
        rows = checked("rows", content.get("rows"), tuple[dict, ...])
    cases = [of_json(row, f"{path}: row {row.get('name')}") for row in rows]
    for case in cases:
        if case.family and case.family not in families:
            raise LcmError(f"{path}: row {case.name} has the family {case.family}, which is not among its families")
    names = [case.name for case in cases]
    if twice := {name for name in names if names.count(name) > 1}:
        raise LcmError(f"{path}: two rows have the name {', '.join(sorted(twice))}; rename one")
    of_family = [families.get(case.family, {}) if not case.refuses and not case.config else {} for case in cases]
    return [
        dataclasses.replace(case, expects={**facts, **case.expects})
        for case, facts in zip(cases, of_family, strict=True)
    ]


def of_json(row: Mapping[str, Any], where: str) -> Case:
    """A case from JSON values. Raises LcmError, which names the key, for what is none."""
    kinds = field_types(Case)
    if unknown := row.keys() - kinds.keys():
        raise LcmError(f"{where} has {', '.join(sorted(unknown))}, but its keys are {', '.join(kinds)}")
    if missing := {"name", "model"} - row.keys():
        raise LcmError(f"{where} has no {' and no '.join(sorted(missing))}; add it")
    with config_of(where):
        values = {key: () if value == [] else checked(key, value, kinds[key]) for key, value in row.items()}
    return Case(**values)


def rows(cases: Sequence[Case], out: Path, train_s: float, data: str, train_flags: Sequence[str]) -> list[Row]:
    """The driver's rows of cases; of those that train, none if `train_s` is 0."""

    def row(case: Case) -> Row:
        module = TRAIN if case.config else CHECK
        described = json.dumps(dataclasses.asdict(case))
        command = [sys.executable, "-m", module, described, f"--out={out}"]
        limit = case.limit_s
        if case.config:
            command += [f"--seconds={train_s:g}", f"--data={data}", *(f"--flag={flag}" for flag in train_flags)]
            limit = train_s + max(case.limit_s, STARTING_S)
        return Row(case.name, tuple(command), lambda folder, log: result(folder, case.name), limit)

    return [row(case) for case in cases if train_s or not case.config]


def path_of(out: Path, name: str) -> Path:
    return out / "found" / f"{name}.json"


def keep(out: Path, name: str, found: Mapping[str, Any]) -> None:
    """Writes what a row has found so far."""
    files.write_atomic(path_of(out, name), results.to_json(found, 2))


def result(out: Path, name: str) -> dict[str, Any]:
    """What a row has found, with a line for the table."""
    found = json.loads(path_of(out, name).read_text())
    return {"result": "; ".join(texts(found)), **found}


def texts(found: Mapping[str, Any]) -> list[str]:
    """What the table says of a row."""
    said, facts = [], found.get("facts", {})
    if "refused" in found:
        return [f"refused, as it should be: {found['refused']}"]
    if "training" in found:
        one = found["training"]
        said = [f"{one['steps']} steps, {one['seconds_per_step']:.4g} s/step, {one['images_per_second']:.3g} images/s"]
        said += [f"{one['memory_peak'] / GIB:.2f} GiB"] if "memory_peak" in one else []
        said += [f"MFU {one['mfu']:.1%}"] if "mfu" in one else []
        return [*said, f"loss {one['first_loss']:.4g}, then {one['last_loss']:.4g}"]
    if "unet.parameters" in facts:
        said.append(f"UNet {facts['unet.parameters'] / 1e6:.1f}M")
    if "lora.layers" in facts:
        ranks, alphas = (", ".join(f"{value:g}" for value in facts[f"lora.{key}"]) for key in ("ranks", "alphas"))
        said.append(f"LoRA of {facts['lora.layers']} layers, rank {ranks}, alpha {alphas or 'not given'}")
    for one in found.get("sampling", ()):
        text = f"{one['steps']} step{'s' * (one['steps'] > 1)} {one['seconds']:.3g} s"
        said.append(text + (f", utilisation {one['utilisation']:.1%}" if one.get("utilisation") else ""))
    if "peak_bytes" in found:
        said.append(f"peak {found['peak_bytes'] / GIB:.2f} GiB")
    diffusers = found.get("diffusers", {})
    if "skipped" in diffusers:
        said.append(f"not compared: {diffusers['skipped']}")
    elif diffusers:
        worst = max(one["largest"] for one in diffusers["images"])
        said.append(f"as in diffusers, but for {worst} of 255" if diffusers["same"] else "unlike diffusers")
    return said


def markdown(listed: Sequence[Row], day: Day) -> str:
    """The table of timings, a line for each row and number of steps."""
    heads = ("row", "sampler", "steps", "s/image", "first call, s", "utilisation", "peak GiB", "largest difference")
    lines = []
    for row in listed:
        found = day.kept(row) or {}
        images = {one["steps"]: one["largest"] for one in found.get("diffusers", {}).get("images", ())}
        for one in found.get("sampling", ()):
            used = f"{one['utilisation']:.1%}" if one.get("utilisation") else ""
            peak = f"{found['peak_bytes'] / GIB:.2f}" if "peak_bytes" in found else ""
            cells = [f"{one['seconds']:.3g}", f"{one['first_s']:.3g}", used, peak, str(images.get(one["steps"], ""))]
            lines.append([row.name, one["sampler"], str(one["steps"]), *cells])
    return results.table(heads, lines) if lines else ""


def summary(listed: Sequence[Row], day: Day) -> str:
    """JSON of all rows that are there."""
    kept = {row.name: found for row in listed if (found := day.kept(row))}
    return results.to_json({"settings": dict(day.settings), "code": day.code, "rows": kept}, 3)
