"""How near a model's latents are to the ends of the teacher's guided paths, and how alike its images of one noise are.

    error        RMSE(z, z_end) / std(z_end);  z_end: the teacher by `ENDPOINT_STEPS` steps of DDIM, from the same noise
    spread       std(z) / std(z_end)
    consistency  RMSE between a model's images of one noise by different numbers of steps, of 255

All are over the first held-out captions, from noise of seed 0.
"""

import functools
import itertools
from collections.abc import Sequence
from pathlib import Path

import numpy as np

import lcm_jax
from experiments import embedded, measuring
from lcm_jax import assets, files
from lcm_jax.sampling.generator import Generator
from lcm_jax.sampling.plan import Settings, noise_entries
from lcm_jax.sampling.png import to_uint8

COUNT = 256  # captions
SHOWN = measuring.BATCH  # of them, whose images are compared
ENDPOINT_STEPS = 100


def few(count: int) -> int:
    """How many of a row's captions are measured: whole batches, `COUNT` at most."""
    return min(count, COUNT) // measuring.BATCH * measuring.BATCH


def kept(
    source: str | Path, cache: Path, sampler: str, steps: Sequence[int], scale: float, count: int
) -> tuple[np.ndarray, np.ndarray]:
    """(latents [steps count h w c], images uint8 [steps SHOWN H W 3]) of a model; generated once, kept in `cache`.

    count: of captions, from `few`.
    """
    weights = embedded.asset_hash(assets.resolve(str(source)))[:12]
    path = cache / f"{weights}_{sampler}_{'-'.join(map(str, steps))}_{scale:g}_{count}.npz"
    if not path.exists():
        z, images = zip(
            *(_generated(_load(str(source)), Settings(sampler, n), scale, count) for n in steps), strict=True
        )
        path.parent.mkdir(parents=True, exist_ok=True)
        with files.new_file(path) as partial, partial.open("wb") as stream:
            np.savez(stream, latents=np.stack(z), images=np.stack(images))
    with np.load(path) as found:
        return found["latents"], found["images"]


@functools.lru_cache(maxsize=1)
def _load(source: str) -> Generator:
    return lcm_jax.load(source)


def _generated(model: Generator, settings: Settings, scale: float, count: int) -> tuple[np.ndarray, np.ndarray]:
    captions, parts = embedded.captions_of(count, 1), []
    for start in range(0, count, measuring.BATCH):
        numbers = range(start, start + measuring.BATCH)
        noise = model.noise(0, numbers, noise_entries(settings), *model.pipeline.default_size)
        parts.append(np.asarray(model.latents(model.encode([captions[n] for n in numbers]), noise, scale, settings)))
    return np.concatenate(parts), to_uint8(model.decode(parts[0]))


def endpoints(cache: Path, scale: float, count: int) -> np.ndarray:
    """Latents [count h w c] where the teacher's guided paths end, at t = 0."""
    return kept("shapes", cache, "ddim", (ENDPOINT_STEPS,), scale, count)[0][0]


def error(z: np.ndarray, end: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(z - end))) / np.std(end))


def spread(z: np.ndarray, end: np.ndarray) -> float:
    return float(np.std(z) / np.std(end))


def consistency(images: Sequence[np.ndarray]) -> float:
    """Mean over all pairs of sets, each uint8 [n H W 3], of the RMSE between two."""
    pairs = itertools.combinations([np.asarray(one, np.float64) for one in images], 2)
    return float(np.mean([np.sqrt(np.mean(np.square(a - b))) for a, b in pairs]))
