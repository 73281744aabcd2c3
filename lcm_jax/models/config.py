"""From a model folder's `config.json` to the fields of a Linen module and back.

A module's dataclass fields have the names and the defaults of diffusers' (or transformers') constructor, so that a
key that is missing from an old file means the same here. Beside them each model lists the keys whose value is fixed
here (`FIXED`): any other value in a file is an error that names the key.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from absl import logging
from flax import linen as nn

from lcm_jax.errors import UnsupportedConfig

# Written into every config: seeing a recent version, diffusers does not apply its fixes for old files.
DIFFUSERS_VERSION = "0.42.1"

# Fields that say how to run a module and not what it is: never read from a file or written to one.
RUN_FIELDS = frozenset({"dtype", "attention_fn", "weights_fn", "remat", "parent", "name"})


def _frozen(value: Any) -> Any:
    """Lists, also nested ones, as tuples, so that modules are hashable."""
    return tuple(_frozen(v) for v in value) if isinstance(value, (list, tuple)) else value


def _plain(value: Any) -> Any:
    return [_plain(v) for v in value] if isinstance(value, tuple) else value


def module_fields(
    module: type[nn.Module],
    config: Mapping[str, Any],
    fixed: Mapping[str, tuple[Any, ...]],
    *,
    keep_null: frozenset[str] = frozenset(),
    ignored: frozenset[str] = frozenset(),
) -> dict[str, Any]:
    """The keyword arguments for `module` in a config.

    Args:
      module: the class to construct.
      config: a `config.json`. Keys that are unknown are skipped with a warning, as in diffusers (old files contain
        leftovers of their EMA).
      fixed: key -> the accepted values.
      keep_null: keys whose null is a value; any other null means that the key is unset (diffusers writes those, too).
      ignored: keys to skip without a warning.

    Raises:
      UnsupportedConfig: a key of `fixed` has a value that is not in its tuple of accepted values.
    """
    known = {f.name for f in dataclasses.fields(module)} - RUN_FIELDS
    fields, unknown = {}, []
    for key, value in config.items():
        if key.startswith("_") or key in ignored:
            continue
        if key in fixed:
            if _frozen(value) not in fixed[key]:
                raise UnsupportedConfig(key, value, supported=fixed[key])
        elif key not in known:
            unknown.append(key)
        elif value is not None or key in keep_null:
            fields[key] = _frozen(value)
    if unknown:
        logging.warning("%s: unknown config keys, ignored: %s", module.__name__, ", ".join(sorted(unknown)))
    return fields


def to_config(module: nn.Module) -> dict[str, Any]:
    """The complete `config.json` of a module: every key is written, so that no changed default can alter it."""
    config = {f.name: _plain(getattr(module, f.name)) for f in dataclasses.fields(module) if f.name not in RUN_FIELDS}
    config |= {key: _plain(values[0]) for key, values in module.FIXED.items()}
    return dict(sorted(config.items()))
