"""What reading costs a training: the share of a step spent waiting for data, beside a training that reads nothing.

    python -m experiments.data_speed.training [--steps=60] [--out=FILE.json]

The embedded teacher is distilled from three kinds of data, each once as it is and once with the rows of the first batch
held in memory, all else equal: the shapes set encoded at the start; the same from a latent cache on disk, made by
`lcm_jax.precompute`; and photo-like JPEG images of 1000 x 1333 pixels in tar shards, decoded and cropped to 512, which
are encoded at every step, held or not. Reading and training share the machine's cores. The time of a step is the median
of the lines of metrics.jsonl after compiling.
"""

import argparse
import contextlib
import itertools
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

from experiments import results, stage
from experiments.data_speed.images import photo_like
from lcm_jax import files, precompute
from lcm_jax.data import cache, loader
from lcm_jax.data.order import draws_at
from lcm_jax.runtime.telemetry import read_metrics
from lcm_jax.train import train

CONFIG = "configs/shapes_lcm.py"
PHOTOS, PHOTO_SIZE, PHOTO_BATCH, PHOTO_SIDE = 64, (1000, 1333), 4, 512
CAPTION = b"a large red star at the left on a white background"
LOG_EVERY = 5
READS = 20_000


def photo_shards(folder: Path) -> str:
    """Pattern of two shards of captioned photo-like images."""
    for shard in range(2):
        with tarfile.open(folder / f"{shard:05d}.tar", "w") as tar:
            for number in range(shard, PHOTOS, 2):
                parts = {"jpg": photo_like(number, *PHOTO_SIZE), "txt": CAPTION}
                for suffix, content in parts.items():
                    info = tarfile.TarInfo(f"{number:09d}.{suffix}")
                    info.size = len(content)
                    tar.addfile(info, BytesIO(content))
    return str(folder / "{00000..00001}.tar")


@contextlib.contextmanager
def first_batch_held() -> Iterator[None]:
    """Trainings in this context get the rows of their first batch at every step."""
    read = loader.batches

    def held(*args, put, **keywords) -> Iterator:
        with contextlib.closing(read(*args, put=dict, **keywords)) as batches:
            rows = next(batches)
        return loader.Prefetched(itertools.repeat(rows), put)

    with mock.patch.object(loader, "batches", held):
        yield


def measured(config, workdir: Path) -> dict[str, float]:
    """Seconds of a step and the share of it that waited for data: medians over all logged lines but the first two."""
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
    """Name -> config of the trainings that are compared; writes the data that they read to `folder`."""
    made = {}
    for name in ("in memory", "latent cache", "512 px JPEG tar"):
        config = stage.read_config(CONFIG)
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
    columns = {
        "data": ("name", "{}"),
        "step": ("step_s", "{:.3f} s"),
        "waiting for data": ("data_wait", "{:.1%}"),
        "step, batch held": ("held_step_s", "{:.3f} s"),
        "slow-down": ("slowdown", "{:+.1%}"),
    }
    print(results.table_of(columns, [{"name": name} | row for name, row in rows.items()]))
    devices = f"{jax.device_count()} device(s), {jax.default_backend()}"
    print(f"latent cache: {reads:.0f} rows/s in random order, one thread ({devices})")
    if args.out:
        files.write_atomic(args.out, results.to_json({"rows": rows, "cache_reads_per_second": reads}, 2))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
