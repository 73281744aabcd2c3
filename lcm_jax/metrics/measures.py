"""Measures of drawn pictures by name: what each needs, how it takes up a batch, and what it says in the end.

    --metric=               weights                                         compares with
    fid[/RESIZE]:FILE       Inception of the FID, .pth or .safetensors      statistics of the reference
    fd_dinov2[/RESIZE]:FOLDER  DINOv2 in transformers format                statistics of the reference
    cmmd[/RESIZE]:FOLDER    CLIP in transformers format                     features of the reference
    clip_score:FOLDER       CLIP in transformers format                     the captions
    shapes[:TEACHER]        come with the package                           the captions, and held-out renders

Batches are folded one after another, so pictures need not be kept.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jax.sharding import Mesh

from lcm_jax.data import shapes
from lcm_jax.errors import LcmError
from lcm_jax.metrics import clip_score, inputs
from lcm_jax.metrics import shapes as captions_lib
from lcm_jax.metrics import statistics as statistics_files
from lcm_jax.metrics.features import Extractor, load_extractor
from lcm_jax.metrics.networks import shapes as shapes_scorer
from lcm_jax.metrics.networks import weights

KINDS = {"fid": "inception", "clip_score": "clip", "cmmd": "clip", "fd_dinov2": "dinov2", "shapes": "shapes"}
RESIZES = {"cmmd": "cmmd"}  # where it is not the extractor's first
NEEDS_REFERENCE = ("fid", "fd_dinov2", "cmmd")


@dataclasses.dataclass(frozen=True)
class Spec:
    """A measure as the command line names it; path: of weights, for "shapes" of the teacher."""

    name: str
    path: str | None = None
    resize: str | None = None


@dataclasses.dataclass(frozen=True)
class Reference:
    """What drawn pictures are compared with.

    Attributes:
      files: statistics and feature sets, .npz; the one of a measure's network is taken.
      pictures: (height, width) -> pictures uint8 [h w 3] of that size, for the other measures; None: there are none.
      about: reads the pictures -> "pictures" (how many), "from" (where they are, for the reader alone), and "sha256",
        which tells them from others.
      cache: folder for what is computed from them.
    """

    files: tuple[Path, ...]
    pictures: Callable[[int, int], Iterator[np.ndarray]] | None
    about: Callable[[], Mapping[str, Any]]
    cache: Path


@dataclasses.dataclass(frozen=True, eq=False)
class Measure:
    """One measure, ready to take up batches.

    Attributes:
      name: a key of `KINDS`.
      needs: pictures, at least, of a row.
      about: network, its hash, and the reference: what makes two values comparable.
      prepare: computes the reference, if it has to be; may be long.
      fold: (what it made of the batches before, None at first; pictures uint8 [b h w 3]; their captions) -> the same
        of one more.
      finish: of all batches -> values by key of `table.COLUMNS`.
    """

    name: str
    needs: int
    about: Mapping[str, Any]
    prepare: Callable[[], Any]
    fold: Callable[[Any, np.ndarray, Sequence[str]], Any]
    finish: Callable[[Any], dict[str, float]]


def parse(texts: Sequence[str]) -> list[Spec]:
    """NAME[/RESIZE][:PATH] of each.

    Raises:
      LcmError: an unknown or repeated name; weights missing, with where to get them.
    """
    specs = []
    for text in texts:
        words, _, path = text.partition(":")
        name, _, resize = words.partition("/")
        if name not in KINDS:
            raise LcmError(f"--metric={text}: choose NAME or NAME:WEIGHTS of {', '.join(KINDS)}")
        if resize and name not in NEEDS_REFERENCE:
            raise LcmError(f"--metric={text}: {name} has no resize variants; leave out /{resize}")
        if name in (spec.name for spec in specs):
            raise LcmError(f"--metric={text}: {name} is there already; give it once")
        if name != "shapes":
            try:
                weights.existing(KINDS[name], path or None)
            except LcmError as error:
                raise LcmError(f"--metric={text}: {error}") from None
        specs.append(Spec(name, path or None, resize or RESIZES.get(name)))
    return specs


def load(
    spec: Spec,
    captions: Sequence[str],
    size: tuple[int, int],
    reference: Reference,
    mesh: Mesh | None = None,
    batch_size: int = 32,
    style: str = "plain",
) -> Measure:
    """The measure with its weights.

    Args:
      spec: of `parse`.
      captions: of the pictures of a row.
      size: of the pictures: height and width.
      reference: what it compares with, where it does.
      mesh, batch_size: see `features.load_extractor`.
      style: of the held-out renders that the shapes are compared with.

    Raises:
      LcmError: weights damaged or of another network; no reference, one of another network or resolution, or of too
        few pictures; captions or pictures that are not of the shapes set; too few pictures.
    """
    if spec.name == "shapes":
        measure = _shapes(captions, size, style, batch_size)
    elif spec.name == "clip_score":
        measure = _clip_score(clip_score.load_clip(spec.path, mesh=mesh, batch_size=batch_size))
    else:
        kind = KINDS[spec.name]
        extractor = load_extractor(kind, spec.path, resize=spec.resize, mesh=mesh, batch_size=batch_size)
        measure = (_cmmd if spec.name == "cmmd" else _frechet)(spec.name, extractor, size, reference)
    if len(captions) < measure.needs:
        raise LcmError(
            f"--metric={spec.name} needs at least {measure.needs} pictures per row, here are "
            f"{len(captions)}; give --count={measure.needs} or more"
        )
    return measure


def check_used(reference: Reference, measures: Sequence[Measure]) -> None:
    """Raises LcmError where a file of statistics is of no network that is asked for, or of one that has another."""
    networks = {measure.about["sha256"]: measure.about["network"] for measure in measures}
    before: dict[str, Path] = {}
    for path in reference.files:
        origin = statistics_files.load(path).origin
        if origin.hash not in networks:
            wanted = ", ".join(f"{name} ({digest[:12]})" for digest, name in networks.items()) or "none"
            raise LcmError(
                f"--reference={path} holds statistics of another network, {origin.name} "
                f"({origin.hash[:12]}); the metrics' are {wanted}: compute them with these weights"
            )
        if origin.hash in before:
            raise LcmError(f"--reference={path} and {before[origin.hash]} are both of {origin.name}; give one of them")
        before[origin.hash] = path


def _shapes(captions: Sequence[str], size: tuple[int, int], style: str, batch_size: int) -> Measure:
    side = shapes.RESOLUTION
    if size != (side, side):
        raise LcmError(
            f"--metric=shapes: the scorer reads pictures of {side} x {side}, these are {size[1]} x "
            f"{size[0]}; leave it out, or give --height={side} --width={side}"
        )
    labels = shapes.label_arrays(captions)
    network = load_extractor("shapes")
    about = {
        "network": network.name,
        "sha256": network.hash,
        "reference": {"from": "held-out renders", "pictures": captions_lib.REFERENCES, "style": style},
    }
    reference = functools.partial(captions_lib.reference, style)

    def finish(read: list) -> dict[str, float]:
        accuracy, distance = captions_lib.judge(*captions_lib.joined(read), labels, reference())
        return {"caption_accuracy": accuracy, "shapes_frechet": distance}

    return Measure(
        "shapes",
        network.dim + 1,
        about,
        reference,
        lambda read, images, _: [*(read or []), shapes_scorer.score(images, batch_size=batch_size)],
        finish,
    )


def _clip_score(pair: clip_score.ClipPair) -> Measure:
    def fold(scores: list | None, images: np.ndarray, captions: Sequence[str]) -> list:
        return [*(scores or []), clip_score.clip_scores(pair, images, captions)]

    about = {"network": pair.pictures.name, "sha256": pair.hash}
    return Measure(
        "clip_score",
        1,
        about,
        lambda: None,
        fold,
        lambda scores: {"clip_score": float(np.concatenate(scores).mean(dtype=np.float64))},
    )


def _frechet(name: str, extractor: Extractor, size: tuple[int, int], reference: Reference) -> Measure:
    needs = extractor.dim + 1
    compute, about = _referred(name, extractor, size, reference, needs, as_set=False)

    def fold(gathered: Any, images: np.ndarray, _: Sequence[str]) -> statistics_files.Statistics:
        return statistics_files.gather(extractor, [images], gathered)

    return Measure(
        name, needs, about, compute, fold, lambda drawn: {name: statistics_files.frechet_distance(drawn, compute())}
    )


def _cmmd(name: str, extractor: Extractor, size: tuple[int, int], reference: Reference) -> Measure:
    compute, about = _referred(name, extractor, size, reference, 2, as_set=True)

    def finish(found: list[np.ndarray]) -> dict[str, float]:
        origin = statistics_files.Origin(extractor.name, extractor.hash, size)
        drawn = statistics_files.FeatureSet(origin, np.concatenate(found))
        return {name: statistics_files.cmmd(drawn, compute())}

    return Measure(name, 2, about, compute, lambda found, images, _: [*(found or []), extractor(images)], finish)


def _referred(
    name: str, extractor: Extractor, size: tuple[int, int], reference: Reference, needs: int, as_set: bool
) -> tuple[Callable[[], Any], dict[str, Any]]:
    """(what gives the reference's statistics, or its features `as_set`; what tells it from others)."""
    network = {"network": extractor.name, "sha256": extractor.hash}
    origins = {path: statistics_files.load(path).origin for path in reference.files}
    path = next((path for path, origin in origins.items() if origin.hash == extractor.hash), None)
    if path is not None:
        found = (statistics_files.load_features if as_set else statistics_files.load)(path, extractor)
        _check_reference(name, str(path), found.origin.resolution, found.count, size, needs)
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        about = {"from": path.name, "pictures": found.count, "sha256": digest}
        return lambda: found, network | {"reference": about}
    if reference.pictures is None:
        given = ", ".join(f"{path} is of {origin.name} ({origin.hash[:12]})" for path, origin in origins.items())
        what = f"statistics of another network are given: {given}" if given else "none is given"
        raise LcmError(
            f"--metric={name} compares with a reference of {extractor.name} ({extractor.hash[:12]}), and "
            f"{what}; give --reference=STATISTICS.npz or --reference=FOLDER of pictures, or --source"
        )
    about = dict(reference.about())
    _check_reference(name, about["from"], size, about["pictures"], size, needs)
    compute = _computed(name, extractor, size, reference, about["sha256"], as_set)
    return compute, network | {"reference": about}


def _computed(
    name: str, extractor: Extractor, size: tuple[int, int], reference: Reference, pictures: str, as_set: bool
) -> Callable[[], Any]:
    """What computes the reference of pictures, of this SHA-256, once, and finds it in the cache the next time."""
    words = json.dumps([pictures, size, extractor.hash, as_set])
    path = reference.cache / f"{name}_{hashlib.sha256(words.encode()).hexdigest()[:16]}.npz"
    gather = statistics_files.feature_set if as_set else statistics_files.gather
    read = statistics_files.load_features if as_set else statistics_files.load

    @functools.cache
    def compute() -> Any:
        if not path.exists():
            batches = inputs.in_batches(reference.pictures(*size), extractor.batch_size)
            statistics_files.save(path, gather(extractor, batches))
        return read(path, extractor)

    return compute


def _check_reference(
    name: str, origin: str, resolution: tuple[int, int], count: int, size: tuple[int, int], needs: int
) -> None:
    if tuple(resolution) != tuple(size):
        (h, w), (height, width) = resolution, size
        raise LcmError(
            f"--metric={name}: the reference {origin} is of pictures of {w} x {h}, those drawn are of "
            f"{width} x {height}; resolutions do not mix: compute it of pictures of that size"
        )
    if count < needs:
        raise LcmError(
            f"--metric={name}: the reference {origin} is of {count} pictures, at least {needs} are needed; "
            "give more (--references, or a larger folder)"
        )
