"""What reading costs a training: the share of a step spent waiting for data, beside one that reads nothing.

    python -m experiments.data_speed.training [--steps=60] [--out=FILE.json]

The embedded teacher is distilled three ways, each once with its own data and once with the rows of its first batch held
in memory, everything else being the same: the shapes set encoded at the start; the same from a latent cache on disk,
made by `lcm_jax.precompute`; and photo-like JPEG pictures of 1000 x 1333 pixels in tar shards, decoded and cropped to
512. Those are encoded at every step, held or not. Reading and training share the machine's cores. Steps are timed from
metrics.jsonl, the median of the logged lines, after compiling.
"""

import argparse
import contextlib
import itertools
import json
import runpy
import statistics
import tarfile
import tempfile
import time
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from unittest import mock

import jax
import numpy as np

from experiments.data_speed.images import photo_like
from lcm_jax import precompute
from lcm_jax.data import cache, loader
from lcm_jax.data.order import draws_at
from lcm_jax.files import write_text
from lcm_jax.runtime.telemetry import read_metrics
from lcm_jax.train import train

CONFIG = "configs/shapes_lcm.py"
PHOTOS, PHOTO_SIZE, PHOTO_BATCH, PHOTO_SIDE = 64, (1000, 1333), 4, 512
CAPTION = b"a large red star at the left on a white background"
LOG_EVERY = 5
READS = 20_000


def photo_shards(folder: Path) -> str:
    """Pattern of two shards of captioned photo-like pictures."""
    for shard in range(2):
        with tarfile.open(folder / f"{shard:05d}.tar", "w") as tar:
            for number in range(shard, PHOTOS, 2):
                files = {"jpg": photo_like(number, *PHOTO_SIZE), "txt": CAPTION}
                for suffix, content in files.items():
                    info = tarfile.TarInfo(f"{number:09d}.{suffix}")
                    info.size = len(content)
                    tar.addfile(info, BytesIO(content))
    return str(folder / "{00000..00001}.tar")


@contextlib.contextmanager
def first_batch_held() -> Iterator[None]:
    """Trainings in this context get the rows of their first batch again and again."""
    read = loader.batches

    def held(*args, put, **keywords) -> Iterator:
        with contextlib.closing(read(*args, put=dict, **keywords)) as batches:
            rows = next(batches)
        return loader.Prefetched(itertools.repeat(rows), put)

    with mock.patch.object(loader, "batches", held):
        yield


def measured(config, workdir: Path) -> dict[str, float]:
    """Seconds of a step and the share of it that waited for data; median over logged lines but for the first two."""
    train(config, workdir)
    lines = read_metrics(workdir)[2:]
    seconds = statistics.median(config.data.batch_size / line["images_per_second"] for line in lines)
    return {"step_s": seconds, "data_wait": statistics.median(line["data_wait"] for line in lines)}


def reads_per_second(folder: Path) -> float:
    """Rows per second of a latent cache, in random order, by one thread of one process."""
    rows = cache.open(folder)
    order = np.random.default_rng(0).integers(0, rows.groups[0], READS)
    draws = draws_at(0, 0)
    for rank in order[:1000]:
        rows.row(0, int(rank), draws)
    begun = time.perf_counter()
    for rank in order:
        rows.row(0, int(rank), draws)
    return READS / (time.perf_counter() - begun)


def configs(folder: Path, steps: int) -> dict:
    """Name -> config of the trainings that are compared; makes the data that they read."""
    made = {}
    for name in ("in memory", "latent cache", "512 px JPEG tar"):
        config = runpy.run_path(CONFIG)["get_config"]()
        config.train.steps, config.log.every = steps, LOG_EVERY
        config.checkpoint.every, config.sample.every = 10 * steps, 0
        made[name] = config
    out = folder / "cache"
    precompute.latents(made["in memory"], out, precompute.Options())
    made["latent cache"].data.update(source="latents", path=str(out), encode="step")
    made["512 px JPEG tar"].data.update(
        source="webdataset", path=photo_shards(folder), encode="step", resolution=PHOTO_SIDE, batch_size=PHOTO_BATCH
    )
    return made


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--out", type=Path, help="JSON file")
    args = parser.parse_args()
    rows = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for name, config in configs(folder, args.steps).items():
            own = measured(config, folder / f"{name} own")
            with first_batch_held():
                held = measured(config, folder / f"{name} held")
            rows[name] = {**own, "held_step_s": held["step_s"], "slowdown": own["step_s"] / held["step_s"] - 1}
        reads = reads_per_second(folder / "cache")
    print("| data | step | waiting for data | step, batch held | slow-down |\n|---|---|---|---|---|")
    for name, row in rows.items():
        print(
            f"| {name} | {1e3 * row['step_s']:.0f} ms | {100 * row['data_wait']:.1f} % | "
            f"{1e3 * row['held_step_s']:.0f} ms | {100 * row['slowdown']:+.1f} % |"
        )
    print(
        f"\nlatent cache: {reads:.0f} rows/s in random order, one thread ({jax.device_count()} device(s), "
        f"{jax.default_backend()})"
    )
    if args.out:
        write_text(args.out, json.dumps({"rows": rows, "cache_reads_per_second": reads}, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
