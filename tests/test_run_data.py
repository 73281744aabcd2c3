"""From files to the step's batches: four formats, real processes, damaged records, mixtures, buckets, encoding."""

import contextlib
import dataclasses
import functools
import io
import itertools
import json
from collections import Counter
from pathlib import Path

import data_kit
import jax
import numpy as np
import parity
import pytest
import tiny
import training_processes as runs
from PIL import Image

from lcm_jax import train
from lcm_jax.data import cache, encoding, loader
from lcm_jax.data.records import BadRecord
from lcm_jax.errors import LcmError
from lcm_jax.pretrained import load_pipeline, text
from lcm_jax.run import data as run_data
from lcm_jax.run.config import default_config, resolve, to_json, validate

COUNT = 44


@pytest.fixture(scope="module")
def loaded():
    return tiny.loaded("sd1")


@pytest.fixture(scope="module")
def pipeline(loaded):
    return loaded[0]


@pytest.fixture(scope="module")
def paths(tmp_path_factory) -> dict[str, str]:
    """Source -> where it holds the same COUNT records."""
    root, records = tmp_path_factory.mktemp("sources"), data_kit.records(COUNT)
    return {name: write(root / name, records) for name, write in data_kit.WRITERS.items()}


def config_of(source: str, path: str | None, **changes):
    config = default_config()
    config.model.teacher = str(tiny.folder("sd1"))
    config.data.source, config.data.path = source, path
    config.data.resolution, config.data.batch_size = 64, 8
    config.data.flip = 0.5
    config.update_from_flattened_dict({f"data.{key}": value for key, value in changes.items()})
    validate(config)
    return resolve(config)


def batches_of(config, pipeline, steps: int, *, start: int = 0, log=None, encode=None) -> list[dict[str, np.ndarray]]:
    """Batches of the config's data on the host, before they are encoded."""
    log = log or run_data.DataLog(loader.BadRecordLog(1.0), print)
    parts = run_data.open_parts(config)
    examples, order = run_data.open_examples(config, parts, pipeline, encode, log)
    options = {"bad_records": log.bad_records, "put": log.count_cut_tokens, "workers": config.data.workers}
    with contextlib.closing(loader.batches(examples, order, start, **options)) as batches:
        return list(itertools.islice(batches, steps))


def same(a, b) -> bool:
    return all(
        x.keys() == y.keys() and all(np.array_equal(x[name], y[name]) for name in x) for x, y in zip(a, b, strict=True)
    )


def texts(batches) -> set[bytes]:
    """The different captions of batches."""
    return {ids.tobytes() for batch in batches for ids in batch["text_encoder"]}


@pytest.fixture(scope="module")
def reference(paths, pipeline):
    return batches_of(config_of("webdataset", paths["webdataset"]), pipeline, 12)


@pytest.mark.parametrize("source", data_kit.WRITERS)
def test_the_same_records_give_the_same_batches(paths, pipeline, reference, source):
    assert same(batches_of(config_of(source, paths[source]), pipeline, 12), reference)
    first = reference[0]
    assert first["pixels"].shape == (8, 64, 64, 3) and first["pixels"].dtype == np.uint8
    assert first["text_encoder"].shape == (8, 77) and set(first) == {"pixels", "text_encoder"}
    assert not same(batches_of(config_of(source, paths[source], flip=0.0), pipeline, 12), reference)


@pytest.mark.slow
def test_real_processes_share_the_batches_and_resume_for_each_other(paths, reference, tmp_path):
    """One stream by 2 processes, by 4, and by 2 that stop at batch 5, from which one with two workers resumes."""
    (tmp_path / "config.json").write_text(to_json(config_of("webdataset", paths["webdataset"])))

    def read(processes: int, start: int, steps: int, workers: int) -> dict[str, np.ndarray]:
        """The batches [steps b ...] that so many processes read together."""
        out = tmp_path / str(processes)
        out.mkdir()
        options = f"--out={out}", f"--start={start}", f"--steps={steps}", f"--workers={workers}"
        program = ("tests/data_process.py", f"--config={tmp_path / 'config.json'}")
        runs.ended(runs.start(*options, program=program, processes=processes))
        parts = [np.load(out / f"{index}.npz") for index in range(processes)]
        return {name: np.concatenate([part[name] for part in parts], axis=1) for name in parts[0].files}

    two, four, rest = read(2, 0, 5, 0), read(4, 2, 6, 0), read(1, 5, 7, 2)
    for name in reference[0]:
        whole = np.stack([batch[name] for batch in reference])
        np.testing.assert_array_equal(two[name], whole[:5])
        np.testing.assert_array_equal(four[name], whole[2:8])
        np.testing.assert_array_equal(rest[name], whole[5:])


DAMAGED = 2000


@pytest.fixture(scope="module")
def damaged(tmp_path_factory) -> tuple[str, list[dict], dict[str, str]]:
    """Shards of 2,000 records, ten of them unusable: (pattern, the good records, key -> word of the reason)."""
    records = data_kit.records(DAMAGED)
    whole = records[7]["image"]
    bad = {
        "truncated": [100, 1101],
        "known format": [202, 1203],
        "0 bytes": [304, 1305],
        "occur already": [406, 1407],
        "UTF-8": [508, 1509],
    }
    for number in bad["truncated"]:
        records[number]["image"] = records[number]["image"][:-400]
    for number in bad["known format"]:  # a web page instead of the image
        records[number]["image"] = b"<html><body>404 not found</body></html>" + whole[40:60]
    stream = io.BytesIO()
    Image.open(io.BytesIO(records[9]["image"])).save(stream, "PNG")
    records[9]["image"] = stream.getvalue()  # a PNG named .jpg is a good image
    for number in bad["0 bytes"]:
        records[number]["image"] = b""
    for number in bad["occur already"]:
        records[number] = dict(records[number - 300])
    folder = tmp_path_factory.mktemp("damaged")
    for shard, part in enumerate(np.array_split(np.arange(DAMAGED), 4)):
        entries = [entry for number in part for entry in data_kit.members(records[number])]
        for number in bad["UTF-8"]:
            name = f"{number:09d}.txt"
            entries = [(n, b"caf\xe9 \xff" if n == name else content) for n, content in entries]
        data_kit.write_tar(folder / f"{shard:05d}.tar", entries)
    reasons = {records[number]["key"]: word for word, numbers in bad.items() for number in numbers}
    numbers = {number for numbers in bad.values() for number in numbers}
    good = [record for number, record in enumerate(records) if number not in numbers]
    return str(folder / "*.tar"), good, reasons


def test_damaged_records_are_named_and_nothing_good_is_lost(damaged, pipeline):
    pattern, good, reasons = damaged
    bad: list[BadRecord] = []
    config = config_of("webdataset", pattern, crop="center", flip=0.0, batch_size=50)
    batches = batches_of(config, pipeline, 40, log=run_data.DataLog(loader.BadRecordLog(0.01, bad.append), print))
    reason_of = {record.key: record.reason for record in bad}
    assert reason_of.keys() == reasons.keys() and len(bad) == len(reasons)
    assert all(word in reason_of[key] for key, word in reasons.items())
    assert all(record.shard.endswith(".tar") for record in bad)
    replaced = [record for record in bad if "truncated" in record.reason or "known format" in record.reason]
    epoch = DAMAGED - (len(bad) - len(replaced))  # what the index leaves out is in no epoch
    images = [image.tobytes() for batch in batches for image in batch["pixels"]]
    counts = Counter(images[:epoch])
    assert len(counts) == len(good) and sorted(counts.values())[-len(replaced) - 1 :] == [1] + [2] * len(replaced)
    captions = text.tokens(pipeline, [record["text"] for record in good])["text_encoder"]
    assert set(counts) == set(images) and texts(batches) == {ids.tobytes() for ids in captions}


@pytest.mark.slow
def test_too_many_damaged_records_stop_a_training_that_loses_nothing(damaged, tmp_path, capsys):
    """The index finds 6 of the 10; the run stops at the 8th, is saved there, and resumes if it may; it lists all 10."""
    pattern, _, reasons = damaged
    config = config_of("webdataset", pattern)
    with config.unlocked():
        config.model.teacher = config.model.student = str(tiny.folder("teacher"))
        config.data.batch_size, config.data.workers, config.train.steps = 50, 1, 41
        config.data.max_bad_fraction = 7 / DAMAGED
        config.distill.w_embedding_dim, config.sample.every, config.log.every = 16, 0, 10
    with pytest.raises(LcmError, match=r"could not be used.*raise max_bad_fraction \(now 0\.0035\)"):
        train.train(config, tmp_path / "run")
    (step,) = runs.saved_steps(tmp_path / "run")
    assert 0 < step < 41
    config.data.max_bad_fraction = 0.01
    assert int(train.train(config, tmp_path / "run").step) == 41
    listed = [json.loads(line) for line in (tmp_path / "run" / "bad_records.jsonl").read_text().splitlines()]
    assert {record["key"] for record in listed} == set(reasons) and len(listed) == len(reasons)
    printed = capsys.readouterr().err
    assert all(record["reason"] in printed for record in listed) and "1994 records" in printed
    config.train.steps = 42
    more = Path(pattern).with_name("zzzz.tar")
    data_kit.write_tar(more, data_kit.members(data_kit.records(1)[0] | {"key": "one_more"}))
    try:
        with pytest.raises(LcmError, match=r"data\.json: source 1 was .* restore what it began with"):
            train.train(config, tmp_path / "run")
    finally:
        more.unlink()


def test_a_mixture_has_the_shares_of_its_weights(paths, pipeline):
    few = config_of("folder", paths["folder"], filters=("pwatermark <= 0",))
    assert len(texts(batches_of(few, pipeline, 5))) == 5
    mixed = config_of("mixture", None, mixture=("3 shapes", f"1 folder {paths['folder']}"), num_examples=20)
    rendered = texts(batches_of(config_of("shapes", None, num_examples=20), pipeline, 5))
    batches = batches_of(mixed, pipeline, 20)
    assert [sum(ids.tobytes() in rendered for ids in batch["text_encoder"]) for batch in batches] == [6] * 20


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ("webdataset /a", "WEIGHT SOURCE PATH"),
        ("0 folder /a", "greater than 0"),
        ("2", "WEIGHT SOURCE"),
        ("nan folder /a", "greater than 0"),
        ("1 imagenet /a", "imagenet"),
        ("1 folder /nowhere", "/nowhere"),
    ],
)
def test_open_parts_refuses_bad_mixtures(entry, words):
    with pytest.raises(LcmError, match=words):
        run_data.open_parts(config_of("mixture", None, mixture=(entry,)))


def test_open_parts_gives_each_source_its_own_keys(paths, tmp_path):
    parts = (f"1 webdataset {paths['webdataset']}", f"1 folder {paths['folder']}")
    mixed = config_of("mixture", None, mixture=parts, index_dir=str(tmp_path))
    assert [len(part.source) for part in run_data.open_parts(mixed)] == [COUNT, COUNT]
    assert len(list(tmp_path.glob("*.npz"))) == 3
    with pytest.raises(LcmError, match=r"config\.data\.split = 'test': the source 'webdataset' or 'folder' does not"):
        run_data.open_parts(config_of("mixture", None, mixture=parts, split="test"))


def test_buckets_keep_aspect_ratios_and_lose_nothing(paths, pipeline):
    config = config_of("huggingface", paths["huggingface"], aspect_buckets=True, bucket_step=16, batch_size=4, flip=0.0)
    (part,) = run_data.open_parts(config)
    rows = run_data.image_rows(config, part.source, functools.partial(run_data.tokenize_captions, pipeline.tokenizers))
    batches = batches_of(config, pipeline, sum(-(-size // 4) for size in rows.groups))
    shapes = {batch["pixels"].shape[1:3] for batch in batches}
    assert len(shapes) == 3 and all(abs(h * w / 64**2 - 1) < 0.2 for h, w in shapes)
    assert {h / w > 1 for h, w in shapes} == {True, False} and len(texts(batches)) == COUNT
    assert same(batches[4:7], batches_of(config, pipeline, 3, start=4))


def test_buckets_with_fewer_images_than_a_batch_are_reported():
    line = run_data.small_buckets((1000, 1, 0, 3), 32)
    assert line.startswith("4 images are in 2 aspect buckets of fewer than 32; ") and "up to 32 times an epoch" in line
    assert not run_data.small_buckets((32, 0, 64), 32) and not run_data.small_buckets((3,), 32)


def test_sdxl_rows_have_time_ids(paths):
    pipeline, _ = tiny.loaded("sdxl")
    config = config_of("folder", paths["folder"], crop="center", flip=0.0, width_key="pwatermark")
    (batch,) = batches_of(config, pipeline, 1)
    assert set(batch) == {"pixels", "text_encoder", "text_encoder_2", "time_ids"}
    sizes = {(72, 96), (101, 70), (64, 64), (90, 130)}  # a watermark score is not a width: the images' own sizes
    for height, width, top, left, *target in batch["time_ids"]:
        scale = 64 / min(height, width)
        assert (height, width) in sizes and target == [64, 64]
        parity.close((top, left), ((height * scale - 64) / 2, (width * scale - 64) / 2), atol=1)  # whole pixels


def test_encode_at_start_equals_encoding_by_step(paths, loaded, pipeline):
    options = {"crop": "center", "flip": 0.0, "batch_size": 4}
    encode = encoding.make_encode(*loaded)
    at_start = batches_of(config_of("folder", paths["folder"], encode="start", **options), pipeline, 12, encode=encode)
    by_step = batches_of(config_of("folder", paths["folder"], **options), pipeline, 12)
    for early, late in zip(at_start, by_step, strict=True):
        late = encoding.encode_rows(encode, late, 4)
        assert early.keys() == late.keys() == {"mean", "logvar", "encoder_hidden_states"}
        for name, value in late.items():
            parity.close(early[name], value, rtol=0, atol=2e-5 * np.abs(value).max())


@pytest.mark.parametrize("encode_at", ["step", "start"])
def test_dropped_captions_are_empty_ones(paths, loaded, pipeline, encode_at):
    options = {"encode": encode_at, "caption_dropout": 0.5, "batch_size": 44}
    config = config_of("folder", paths["folder"], **options)
    (batch,) = batches_of(config, pipeline, 1, encode=encoding.make_encode(*loaded))
    name = "text_encoder" if encode_at == "step" else "encoder_hidden_states"
    null = text.tokens(pipeline, [""]) if encode_at == "step" else jax.device_get(text.encode(*loaded, [""]))
    dropped = np.array([np.allclose(row, null[name][0], atol=1e-5) for row in batch[name]])
    assert 10 < dropped.sum() < 34


@pytest.mark.parametrize("encode_at", ["step", "start"])
@pytest.mark.parametrize("zero_null", [True, False])
def test_dropped_captions_of_sdxl_are_its_own_null_text(paths, encode_at, zero_null):
    """Zeros, as guidance takes them at inference, and not the states of "", unless the model says so."""
    pipeline, params = tiny.loaded("sdxl")
    index = {**pipeline.configs["model_index"], "force_zeros_for_empty_prompt": zero_null}
    pipeline = dataclasses.replace(pipeline, configs={**pipeline.configs, "model_index": index})
    encode = encoding.make_encode(pipeline, params)
    config = config_of("folder", paths["folder"], encode=encode_at, caption_dropout=0.5, batch_size=16)
    (batch,) = batches_of(config, pipeline, 1, encode=encode)
    batch = encoding.encode_rows(encode, {n: v for n, v in batch.items() if n not in ("pixels", "time_ids")}, 16)
    null = jax.device_get(text.null(pipeline, params))
    dropped = np.array([np.allclose(row, null["text_embeds"][0], atol=1e-5) for row in batch["text_embeds"]])
    assert 2 < dropped.sum() < 14
    parity.close(
        batch["encoder_hidden_states"][dropped], np.repeat(null["encoder_hidden_states"], dropped.sum(), 0), atol=1e-5
    )
    assert np.abs(null["text_embeds"]).max() == 0 if zero_null else np.abs(null["text_embeds"]).max() > 0
    assert np.abs(batch["text_embeds"][~dropped]).max(1).min() > 0


def test_data_log_reports_captions_that_are_cut(tmp_path, pipeline):
    records = data_kit.records(8)
    for record in records[:3]:
        record["text"] = "red circle " * 60
    lines: list[str] = []
    config = config_of("folder", data_kit.imagefolder(tmp_path / "x", records))
    batches_of(config, pipeline, 1, log=run_data.DataLog(loader.BadRecordLog(0.0), lines.append))
    assert any("3 of 8 captions were longer" in line and "tokens were cut off" in line for line in lines), lines


def test_fingerprint_distinguishes_models(loaded):
    fingerprint = functools.partial(cache.fingerprint, resolution=64, sizes=((64, 64),))
    pipeline, params = loaded
    one = fingerprint(pipeline, params)
    assert one == fingerprint(*load_pipeline(tiny.folder("sd1"))) == json.loads(json.dumps(one))
    other = fingerprint(*tiny.loaded("sdxl"))
    assert {key for key in one if one[key] != other[key]} >= {"tokenizers", "text_encoders", "time_ids"}
    kernel = params["vae"]["quant_conv"]["kernel"]
    vae = {**params["vae"], "quant_conv": {**params["vae"]["quant_conv"], "kernel": kernel + 1e-6}}
    other = fingerprint(pipeline, {**params, "vae": vae})
    assert {key for key in one if one[key] != other[key]} == {"vae"}


def digest(source: str, path: str | None, **changes) -> str:
    (entry,) = run_data.digests(run_data.open_parts(config_of(source, path, **changes))).values()
    return entry["digest"]


@pytest.mark.parametrize("source", data_kit.WRITERS)
def test_a_digest_tells_other_records_and_not_where_they_are(paths, source, tmp_path):
    """Removed and added, in another order, another image or caption of the same key; then the same elsewhere."""
    begun, write = data_kit.records(6), data_kit.WRITERS[source]
    other = begun[5] | {"key": "000000099"}
    others = {
        "replaced": [*begun[:5], other],
        "ordered": [begun[0] | {"key": begun[1]["key"]}, begun[1] | {"key": begun[0]["key"]}, *begun[2:]],
        "picture": [*begun[:5], begun[5] | {"image": begun[4]["image"]}],
        "caption": [*begun[:5], begun[5] | {"text": "a text of another length"}],
        "same": begun,
    }
    first = digest(source, write(tmp_path / "begun", begun))
    found = {name: digest(source, write(tmp_path / name, records)) for name, records in others.items()}
    blind = {"tfds": {"replaced", "ordered", "caption"}}.get(
        source, set()
    )  # no keys, and sizes of many records at once
    assert {name for name in others if found[name] == first} - blind == {"same"}
    assert digest(source, paths[source]) != digest(source, paths[source], filters=("width >= 80",)) != first


def test_digests_of_a_mixture_of_parquet_without_keys_and_of_shapes(tmp_path):
    rows = [{key: value for key, value in record.items() if key != "key"} for record in data_kit.records(4)]
    one = data_kit.parquet(tmp_path / "one", rows)
    two = data_kit.parquet(tmp_path / "two", [rows[1], rows[0], *rows[2:]])
    assert digest("huggingface", one) != digest("huggingface", two)
    mixture = (f"1 huggingface {one}", f"1 huggingface {two}", "1 shapes")
    found = run_data.digests(run_data.open_parts(config_of("mixture", None, mixture=mixture)))
    assert [entry["name"] for entry in found.values()] == [f"huggingface {one}", f"huggingface {two}", "shapes"]
    assert len({entry["digest"] for entry in found.values()}) == 3
    assert digest("shapes", None) != digest("shapes", None, num_examples=7)
