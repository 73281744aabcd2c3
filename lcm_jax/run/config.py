"""The configuration of a run, from the table of keys in `run.keys`.

Default config, validation, what a resumed run may change, the programs' `--help` and docs/config.md come from it;
`python -m lcm_jax.run.config` writes the last.

A config file (`configs/*.py`) starts from `default_config()` and changes what it needs; the command line changes the
rest (`--config.train.steps=2000`). The set of keys is fixed: an unknown key is an error wherever it is typed. Only
programs and `lcm_jax.run` read the config; library functions take plain arguments.

Inside, w is the paper's guidance weight (0 = no guidance); `sample.guidance_scale` is the user's w + 1.
"""

from __future__ import annotations

import functools
import json
import os
import sys
import traceback
from collections.abc import Callable, Mapping
from typing import Any

import jax
from absl import flags
from flax.traverse_util import flatten_dict, unflatten_dict
from ml_collections import ConfigDict, config_dict

from lcm_jax.data import images
from lcm_jax.distill import OBJECTIVES
from lcm_jax.errors import LcmError, flags_named
from lcm_jax.models import lora
from lcm_jax.pretrained import hub
from lcm_jax.pretrained.model import MAX_TWO_PASS_SCALE
from lcm_jax.run.keys import KEYS, MAX_SOLVER_STEPS, SOURCES, W_EMBEDDING_OF_A_LORA, refusal
from lcm_jax.runtime import kernels, workdir


def default_config() -> ConfigDict:
    """All keys with their defaults."""
    values = {key.name: config_dict.placeholder(str) if key.default is None else key.default for key in KEYS}
    return ConfigDict(unflatten_dict(values, sep=".")).lock()


def to_json(config: ConfigDict) -> str:
    """The config as indented JSON, keys sorted, the same text for the same values."""
    return config.to_json(indent=2, sort_keys=True) + "\n"


def needs_teacher(config: ConfigDict) -> bool:
    """The run's loss evaluates the teacher, as its objective declares."""
    return OBJECTIVES[config.objective].needs_teacher or config.distill.lcd_weight > 0


def resolve(config: ConfigDict, platform: str | None = None) -> ConfigDict:
    """Copy of `config` with what depends on other values filled in: `model.student`, dtypes, `lora.targets`.

    The home folder takes the place of the ~ of `compilation_cache`, which jax would take for a folder's name.

    platform: of the run's devices: "cpu", "gpu", "tpu"; None: the default backend's.
    """
    config, auto = ConfigDict(config.to_dict()), kernels.auto_dtype(platform)
    config.compilation_cache = os.path.expanduser(config.compilation_cache)
    if config.model.student is None:
        config.model.student = config.model.teacher
    if config.model.dtype == "auto":
        config.model.dtype = auto
    if config.model.teacher_dtype == "auto":
        config.model.teacher_dtype = "float32" if auto == "float32" else config.model.dtype
    if config.lora.rank and not config.lora.targets:
        config.lora.targets = lora.DEFAULT_TARGETS
    return config.lock()


def validate(config: ConfigDict, models: bool = True, data: bool = True) -> None:
    """Checks keys, types and values. Raises LcmError that names the key, its value and what to do.

    models: also check that the objective has the models it needs.
    data: also check that the config names its data, and that their decoder is installed.
    """
    values, known = flatten_dict(config.to_dict(), sep="."), {key.name for key in KEYS}
    for name in sorted(values.keys() - known):
        raise refusal(name, values[name], "unknown key; --help and docs/config.md list the keys")
    for name in sorted(known - values.keys()):
        raise LcmError(f"config.{name} is missing; begin the config file with lcm_jax.config.default_config()")
    for key in KEYS:
        key.validate(values[key.name])
    if data:
        _check_data(config.data)
    if models:
        _check_models(config)
    _check_training(config)
    _check_guidance(config)
    _check_map(config)


def _check_data(data: ConfigDict) -> None:
    """The source has what it needs, and no more; the decoder, if images are read, is installed and has the filter."""
    if data.source is None:
        names = ", ".join(SOURCES)
        raise refusal(
            "data.source",
            None,
            f"no training data; set --config.data.source, to one of {names}, and --config.data.path",
        )
    cached = data.source == "latents" or (
        data.mixture and all(part.split()[1:2] == ["latents"] for part in data.mixture)
    )
    if not cached:  # a cache's own decoder and filter are recorded, and nothing is decoded any more
        with flags_named("--config.data."):
            images.check_choice(data.decoder, data.resize_filter)
    if data.source not in ("shapes", "mixture") and not data.path:
        raise refusal("data.path", data.path, f"data.source {data.source!r} ({SOURCES[data.source]}) needs it")
    if data.source in ("shapes", "mixture") and data.path is not None:
        raise refusal("data.path", data.path, f"data.source {data.source!r} has no files of its own; leave it None")
    if bool(data.mixture) != (data.source == "mixture"):
        raise refusal("data.mixture", data.mixture, 'goes with data.source "mixture", and only with it')


def _check_models(config: ConfigDict) -> None:
    """The models that the objective needs are given, and the student can be trained."""
    model, distill, objective = config.model, config.distill, OBJECTIVES[config.objective]
    if distill.lcd_weight and not objective.takes_lcd_weight:
        mixing = " or ".join(f'"{name}"' for name, other in OBJECTIVES.items() if other.takes_lcd_weight)
        raise refusal(
            "distill.lcd_weight",
            distill.lcd_weight,
            f"only objective {mixing} mixes two losses; set 0, or config.objective = {mixing}",
        )
    if distill.solver != "ddim" and not needs_teacher(config):
        weight = ", or set distill.lcd_weight" if objective.takes_lcd_weight else ""
        raise refusal("distill.solver", distill.solver, f'the loss evaluates no teacher; leave it "ddim"{weight}')
    if model.teacher is None and needs_teacher(config):
        why = "" if objective.needs_teacher else " (distill.lcd_weight > 0 needs one)"
        raise refusal(
            "model.teacher",
            None,
            f'no teacher; set --config.model.teacher to a model folder in diffusers format, a hub id, or "shapes"{why}',
        )
    whole = model.teacher or model.student  # what `run.models` reads more of than a UNet
    if model.config is not None and not hub.is_single_file(whole or ""):
        raise refusal(
            "model.config", model.config, f"goes with a single .safetensors file; {whole!r} has its own, leave it None"
        )
    if objective.needs_lcm and model.student is None:
        name = config.objective.upper()
        raise refusal(
            "model.student",
            None,
            f"{name} fine-tunes a Latent Consistency Model; set it to that model's folder or hub id",
        )
    starts_from_teacher = not objective.needs_lcm and model.student in (None, model.teacher)
    if config.lora.rank and distill.w_embedding_dim and starts_from_teacher:
        raise refusal("distill.w_embedding_dim", distill.w_embedding_dim, W_EMBEDDING_OF_A_LORA)


def _check_training(config: ConfigDict) -> None:
    """Mesh, learning rate and batch."""
    mesh, train, batch_size = config.mesh, config.train, config.data.batch_size
    if (mesh.data, mesh.fsdp) == (-1, -1):
        raise refusal("mesh.data", -1, "mesh.fsdp is -1 as well; give one of them")
    if train.lr_decay_steps and train.lr_decay_start < train.lr_warmup_steps:
        raise refusal(
            "train.lr_decay_start",
            train.lr_decay_start,
            f"the decay would begin inside the warm-up of {train.lr_warmup_steps} steps (train.lr_warmup_steps)",
        )
    if batch_size % train.accumulation_steps:
        raise refusal(
            "train.accumulation_steps", train.accumulation_steps, f"must divide data.batch_size = {batch_size}"
        )


def _check_guidance(config: ConfigDict) -> None:
    """The range of w, and whether the student can make the sample grids."""
    distill, sample = config.distill, config.sample
    if distill.w_max < distill.w_min:
        raise refusal("distill.w_max", distill.w_max, f"must not be below distill.w_min = {distill.w_min!r}")
    if sample.steps > distill.solver_steps:
        raise refusal("sample.steps", sample.steps, f"must be in 1..distill.solver_steps = {distill.solver_steps}")
    if not distill.w_embedding_dim and sample.guidance_scale > MAX_TWO_PASS_SCALE:
        raise refusal(
            "sample.guidance_scale",
            sample.guidance_scale,
            "a student without w embedding (distill.w_embedding_dim = 0) is guided already; set 1 (one pass a step), "
            f"or up to {MAX_TWO_PASS_SCALE:g} (two passes)",
        )


def stages(distill: ConfigDict) -> list[tuple[int, int]]:
    """(phases, first step of training) of each stage of a phased map.

    Raises:
      LcmError: a stage that cannot be read, or that does not have fewer phases than the one before, and begin later.
    """
    found = [(distill.phases, 0)]
    for text in distill.stages:
        count, colon, step = text.partition(":")
        if not (colon and count.isdecimal() and step.isdecimal() and len(text) < 20):
            raise refusal("distill.stages", text, 'write PHASES:STEP, as "2:4000"')
        found.append((int(count), int(step)))
        if not 1 <= found[-1][0] < found[-2][0] or found[-1][1] <= found[-2][1]:
            problem = "each stage has fewer phases than the one before (at least 1), and begins at a later step"
            raise refusal("distill.stages", text, f"{problem}; before it: {found[-2][0]} from step {found[-2][1]}")
    return found


def phases_after(config: ConfigDict, step: int) -> int:
    """The phases of the map that the update to `step` trained, which its checkpoint has; 0: it goes to the origin."""
    if config.distill.map != "phased":
        return 0
    return [count for count, first in stages(config.distill) if first < max(step, 1)][-1]


def phases_at_end(config: ConfigDict) -> int:
    """`phases_after` the last step of training."""
    return phases_after(config, config.train.steps)


def _check_map(config: ConfigDict) -> None:
    """The keys of the map are those of the chosen one, and the sample grids are of its number of steps."""
    distill, sample = config.distill, config.sample
    of_other = {"origin": ("phases", "stages"), "phased": ("timestep_scaling", "sigma_data")}[distill.map]
    defaults = {key.name: key.default for key in KEYS}
    for key in of_other:
        if _plain(distill[key]) != _plain(defaults[f"distill.{key}"]):
            raise refusal(f"distill.{key}", distill[key], f'distill.map = "{distill.map}" has none; leave it out')
    if distill.map == "origin":
        return
    if distill.phases > distill.solver_steps:
        raise refusal("distill.phases", distill.phases, f"at most distill.solver_steps = {distill.solver_steps}")
    last = stages(distill)[-1]
    if last[1] >= config.train.steps:
        raise refusal("distill.stages", distill.stages, f"the last begins after train.steps = {config.train.steps}")
    if sample.steps != last[0]:
        problem = f"the map that is trained last has {last[0]} phases, for as many steps; set {last[0]}"
        raise refusal("sample.steps", sample.steps, problem)


def _plain(value: Any) -> Any:
    return tuple(value) if isinstance(value, list | tuple) else value


def from_saved(saved: Mapping[str, Any], where: object) -> ConfigDict:
    """The config in a workdir's config.json, resolved.

    A key that is absent or null, as an older version left it, has its default. An unknown one is reported on stderr.

    Args:
        saved: nested dict from the file.
        where: the file, for messages.

    Raises:
        LcmError: it is not the config of a run.
    """
    values, remedy = {}, "restore it or choose another workdir"
    for key in KEYS:
        value: Any = saved
        for part in key.name.split("."):
            if not isinstance(value, Mapping):
                raise LcmError(f"{where} holds {str(value)[:80]!r} where keys such as {key.name} should be; {remedy}")
            if (value := value.get(part)) is None:
                break
        values[key.name] = key.default if value is None else value
        try:
            key.check_type(values[key.name])
        except LcmError as error:
            raise LcmError(f"{where} is not a config of this lcm_jax: {error}; {remedy}") from error
    sections = {key.section for key in KEYS}
    given = flatten_dict(saved, sep=".")
    unknown = {name: value for name, value in given.items() if name not in values and name not in sections}
    if unknown and jax.process_index() == 0:
        listed = ", ".join(f"{name} = {str(value)[:80]!r}" for name, value in sorted(unknown.items()))
        print(f"WARNING: {where} has keys that this lcm_jax does not know, and ignores: {listed}", file=sys.stderr)
    return resolve(ConfigDict(unflatten_dict(values, sep=".")))


def differences(
    saved: Mapping[str, Any], config: ConfigDict, where: object = workdir.CONFIG_FILE
) -> dict[str, tuple[Any, Any]]:
    """Keys in which a resumed run must not differ from its beginning, but does.

    Args:
        saved: nested dict read from the workdir's config.json, see `from_saved`.
        config: of this command.
        where: the file, for messages.

    Returns:
        {dotted key: (saved value, present value)}. Keys that a resumed run may change, and paths to the same place, are
        left out.
    """
    both = from_saved(saved, where), resolve(config)
    before, now = (flatten_dict(json.loads(to_json(part)), sep=".") for part in both)
    pairs = {key: (before[key.name], now[key.name]) for key in KEYS if not key.may_change}
    if before["model.dtype"] == now["model.dtype"] == "bfloat16":  # to which each use of frozen weights rounds them
        pairs = {key: pair for key, pair in pairs.items() if key.name != "model.teacher_dtype"}
    return {key.name: pair for key, pair in pairs.items() if not key.same(*pair)}


def moved(different: Mapping[str, tuple[Any, Any]]) -> dict[str, str]:
    """Of `differences`: {key of a path: the file of the workdir that records whether the same thing is there}."""
    return {key.name: key.place_of for key in KEYS if key.name in different and key.is_moved(*different[key.name])}


def prepare_workdir(folder: str | os.PathLike[str], config: ConfigDict) -> dict[str, tuple[Any, Any]]:
    """`workdir.prepare_workdir` for a resolved config: a run that resumes must agree with it, see `differences`.

    What can be trained, but hardly is what was meant, is reported on stderr.
    """
    for line in _doubts(config) if jax.process_index() == 0 else ():
        print(f"WARNING: {line}", file=sys.stderr, flush=True)
    where = os.path.join(folder, workdir.CONFIG_FILE)
    return workdir.prepare_workdir(folder, to_json(config), lambda saved: differences(saved, config, where), moved)


_LATE = 900  # timestep of 999 above which what is left of the image in the noise is too little to matter
# Keys, when they have no effect, and why.
_IDLE: tuple[tuple[tuple[str, ...], Callable[[ConfigDict], bool], str], ...] = (
    (("lora.alpha", "lora.targets"), lambda c: not c.lora.rank, "lora.rank is 0, so all weights are trained"),
    (("train.lr_decay_start",), lambda c: not c.train.lr_decay_steps, "train.lr_decay_steps is 0: there is no decay"),
    (("distill.huber_c",), lambda c: c.distill.loss != "huber", "distill.loss is another"),
    (
        ("distill.w_min", "distill.w_max"),
        lambda c: not needs_teacher(c) and not c.distill.w_embedding_dim,
        "no teacher is guided, and the student has no w embedding",
    ),
    (
        ("data.bucket_step", "data.bucket_max_aspect"),
        lambda c: not c.data.aspect_buckets,
        "data.aspect_buckets is False",
    ),
    (("data.workers",), lambda c: c.data.encode == "start", "with data.encode = 'start' this process reads"),
)


def _doubts(config: ConfigDict) -> list[str]:
    """Of a valid config: keys without effect, steps that train nothing, and sample grids of what is not trained."""
    train, distill, sample, found = config.train, config.distill, config.sample, []
    values, defaults = flatten_dict(config.to_dict(), sep="."), {key.name: key.default for key in KEYS}
    for names, idle, why in _IDLE:
        changed = [f"config.{n} = {values[n]!r}" for n in names if _plain(values[n]) != _plain(defaults[n])]
        if changed and idle(config):
            found.append(f"{', '.join(changed)}: without effect, because {why}")
    end = train.lr_decay_start + train.lr_decay_steps
    if train.lr_decay_steps and end < train.steps:  # as if train.steps alone was raised
        found.append(
            f"config.train.steps = {train.steps}, but the learning rate is 0 after step {end} (train.lr_decay_start + "
            "train.lr_decay_steps): further steps change no weights"
        )
    if (initial := train.ema_decay**train.steps) > 0.5:
        found.append(
            f"config.train.ema_decay = {train.ema_decay!r}: after {train.steps} steps the EMA, which grids and exports "
            f"take, has {initial:.0%} of the initial weights; lower it, train longer, or export --weights=online"
        )
    last = MAX_SOLVER_STEPS // distill.solver_steps * distill.solver_steps - 1
    if last < _LATE:
        found.append(
            f"config.distill.solver_steps = {distill.solver_steps}: the solver's grid ends at timestep {last} of "
            f"{MAX_SOLVER_STEPS - 1}, where sampling begins with more noise than was trained; take a divisor of "
            f"{MAX_SOLVER_STEPS}"
        )
    low, high = (round(w + 1, 9) for w in (distill.w_min, distill.w_max))  # 0.57 + 1 is less than 1.57
    if distill.w_embedding_dim and sample.every and sample.prompts and not low <= sample.guidance_scale <= high:
        found.append(
            f"config.sample.guidance_scale = {sample.guidance_scale:g}, but this run trains {low:g} to {high:g} "
            "(distill.w_min and w_max + 1): the sample grids show guidance that is not trained"
        )
    return found


def flag_help(example: str) -> str:
    """Help of a program's --config flag, with all keys. example: a config file."""
    keys = [f"--config.{key.name}={key.default}  {key.meaning} ({key.values()})" for key in KEYS]
    return "\n".join((f"the run's config file, as {example}. Its keys, with their defaults:", *keys))


def parse_flags(argv: list[str]) -> list[str]:
    """`flags_parser` for `absl.app.run`: any error on the command line is one line on stderr and exit code 2.

    Covers an unknown flag, an unknown config key, a value of the wrong type, a config file that is missing or broken,
    and stray words (usually a blank after `=`).
    """
    try:
        rest = flags.FLAGS(argv)
        if "config" in flags.FLAGS and flags.FLAGS["config"].value is not None:
            _without_none(flags.FLAGS["config"].value)  # config_flags reports a missing file at the first access
        if rest[1:]:
            raise LcmError(f"unexpected argument {rest[1]!r}; write options as --name=value without blanks")
        return rest
    except Exception as error:  # a config file is code, and may raise anything
        if not (message := _of_config_file(error)):
            if isinstance(error, flags.Error | LcmError | OSError):
                message = _one_line(error)
            elif isinstance(error, AttributeError | KeyError | TypeError | ValueError):
                given = " ".join(word for word in argv[1:] if word.startswith(("--config.", "-config.")))
                message = f"config: {_one_line(error)} (given: {given or 'no overrides'}); --help lists the keys"
            else:
                raise
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


def _without_none(config: ConfigDict) -> None:
    """Reads the word None on the command line as None, for keys that may be it: ml_collections keeps the word."""
    for key in (key for key in KEYS if key.default is None):
        *sections, name = key.name.split(".")
        section = functools.reduce(lambda part, inner: part.get(inner, {}), sections, config)
        if section.get(name) == "None":
            section[name] = None


def _of_config_file(error: BaseException | None) -> str:
    """ "FILE:LINE: ..." of what a config file raised, which config_flags and absl may wrap; "" for another error."""
    while error is not None:
        if isinstance(error, SyntaxError) and os.path.isfile(error.filename or ""):
            return f"{error.filename}:{error.lineno}: {error.msg}"
        frames = [one for one in traceback.extract_tb(error.__traceback__) if one.name in ("get_config", "<module>")]
        if frames:
            return f"{frames[-1].filename}:{frames[-1].lineno}: {type(error).__name__}: {_one_line(error)}"
        error = error.__cause__ or error.__context__
    return ""


def _one_line(error: BaseException) -> str:
    """Message of `error` without line breaks; ml_collections puts a repr inside a repr."""
    text = str(error.args[0]) if error.args and not isinstance(error, OSError) else str(error) or type(error).__name__
    text = text.replace("\\'", "'").replace('\\"', '"').replace("\\n", " ").strip()
    if text[:1] == text[-1:] and text[:1] in ("'", '"'):
        text = text[1:-1]
    return " ".join(text.split())


def markdown() -> str:
    """docs/config.md."""
    lines = [
        "# Keys of the config",
        "",
        "Written by `python -m lcm_jax.run.config > docs/config.md` from the table in `lcm_jax/run/keys.py`.",
        "",
        "A config file (`configs/*.py`) starts from `default_config()`; the command line overrides it, as",
        "`--config.train.steps=2000`. Resuming a run with another value is refused, except for keys marked *, and",
        "paths to which the models or data of the run were moved.",
    ]
    for section in dict.fromkeys(key.section for key in KEYS):
        lines += ["", f"## {section or 'The run'}", "", "| key | default | values | meaning |", "|---|---|---|---|"]
        lines += [
            f"| `{key.name}`{' *' * key.may_change} | `{key.default!r}` | {key.values()} | {key.meaning} |"
            for key in KEYS
            if key.section == section
        ]
    sources = [f"| `{name}` | {meaning} |" for name, meaning in SOURCES.items()]
    return "\n".join([*lines, "", "## Data sources", "", "| `data.source` | data |", "|---|---|", *sources]) + "\n"


if __name__ == "__main__":
    print(markdown(), end="")
