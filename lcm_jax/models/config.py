"""From a model folder's `config.json` to the fields of a Linen module and back.

A module's dataclass fields carry the names and the defaults of diffusers' (or transformers') constructor, so that a
key which is missing from an old file means what it means there. Each model lists beside them the keys whose value is
fixed here (`FIXED`): another value in a file is refused by name, never guessed at.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from absl import logging
from flax import linen as nn

from lcm_jax.errors import UnsupportedConfig

# Written into every config: a modern version keeps diffusers from applying its fixes for old files.
DIFFUSERS_VERSION = "0.42.1"

# Fields that say how to run a module, not what it is; never read from or written to a file.
RUN_FIELDS = frozenset({"dtype", "attention_fn", "weights_fn", "remat", "parent", "name"})


def _frozen(value: Any) -> Any:
    """Lists (also nested) as tuples, so that modules stay hashable."""
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
    """The keyword arguments of `module` that `config` asks for.

    A literal null means "unset" (diffusers writes unset keys so), but for the keys in `keep_null`. Keys that neither
    the module nor `fixed` knows are skipped with a log line, as diffusers does (old files carry EMA leftovers).

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
        logging.warning("%s: config keys without meaning here: %s", module.__name__, ", ".join(sorted(unknown)))
    return fields


def to_config(module: nn.Module) -> dict[str, Any]:
    """The full `config.json` of a module, every key written out so that no default can drift."""
    config = {f.name: _plain(getattr(module, f.name)) for f in dataclasses.fields(module) if f.name not in RUN_FIELDS}
    config |= {key: _plain(values[0]) for key, values in module.FIXED.items()}
    return dict(sorted(config.items()))
