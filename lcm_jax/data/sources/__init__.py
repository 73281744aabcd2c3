"""Sources of records, by the names that `data.source` takes.

    webdataset    tar shards with .jpg, .txt and .json members
    folder        images with metadata.jsonl or .csv, or a .txt, .caption or .json beside each
    huggingface   parquet files, a `save_to_disk` folder or a hub id
    tfds          a TensorFlow Datasets builder, by name or folder
    shapes        images rendered by code

The module of a source is imported when it is first opened; see `lcm_jax.data.records` for what a source can do.
"""

from __future__ import annotations

import functools
import importlib
import os
from collections.abc import Callable, Sequence
from typing import Any

from lcm_jax.data.records import Source
from lcm_jax.errors import BadArgument


def _open(module: str, *arguments: Any, **keywords: Any) -> Source:
    return importlib.import_module(f"lcm_jax.data.{module}").open(*arguments, **keywords)


SOURCES: dict[str, Callable[..., Source]] = {
    "webdataset": functools.partial(_open, "sources.webdataset"),
    "folder": functools.partial(_open, "sources.folder"),
    "huggingface": functools.partial(_open, "sources.huggingface"),
    "tfds": functools.partial(_open, "sources.tfds"),
    "shapes": functools.partial(_open, "shapes"),
}
KEYWORDS = {  # that each of them takes
    "webdataset": ("path", "image_key", "caption_key", "index_dir"),
    "folder": ("path", "caption_key"),
    "huggingface": ("path", "split", "image_key", "caption_key"),
    "tfds": ("path", "split", "image_key", "caption_key"),
    "shapes": ("split", "num_examples", "style"),
}


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
    """The records of a data set. A keyword with its default value counts as not given.

    Args:
      name: a key of `SOURCES`.
      path: where the data is; None for "shapes".
      split: of "huggingface", "tfds" and "shapes".
      image_key, caption_key: what holds the image and the caption, if there is a choice.
      index_dir: of "webdataset": folder for indices.
      num_examples, style: of "shapes".

    Raises:
      BadArgument: an unknown name, a keyword that the source does not use, `path` missing.
      LcmError: as the source's `open` says.
    """
    if name not in SOURCES:
        raise BadArgument("source", name, f"unknown; choose one of {', '.join(SOURCES)}")
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
    with_path = given | ({"path": path} if path else {})
    if surplus := sorted(with_path.keys() - set(used)):
        raise BadArgument(surplus[0], with_path[surplus[0]], f"the source {name!r} does not use it; leave it out")
    if "path" in used and not path:
        raise BadArgument("path", path, f"the source {name!r} needs one")
    return SOURCES[name](path, **given) if "path" in used else SOURCES[name](**given)
