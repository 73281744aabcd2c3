"""Feature statistics and feature sets with their origin: gathered, saved to .npz, compared, and never mixed.

    NAME.npz   name, hash: of the extractor;  resolution: [h w] of the pictures;  count
               mu [d], sigma [d d]            statistics, float64, under the keys of pytorch-fid's files
               features [n d]                 a feature set, float32 (CMMD needs the features themselves)

A distance is a number only between sets of one extractor (hash) and of pictures of one size: a picture that was once
smaller is smoother, and the network sees it.
"""

from __future__ import annotations

import dataclasses
import zipfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from lcm_jax.errors import LcmError
from lcm_jax.files import new_file
from lcm_jax.metrics import distances as cmmd_lib
from lcm_jax.metrics import distances as frechet
from lcm_jax.metrics.features import Extractor


@dataclasses.dataclass(frozen=True)
class Origin:
    """What features were computed by (extractor's name and hash) and from (height, width of the pictures)."""

    name: str
    hash: str
    resolution: tuple[int, int]


@dataclasses.dataclass(frozen=True, eq=False)
class Statistics:
    origin: Origin
    stats: frechet.FeatureStatistics

    @property
    def count(self) -> int:
        return self.stats.count


@dataclasses.dataclass(frozen=True, eq=False)
class FeatureSet:
    origin: Origin
    features: np.ndarray  # float32 [n d]

    @property
    def count(self) -> int:
        return len(self.features)


def gather(extractor: Extractor, batches: Iterable[np.ndarray], start: Statistics | None = None) -> Statistics:
    """Statistics of the features of all pictures of `batches`, each [b h w 3], after those of `start`.

    One batch at a time is in memory; sums are float64.

    Raises:
      LcmError: pictures of different sizes, none at all, or `start` is of another extractor.
    """
    gathered = start
    for images in batches:
        origin = Origin(extractor.name, extractor.hash, tuple(images.shape[1:3]))
        if gathered is not None:
            check_same(gathered.origin, origin)
        stats = frechet.update(None if gathered is None else gathered.stats, extractor(images))
        gathered = Statistics(origin, stats)
    if gathered is None:
        raise LcmError("no pictures to take statistics of: give at least one batch")
    return gathered


def feature_set(extractor: Extractor, batches: Iterable[np.ndarray]) -> FeatureSet:
    """The features of all pictures of `batches`. Raises: as `gather`."""
    origin, found = None, []
    for images in batches:
        this = Origin(extractor.name, extractor.hash, tuple(images.shape[1:3]))
        check_same(origin or this, this)
        origin = this
        found.append(extractor(images))
    if origin is None:
        raise LcmError("no pictures to take features of: give at least one batch")
    return FeatureSet(origin, np.concatenate(found))


def merge(a: Statistics, b: Statistics) -> Statistics:
    """Statistics of both sets together. Raises LcmError where their origins differ."""
    check_same(a.origin, b.origin)
    return Statistics(a.origin, frechet.merge(a.stats, b.stats))


def check_same(a: Origin, b: Origin) -> None:
    """Raises LcmError, which names what differs, unless both are of one extractor and one size of pictures."""
    if a.name != b.name:
        raise LcmError(f"features of {a.name} and of {b.name} do not mix; compute both with one extractor")
    if a.hash != b.hash:
        raise LcmError(
            f"features of two different {a.name} (hash {a.hash[:12]} and {b.hash[:12]}: other weights or "
            "preprocessing) do not mix; compute both with one file of weights"
        )
    if a.resolution != b.resolution:
        (h, w), (h2, w2) = a.resolution, b.resolution
        raise LcmError(f"pictures of {h} x {w} and of {h2} x {w2} do not mix; bring all to one size first")


def frechet_distance(a: Statistics, b: Statistics) -> float:
    """Squared Frechet distance: FID on inception features, FD-DINOv2 on dinov2's.

    Raises:
      LcmError: origins differ, or a set has no more pictures than features have dimensions.
    """
    check_same(a.origin, b.origin)
    for s in (a, b):
        dim = s.stats.origin.size
        if s.count <= dim:
            raise LcmError(
                f"{s.count} pictures are too few for the Frechet distance of {s.origin.name}, whose "
                f"features have {dim} dimensions: give at least {dim + 1}"
            )
    return frechet.frechet_distance(a.stats, b.stats)


def cmmd(a: FeatureSet, b: FeatureSet) -> float:
    """`cmmd.cmmd` of two feature sets of one CLIP. Raises LcmError also where their origins differ."""
    check_same(a.origin, b.origin)
    return cmmd_lib.cmmd(a.features, b.features)


def save(path: str | Path, what: Statistics | FeatureSet) -> None:
    """Write an .npz, under its name only when complete.

    Raises:
      LcmError: the name does not end in .npz; statistics of one picture, which have no covariance.
    """
    path = Path(path)
    if path.suffix != ".npz":
        raise LcmError(f"{path}: features and statistics are saved as .npz")
    if isinstance(what, Statistics):
        arrays = {"mu": what.stats.mean, "sigma": what.stats.covariance}
    else:
        arrays = {"features": np.asarray(what.features, np.float32)}
    origin = what.origin
    with new_file(path) as partial, partial.open("wb") as stream:
        np.savez(stream, name=origin.name, hash=origin.hash, resolution=origin.resolution, count=what.count, **arrays)


def load(path: str | Path, extractor: Extractor | None = None) -> Statistics:
    """The statistics in an .npz, of a feature set as well.

    extractor: whose they must be, where it is known: so that this is found before long work.

    Raises:
      LcmError: no such file, no statistics with an origin, or another extractor's.
    """
    origin, arrays = _read(path, extractor)
    if "features" in arrays:
        return Statistics(origin, frechet.statistics(arrays["features"]))
    mean, covariance, count = arrays["mu"], arrays["sigma"], int(arrays["count"])
    stats = frechet.FeatureStatistics(count, mean, np.zeros_like(mean), covariance * (count - 1))
    return Statistics(origin, stats)


def load_features(path: str | Path, extractor: Extractor | None = None) -> FeatureSet:
    """The feature set in an .npz. Raises: as `load`; also where the file has statistics alone."""
    origin, arrays = _read(path, extractor)
    if "features" not in arrays:
        raise LcmError(f"{path} holds statistics alone, and the features themselves are needed; save a feature set")
    return FeatureSet(origin, arrays["features"])


def _read(path: str | Path, extractor: Extractor | None) -> tuple[Origin, dict[str, np.ndarray]]:
    path = Path(path)
    if not path.is_file():
        raise LcmError(f"{path} does not exist; compute the statistics first")
    try:
        stored = np.load(path, allow_pickle=False)
        if not isinstance(stored, np.lib.npyio.NpzFile):
            raise ValueError("it holds one array alone")
        with stored:
            arrays = {key: stored[key] for key in stored.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise LcmError(f"{path} cannot be read as .npz ({error}); compute the statistics again") from error
    missing = {"name", "hash", "resolution", "count"} - arrays.keys()
    if missing or not ("features" in arrays or {"mu", "sigma"} <= arrays.keys()):
        raise LcmError(
            f"{path} does not say which network its statistics are of (it has {', '.join(arrays)}); they "
            "cannot be compared, compute them anew from the pictures"
        )
    if wrong := _misshapen(arrays):
        raise LcmError(f"{path}: {wrong}; compute the statistics again")
    resolution = tuple(int(n) for n in arrays["resolution"])
    origin = Origin(str(arrays["name"]), str(arrays["hash"]), resolution)
    if extractor is not None:
        try:
            check_same(origin, Origin(extractor.name, extractor.hash, resolution))
        except LcmError as error:
            raise LcmError(f"{path}: {error}") from None
    return origin, arrays


def _misshapen(arrays: dict[str, np.ndarray]) -> str | None:
    """What array has not the shape or kind of numbers of the module's layout; None: all have."""
    numbers = {"resolution": "iu", "count": "iu"}
    shapes = {"name": (), "hash": (), "resolution": (2,), "count": ()}
    if "features" in arrays:
        numbers["features"], shapes["features"] = "f", (arrays["features"].shape + (0, 0))[:2]
    else:
        dim = (arrays["mu"].shape + (0,))[0]
        numbers |= {"mu": "f", "sigma": "f"}
        shapes |= {"mu": (dim,), "sigma": (dim, dim)}
    for key, shape in shapes.items():
        if arrays[key].shape != shape:
            return f"its {key} has the shape {list(arrays[key].shape)}, {list(shape)} is expected"
        if arrays[key].dtype.kind not in numbers.get(key, "U"):
            return f"its {key} is of {arrays[key].dtype}, which is of another kind than is saved"
    return None
