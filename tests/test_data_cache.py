"""The latent cache on disk: what is written is read; what does not fit or is damaged is refused."""

import json
import os
import pickle
import resource
import shutil
import zlib

import ml_dtypes
import numpy as np
import pytest

from lcm_jax.data import cache
from lcm_jax.data.records import BadRecord, BadRecordError
from lcm_jax.errors import BadArgument, LcmError

SIZES = ((8, 8), (4, 12), (6, 6))  # of the groups' latents; the last group has no rows
ROWS = (23, 5, 0)
FINGERPRINT = {
    "resolution": 64,
    "sizes": [[64, 64], [32, 96], [48, 48]],
    "time_ids": False,
    "scaling_factor": 0.18215,
    "vae": "12ab" * 16,
    "tokenizers": {"text_encoder": "77aa" * 16},
    "text_encoders": {"text_encoder": "99ee" * 16},
}


WHAT = {"variants": 1, "data": {"crop": "center"}}


def arrays(dtype):
    shapes = {"mean": [[*size, 4] for size in SIZES], "text_encoder": [[77]] * 3, "time_ids": [[6]] * 3}
    kinds = {"mean": dtype, "text_encoder": "int32", "time_ids": "float32"}
    return [{"name": name, "dtype": kinds[name], "shapes": shapes[name]} for name in shapes]


def row(group, rank):
    rng = np.random.default_rng([group, rank])
    return {
        "mean": rng.normal(size=(*SIZES[group], 4)).astype(np.float32),
        "text_encoder": rng.integers(0, 49408, 77).astype(np.int32),
        "time_ids": rng.integers(0, 5000, 6).astype(np.float32),
    }


def plan(dtype="float32", **more):
    return {"fingerprint": FINGERPRINT, "text": "ids", "examples": list(ROWS), "arrays": arrays(dtype), **WHAT} | more


def records(group, ranks, dtype="float32"):
    for rank in ranks:
        about = {"key": f"ключ-{rank}", "shard": f"{group}.tar", "caption": "a red circle"}
        yield cache.pack(row(group, rank), arrays(dtype), about)


def write(out, dtype="float32", bad=()):
    shards = cache.shards_of(ROWS, 10)
    assert cache.begin(out, plan(dtype))
    for shard in shards:
        count = cache.write_shard(out / shard.name, records(shard.group, shard.ranks, dtype))
        cache.write_note(out, shard, count, bad)
    cache.finish(out, plan(dtype), shards, bad)
    return out


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    return write(tmp_path_factory.mktemp("cache") / "cache")


@pytest.fixture
def broken(written, tmp_path):
    return shutil.copytree(written, tmp_path / "broken")


def change_manifest(folder, change):
    manifest = json.loads((folder / "manifest.json").read_text())
    change(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_what_is_written_is_read_also_in_another_process(tmp_path, dtype):
    cached = cache.open(write(tmp_path / "cache", dtype))
    assert cached.groups == ROWS and len(cached) == 28
    cached.row(0, 3)  # opens a shard
    for found in (cached, pickle.loads(pickle.dumps(cached))):
        for group, rank in [(g, r) for g, rows in enumerate(ROWS) for r in range(rows)]:
            values, expected = found.row(group, rank), row(group, rank)
            expected["mean"] = expected["mean"].astype(getattr(ml_dtypes, dtype, dtype)).astype(np.float32)
            assert list(values) == list(expected)
            for name, value in expected.items():
                assert values[name].dtype == value.dtype
                np.testing.assert_array_equal(values[name], value)
            assert found.where(group, rank) == (f"{group}.tar", f"ключ-{rank}")
            assert found.about(group, rank)["caption"] == "a red circle"


def test_the_bytes_of_a_record_are_pinned():
    """As caches that exist have them."""
    rows = {"mean": np.arange(256).reshape(8, 8, 4), "text_encoder": np.arange(77), "time_ids": np.arange(6)}
    about = {"key": "ключ", "shard": "a.tar", "caption": "a red circle"}
    packed = cache.pack(rows, arrays("bfloat16"), about)
    assert len(packed) == 924 and zlib.crc32(packed) == 2574601083


def test_the_folder_holds_the_manifest_and_complete_shards_alone(written):
    assert sorted(p.name for p in written.iterdir()) == [
        "latents-00-00000.array_record",
        "latents-00-00001.array_record",
        "latents-00-00002.array_record",
        "latents-01-00000.array_record",
        "manifest.json",
    ]
    manifest = json.loads((written / "manifest.json").read_text())
    assert [group["rows"] for group in manifest["groups"]] == list(ROWS) and manifest["faults"] == 0
    assert [shard["rows"] for shard in manifest["groups"][0]["shards"]] == [10, 10, 3]


def test_folders_that_are_not_a_cache(broken, tmp_path):
    with pytest.raises(BadArgument, match=r"^path=.*nowhere: not a folder"):
        cache.open(tmp_path / "nowhere")
    with pytest.raises(BadArgument, match=r"has no manifest\.json.*same lcm_jax\.precompute command again"):
        cache.open(tmp_path)
    change_manifest(broken, lambda manifest: manifest.update(format=7))
    with pytest.raises(LcmError, match="format 7, this version reads 1"):
        cache.open(broken)


def test_shards_that_are_missing_or_cut_short(broken):
    shard = broken / "latents-00-00001.array_record"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-1000])
    with pytest.raises(LcmError, match=rf"latents-00-00001.* has {len(whole) - 1000} bytes, {len(whole)} were written"):
        cache.open(broken)
    shard.unlink()
    with pytest.raises(LcmError, match="latents-00-00001.array_record is missing"):
        cache.open(broken)


@pytest.mark.parametrize("name", ["../latents-00-00000.array_record", "{folder}/latents-00-00000.array_record"])
def test_shards_outside_of_the_folder_are_not_read(broken, name):
    shutil.copy(broken / "latents-00-00000.array_record", broken.parent)
    name = name.format(folder=broken.parent)
    change_manifest(broken, lambda manifest: manifest["groups"][0]["shards"][0].update(file=name))
    with pytest.raises(LcmError, match="latents-00-00000.array_record' names no file inside .*broken"):
        cache.open(broken)


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m["groups"][0].update(rows=100),
        lambda m: m["groups"][0]["shards"][0].update(rows=-1),
        lambda m: m["groups"][0].update(rows="x"),
        lambda m: m["groups"][0]["shards"][0].update(rows=2.5),
        lambda m: m["arrays"][0]["shapes"].__setitem__(0, [-1, 4, 4]),
        lambda m: m["groups"][0].pop("shards"),
        lambda m: m["arrays"][0]["shapes"].__setitem__(0, [8.0, 8, 4]),
        lambda m: m.update(groups=None),
        lambda m: m["groups"][0]["shards"][0].pop("bytes"),
        lambda m: m["arrays"][0].update(dtype="object"),
        lambda m: m["arrays"][0].update(shapes=[]),
        lambda m: m.pop("fingerprint"),
        lambda m: m.update(examples=["x"]),
        lambda m: m.update(text="tokens"),
    ],
)
def test_rows_and_shapes_that_cannot_be(broken, change):
    change_manifest(broken, change)
    with pytest.raises(LcmError, match="the content of .*manifest.json is not that of a cache"):
        cache.open(broken)


def test_names_that_array_record_cannot_open_and_lists_of_other_programs(broken, tmp_path):
    odd = tmp_path / os.fsdecode(b"caf\xe9")
    odd.mkdir()
    with pytest.raises(BadArgument, match=r"^path=.*caf\\xe9: its name is not UTF-8, .*; rename the folder$"):
        cache.open(odd)
    for content in (b'{"shard": "a"}', b"\xff", b"[1]"):
        (broken / "bad_records.jsonl").write_bytes(content)
        with pytest.raises(LcmError, match="bad_records.jsonl.* cannot be read as a list|is not valid|holds a list"):
            cache.open(broken).bad_records()
    shutil.copytree(broken, tmp_path / "[1:2]*{a,b} %s")
    assert cache.open(tmp_path / "[1:2]*{a,b} %s").where(0, 1) == ("0.tar", "ключ-1")


def test_a_damaged_row_is_one_bad_record(broken):
    shard = broken / "latents-00-00000.array_record"
    data, mean = bytearray(shard.read_bytes()), row(0, 4)["mean"].tobytes()
    at = data.index(mean)
    data[at : at + 8] = bytes(8)
    shard.write_bytes(data)
    cached = cache.open(broken)
    with pytest.raises(BadRecordError, match="cannot be read"):
        cached.row(0, 4)
    assert cached.where(0, 4) == (str(broken), "row 4 of group 0")
    np.testing.assert_array_equal(cached.row(0, 5)["mean"], row(0, 5)["mean"])


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("vae", "34cd" * 16, ["vae 12ab12ab12ab", "34cd34cd34cd", "VAE of the cache", "precompute again"]),
        ("resolution", 512, ["resolution 64", "512", "set the cache's resolution"]),
        ("sizes", [[64, 64]], ["sizes", "[32, 96]", "aspect_buckets"]),
        ("scaling_factor", 0.13, ["0.18215", "0.13"]),
        ("time_ids", True, ["False", "True", "SDXL"]),
        ("tokenizers", {"text_encoder": "55bb" * 16}, ["77aa77aa77aa", "55bb55bb55bb"]),
    ],
)
def test_a_cache_of_another_run_is_refused_with_both_values(written, key, value, words):
    manifest = cache.open(written).manifest
    cache.check_fit(manifest, FINGERPRINT, written)
    with pytest.raises(LcmError) as error:
        cache.check_fit(manifest, FINGERPRINT | {key: value}, written)
    assert all(word in str(error.value) for word in [*words, str(written)]) and "\n" not in str(error.value)


def test_text_encoders_count_for_embeddings_alone(written):
    manifest, other = cache.open(written).manifest, FINGERPRINT | {"text_encoders": {"text_encoder": "0"}}
    cache.check_fit(manifest, other, written)
    with pytest.raises(LcmError, match="text_encoders .*99ee99ee99ee"):
        cache.check_fit({**manifest, "text": "embeddings"}, other, written)


def test_values_that_a_dtype_cannot_hold():
    about = {"key": "7", "shard": "a.tar", "caption": ""}
    large = row(0, 0) | {"mean": np.full((8, 8, 4), 1e5, np.float32)}
    cache.pack(large, arrays("bfloat16"), about)
    with pytest.raises(LcmError, match=r"a\.tar: 7: mean is not finite in float16; .*dtype=float32"):
        cache.pack(large, arrays("float16"), about)


def test_a_shard_that_fails_leaves_nothing(tmp_path):
    """By a full disk, and by rows that cannot be made, which is not reported as a full disk."""
    path = tmp_path / "latents-00-00000.array_record"
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, limits[1]))
    try:
        with pytest.raises(LcmError, match=f"{path} cannot be written .*same command"):
            cache.write_shard(path, records(0, range(300)))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    def failing():
        yield from records(0, range(3))
        raise RuntimeError("out of memory on the device")

    with pytest.raises(RuntimeError, match="out of memory"):
        cache.write_shard(path, failing())
    assert not list(tmp_path.iterdir())


def test_another_plan_and_another_folder(written, tmp_path):
    assert not cache.begin(written, plan())
    with pytest.raises(BadArgument, match="^out=.*vae: 12ab12ab12ab there, 34cd34cd34cd now"):
        cache.begin(written, plan(fingerprint=FINGERPRINT | {"vae": "34cd" * 16}))
    out = tmp_path / "begun"
    assert cache.begin(out, plan(text="ids")) and cache.begin(out, plan(text="ids"))
    with pytest.raises(BadArgument, match="text: ids there, embeddings now"):
        cache.begin(out, plan(text="embeddings"))
    cache.check_folder(out)
    (tmp_path / "photo.jpg").touch()
    for path, words in ((tmp_path, "holds other things"), (tmp_path / "photo.jpg", "is a file")):
        with pytest.raises(BadArgument, match=f"^out={path}: {words}"):
            cache.check_folder(path)


def test_unfinished_and_empty_caches_get_no_manifest(tmp_path):
    shards = cache.shards_of(ROWS, 10)
    cache.begin(tmp_path, plan())
    with pytest.raises(LcmError, match="latents-00-00000.array_record is not finished"):
        cache.finish(tmp_path, plan(), shards, ())
    for shard in shards:
        cache.write_shard(tmp_path / shard.name, ())
        cache.write_note(tmp_path, shard, 0, [BadRecord("a.tar", "1", "truncated")])
    with pytest.raises(LcmError, match="none of 28 records can be used; the first: a.tar: 1: truncated"):
        cache.finish(tmp_path, plan(), shards, ())
    assert not (tmp_path / "manifest.json").exists()


def test_bad_records_are_listed_once(tmp_path):
    bad = BadRecord("a.tar", "1", "truncated")
    out = write(tmp_path / "cache", bad=[bad])
    assert json.loads((out / "bad_records.jsonl").read_text()) == {"shard": "a.tar", "key": "1", "reason": "truncated"}
    cached = cache.open(out)
    assert cached.manifest["faults"] == 1 and cached.bad_records() == [bad]


def test_plans_are_of_the_same_records_wherever_they_are():
    plan = {"records": "12", "seed": 0, "data": {"path": "/new", "crop": "center"}}
    moved = plan | {"data": {"path": "/old", "crop": "center"}}
    assert cache.differences(moved, plan) == {}
    assert set(cache.differences(moved | {"records": "34"}, plan)) == {"records", "data.path"}
    without = {key: value for key, value in moved.items() if key != "records"}
    assert set(cache.differences(without, plan)) == {"data.path"}


def test_a_digest_is_of_the_records_and_not_of_the_place(written, tmp_path, monkeypatch):
    moved = shutil.copytree(written, tmp_path / "moved")
    first = cache.open(written).digest()
    assert cache.open(moved).digest() == first
    change_manifest(moved, lambda manifest: manifest.update(made_by="a later version"))
    assert cache.open(moved).digest() == first
    change_manifest(moved, lambda manifest: manifest.update(seed=5))
    assert cache.open(moved).digest() != first
    packed = cache.pack
    monkeypatch.setattr(
        cache, "pack", lambda row, kinds, about: packed(row, kinds, about | {"caption": "a blue star!"})
    )
    assert cache.open(write(tmp_path / "other")).digest() != first
