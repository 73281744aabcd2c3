"""From a model folder's `config.json` to the fields of a Linen module and back.

A module's dataclass fields have the names and the defaults of diffusers' (or transformers') constructor, so that a
key that is missing from an old file means the same here, and the types and ranges of what a file may say. Beside them
each model lists the keys whose value is fixed here (`FIXED`). Any other value is an error that names the key.
"""

import dataclasses
from collections.abc import Mapping
from typing import Annotated, Any

from absl import logging
from flax import linen as nn

from lcm_jax.errors import UnsupportedConfig
from lcm_jax.typed import Range, checked, field_types, fits

# Written into every config: seeing a recent version, diffusers does not apply its fixes for old files.
DIFFUSERS_VERSION = "0.42.1"

# Fields that say how to run a module and not what it is: never read from a file or written to one.
RUN_FIELDS = frozenset({"dtype", "attention_fn", "weights_fn", "remat", "parent", "name"})

# Types of fields. The limits are some ten times those of published models: beyond them memory and time run out before
# weights of other shapes are noticed.
Channels = Annotated[int, Range(1, 2**14)]  # also widths, heads, groups and sides
Layers = Annotated[int, Range(1, 100)]
Depth = Annotated[int, Range(1, 32)]  # layers of one level
Levels = Annotated[tuple[Channels, ...], Range(1, 7)]  # the width of each; the next has half the side
Vocabulary = Annotated[int, Range(1, 10**6)]
Token = Annotated[int, Range(0, 10**6)]
Epsilon = Annotated[float, Range(1e-12, 0.1)]


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
      keep_null: keys whose null is a value; where another may be null, that means that it is unset (diffusers writes
        those, too).
      ignored: keys to skip without a warning.

    Raises:
      UnsupportedConfig: a key of `fixed` has a value that is not in its tuple of accepted values, or another key one
        that is not of its field's type.
    """
    known = {name: kind for name, kind in field_types(module).items() if name not in RUN_FIELDS}
    fields, unknown = {}, []
    for key, value in config.items():
        if key.startswith("_") or key in ignored:
            continue
        if key in fixed:
            if not any(
                value == choice and isinstance(value, bool) == isinstance(choice, bool) for choice in fixed[key]
            ):
                raise UnsupportedConfig(key, value, supported=fixed[key])
        elif key not in known:
            unknown.append(key)
        elif value is not None or key in keep_null or not fits(None, known[key]):
            fields[key] = checked(key, value, known[key])
    if unknown:
        logging.warning("%s: unknown config keys, ignored: %s", module.__name__, ", ".join(sorted(unknown)))
    return fields


def class_name(config: Mapping[str, Any], default: str) -> Any:
    """The `_class_name` of a config without the "Flax" of old files; what is no text is returned as it is."""
    kind = config.get("_class_name", default)
    return kind.removeprefix("Flax") if isinstance(kind, str) else kind


def to_config(module: nn.Module) -> dict[str, Any]:
    """The complete `config.json` of a module: every key is written, so that no changed default can alter it."""
    config = {f.name: _plain(getattr(module, f.name)) for f in dataclasses.fields(module) if f.name not in RUN_FIELDS}
    config |= {key: _plain(values[0]) for key, values in module.FIXED.items()}
    return dict(sorted(config.items()))
