"""Tar shards as img2dataset writes them: read, damaged, repeated; indexed once, by two processes, in parts."""

import gzip
import io
import json
import os
import pickle
import subprocess
import sys
import tarfile

import datasets
import numpy as np
import pytest
from data_kit import write_tar
from image_kit import encoded, noise

from lcm_jax.data.records import BadRecordError
from lcm_jax.data.sources import parsing, tar_index, webdataset
from lcm_jax.errors import BadArgument, LcmError


def image(number, form="JPEG"):
    return encoded(noise(9 + number % 5, 12, seed=number), form)


def members(number, suffix="jpg", **changes):
    """[(name, content)] of one record as img2dataset lays it out; a change of None leaves the member out."""
    caption, key = f"caption {number}, ünïcode", f"{number:09d}"
    metadata = {
        "caption": caption,
        "url": f"https://x/{number}",
        "key": key,
        "status": "success",
        "error_message": None,
        "width": 12,
        "height": 9 + number % 5,
        "original_width": 100 + number,
        "original_height": 90,
        "nsfw": number % 2 == 0,
        "pwatermark": number / 100 if number % 3 else None,
        "sha256": "0" * 64,
    }
    contents = {suffix: image(number), "json": json.dumps(metadata, indent=4).encode(), "txt": caption.encode()}
    contents |= changes
    return [(f"{key}.{end}", content) for end, content in contents.items() if content is not None]


def shard(path, numbers, **changes):
    return write_tar(path, [entry for number in numbers for entry in members(number, **changes)])


def without_end(path, number):
    """The bytes of one record's members, without what ends a tar."""
    with tarfile.open(shard(path, [number])) as tar:
        last = tar.getmembers()[-1]
    return path.read_bytes()[: last.offset_data + -(-last.size // 512) * 512]


def keys(source):
    return [source.where(number)[1] for number in range(len(source))]


def reasons(source):
    return {bad.key: bad.reason for bad in source.bad_records}


def sidecars(folder):
    return {path.name: path.read_bytes() for path in folder.rglob("*.index.npz")}


def offset_of(path, name):
    with tarfile.open(path) as tar:
        return tar.getmember(name).offset


def test_read_back_equal(tmp_path):
    for part in range(3):
        shard(tmp_path / f"{part:05d}.tar", range(part * 10, part * 10 + 10))
    source = webdataset.open(tmp_path)
    assert len(source) == 30 and not source.bad_records
    for number in range(30):
        record = source[number]
        assert record.key == f"{number:09d}" and record.image == image(number)
        assert record.captions == (f"caption {number}, ünïcode",)
        expected = {
            "width": 12,
            "height": 9 + number % 5,
            "original_width": 100 + number,
            "original_height": 90,
            "nsfw": number % 2 == 0,
        }
        assert record.fields == expected | ({"pwatermark": number / 100} if number % 3 else {})
        assert source.where(number) == (str(tmp_path / f"{number // 10:05d}.tar"), record.key)
    for number in (-1, 30):
        with pytest.raises(IndexError):
            source[number]


def test_field(tmp_path):
    shard(tmp_path / "a.tar", range(4))
    shard(tmp_path / "b.tar", range(4, 6), json=json.dumps({"caption": "c", "score": 7, "big": 10**400}).encode())
    source = webdataset.open(tmp_path)
    np.testing.assert_array_equal(source.field("pwatermark"), [np.nan, 0.01, 0.02, np.nan, np.nan, np.nan])
    np.testing.assert_array_equal(source.field("score"), [np.nan] * 4 + [7, 7])
    np.testing.assert_array_equal(source.field("big"), [np.nan] * 4 + [np.inf] * 2)
    np.testing.assert_array_equal(source.field("nsfw"), [1, 0, 1, 0, np.nan, np.nan])
    assert source.field("width").dtype == np.float64 and source.field("nothing") is None
    assert source.field("caption") is None and source.field("error_message") is None, "texts and null are no numbers"


def test_a_caption_of_any_length_is_one_bad_record(tmp_path):
    long = "x " * (parsing.MAX_CAPTION // 2) + "xx"
    shard(tmp_path / "a.tar", range(1), txt=long.encode())
    shard(tmp_path / "b.tar", range(1, 2), txt=long[:-2].encode())
    source = webdataset.open(tmp_path)
    assert len(source) == 1 and source[0].captions == (long[:-3],), "without white space"
    assert [bad.reason for bad in source.bad_records] == ["the caption has 100002 characters, at most 100000 are read"]


def test_the_numbers_of_many_names_that_most_records_have_are_known(tmp_path):
    """Else one description of 16 MB would take 8 bytes of every record for each of a million names."""

    def description(names):
        return json.dumps({"caption": "c", "width": 5, **dict.fromkeys(names, 1)}).encode()

    many = members(0, json=description(f"a{n:03d}" for n in range(1000)))
    write_tar(tmp_path / "a.tar", [*many, *(entry for number in range(1, 4) for entry in members(number))])
    shard(tmp_path / "b.tar", range(4, 6), json=description(f"b{n:03d}" for n in range(100)))
    source = webdataset.open(tmp_path)
    np.testing.assert_array_equal(source.field("width"), [5, 12, 12, 12, 5, 5])
    known = [source.field(f"a{n:03d}") is not None for n in range(1000)]
    assert 0 < sum(known) <= parsing.MAX_FIELDS and source.field("b099") is not None
    assert len(source[0].fields) <= parsing.MAX_FIELDS
    assert any("878 x number that few records have in the tars" in note for note in source.notes)
    assert any("numbers, those that the fewest records have" in note for note in source.notes)


def test_groups_members_as_hugging_face_does(tmp_path):
    entries = [
        ("a/b.c/0001.jpg", image(1)),
        ("a/b.c/0001.txt", b"one"),
        ("x/0001.jpg", image(2)),
        ("x/0001.txt", b"two"),
        ("0001.jpg", image(3)),
        ("0001.txt", b"three"),
    ]
    path = write_tar(tmp_path / "a.tar", entries)
    table = datasets.load_dataset("webdataset", data_files=str(path), split="train", cache_dir=str(tmp_path / "cache"))
    theirs = table.cast_column("jpg", datasets.Image(decode=False))
    source = webdataset.open(path)
    assert [(row["__key__"], row["jpg"]["bytes"], row["txt"]) for row in theirs] == [
        (record.key, record.image, record.captions[0]) for record in map(source.__getitem__, range(len(source)))
    ]


@pytest.mark.parametrize("suffix", ["png", "JPEG", "webp", "Tif", "avif", "jfif", "jp2", "apng"])
def test_suffixes_of_images(tmp_path, suffix):
    source = webdataset.open(shard(tmp_path / "a.tar", [1], jpg=None, **{suffix: b"image"}))
    assert source[0].image == b"image"


def test_image_key_chooses(tmp_path):
    path = shard(tmp_path / "a.tar", [1], png=b"png", webp=b"webp")
    first = webdataset.open(path)
    assert first[0].image == image(1)
    assert sorted(bad.reason.split(";")[0] for bad in first.bad_records) == [
        f"a second image, .{s}" for s in ("png", "webp")
    ]
    chosen = webdataset.open(path, image_key="webp")  # another key: another index
    assert chosen[0].image == b"webp" and not chosen.bad_records
    with pytest.raises(LcmError, match=r"^image_key=gif: no images in .*a\.tar: it holds \.jpg .*none of gif; "):
        webdataset.open(path, image_key="gif")


def test_captions(tmp_path):
    metadata = {"caption": " from json ", "all": ["one", "", "two "], "number": 3, "width": 5}
    path = shard(tmp_path / "a.tar", range(2), json=json.dumps(metadata).encode())
    without = members(1, txt=None, json=json.dumps(metadata).encode())
    write_tar(tmp_path / "b.tar", [(name.replace("00000000", "1"), content) for name, content in without])
    assert webdataset.open(path)[0].captions == ("caption 0, ünïcode",)
    assert webdataset.open(tmp_path / "b.tar")[0].captions == ("from json",)
    assert webdataset.open(tmp_path, caption_key="caption")[0].captions == ("from json",)
    assert webdataset.open(tmp_path, caption_key="all")[2].captions == ("one", "two")
    assert webdataset.open(path, caption_key="txt")[1].captions == ("caption 1, ünïcode",)
    with pytest.raises(LcmError, match=r"^path=.*: no usable record in 2 .*the caption is 3, not text"):
        webdataset.open(tmp_path, caption_key="number")
    words = r"^caption_key=TEXT: no captions in .*a\.tar: it holds \.jpg \.json \.txt, but nowhere 'TEXT'; "
    with pytest.raises(BadArgument, match=words):
        webdataset.open(tmp_path, caption_key="TEXT")
    assert webdataset.open(tmp_path)[0].captions == ("caption 0, ünïcode",), "the index for other keys is replaced"


def test_captions_in_members_of_any_suffix(tmp_path):
    entries = [("1.jpg", b"1"), ("1.caption", b"kohya"), ("2.jpg", b"2"), ("2.text", b"text"), ("3.jpg", b"3")]
    entries += [("3.blip.txt", b"three"), ("3.TXT", b"first"), ("3.json", b'{"caption": "json", "blip": 1}')]
    entries += [("4.jpg", b"4"), ("4.txt", b"\xff\xfex\0")]
    path = write_tar(tmp_path / "a.tar", entries)
    for key, captions in {
        None: {"1": "kohya", "2": "text", "3": "first"},
        "caption": {"1": "kohya", "3": "json"},
        ".blip.TXT": {"3": "three"},
        "text": {"2": "text"},
    }.items():
        source = webdataset.open(path, caption_key=key)
        assert {source[i].key: source[i].captions[0] for i in range(len(source))} == captions
    assert reasons(webdataset.open(path)) == {"4": "the caption is UTF-16; save it as UTF-8"}


def test_members_that_are_not_used_are_counted(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name in ("d", "1.jpg", "1.txt", "2.jpg", "3.jpg", "README", "._1.jpg"):
            info = tarfile.TarInfo(name)
            content = b"" if name == "d" else b"x"
            info.type, info.size = {"d": tarfile.DIRTYPE, "2.jpg": tarfile.LNKTYPE}.get(name, b"0"), len(content)
            info.size = 0 if name == "2.jpg" else info.size
            tar.addfile(info, io.BytesIO(content))
    for _ in range(2):
        source = webdataset.open(tmp_path)
        wanted = ("1 x file without a suffix in the tars", "1 x hidden file in the tars", "1 x link in the tars")
        assert keys(source) == ["1"] and source.notes == wanted
    (tmp_path / "empty").mkdir()
    with pytest.raises(LcmError, match=r"^path=\S+/empty: no tar shard matches it$"):
        webdataset.open(f"{tmp_path}/{{.,empty}}")
    (tmp_path / "a.tar").rename(tmp_path / "a.tar.gz")
    write_tar(tmp_path / "deep/1/a.tar", members(0))
    with pytest.raises(
        LcmError, match=r"no tar shard matches it, but some are below it; give .*/deep/\*\*/\*\.tar$"
    ) as caught:
        webdataset.open(tmp_path / "deep")
    assert len(webdataset.open(str(caught.value).partition("give ")[2])) == 1
    with pytest.raises(LcmError, match=r"index_dir=.*: the index a\.tar\.\w+\.index\.npz .* \(File exists\)"):
        webdataset.open(tmp_path / "deep/1", index_dir=tmp_path / "deep/1/a.tar")
    with pytest.raises(LcmError, match="no tar shard matches it, but 1 as a.tar.gz; unpack them to .tar"):
        webdataset.open(tmp_path)


def test_tar_without_captions(tmp_path):
    shard(tmp_path / "a.tar", range(3))
    shard(tmp_path / "b.tar", range(3, 6), txt=None, json=None)
    words = r"^caption_key=None: no captions in .*b\.tar: it holds \.jpg, but nowhere a \.txt"
    with pytest.raises(BadArgument, match=words):
        webdataset.open(tmp_path)


def test_every_unusable_record_is_listed_with_its_reason(tmp_path):
    broken = {
        1: {"jpg": b""},
        2: {"txt": b""},
        3: {"txt": b" \n"},
        4: {"txt": b"caf\xe9"},
        5: {"jpg": None},
        6: {"txt": None, "json": None},
        7: {"json": b"{"},
        8: {"json": b"[1]"},
        9: {"jpg": None, "jqg": b"x"},
    }
    entries = [entry for number in range(11) for entry in members(number, **broken.get(number, {}))]
    entries += [("README", b"no suffix"), ("._000000001.jpg", b"hidden"), ("notes.md", b"no record")]
    source = webdataset.open(write_tar(tmp_path / "a.tar", entries))
    assert keys(source) == ["000000000", "000000010"]
    found = reasons(source)
    assert found["000000001"] == "image of 0 bytes"
    assert found["000000002"].startswith("no caption") and found["000000003"].startswith("no caption")
    assert found["000000004"] == "the caption is not UTF-8 (byte 3)"
    assert found["000000005"] == "no image among its members (.json .txt)"
    assert found["000000006"] == "no caption"
    assert "not valid JSON" in found["000000007"] and "holds a list, not a JSON object" in found["000000008"]
    assert found["000000009"] == "no image among its members (.jqg .json .txt)"
    assert found["notes"] == "no image among its members (.md)"
    assert len(found) == 10 and {bad.shard for bad in source.bad_records} == {str(tmp_path / "a.tar")}


def test_equal_keys_are_one_record_only_if_their_images_are_equal(tmp_path):
    """Two downloads of img2dataset number their records alike; one that was copied twice has equal images."""
    for name, numbers in (("a", range(3)), ("b", range(10, 13))):
        entries = [(f"{i}{key[9:]}", content) for i, n in enumerate(numbers) for key, content in members(n, json=b"{}")]
        write_tar(tmp_path / name / "0.tar", entries)
    write_tar(tmp_path / "c" / "0.tar", [("1.jpg", image(1)), ("1.txt", b"again")])
    for _ in range(2):  # made, and read back
        source = webdataset.open(f"{tmp_path}/{{a,b,c}}/0.tar")
        assert keys(source) == ["0", "1", "2", "0#2", "1#2", "2#2"] == [source[i].key for i in range(6)]
        assert [source[i].image for i in range(6)] == [image(n) for n in (0, 1, 2, 10, 11, 12)]
        assert [str(bad) for bad in source.bad_records] == [
            f"{tmp_path}/c/0.tar: 1: its key and image occur already in {tmp_path}/a/0.tar"
        ]
    pickled = pickle.loads(pickle.dumps(source))
    assert pickled.where(4) == (f"{tmp_path}/b/0.tar", "1#2") and pickled[4].captions == source[4].captions


def test_equal_keys_in_one_shard(tmp_path):
    again = members(1, jpg=b"another", txt=b"another")
    first = write_tar(tmp_path / "a.tar", members(1) + [("000000001.jpg", b"at once")] + members(2) + again)
    second = write_tar(tmp_path / "b.tar", members(3) + again)
    source = webdataset.open([first, second])
    assert keys(source) == ["000000001", "000000002", "000000001#2", "000000003"]
    assert source[0].image == image(1) and source[2].image == b"another"
    repeated = f"its key and image occur already in {first}"
    assert [(bad.shard, bad.reason) for bad in source.bad_records] == [
        (str(first), "no caption"),
        (str(second), repeated),
    ]
    np.testing.assert_array_equal(source.field("original_width"), [101, 102, 101, 103])
    assert source.where(3) == (str(second), "000000003")


def test_members_of_several_records_of_one_key_are_not_mixed(tmp_path):
    """As of two downloads that are numbered alike, packed into one tar without their folders."""
    text_alone = [("1.txt", b"lost its image"), *members(2), ("1.jpg", b"b"), ("1.txt", b"of b"), ("1.json", b"{}")]
    by_suffix = [("1.jpg", b"a"), ("2.jpg", b"c"), ("1.txt", b"of a"), ("2.txt", b"of c")]
    sorted_twice = [*by_suffix, ("1.jpg", b"b"), ("3.jpg", b"d"), ("1.txt", b"of b"), ("3.txt", b"of d")]
    mixed = [("1.jpg", b"a"), ("2.jpg", b"c"), ("1.jpg", b"b"), ("2.txt", b"of c"), ("1.txt", b"?"), ("1.txt", b"?")]
    wanted = {
        "text_alone": {"000000002": (image(2), "caption 2, ünïcode"), "1": (b"b", "of b")},
        "sorted_twice": {"1": (b"a", "of a"), "2": (b"c", "of c"), "1#2": (b"b", "of b"), "3": (b"d", "of d")},
        "mixed": {"2": (b"c", "of c")},
    }
    for name, entries in {"text_alone": text_alone, "sorted_twice": sorted_twice, "mixed": mixed}.items():
        source = webdataset.open(write_tar(tmp_path / f"{name}.tar", entries))
        records = map(source.__getitem__, range(len(source)))
        assert {record.key: (record.image, record.captions[0]) for record in records} == wanted[name]
    assert [bad.reason.split(",")[0] for bad in source.bad_records] == [
        "no caption",
        "several records have this key",
        "no image among its members (.txt)",
    ]


def test_keys_of_equal_hashes_are_two_records(tmp_path):
    path = shard(tmp_path / "a.tar", range(4))
    index = tar_index.scan(path)
    index.hashes[:] = 7
    source = webdataset.TarSource([path], [index])
    assert len(source) == 4 and not source.bad_records


def test_a_shard_is_read_once(tmp_path):
    path = shard(tmp_path / "x" / "a.tar", range(3))
    shard(tmp_path / "y" / "a.tar", range(3, 5))
    (tmp_path / "link.tar").symlink_to(path)
    named = [path, str(path), tmp_path / "x" / ".." / "x" / "a.tar", tmp_path / "link.tar", tmp_path / "y"]
    assert webdataset.find_shards(named) == [path, tmp_path / "y" / "a.tar"]
    assert keys(webdataset.open(named)) == [f"{number:09d}" for number in range(5)]


def test_index_dir_keeps_equal_names_apart(tmp_path):
    shard(tmp_path / "x" / "a.tar", range(3))
    shard(tmp_path / "y" / "a.tar", range(3, 5))
    for _ in range(2):
        source = webdataset.open(f"{tmp_path}/{{x,y}}/a.tar", index_dir=tmp_path / "new" / "indices")
        assert len(source) == 5
    assert len(sidecars(tmp_path / "new" / "indices")) == 2 == len(sidecars(tmp_path))


def test_names_of_shards(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a/00000.tar", "a/00001.tar", "a/00002.tar", "b/00001.tar", "b/odd,{1..2}.tar", "b/x.zip"):
        write_tar(tmp_path / name, [])

    def names(path):
        return [str(found.relative_to(tmp_path)) for found in webdataset.find_shards(path)]

    assert names("a/{00000..00001}.tar") == ["a/00000.tar", "a/00001.tar"]
    assert names("{a,b}/{00001..00001}.tar") == ["a/00001.tar", "b/00001.tar"]
    assert names("{b,a}/0000[12].tar, a/00000.tar") == ["b/00001.tar", "a/00001.tar", "a/00002.tar", "a/00000.tar"]
    assert names("b") == ["b/00001.tar", "b/odd,{1..2}.tar"] and names("b/odd,{1..2}.tar") == ["b/odd,{1..2}.tar"]
    assert names("**/00001.tar") == ["a/00001.tar", "b/00001.tar"]
    assert names(["a", "{a,b}"]) == ["a/00000.tar", "a/00001.tar", "a/00002.tar", "b/00001.tar", "b/odd,{1..2}.tar"]
    for path, message in {
        "c/*.tar": r"^path=c/\*\.tar: no tar shard matches it",
        "nowhere": "^path=nowhere: no tar shard 'nowhere'$",
        "a/{00001..00004}.tar": r"no tar shard 'a/00003\.tar' \(2 of 4 files are missing",
        "s3://bucket/{0..9}.tar": "from disks only",
        "pipe:cat x": "from disks only",
        "": "no tar shard",
    }.items():
        with pytest.raises(LcmError, match=message):
            webdataset.find_shards(path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(LcmError, match="^path=empty: no tar shard matches it"):
        webdataset.find_shards("empty")
    with pytest.raises(LcmError, match="names no tar shards"):
        webdataset.find_shards([])


def test_a_path_that_exists_is_no_pattern(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("[a]", "a*", "{a,b}", "s3:", "pipe:a", "a, b", "~", os.fsdecode(b"\xe9")):
        shard(tmp_path / name / "x.tar", [1])
        for path in (name, f"{name}/x.tar", str(tmp_path / name), f"{name}/*.tar", str(tmp_path / name / "?.tar")):
            assert webdataset.find_shards(path) == [tmp_path / name / "x.tar"]
    assert len(webdataset.open("s3://x.tar")) == 1


def test_what_the_webdataset_package_writes(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "torch", None)  # it needs none to write, and takes seconds to import it
        import webdataset as wds
    with wds.ShardWriter(f"{tmp_path}/set-%03d.tar", maxcount=2, verbose=0) as writer:
        for number in range(3):
            writer.write(
                {"__key__": f"a/b{number}", "jpg": image(number), "json": {"caption": f"c{number}", "n": number}}
            )
    with wds.TarWriter(str(tmp_path / "set-9.tar"), encoder=False) as writer:
        writer.write({"__key__": "ü" * 120, "png": image(9, "PNG"), "cls": b"7", "caption.txt": b"long name"})
    source = webdataset.open(f"{tmp_path}/set-00{{0..1}}.tar")
    assert [(r.key, r.captions, r.fields) for r in map(source.__getitem__, range(3))] == [
        (f"a/b{number}", (f"c{number}",), {"n": number}) for number in range(3)
    ]
    (record,) = webdataset.open(tmp_path / "set-9.tar", caption_key="caption.txt")
    assert (record.key, record.image, record.captions) == ("ü" * 120, image(9, "PNG"), ("long name",))


BRACES = """a{0..3}b {00..11} {8..12..2} {3..1} {-1..1} {09..10}{a,b} {a,b{1..2},{x,{y,z}}w}.tar {a} {a{b,c}} {{0..2}}
a{,b} x{ }x{1,2} {0..1}/{a,b}/{2..3} {1..2,7} {01..100..33} plain""".split()


@pytest.mark.parametrize("pattern", BRACES)
def test_braces_are_those_of_bash(pattern):
    command = f'for name in {pattern}; do echo "$name"; done'
    theirs = subprocess.check_output(["bash", "-c", command], text=True)
    assert webdataset.expand_braces(pattern) == theirs.splitlines()


def test_patterns_of_more_names_than_anybody_has(tmp_path, monkeypatch):
    monkeypatch.setattr(webdataset, "MAX_NAMES", 2000)
    for pattern in ("{0..99999999999}.tar", "{0..99}{0..99}{0..9}.tar", "{a,{1..999999999999999999}}.tar"):
        with pytest.raises(BadArgument, match=r"stands for \d+ names, at most 2000 are taken; give a folder"):
            webdataset.open(str(tmp_path / pattern))
    for folder in "abc":
        shard(tmp_path / folder / "0001.tar", [1])
    some = ",".join(f"{tmp_path}/{folder}/{{0000..0999}}.tar" for folder in "abc")
    with pytest.raises(BadArgument, match=r"no tar shard '.*/a/0000.tar' \(999 of 1000 files are missing"):
        webdataset.open(some)
    shard(tmp_path / "d,e-1.tar", [2])
    assert keys(webdataset.open(str(tmp_path / "d,e-{1..1}.tar"))) == ["000000002"]


def test_cut_off_tar(tmp_path):
    path = shard(tmp_path / "a.tar", range(10))
    between = offset_of(path, "000000005.txt")
    cut = offset_of(path, "000000007.jpg") + 512 + 100  # inside an image
    os.truncate(path, cut)
    source = webdataset.open(path)
    assert keys(source) == [f"{number:09d}" for number in range(7)] and source[6].image == image(6)
    assert reasons(source) == {f"byte {cut}": "the tar is cut off here"}
    os.truncate(path, between)  # between members: only the end mark is missing
    source = webdataset.open(path)
    assert keys(source) == [f"{number:09d}" for number in range(5)] + ["000000005"]
    assert source[5].captions == ("caption 5, ünïcode",), "its JSON has the caption too"
    assert reasons(source) == {f"byte {between}": "the tar is cut off here"}


def test_holes_take_no_time(tmp_path):
    """Read through, these 8 TB would take hours."""
    path = shard(tmp_path / "a.tar", range(2))
    later = shard(tmp_path / "b", range(2, 4)).read_bytes()
    with path.open("r+b") as stream:
        stream.seek(4 * 2**40 + 512)
        stream.write(later)
        stream.truncate(8 * 2**40)
    source = webdataset.open(path)
    assert keys(source) == [f"{number:09d}" for number in range(4)] and source[3].image == image(3)
    assert all("damaged" in bad.reason for bad in source.bad_records)


@pytest.mark.parametrize("long_names", [False, True])
def test_damage_in_the_middle(tmp_path, long_names):
    prefix = "folder/" * 30 if long_names else ""  # more than 100 characters: an extended header before each member
    entries = [(prefix + name, content) for number in range(10) for name, content in members(number)]
    path = write_tar(tmp_path / "a.tar", entries, format=tarfile.GNU_FORMAT)
    start, end = (offset_of(path, f"{prefix}00000000{number}.jpg") for number in (3, 6))
    content = path.read_bytes()
    garbage = np.random.default_rng(0).integers(0, 256, end - start - 700, np.uint8).tobytes()
    path.write_bytes(content[:start] + garbage + content[end:])  # what follows has moved, and not by whole blocks
    source = webdataset.open(path)
    wanted = [0, 1, 2, 6, 7, 8, 9]
    assert keys(source) == [f"{prefix}{number:09d}" for number in wanted]
    assert [source[i].image for i in range(7)] == [image(number) for number in wanted]
    assert reasons(source) == {f"byte {start}": f"the tar is damaged from here to byte {end - 700}"}


def test_headers_of_one_member_without_end(tmp_path):
    long, extended = tarfile.TarInfo("././@LongLink"), tarfile.TarInfo("p")
    long.type, long.size, extended.type, extended.size = b"L", 2, b"x", 12
    for header, content in ((long, b"n\0"), (extended, b"12 path=abc\n")):
        chain = (header.tobuf(tarfile.GNU_FORMAT) + content.ljust(512, b"\0")) * 2000
        before = without_end(tmp_path / "a.tar", 1)
        after = shard(tmp_path / "a.tar", [2]).read_bytes()
        (tmp_path / "a.tar").write_bytes(before + chain + after)
        index = tar_index.scan(tmp_path / "a.tar")
        assert index.keys.tolist()[0] == b"000000001" and index.bad_records[0][0] == f"byte {len(before)}"
        assert sum(key.startswith("byte") for key, _ in index.bad_records) == 1
        assert 0 <= int(index.bad_records[0][1].split()[-1]) - len(before) - len(chain) <= 512
        (tmp_path / "a.tar").write_bytes(chain + bytes(1024))
        losses = (("byte 0", "the tar is damaged from here to its end"),)
        assert tar_index.scan(tmp_path / "a.tar").bad_records == losses


@pytest.mark.parametrize("suffix", ["txt", "json", "x"])
def test_texts_and_headers_of_any_size_take_no_memory(tmp_path, suffix):
    """In a sparse file, which takes no room on the disk either."""
    size = 2**36
    header = tarfile.TarInfo(f"5.{suffix}")
    header.size, header.type = size, b"x" if suffix == "x" else b"0"
    with (tmp_path / "a.tar").open("wb") as stream:
        stream.write(without_end(tmp_path / "b.tar", 1) + header.tobuf(tarfile.GNU_FORMAT))
        stream.truncate(stream.tell() + (2**22 if suffix == "x" else size))
        stream.seek(0, 2)
        stream.write(shard(tmp_path / "b.tar", [2]).read_bytes())
    index = tar_index.scan(tmp_path / "a.tar")
    assert index.keys.tolist() == [b"000000001", b"000000002"]
    if suffix != "x":
        assert index.bad_records == (("5", f"no image among its members (.{suffix})"),)


def test_random_damage_costs_records_alone(tmp_path):
    """No traceback, whatever bytes headers have; most mutations get a right checksum."""
    entries = [(f"{'ü/' * 60 * (n % 2)}{name}", content) for n in range(4) for name, content in members(n)]
    form = {"format": tarfile.PAX_FORMAT}, {"format": tarfile.GNU_FORMAT}
    good = [write_tar(tmp_path / "a.tar", entries, **options).read_bytes() for options in form]
    rng, read = np.random.default_rng(0), 0
    for number in range(200):
        content = bytearray(good[number % 2])
        headers = [at for at in range(0, len(content), 512) if content[at + 257 : at + 262] == b"ustar"]
        for _ in range(rng.choice([1, 2, 20])):
            at = int(rng.choice(headers)) + int(rng.choice([rng.integers(1024), rng.integers(124, 136), 156]))
            if at < len(content):
                content[at] = rng.choice([rng.integers(256), 0, 0x37, 0x80, 0xFF, *b"LKxgS1"])
        for at in headers if number % 4 else ():
            total = 256 + sum(content[at : at + 148]) + sum(content[at + 156 : at + 512])
            content[at + 148 : at + 156] = b"%06o\0 " % total
        (tmp_path / "a.tar").write_bytes(content)
        try:
            read += len(tar_index.scan(tmp_path / "a.tar").keys)
        except LcmError:
            pass
    assert read > 400


def test_zeros_in_the_middle_are_not_the_end(tmp_path):
    path = shard(tmp_path / "a.tar", range(10))
    start, end = (offset_of(path, f"00000000{number}.jpg") for number in (3, 5))
    content = path.read_bytes()
    path.write_bytes(content[:start] + bytes(end - start) + content[end:])
    source = webdataset.open(path)
    assert len(source) == 8 and list(reasons(source)) == [f"byte {start}"]
    path.write_bytes(content[:start] + bytes(2 << 20))  # a file whose space was reserved, but never filled
    source = webdataset.open(path)
    assert len(source) == 3 and list(reasons(source)) == [f"byte {start}"]


def test_header_search_over_its_chunks(tmp_path, monkeypatch):
    header = tarfile.TarInfo("a.txt").tobuf()
    for chunk in (512, 700, 1 << 20):
        monkeypatch.setattr(tar_index, "_CHUNK", chunk)
        for before in (0, 1, 255, 511, 512, 1000, 1500):
            path = tmp_path / "a.tar"
            path.write_bytes(b"ustar" * (before // 5) + b"x" * (before % 5) + header + b"rest")
            with path.open("rb") as stream:
                assert tar_index._next_header(stream, 0) == before
                assert tar_index._next_header(stream, before + 1) is None


def test_files_that_are_not_tars(tmp_path):
    good = shard(tmp_path / "good.tar", range(2))
    (tmp_path / "bad.tar").write_bytes(b"no tar at all" * 100)
    (tmp_path / "empty.tar").write_bytes(b"")
    source = webdataset.open(tmp_path)
    assert len(source) == 2
    assert {bad.shard: str(bad).split(": ")[1:] for bad in source.bad_records} == {
        str(tmp_path / "bad.tar"): ["byte 0", "the tar is damaged from here to its end"],
        str(tmp_path / "empty.tar"): ["byte 0", "the tar is cut off here"],
    }
    with pytest.raises(LcmError, match=r"^path=.*bad\.tar: no usable record in 1 tar shards; .*byte 0"):
        webdataset.open(tmp_path / "bad.tar")
    (tmp_path / "packed.tar").write_bytes(gzip.compress(good.read_bytes()))
    with pytest.raises(LcmError, match=r"packed\.tar is compressed \(gzip\)"):
        webdataset.open(tmp_path)


def count_scans(monkeypatch):
    scanned, scan = [], tar_index.scan
    monkeypatch.setattr(tar_index, "scan", lambda path, *keys: scanned.append(path.name) or scan(path, *keys))
    return scanned


def test_an_index_is_made_once_and_replaced_for_another_shard(tmp_path, monkeypatch):
    for part in range(3):
        shard(tmp_path / f"{part}.tar", range(part * 3, part * 3 + 3))
    webdataset.open(tmp_path)
    made = sidecars(tmp_path)
    scanned = count_scans(monkeypatch)
    assert len(webdataset.open(tmp_path)) == 9 and not scanned and sidecars(tmp_path) == made

    state = os.stat(tmp_path / "1.tar")
    shard(tmp_path / "1.tar", range(103, 106))  # the same size, another mtime
    os.utime(tmp_path / "1.tar", ns=(state.st_atime_ns, state.st_mtime_ns + 1))
    assert os.stat(tmp_path / "1.tar").st_size == state.st_size
    assert keys(webdataset.open(tmp_path))[3:6] == ["000000103", "000000104", "000000105"] and scanned == ["1.tar"]

    state = os.stat(tmp_path / "2.tar")
    shard(tmp_path / "2.tar", range(50, 90))  # another size, the same mtime
    os.utime(tmp_path / "2.tar", ns=(state.st_atime_ns, state.st_mtime_ns))
    assert len(webdataset.open(tmp_path)) == 46 and scanned == ["1.tar", "2.tar"]

    name = tmp_path / "0.tar.index.npz"
    for broken in (b"", b"garbage", name.read_bytes()[:-100], name.read_bytes().replace(b"pwatermark", b"pwAtermark")):
        name.write_bytes(broken)
        assert len(webdataset.open(tmp_path)) == 46 and scanned[-1] == "0.tar"
        assert name.read_bytes() == made["0.tar.index.npz"]
    assert len(scanned) == 6
    monkeypatch.setattr(tar_index, "VERSION", 0)
    assert len(webdataset.open(tmp_path)) == 46 and len(scanned) == 9


def test_the_content_of_an_index_is_pinned(tmp_path):
    """As the index files that exist beside shards have it."""
    good = [("7.jpg", b"image"), ("7.png", b"2"), ("7.json", b'{"caption": "c", "n": 3}')]
    webdataset.open(write_tar(tmp_path / "a.tar", [*good, ("8.jpg", b""), ("8.txt", b"")]))
    state = os.stat(tmp_path / "a.tar")
    with np.load(tmp_path / "a.tar.index.npz") as stored:
        assert {name: stored[name].tolist() for name in stored.files if name != "header"} == {
            "keys": [b"7"],
            "hashes": [9407870976149377255],
            "spans": [[512, 5, 2560, 24]],
            "is_json": [True],
            "fields": [[3.0]],
        }
        assert json.loads(stored["header"].tobytes()) == {
            "made_of": [3, state.st_size, state.st_mtime_ns, None, None],
            "fields": ["n"],
            "unused": {},
            "faults": [
                ["7", "a second image, .png; image_key chooses one"],
                ["8", "image of 0 bytes"],
            ],
        }


def _changed(number, column, value):
    def change(spans):
        spans[number, column] = value
        return spans

    return change


@pytest.mark.parametrize(
    "name, change",
    [
        *(("spans", _changed(0, 0, offset)) for offset in (-512, 2**63 - 9)),
        *(("spans", _changed(1, 1, size)) for size in (-1, 2**50)),
        ("spans", _changed(2, 3, 2**40)),
        ("spans", lambda spans: spans[:2]),
        ("spans", lambda spans: spans.astype(np.float64)),
        ("keys", lambda _: np.arange(3)),
        ("keys", lambda _: b"a"),
        ("hashes", lambda hashes: hashes[:1]),
        ("is_json", lambda flags: flags[:2]),
        ("fields", lambda x: x[:, 1:]),
    ],
)
def test_an_index_whose_numbers_leave_its_shard_is_replaced(tmp_path, name, change):
    path = shard(tmp_path / "a.tar", range(3))
    webdataset.open(path)
    file = tmp_path / "a.tar.index.npz"
    made = file.read_bytes()
    with np.load(file) as stored:
        arrays = {key: stored[key] for key in stored.files}
    with file.open("wb") as stream:
        np.savez(stream, **arrays | {name: change(arrays[name].copy())})
    source = webdataset.open(path)
    assert [source[number].image for number in range(3)] == [image(number) for number in range(3)]
    assert file.read_bytes() == made


@pytest.mark.parametrize("size", ["-5", "-2000", str(-(10**30)), str(2**62), "1" * 400])
def test_sizes_of_members_that_cannot_be(tmp_path, size):
    bad = tarfile.TarInfo("x.txt")
    bad.size, bad.pax_headers = 5, {"size": size}
    parts = [without_end(tmp_path / "part.tar", number) for number in range(2)]
    middle = bad.tobuf(tarfile.PAX_FORMAT) + b"hello".ljust(512, b"\0")
    (tmp_path / "a.tar").write_bytes(parts[0] + middle + parts[1] + bytes(1024))
    source = webdataset.open(tmp_path / "a.tar")
    assert source[0].image == image(0) and source.bad_records
    assert len(source) == 2


def test_no_pipes_and_no_endless_members(tmp_path, monkeypatch):
    path = shard(tmp_path / "a.tar", range(3))
    source = webdataset.open(path)
    monkeypatch.setattr(parsing, "MAX_BYTES", 100)
    with pytest.raises(BadRecordError, match="at most 100 are read"):
        source[0]
    os.mkfifo(tmp_path / "b.tar")
    with pytest.raises(LcmError, match="b.tar is not a regular file"):
        webdataset.open(tmp_path)


def test_index_that_cannot_be_written(tmp_path):
    path = shard(tmp_path / "a.tar", range(3))
    (tmp_path / "taken").write_text("a file")
    for folder in (tmp_path / "taken", "/proc/no_such_folder"):
        with pytest.raises(LcmError, match=r"^index_dir=.*a\.tar.*index.npz cannot be written there"):
            webdataset.open(path, index_dir=folder)


def test_a_shard_that_changes_under_a_source(tmp_path):
    path = shard(tmp_path / "a.tar", range(3))
    source = webdataset.open(path)
    shard(path, range(10, 14))
    with pytest.raises(BadRecordError, match="has changed since it was indexed"):
        source[0]
    path.unlink()
    with pytest.raises(BadRecordError, match="cannot be opened"):
        source[0]
    path = shard(tmp_path / "b.tar", range(3))
    source = webdataset.open(path)
    assert source[0].image == image(0)
    os.truncate(path, 2000)  # the open handle sees it
    with pytest.raises(BadRecordError, match="has changed since it was indexed: it ends before byte"):
        source[2]


def test_few_shards_are_open_at_once(tmp_path, monkeypatch):
    for part in range(webdataset.MAX_OPEN + 20):
        write_tar(tmp_path / f"{part:03d}.tar", [(f"{part}.jpg", b"%d" % part), (f"{part}.txt", b"text")])
    source = webdataset.open(tmp_path)
    for _ in range(2):
        assert [int(source[number].image) for number in range(len(source))] == list(range(len(source)))
    paths = [f"/proc/self/fd/{fd}" for fd in os.listdir("/proc/self/fd")]
    opened = [os.readlink(path) for path in paths if os.path.exists(path)]
    assert 0 < sum(str(tmp_path) in name for name in opened) <= webdataset.MAX_OPEN


@pytest.fixture
def five_shards(tmp_path):
    """(their folder, the content of their indices, which are not there)."""
    folder = tmp_path / "data"
    for part in range(5):
        shard(folder / f"{part}.tar", range(part * 20, part * 20 + 20))
    webdataset.open(folder)
    whole = sidecars(folder)
    assert len(whole) == 5
    for name in whole:
        (folder / name).unlink()
    return folder, whole


def test_indexing_that_stops_keeps_what_is_complete(five_shards, monkeypatch):
    folder, whole = five_shards
    written, rename = [], os.rename

    def stopping(source, target):
        written.append(target)
        if len(written) > 2:
            raise KeyboardInterrupt
        rename(source, target)

    monkeypatch.setattr(webdataset, "_THREADS", 1)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os, "rename", stopping)
        webdataset.open(folder)
    assert sidecars(folder) == {name: whole[name] for name in ("0.tar.index.npz", "1.tar.index.npz")}
    (folder / ".2.tar.index.npz.12345678.partial").write_bytes(b"half an index")  # of a killed process
    assert len(webdataset.open(folder)) == 100 and sidecars(folder) == whole


def test_two_processes_index_at_once(five_shards):
    folder, whole = five_shards
    code = "import sys; from lcm_jax.data.sources import webdataset; print(len(webdataset.open(sys.argv[1])))"
    command = [sys.executable, "-c", code, str(folder)]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    assert [process.communicate()[0] for process in processes] == ["100\n"] * 2 and sidecars(folder) == whole
