"""`lcm_jax.precompute`: the cache equals encoding at the start of a run, trains the same, and survives being killed."""

import dataclasses
import functools
import itertools
import os
import shutil
import signal
import threading
import time
from pathlib import Path

import jax
import numpy as np
import parity
import pytest
import tiny
import tiny_family
import training_processes as runs
from PIL import Image
from training_processes import snapshot

import lcm_jax
from configs import shapes_lcm
from lcm_jax import files, precompute, train
from lcm_jax.data import cache, encoding, loader, shapes
from lcm_jax.data.order import draws_at
from lcm_jax.errors import LcmError
from lcm_jax.precompute import Options
from lcm_jax.pretrained.text import tokens
from lcm_jax.run import data as run_data
from lcm_jax.run.models import load_teacher
from lcm_jax.runtime import distributed, waiting
from lcm_jax.sampling import teacher as teacher_lib
from lcm_jax.sampling.teacher import Recipe

STEPS = 3
EXAMPLES = 160  # two and a half batches of the encoders
RANDOM = {"num_examples": EXAMPLES, "crop": "random", "flip": 0.5}
OPTIONS = Options(shard_size=16)
PROGRAM = ("-m", "lcm_jax.precompute", "--config=configs/shapes_lcm.py")


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> Path:
    return tiny.build("teacher", tmp_path_factory.mktemp("precompute") / "teacher")


def make_config(teacher, **data):
    """As test_train.py's, so that the step is compiled once for both files."""
    config = shapes_lcm.get_config()
    config.model.teacher = str(teacher)
    config.data.update(num_examples=EXAMPLES, batch_size=4, crop="center", encode="step")
    config.data.update(data)
    config.train.steps = STEPS
    config.log.every = 1
    config.sample.every = 0
    return config


def log() -> run_data.DataLog:
    return run_data.DataLog(loader.BadRecordLog(0.01), print)


def expected_rows(config):
    """(the rows that a run makes before training begins, the image rows they are made from, encode)."""
    pipeline, params = load_teacher(config)
    (part,) = run_data.open_parts(config)

    def tokenize(captions):
        return run_data.tokenize_captions(pipeline.tokenizers, captions)

    images = run_data.image_rows(config, part.source, tokenize, time_ids=pipeline.is_xl)
    encode = encoding.make_encode(pipeline, params)
    return run_data.encode_at_start(images, encode, config.seed, log()), images, encode


@pytest.fixture(scope="module")
def expected(teacher):
    return expected_rows(make_config(teacher, **RANDOM))


@pytest.fixture(scope="module")
def random_cache(teacher, tmp_path_factory) -> Path:
    """A cache of token ids, with random flips, in shards of 16 rows."""
    out = tmp_path_factory.mktemp("random") / "cache"
    precompute.latents(make_config(teacher, **RANDOM), out, OPTIONS)
    return out


@pytest.fixture(scope="module")
def centred(teacher, tmp_path_factory) -> dict[str, Path]:
    """Caches of whole images, with ids and with embeddings."""
    root = tmp_path_factory.mktemp("centred")
    for text in cache.TEXTS:
        precompute.latents(make_config(teacher), root / text, Options(text=text, shard_size=64))
    return {text: root / text for text in cache.TEXTS}


def check_row(cached, group, rank, expected):
    found = cached.row(group, rank)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype == value.dtype
        parity.close(found[name], value, rtol=1e-5, atol=1e-5, what=f"{name} of {rank}")


def moments(row):
    return {name: row[name] for name in ("mean", "logvar")}


def test_latents_equal_encoding_at_the_start(teacher, random_cache, expected, tmp_path):
    rows, images, _ = expected
    precompute.latents(make_config(teacher, **RANDOM), tmp_path / "cache", Options(text="embeddings"))
    embeddings, ids = cache.open(tmp_path / "cache"), cache.open(random_cache)
    assert embeddings.groups == ids.groups == rows.groups == (EXAMPLES,)
    for rank in range(EXAMPLES):
        row = rows.row(0, rank, None)
        check_row(embeddings, 0, rank, row)
        assert embeddings.where(0, rank) == ("shapes/train/plain", str(rank))
        assert embeddings.about(0, rank)["caption"] == shapes.example(rank, "train")[1]
        if rank % 7 == 0:
            text = images.row(0, rank, draws_at(0, rank))["text_encoder"]
            check_row(ids, 0, rank, moments(row) | {"text_encoder": text})


@pytest.mark.slow
def test_variants_are_further_random_rows(random_cache, expected, teacher, tmp_path):
    precompute.latents(make_config(teacher, **RANDOM), tmp_path / "cache", Options(variants=2, shard_size=64))
    two, one, (_, images, encode) = cache.open(tmp_path / "cache"), cache.open(random_cache), expected
    assert two.groups == (2 * EXAMPLES,)
    for rank in range(EXAMPLES):
        check_row(two, 0, 2 * rank, one.row(0, rank))
        assert two.where(0, 2 * rank) == two.where(0, 2 * rank + 1) == one.where(0, rank)
    rows = [images.row(0, rank, draws_at(0, EXAMPLES + rank)) for rank in range(64)]
    encoded = encoding.encode_rows(encode, {"pixels": np.stack([row["pixels"] for row in rows])}, 64)
    for rank, row in enumerate(rows):
        of_row = {name: encoded[name][rank] for name in ("mean", "logvar")}
        check_row(two, 0, 2 * rank + 1, of_row | {"text_encoder": row["text_encoder"]})


def test_half_precision_of_sdxl_is_rounded_except_its_sizes(tmp_path):
    """Two crops and flips of each of 20 wide images."""
    for i in range(20):
        wide = np.concatenate([shapes.example(i, "train")[0], shapes.example(i + 20, "train")[0]], axis=1)
        Image.fromarray(wide).save(tmp_path / f"{i:02d}.png")
        (tmp_path / f"{i:02d}.txt").write_text("a red circle")
    data = RANDOM | {"source": "folder", "path": str(tmp_path), "num_examples": 4096, "resolution": 32}
    config = make_config(tiny.folder("sdxl"), **data)
    precompute.latents(config, tmp_path / "cache", Options(text="embeddings", dtype="float16", variants=2))
    cached, (rows, _, _) = cache.open(tmp_path / "cache"), expected_rows(config)
    for rank in range(20):
        found, row = cached.row(0, 2 * rank), rows.row(0, rank, None)
        assert found.keys() == row.keys() == {"mean", "logvar", "encoder_hidden_states", "text_embeds", "time_ids"}
        np.testing.assert_array_equal(found.pop("time_ids"), row["time_ids"])
        for name, value in found.items():
            assert value.dtype == np.float32 and (value == value.astype(np.float16)).all()
            parity.close(value, row[name], rtol=1.5 * parity.HALF, atol=1e-4)  # rounded: half a unit
    crops = [tuple(cached.row(0, rank)["time_ids"][2:4]) for rank in range(40)]
    assert len(set(crops)) > 10 and sum(a != b for a, b in zip(crops[::2], crops[1::2], strict=True)) > 10


@pytest.mark.slow
def test_training_from_a_cache_is_training_from_images(teacher, centred, tmp_path):
    """With half of the captions dropped; and the step is one program for all."""

    def losses(name, **data):
        with runs.traces() as traced:
            train.train(make_config(teacher, caption_dropout=0.5, **data), tmp_path / name)
        return [loss for _, loss, _ in runs.logged(tmp_path / name)], traced

    want, traces = losses("images")
    assert len(set(want)) == len(want) == STEPS and len(traces) == 1
    for text, path in centred.items():
        found, again = losses(text, source="latents", path=str(path))
        parity.close(found, want, rtol=1e-5, atol=1e-5)
        assert again == traces


@pytest.mark.slow
def test_a_cache_can_be_held_in_memory(teacher, centred):
    """Then its captions are encoded once, at the start."""
    config = make_config(teacher, source="latents", path=str(centred["ids"]), encode="start")
    pipeline, params = load_teacher(config)
    encode = encoding.make_encode(pipeline, params)
    (rows,), order = run_data.open_examples(config, run_data.open_parts(config), pipeline, encode, log())
    assert order.streams == ((EXAMPLES,),)
    for rank in range(0, EXAMPLES, 20):
        check_row(cache.open(centred["embeddings"]), 0, rank, rows.row(0, rank, None))


def refused(function, *words):
    with pytest.raises(LcmError) as error:
        function()
    assert "\n" not in str(error.value) and all(word in str(error.value) for word in words), error.value


def test_a_run_of_other_models_or_sizes_refuses_the_cache(teacher, centred, tmp_path):
    def other(path=centred["ids"], model=teacher, **data):
        return lambda: train.train(make_config(model, source="latents", path=str(path), **data), tmp_path / "run")

    def changed(part, change):
        folder = Path(shutil.copytree(teacher, tmp_path / part))
        change(folder)
        return folder

    def scale_vae(folder):
        vae = tiny.AutoencoderKL.from_pretrained(folder / "vae")
        vae.encoder.conv_in.weight.data *= 1.5
        vae.save_pretrained(folder / "vae")

    def pad_otherwise(folder):
        shutil.rmtree(folder / "tokenizer")
        tiny.write_tokenizer(folder / "tokenizer", "sdxl_2")

    def scale_text(folder):
        text = tiny.CLIPTextModel.from_pretrained(folder / "text_encoder")
        text.get_input_embeddings().weight.data *= 1.5
        text.save_pretrained(folder / "text_encoder")

    made = cache.open(centred["ids"]).manifest["fingerprint"]
    refused(other(resolution=128), "resolution 64", "128", "set the cache's resolution")
    refused(other(aspect_buckets=True, bucket_step=16), "sizes [[64, 64]]", "aspect_buckets")
    model = changed("vae", scale_vae)
    mine = cache.fingerprint(*load_teacher(make_config(model)), 64, ((64, 64),))
    refused(other(model=model), f"vae {made['vae'][:12]}", mine["vae"][:12], "precompute again")
    model = changed("tokenizer", pad_otherwise)
    refused(other(model=model), f"tokenizers {{text_encoder: {made['tokenizers']['text_encoder'][:12]}")
    model = changed("text_encoder", scale_text)
    refused(other(centred["embeddings"], model), "text_encoders {text_encoder: ")
    refused(other(filters=("side >= 32",)), "latent cache", "config.data.filters = []", "['side >= 32']")
    refused(other(flip=0.25), "config.data.flip = 0.0", "0.25", "precompute again")


def test_mixtures_are_of_caches_of_one_kind(teacher, centred, folder):
    def parts(*mixture):
        return run_data.open_parts(make_config(teacher, source="mixture", mixture=mixture, num_examples=4096))

    ids, embeddings = (f"1 latents {centred[text]}" for text in cache.TEXTS)
    assert [part.weight for part in parts(ids, f"3 latents {centred['ids']}")] == [1, 3]
    config = make_config(teacher, source="mixture", mixture=(ids, ids), flip=0.25)
    check = functools.partial(run_data.check_caches, config, run_data.open_parts(config), *load_teacher(config))
    refused(check, "config.data.flip = 0.0", "0.25", "precompute again")  # that no cache of the mixture has
    config.data.flip = 0.0
    check()
    refused(lambda: parts(ids, embeddings), "embeddings and ids", "--text")
    refused(lambda: parts(ids, "1 latents"), "without a folder")
    refused(lambda: parts(ids, f"1 folder {folder}"), "ids and images")


def test_aspect_buckets_are_groups(teacher, tmp_path):
    config = make_config(teacher, aspect_buckets=True, bucket_step=16, num_examples=20)
    sizes = run_data.image_sizes(config)
    precompute.latents(config, tmp_path / "cache", Options())
    cached, square = cache.open(tmp_path / "cache"), sizes.index((64, 64))
    assert len(sizes) > 1 and cached.groups == tuple(20 * (i == square) for i in range(len(sizes)))
    rows, _, _ = expected_rows(make_config(teacher, num_examples=20))
    text = cached.row(square, 5)["text_encoder"]
    check_row(cached, square, 5, moments(rows.row(0, 5, None)) | {"text_encoder": text})


def test_latents_refuses_what_cannot_be_one_cache(teacher, random_cache, tmp_path):
    def latents(out=tmp_path / "cache", options=OPTIONS, **data):
        return lambda: precompute.latents(make_config(teacher, **(RANDOM | data)), out, options)

    refused(latents(source="mixture", mixture=("1 shapes",)), "mixture", "each part on its own", "latents DIR")
    refused(latents(source="latents", path=str(random_cache)), "encoded already")
    refused(latents(resolution=60), "resolution = 60", "factor 8")
    refused(latents(random_cache.parent), str(random_cache.parent), "other things")
    refused(latents(tmp_path / os.fsdecode(b"\xe9")), "--out=", "its name is not UTF-8")
    refused(latents(random_cache, flip=0.25), "data.flip: 0.5 there, 0.25 now", "another folder")
    refused(latents(random_cache, resolution=32), "fingerprint.resolution: 64 there, 32 now")
    refused(latents(random_cache, Options()), "shard_size: 16 there, 4096 now")
    refused(lambda: Options(text="words"), "--text=words", "ids, embeddings")
    refused(lambda: Options(variants=0), "--variants=0")
    refused(lambda: Options(variants=10**30), "--variants=1000000000000000000000000000000: out of range; choose 1 to")
    refused(
        lambda: Options(shard_size=10**30), "--shard_size=1000000000000000000000000000000: out of range; choose 1 to"
    )


def test_no_weights_of_the_unet_are_read_and_sizes_are_checked_first(teacher, random_cache, tmp_path):
    model = shutil.copytree(teacher, tmp_path / "model")
    for path in (model / "unet").glob("*.safetensors"):
        path.unlink()
    precompute.latents(make_config(model, **RANDOM), tmp_path / "cache", OPTIONS)
    assert snapshot(tmp_path / "cache") == snapshot(random_cache)
    for path in (model / "vae").glob("*.safetensors"):
        path.unlink()
    refused(lambda: precompute.latents(make_config(model, resolution=60), tmp_path / "b", Options()), "factor 8")
    refused(lambda: precompute.latents(make_config(model), tmp_path / "c", Options()), f"{model / 'vae'} has no")


@pytest.mark.parametrize("mine", [None, "SIGINT: stopped; ..."])
def test_a_process_that_has_written_its_files_stops_with_the_others(teacher, tmp_path, monkeypatch, mine):
    monkeypatch.setattr(precompute.CacheWriter, "write", lambda self: mine)
    monkeypatch.setattr(distributed, "any_process", lambda flag: True)
    with pytest.raises(precompute.Stopped, match=mine or "SIGTERM: stopped; the same command resumes"):
        precompute.latents(make_config(teacher, num_examples=4), tmp_path / "cache", OPTIONS)
    assert not (tmp_path / "cache" / "manifest.json").exists()


def test_a_process_that_fails_reports_it_at_once_and_stops_the_others(monkeypatch, capsys):
    asked = []

    def fail(self):
        raise LcmError("too many records cannot be used")

    monkeypatch.setattr(precompute.CacheWriter, "write_shards", fail)
    monkeypatch.setattr(distributed, "ask_to_stop", lambda: asked.append(True))
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    refused(precompute.CacheWriter(*[None] * 8).write, "too many records")
    line = "process 0 of 2 failed: too many records cannot be used; the others stop at their next batch\n"
    assert capsys.readouterr().err == line and asked == [True]


def test_processes_that_see_different_folders_are_refused_before_any_work(teacher, tmp_path, monkeypatch):
    """Process 0 would miss the shards of the others when all are written."""
    checked = []

    def check_shared(folder):
        checked.append(folder)
        raise LcmError("is not the folder that process 0 writes to")

    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(distributed, "check_shared", check_shared)
    monkeypatch.setattr(precompute, "prepare", lambda *_: pytest.fail("work has begun"))
    refused(lambda: precompute.latents(make_config(teacher), tmp_path / "cache", Options()), "is not the folder")
    assert checked == [tmp_path / "cache"]


SLOW = """
import runpy, time
from absl import flags
from lcm_jax.runtime.telemetry import Progress
move = Progress.move
def slowly(self, count):
    move(self, count)
    time.sleep(4 if flags.FLAGS.process_id == 0 else 0)
Progress.move = slowly
runpy.run_module("lcm_jax.precompute", run_name="__main__")
"""


def start_two(teacher, out, *options: str):
    """Two processes, the first of which takes four seconds and more for each batch."""
    program = ("-c", SLOW, *PROGRAM[2:], f"--config.model.teacher={teacher}", f"--out={out}")
    return runs.start(*options, program=program, processes=2)


@pytest.mark.slow
def test_one_of_two_processes_fails(teacher, folder, tmp_path):
    for path in set(folder.iterdir()) - set(folder.glob("05.*")):  # 05 is of process 1: rows 4 to 7
        for copy in range(20):
            shutil.copy(path, folder / f"more-{copy:02d}-{path.name}")
    data = "--config.data.source=folder", f"--config.data.path={folder}", "--config.data.max_bad_fraction=0.0"
    first, second = runs.ended(start_two(teacher, tmp_path / "cache", "--shard_size=4", *data), code=2)
    assert "process 1 of 2 failed: " in second and "the others stop at their next batch" in second
    assert "error: process 1 of 2: " in first and "05.png" in first and "05.png" in second
    assert len(list((tmp_path / "cache").glob("latents-*"))) < 20, "of 58; the first process stopped early"


@pytest.mark.slow
def test_a_signal_when_one_of_two_processes_has_written_its_files(teacher, tmp_path):
    out = tmp_path / "cache"
    processes = start_two(teacher, out, "--shard_size=10", "--config.data.num_examples=100")
    while all(process.poll() is None for process in processes) and not all(
        (out / "progress" / f"{cache.shard_name(0, number)}.json").exists() for number in range(1, 10, 2)
    ):
        time.sleep(0.1)
    processes[0].send_signal(signal.SIGTERM)
    for output in runs.ended(processes, code=1):
        assert "SIGTERM: stopped; the same command resumes after the last complete file" in output


def test_a_finished_cache_is_left_alone_if_its_shards_are_there(teacher, random_cache, tmp_path, capsys):
    before, copied = snapshot(random_cache), Path(shutil.copytree(random_cache, tmp_path / "cache"))
    precompute.latents(make_config(teacher, **RANDOM), random_cache, OPTIONS)
    assert "is complete already" in capsys.readouterr().err and snapshot(random_cache) == before
    next(copied.glob("*array_record*")).unlink()
    refused(lambda: precompute.latents(make_config(teacher, **RANDOM), copied, OPTIONS), "is missing")


@pytest.fixture
def folder(tmp_path) -> Path:
    """Images with captions, one of them truncated."""
    (tmp_path / "images").mkdir()
    for i in range(12):
        path = tmp_path / "images" / f"{i:02d}.png"
        Image.fromarray(shapes.example(i, "train")[0]).save(path)
        path.with_suffix(".txt").write_text("a red circle")
        if i == 5:
            path.write_bytes(path.read_bytes()[:400])
    return tmp_path / "images"


def test_unusable_records_are_left_out_and_listed(teacher, folder, tmp_path):
    config, out = make_config(teacher, source="folder", path=str(folder), num_examples=4096), tmp_path / "cache"
    config.data.max_bad_fraction = 0.0
    refused(lambda: precompute.latents(config, out, Options(variants=2, shard_size=5)), "05.png", "max_bad_fraction")
    assert not (out / "manifest.json").exists()
    config.data.max_bad_fraction = 0.1  # the same command resumes otherwise
    precompute.latents(config, out, Options(variants=2, shard_size=5))
    cached = cache.open(out)
    (line,) = (out / "bad_records.jsonl").read_text().splitlines()
    assert "05.png" in line and cached.manifest["faults"] == 1
    assert cached.groups == (22,) and cached.manifest["examples"] == [12]
    keys = [cached.where(0, rank)[1] for rank in range(22)]
    assert len(set(keys)) == 11 and keys[::2] == keys[1::2] == sorted(keys[::2])


def test_too_many_unusable_records_leave_a_folder_that_the_next_command_takes(teacher, folder, tmp_path):
    """Found by indexing, before the cache is begun."""
    (folder / "05.txt").unlink()
    config, out = make_config(teacher, source="folder", path=str(folder), num_examples=4096), tmp_path / "cache"
    config.data.max_bad_fraction = 0.0
    for _ in range(2):
        refused(lambda: precompute.latents(config, out, Options()), "05.png", "max_bad_fraction")
    (line,) = (out / "progress" / "bad_records.jsonl").read_text().splitlines()
    assert "05.png" in line and [path.name for path in out.iterdir() if path.name[0] != "."] == ["progress"]


def test_a_signal_is_noticed_while_a_file_hangs(teacher, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(waiting, "PATIENCE", 0.3)
    lines, read, answered = [], files.read_regular, threading.Event()

    def hanging(path, *args):
        if path.name == "07.png":
            answered.wait()
        return read(path, *args)

    monkeypatch.setattr(files, "read_regular", hanging)

    def say(line):
        if "waiting for" in line:
            lines.append(line)
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(waiting, "say", say)
    config, out = make_config(teacher, source="folder", path=str(folder), num_examples=4096), tmp_path / "out"
    config.data.max_bad_fraction = 0.1
    with pytest.raises(precompute.Stopped, match="SIGTERM: stopped; the same command resumes"):
        precompute.latents(config, out, Options(shard_size=4))
    assert "07.png" in lines[0] and [path.name for path in out.glob("latents-*")] == [cache.shard_name(0, 0)]
    answered.set()  # the thread that reads it ends


@pytest.mark.slow
def test_a_signal_drops_the_unfinished_shard(teacher, random_cache, tmp_path, monkeypatch):
    move, out = precompute.Progress.move, tmp_path / "cache"

    def stopping(self, count):
        move(self, count)
        if self.done == 48:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(precompute.Progress, "move", stopping)
    with pytest.raises(precompute.Stopped, match="SIGTERM"):
        precompute.latents(make_config(teacher, **RANDOM), out, OPTIONS)
    shards = sorted(p.name for p in out.glob("latents-*"))
    assert shards == [cache.shard_name(0, i) for i in range(3)] and not list(out.glob(".*.partial"))
    refused(lambda: cache.open(out), "same lcm_jax.precompute command again")
    refused(lambda: precompute.latents(make_config(teacher, **RANDOM), out, Options()), "16 there, 4096 now")
    precompute.latents(make_config(teacher, **RANDOM), out, OPTIONS)
    assert snapshot(out) == snapshot(random_cache)


def test_killed_and_resumed_is_byte_for_byte_the_same(teacher, random_cache, tmp_path):
    """By another process; no other may write beside it. Includes what a kill in the middle of a shard leaves."""
    out, config = tmp_path / "cache", make_config(teacher, **RANDOM)
    options = [f"--config.data.{key}={value}" for key, value in RANDOM.items()]
    options += [f"--config.model.teacher={teacher}", f"--out={out}", "--shard_size=16"]
    (process,) = runs.start(*options, program=PROGRAM)
    while process.poll() is None and not list(out.glob("progress/latents-*")):
        time.sleep(0.002)
    os.kill(process.pid, signal.SIGSTOP)
    refused(lambda: precompute.latents(config, out, OPTIONS), "in use by another process", str(out))
    os.kill(process.pid, signal.SIGKILL)
    runs.ended([process], -signal.SIGKILL)
    assert not (out / "manifest.json").exists()
    assert 1 <= len(list(out.glob("progress/latents-*"))) < EXAMPLES // 16
    (out / f".{cache.shard_name(0, 9)}.12345678.partial").write_bytes(b"half a shard")
    precompute.latents(config, out, OPTIONS)
    assert snapshot(out) == snapshot(random_cache)


PROMPTS = ("a red circle", "hello, a small blue square", "a red circle")  # one of them twice: another image


@pytest.fixture(scope="module")
def prompts(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    path.write_text("\n".join((*PROMPTS[:2], "", PROMPTS[2])) + "\n")
    return path


def teachers_config(teacher, **data):
    """Without the keys of images."""
    config = make_config(teacher, num_examples=4096)
    config.data.update(source="folder", path=None, **data)
    return config


OF_TEACHER = Options(variants=2, shard_size=4)


@pytest.fixture(scope="module")
def made(teacher, prompts, tmp_path_factory) -> Path:
    """Two images of each prompt by three steps of the teacher, two at a time."""
    out = tmp_path_factory.mktemp("made") / "cache"
    precompute.latents(teachers_config(teacher), out, OF_TEACHER, Recipe(prompts, steps=3, batch_size=2))
    return out


def test_a_teachers_images_of_prompts_are_those_that_sampling_makes(teacher, prompts, made, tmp_path):
    cached, model = cache.open(made), lcm_jax.load(teacher)
    assert cached.groups == (6,) and cached.manifest["seed"] == 0 and cached.manifest["examples"] == [3]
    config = teachers_config(teacher)
    scale = 1 + (config.distill.w_min + config.distill.w_max) / 2
    taken = cached.manifest["teacher"]
    assert (taken["sampler"], taken["steps"], taken["guidance_scale"]) == ("dpm_solver_pp_2m", 3, scale)
    rows = [cached.row(0, rank) for rank in range(6)]
    for rank, row in enumerate(rows):
        prompt = PROMPTS[rank // 2]
        noise = model.noise(0, [rank], 1, 64, 64)
        z = model.latents(model.encode([prompt]), noise, scale, lcm_jax.Settings("dpm_solver_pp_2m", 3))
        factor = model.pipeline.vae.scaling_factor
        parity.close(row["mean"] * factor, np.asarray(z)[0], rtol=1e-4, atol=1e-4, what=f"row {rank}")
        assert (row["logvar"] == -30).all() and np.abs(z).std() > 0.1
        assert cached.about(0, rank) == {"key": str(rank), "shard": "prompts.txt", "caption": prompt}
        np.testing.assert_array_equal(row["text_encoder"], tokens(model.pipeline, [prompt])["text_encoder"][0])
    assert min(np.abs(a["mean"] - b["mean"]).max() for a, b in itertools.combinations(rows, 2)) > 0.1

    settings = Recipe(prompts, steps=3, batch_size=2)
    precompute.latents(teachers_config(teacher), tmp_path / "text", Options(text="embeddings", variants=2), settings)
    text = cache.open(tmp_path / "text").row(0, 2)
    want = model.encode([PROMPTS[1]])["encoder_hidden_states"][0]
    parity.close(text["encoder_hidden_states"], want, rtol=1e-4, atol=1e-4)
    parity.close(text["mean"], rows[2]["mean"], rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_a_teachers_cache_resumes_and_knows_what_it_was_made_of(teacher, prompts, made, tmp_path, monkeypatch):
    """Byte for byte; the prompts may be at another place."""
    copied, out = Path(shutil.copy(prompts, tmp_path / "prompts.txt")), tmp_path / "cache"
    settings, write = Recipe(copied, steps=3, batch_size=2), cache.write_shard

    def stopping(path, records):
        written = write(path, records)
        os.kill(os.getpid(), signal.SIGTERM)
        return written

    monkeypatch.setattr(cache, "write_shard", stopping)
    with pytest.raises(precompute.Stopped, match="SIGTERM: stopped; the same command resumes"):
        precompute.latents(teachers_config(teacher), out, OF_TEACHER, settings)
    monkeypatch.setattr(cache, "write_shard", write)
    assert len(list(out.glob("latents-*"))) == 1 and not (out / "manifest.json").exists()

    def other(words, options=OF_TEACHER, settings=settings, **changes):
        config = teachers_config(teacher)
        config.update_from_flattened_dict(changes)
        refused(lambda: precompute.latents(config, out, options, settings), f"--out={out}: was made with other", *words)

    changed = dataclasses.replace
    other(["teacher.steps: 3 there, 4 now"], settings=changed(settings, steps=4))
    other(["teacher.sampler: dpm_solver", "ddim now"], settings=changed(settings, sampler="ddim"))
    other(["teacher.guidance_scale: 4.75 there, 3.0 now"], settings=changed(settings, guidance_scale=3.0))
    other(["teacher.negative_prompt: None there, blurred now"], settings=changed(settings, negative_prompt="blurred"))
    other(["variants: 2 there, 3 now"], Options(variants=3, shard_size=4))
    other(["seed: 0 there, 1 now"], seed=1)
    config = make_config(teacher, num_examples=4096)
    refused(lambda: precompute.latents(config, out, OF_TEACHER), "data.source: teacher there, shapes now", "teacher")
    copied.write_text("a red circle\n")
    other(["records: ", " there, ", "examples"])
    shutil.copy(prompts, copied)
    unet = shutil.copytree(teacher, tmp_path / "model") / "unet"
    changed_unet = tiny.UNet2DConditionModel.from_pretrained(unet)
    changed_unet.conv_out.weight.data *= 1.5
    changed_unet.save_pretrained(unet)
    other(["teacher.unet: "], **{"model.teacher": str(tmp_path / "model")})

    precompute.latents(teachers_config(teacher), out, OF_TEACHER, changed(settings, batch_size=2))
    found, want = (
        {name: content for name, content in snapshot(folder).items() if name != cache.MANIFEST}
        for folder in (out, made)
    )
    assert found == want
    one, two = (cache.read_manifest(folder) for folder in (out, made))
    assert one | {"data": None} == two | {"data": None} and one["data"]["path"] == str(copied)


def test_what_a_teacher_cannot_make_is_refused_before_it_is_read(teacher, prompts, tmp_path):
    model = shutil.copytree(teacher, tmp_path / "model")
    for path in model.glob("*/*.safetensors"):
        path.unlink()
    empty = tmp_path / "empty.txt"
    empty.write_text("\n \n")

    def latents(settings=None, **changes):
        config = teachers_config(model)
        config.update_from_flattened_dict(changes)
        return lambda: precompute.latents(config, tmp_path / "cache", OF_TEACHER, settings or Recipe(prompts))

    refused(latents(**{"data.path": "images"}), "data.path = 'images'", f"data.path = '{tmp_path / 'cache'}'")
    refused(latents(**{"data.mixture": ("1 folder /a",)}), "data.mixture", "leave it out; to train on them, set data")
    refused(latents(**{"data.filters": ("side >= 512",)}), "data.filters", "set ()")
    refused(latents(**{"data.flip": 0.5}), "data.flip = 0.5", "set 0.0")
    refused(latents(**{"data.aspect_buckets": True}), "data.aspect_buckets = True", "set False")
    lcf = {"objective": "lcf", "model.student": str(model), "model.teacher": None}
    refused(latents(**lcf), "config.objective = 'lcf' trains without a teacher")
    refused(latents(Recipe(prompts, steps=51)), "--steps=51: out of range; choose 1 to 50")
    refused(latents(Recipe(prompts, guidance_scale=0.5)), "--guidance_scale=0.5", "use 1 or more")
    useless = Recipe(prompts, guidance_scale=1.0, negative_prompt="blurred")
    refused(latents(useless), "--negative_prompt=blurred: has no effect at guidance scale 1")
    refused(latents(Recipe(empty)), "--prompts=", "empty.txt: holds no prompt")
    refused(latents(Recipe(tmp_path / "none.txt")), "--prompts=", "none.txt")
    refused(latents(Recipe(prompts, batch_size=10**8)), "--batch_size=100000000", "GiB of memory or more")
    refused(lambda: Recipe(prompts, sampler="lcm"), "sampler=lcm: choose one of dpm_solver_pp_2m, ddim, euler")
    refused(lambda: Recipe(prompts, batch_size=0), "batch_size=0: must be at least 1")
    assert not list(tmp_path.glob("cache/[!.]*"))


@pytest.mark.slow
def test_a_teacher_of_zero_terminal_snr_makes_finite_images(prompts, tmp_path):
    """SDXL, with its sizes, in half precision, by every sampler; they differ little where steps are many."""
    found = {}
    for sampler in teacher_lib.SAMPLERS:
        config = teachers_config(tiny_family.zero_snr_folder())
        settings, out = Recipe(prompts, sampler, steps=50, batch_size=3), tmp_path / sampler
        precompute.latents(config, out, Options(dtype="float16"), settings)
        rows = [cache.open(out).row(0, rank) for rank in range(3)]
        assert all((row["time_ids"] == [64, 64, 0, 0, 64, 64]).all() for row in rows)
        found[sampler] = np.stack([row["mean"] for row in rows])
    first = found[teacher_lib.SAMPLERS[0]]
    for sampler, images in found.items():
        assert np.isfinite(images).all() and images.std() > 0.1
        parity.close(images, first, rtol=0, atol=0.3 * first.std(), what=sampler)  # 0.11 at most


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--prompts=p.txt"], "--prompts=p.txt: is of --what=teacher; add that, or leave it out"),
        (["--what=teacher"], "--what=teacher needs --prompts=FILE, with one prompt per line"),
        (["--what=teacher", "--prompts=p.txt", "--sampler=tcd"], "--sampler=tcd: choose one of"),
        (["--what=teacher", "--prompts=p.txt"], "--prompts=p.txt: "),
    ],
)
def test_the_flags_of_a_teacher(tmp_path, options, words):
    (output,) = runs.ended(runs.start(f"--out={tmp_path / 'cache'}", *options, program=PROGRAM), code=2)
    assert f"error: {words}" in output.splitlines()[-1]


def test_the_program_reports_a_bad_option_in_one_line(tmp_path):
    (output,) = runs.ended(runs.start(f"--out={tmp_path / 'cache'}", "--variants=0", program=PROGRAM), code=2)
    assert output.startswith("error: --variants=0") and output.count("\n") == 1 and not (tmp_path / "cache").exists()
