"""One set of captioned images, written as each kind of source has it, by the format's usual writer."""

import io
import json
import tarfile
from pathlib import Path

import datasets
import numpy as np
import tensorflow_datasets as tfds
from image_kit import encoded, noise
from PIL import Image


def jpeg(number: int, size: tuple[int, int]) -> bytes:
    """An image of `size` (width, height), another one for each number."""
    small = Image.fromarray(noise(6, 6, seed=number))
    return encoded(small.resize(size, Image.Resampling.BICUBIC), "JPEG", quality=92)


def records(count: int) -> list[dict]:
    """[{"key", "image", "text", "width", "height", "pwatermark"}] of images of several sizes and both orientations."""
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


def write_tar(path: Path, entries: list[tuple[str, bytes]], **options) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", **options) as tar:
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


class TinyRecords(tfds.core.GeneratorBasedBuilder):
    """`found` as a TFDS data set that keeps its order."""

    VERSION = tfds.core.Version("1.0.0")
    found: list[dict] = []

    def _info(self):
        f = tfds.features
        number = f.Tensor(shape=(), dtype=np.float64, encoding="bytes")  # else it is stored in 32 bits
        numbers = dict.fromkeys(("width", "height", "pwatermark"), number)
        features = f.FeaturesDict({"image": f.Image(), "text": f.Text(), **numbers})
        return tfds.core.DatasetInfo(builder=self, features=features, disable_shuffling=True)

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples()}

    def _generate_examples(self):
        for number, record in enumerate(self.found):
            yield number, {name: record[name] for name in self.info.features}


def tensorflow_datasets(folder: Path, found: list[dict]) -> str:
    TinyRecords.found = found
    builder = TinyRecords(data_dir=folder, file_format="array_record")
    builder.download_and_prepare(download_config=tfds.download.DownloadConfig(num_shards=2))
    return str(builder.data_path)


WRITERS = {"webdataset": webdataset, "folder": imagefolder, "huggingface": parquet, "tfds": tensorflow_datasets}
