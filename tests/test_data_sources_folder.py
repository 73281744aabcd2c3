"""Folders of images with metadata.jsonl or .txt files; Hugging Face's imagefolder reader is the oracle."""

import io
import json
import os

import datasets
import numpy as np
import pytest
from PIL import Image

from lcm_jax.data.records import BadRecordError
from lcm_jax.data.sources import folder, parsing
from lcm_jax.errors import BadArgument


def png(number):
    stream = io.BytesIO()
    pixels = np.random.default_rng(number).integers(0, 256, (8, 9 + number % 3, 3), np.uint8)
    Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()


def write(root, files):
    """files: name -> bytes, text, or rows of a metadata.jsonl."""
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, list):
            content = "".join(json.dumps(row) + "\n" for row in content)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    return root


def records(source):
    return [source[number] for number in range(len(source))]


def bad_records(source, root):
    return {(bad.shard.removeprefix(str(root)).lstrip("/"), bad.key): bad.reason for bad in source.bad_records}


def test_as_hugging_face_reads_it(tmp_path):
    names = ["a.png", "c.png", "cats/b.png", "cats/tiny/z.png"]
    rows = [
        {
            "file_name": name,
            "text": f"caption of {name}",
            "score": number / 4,
            "width": None,
            "good": number > 1,
            "tag": "x",
        }
        for number, name in enumerate(names)
    ]
    root = write(tmp_path / "set", {name: png(number) for number, name in enumerate(names)})
    write(root, {"metadata.jsonl": rows[2::-1]})
    write(root, {"cats/tiny/metadata.jsonl": [rows[3] | {"file_name": "z.png"}]})
    table = datasets.load_dataset("imagefolder", data_dir=str(root), split="train", cache_dir=str(tmp_path / "cache"))
    theirs = {row["text"]: (row["image"], row["score"]) for row in table}
    source = folder.open(root)
    assert len(theirs) == len(source) == 4 and not source.bad_records
    for number, record in enumerate(records(source)):
        assert record.key == names[number] and record.image == png(number)
        image, score = theirs[record.captions[0]]
        assert np.array_equal(np.asarray(image), np.asarray(Image.open(io.BytesIO(record.image))))
        assert record.fields == {"score": score, "good": number > 1}
        assert source.where(number) == (str(root), names[number])
    np.testing.assert_array_equal(source.field("score"), [0, 0.25, 0.5, 0.75])
    assert source.field("width") is None and source.field("tag") is None and source.field("text") is None


def test_texts_beside(tmp_path):
    root = write(
        tmp_path,
        {
            "b.jpg": b"1",
            "b.txt": "two\n",
            "a.v1.PNG": b"2",
            "a.v1.txt": "\ufeffone",
            "d/c.webp": b"3",
            "d/c.txt": "ünï",
            ".hidden/e.png": b"4",
            ".f.png": b"5",
            "notes.txt": "nothing",
        },
    )
    source = folder.open(root)
    assert [(r.key, r.image, r.captions, dict(r.fields)) for r in records(source)] == [
        ("a.v1.PNG", b"2", ("one",), {}),
        ("b.jpg", b"1", ("two",), {}),
        ("d/c.webp", b"3", ("ünï",), {}),
    ]
    assert not source.bad_records
    for number in (-1, 3):
        with pytest.raises(IndexError):
            source[number]


def test_columns_and_several_captions(tmp_path):
    rows = [
        {"file_name": "a.png", "text": ["one", " two ", ""], "title": "A", "score": 1},
        {"file_name": "b.png", "text": None, "title": "B"},
    ]
    root = write(tmp_path, {"a.png": b"a", "b.png": b"b", "b.txt": "beside", "metadata.jsonl": rows})
    assert [record.captions for record in records(folder.open(root))] == [("one", "two"), ("beside",)]
    assert [record.captions for record in records(folder.open(root, caption_key="title"))] == [("A",), ("B",)]
    assert [record.captions for record in records(folder.open(root, caption_key="txt"))] == [("beside",)]
    np.testing.assert_array_equal(folder.open(root).field("score"), [1, np.nan])
    assert folder.open(root)[1].fields == {}
    with pytest.raises(
        BadArgument,
        match="^caption_key=score: none of 2 images .*a.png: the caption is 1, not text.*'score'.*score, text,",
    ):
        folder.open(root, caption_key="score")


def test_the_nearer_list_counts(tmp_path):
    outer = [{"file_name": "cats/a.png", "text": "outer a"}, {"file_name": "cats/b.png", "text": "outer b"}]
    inner = [{"file_name": "a.png", "text": "inner a"}, {"file_name": "a.png", "text": "again"}]
    root = write(
        tmp_path, {"cats/a.png": b"a", "cats/b.png": b"b", "metadata.jsonl": outer, "cats/metadata.jsonl": inner}
    )
    source = folder.open(root)
    assert [record.captions for record in records(source)] == [("inner a",), ("outer b",)]
    assert bad_records(source, root) == {("cats/metadata.jsonl", "line 2"): "cats/a.png is listed already in this file"}


def test_every_unusable_record_is_listed_with_its_reason(tmp_path):
    lines = [
        '{"file_name": "a.png", "text": "good"}',
        "",
        '{"file_name": "b.png", "text"',
        '{"text": "x"}',
        "[1]",
        '{"file_name": "gone.png", "text": "x"}',
        '{"file_name": "empty.png", "text": "x"}',
        '{"file_name": "blank.png", "text": " "}',
        '{"file_name": "../out.png", "text": "x"}',
    ]
    write(tmp_path, {"out.png": b"x"})
    root = write(tmp_path / "set", {f"{name}.png": b"x" for name in ("a", "b", "blank", "zero", "plain")})
    write(
        root,
        {
            "metadata.jsonl": "\n".join(lines).encode() + b'\n{"file_name": "b.png", "text": "caf\xe9"}\n',
            "empty.png": b"",
            "zero.txt": "",
        },
    )
    (root / "link.png").symlink_to(root / "nowhere.png")
    source = folder.open(root)
    assert [record.key for record in records(source)] == ["a.png"]
    found = bad_records(source, root)
    broken = {line: found.pop(("metadata.jsonl", f"line {line}")) for line in (3, 5, 10)}
    assert all(reason.startswith("its description ") for reason in broken.values()), broken
    assert found == {
        ("metadata.jsonl", "line 4"): "no file_name",
        ("metadata.jsonl", "line 6"): "no image gone.png",
        ("metadata.jsonl", "line 9"): "no image ../out.png",
        ("", "b.png"): "no caption",
        ("", "blank.png"): "no caption: its text is empty",
        ("", "empty.png"): "image of 0 bytes",
        ("", "link.png"): "the link is broken",
        ("", "plain.png"): "no caption",
        ("", "zero.png"): "no caption: its text is empty",
    }


def test_what_only_reading_shows(tmp_path):
    files = {"a.png": b"x", "a.txt": b"caf\xe9", "b.png": b"x", "b.txt": " \n", "c.png": b"x", "c.txt": "fine"}
    source = folder.open(write(tmp_path, files))
    assert len(source) == 3 and not source.bad_records
    (tmp_path / "c.png").unlink()
    for number, reason in enumerate(("not UTF-8", "its text is empty", "c.png cannot be read")):
        with pytest.raises(BadRecordError, match=reason):
            source[number]


def test_only_regular_files_of_a_bounded_size_are_read(tmp_path, monkeypatch):
    files = {f"{name}.{end}": b"x" for name in "abc" for end in ("png", "txt")}
    source = folder.open(write(tmp_path, files))
    (tmp_path / "a.png").unlink()
    os.mkfifo(tmp_path / "a.png")
    (tmp_path / "b.png").unlink()
    (tmp_path / "b.png").symlink_to("/dev/zero")
    (tmp_path / "c.png").write_bytes(bytes(9))
    monkeypatch.setattr(parsing, "MAX_BYTES", 8)
    for number, reason in enumerate(("a.png is no", "b.png is no", "c.png has 9 bytes, but at most 8 are read")):
        with pytest.raises(BadRecordError, match=reason):
            source[number]


def test_folders_that_cannot_be_used(tmp_path):
    with pytest.raises(BadArgument, match="^path=.*nowhere: not a folder"):
        folder.open(tmp_path / "nowhere")
    write(tmp_path, {"x/a.txt": "a", "x/b.dat": "b", "y/a.png": b"a", "y/b.png": b"b"})
    with pytest.raises(BadArgument, match=r"^path=.*x: the folder holds no images \(jpg .*\), but 2 other files"):
        folder.open(tmp_path / "x")
    with pytest.raises(
        BadArgument,
        match="^caption_key=None: none of 2 images .*y is usable; the first: .*a.png: no caption.*'text' of "
        "metadata.jsonl or the .txt beside .*: none",
    ):
        folder.open(tmp_path / "y")
