"""TFDS data sets as sources: prepared by TFDS' own builder class, and packed by `tfds_builder`."""

import hashlib
import io
import json
import multiprocessing
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lcm_jax.data import tfds_builder
from lcm_jax.data.records import BadRecord, Fault, Record
from lcm_jax.data.sources import tfds as tfds_source
from lcm_jax.errors import LcmError

tfds = pytest.importorskip("tensorflow_datasets")
pytest.importorskip("array_record")


def picture(seed, form="PNG", mode="RGB"):
    pixels = np.random.default_rng(seed).integers(0, 256, (8 + seed, 12, 3), np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(stream, form)
    return stream.getvalue()


PICTURES = [
    picture(0),
    picture(1, "JPEG"),
    picture(2, "WEBP"),
    picture(3, "PNG", "L"),
    picture(4, "JPEG", "CMYK"),
    picture(5, "PNG", "RGBA"),
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
                    "image": PICTURES[i],
                    "second": PICTURES[0],
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
    """TFDS shuffles what it writes: number of the picture -> number of the record."""
    return {int(label): i for i, label in enumerate(source.field("label"))}


def test_another_builders_data_set_from_its_folder(prepared):
    source = tfds_source.open(str(prepared), caption_key="many/text")
    places = by_label(source)
    assert sorted(places) == list(range(6)) and source.faults == ()
    for i in range(5):
        record = source[places[i]]
        assert (record.image, record.captions) == (PICTURES[i], tuple(TEXTS[i]))
        assert record.key == source.where(places[i])[1]
        assert record.fields == ({"label": i} if i == 1 else {"label": i, "score": i / 4})
    with pytest.raises(BadRecord, match="no caption"):
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
    with pytest.raises(LcmError, match=r"unprepared is not prepared.*file_format='array_record'.*TFDS_DATA_DIR"):
        tfds_source.open("unprepared")
    with pytest.raises(LcmError, match="neither a folder nor a data set that TFDS knows"):
        tfds_source.open("no_such_data_set")


def test_wrong_folders_formats_splits_and_features(prepared, tmp_path):
    with pytest.raises(LcmError, match=f"no dataset_info.json.*--config.data.path={prepared}$"):
        tfds_source.open(str(prepared.parent))
    with pytest.raises(LcmError, match="no dataset_info.json"):
        tfds_source.open(str(tmp_path))
    with pytest.raises(LcmError, match="no split 'val'.*train, test"):
        tfds_source.open(str(prepared), split="val")
    with pytest.raises(LcmError, match="no slice"):
        tfds_source.open(str(prepared), split="train[x:")
    with pytest.raises(LcmError, match="no feature 'jpg'.*image, label.*image_key"):
        tfds_source.open(str(prepared), image_key="jpg")
    with pytest.raises(LcmError, match="no feature 'many/words'.*caption_key"):
        tfds_source.open(str(prepared), caption_key="many/words")
    (tmp_path / "dataset_info.json").write_text(
        (prepared / "dataset_info.json").read_text().replace('"array_record"', '"tfrecord"')
    )
    (tmp_path / "features.json").write_bytes((prepared / "features.json").read_bytes())
    with pytest.raises(LcmError, match="stored as tfrecord.*file_format='array_record'"):
        tfds_source.open(str(tmp_path))


def test_damaged_copies(prepared, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(prepared, copy)
    shards = sorted(copy.glob("*-train.array_record*"))
    content = bytearray(shards[0].read_bytes())
    at = content.index(PICTURES[0][:40])  # every example holds it
    content[at : at + 400] = bytes(400)  # within the picture: what stands before it has no fixed length
    shards[0].write_bytes(content)
    source = tfds_source.open(str(copy))
    good, reasons = 0, []
    for i in range(6):
        try:
            good += bool(source[i].captions)
        except BadRecord as error:
            reasons.append(str(error))
    assert good >= 1 and good + len(reasons) == 6
    assert 1 <= sum("cannot be read" in reason for reason in reasons) <= 2 and "\n" not in "".join(reasons)
    shards[1].unlink()
    with pytest.raises(LcmError, match="00001-of-00003 is missing .1 of 3 files"):
        tfds_source.open(str(copy))


class Rows:
    """Records in memory, of which some are bad."""

    def __init__(self, records, faults=(), pause=0.0):
        self.records, self.faults, self.pause = records, faults, pause

    def __len__(self):
        return len(self.records)

    def __getitem__(self, number):
        time.sleep(self.pause)
        if isinstance(self.records[number], str):
            raise BadRecord(self.records[number])
        return self.records[number]

    def where(self, number):
        return "shard", f"n{number}"


ARRAY = np.random.default_rng(0).integers(0, 256, (5, 7, 3), np.uint8)
RECORDS = [Record(f"k/{i} ä", PICTURES[i], tuple(TEXTS[i]), {"score": i / 3}) for i in range(5)]
RECORDS += [
    "a truncated file",
    Record("array", ARRAY, ("array",), {"width": 700, "late": -1}),
    Record("z", b"no picture", ("z",)),
]
NAN = np.nan


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


@pytest.mark.parametrize("shard_bytes", [tfds_builder.SHARD_BYTES, 70_000])
def test_packed_records_come_back(tmp_path, shard_bytes):
    seen = []
    packed = tfds_builder.pack(
        Rows(RECORDS, (Fault("a", "b", "c"),)),
        tmp_path / "out",
        shard_bytes=shard_bytes,
        report=lambda done, total: seen.append((done, total)),
    )
    assert packed.records == 6 and (packed.shards > 1) == (shard_bytes < tfds_builder.SHARD_BYTES)
    assert [(f.shard, f.key) for f in packed.faults] == [("a", "b"), ("shard", "n5"), ("shard", "n7")]
    assert packed.faults[1].reason == "a truncated file" and seen == [(i + 1, 8) for i in range(8)]
    source = tfds_source.open(str(tmp_path / "out"))
    assert len(source) == 6
    for i in range(5):
        record = source[i]
        assert (record.key, record.image, record.captions) == (RECORDS[i].key, PICTURES[i], RECORDS[i].captions)
        assert record.fields == {"width": 12, "height": 8 + i, "score": i / 3}, "float64, exactly"
        assert source.where(i)[1] == record.key and Path(source.where(i)[0]).is_file()
    assert source[5].fields == {"width": 700, "height": 5, "late": -1}, "what the record says stands"
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(source[5].image))), ARRAY)
    np.testing.assert_array_equal(source.field("late"), [NAN] * 5 + [-1])
    np.testing.assert_array_equal(source.field("width"), [12] * 5 + [700])
    part = tfds_source.open(str(tmp_path / "out"), split="train[1:3]")
    np.testing.assert_array_equal(part.field("score"), [1 / 3, 2 / 3])
    index = next((tmp_path / "out").glob("*.npy"))
    again = tfds_builder.pack(source, tmp_path / "again", shard_bytes=shard_bytes)
    assert again.records == 6 and not again.faults
    assert [source[i] for i in range(6)] == [tfds_source.open(str(tmp_path / "again"))[i] for i in range(6)]
    np.save(index, np.load(index)[1:])
    with pytest.raises(LcmError, match="has 5 records.*the split 6"):
        tfds_source.open(str(tmp_path / "out"))
    np.save(index, np.zeros((6, 2), np.load(index).dtype))
    with pytest.raises(LcmError, match="another kind"):
        tfds_source.open(str(tmp_path / "out"))
    index.write_bytes(b"")
    with pytest.raises(LcmError, match="index.npy cannot be read"):
        tfds_source.open(str(tmp_path / "out"))


def test_packed_data_sets_are_plain_tfds(tmp_path):
    tfds_builder.pack(Rows(RECORDS), tmp_path / "out", name="mine", shard_bytes=70_000)
    builder = tfds.builder_from_directory(tmp_path / "out")
    assert builder.info.name == "mine" and builder.info.splits["train"].num_examples == 6
    data = builder.as_data_source(split="train")
    np.testing.assert_array_equal(data[0]["image"], np.asarray(Image.open(io.BytesIO(PICTURES[0]))))
    np.testing.assert_array_equal(data[5]["image"], ARRAY)
    assert data[1]["image"].shape == (9, 12, 3) and data[1]["captions"][0].decode() == "猫"
    assert data[4]["score"] == 4 / 3 and np.isnan(data[0]["late"]) and data[5]["late"] == -1
    assert data[3]["key"].decode() == RECORDS[3].key and "tensorflow" not in sys.modules


def test_what_cannot_be_packed(tmp_path, monkeypatch):
    (tmp_path / "there").mkdir()
    with pytest.raises(LcmError, match="there exists already"):
        tfds_builder.pack(Rows(RECORDS), tmp_path / "there")
    with pytest.raises(LcmError, match="cannot name"):
        tfds_builder.pack(Rows(RECORDS), tmp_path / "out", name="My Records")
    with pytest.raises(LcmError, match="none of 1 records can be used; the first: shard: n0: bad"):
        tfds_builder.pack(Rows(["bad"]), tmp_path / "out")
    with pytest.raises(LcmError, match="none of 0 records"):
        tfds_builder.pack(Rows([]), tmp_path / "out")
    with pytest.raises(LcmError, match="number named 'key'"):
        tfds_builder.pack(Rows([Record("a", PICTURES[0], ("c",), {"key": 1})]), tmp_path / "out")
    monkeypatch.setattr(tfds_builder.files.shutil, "disk_usage", lambda place: type("Usage", (), {"free": 1000}))
    with pytest.raises(LcmError, match="needs .* bytes, 1000 are free"):
        tfds_builder.pack(Rows(RECORDS), tmp_path / "out")
    assert os.listdir(tmp_path) == ["there"]


@pytest.mark.parametrize("package", ["tensorflow_datasets", "array_record.python"])
def test_without_the_packages(tmp_path, monkeypatch, package):
    for name in [name for name in sys.modules if name == package or name.startswith(package + ".")] + [package]:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(LcmError, match="pip install 'lcm_jax.data.'"):
        tfds_source.open(str(tmp_path))
    with pytest.raises(LcmError, match="pip install 'lcm_jax.data.'"):
        tfds_builder.pack(Rows(RECORDS), tmp_path / "out")


def digests(folder):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


PROGRAM = """
import resource, sys
from test_data_sources_tfds import RECORDS, Rows
from lcm_jax.data import tfds_builder
pause, limit = float(sys.argv[2]), int(sys.argv[3])
if limit:
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
source = Rows([record for record in RECORDS if not isinstance(record, str)] * 8, pause=pause)
tfds_builder.pack(source, sys.argv[1], shard_bytes=70_000, report=lambda done, total: print(done, flush=True))
"""


def packing(out, pause=0.0, limit=0):
    root = Path(__file__).parents[1]
    path = os.pathsep.join([str(root), str(root / "tests")])
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(out), str(pause), str(limit)],
        text=True,
        env=os.environ | {"PYTHONPATH": path},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def test_killed_and_run_again(tmp_path):
    good = [record for record in RECORDS if not isinstance(record, str)]
    tfds_builder.pack(Rows(good * 8), tmp_path / "whole", shard_bytes=70_000)
    killed = packing(tmp_path / "out", pause=0.02)
    while int(killed.stdout.readline()) < 30:
        pass
    with pytest.raises(LcmError, match="written by another process"):
        tfds_builder.pack(Rows(good), tmp_path / "out")
    killed.send_signal(signal.SIGKILL)
    killed.communicate(timeout=30)
    assert not (tmp_path / "out").exists()
    assert list((tmp_path / ".out.partial").iterdir()), "it was in the middle of it"
    (tmp_path / ".out.partial/records-train.array_record-00099-of-00100").touch()  # as with another shard_bytes
    again = packing(tmp_path / "out")
    _, errors = again.communicate(timeout=60)
    assert again.returncode == 0, errors
    assert sorted(os.listdir(tmp_path)) == ["out", "whole"]
    assert digests(tmp_path / "out") == digests(tmp_path / "whole")
    assert len(list((tmp_path / "out").glob("*array_record*"))) > 2


def test_no_room_for_a_shard(tmp_path):
    process = packing(tmp_path / "out", limit=20_000)  # as a full disk: write() fails
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1 and "LcmError: packing into" in errors and "make room" in errors, errors
    assert os.listdir(tmp_path) == []


def _in_process(sources, queue):
    queue.put([([source[i] for i in range(2)], source.field("score").tolist(), source.where(1)) for source in sources])


def test_pickles_to_a_process(prepared, tmp_path):
    tfds_builder.pack(Rows(RECORDS[:3]), tmp_path / "out")
    sources = [tfds_source.open(str(tmp_path / "out")), tfds_source.open(str(prepared), split="test")]
    assert [source[0].key for source in sources] == ["k/0 ä", "test-000000000"]  # readers are open now
    sources[0].field("score")
    assert len(pickle.dumps(sources)) < 20_000
    spawn = multiprocessing.get_context("spawn")
    queue = spawn.Queue()
    process = spawn.Process(target=_in_process, args=(sources, queue))
    process.start()
    got = queue.get(timeout=60)
    np.testing.assert_equal(got, [([s[i] for i in range(2)], s.field("score").tolist(), s.where(1)) for s in sources])
    process.join(60)
    assert process.exitcode == 0
