"""The training data of a run, made from its config.

    config.data -> open_parts (sources of records, filtered) -> open_examples (their rows, and the order of the rows)

The step takes latents' moments and text embeddings. They are encoded batch by batch (`encoding`), once before training
(`data.encode = "start"`) or by `lcm_jax.precompute` (`data.source = "latents"`); the step is one program for all three.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
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
from lcm_jax.pretrained.model import Pipeline, PipelineParams
from lcm_jax.pretrained.text import tokens
from lcm_jax.pretrained.tokenizer import tokenize_counted
from lcm_jax.run.config import default_config
from lcm_jax.runtime.workdir import digest_entry

ROW_KEYS = ("filters", "caption_key", "crop", "flip", "resize_filter", "decoder")  # of config.data: what rows contain
WEIGHT_UNIT = 10_000  # weights of a mixture are rounded to this part of their sum
CUT_TOKENS = "cut_tokens"  # name of a row's number of tokens that did not fit; reported, not trained on


@dataclasses.dataclass(frozen=True)
class Part:
    """One source of the data, filtered.

    Attributes:
      name: such as "webdataset /data/{000..099}.tar".
      source: the records that are used, or a latent cache.
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
      LcmError: an entry of `config.data.mixture` is not "WEIGHT SOURCE [PATH]".
    """
    data, parts = config.data, []
    if data.source != "mixture":
        return [(1.0, data.source, data.path)]
    for entry in data.mixture:
        words = entry.split(maxsplit=2)
        try:
            weight = float(words[0])
            if not 0 < weight < float("inf") or len(words) < 2:
                raise ValueError
        except (ValueError, IndexError):
            raise LcmError(
                f'config.data.mixture has {entry!r}; write "WEIGHT SOURCE PATH", weights greater than 0'
            ) from None
        parts.append((weight, words[1], words[2] if len(words) == 3 else None))
    return parts


@flags_named("--config.data.")
def open_parts(config: ConfigDict) -> list[Part]:
    """The sources of records that the config names, filtered.

    Raises:
      LcmError: a source cannot be opened, none of its records is left, or a key is set that none of the sources uses.
    """
    data, parts, named = config.data, [], mixture(config)
    options = _options(config, [name for _, name, _ in named])
    for weight, name, path in named:
        path = path if not path or os.path.exists(path) else os.path.expanduser(path)
        if name == "latents":
            if not path:
                raise LcmError('config.data.mixture has a part "WEIGHT latents" without a folder; add it')
            source = cache.open(path)
            report = filters.Report(len(source), len(source), (), source.manifest["faults"])
        else:
            taken = KEYWORDS.get(name, ())
            source = open_source(name, path, **{key: value for key, value in options.items() if key in taken})
            source, report = filters.apply(source, data.filters, width_key=data.width_key, height_key=data.height_key)
        parts.append(Part(" ".join(filter(None, (name, path))), source, weight, report))
    kinds = {part.source.manifest["text"] if is_cached(part) else "images" for part in parts}
    if len(kinds) > 1:
        raise LcmError(
            f"config.data.mixture has parts of {' and '.join(sorted(kinds))}, whose rows differ; precompute "
            "all of them, with the same --text"
        )
    return parts


def _options(config: ConfigDict, names: Sequence[str]) -> dict[str, Any]:
    """The keys of `config.data` that some source takes; see `KEYWORDS`."""
    defaults, used = default_config().data, {key for name in names for key in KEYWORDS.get(name, ())}
    given = {key: config.data[key] for keys in KEYWORDS.values() for key in keys if key != "path"}
    for key, value in given.items():
        if key not in used and value != defaults[key] and set(names) != {"latents"}:
            sources = " or ".join(map(repr, names))
            raise LcmError(f"config.data.{key} = {value!r}: the source {sources} does not use it; leave it out")
    return given


def digests(parts: Sequence[Part]) -> dict[str, dict[str, str]]:
    """Entries of the workdir's data.json that say whether the records are those that the run began with."""
    return {f"source {i}": digest_entry(part.source.digest(), part.name) for i, part in enumerate(parts, 1)}


def is_cached(part: Part) -> bool:
    return isinstance(part.source, cache.Cached)


@flags_named("--config.data.")
def image_sizes(config: ConfigDict) -> tuple[tuple[int, int], ...]:
    """(height, width) in pixels of the images of each group."""
    data, side = config.data, config.data.resolution
    if not data.aspect_buckets:
        return ((side, side),)
    return images.bucket_sizes(side, step=data.bucket_step, max_aspect=data.bucket_max_aspect)


def check_sizes(config: ConfigDict, pipeline: Pipeline) -> None:
    """Raises LcmError if images would have sides that the VAE's factor does not divide."""
    factor = pipeline.vae.factor
    for height, width in image_sizes(config):
        if height % factor or width % factor:
            raise LcmError(
                f"config.data.resolution = {config.data.resolution} makes images of {width} x {height}, which are not "
                f"multiples of the VAE's factor {factor}; change it"
                + (", or config.data.bucket_step" if config.data.aspect_buckets else "")
            )


def tokenize_captions(tokenizers: Mapping[str, Any], captions: Sequence[str]) -> Rows:
    """Token ids int32 [b l] for each text encoder, and CUT_TOKENS int32 [b]: how many tokens did not fit."""
    counted = {name: tokenize_counted(tokenizer, captions) for name, tokenizer in tokenizers.items()}
    ids = {name: of_captions for name, (of_captions, _) in counted.items()}
    return ids | {CUT_TOKENS: np.max([lost for _, lost in counted.values()], axis=0)}


def image_rows(
    config: ConfigDict, source: Source, tokenize: Callable[[Sequence[str]], Mapping[str, Any]], time_ids: bool = False
) -> ImageRows:
    """Rows of a source's records as the config wants them; see `ImageRows`."""
    data, sizes, members = config.data, image_sizes(config), None
    if data.aspect_buckets:
        known = filters.sizes(source, data.width_key, data.height_key)
        nearest = images.nearest_bucket(known, sizes)
        members = tuple(np.flatnonzero(nearest == bucket) for bucket in range(len(sizes)))
    transform = ImageTransform(
        crop=data.crop,
        flip=data.flip,
        resize_filter=data.resize_filter,
        decoder=data.decoder,
        size_keys=(data.height_key, data.width_key),
    )
    return ImageRows(source, sizes, transform, tokenize, time_ids=time_ids, members=members)


@dataclasses.dataclass(frozen=True)
class DataLog:
    """Counts and reports what the data contain that is not trained on: unusable records, and tokens cut off captions.

    Attributes:
      bad_records: counts the unusable records, and stops the run if there are too many.
      say: prints a line on the terminal.
      cut: number of captions that were cut, of their tokens that did not fit, and of captions read.
    """

    bad_records: loader.BadRecordLog
    say: Callable[[str], None]
    cut: collections.Counter = dataclasses.field(default_factory=collections.Counter)

    def count_cut_tokens(self, rows: Rows) -> Rows:
        """The rows without CUT_TOKENS, which is reported each time the number of cut captions has doubled."""
        rows = dict(rows)
        if CUT_TOKENS not in rows:
            return rows
        lost, before = rows.pop(CUT_TOKENS), self.cut["captions"]
        self.cut.update(captions=int((lost > 0).sum()), tokens=int(lost.sum()), read=len(lost))
        if self.cut["captions"].bit_length() > before.bit_length():
            self.say(
                f"{self.cut['captions']} of {self.cut['read']} captions were longer than the text encoder reads; "
                f"{self.cut['tokens']} tokens were cut off"
            )
        return rows

    def split(self, read: Sequence[tuple[int, Rows | BadRecord]]) -> tuple[list[tuple[int, Rows]], list[BadRecord]]:
        """(the usable rows with their ranks, the bad records) of what `encoding.in_order` read."""
        bad = [row for _, row in read if isinstance(row, BadRecord)]
        self.bad_records.add(bad, len(read))
        return [(rank, row) for rank, row in read if not isinstance(row, BadRecord)], bad


def encode_at_start(
    examples: Examples, encode: Callable, seed: int, log: DataLog, batch: int = encoding.MAX_BATCH
) -> Arrays:
    """Every example encoded once, `batch` at a time, and held in memory.

    The step samples a new latent from the posterior of an image each time it is used.
    """
    parts, origins = [], []
    for group, size in enumerate(examples.groups):
        chunks, found = [], []
        rows = encoding.in_order(examples, group, seed, range(size))
        while chunk := list(itertools.islice(rows, batch)):
            good, _ = log.split(chunk)
            if good:
                found += [examples.where(group, rank) for rank, _ in good]
                stacked = log.count_cut_tokens(loader.stacked([row for _, row in good]))
                chunks.append(encoding.encode_rows(encode, stacked, batch))
        names = chunks[0] if chunks else ()
        parts.append({name: np.concatenate([chunk[name] for chunk in chunks]) for name in names})
        origins.append(found)
    return Arrays(tuple(parts), tuple(origins))


def open_examples(
    config: ConfigDict, parts: Sequence[Part], pipeline: Pipeline, encode: Callable, log: DataLog
) -> tuple[tuple[Examples, ...], Order]:
    """The rows that a run trains on, and their order.

    Args:
      config: of the run, resolved.
      parts: from `open_parts`; the caches among them fit, see `check_caches`.
      pipeline: whose tokenizers and conditioning the rows are for.
      encode: `encoding.make_encode` of the pipeline, for what is encoded before training.
      log: counts what cannot be used.

    Raises:
      LcmError: too many records cannot be used.
    """
    data, examples = config.data, []
    reports = [part.report for part in parts]
    left_out = [record for part in parts if not is_cached(part) for record in part.source.bad_records]
    log.bad_records.indexed(left_out, sum(report.total for report in reports), sum(report.kept for report in reports))
    for part in parts:
        log.say(f"{part.name}: {part.report.line()}")
        rows = part.source
        if not is_cached(part):
            tokenize = functools.partial(tokenize_captions, pipeline.tokenizers)
            rows = image_rows(config, part.source, tokenize, time_ids=pipeline.is_xl)
        if data.encode == "start":
            rows = encode_at_start(rows, encode, config.seed, log, encoding.batch_size(data.resolution))
        if few := small_buckets(rows.groups, data.batch_size):
            log.say(f"{part.name}: {few}")
        examples.append(rows)
    if data.caption_dropout:
        null = tokens(pipeline, [""])
        if pipeline.is_xl and pipeline.constants.zero_null:
            null = {name: np.full_like(ids, encoding.NO_TEXT) for name, ids in null.items()}
        if data.encode == "start" or any(is_cached(p) and p.source.manifest["text"] != "ids" for p in parts):
            null = encoding.encode_rows(encode, null, 1)
        null = {name: value[0] for name, value in null.items()}
        examples = [CaptionDropout(rows, null, data.caption_dropout) for rows in examples]
    return tuple(examples), order_of(config, parts, examples)


def small_buckets(groups: Sequence[int], batch_size: int) -> str:
    """A sentence on aspect buckets that have fewer images than a batch, which repeats them; "" if there are none."""
    small = [size for size in groups if 0 < size < batch_size]
    if len(groups) == 1 or not small:
        return ""
    return (
        f"{sum(small)} images are in {len(small)} aspect buckets of fewer than {batch_size}; the same ones fill up "
        f"their batches, up to {-(-batch_size // min(small))} times an epoch. A lower data.bucket_max_aspect, a "
        "larger data.bucket_step or a smaller data.batch_size changes that"
    )


def order_of(config: ConfigDict, parts: Sequence[Part], examples: Sequence[Examples]) -> Order:
    """The order of the rows of all parts, by their weights."""
    total = sum(part.weight for part in parts)
    weights = tuple(max(1, round(part.weight / total * WEIGHT_UNIT)) for part in parts)
    return Order(config.seed, config.data.batch_size, tuple(tuple(rows.groups) for rows in examples), weights)


def keys_of(examples: Sequence[Examples], order: Order, step: int) -> list[tuple[str, str]]:
    """(shard, key) of the records in the global batch of a step (from 1), before bad ones are replaced."""
    return [examples[index.stream].where(index.group, index.rank) for index in order.batch(step - 1)]


def check_caches(config: ConfigDict, parts: Sequence[Part], pipeline: Pipeline, params: PipelineParams) -> None:
    """Raises LcmError if a latent cache does not fit the run: its models, image sizes, or ROW_KEYS.

    Caches in a mixture may differ in ROW_KEYS; the run's values are then those of one of them, or the defaults.
    """
    cached = [part.source for part in parts if is_cached(part)]
    if not cached:
        return
    wanted = cache.fingerprint(pipeline, params, config.data.resolution, image_sizes(config))
    for source in cached:
        cache.check_fit(source.manifest, wanted, source.path)
    defaults = default_config().data
    for key in ROW_KEYS:
        value, default = (list(one[key]) if key == "filters" else one[key] for one in (config.data, defaults))
        made = [source.manifest["data"].get(key) for source in cached]
        if value not in made and (len(cached) == 1 or value != default):
            raise LcmError(
                f"the latent cache {cached[0].path} was made with config.data.{key} = {made[0]!r}, "
                f"the run's is {value!r}; set the cache's, or precompute again"
            )
