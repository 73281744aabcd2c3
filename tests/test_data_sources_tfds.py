"""TFDS data sets as sources, prepared by TFDS' own builder class."""

import json
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds
from image_kit import encoded, noise
from PIL import Image

from lcm_jax.data.records import BadRecordError
from lcm_jax.data.sources import tfds as tfds_source
from lcm_jax.errors import BadArgument, LcmError

FORMATS = (("PNG", "RGB"), ("JPEG", "RGB"), ("WEBP", "RGB"), ("PNG", "L"), ("JPEG", "CMYK"), ("PNG", "RGBA"))
IMAGES = [
    encoded(Image.fromarray(noise(8 + number, 12, seed=number)).convert(mode), form)
    for number, (form, mode) in enumerate(FORMATS)
]
TEXTS = [["a cat", "ein Käfer"], ["猫"], ["c"], ["d"], ["e", "f", "g"], [" ", ""]]


class OtherRecords(tfds.core.GeneratorBasedBuilder):
    """As a user writes one: other names, nested captions, a label."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        f = tfds.features
        return tfds.core.DatasetInfo(
            builder=self,
            features=f.FeaturesDict(
                {
                    "image": f.Image(),
                    "second": f.Image(),
                    "text": f.Text(),
                    "label": f.ClassLabel(num_classes=9),
                    "score": np.float32,
                    "flag": np.bool_,
                    "many": f.Sequence({"text": f.Text(), "id": np.int64}),
                }
            ),
        )

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples(range(6)), "test": self._generate_examples(range(3))}

    def _generate_examples(self, numbers):
        for i in numbers:
            yield (
                i,
                {
                    "image": IMAGES[i],
                    "second": IMAGES[0],
                    "text": TEXTS[i][0],
                    "label": i,
                    "score": np.nan if i == 1 else i / 4,
                    "flag": True,
                    "many": [{"text": text, "id": 7} for text in TEXTS[i]],
                },
            )


class Unprepared(OtherRecords):
    pass


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tfds")
    builder = OtherRecords(data_dir=folder, file_format="array_record")
    builder.download_and_prepare(download_config=tfds.download.DownloadConfig(num_shards=3))
    return Path(builder.data_path)


def by_label(source):
    """TFDS shuffles what it writes: number of the image -> number of the record."""
    return {int(label): i for i, label in enumerate(source.field("label"))}


def test_another_builders_data_set_from_its_folder(prepared):
    source = tfds_source.open(str(prepared), caption_key="many/text")
    places = by_label(source)
    assert sorted(places) == list(range(6)) and source.bad_records == ()
    for i in range(5):
        record = source[places[i]]
        assert (record.image, record.captions) == (IMAGES[i], tuple(TEXTS[i]))
        assert record.key == source.where(places[i])[1]
        assert record.fields == ({"label": i} if i == 1 else {"label": i, "score": i / 4})
    with pytest.raises(BadRecordError, match="no caption"):
        source[places[5]]
    assert [source.where(i)[1] for i in (0, 5)] == ["train-000000000", "train-000000005"]
    shards = [os.path.basename(source.where(i)[0]) for i in range(6)]
    assert sorted(set(shards)) == [f"other_records-train.array_record-0000{k}-of-00003" for k in range(3)]
    assert shards == sorted(shards)
    np.testing.assert_array_equal([source.field("score")[places[i]] for i in range(6)], [0, np.nan, 0.5, 0.75, 1, 1.25])
    assert source.field("score").dtype == np.float64
    assert all(source.field(name) is None for name in ("flag", "image", "text", "unknown"))
    with pytest.raises(IndexError):
        source[6]


def test_default_keys_splits_and_slices(prepared):
    source = tfds_source.open(str(prepared))
    places = by_label(source)
    assert [source[places[i]].captions for i in range(5)] == [(TEXTS[i][0],) for i in range(5)]
    assert len(tfds_source.open(str(prepared), split="test")) == 3
    part = tfds_source.open(str(prepared), split="train[2:5]")
    assert [part.where(i) for i in range(3)] == [source.where(i) for i in range(2, 5)] and len(part) == 3
    np.testing.assert_array_equal(part.field("label"), source.field("label")[2:5])


def test_registered_names(prepared, monkeypatch):
    monkeypatch.setattr(tfds.core.constants, "DATA_DIR", str(prepared.parents[1]))
    assert len(tfds_source.open("other_records")) == 6
    words = r"^path=unprepared: not prepared.*file_format='array_record'.*TFDS_DATA_DIR"
    with pytest.raises(BadArgument, match=words):
        tfds_source.open("unprepared")
    with pytest.raises(BadArgument, match="^path=no_such_data_set: neither a folder nor a data set that TFDS knows"):
        tfds_source.open("no_such_data_set")


def test_wrong_folders_formats_splits_and_features(prepared, tmp_path):
    with pytest.raises(BadArgument, match=f"^path=.*no dataset_info.json.*; try {prepared}$"):
        tfds_source.open(str(prepared.parent))
    with pytest.raises(BadArgument, match="^path=.*no dataset_info.json"):
        tfds_source.open(str(tmp_path))
    with pytest.raises(BadArgument, match="^split=val: .*no such split; choose of train, test"):
        tfds_source.open(str(prepared), split="val")
    with pytest.raises(BadArgument, match="^split=.*not a slice"):
        tfds_source.open(str(prepared), split="train[x:")
    with pytest.raises(BadArgument, match="^image_key=jpg: .*no such feature; choose of .*image, label"):
        tfds_source.open(str(prepared), image_key="jpg")
    with pytest.raises(BadArgument, match="^caption_key=many/words: "):
        tfds_source.open(str(prepared), caption_key="many/words")
    (tmp_path / "dataset_info.json").write_text(
        (prepared / "dataset_info.json").read_text().replace('"array_record"', '"tfrecord"')
    )
    (tmp_path / "features.json").write_bytes((prepared / "features.json").read_bytes())
    with pytest.raises(BadArgument, match="^path=.*: stored as tfrecord.*file_format='array_record'"):
        tfds_source.open(str(tmp_path))


def test_damaged_copies(prepared, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(prepared, copy)
    shards = sorted(copy.glob("*-train.array_record*"))
    content = bytearray(shards[0].read_bytes())
    at = content.index(IMAGES[0][:40])  # every example contains it
    content[at : at + 400] = bytes(400)  # inside the image: what precedes it has no fixed length
    shards[0].write_bytes(content)
    source = tfds_source.open(str(copy))
    good, reasons = 0, []
    for i in range(6):
        try:
            good += bool(source[i].captions)
        except BadRecordError as error:
            reasons.append(str(error))
    assert good >= 1 and good + len(reasons) == 6
    assert 1 <= sum("cannot be read" in reason for reason in reasons) <= 2 and "\n" not in "".join(reasons)
    shards[1].unlink()
    with pytest.raises(LcmError, match="00001-of-00003 is missing .1 of 3 files"):
        tfds_source.open(str(copy))


def test_shards_outside_of_the_folder_are_not_read(prepared, tmp_path):
    shutil.copytree(prepared, tmp_path / "copy")
    info = json.loads((tmp_path / "copy/dataset_info.json").read_text())
    for file in (tmp_path / "copy").glob("*array_record*"):
        shutil.copy(file, tmp_path)
    for template in (
        "../{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}",
        f"{tmp_path}/{{DATASET}}-{{SPLIT}}.{{FILEFORMAT}}-{{SHARD_X_OF_Y}}",
    ):
        for split in info["splits"]:
            split["filepathTemplate"] = template
        (tmp_path / "copy/dataset_info.json").write_text(json.dumps(info))
        with pytest.raises(LcmError, match="names no file inside .*copy"):
            tfds_source.open(str(tmp_path / "copy"))


@pytest.mark.parametrize("package", ["tensorflow_datasets", "array_record.python"])
def test_without_the_packages(tmp_path, monkeypatch, package):
    for name in [name for name in sys.modules if name == package or name.startswith(package + ".")] + [package]:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(LcmError, match="pip install 'lcm_jax.data.'"):
        tfds_source.open(str(tmp_path))
