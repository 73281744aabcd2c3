"""What the experiments have in common: a run, trained to its end and exported, and what may be called its result."""

import ast
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from lcm_jax import export, pretrained
from lcm_jax.errors import LcmError
from lcm_jax.run import config as config_lib
from lcm_jax.train import train


def trained_and_exported(config: ConfigDict, workdir: Path, say: Callable[[str], None], *options: str) -> bool:
    """Trains `config` in `workdir`, going on where it was stopped, and writes WORKDIR/export anew.

    Args:
      say: takes lines for the reader of the terminal.
      options: further ones of `lcm_jax.export`.

    Returns:
      False where the training was stopped before its end, or the export failed; both have said so.

    Raises:
      LcmError: as `lcm_jax.train`; the run in `workdir` has gone further than `config` asks.
    """
    say(f"{config.train.steps} steps of {config.data.batch_size} pictures into {workdir}")
    state = train(config, workdir)
    check_not_beyond(int(state.step), config, workdir)
    if int(state.step) < config.train.steps:
        say("stopped; the same command goes on")
        return False
    folder = workdir / "export"
    shutil.rmtree(folder, ignore_errors=True)  # made by this function, from the checkpoint beside it
    say(f"exporting to {folder}")
    return export.main([f"--workdir={workdir}", f"--out={folder}", *options]) == 0


def made(config: ConfigDict, workdir: Path, say: Callable[[str], None]) -> bool:
    """WORKDIR/export is the model that `config` trains, made now if it is not there; False as `trained_and_exported`.

    Raises:
      LcmError: `workdir` holds a run of another config, or as `trained_and_exported`.
    """
    export_folder = workdir / "export"
    if export_folder.exists() and pretrained.read_record(export_folder).get("step") == config.train.steps:
        config_lib.prepare_workdir(workdir, config_lib.resolve(config))  # raises where the run is of another config
        return True
    return trained_and_exported(config, workdir, say)


def check_not_beyond(step: int, config: ConfigDict, workdir: Path) -> None:
    """Raises LcmError where `step`, to which `workdir` is trained, is beyond the config's end: its label would lie."""
    if step > config.train.steps:
        raise LcmError(
            f"{workdir} is trained to step {step}, beyond the {config.train.steps} asked for; "
            "ask for as many, or use another workdir"
        )


def check_same(saved: Mapping[str, Any], config: ConfigDict, workdir: Path) -> None:
    """Raises LcmError where `saved`, a config as JSON has it, is another than `config`, but for what may differ."""
    different = config_lib.differences(saved, config)
    if different:
        listed = "; ".join(f"{key}: {old!r} there, {new!r} now" for key, (old, new) in different.items())
        raise LcmError(f"{workdir} was trained with another config ({listed}); use the same values or another workdir")


def with_steps(config: ConfigDict, steps: int) -> ConfigDict:
    """A copy of `config` that trains for `steps`, its learning rate's decay moved in proportion."""
    share = steps / config.train.steps
    changed = ConfigDict(config.to_dict())
    changed.train.steps = steps
    if config.train.lr_decay_steps:  # 0 would be no decay
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
                f"config.{key} = {value!r}: no such key, or no such value; see lcm_jax/run/config.py"
            ) from None
    return config


def parse_settings(texts: Sequence[str]) -> dict[str, Any]:
    """("KEY=VALUE", ...) -> {KEY: value}; what is no Python literal is text. Raises LcmError: no `=`."""
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
