"""Hugging Face data sets as sources: parquet written by pyarrow and pandas, `save_to_disk`, ids on the hub."""

import json
import os
import struct
import sys
from types import SimpleNamespace

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from image_kit import encoded, noise

from lcm_jax.data.records import BadRecordError
from lcm_jax.data.sources import huggingface
from lcm_jax.errors import BadArgument, LcmError

IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


@pytest.fixture(autouse=True, scope="module")
def cache(tmp_path_factory):
    # datasets reads HF_HOME when it is imported: its own name for the folder is what a test can still change
    before = datasets.config.HF_DATASETS_CACHE
    datasets.config.HF_DATASETS_CACHE = tmp_path_factory.mktemp("cache")
    yield
    datasets.config.HF_DATASETS_CACHE = before


FORMATS = ("PNG", "JPEG", "WEBP", "PNG", "JPEG")
IMAGES = [encoded(noise(8 + number, 12, seed=number), form) for number, form in enumerate(FORMATS)]
TEXTS = ["a cat", "ein Käfer", "猫", "d", "e"]


def write(path, images=IMAGES, texts=TEXTS, **columns):
    path.parent.mkdir(parents=True, exist_ok=True)
    if not isinstance(images, pa.Array):
        images = pa.array([{"bytes": content, "path": None} for content in images], IMAGE)
    text = texts if isinstance(texts, pa.Array) else pa.array(texts)
    pq.write_table(pa.table({"image": images, "text": text, **columns}), path)


def contents(source):
    return [(record.image, record.captions) for record in (source[i] for i in range(len(source)))]


def expected(rows=range(5)):
    return [(IMAGES[i], (TEXTS[i],)) for i in rows]


def files_below(folder):
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*"))


def test_hub_layout_with_splits(tmp_path):
    write(tmp_path / "data/train-00000-of-00002-6adc9a.parquet", IMAGES[:3], TEXTS[:3])
    write(tmp_path / "data/train-00001-of-00002-6adc9a.parquet", IMAGES[3:], TEXTS[3:])
    write(tmp_path / "data/test-00000-of-00001.parquet", IMAGES[:1], TEXTS[:1])
    (tmp_path / "README.md").write_text("a card")
    before = files_below(tmp_path)
    source = huggingface.open(str(tmp_path))
    assert contents(source) == expected() and len(source.bad_records) == 0
    assert [source[i].key for i in (0, 4)] == ["train-000000000", "train-000000004"]
    assert [os.path.basename(source.where(i)[0])[:11] for i in range(5)] == ["train-00000"] * 3 + ["train-00001"] * 2
    assert all(source.where(i)[1] == source[i].key for i in range(5))
    assert contents(huggingface.open(str(tmp_path), split="test")) == expected([0])
    with pytest.raises(BadArgument, match="^split=val: .* no such split; choose of train, test"):
        huggingface.open(str(tmp_path), split="val")
    with pytest.raises(IndexError):
        source[5]
    assert files_below(tmp_path) == before


def test_plain_files_one_file_and_globs(tmp_path):
    write(tmp_path / "part_0.parquet", IMAGES[:2], TEXTS[:2])
    write(tmp_path / "part_1.parquet", IMAGES[2:], TEXTS[2:])
    (tmp_path / "_SUCCESS").touch()  # as Spark leaves one
    assert contents(huggingface.open(str(tmp_path))) == expected()
    assert contents(huggingface.open(str(tmp_path / "part_1.parquet"))) == expected(range(2, 5))
    assert contents(huggingface.open(str(tmp_path / "part_*.parquet"))) == expected()
    with pytest.raises(BadArgument, match="^split=test"):
        huggingface.open(str(tmp_path / "part_*.parquet"), split="test")


@pytest.mark.parametrize("with_splits", [False, True])
def test_saved_to_disk(tmp_path, with_splits):
    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    rows = {"image": [{"bytes": p, "path": None} for p in IMAGES], "text": TEXTS}
    saved = datasets.Dataset.from_dict(rows, features=features)
    if with_splits:
        saved = datasets.DatasetDict(train=saved, test=saved.select([1]))
    saved.save_to_disk(str(tmp_path / "saved"))
    before = files_below(tmp_path)
    source = huggingface.open(str(tmp_path / "saved"))
    assert contents(source) == expected()
    assert source.where(2) == (str(tmp_path / "saved"), source[2].key)
    if with_splits:
        assert contents(huggingface.open(str(tmp_path / "saved"), split="test")) == expected([1])
        with pytest.raises(BadArgument, match="^split=val: .*train, test"):
            huggingface.open(str(tmp_path / "saved"), split="val")
    assert files_below(tmp_path) == before


def test_images_as_plain_bytes_and_captions_as_lists_or_bytes(tmp_path):
    texts = [["a", "b"], ["c"], [" ", None, "d"], [], None]
    write(tmp_path / "x.parquet", pa.array(IMAGES, pa.binary()), pa.array(texts, pa.list_(pa.string())))
    source = huggingface.open(str(tmp_path))
    assert [source[i].captions for i in range(3)] == [("a", "b"), ("c",), ("d",)]
    assert [source[i].image for i in range(3)] == IMAGES[:3]
    for number in (3, 4):
        with pytest.raises(BadRecordError, match="no caption"):
            source[number]
    write(tmp_path / "y.parquet", texts=pa.array([t.encode("latin-1", "replace") for t in TEXTS], pa.binary()))
    source = huggingface.open(str(tmp_path / "y.parquet"))
    assert source[0].captions == ("a cat",)
    with pytest.raises(BadRecordError, match="UTF-8"):
        source[1]


def test_images_by_path_and_unusable_records(tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "images/0.png").write_bytes(IMAGES[0])
    rows = [
        {"bytes": None, "path": "images/0.png"},
        {"bytes": None, "path": "images/1.png"},
        {"bytes": None, "path": None},
        None,
        {"bytes": b"", "path": None},
    ]
    write(tmp_path / "x.parquet", pa.array(rows, IMAGE))
    source = huggingface.open(str(tmp_path))
    assert source[0].image == IMAGES[0]
    with pytest.raises(BadRecordError, match="images/1.png.*No such file"):
        source[1]
    for number in (2, 3, 4):
        with pytest.raises(BadRecordError, match="no image"):
            source[number]


def test_paths_of_images_are_relative_to_their_own_file_of_a_glob(tmp_path):
    for name, content in (("a", IMAGES[0]), ("b", IMAGES[1])):
        (tmp_path / name).mkdir()
        (tmp_path / name / "0.png").write_bytes(content)
        write(tmp_path / name / "x.parquet", pa.array([{"bytes": None, "path": "0.png"}], IMAGE), [name])
    for path, contents in (("*", IMAGES[:2]), ("b", IMAGES[1:2])):
        source = huggingface.open(str(tmp_path / path / "x.parquet"))
        assert [source[i].image for i in range(len(source))] == contents


def test_the_digest_has_the_paths_of_images_that_are_not_in_the_rows(tmp_path):
    def digest(name, *rows):
        write(tmp_path / name / "x.parquet", pa.array(rows, IMAGE), ["a"] * len(rows))
        return huggingface.open(str(tmp_path / name)).digest()

    inside = {"bytes": IMAGES[0], "path": "0.png"}
    first, again, other = (
        digest(n, inside, {"bytes": None, "path": f"{p}.png"}) for n, p in (("a", 1), ("b", 1), ("c", 2))
    )
    assert first == again != other
    assert digest("d", inside) == digest("e", inside | {"path": "moved.png"}), "which is not read"
    table = pa.table({"image": pa.array([{"bytes": b"1"}]), "text": ["a"]})
    assert huggingface._paths(SimpleNamespace(data=table), "image") == []
    table = pa.table({"image": pa.array([{"bytes": b"1", "path": None}]), "text": ["a"]})
    assert huggingface._paths(SimpleNamespace(data=table), "image") == []


def test_the_digest_of_downloads_is_the_same_wherever_they_are(tmp_path):
    """`datasets` writes whole paths, those of what it has unpacked with a hash of the archive's."""

    def digest(home, number=0):
        hub, unpacked = (str(tmp_path / home / name) for name in ("datasets--a--b", "extracted"))
        paths = [f"{hub}/snapshots/1/{number}.png", f"{unpacked}/{home}/0.png"]
        rows = [{"bytes": None, "path": path} for path in paths]
        table = datasets.Dataset.from_dict({"image": rows, "text": ["a", "b"]})
        keys = {"split": "train", "image_key": "image", "caption_key": "text"}
        return huggingface.HuggingFace(table, roots=(hub, hub, unpacked), parts=(("a/b", 2),), **keys).digest()

    assert digest("here") == digest("there") != digest("here", 1)


def test_paths_of_images_stay_in_the_data_set(tmp_path):
    root, outside = tmp_path / "set", tmp_path / "0.png"
    (root / "sub").mkdir(parents=True)
    for path in (outside, root / "0.png"):
        path.write_bytes(IMAGES[0])
    (root / "link.png").symlink_to(outside)  # as in a snapshot of the hub, to its blob
    (root / "zero.png").symlink_to("/dev/zero")
    os.mkfifo(root / "pipe.png")
    with (root / "huge.png").open("wb") as stream:
        stream.truncate(2**30 + 1)
    good = ["0.png", "./0.png", "sub/../0.png", "link.png"]
    wrong = {
        "../0.png": "inside",
        str(outside): "inside",
        str(root / "0.png"): "inside",
        "sub/../../0.png": "inside",
        "../set/0.png": "inside",
        "..": "inside",
        "..\\0.png": "inside",
        "0.png\0": "inside",
        "//x": "inside",
        "zero.png": "regular file",
        "pipe.png": "regular file",
        "sub": "directory",
        ".": "directory",
        "huge.png": "1073741825 bytes",
        "~/0.png": "No such",
        "file:///etc/passwd": "No such",
        "http://127.0.0.1:9/0.png": "No such",
        "zip://0.png::/x.zip": "No such",
        "0" * 5000: "too long",
    }
    rows = [{"bytes": None, "path": path} for path in (*good, *wrong)]
    write(root / "x.parquet", pa.array(rows, IMAGE), ["a cat"] * len(rows))
    source = huggingface.open(str(root))
    assert [source[i].image for i in range(len(good))] == IMAGES[:1] * len(good)
    for number, reason in enumerate(wrong.values(), start=len(good)):
        with pytest.raises(BadRecordError, match=reason) as caught:
            source[number]
        assert "\n" not in str(caught.value)


def test_files_of_the_hub_are_read_where_datasets_has_put_them(tmp_path):
    hub, unpacked, other = (tmp_path / name for name in ("datasets--a--b", "extracted", "datasets--a--c"))
    for folder in (hub, unpacked, other):
        folder.mkdir()
        (folder / "0.png").write_bytes(IMAGES[0])
    paths = [f"{hub}/0.png", f"{unpacked}/0.png", f"{other}/0.png", f"{hub}/../{other.name}/0.png", "../0.png"]
    rows = {"image": [{"bytes": None, "path": path} for path in paths], "text": TEXTS}
    table = datasets.Dataset.from_dict(rows)
    source = huggingface.HuggingFace(
        table, roots=(hub, hub, unpacked), parts=(("a/b", 5),), split="train", image_key="image", caption_key="text"
    )
    assert source[0].image == source[1].image == IMAGES[0]
    for number in (2, 3, 4):
        with pytest.raises(BadRecordError, match="names no file inside"):
            source[number]


def test_what_datasets_itself_would_open_is_not_taken(tmp_path):
    outside = tmp_path / "outside.png"
    outside.write_bytes(IMAGES[0])
    rows = pa.array(
        [{"bytes": {"bytes": None, "path": str(outside)}, "path": None}] * 5,
        pa.struct([("bytes", IMAGE), ("path", pa.string())]),
    )
    nested = {
        "image": {"bytes": {"_type": "Image"}, "path": {"dtype": "string", "_type": "Value"}},
        "text": {"dtype": "string", "_type": "Value"},
    }
    table = pa.table({"image": rows, "text": TEXTS})
    (tmp_path / "set").mkdir()
    pq.write_table(
        table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": nested}})}),
        tmp_path / "set/x.parquet",
    )
    with pytest.raises(LcmError, match="^image_key=image: .* not encoded images"):
        huggingface.open(str(tmp_path / "set"))


@pytest.mark.parametrize("name", ["../other/data-00000-of-00001.arrow", "{other}/data-00000-of-00001.arrow", "a/../b"])
def test_a_saved_data_set_names_its_own_files_alone(tmp_path, name):
    saved = datasets.Dataset.from_dict({"image": [{"bytes": p, "path": None} for p in IMAGES], "text": TEXTS})
    saved.save_to_disk(str(tmp_path / "other"))
    datasets.DatasetDict(train=saved).save_to_disk(str(tmp_path / "set"))
    state = tmp_path / "set/train/state.json"
    content = json.loads(state.read_text())
    content["_data_files"][0]["filename"] = name.format(other=tmp_path / "other")
    state.write_text(json.dumps(content))
    with pytest.raises(LcmError, match="which is not in it.*save_to_disk"):
        huggingface.open(str(tmp_path / "set"))
    (tmp_path / "set/dataset_dict.json").write_text(json.dumps({"splits": ["../other"]}))
    with pytest.raises(LcmError, match="names '../other', which is not in it"):
        huggingface.open(str(tmp_path / "set"))


@pytest.mark.parametrize(
    "column, at, value, lost",
    [
        ("image", 1, 2**31 - 1, {0, 1}),
        ("image", 2, -5, {1, 2}),
        ("text", 3, 2**30, {2, 3}),
        ("text", 2, 0, {1}),
        ("image", 4, 2**30, "damaged"),
        ("key", 1, 2**31 - 1, "damaged"),
        ("key", 0, -3, "damaged"),
    ],
)
def test_arrow_offsets_lie_inside_their_bytes(tmp_path, column, at, value, lost):
    values = {
        "image": [bytes([i]) * 900 for i in range(4)],
        "text": [f"{i}" * 77 for i in range(4)],
        "key": [f"{i}" * 13 for i in range(4)],
    }
    rows = {**values, "image": [{"bytes": content, "path": None} for content in values["image"]]}
    datasets.Dataset.from_dict(rows).save_to_disk(str(tmp_path))
    (file,) = tmp_path.glob("*.arrow")
    content, size = bytearray(file.read_bytes()), len(values[column][0])
    start = content.index(struct.pack("<5i", *range(0, 5 * size, size))) + 4 * at
    content[start : start + 4] = struct.pack("<i", value)
    file.write_bytes(content)
    if lost == "damaged":
        with pytest.raises(LcmError, match=f"{tmp_path} is damaged"):
            huggingface.open(str(tmp_path))
        return
    source = huggingface.open(str(tmp_path))
    for number in range(4):
        if number in lost:
            with pytest.raises(BadRecordError, match="damaged|no caption"):
                source[number]
        elif column == "image":
            assert source[number].image == values["image"][number]


def test_pipes_among_the_files_are_not_waited_for(tmp_path):
    write(tmp_path / "a.parquet")
    os.mkfifo(tmp_path / "b.parquet")
    for path in (tmp_path, tmp_path / "*.parquet", tmp_path / "b.parquet"):
        with pytest.raises(LcmError, match="b.parquet is not a regular file"):
            huggingface.open(str(path))


def test_captions_that_are_not_utf8_or_empty(tmp_path):
    raw = b"ab\xff\xfe  "
    offsets = np.array([0, 2, 4, 6, 6], np.int32).tobytes()
    texts = pa.Array.from_buffers(pa.string(), 4, [None, pa.py_buffer(offsets), pa.py_buffer(raw)])
    write(tmp_path / "x.parquet", IMAGES[:4], texts)
    source = huggingface.open(str(tmp_path))
    assert source[0].captions == ("ab",)
    with pytest.raises(BadRecordError, match="UTF-8"):
        source[1]
    for number in (2, 3):
        with pytest.raises(BadRecordError, match="no caption"):
            source[number]


def test_fields(tmp_path):
    write(
        tmp_path / "x.parquet",
        width=pa.array([640, None, 512, 1, 2]),
        score=pa.array([0.5, np.nan, 1, None, 2]),
        nothing=pa.array([None] * 5, pa.int64()),
        title=pa.array(list("abcde")),
        small=pa.array([1] * 5, pa.int8()),
        many=pa.array([[1.0]] * 5),
    )
    source = huggingface.open(str(tmp_path))
    width = source.field("width")
    assert width.dtype == np.float64
    np.testing.assert_array_equal(width, [640, np.nan, 512, 1, 2])
    np.testing.assert_array_equal(source.field("score"), [0.5, np.nan, 1, np.nan, 2])
    assert all(source.field(name) is None for name in ("nothing", "title", "many", "image", "unknown"))
    assert source[0].fields == {"width": 640, "score": 0.5, "small": 1} and source[1].fields == {"small": 1}


def test_keys(tmp_path):
    pictures = [IMAGES[i] for i in (0, 1, 0, 3, 4)]  # of the second "x": the same; of the second "y": another one
    write(tmp_path / "a.parquet", pictures, key=pa.array(["x", "y", "x", None, "y"]), n=pa.array(range(5)))
    source = huggingface.open(str(tmp_path / "a.parquet"))
    assert [source[i].key for i in range(4)] == ["x", "y", "train-000000003", "train-000000004"]
    assert contents(source) == expected([0, 1, 3, 4])
    assert [(f.key, os.path.basename(f.shard)) for f in source.bad_records] == [("x", "a.parquet")]
    np.testing.assert_array_equal(source.field("n"), [0, 1, 3, 4])
    assert source.where(3)[1] == "train-000000004"
    write(tmp_path / "b.parquet", id=pa.array([10, 11, 12, 13, 14]))
    source = huggingface.open(str(tmp_path / "b.parquet"))
    assert [source[i].key for i in range(5)] == ["10", "11", "12", "13", "14"] and source.field("id") is None
    write(tmp_path / "c.parquet", id=pa.array([1, 1, 2, 2, 2]))  # of something else than records: a number like others
    source = huggingface.open(str(tmp_path / "c.parquet"))
    assert len(source) == 5 and not source.bad_records and source[4].key == "train-000000004"
    np.testing.assert_array_equal(source.field("id"), [1, 1, 2, 2, 2])


def test_two_parquet_sets_of_img2dataset(tmp_path):
    """Their columns are found, their keys may be equal, and their failed rows are no bad records."""
    states = ["success", "failed_to_download", "success", "failed_to_resize", None]
    for name, first in (("a", 0), ("b", 1), ("c", 0)):
        pictures = [IMAGES[first + i] if i in (0, 2) else None for i in range(5)]
        keys = [f"{i:09d}" for i in range(5)]
        columns = {"key": keys, "caption": TEXTS, "status": states, "jpg": pa.array(pictures, pa.binary())}
        (tmp_path / name).mkdir()
        pq.write_table(pa.table(columns), tmp_path / name / "0.parquet")
    source = huggingface.open(str(tmp_path))
    names = [source.where(i)[1] for i in range(len(source))]
    nulls = [f"train-{row:09d}" for row in (9, 14)]  # without a status, so bad when they are read
    assert names == ["000000000", "000000002", "000000004", "train-000000005", "train-000000007", *nulls]
    assert [source[i].image for i in (0, 1, 3, 4)] == [IMAGES[i] for i in (0, 2, 1, 3)]
    assert source.notes == ["6 x row without an image, as its status says"]
    assert [(bad.key, os.path.basename(os.path.dirname(bad.shard))) for bad in source.bad_records] == [
        ("000000000", "c"),
        ("000000002", "c"),
    ]


@pytest.mark.parametrize("name", ["[x]", "a*b", "{a,b}", "a::b", "s3:", "%20 #~", "x\ny", os.fsdecode(b"caf\xe9")])
def test_a_path_that_exists_is_no_pattern(tmp_path, name):
    folder, saved = tmp_path / name, tmp_path / f"saved {name}"
    write(tmp_path / "aXb/train.parquet", [b"of another folder"], ["no"])
    write(tmp_path / "x/train.parquet", [b"of another folder"], ["no"])
    folder.mkdir()
    for file in ("train-00000-of-00001.parquet", f"test-{name}.parquet"):
        write(tmp_path / "plain.parquet")
        os.rename(tmp_path / "plain.parquet", folder / file)
    for source in (huggingface.open(str(folder)), huggingface.open(str(folder / f"test-{name}.parquet"))):
        assert contents(source) == expected() and source.where(0)[0].startswith(str(folder))
    assert contents(huggingface.open(str(folder), split="test")) == expected()
    assert contents(huggingface.open(str(folder / "train-*.parquet"))) == expected()
    write(tmp_path / "plain.parquet", IMAGES[:1], TEXTS[:1])  # its state is part of what datasets remembers
    os.replace(tmp_path / "plain.parquet", folder / "train-00000-of-00001.parquet")
    assert contents(huggingface.open(str(folder))) == expected([0])
    rows = {"image": IMAGES, "text": TEXTS}
    datasets.Dataset.from_dict(rows).save_to_disk(str(tmp_path / "plain"))
    os.rename(tmp_path / "plain", saved)
    assert contents(huggingface.open(str(saved))) == expected()


def test_files_without_rows_among_others(tmp_path):
    for number, rows in enumerate((0, 5, 0)):
        write(tmp_path / f"{number:05d}.parquet", IMAGES[:rows], pa.array(TEXTS[:rows], pa.string()))
    source = huggingface.open(str(tmp_path))
    assert contents(source) == expected() and source.where(0)[0] == str(tmp_path / "00001.parquet")


def test_whatever_datasets_raises_is_one_line(tmp_path, capfd):
    odd = {
        "map": pa.table(
            {"image": IMAGES, "text": TEXTS, "m": pa.array([[("a", 1)]] * 5, pa.map_(pa.string(), pa.int8()))}
        ),
        "metadata": pa.table({"image": IMAGES, "text": TEXTS}).replace_schema_metadata({"huggingface": "{bad"}),
        "none": pa.table({"image": pa.array([], pa.binary()), "text": pa.array([], pa.string())}),
        "twice": pa.Table.from_arrays([pa.array(IMAGES), pa.array(TEXTS), pa.array(TEXTS)], ["image", "text", "text"]),
        "nested": pa.table({"image": IMAGES, "text": [[["a"]]] * 5}),
    }
    for name, table in odd.items():
        pq.write_table(table, tmp_path / f"{name}.parquet")
        with pytest.raises(LcmError, match=name if name != "nested" else "holds List, not text") as caught:
            huggingface.open(str(tmp_path / f"{name}.parquet"))
        assert "\n" not in str(caught.value)
    assert "Failed to read" not in capfd.readouterr().err, "the error says it"
    with pytest.raises(BadArgument, match="its parquet files have no rows"):
        huggingface.open(str(tmp_path / "none.parquet"))
    coded = pa.table({"image": pa.array(IMAGES).dictionary_encode(), "text": pa.array(TEXTS).dictionary_encode()})
    pq.write_table(coded, tmp_path / "coded.parquet")
    assert contents(huggingface.open(str(tmp_path / "coded.parquet"))) == expected()


def test_chosen_columns_and_wrong_ones(tmp_path):
    table = pa.table({"jpg": pa.array(IMAGES), "blip": pa.array(TEXTS), "n": pa.array(range(5))})
    pq.write_table(table, tmp_path / "x.parquet")
    path = str(tmp_path / "x.parquet")
    assert contents(huggingface.open(path, image_key="jpg", caption_key="blip")) == expected()
    with pytest.raises(BadArgument, match="^image_key=image: .*jpg, blip, n$"):
        huggingface.open(path, image_key="image")
    with pytest.raises(BadArgument, match="^caption_key=text: .*jpg, blip, n$"):
        huggingface.open(path)
    with pytest.raises(BadArgument, match="^image_key=blip: .* holds string, not encoded images"):
        huggingface.open(path, image_key="blip", caption_key="blip")
    with pytest.raises(BadArgument, match="^caption_key=n: .* holds int64, not text"):
        huggingface.open(path, image_key="jpg", caption_key="n")


def test_what_is_not_a_data_set(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken/x.parquet").write_bytes(b"PAR1 nothing PAR1")
    (tmp_path / "dict").mkdir()
    (tmp_path / "dict/state.json").write_text("{}")
    for name, message in [
        ("empty", "^path=.*no parquet files"),
        ("broken", "^path=.*not all of its files are parquet"),
        ("missing/folder", "^path=.*does not exist"),
        ("no*.parquet", "^path=.*not all of its files"),
        ("dict", "save_to_disk"),
    ]:
        with pytest.raises(LcmError, match=message) as caught:
            huggingface.open(str(tmp_path / name))
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["lambdalabs/pokemon-blip-captions", "pokemon"])
def test_hub_without_network_says_how_to_pass_a_folder(name):
    assert os.environ["HF_HUB_OFFLINE"] == "1"
    with pytest.raises(BadArgument, match=f"^path={name}: .*--local-dir FOLDER.* that FOLDER as the path"):
        huggingface.open(name)


def test_without_the_package(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(LcmError, match="pip install 'lcm_jax.data.'"):
        huggingface.open(str(tmp_path))
