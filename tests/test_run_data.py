"""From files to the step's batches: four formats, real processes, damaged records, mixtures, buckets, encoding."""

import contextlib
import functools
import io
import itertools
import json
import os
import socket
import subprocess
import sys
from collections import Counter
from pathlib import Path

import data_kit
import jax
import numpy as np
import parity
import pytest
import tiny
from PIL import Image

from lcm_jax import train
from lcm_jax.data import encoding, loader
from lcm_jax.data.records import BadRecord
from lcm_jax.errors import LcmError
from lcm_jax.pretrained import load_pipeline
from lcm_jax.pretrained import text as conditioning
from lcm_jax.run import config as config_lib
from lcm_jax.run import data as training_data
from lcm_jax.runtime import checkpoints as checkpoint

ROOT = Path(__file__).parents[1]
COUNT = 44


@pytest.fixture(scope="module")
def loaded():
    return load_pipeline(tiny.folder("sd1"))


@pytest.fixture(scope="module")
def pipeline(loaded):
    return loaded[0]


@pytest.fixture(scope="module")
def paths(tmp_path_factory) -> dict[str, str]:
    """Source -> where it holds the same COUNT records."""
    root, found = tmp_path_factory.mktemp("sources"), data_kit.records(COUNT)
    return {name: write(root / name, found) for name, write in data_kit.WRITERS.items()}


def config_of(source: str, path: str | None, **changes):
    config = config_lib.default_config()
    config.model.teacher = str(tiny.folder("sd1"))
    config.data.source, config.data.path = source, path
    config.data.resolution, config.data.batch_size = 64, 8
    config.data.flip = 0.5
    config.update_from_flattened_dict({f"data.{key}": value for key, value in changes.items()})
    config_lib.validate(config)
    return config_lib.resolve(config)


def silent_watch(share: float = 1.0, told: list | None = None, lines: list | None = None) -> training_data.Watch:
    told, lines = [] if told is None else told, [] if lines is None else lines
    return training_data.Watch(loader.BadRecordLog(share, told.append), lines.append)


def taken(config, pipeline, steps: int, *, start: int = 0, watch=None, encode=None) -> list[dict[str, np.ndarray]]:
    """Batches of the config's data on the host, before they are encoded."""
    watch = watch or silent_watch()
    parts = training_data.open_parts(config)
    examples, order = training_data.open_examples(config, parts, pipeline, encode or (lambda rows: rows), watch)
    with contextlib.closing(
        loader.batches(
            examples, order, start, bad_records=watch.bad_records, put=watch.captions, workers=config.data.workers
        )
    ) as batches:
        return list(itertools.islice(batches, steps))


def same(a, b) -> bool:
    return all(
        x.keys() == y.keys() and all(np.array_equal(x[name], y[name]) for name in x) for x, y in zip(a, b, strict=True)
    )


@pytest.fixture(scope="module")
def reference(paths, pipeline):
    return taken(config_of("webdataset", paths["webdataset"]), pipeline, 12)


@pytest.mark.parametrize("source", data_kit.WRITERS)
def test_the_same_records_give_the_same_batches(paths, pipeline, reference, source):
    assert same(taken(config_of(source, paths[source]), pipeline, 12), reference)
    first = reference[0]
    assert first["pixels"].shape == (8, 64, 64, 3) and first["pixels"].dtype == np.uint8
    assert first["text_encoder"].shape == (8, 77) and set(first) == {"pixels", "text_encoder"}
    assert not same(taken(config_of(source, paths[source], flip=0.0), pipeline, 12), reference)


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def read_by(processes: int, config, folder: Path, start: int, steps: int, workers: int) -> dict[str, np.ndarray]:
    """The batches [steps b ...] that so many real processes read together."""
    folder.mkdir()
    (folder / "config.json").write_text(config_lib.to_json(config))
    environment = os.environ | {"PYTHONPATH": str(ROOT), "XLA_FLAGS": "", "OMP_NUM_THREADS": "1"}
    port = free_port()
    running = [
        subprocess.Popen(
            [
                sys.executable,
                str(ROOT / "tests" / "data_process.py"),
                str(folder / "config.json"),
                *map(str, (i, processes, port, start, steps, workers)),
                str(folder / f"{i}.npz"),
            ],
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(processes)
    ]
    for process in running:
        _, said = process.communicate(timeout=240)
        assert process.returncode == 0, said[-2000:]
    parts = [np.load(folder / f"{i}.npz") for i in range(processes)]
    return {name: np.concatenate([part[name] for part in parts], axis=1) for name in parts[0].files}


@pytest.mark.slow
def test_real_processes_share_the_batches_and_go_on_for_each_other(paths, reference, tmp_path):
    """One stream by 2 processes, by 4, and by 2 that stop at batch 5, from where one with two workers goes on."""
    config = config_of("webdataset", paths["webdataset"])
    whole = {name: np.stack([batch[name] for batch in reference]) for name in reference[0]}
    two = read_by(2, config, tmp_path / "two", 0, 5, 0)
    four = read_by(4, config, tmp_path / "four", 2, 6, 0)
    rest = read_by(1, config, tmp_path / "rest", 5, 7, 2)
    for name, value in whole.items():
        np.testing.assert_array_equal(two[name], value[:5])
        np.testing.assert_array_equal(four[name], value[2:8])
        np.testing.assert_array_equal(rest[name], value[5:])


DAMAGED = 2000


@pytest.fixture(scope="module")
def damaged(tmp_path_factory) -> tuple[str, list[dict], dict[str, str]]:
    """Shards of 2,000 records, ten of them unusable: (pattern, the good records, key -> word of the reason)."""
    found = data_kit.records(DAMAGED)
    whole = found[7]["image"]
    bad = {
        "truncated": [100, 1101],
        "known format": [202, 1203],
        "0 bytes": [304, 1305],
        "occurs already": [406, 1407],
        "UTF-8": [508, 1509],
    }
    for number in bad["truncated"]:
        found[number]["image"] = found[number]["image"][:-400]
    for number in bad["known format"]:  # a page in the place of the picture
        found[number]["image"] = b"<html><body>404 not found</body></html>" + whole[40:60]
    stream = io.BytesIO()
    Image.open(io.BytesIO(found[9]["image"])).save(stream, "PNG")
    found[9]["image"] = stream.getvalue()  # a PNG named .jpg is a good picture
    for number in bad["0 bytes"]:
        found[number]["image"] = b""
    for number in bad["occurs already"]:
        found[number]["key"] = found[number - 300]["key"]
    folder = tmp_path_factory.mktemp("damaged")
    for shard, part in enumerate(np.array_split(np.arange(DAMAGED), 4)):
        entries = [entry for number in part for entry in data_kit.members(found[number])]
        for number in bad["UTF-8"]:
            name = f"{number:09d}.txt"
            entries = [(n, b"caf\xe9 \xff" if n == name else content) for n, content in entries]
        data_kit.write_tar(folder / f"{shard:05d}.tar", entries)
    reasons = {found[number]["key"]: word for word, numbers in bad.items() for number in numbers}
    numbers = {number for numbers in bad.values() for number in numbers}
    good = [record for number, record in enumerate(found) if number not in numbers]
    return str(folder / "*.tar"), good, reasons


def test_damaged_records_are_named_and_nothing_good_is_lost(damaged, pipeline):
    pattern, good, reasons = damaged
    told: list[BadRecord] = []
    config = config_of("webdataset", pattern, crop="center", flip=0.0, batch_size=50)
    batches = taken(config, pipeline, 40, watch=silent_watch(0.01, told))
    reason_of = {fault.key: fault.reason for fault in told}
    assert reason_of.keys() == reasons.keys() and len(told) == len(reasons)
    for key, word in reasons.items():
        assert word in reason_of[key]
    assert all(fault.shard.endswith(".tar") for fault in told)
    words = Counter(ids.tobytes() for batch in batches for ids in batch["text_encoder"])
    captions = conditioning.tokens(pipeline, [record["text"] for record in good])["text_encoder"]
    pixels = Counter(picture.tobytes() for batch in batches for picture in batch["pixels"])
    replaced = [fault for fault in told if "truncated" in fault.reason or "known format" in fault.reason]
    epoch = DAMAGED - (len(told) - len(replaced))  # what the index leaves out is in no epoch
    first_epoch = list(itertools.chain.from_iterable(batch["pixels"] for batch in batches))[:epoch]
    counts = Counter(picture.tobytes() for picture in first_epoch)
    assert len(counts) == len(good) and sorted(counts.values())[-len(replaced) - 1 :] == [1] + [2] * len(replaced)
    assert set(counts) == set(pixels) and words.keys() == {ids.tobytes() for ids in captions}


@pytest.mark.slow
def test_a_training_on_damaged_shards_finishes_and_lists_them(damaged, tmp_path, capsys):
    pattern, _, reasons = damaged
    config = config_of("webdataset", pattern)
    with config.unlocked():
        config.model.teacher = config.model.student = str(tiny.folder("teacher"))
        config.data.batch_size, config.data.workers, config.train.steps = 50, 1, 41
        config.distill.w_embedding_dim, config.sample.every, config.log.every = 16, 0, 10
    state = train.train(config, tmp_path / "run")
    assert int(state.step) == 41
    listed = [json.loads(line) for line in (tmp_path / "run" / "bad_records.jsonl").read_text().splitlines()]
    assert {fault["key"] for fault in listed} == set(reasons) and len(listed) == len(reasons)
    said = capsys.readouterr().err
    assert all(said.count(fault["reason"]) >= 1 for fault in listed) and "1994 records" in said


@pytest.mark.slow
def test_too_many_damaged_records_stop_a_training_that_loses_nothing(damaged, tmp_path):
    """The index finds 6 of the 10; the run stops at the 8th, is saved there, and goes on when it may."""
    config = config_of("webdataset", damaged[0])
    with config.unlocked():
        config.model.teacher = config.model.student = str(tiny.folder("teacher"))
        config.data.batch_size, config.train.steps, config.data.max_bad_fraction = 50, 41, 7 / DAMAGED
        config.distill.w_embedding_dim, config.sample.every, config.log.every = 16, 0, 10
    with pytest.raises(LcmError, match=r"could not be used.*raise max_bad_fraction \(now 0\.0035\)"):
        train.train(config, tmp_path / "run")
    (step,) = checkpoint.list_steps(tmp_path / "run" / "checkpoints")
    assert 0 < step < 41
    with config.unlocked():
        config.data.max_bad_fraction = 0.01
        config.train.steps = 30
    assert int(train.train(config, tmp_path / "run").step) == 30
    config.train.steps = 31
    more = data_kit.records(1)[0] | {"key": "one_more"}
    shards = Path(damaged[0]).parent
    data_kit.write_tar(shards / "zzzz.tar", data_kit.members(more))
    try:
        with pytest.raises(LcmError, match=r"data\.json says that records .*1994.*1995.* the data have changed"):
            train.train(config, tmp_path / "run")
    finally:
        (shards / "zzzz.tar").unlink()


def test_a_mixture_has_the_shares_of_its_weights(paths, pipeline):
    few = config_of("folder", paths["folder"], filters=("pwatermark <= 0",))
    own = {ids.tobytes() for batch in taken(few, pipeline, 5) for ids in batch["text_encoder"]}
    assert len(own) == 5
    mixed = config_of("mixture", None, mixture=("3 shapes", f"1 folder {paths['folder']}"), num_examples=20)
    batches = taken(mixed, pipeline, 20)
    shapes = config_of("shapes", None, num_examples=20)
    rendered = {ids.tobytes() for batch in taken(shapes, pipeline, 5) for ids in batch["text_encoder"]}
    counts = [sum(ids.tobytes() in rendered for ids in batch["text_encoder"]) for batch in batches]
    assert counts == [6] * 20


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
def test_mixtures_that_cannot_be(pipeline, entry, words):
    with pytest.raises(LcmError, match=words):
        training_data.open_parts(config_of("mixture", None, mixture=(entry,)))


def test_each_part_of_a_mixture_takes_the_keys_that_are_its_own(paths, tmp_path):
    parts = (f"1 webdataset {paths['webdataset']}", f"1 folder {paths['folder']}")
    mixed = config_of("mixture", None, mixture=parts, index_dir=str(tmp_path))
    assert [len(part.source) for part in training_data.open_parts(mixed)] == [COUNT, COUNT]
    assert len(list(tmp_path.glob("*.npz"))) == 3
    with pytest.raises(LcmError, match=r"config\.data\.split = 'test': the source 'webdataset' or 'folder' does not"):
        training_data.open_parts(config_of("mixture", None, mixture=parts, split="test"))


def test_buckets_keep_aspect_ratios_and_lose_nothing(paths, pipeline):
    config = config_of("huggingface", paths["huggingface"], aspect_buckets=True, bucket_step=16, batch_size=4, flip=0.0)
    (part,) = training_data.open_parts(config)
    rows = training_data.pictures(config, part.source, training_data.Tokenize(pipeline.tokenizers))
    per_epoch = sum(-(-size // 4) for size in rows.groups)
    batches = taken(config, pipeline, per_epoch)
    shapes = Counter(batch["pixels"].shape[1:3] for batch in batches)
    assert len(shapes) == 3 and all(abs(h * w / 64**2 - 1) < 0.2 for h, w in shapes)
    assert {h / w > 1 for h, w in shapes} == {True, False}
    seen = {ids.tobytes() for batch in batches for ids in batch["text_encoder"]}
    assert len(seen) == COUNT
    again = taken(config, pipeline, 3, start=4)
    assert same(batches[4:7], again)


def test_sdxl_rows_carry_their_conditions(paths):
    pipeline, _ = load_pipeline(tiny.folder("sdxl"))
    config = config_of("folder", paths["folder"], crop="center", flip=0.0, width_key="pwatermark")
    (batch,) = taken(config, pipeline, 1)
    assert set(batch) == {"pixels", "text_encoder", "text_encoder_2", "time_ids"}
    known = {(72, 96), (101, 70), (64, 64), (90, 130)}  # a watermark score is no width: the pictures' own size
    for ids in batch["time_ids"]:
        height, width, top, left, *target = ids
        scale = 64 / min(height, width)
        assert (height, width) in known and target == [64, 64]
        middle = (height * scale - 64) / 2, (width * scale - 64) / 2
        parity.close((top, left), middle, atol=1)  # whole pixels


def test_encoded_at_the_start_equals_encoded_when_asked_for(paths, loaded, pipeline):
    options = {"crop": "center", "flip": 0.0, "batch_size": 4}
    encode = encoding.make_encode(*loaded)
    at_start = taken(config_of("folder", paths["folder"], encode="start", **options), pipeline, 12, encode=encode)
    by_step = taken(config_of("folder", paths["folder"], **options), pipeline, 12)
    for early, late in zip(at_start, by_step, strict=True):
        late = encoding.encode_rows(encode, late, 4)
        assert early.keys() == late.keys() == {"mean", "logvar", "encoder_hidden_states"}
        for name, value in late.items():
            parity.close(early[name], value, rtol=0, atol=2e-5 * np.abs(value).max())


@pytest.mark.parametrize("encode_at", ["step", "start"])
def test_dropped_captions_are_those_of_nothing(paths, loaded, pipeline, encode_at):
    encode = encoding.make_encode(*loaded)
    options = {"encode": encode_at, "caption_dropout": 0.5, "batch_size": 44}
    (batch,) = taken(config_of("folder", paths["folder"], **options), pipeline, 1, encode=encode)
    if encode_at == "step":
        text, null = batch["text_encoder"], conditioning.tokens(pipeline, [""])["text_encoder"]
    else:
        text, null = batch["encoder_hidden_states"], jax.device_get(conditioning.encode(*loaded, [""]))
        null = null["encoder_hidden_states"]
    dropped = np.array([np.allclose(row, null[0], atol=1e-5) for row in text])
    assert 10 < dropped.sum() < 34


def test_captions_that_are_cut_are_told(tmp_path, pipeline):
    found = data_kit.records(8)
    for record in found[:3]:
        record["text"] = "red circle " * 60
    lines: list[str] = []
    config = config_of("folder", data_kit.imagefolder(tmp_path / "x", found))
    taken(config, pipeline, 1, watch=silent_watch(lines=lines))
    assert any("3 of 8 captions were longer" in line and "tokens were cut off" in line for line in lines), lines


def test_a_model_s_fingerprint_tells_models_and_sizes_apart(loaded):
    print_of = functools.partial(encoding.fingerprint, resolution=64, sizes=((64, 64),))
    pipeline, params = loaded
    one = print_of(pipeline, params)
    assert one == print_of(*load_pipeline(tiny.folder("sd1"))) == json.loads(json.dumps(one))
    other = print_of(*load_pipeline(tiny.folder("sdxl")))
    assert {key for key in one if one[key] != other[key]} >= {"tokenizers", "text_encoders", "time_ids"}
    kernel = params["vae"]["quant_conv"]["kernel"]
    vae = {**params["vae"], "quant_conv": {**params["vae"]["quant_conv"], "kernel": kernel + 1e-6}}
    other = print_of(pipeline, {**params, "vae": vae})
    assert {key for key in one if one[key] != other[key]} == {"vae"}
