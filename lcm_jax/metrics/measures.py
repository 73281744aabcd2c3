"""Measures of generated images by name: what each needs, how it takes up a batch, and its values in the end.

    --metric=                  weights                                      compares with
    fid[/RESIZE]:FILE          Inception of the FID, .pth or .safetensors   statistics of the reference
    fd_dinov2[/RESIZE]:FOLDER  DINOv2 in transformers format                statistics of the reference
    cmmd[/RESIZE]:FOLDER       CLIP in transformers format                  features of the reference
    clip_score:FOLDER          CLIP in transformers format                  the captions
    pickscore:FOLDER           PickScore_v1 in transformers format          the captions
    shapes[:TEACHER]           come with the package                        the captions, held-out renders, and the law
                                                                            of what captions leave open

Batches are added one after another, so images need not be kept.
"""

from __future__ import annotations

import abc
import dataclasses
import functools
import hashlib
import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jax.sharding import Mesh

from lcm_jax.data.shapes import RESOLUTION, label_arrays
from lcm_jax.errors import LcmError
from lcm_jax.metrics import intervals, shapes, statistics
from lcm_jax.metrics.clip_score import ClipPair, check_logit_scale, clip_scores, load_clip, pick_scores
from lcm_jax.metrics.features import Extractor, load_extractor
from lcm_jax.metrics.inputs import ReferenceImages
from lcm_jax.metrics.intervals import Estimate
from lcm_jax.metrics.networks import weights
from lcm_jax.metrics.networks.shapes import score
from lcm_jax.metrics.statistics import FeatureSet, Statistics

KINDS = {
    "fid": "inception",
    "clip_score": "clip",
    "pickscore": "pickscore",
    "cmmd": "clip",
    "fd_dinov2": "dinov2",
    "shapes": "shapes",
}
RESIZES = {"cmmd": "cmmd"}  # if it is not the extractor's first
NEEDS_REFERENCE = ("fid", "fd_dinov2", "cmmd")
KEPT = 16_384  # images whose features a Frechet distance keeps for its interval: 128 MB in 2,048 dimensions


@dataclasses.dataclass(frozen=True)
class Spec:
    """A measure as the command line names it; path: of weights, for "shapes" of the teacher."""

    name: str
    path: str | None = None
    resize: str | None = None


@dataclasses.dataclass(frozen=True)
class Reference:
    """What generated images are compared with.

    Attributes:
      files: statistics and feature sets, .npz; a measure takes the one of its network.
      images: for measures without such a file.
      cache: folder for what is computed from the images.
    """

    files: tuple[Path, ...]
    images: ReferenceImages | None
    cache: Path


class Measure(abc.ABC):
    """A measure with its weights, of any number of rows.

    Attributes:
      name: a key of `KINDS`.
      min_images: of a row.
      about: network, its hash, and the reference: two values are comparable if these are equal.
    """

    name: str
    min_images: int
    about: dict[str, Any]

    def prepare(self) -> None:  # noqa: B027
        """Computes the reference, if necessary; may take long."""

    @abc.abstractmethod
    def add(self, state: Any, images: np.ndarray, captions: Sequence[str]) -> Any:
        """The state of a row with one more batch, images uint8 [b h w 3]; state: None before the first one."""

    @abc.abstractmethod
    def estimates(self, state: Any) -> dict[str, Estimate]:
        """The values of all batches with their intervals, by key of `table.COLUMNS`."""


def parse(texts: Sequence[str]) -> list[Spec]:
    """`NAME[/RESIZE][:PATH]` of each.

    Raises:
      LcmError: an unknown or repeated name; weights that are missing, with where to get them.
    """
    specs: dict[str, Spec] = {}
    for text in texts:
        words, _, path = text.partition(":")
        name, _, resize = words.partition("/")
        if name not in KINDS:
            raise LcmError(f"--metric={text}: choose NAME or NAME:WEIGHTS of {', '.join(KINDS)}")
        if resize and name not in NEEDS_REFERENCE:
            raise LcmError(f"--metric={text}: {name} has no resize variants; leave out /{resize}")
        if name in specs:
            raise LcmError(f"--metric={text}: {name} is given twice; give it once")
        if name != "shapes":
            try:
                weights.existing(KINDS[name], path or None)
            except LcmError as error:
                raise LcmError(f"--metric={text}: {error}") from None
        specs[name] = Spec(name, path or None, resize or RESIZES.get(name))
    return list(specs.values())


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
      spec: from `parse`.
      captions: of the images of a row.
      size: height and width of the images.
      reference: what it compares with, if it does.
      mesh, batch_size: as for `features.load_extractor`.
      style: of the held-out renders that "shapes" compares with.

    Raises:
      LcmError: weights that are damaged or of another network; no reference, or one of another network, another
        resolution or too few images; captions or images that are not of the shapes set; too few images.
    """
    if spec.name == "shapes":
        measure: Measure = Shapes(captions, size, style, batch_size)
    elif spec.name in ("clip_score", "pickscore"):
        measure = CaptionScore(spec.name, load_clip(spec.path, mesh=mesh, batch_size=batch_size), captions)
    else:
        kind = KINDS[spec.name]
        extractor = load_extractor(kind, spec.path, resize=spec.resize, mesh=mesh, batch_size=batch_size)
        measure = Distance(spec.name, extractor, captions, size, reference)
    if len(captions) < measure.min_images:
        raise LcmError(
            f"--metric={spec.name} needs at least {measure.min_images} images per row, here are {len(captions)}; give "
            f"--count={measure.min_images} or more"
        )
    return measure


def check_used(reference: Reference, measures: Sequence[Measure]) -> None:
    """Raises LcmError if no measure has the network of a file of statistics, or if two files are of one network."""
    networks = {measure.about["sha256"]: measure.about["network"] for measure in measures}
    before: dict[str, Path] = {}
    for path in reference.files:
        origin = statistics.load(path).origin
        if origin.hash not in networks:
            wanted = ", ".join(f"{name} ({digest[:12]})" for digest, name in networks.items()) or "none"
            raise LcmError(
                f"--reference={path} holds statistics of another network, {origin.name} ({origin.hash[:12]}); the "
                f"metrics' are {wanted}: compute them with these weights"
            )
        if origin.hash in before:
            raise LcmError(f"--reference={path} and {before[origin.hash]} are both of {origin.name}; give one of them")
        before[origin.hash] = path


class Shapes(Measure):
    """Caption accuracy, Frechet distance and coverage of shapes images, by the package's own scorer."""

    name = "shapes"

    def __init__(self, captions: Sequence[str], size: tuple[int, int], style: str, batch_size: int):
        if size != (RESOLUTION, RESOLUTION):
            raise LcmError(
                f"--metric=shapes: the scorer reads images of {RESOLUTION} x {RESOLUTION}, these are {size[1]} x "
                f"{size[0]}; leave it out, or give --height={RESOLUTION} --width={RESOLUTION}"
            )
        self.captions, self.labels = captions, label_arrays(captions)
        self.style, self.batch_size = style, batch_size
        scorer = load_extractor("shapes")
        self.min_images = scorer.dim + 1
        reference = {"from": "held-out renders", "pictures": shapes.REFERENCES, "style": style}
        self.about = {"network": scorer.name, "sha256": scorer.hash, "reference": reference}

    def prepare(self) -> None:
        shapes.reference(self.style)

    def add(self, state: list | None, images: np.ndarray, captions: Sequence[str]) -> list:
        return [*(state or []), score(images, batch_size=self.batch_size)]

    def estimates(self, state: list) -> dict[str, Estimate]:
        predicted, features = shapes.joined(state)
        to, clusters = shapes.reference(self.style), intervals.clusters(self.captions)
        accuracy, distance = shapes.judge(predicted, features, self.labels, to, clusters)
        values = {"caption_accuracy": accuracy, "shapes_frechet": distance}
        if found := shapes.coverage(predicted, self.captions):
            means = intervals.of_means(found.each, np.arange(len(found.each)))
            values |= zip(("coverage_distance", "collapsed", "diversity"), means, strict=True)
        return values


class CaptionScore(Measure):
    """CLIP score or PickScore."""

    min_images = 1

    def __init__(self, name: str, pair: ClipPair, captions: Sequence[str]):
        self.name, self.pair, self.clusters = name, pair, intervals.clusters(captions)
        self.about = {"network": pair.images.name, "sha256": pair.hash}
        self.scores = clip_scores
        if name == "pickscore":
            check_logit_scale(pair)
            self.scores, self.about["logit_scale"] = pick_scores, pair.logit_scale

    def add(self, state: list | None, images: np.ndarray, captions: Sequence[str]) -> list:
        return [*(state or []), self.scores(self.pair, images, captions)]

    def estimates(self, state: list) -> dict[str, Estimate]:
        return {self.name: intervals.of_means(np.concatenate(state)[:, None], self.clusters)[0]}


class Distance(Measure):
    """Distance to the reference in the features of a network: FID, FD-DINOv2 or CMMD."""

    def __init__(
        self, name: str, extractor: Extractor, captions: Sequence[str], size: tuple[int, int], reference: Reference
    ):
        self.name, self.extractor, self.size, self.images = name, extractor, size, reference.images
        self.clusters = intervals.clusters(captions)
        is_set = name == "cmmd"
        if is_set:
            self.gather = self.collect = statistics.feature_set
            self.read, self.influence = statistics.load_features, statistics.cmmd_influence
        else:
            self.gather, self.collect = statistics.gather, functools.partial(statistics.gather, keep=KEPT)
            self.read, self.influence = statistics.load, statistics.frechet_influence
        self.min_images = 2 if is_set else extractor.dim + 1
        origins = {path: statistics.load(path).origin for path in reference.files}
        given = next((path for path, origin in origins.items() if origin.hash == extractor.hash), None)
        if given is not None:
            found = self.read(given, extractor)
            self._check(str(given), found.origin.resolution, found.count)
            digest = hashlib.sha256(given.read_bytes()).hexdigest()
            self.path, about = given, {"from": given.name, "pictures": found.count, "sha256": digest}
        elif self.images is not None:
            about = self.images.about
            self._check(about["from"], size, about["pictures"])
            words = json.dumps([about["sha256"], size, extractor.hash, is_set])
            self.path = reference.cache / f"{name}_{hashlib.sha256(words.encode()).hexdigest()[:16]}.npz"
        else:
            others = ", ".join(f"{path} is of {origin.name} ({origin.hash[:12]})" for path, origin in origins.items())
            problem = f"statistics of another network are given: {others}" if others else "none is given"
            raise LcmError(
                f"--metric={name} compares with a reference of {extractor.name} ({extractor.hash[:12]}), and "
                f"{problem}; give --reference=STATISTICS.npz or --reference=FOLDER of images, or --source"
            )
        self.about = {"network": extractor.name, "sha256": extractor.hash, "reference": about}

    def _check(self, reference: str, resolution: tuple[int, int], count: int) -> None:
        if resolution != self.size:
            (h, w), (height, width) = resolution, self.size
            raise LcmError(
                f"--metric={self.name}: the reference {reference} is of images of {w} x {h}, the generated ones are "
                f"{width} x {height}; resolutions do not mix: compute it of images of that size"
            )
        if count < self.min_images:
            raise LcmError(
                f"--metric={self.name}: the reference {reference} is of {count} images, at least {self.min_images} are "
                "needed; give more (--references, or a larger folder)"
            )

    @functools.cached_property
    def reference(self) -> Statistics | FeatureSet:
        """Of the reference images; computed once, and kept in the cache."""
        if not self.path.exists():
            images = self.images.read(*self.size)
            batches = iter(lambda: list(itertools.islice(images, self.extractor.batch_size)), [])
            statistics.save(self.path, self.gather(self.extractor, map(np.stack, batches)))
        return self.read(self.path, self.extractor)

    def prepare(self) -> None:
        _ = self.reference

    def add(self, state: Any, images: np.ndarray, captions: Sequence[str]) -> Statistics | FeatureSet:
        return self.collect(self.extractor, [images], state)

    def estimates(self, state: Statistics | FeatureSet) -> dict[str, Estimate]:
        return {self.name: intervals.of_distance(*self.influence(state, self.reference), self.clusters)}
