"""A run as an experiment needs it: its config, trained to the end and exported."""

import ast
import runpy
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from lcm_jax import export, pretrained
from lcm_jax.errors import LcmError
from lcm_jax.run import config as config_lib
from lcm_jax.train import train


def read_config(path: str | Path) -> ConfigDict:
    """The config that a file of configs/ makes."""
    return runpy.run_path(str(path))["get_config"]()


def trained_and_exported(config: ConfigDict, workdir: Path, say: Callable[[str], None]) -> bool:
    """Trains `config` in `workdir`, resuming a stopped run, and writes WORKDIR/export anew.

    Args:
      say: prints a line.

    Returns:
      False if the training was stopped before its end or the export failed; both have reported it.

    Raises:
      LcmError: as `lcm_jax.train`; the run in `workdir` is trained beyond the config's steps.
    """
    say(f"{config.train.steps} steps of {config.data.batch_size} images into {workdir}")
    state = train(config, workdir)
    check_not_beyond(int(state.step), config, workdir)
    if int(state.step) < config.train.steps:
        say("stopped; the same command resumes")
        return False
    folder = workdir / "export"
    shutil.rmtree(folder, ignore_errors=True)  # made by this function, from the checkpoint beside it
    say(f"exporting to {folder}")
    return export.main([f"--workdir={workdir}", f"--out={folder}"]) == 0


def made(config: ConfigDict, workdir: Path, say: Callable[[str], None]) -> bool:
    """As `trained_and_exported`, unless WORKDIR/export already is the model that `config` trains.

    Raises:
      LcmError: `workdir` holds a run of another config, or as `trained_and_exported`.
    """
    folder = workdir / "export"
    if folder.exists() and pretrained.read_record(folder).get("step") == config.train.steps:
        config_lib.prepare_workdir(workdir, config_lib.resolve(config))  # refuses a run of another config
        return True
    return trained_and_exported(config, workdir, say)


def check_not_beyond(step: int, config: ConfigDict, workdir: Path) -> None:
    """Raises LcmError if `workdir` is trained to a `step` beyond the config's: its results would be labelled wrong."""
    if step > config.train.steps:
        raise LcmError(
            f"{workdir} is trained to step {step}, beyond the {config.train.steps} of this command; "
            "ask for as many steps, or use another workdir"
        )


def with_steps(config: ConfigDict, steps: int) -> ConfigDict:
    """A copy of `config` that trains for `steps`, the decay of its learning rate scaled with them."""
    share = steps / config.train.steps
    changed = ConfigDict(config.to_dict())
    changed.train.steps = steps
    if config.train.lr_decay_steps:  # 0 means no decay, and must stay 0
        changed.train.lr_decay_start = round(share * config.train.lr_decay_start)
        changed.train.lr_decay_steps = max(1, round(share * config.train.lr_decay_steps))
    return changed.lock()


def changed(config: ConfigDict, changes: Mapping[str, Any]) -> ConfigDict:
    """A copy of `config` with `changes`, {dotted key: value}. Raises LcmError: unknown key, or wrong type of value."""
    config = ConfigDict(config.to_dict()).lock()
    for key, value in changes.items():
        try:
            config.update_from_flattened_dict({key: value})
        except (AttributeError, KeyError, TypeError, ValueError):
            raise LcmError(
                f"config.{key} = {value!r}: there is no such key, or its value has another type; see docs/config.md"
            ) from None
    return config


def parse_settings(texts: Sequence[str]) -> dict[str, Any]:
    """("KEY=VALUE", ...) -> {KEY: value}; a value that is not a Python literal is text. Raises LcmError: no `=`."""
    found = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals:
            raise LcmError(f"--set={text}: write --set=KEY=VALUE, as --set=data.batch_size=8")
        try:
            found[key] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            found[key] = value
    return found
