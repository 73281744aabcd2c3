"""The latent cache on disk: what is written is read, what does not fit or is damaged is refused."""

import json
import pickle
import resource
import shutil

import ml_dtypes
import numpy as np
import pytest

from lcm_jax.data import cache
from lcm_jax.data import cache as cache_writing
from lcm_jax.data.records import BadRecord, Fault
from lcm_jax.errors import LcmError

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
    return {"fingerprint": FINGERPRINT, "text": "ids", "examples": list(ROWS), "arrays": arrays(dtype)} | more


def records(group, ranks, dtype="float32"):
    for rank in ranks:
        about = {"key": f"ключ-{rank}", "shard": f"{group}.tar", "caption": "a red circle"}
        yield cache_writing.pack(row(group, rank), arrays(dtype), about)


def write(out, dtype="float32", faults=()):
    shards = cache_writing.shards_of(ROWS, 10)
    assert cache_writing.begin(out, plan(dtype))
    for shard in shards:
        count = cache_writing.write_shard(out / shard.name, records(shard.group, shard.ranks, dtype))
        cache_writing.note(out, shard, count, faults)
    cache_writing.finish(out, plan(dtype), shards, faults)
    return out


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    return write(tmp_path_factory.mktemp("cache") / "cache")


@pytest.fixture
def broken(written, tmp_path):
    return shutil.copytree(written, tmp_path / "broken")


@pytest.mark.parametrize(
    ("dtype", "kept"),
    [
        ("float32", np.float32),
        ("float16", np.float16),
        ("bfloat16", ml_dtypes.bfloat16),
    ],
)
def test_what_is_written_is_read(tmp_path, dtype, kept):
    cached = cache.open(write(tmp_path / "cache", dtype))
    assert cached.groups == ROWS and len(cached) == 28
    for group, rank in [(g, r) for g, rows in enumerate(ROWS) for r in range(rows)]:
        found, expected = cached.row(group, rank), row(group, rank)
        expected["mean"] = expected["mean"].astype(kept).astype(np.float32)
        assert list(found) == list(expected)
        for name, value in expected.items():
            assert found[name].dtype == value.dtype
            np.testing.assert_array_equal(found[name], value)
        assert cached.where(group, rank) == (f"{group}.tar", f"ключ-{rank}")
        assert cached.about(group, rank)["caption"] == "a red circle"


def test_the_folder_holds_the_manifest_and_whole_shards_alone(written):
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


def test_a_cache_goes_to_other_processes(written):
    cached = cache.open(written)
    first = cached.row(0, 3)["mean"]
    copy = pickle.loads(pickle.dumps(cached))
    np.testing.assert_array_equal(copy.row(0, 3)["mean"], first)
    assert copy.groups == cached.groups


def test_what_is_no_cache(written, tmp_path):
    with pytest.raises(LcmError, match=r"nowhere is no folder.*config\.data\.path"):
        cache.open(tmp_path / "nowhere")
    with pytest.raises(LcmError, match=r"no manifest\.json.*same lcm_jax\.precompute command again"):
        cache.open(tmp_path)


def test_a_cache_of_another_version(broken):
    manifest = json.loads((broken / "manifest.json").read_text())
    (broken / "manifest.json").write_text(json.dumps(manifest | {"format": 7}))
    with pytest.raises(LcmError, match="format 7, this version reads 1"):
        cache.open(broken)


def test_shards_that_are_missing_or_cut_short(broken):
    shard = broken / "latents-00-00001.array_record"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-1000])
    with pytest.raises(LcmError, match=rf"latents-00-00001.* has {len(whole) - 1000} bytes where {len(whole)} were"):
        cache.open(broken)
    shard.unlink()
    with pytest.raises(LcmError, match="latents-00-00001.array_record is missing"):
        cache.open(broken)


@pytest.mark.parametrize("name", ["../latents-00-00000.array_record", "{folder}/latents-00-00000.array_record"])
def test_shards_outside_of_the_folder_are_not_read(broken, name):
    manifest = json.loads((broken / "manifest.json").read_text())
    shutil.copy(broken / "latents-00-00000.array_record", broken.parent)
    manifest["groups"][0]["shards"][0]["file"] = name.format(folder=broken.parent)
    (broken / "manifest.json").write_text(json.dumps(manifest))
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
    ],
)
def test_rows_and_shapes_that_cannot_be(broken, change):
    manifest = json.loads((broken / "manifest.json").read_text())
    change(manifest)
    (broken / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(LcmError, match="rows or shapes in .*manifest.json"):
        cache.open(broken)


def test_a_damaged_row_is_one_bad_record(broken):
    shard = broken / "latents-00-00000.array_record"
    data, mean = bytearray(shard.read_bytes()), row(0, 4)["mean"].tobytes()
    place = data.index(mean)
    data[place : place + 8] = bytes(8)
    shard.write_bytes(data)
    cached = cache.open(broken)
    with pytest.raises(BadRecord, match="cannot be read"):
        cached.row(0, 4)
    assert cached.where(0, 4) == (str(broken), "row 4 of group 0")
    np.testing.assert_array_equal(cached.row(0, 5)["mean"], row(0, 5)["mean"])


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("vae", "34cd" * 16, ["vae 12ab12ab12ab", "34cd34cd34cd", "config.model.vae", "precompute again"]),
        ("resolution", 512, ["resolution 64", "512", "config.data.resolution"]),
        ("sizes", [[64, 64]], ["sizes", "[32, 96]", "aspect_buckets"]),
        ("scaling_factor", 0.13, ["0.18215", "0.13"]),
        ("time_ids", True, ["False", "True", "SDXL"]),
        ("tokenizers", {"text_encoder": "55bb" * 16}, ["77aa77aa77aa", "55bb55bb55bb"]),
    ],
)
def test_another_runs_cache_is_refused_with_both_values(written, key, value, words):
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
    cache_writing.pack(large, arrays("bfloat16"), about)
    with pytest.raises(LcmError, match=r"a\.tar: 7: mean is not finite in float16; use --dtype=float32"):
        cache_writing.pack(large, arrays("float16"), about)


def test_a_full_disk_leaves_no_half_shard(tmp_path):
    path = tmp_path / "latents-00-00000.array_record"
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, limits[1]))
    try:
        with pytest.raises(LcmError, match=f"{path} cannot be written .*same command"):
            cache_writing.write_shard(path, records(0, range(300)))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not list(tmp_path.iterdir())


def test_a_shard_whose_rows_fail_is_not_there(tmp_path):
    def failing():
        yield from records(0, range(3))
        raise RuntimeError("out of memory on the device")

    with pytest.raises(RuntimeError, match="out of memory"):  # and not that the disk were full
        cache_writing.write_shard(tmp_path / "a", failing())
    assert not list(tmp_path.iterdir())


def test_another_plan_and_another_folder(written, tmp_path):
    assert not cache_writing.begin(written, plan())
    with pytest.raises(LcmError, match="vae: 12ab12ab12ab there, 34cd34cd34cd now"):
        cache_writing.begin(written, plan(fingerprint=FINGERPRINT | {"vae": "34cd" * 16}))
    out = tmp_path / "begun"
    assert cache_writing.begin(out, plan(text="ids")) and cache_writing.begin(out, plan(text="ids"))
    with pytest.raises(LcmError, match="text: ids there, embeddings now"):
        cache_writing.begin(out, plan(text="embeddings"))
    cache_writing.check_folder(out)
    (tmp_path / "photo.jpg").touch()
    for path, words in ((tmp_path, "holds other things"), (tmp_path / "photo.jpg", "is a file")):
        with pytest.raises(LcmError, match=words):
            cache_writing.check_folder(path)


def test_unfinished_and_empty_caches_get_no_manifest(tmp_path):
    shards = cache_writing.shards_of(ROWS, 10)
    cache_writing.begin(tmp_path, plan())
    with pytest.raises(LcmError, match="latents-00-00000.array_record is not finished"):
        cache_writing.finish(tmp_path, plan(), shards, ())
    for shard in shards:
        cache_writing.write_shard(tmp_path / shard.name, ())
        cache_writing.note(tmp_path, shard, 0, [Fault("a.tar", "1", "truncated")])
    with pytest.raises(LcmError, match="none of 28 records can be used; the first: a.tar: 1: truncated"):
        cache_writing.finish(tmp_path, plan(), shards, ())
    assert not (tmp_path / "manifest.json").exists()


def test_faults_are_listed_once(tmp_path):
    fault = Fault("a.tar", "1", "truncated")
    out = write(tmp_path / "cache", faults=[fault])
    assert json.loads((out / "bad_records.jsonl").read_text()) == {"shard": "a.tar", "key": "1", "reason": "truncated"}
    assert cache.open(out).manifest["faults"] == 1
