"""Feature statistics and feature sets with their origin: gathered, saved to .npz, compared, and never mixed.

    NAME.npz   name, hash: of the extractor;  resolution: [h w] of the images;  count
               mu [d], sigma [d d]            statistics, float64, under the keys of pytorch-fid's files
               features [n d]                 a feature set, float32 (CMMD needs the features themselves)

Distances are only defined between sets of one extractor (hash) and of images of one size: an image that was enlarged is
smoother, and the network sees it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from lcm_jax import foreign
from lcm_jax.errors import LcmError
from lcm_jax.files import new_file
from lcm_jax.metrics import distances
from lcm_jax.metrics.distances import FeatureStatistics
from lcm_jax.metrics.features import Extractor

MAX_BYTES = 2**34  # of a file: features of a million images have 8 GB
_AGAIN = "remove it, and give the images instead: it is computed from them"


@dataclasses.dataclass(frozen=True)
class Origin:
    """What features were computed by (extractor's name and hash) and from (height, width of the images)."""

    name: str
    hash: str
    resolution: tuple[int, int]


@dataclasses.dataclass(frozen=True, eq=False)
class Statistics:
    """Mean and covariance of features, with their origin.

    kept: features float32 [n_i d] of the first images, if `gather` was to keep some; not saved.
    """

    origin: Origin
    stats: FeatureStatistics
    kept: tuple[np.ndarray, ...] = ()

    @property
    def count(self) -> int:
        return self.stats.count


@dataclasses.dataclass(frozen=True, eq=False)
class FeatureSet:
    """Features, with their origin; parts: float32 [n_i d]."""

    origin: Origin
    parts: tuple[np.ndarray, ...]

    @property
    def features(self) -> np.ndarray:
        """float32 [n d]."""
        return np.concatenate(self.parts)

    @property
    def count(self) -> int:
        return sum(map(len, self.parts))


def gather(
    extractor: Extractor, batches: Iterable[np.ndarray], start: Statistics | None = None, keep: int = 0
) -> Statistics:
    """Statistics of the features of all images in `batches`, each [b h w 3], added to those of `start`.

    One batch at a time is in memory, and the features of about the first `keep` images; sums are float64.

    Raises:
      LcmError: images of different sizes, no images, or `start` is of another extractor.
    """
    for origin, features in _features(extractor, batches, start):
        kept = () if start is None else start.kept
        if sum(map(len, kept)) < keep:
            kept = (*kept, features)
        start = Statistics(origin, distances.update(None if start is None else start.stats, features), kept)
    return start


def feature_set(extractor: Extractor, batches: Iterable[np.ndarray], start: FeatureSet | None = None) -> FeatureSet:
    """The features of all images in `batches`, added to those of `start`. Raises: as `gather`."""
    for origin, features in _features(extractor, batches, start):
        start = FeatureSet(origin, (*(start.parts if start else ()), features))
    return start


def _features(
    extractor: Extractor, batches: Iterable[np.ndarray], start: Statistics | FeatureSet | None
) -> Iterator[tuple[Origin, np.ndarray]]:
    first = None if start is None else start.origin
    for images in batches:
        origin = Origin(extractor.name, extractor.hash, images.shape[1:3])
        first = first or origin
        check_same(first, origin)
        yield origin, extractor(images)
    if first is None:
        raise LcmError("no images to take features of: give at least one batch")


def check_same(a: Origin, b: Origin) -> None:
    """Raises LcmError, which names the difference, unless both are of one extractor and one size of images."""
    if a.name != b.name:
        raise LcmError(f"features of {a.name} and of {b.name} do not mix; compute both with one extractor")
    if a.hash != b.hash:
        raise LcmError(
            f"features of two different {a.name} (hash {a.hash[:12]} and {b.hash[:12]}: other weights, "
            "config or preprocessing) do not mix; compute both with the same files"
        )
    if a.resolution != b.resolution:
        (h, w), (h2, w2) = a.resolution, b.resolution
        raise LcmError(f"images of {h} x {w} and of {h2} x {w2} do not mix; bring all to one size first")


def frechet_distance(a: Statistics, b: Statistics) -> float:
    """Squared Frechet distance: FID of inception features, FD-DINOv2 of dinov2's.

    Raises:
      LcmError: the origins differ, or a set has no more images than features have dimensions.
    """
    check_same(a.origin, b.origin)
    return distances.frechet_distance(a.stats, b.stats)


def frechet_influence(a: Statistics, b: Statistics) -> tuple[float, np.ndarray]:
    """(`frechet_distance`, influence of those images whose features `a` has kept). Raises: as `frechet_distance`."""
    value = frechet_distance(a, b)
    return value, distances.frechet_influence(np.concatenate(a.kept), a.stats, b.stats)


def cmmd_influence(a: FeatureSet, b: FeatureSet) -> tuple[float, np.ndarray]:
    """`distances.cmmd_influence` of two sets of one CLIP. Raises LcmError also if their origins differ."""
    check_same(a.origin, b.origin)
    return distances.cmmd_influence(a.features, b.features)


def save(path: str | Path, found: Statistics | FeatureSet) -> None:
    """Writes an .npz, completely or not at all.

    Raises:
      LcmError: the name does not end in .npz; statistics of one image, which have no covariance.
    """
    path = Path(path)
    if path.suffix != ".npz":
        raise LcmError(f"{path}: features and statistics are saved as .npz")
    if isinstance(found, Statistics):
        arrays = {"mu": found.stats.mean, "sigma": found.stats.covariance}
    else:
        arrays = {"features": np.asarray(found.features, np.float32)}
    with new_file(path) as partial, partial.open("wb") as stream:
        np.savez(stream, **dataclasses.asdict(found.origin), count=found.count, **arrays)


def load(path: str | Path, extractor: Extractor | None = None) -> Statistics:
    """The statistics in an .npz, also of a feature set.

    Args:
      path: of the file.
      extractor: whose they must be; None: of any extractor.

    Raises:
      LcmError: the file is missing, is not of this layout, or is of another extractor.
    """
    origin, arrays = _read(path, extractor)
    features, count = arrays.get("features"), int(arrays["count"])
    if (count if features is None else len(features)) < 2:
        raise LcmError(f"{path}: it is of fewer than 2 images; give more images instead")
    if features is not None:
        return Statistics(origin, distances.statistics(features))
    mean, covariance = arrays["mu"], arrays["sigma"]
    return Statistics(origin, FeatureStatistics(count, mean, np.zeros_like(mean), covariance * (count - 1)))


def load_features(path: str | Path, extractor: Extractor | None = None) -> FeatureSet:
    """The feature set in an .npz. Raises: as `load`; also if the file has statistics alone."""
    origin, arrays = _read(path, extractor)
    if "features" not in arrays:
        raise LcmError(f"{path} holds statistics alone, and the features themselves are needed; save a feature set")
    return FeatureSet(origin, (arrays["features"],))


def _read(path: str | Path, extractor: Extractor | None) -> tuple[Origin, dict[str, np.ndarray]]:
    path = Path(path)
    if not path.is_file():
        raise LcmError(f"{path} does not exist; give the images instead")
    with foreign.reading(path, "an .npz", _AGAIN):
        arrays = foreign.read_npz(path, MAX_BYTES)
    missing = {"name", "hash", "resolution", "count"} - arrays.keys()
    if missing or not ("features" in arrays or {"mu", "sigma"} <= arrays.keys()):
        raise LcmError(
            f"{path} does not record which network its statistics are of (it has {', '.join(arrays)}), so they cannot "
            "be compared; give the images instead"
        )
    if wrong := _malformed(arrays):
        raise LcmError(f"{path}: {wrong}; {_AGAIN}")
    resolution = tuple(int(n) for n in arrays["resolution"])
    origin = Origin(str(arrays["name"]), str(arrays["hash"]), resolution)
    if extractor is not None:
        try:
            check_same(origin, Origin(extractor.name, extractor.hash, resolution))
        except LcmError as error:
            raise LcmError(f"{path}: {error}") from None
    return origin, arrays


def _malformed(arrays: dict[str, np.ndarray]) -> str | None:
    """What is wrong with the first array whose shape or kind of numbers is not that of the layout; None: nothing."""
    layout = {"name": ("U", ()), "hash": ("U", ()), "resolution": ("iu", (2,)), "count": ("iu", ())}
    if "features" in arrays:
        layout["features"] = "f", (arrays["features"].shape + (0, 0))[:2]
    else:
        dim = (arrays["mu"].shape + (0,))[0]
        layout |= {"mu": ("f", (dim,)), "sigma": ("f", (dim, dim))}
    for key, (kinds, shape) in layout.items():
        if arrays[key].shape != shape:
            return f"its {key} has the shape {list(arrays[key].shape)}, {list(shape)} is expected"
        if arrays[key].dtype.kind not in kinds:
            return f"its {key} is of {arrays[key].dtype}, which is of another kind than is saved"
        if "f" in kinds and not np.isfinite(arrays[key]).all():
            return f"its {key} has values that are not finite"
    return None
