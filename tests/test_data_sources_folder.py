"""Folders of images with metadata.jsonl or .txt files; Hugging Face's imagefolder reader is the oracle."""

import io
import json
import os

import datasets
import numpy as np
import pytest
from image_kit import encoded, noise
from PIL import Image

from lcm_jax.data import filters, images
from lcm_jax.data.records import BadRecord, BadRecordError
from lcm_jax.data.sources import folder, parsing
from lcm_jax.errors import BadArgument


def png(number):
    return encoded(noise(8, 9 + number % 3, seed=number))


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
    assert not source.bad_records and folder.open(root, caption_key=".TXT").digest() == source.digest()
    for number in (-1, 3):
        with pytest.raises(IndexError):
            source[number]


def test_the_numbers_of_many_names_that_most_images_have_are_known(tmp_path):
    rows = [{"file_name": f"{n}.png", "text": "a", "score": n} for n in range(3)]
    rows[0] |= {f"a{n}": n for n in range(1000)}
    source = folder.open(write(tmp_path, {f"{n}.png": b"a" for n in range(3)} | {"metadata.jsonl": rows}))
    np.testing.assert_array_equal(source.field("score"), [0, 1, 2])
    assert len(source[0].fields) == parsing.MAX_FIELDS and source[1].fields == {"score": 1}
    assert source.notes == ("873 of 1001 numbers, those that the fewest records have",)


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
        "metadata.jsonl or metadata.csv, or the .txt, .caption or .text beside .*: none",
    ):
        folder.open(tmp_path / "y")


def test_every_suffix_of_the_decoders_formats_is_an_image(tmp_path):
    Image.init()
    theirs = {suffix[1:] for suffix, form in Image.registered_extensions().items() if form in images.FORMATS}
    assert theirs | {"mpo"} <= set(images.SUFFIXES)
    forms = {"a.avif": "AVIF", "b.jfif": "JPEG", "c.JPE": "JPEG", "d.jp2": "JPEG2000", "e.J2K": "JPEG2000"}
    forms |= {"f.ppm": "PPM", "g.apng": "PNG", "h.mpo": "MPO", "i.TIF": "TIFF", "j.dib": "BMP", "k.webp": "WEBP"}
    options = {"AVIF": {"speed": 10}, "MPO": {"append_images": [Image.new("RGB", (4, 4))]}}
    for name, form in forms.items():
        image = encoded(Image.new("RGB", (9, 8), "red"), form, **options.get(form, {}))
        write(tmp_path, {name: image, name[0] + ".txt": form})
    found = records(folder.open(tmp_path))
    assert [(record.key, record.captions) for record in found] == [(name, (form,)) for name, form in forms.items()]
    for record in found:
        pixels = images.decode(record.image)
        assert pixels.shape == (8, 9, 3) and abs(pixels.astype(int) - [255, 0, 0]).max() < 6


def test_what_is_left_out_is_counted(tmp_path):
    files = {"a.png": b"a", "a.txt": "x", "b.heic": b"b", "d/c.heic": b"c", "e.jxl": b"e", "0001": b"f", "g.txt": "g"}
    files |= {".h.png": b"h", ".i/j.png": b"j", "a.json": "{}", "metadata.csv": "file_name,text\n"}
    write(tmp_path / "set", files)
    os.mkfifo(tmp_path / "set/pipe.png")
    (tmp_path / "set/again").symlink_to(tmp_path / "set", target_is_directory=True)
    (tmp_path / "set/self.png").symlink_to("self.png")
    source = folder.open(tmp_path / "set")
    assert [record.key for record in records(source)] == ["a.png"]
    assert source.notes == (
        "2 hidden files or folders, as .h.png",
        "1 link to a folder that is read already, as again",
        "1 text without an image, as g.txt",
        "4 files of unknown kind (.heic .jxl no suffix)",
    )
    assert [str(bad) for bad in source.bad_records] == [
        f"{tmp_path}/set: pipe.png: not a regular file",
        f"{tmp_path}/set: self.png: the link is broken",
    ]
    (tmp_path / "set/self.png").unlink()
    source = folder.open(tmp_path / "set")
    _, report = filters.apply(source, ())
    assert report.line().startswith("1 records, 1 more are unusable; not used: 2 hidden files or folders, as .h.png, ")
    (tmp_path / "set/a.png").unlink()
    with pytest.raises(BadArgument, match="caption_key=None: none of 1 .*not used: .*5 files of unknown kind"):
        folder.open(tmp_path / "set")
    (tmp_path / "set/pipe.png").unlink()
    with pytest.raises(BadArgument, match=r"holds no images .*, but 8 other files; not used: .*\.jxl"):
        folder.open(tmp_path / "set")


def test_linked_folders_are_read(tmp_path):
    write(tmp_path, {"other/b.png": b"b", "other/sub/c.png": b"c", "set/a.png": b"a", "set/x/d.png": b"d"})
    texts = {"other/b.txt": "B", "other/sub/c.txt": "C", "set/a.txt": "A", "set/x/d.txt": "D"}
    write(tmp_path, texts)
    links = {"set/linked": "other", "other/back": "set", "set/again": "set/x", "other/sub/loop": "other/sub"}
    for name, target in links.items():
        (tmp_path / name).symlink_to(tmp_path / target, target_is_directory=True)
    source = folder.open(tmp_path / "set")
    assert [(r.key, r.captions) for r in records(source)] == [
        ("a.png", ("A",)),
        ("linked/b.png", ("B",)),
        ("linked/sub/c.png", ("C",)),
        ("x/d.png", ("D",)),
    ]
    assert source.notes == ("3 links to folders that are read already, as again",)


def test_names_of_all_kinds(tmp_path):
    """Capitals, one text for two images, bytes that are not UTF-8, line breaks."""
    odd = os.fsdecode(b"caf\xe9")
    files = {"A.JPG": b"1", "A.TXT": "one", "B.Jpeg": b"2", "B.png": b"3", "B.txt": "two", "C.png": b"4"}
    files |= {"c.txt": "another", "C.TXT": "no", "C.txt": "yes", f"{odd}.png": b"5", f"{odd}.txt": "five"}
    files |= {"x\ny.png": b"6", f"{odd}2.png": b"", "metadata.jsonl": [{"file_name": "x\ny.png", "text": "six"}]}
    source = folder.open(write(tmp_path, files))
    assert [(r.key, r.image, r.captions[0]) for r in records(source)] == [
        ("A.JPG", b"1", "one"),
        ("B.Jpeg", b"2", "two"),
        ("B.png", b"3", "two"),
        ("C.png", b"4", "yes"),
        ("caf\\xe9.png", b"5", "five"),
        ("x\ny.png", b"6", "six"),
    ]
    (bad,) = source.bad_records
    assert str(bad) == f"{tmp_path}: caf\\xe92.png: image of 0 bytes" and json.dumps(bad.key).isascii()
    assert str(BadRecord("a", source.where(5)[1], "\x1b[31m")) == "a: x\\ny.png: \\x1b[31m"


def test_texts_and_json_beside_images(tmp_path):
    """.caption as kohya's scripts have it, .json as img2dataset's files."""
    about = {"caption": "from json", "width": 640, "title": "T", "status": "success"}
    files = {f"{name}.jpg": b"x" for name in "abcdef"}
    files |= {"a.caption": "from caption", "b.text": "from text", "c.caption": "no", "c.txt": "first", "f.json": "[1]"}
    files |= {"d.json": json.dumps(about), "e.json": json.dumps(about), "e.txt": "beside", "f.txt": "has one"}
    root = write(tmp_path, files)
    source = folder.open(root)
    found = {record.key[0]: record.captions[0] for record in records(source)}
    assert found == {"a": "from caption", "b": "from text", "c": "first", "d": "from json", "e": "beside"}
    np.testing.assert_array_equal(source.field("width"), [np.nan] * 3 + [640] * 2)
    (bad,) = source.bad_records
    assert bad.key == "f.jpg" and "holds a list, not a JSON object" in bad.reason and not source.notes
    for key, captions in {
        "caption": "from caption,no,from json,from json",
        "title": "T,T",
        "txt": "first,beside,has one",
    }.items():
        found = [record.captions[0] for record in records(folder.open(root, caption_key=key))]
        assert found == captions.split(","), key


def test_a_list_in_csv(tmp_path):
    lines = [
        b"\xef\xbb\xbffile_name,text,score,tag",
        b'a.png,"one, and ""two""\nin two lines",0.5,x',
        b"b.png,caf\xe9,1,y",
        b"c.png,a cat, sitting,2,z",
        b"",
        b"gone.png,x,1,z",
        b"d.png,1984,nan,7",
        b"d.png,again,1,7",
        b'e.png,"not closed,1,7',
    ]
    root = write(tmp_path, {f"{name}.png": b"x" for name in "abcd"} | {"metadata.csv": b"\r\n".join(lines)})
    source = folder.open(root)
    assert [(r.key, r.captions, dict(r.fields)) for r in records(source)] == [
        ("a.png", ('one, and "two"\nin two lines',), {"score": 0.5}),
        ("d.png", ("1984",), {"tag": 7}),
    ]
    assert bad_records(source, root) == {
        ("metadata.csv", "line 5"): "5 cells under 4 columns; quote its texts",
        ("metadata.csv", "line 7"): "no image gone.png",
        ("metadata.csv", "line 9"): "d.png is listed already in this file",
        ("metadata.csv", "line 10"): "not valid CSV (unexpected end of data)",
        ("", "b.png"): "the caption has '\\udce9', which no UTF-8 text can have",
        ("", "c.png"): "no caption",
    }
    for content, reason in {
        "file_name;text\n": "no column file_name, but file_name;text; separate them by commas",
        "file_name,text\n".encode("utf-16"): "the file is UTF-16; save it as UTF-8",
    }.items():
        write(root, {"metadata.csv": content, "a.txt": "a"})
        assert bad_records(folder.open(root), root)["metadata.csv", "line 1"] == reason


def test_lists_and_texts_of_odd_encodings_and_sizes(tmp_path, monkeypatch):
    monkeypatch.setattr(parsing, "MAX_TEXT", 200)
    lines = [
        '\ufeff{"file_name": "a.png", "text": "one\u2028\u0085two"}',
        '{"file_name": "b.png", "text": "' + "x" * 500 + '"}',
    ]
    lines += [
        '{"file_name": "c.png", "text": "\\ud800"}',
        '{"file_name": "d.png", "text": "\\ud83d\\ude00"}',
        "[" * 150,
    ]
    lines += [
        '{"file_name": "\\ud800", "text": "x"}',
        '{"file_name": "e.png\\u0000", "text": "x"}',
        '{"file_name": "/a.png"}',
    ]
    root = write(tmp_path, {f"{name}.png": b"x" for name in "abcdefg"} | {"metadata.jsonl": "\n".join(lines)})
    write(root, {"e.txt": "x" * 201, "f.txt": "five".encode("utf-16"), "metadata.parquet": b"PAR1"})
    write(root, {"g.txt": "\ufeffsix".encode(), "h.png": b"x", "h.txt": "seven".encode("utf-16-le")})
    source = folder.open(root)
    assert source.notes == ("metadata.parquet (write it as metadata.jsonl)",)
    assert source[0].captions == ("one\u2028\u0085two",) and source[1].captions == ("\U0001f600",)
    assert source[4].captions == ("six",)
    for number, reason in {
        2: "has 201 bytes, but at most 200 are read",
        3: "the caption is UTF-16; save it as UTF-8",
        5: "the caption has a zero byte; save it as UTF-8 text",
    }.items():
        with pytest.raises(BadRecordError, match=reason):
            source[number]
    found = bad_records(source, root)
    assert found["metadata.jsonl", "line 2"] == "a line of more than 200 bytes"
    assert found["", "c.png"] == "the caption has '\\ud800', which no UTF-8 text can have"
    assert found["", "b.png"] == "no caption" and found["metadata.jsonl", "line 7"] == r"no image e.png\x00"
    assert {f"line {n}" for n in (5, 6, 7, 8)} <= {key for _, key in found}
    assert all(str(bad).isprintable() for bad in source.bad_records)
