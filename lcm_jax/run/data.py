"""The training data of a run: the sources that its config names, as rows in an order.

    config.data -> parts (sources, filtered) -> examples (rows of a record) + order (rows of a step)

The step takes latents' moments and embeddings, whether they were made from pictures just now (`encoding`), before
training began (`data.encode = "start"`), or by `lcm_jax.precompute` long ago (`data.source = "latents"`), and so it is
one program for all three.
"""

from __future__ import annotations

import collections
import dataclasses
import itertools
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from lcm_jax.data import cache, encoding, filters, images, loader
from lcm_jax.data.encoding import Rows
from lcm_jax.data.order import Order
from lcm_jax.data.records import BadRecord, Source
from lcm_jax.data.rows import Arrays, CaptionDropout, Examples, ImageRows, ImageTransform
from lcm_jax.data.sources import KEYWORDS, open_source
from lcm_jax.errors import LcmError, flags_named
from lcm_jax.pretrained import Pipeline
from lcm_jax.pretrained.model import PipelineParams
from lcm_jax.pretrained.tokenizer import tokenize_counted
from lcm_jax.run import config as config_lib

DRAWN_KEYS = ("filters", "caption_key", "crop", "flip", "resize_filter", "decoder")  # of config.data: what rows show
WEIGHT_UNIT = 10_000  # weights of a mixture are rounded to this part of their sum
TRUNCATED = "truncated"  # a row's number of tokens that did not fit; told, not trained on


@dataclasses.dataclass(frozen=True)
class Part:
    """One source of the data, filtered.

    Attributes:
      name: as "webdataset /data/{000..099}.tar".
      source: the records that are used, or a cache of them, encoded.
      weight: its share of the mixture, relative to the others'.
      report: of the filters.
    """

    name: str
    source: Source | cache.Cached
    weight: float
    report: filters.Report


def mixture(config: ConfigDict) -> list[tuple[float, str, str | None]]:
    """(weight, source, path) of each part of `config.data`.

    Raises:
      LcmError: an entry of `config.data.mixture` that is not "WEIGHT SOURCE [PATH]".
    """
    data = config.data
    if data.source != "mixture":
        return [(1.0, data.source, data.path)]
    return [parse_part(entry) for entry in data.mixture]


def parse_part(entry: str) -> tuple[float, str, str | None]:
    """ "3 webdataset /data/{000..099}.tar" -> (3.0, "webdataset", "/data/{000..099}.tar")."""
    words = entry.split(maxsplit=2)
    try:
        weight = float(words[0])
        if not 0 < weight < float("inf") or len(words) < 2:
            raise ValueError
    except (ValueError, IndexError):
        raise LcmError(
            f'config.data.mixture has {entry!r}; write "WEIGHT SOURCE PATH", weights greater than 0'
        ) from None
    return weight, words[1], words[2] if len(words) == 3 else None


@flags_named("--config.data.")
def open_parts(config: ConfigDict) -> list[Part]:
    """The sources of records that the config names, filtered.

    Raises:
      LcmError: a source cannot be opened, or none of its records is left.
    """
    data, parts = config.data, []
    given = keywords(config)
    for weight, name, path in mixture(config):
        path = path and os.path.expanduser(path)
        if name == "latents":
            parts.append(open_cache(weight, path))
            continue
        takes = KEYWORDS.get(name, ())
        source = open_source(name, path, **{key: value for key, value in given.items() if key in takes})
        source, report = filters.apply(source, data.filters, width_key=data.width_key, height_key=data.height_key)
        parts.append(Part(" ".join(filter(None, (name, path))), source, weight, report))
    kinds = {part.source.manifest["text"] if is_cached(part) else "pictures" for part in parts}
    if len(kinds) > 1:
        raise LcmError(
            f"config.data.mixture has parts of {' and '.join(sorted(kinds))}, whose rows differ; precompute "
            "all of them, with the same --text"
        )
    return parts


def keywords(config: ConfigDict) -> dict[str, Any]:
    """What the config tells sources, each of which takes its own (`KEYWORDS`).

    Raises:
      LcmError: it tells something that none of its sources takes.
    """
    names, defaults = [name for _, name, _ in mixture(config)], config_lib.default_config().data
    taken = {key for name in names for key in KEYWORDS.get(name, ())}
    given = {key: config.data[key] for key in {key for keys in KEYWORDS.values() for key in keys} - {"path"}}
    for key, value in given.items():
        if key not in taken and value != defaults[key] and set(names) != {"latents"}:
            users = " or ".join(map(repr, names))
            raise LcmError(f"config.data.{key} = {value!r}: the source {users} does not use it; leave it out")
    return given


def open_cache(weight: float, path: str | None) -> Part:
    """A latent cache as a part of the data. Raises LcmError: see `cache.open`."""
    if not path:
        raise LcmError('config.data.mixture has a part "WEIGHT latents" without a folder; add it')
    cached = cache.open(path)
    report = filters.Report(len(cached), len(cached), (), cached.manifest["faults"])
    return Part(f"latents {path}", cached, weight, report)


def is_cached(part: Part) -> bool:
    return isinstance(part.source, cache.Cached)


@dataclasses.dataclass(frozen=True)
class Tokenize:
    """Captions -> token ids int32 [b l] by text encoder, and how many tokens of each caption did not fit."""

    tokenizers: Mapping[str, Any]

    def __call__(self, captions: Sequence[str]) -> Rows:
        found = {name: tokenize_counted(tokenizer, captions) for name, tokenizer in self.tokenizers.items()}
        ids = {name: tokens for name, (tokens, _) in found.items()}
        return ids | {TRUNCATED: np.max([lost for _, lost in found.values()], axis=0)}


@flags_named("--config.data.")
def picture_sizes(config: ConfigDict) -> tuple[tuple[int, int], ...]:
    """(height, width) in pixels of the pictures of each group."""
    data, side = config.data, config.data.resolution
    if not data.aspect_buckets:
        return ((side, side),)
    return images.bucket_sizes(side, step=data.bucket_step, max_aspect=data.bucket_max_aspect)


def check_sizes(config: ConfigDict, pipeline: Pipeline) -> None:
    """Raises LcmError where pictures would have sides that the VAE's factor does not divide."""
    factor = pipeline.vae.factor
    for height, width in picture_sizes(config):
        if height % factor or width % factor:
            raise LcmError(
                f"config.data.resolution = {config.data.resolution} makes pictures of {width} x {height}, no multiples "
                f"of the VAE's factor {factor}; change it"
                + (", or config.data.bucket_step" if config.data.aspect_buckets else "")
            )


def pictures(
    config: ConfigDict, source: Source, tokenize: Callable[[Sequence[str]], Mapping[str, Any]], time_ids: bool = False
) -> ImageRows:
    """Rows of a source's records as the config wants them; see `ImageRows`."""
    data, sizes, members = config.data, picture_sizes(config), None
    if data.aspect_buckets:
        known = filters.sizes(source, data.width_key, data.height_key)
        which = images.nearest_bucket(known, sizes)
        members = tuple(np.flatnonzero(which == bucket) for bucket in range(len(sizes)))
    transform = ImageTransform(
        crop=data.crop,
        flip=data.flip,
        resize_filter=data.resize_filter,
        decoder=data.decoder,
        size_keys=(data.height_key, data.width_key),
    )
    return ImageRows(source, sizes, transform, tokenize, time_ids=time_ids, members=members)


@dataclasses.dataclass(frozen=True)
class Watch:
    """What the data brings that is not trained on: unusable records, and captions that were cut. Told, never silent.

    Attributes:
      bad_records: counts them, reports each once, stops above the config's share.
      tell: takes a line for the reader of the terminal.
    """

    bad_records: loader.BadRecordLog
    tell: Callable[[str], None]
    cut: collections.Counter = dataclasses.field(default_factory=collections.Counter)

    def captions(self, rows: Rows) -> Rows:
        """The rows without TRUNCATED, which is counted, and told each time the number of cut captions has doubled."""
        rows = dict(rows)
        if TRUNCATED not in rows:
            return rows
        lost = rows.pop(TRUNCATED)
        before = self.cut["captions"]
        self.cut.update(captions=int((lost > 0).sum()), tokens=int(lost.sum()), read=len(lost))
        if self.cut["captions"].bit_length() > before.bit_length():
            self.tell(
                f"{self.cut['captions']} of {self.cut['read']} captions were longer than the text encoder reads; "
                f"{self.cut['tokens']} tokens were cut off"
            )
        return rows


def encode_at_start(
    examples: Examples, encode: Callable, seed: int, watch: Watch, batch: int = encoding.MAX_BATCH
) -> Arrays:
    """Every example encoded once, `batch` at a time, held in memory.

    The step draws a new latent from a picture's posterior each time it meets it.
    """
    parts, places = [], []
    for group, size in enumerate(examples.groups):
        chunks, origins = [], []
        rows = encoding.in_order(examples, group, seed, range(size))
        while chunk := list(itertools.islice(rows, batch)):
            watch.bad_records.add([row for _, row in chunk if isinstance(row, BadRecord)], len(chunk))
            good = [(rank, row) for rank, row in chunk if not isinstance(row, BadRecord)]
            if good:
                origins += [examples.where(group, rank) for rank, _ in good]
                held = watch.captions(loader.stacked([row for _, row in good]))
                chunks.append(encoding.encode_rows(encode, held, batch))
        names = chunks[0] if chunks else ()
        parts.append({name: np.concatenate([chunk[name] for chunk in chunks]) for name in names})
        places.append(origins)
    return Arrays(tuple(parts), tuple(places))


def open_examples(
    config: ConfigDict, parts: Sequence[Part], pipeline: Pipeline, encode: Callable, watch: Watch
) -> tuple[tuple[Examples, ...], Order]:
    """The rows that a run trains on, and their order.

    Args:
      config: of the run, resolved.
      parts: `open_parts` of it; caches among them fit, see `check_caches`.
      pipeline: whose tokenizers and conditioning the rows are for.
      encode: `encoding.make_encode` of the pipeline, for what is encoded before training.
      watch: is told what cannot be used.

    Raises:
      LcmError: too many records cannot be used.
    """
    data, examples = config.data, []
    pictured = [part for part in parts if not is_cached(part)]
    left_out = [record for part in pictured for record in part.source.bad_records]
    reports = [part.report for part in parts]
    watch.bad_records.indexed(left_out, sum(report.total for report in reports), sum(report.kept for report in reports))
    for part in parts:
        watch.tell(f"{part.name}: {part.report.line()}")
        if is_cached(part):
            rows = part.source
        else:
            tokenize = Tokenize(pipeline.tokenizers)
            rows = pictures(config, part.source, tokenize, time_ids=pipeline.is_xl)
        if data.encode == "start":
            rows = encode_at_start(rows, encode, config.seed, watch, encoding.batch_size(data.resolution))
        examples.append(rows)
    if data.caption_dropout:
        encoded = data.encode == "start" or any(is_cached(p) and p.source.manifest["text"] != "ids" for p in parts)
        null = encoding.null_text(pipeline, encode, encoded)
        examples = [CaptionDropout(rows, null, data.caption_dropout) for rows in examples]
    return tuple(examples), order_of(config, parts, examples)


def order_of(config: ConfigDict, parts: Sequence[Part], examples: Sequence[Examples]) -> Order:
    """The order of the rows of all parts, by their weights."""
    total = sum(part.weight for part in parts)
    weights = tuple(max(1, round(part.weight / total * WEIGHT_UNIT)) for part in parts)
    return Order(config.seed, config.data.batch_size, tuple(tuple(rows.groups) for rows in examples), weights)


def keys_of(examples: Sequence[Examples], order: Order, step: int) -> list[tuple[str, str]]:
    """(shard, key) of the records of a step's global batch; the first step is 1. Replaced ones stand by their own."""
    return [examples[index.stream].where(index.group, index.rank) for index in order.batch(step - 1)]


def describe(order: Order) -> dict[str, Any]:
    """What the order of a run's data depends on beside its config, as it comes back from JSON."""
    return {"records": [list(groups) for groups in order.streams]}


def check_caches(config: ConfigDict, parts: Sequence[Part], pipeline: Pipeline, params: PipelineParams) -> None:
    """Raises LcmError where a latent cache is of other models or picture sizes than the run's, or otherwise drawn.

    Parts of a mixture may be drawn each in its own way: their configs say how.
    """
    cached = [part.source for part in parts if is_cached(part)]
    if not cached:
        return
    mine = encoding.fingerprint(pipeline, params, config.data.resolution, picture_sizes(config))
    for source in cached:
        cache.check_fit(source.manifest, mine, source.path)
    if config.data.source == "latents":
        made = cached[0].manifest["data"]
        for key in DRAWN_KEYS:
            value = list(config.data[key]) if key == "filters" else config.data[key]
            if made[key] != value:
                raise LcmError(
                    f"the latent cache {cached[0].path} was made with config.data.{key} = {made[key]!r}, "
                    f"the run's is {value!r}; set the cache's, or precompute again"
                )
