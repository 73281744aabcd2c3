"""Sources of records, by the names that `data.source` takes.

    webdataset    tar shards with .jpg, .txt and .json members
    folder        pictures with metadata.jsonl, or one .txt beside each
    huggingface   parquet files, a `save_to_disk` folder or a hub id
    tfds          a TensorFlow Datasets builder, by name or folder
    shapes        pictures drawn by code

Each is a module that is imported when it is asked for; see `lcm_jax.data.records` for what a source can do.
"""

from __future__ import annotations

import functools
import importlib
import os
from collections.abc import Callable, Sequence
from typing import Any

from lcm_jax.data.records import Source
from lcm_jax.errors import LcmError


def _open(module: str, *arguments: Any, **keywords: Any) -> Source:
    return importlib.import_module(f"lcm_jax.data.{module}").open(*arguments, **keywords)


SOURCES: dict[str, Callable[..., Source]] = {
    "webdataset": functools.partial(_open, "sources.webdataset"),
    "folder": functools.partial(_open, "sources.folder"),
    "huggingface": functools.partial(_open, "sources.huggingface"),
    "tfds": functools.partial(_open, "sources.tfds"),
    "shapes": functools.partial(_open, "shapes"),
}
KEYWORDS = {
    "webdataset": ("path", "image_key", "caption_key", "index_dir"),
    "folder": ("path", "caption_key"),
    "huggingface": ("path", "split", "image_key", "caption_key"),
    "tfds": ("path", "split", "image_key", "caption_key"),
    "shapes": ("split", "num_examples", "style"),
}  # that each of them takes


def open_source(
    name: str,
    path: str | os.PathLike | Sequence[str] | None,
    *,
    split: str = "train",
    image_key: str | None = None,
    caption_key: str | None = None,
    index_dir: str | os.PathLike | None = None,
    num_examples: int | None = None,
    style: str = "plain",
) -> Source:
    """The records of a data set. Keywords are those of `--config.data`; at its default, one counts as not given.

    Args:
      name: a key of `SOURCES`.
      path: where the data is; None for "shapes".
      split: of "huggingface", "tfds" and "shapes".
      image_key, caption_key: what holds picture and caption, where there is a choice.
      index_dir: of "webdataset": folder for indices.
      num_examples, style: of "shapes".

    Raises:
      LcmError: an unknown name, a keyword that the source does not use, `path` missing, or as the source says.
    """
    if name not in SOURCES:
        raise LcmError(f"unknown data source {name!r}; --config.data.source is one of {', '.join(SOURCES)}")
    values = {
        "split": (split, "train"),
        "image_key": (image_key, None),
        "caption_key": (caption_key, None),
        "index_dir": (index_dir, None),
        "num_examples": (num_examples, None),
        "style": (style, "plain"),
    }
    used = KEYWORDS[name]
    given = {key: value for key, (value, default) in values.items() if value != default}
    if surplus := sorted({*given, *(["path"] if path else [])} - set(used)):
        raise LcmError(f"source {name!r} has no use for --config.data.{surplus[0]}; leave it out")
    if "path" in used and not path:
        raise LcmError(f"source {name!r} needs --config.data.path")
    return SOURCES[name](path, **given) if "path" in used else SOURCES[name](**given)
