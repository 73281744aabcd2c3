"""One set of captioned pictures, written as each kind of source has it, by the format's usual writer."""

import io
import json
import tarfile
from pathlib import Path

import datasets
import numpy as np
from PIL import Image

from lcm_jax.data import tfds_builder
from lcm_jax.data.sources import open_source


def jpeg(number: int, size: tuple[int, int]) -> bytes:
    """A picture (width, height) that no other number has."""
    rng = np.random.default_rng(number)
    small = Image.fromarray(rng.integers(0, 256, (6, 6, 3), np.uint8))
    stream = io.BytesIO()
    small.resize(size, Image.Resampling.BICUBIC).save(stream, "JPEG", quality=92)
    return stream.getvalue()


def records(count: int) -> list[dict]:
    """[{"key", "image", "text", "width", "height", "pwatermark"}] of pictures of several sizes, wide and high."""
    sizes = ((96, 72), (70, 101), (64, 64), (130, 90))
    return [
        {
            "key": f"{number:09d}",
            "image": jpeg(number, sizes[number % 4]),
            "text": f"picture number {number} of size {number % 4}",
            "width": sizes[number % 4][0],
            "height": sizes[number % 4][1],
            "pwatermark": round(number % 10 / 10, 1),
        }
        for number in range(count)
    ]


def members(record: dict) -> list[tuple[str, bytes]]:
    """The files of one record in an img2dataset shard."""
    numbers = {name: record[name] for name in ("width", "height", "pwatermark")}
    metadata = json.dumps({"caption": record["text"], "key": record["key"], "status": "success", **numbers})
    key = record["key"]
    files = {"jpg": record["image"], "json": metadata.encode(), "txt": record["text"].encode()}
    return [(f"{key}.{suffix}", content) for suffix, content in files.items()]


def write_tar(path: Path, entries: list[tuple[str, bytes]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in entries:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def webdataset(folder: Path, found: list[dict], shards: int = 3) -> str:
    """The pattern of the shards."""
    for shard, part in enumerate(np.array_split(np.arange(len(found)), shards)):
        entries = [entry for number in part for entry in members(found[number])]
        write_tar(folder / f"{shard:05d}.tar", entries)
    return str(folder / f"{{00000..{shards - 1:05d}}}.tar")


def imagefolder(folder: Path, found: list[dict]) -> str:
    folder.mkdir(parents=True)
    lines = []
    for record in found:
        name = f"{record['key']}.jpg"
        (folder / name).write_bytes(record["image"])
        rest = {name: value for name, value in record.items() if name not in ("key", "image")}
        lines.append(json.dumps({"file_name": name, **rest}))
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    return str(folder)


def parquet(folder: Path, found: list[dict]) -> str:
    """As a data set on the hub: data/train-*.parquet with an image column of bytes and path."""
    rows = [{**record, "image": {"bytes": record["image"], "path": None}} for record in found]
    table = datasets.Dataset.from_list(rows).cast_column("image", datasets.Image(decode=False))
    (folder / "data").mkdir(parents=True)
    table.to_parquet(folder / "data" / "train-00000-of-00001.parquet")
    return str(folder)


def tfds(folder: Path, found: list[dict]) -> str:
    packed = tfds_builder.pack(open_source("folder", imagefolder(folder / "images", found)), folder / "records")
    assert packed.records == len(found) and not packed.faults
    return str(folder / "records")


WRITERS = {"webdataset": webdataset, "folder": imagefolder, "huggingface": parquet, "tfds": tfds}
