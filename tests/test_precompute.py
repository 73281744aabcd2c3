"""`lcm_jax.precompute`: the cache equals encoding at the start of a run, trains the same, and survives being killed."""

import functools
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import jax
import numpy as np
import parity
import pytest
import tiny
from PIL import Image

from configs import shapes_lcm
from lcm_jax import files, precompute, train
from lcm_jax.data import cache, encoding, loader, shapes
from lcm_jax.data.order import draws_at
from lcm_jax.distill import step as step_lib
from lcm_jax.errors import LcmError
from lcm_jax.precompute import Options
from lcm_jax.run import data as training_data
from lcm_jax.run import models as student_lib
from lcm_jax.runtime import distributed, telemetry, waiting

ROOT = Path(__file__).parents[1]
STEPS = 3
EXAMPLES = 160  # two batches of the encoders, and a half
DRAWN = {"num_examples": EXAMPLES, "crop": "random", "flip": 0.5}
OPTIONS = ["--shard_size=16", *(f"--config.data.{key}={value}" for key, value in DRAWN.items())]


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


def snapshot(folder) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(Path(folder).rglob("*")) if p.is_file()}


@pytest.fixture(scope="module")
def drawn(teacher, tmp_path_factory) -> Path:
    """A cache of token ids, of random flips, in shards of 16 rows."""
    out = tmp_path_factory.mktemp("drawn") / "cache"
    precompute.latents(make_config(teacher, **DRAWN), out, Options(shard_size=16))
    return out


@pytest.fixture(scope="module")
def centred(teacher, tmp_path_factory) -> dict[str, Path]:
    """Caches of the whole pictures, with ids and with embeddings."""
    root = tmp_path_factory.mktemp("centred")
    for text in cache.TEXTS:
        precompute.latents(make_config(teacher), root / text, Options(text=text, shard_size=64))
    return {text: root / text for text in cache.TEXTS}


def expected_rows(config):
    """What the run itself makes before training begins."""
    pipeline, params = student_lib.load_teacher(config)
    (part,) = training_data.open_parts(config)
    watch = training_data.Watch(loader.BadRecordLog(0.01), lambda line: None)
    tokenize = training_data.Tokenize(pipeline.tokenizers)
    pictures = training_data.pictures(config, part.source, tokenize, time_ids=pipeline.is_xl)
    encode = encoding.make_encode(pipeline, params)
    return training_data.encode_at_start(pictures, encode, config.seed, watch), pictures, encode


def assert_rows(cached, group, rank, expected):
    found = cached.row(group, rank)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype == value.dtype
        parity.close(found[name], value, rtol=1e-5, atol=1e-5, what=f"{name} of {rank}")


def test_a_cache_equals_encoding_at_the_start(teacher, tmp_path):
    config = make_config(teacher, **DRAWN)
    rows, pictures, _ = expected_rows(config)
    precompute.latents(config, tmp_path / "cache", Options(text="embeddings"))
    cached = cache.open(tmp_path / "cache")
    assert cached.groups == rows.groups == (EXAMPLES,)
    for rank in range(EXAMPLES):
        assert_rows(cached, 0, rank, rows.row(0, rank, None))
        assert cached.where(0, rank) == ("shapes/train/plain", str(rank))
        assert cached.about(0, rank)["caption"] == shapes.example(rank, "train")[1]


def test_ids_are_those_of_the_captions(drawn, teacher):
    cached, (rows, pictures, _) = cache.open(drawn), expected_rows(make_config(teacher, **DRAWN))
    for rank in range(0, EXAMPLES, 7):
        moments = {name: rows.row(0, rank, None)[name] for name in ("mean", "logvar")}
        ids = pictures.row(0, rank, draws_at(0, rank))["text_encoder"]
        assert_rows(cached, 0, rank, moments | {"text_encoder": ids})


@pytest.mark.slow
def test_variants_are_further_draws_one_after_another(drawn, teacher, tmp_path):
    config = make_config(teacher, **DRAWN)
    precompute.latents(config, tmp_path / "cache", Options(variants=2, shard_size=64))
    two, one = cache.open(tmp_path / "cache"), cache.open(drawn)
    assert two.groups == (2 * EXAMPLES,)
    _, pictures, encode = expected_rows(config)
    for rank in range(EXAMPLES):
        assert_rows(two, 0, 2 * rank, one.row(0, rank))
        assert two.where(0, 2 * rank) == two.where(0, 2 * rank + 1) == one.where(0, rank)
    draws = [pictures.row(0, rank, draws_at(0, EXAMPLES + rank)) for rank in range(64)]
    pixels = encoding.encode_rows(encode, {"pixels": np.stack([row["pixels"] for row in draws])}, 64)
    for rank, row in enumerate(draws):
        moments = {name: pixels[name][rank] for name in ("mean", "logvar")}
        assert_rows(two, 0, 2 * rank + 1, moments | {"text_encoder": row["text_encoder"]})


def test_sdxl_in_half_precision_is_rounded_from_the_same_but_for_its_sizes(tmp_path):
    """Two crops and flips of each of 20 wide pictures."""
    for i in range(20):
        wide = np.concatenate([shapes.example(i, "train")[0], shapes.example(i + 20, "train")[0]], axis=1)
        Image.fromarray(wide).save(tmp_path / f"{i:02d}.png")
        (tmp_path / f"{i:02d}.txt").write_text("a red circle")
    data = DRAWN | {"source": "folder", "path": str(tmp_path), "num_examples": 4096, "resolution": 32}
    config = make_config(tiny.folder("sdxl"), **data)
    precompute.latents(config, tmp_path / "cache", Options(text="embeddings", dtype="float16", variants=2))
    cached, (rows, _, _) = cache.open(tmp_path / "cache"), expected_rows(config)
    for rank in range(20):
        found, expected = cached.row(0, 2 * rank), rows.row(0, rank, None)
        assert found.keys() == expected.keys() == {"mean", "logvar", "encoder_hidden_states", "text_embeds", "time_ids"}
        np.testing.assert_array_equal(found.pop("time_ids"), expected["time_ids"])
        for name, value in found.items():
            assert value.dtype == np.float32 and (value == value.astype(np.float16)).all()
            parity.close(value, expected[name], rtol=1.5 * parity.HALF, atol=1e-4)  # rounded: half a unit
    crops = [tuple(cached.row(0, rank)["time_ids"][2:4]) for rank in range(40)]
    assert len(set(crops)) > 10 and sum(a != b for a, b in zip(crops[::2], crops[1::2], strict=True)) > 10


def run(config, workdir):
    """The losses of a training, and how often its step was traced."""
    traces, make_step = [], step_lib.make_step

    def counting(*args):
        step = make_step(*args)

        @functools.wraps(step)  # a program of the same name, so the cached one
        def traced(state, frozen, batch, key):
            traces.append(jax.tree.map(lambda leaf: (leaf.shape, str(leaf.dtype)), batch))
            return step(state, frozen, batch, key)

        return traced

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(step_lib, "make_step", counting)
        train.train(config, workdir)
    return [record["loss"] for record in telemetry.read_metrics(workdir)], traces


@pytest.mark.slow
def test_training_from_a_cache_is_training_from_pictures(teacher, centred, tmp_path):
    """With half of the captions dropped; and the step is one program for all."""
    losses, traces = run(make_config(teacher, caption_dropout=0.5), tmp_path / "pictures")
    assert len(set(losses)) == len(losses) == STEPS and len(traces) == 1
    for text, path in centred.items():
        config = make_config(teacher, source="latents", path=str(path), caption_dropout=0.5)
        found, again = run(config, tmp_path / text)
        parity.close(found, losses, rtol=1e-5, atol=1e-5)
        assert again == traces


@pytest.mark.slow
def test_the_same_crops_and_flips_are_trained_on(teacher, drawn, tmp_path):
    losses, _ = run(make_config(teacher, **DRAWN, encode="start"), tmp_path / "pictures")
    found, _ = run(make_config(teacher, **DRAWN | {"source": "latents", "path": str(drawn)}), tmp_path / "cache")
    parity.close(found, losses, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_a_cache_can_be_held_in_memory(teacher, centred):
    """Its captions are encoded once then, at the start."""
    config = make_config(teacher, source="latents", path=str(centred["ids"]), encode="start")
    watch = training_data.Watch(loader.BadRecordLog(0, print), print)
    pipeline, params = student_lib.load_teacher(config)
    encode = encoding.make_encode(pipeline, params)
    (rows,), order = training_data.open_examples(config, training_data.open_parts(config), pipeline, encode, watch)
    assert order.streams == ((EXAMPLES,),)
    for rank in range(0, EXAMPLES, 20):
        assert_rows(cache.open(centred["embeddings"]), 0, rank, rows.row(0, rank, None))


def refused(function, *words):
    with pytest.raises(LcmError) as error:
        function()
    assert "\n" not in str(error.value) and all(word in str(error.value) for word in words), error.value


def test_a_run_of_other_models_or_sizes_refuses_the_cache(teacher, centred, tmp_path):
    def other(path=centred["ids"], model=teacher, **data):
        return lambda: train.train(make_config(model, source="latents", path=str(path), **data), tmp_path / "run")

    def changed(part, damage):
        folder = Path(shutil.copytree(teacher, tmp_path / part))
        damage(folder)
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
    mine = encoding.fingerprint(*student_lib.load_teacher(make_config(model)), 64, ((64, 64),))
    refused(other(model=model), f"vae {made['vae'][:12]}", mine["vae"][:12], "precompute again")
    model = changed("tokenizer", pad_otherwise)
    refused(other(model=model), f"tokenizers {{text_encoder: {made['tokenizers']['text_encoder'][:12]}")
    model = changed("text_encoder", scale_text)
    refused(other(centred["embeddings"], model), "text_encoders {text_encoder: ")
    refused(other(filters=("side >= 32",)), "latent cache", "config.data.filters = []", "['side >= 32']")
    refused(other(flip=0.25), "config.data.flip = 0.0", "0.25", "precompute again")


def test_mixtures_are_of_caches_of_one_kind(teacher, centred, tmp_path):
    def parts(*mixture):
        return training_data.open_parts(make_config(teacher, source="mixture", mixture=mixture, num_examples=4096))

    ids, embeddings = (f"1 latents {centred[text]}" for text in cache.TEXTS)
    assert [part.weight for part in parts(ids, f"3 latents {centred['ids']}")] == [1, 3]
    refused(lambda: parts(ids, embeddings), "embeddings and ids", "--text")
    refused(lambda: parts(ids, "1 latents"), "without a folder")
    (tmp_path / "a.png").write_bytes((ROOT / "tests/test_precompute.py").read_bytes())
    (tmp_path / "a.txt").write_text("a red circle")
    refused(lambda: parts(ids, f"1 folder {tmp_path}"), "ids and pictures")


def test_aspect_buckets_are_groups(teacher, tmp_path):
    config = make_config(teacher, aspect_buckets=True, bucket_step=16)
    sizes = training_data.picture_sizes(config)
    precompute.latents(config, tmp_path / "cache", Options())
    cached = cache.open(tmp_path / "cache")
    square = sizes.index((64, 64))
    assert len(sizes) > 1 and cached.groups == tuple(EXAMPLES * (i == square) for i in range(len(sizes)))
    rows, _, _ = expected_rows(make_config(teacher))
    moments = {name: rows.row(0, 5, None)[name] for name in ("mean", "logvar")}
    assert_rows(cached, square, 5, moments | {"text_encoder": cached.row(square, 5)["text_encoder"]})


def test_what_cannot_be_precomputed(teacher, drawn, tmp_path):
    def latents(out=tmp_path / "cache", options=None, **data):
        return lambda: precompute.latents(make_config(teacher, **(DRAWN | data)), out, options or Options())

    refused(latents(source="mixture", mixture=("1 shapes",)), "mixture", "each part on its own", "latents DIR")
    refused(latents(source="latents", path=str(drawn)), "encoded already")
    refused(latents(resolution=60), "resolution = 60", "factor 8")
    refused(latents(drawn.parent), str(drawn.parent), "other things")
    again = Options(shard_size=16)
    refused(latents(drawn, again, flip=0.25), "data.flip: 0.5 there, 0.25 now", "another folder")
    refused(latents(drawn, again, resolution=32), "fingerprint.resolution: 64 there, 32 now")
    refused(latents(drawn), "shard_size: 16 there, 4096 now")
    refused(lambda: Options(text="words"), "--text=words", "ids, embeddings")
    refused(lambda: Options(variants=0), "--variants=0")


def test_no_weights_of_the_unet_are_read_and_sizes_are_checked_first(teacher, drawn, tmp_path):
    model = shutil.copytree(teacher, tmp_path / "model")
    for path in (model / "unet").glob("*.safetensors"):
        path.unlink()
    precompute.latents(make_config(model, **DRAWN), tmp_path / "cache", Options(shard_size=16))
    assert snapshot(tmp_path / "cache") == snapshot(drawn)
    for path in (model / "vae").glob("*.safetensors"):
        path.unlink()
    refused(lambda: precompute.latents(make_config(model, resolution=60), tmp_path / "b", Options()), "factor 8")
    refused(lambda: precompute.latents(make_config(model), tmp_path / "c", Options()), f"{model / 'vae'} has no")


@pytest.mark.parametrize("mine", [None, "SIGINT: stopped; ..."])
def test_a_process_whose_files_are_written_stops_with_the_others(teacher, tmp_path, monkeypatch, mine):
    monkeypatch.setattr(precompute, "write", lambda job: mine)
    monkeypatch.setattr(distributed, "any_process", lambda flag: True)
    with pytest.raises(precompute.Stopped, match=mine or "SIGTERM: stopped; the same command goes on"):
        precompute.latents(make_config(teacher, **DRAWN), tmp_path / "cache", Options(shard_size=16))
    assert not (tmp_path / "cache" / "manifest.json").exists()


def test_one_of_several_that_fails_says_so_at_once_and_stops_the_others(monkeypatch, capsys):
    asked = []

    def fail(job):
        raise LcmError("too many records cannot be used")

    monkeypatch.setattr(precompute, "write_shards", fail)
    monkeypatch.setattr(distributed, "ask_to_stop", lambda: asked.append(True))
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    refused(lambda: precompute.write(None), "too many records")
    said = "process 0 of 2 failed: too many records cannot be used; the others stop at their next batch\n"
    assert capsys.readouterr().err == said and asked == [True]


SLOW = """
import sys, time
from absl import app, flags
from lcm_jax.run import config as config_lib
from lcm_jax import precompute
move = precompute.Progress.move
def slowly(self, count):
    move(self, count)
    time.sleep(4 if flags.FLAGS.process_id == 0 else 0)
precompute.Progress.move = slowly
precompute.config_flags.DEFINE_config_file("config", None, "")
flags.DEFINE_string("out", None, "")
flags.DEFINE_string("text", "ids", "")
flags.DEFINE_integer("variants", 1, "")
flags.DEFINE_string("dtype", "float32", "")
flags.DEFINE_integer("shard_size", 4, "")
precompute.distributed.define_flags()
app.run(precompute.main, flags_parser=config_lib.parse_flags)
"""


def two(*options: str) -> list[subprocess.Popen]:
    """Two processes, the first of which takes four seconds and more for each batch."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    where = ["--num_processes=2", f"--coordinator=127.0.0.1:{port}", "--config=configs/shapes_lcm.py", *options]
    environment = os.environ | {"JAX_DEFAULT_MATMUL_PRECISION": "highest", "PYTHONPATH": str(ROOT)}
    return [
        subprocess.Popen(
            [sys.executable, "-c", SLOW, f"--process_id={index}", *where],
            cwd=ROOT,
            env=environment,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        for index in range(2)
    ]


def end(processes: list[subprocess.Popen], code: int) -> list[str]:
    try:
        said = [process.communicate(timeout=240)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [code, code], said
    return said


@pytest.mark.slow
def test_one_of_two_processes_fails(teacher, folder, tmp_path):
    for name in ("00", "01", "02", "03", "04", "06", "07", "08", "09", "10", "11"):  # 05 of process 1: rows 4 to 7
        for copy in range(20):
            for suffix in (".png", ".txt"):
                shutil.copy(folder / f"{name}{suffix}", folder / f"more-{copy:02d}-{name}{suffix}")
    said = end(
        two(
            f"--config.model.teacher={teacher}",
            f"--out={tmp_path / 'cache'}",
            "--config.data.source=folder",
            f"--config.data.path={folder}",
            "--config.data.max_bad_fraction=0.0",
        ),
        2,
    )
    assert "process 1 of 2 failed: " in said[1] and "the others stop at their next batch" in said[1]
    assert "error: process 1 of 2: " in said[0] and "05.png" in said[0] and "05.png" in said[1]
    assert len(list((tmp_path / "cache").glob("latents-*"))) < 20, "of 58; the first process stopped early"


@pytest.mark.slow
def test_a_signal_when_one_of_two_processes_has_written_its_files(teacher, tmp_path):
    out = tmp_path / "cache"
    processes = two(
        f"--config.model.teacher={teacher}", f"--out={out}", "--shard_size=10", "--config.data.num_examples=100"
    )
    while all(process.poll() is None for process in processes) and not all(
        (out / "progress" / f"{cache.shard_name(0, number)}.json").exists() for number in range(1, 10, 2)
    ):
        time.sleep(0.1)
    processes[0].send_signal(signal.SIGTERM)
    for said in end(processes, 1):
        assert said.splitlines()[-1] == "SIGTERM: stopped; the same command goes on from the last whole file", said


def test_a_finished_cache_is_left_alone(teacher, drawn, capsys):
    before = snapshot(drawn)
    precompute.latents(make_config(teacher, **DRAWN), drawn, Options(shard_size=16))
    assert "is complete already" in capsys.readouterr().err and snapshot(drawn) == before


@pytest.fixture
def folder(tmp_path) -> Path:
    """Pictures with captions, one of them truncated."""
    (tmp_path / "pictures").mkdir()
    for i in range(12):
        path = tmp_path / "pictures" / f"{i:02d}.png"
        Image.fromarray(shapes.example(i, "train")[0]).save(path)
        path.with_suffix(".txt").write_text("a red circle")
        if i == 5:
            path.write_bytes(path.read_bytes()[:400])
    return tmp_path / "pictures"


def test_unusable_records_are_left_out_and_listed(teacher, folder, tmp_path, capsys):
    config, out = make_config(teacher, source="folder", path=str(folder), num_examples=4096), tmp_path / "cache"
    config.data.max_bad_fraction = 0.0
    refused(lambda: precompute.latents(config, out, Options(variants=2, shard_size=5)), "05.png", "max_bad_fraction")
    assert not (out / "manifest.json").exists()
    config.data.max_bad_fraction = 0.1  # the same command otherwise goes on
    precompute.latents(config, out, Options(variants=2, shard_size=5))
    cached = cache.open(out)
    (line,) = (out / "bad_records.jsonl").read_text().splitlines()
    assert "05.png" in line and cached.manifest["faults"] == 1
    assert cached.groups == (22,) and cached.manifest["examples"] == [12]
    keys = [cached.where(0, rank)[1] for rank in range(22)]
    assert len(set(keys)) == 11 and keys[::2] == keys[1::2] == sorted(keys[::2])
    assert "11 of" not in capsys.readouterr().err


def test_a_signal_is_heard_while_a_file_hangs(teacher, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(waiting, "PATIENCE", 0.3)
    said, read, answered = [], files.read_regular, threading.Event()

    def hanging(path, *args):
        if path.name == "07.png":
            answered.wait()
        return read(path, *args)

    monkeypatch.setattr(files, "read_regular", hanging)

    def say(line):
        said.append(line)
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(waiting, "say", say)
    config, out = make_config(teacher, source="folder", path=str(folder), num_examples=4096), tmp_path / "out"
    config.data.max_bad_fraction = 0.1
    with pytest.raises(precompute.Stopped, match="SIGTERM: stopped; the same command goes on"):
        precompute.latents(config, out, Options(shard_size=4))
    assert "07.png" in said[0] and [path.name for path in out.glob("latents-*")] == [cache.shard_name(0, 0)]
    answered.set()  # the thread that reads it ends


def test_a_finished_cache_whose_shards_are_gone_is_not_complete(teacher, drawn, tmp_path):
    out = Path(shutil.copytree(drawn, tmp_path / "cache"))
    next(out.glob("*array_record*")).unlink()
    refused(lambda: precompute.latents(make_config(teacher, **DRAWN), out, Options(shard_size=16)), "is missing")


def test_a_signal_drops_the_shard_under_way(teacher, drawn, tmp_path, monkeypatch):
    move, out = precompute.Progress.move, tmp_path / "cache"

    def stopping(self, count):
        move(self, count)
        if self.done == 48:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(precompute.Progress, "move", stopping)
    with pytest.raises(precompute.Stopped, match="SIGTERM"):
        precompute.latents(make_config(teacher, **DRAWN), out, Options(shard_size=16))
    shards = sorted(p.name for p in out.glob("latents-*"))
    assert shards == [cache.shard_name(0, i) for i in range(3)] and not list(out.glob(".*.partial"))
    refused(lambda: cache.open(out), "same lcm_jax.precompute command again")
    refused(lambda: precompute.latents(make_config(teacher, **DRAWN), out, Options()), "16 there, 4096 now")
    precompute.latents(make_config(teacher, **DRAWN), out, Options(shard_size=16))
    assert snapshot(out) == snapshot(drawn)


def start(*options: str) -> subprocess.Popen:
    environment = os.environ | {"JAX_DEFAULT_MATMUL_PRECISION": "highest"}  # as conftest.py: the same cached programs
    return subprocess.Popen(
        [sys.executable, "-m", "lcm_jax.precompute", *options],
        cwd=ROOT,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def test_killed_and_gone_on_is_byte_for_byte_the_same_as_never_killed(teacher, tmp_path):
    """By another process, while which no other may write; and with what a kill in the middle of a shard leaves."""
    whole, out = tmp_path / "whole", tmp_path / "cache"
    config = make_config(teacher, **DRAWN)
    process = start("--config=configs/shapes_lcm.py", f"--config.model.teacher={teacher}", f"--out={out}", *OPTIONS)
    while process.poll() is None and not list(out.glob("progress/latents-*")):
        time.sleep(0.002)
    os.kill(process.pid, signal.SIGSTOP)
    refused(lambda: precompute.latents(config, out, Options(shard_size=16)), "in use by another process", str(out))
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL and not (out / "manifest.json").exists()
    assert 1 <= len(list(out.glob("progress/latents-*"))) < EXAMPLES // 16
    (out / f".{cache.shard_name(0, 9)}.12345678.partial").write_bytes(b"half a shard")
    precompute.latents(config, out, Options(shard_size=16))
    precompute.latents(config, whole, Options(shard_size=16))
    assert snapshot(out) == snapshot(whole) and json.loads((out / "manifest.json").read_text())["faults"] == 0


def test_what_the_command_says(teacher, tmp_path):
    process = start("--config=configs/shapes_lcm.py", f"--out={tmp_path / 'cache'}", "--variants=0")
    _, said = process.communicate()
    (line,) = said.splitlines()
    assert process.returncode == 2 and line.startswith("error: --variants=0") and not (tmp_path / "cache").exists()
