"""`python -m lcm_jax.inspect`: its numbers against numpy's, its images against the loader's, its errors."""

import contextlib
import dataclasses
import io
import itertools
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import parity
import pytest
from absl import flags
from PIL import Image, ImageFont
from rich.console import Console

from lcm_jax import inspect
from lcm_jax.data import cache, loader
from lcm_jax.data.order import Order
from lcm_jax.data.records import BadRecord
from lcm_jax.errors import LcmError
from lcm_jax.run import config as config_lib
from lcm_jax.run import data as run_data

ROOT = Path(__file__).parents[1]
SIZES = [(40, 60), (90, 60), (64, 64), (130, 65), (50, 200), (64, 96), (70, 70), (33, 32), (128, 80), (300, 310)]
BROKEN, EMPTY = 4, 7  # the images that are truncated, and that have no bytes
GOOD = [number for number in range(len(SIZES)) if number not in (BROKEN, EMPTY)]
CAPTIONS = [["x" * (7 * number + 1), "日本 \x1b[31m"][: 1 + number % 2] for number in range(len(SIZES))]
CAPTIONS[0] = ["a caption\nof two lines"]


def jpeg(number: int) -> bytes:
    stream, (height, width) = io.BytesIO(), SIZES[number]
    pixels = np.random.default_rng(number).integers(0, 256, (height, width, 3), np.uint8)
    Image.fromarray(pixels).save(stream, "JPEG")
    return stream.getvalue()


def write_folder(path: Path, fields: bool = False) -> Path:
    path.mkdir()
    rows = []
    for number, (height, width) in enumerate(SIZES):
        content = jpeg(number)
        content = {BROKEN: content[: len(content) // 2], EMPTY: b""}.get(number, content)
        (path / f"{number}.jpg").write_bytes(content)
        known = {"width": 10 * width, "height": 10 * height} if fields else {}
        rows.append({"file_name": f"{number}.jpg", "text": CAPTIONS[number], "score": number, **known})
    (path / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write_folder(tmp_path_factory.mktemp("inspect") / "set")


def make_config(**data):
    config = config_lib.default_config()
    config.model.teacher = "shapes"
    config.data.update({"resolution": 64, "batch_size": 4, **data})
    return config


def shown(report) -> str:
    """A report as a file gets it, without the blanks that end its lines."""
    console = Console(file=io.StringIO(), width=inspect.WIDTH, markup=False, emoji=False, highlight=False)
    inspect.show(report, console)
    return "\n".join(line.rstrip() for line in console.file.getvalue().splitlines())


def inspected(config, **options) -> str:
    return shown(inspect.inspect(config, inspect.Options(**{"seconds": 0.1, **options})))


def bars(text: str, title: str) -> dict[str, int]:
    """label -> count of the bars below the line that begins with `title`."""
    below = text.splitlines()
    below = below[next(i for i, line in enumerate(below) if line.startswith(title)) + 1 :]
    rows = [re.fullmatch(r"  +(.*?)  +([\d,]+)(  #+)?", line) for line in below]
    return {row[1]: int(row[2].replace(",", "")) for row in itertools.takewhile(bool, rows)}


def lengths_in(text: str, name: str) -> list[float]:
    """min, median, 95 % and max of the lengths of captions."""
    return [float(value) for value in re.search(rf"^  {name} +(.*)$", text, re.M)[1].split()]


def test_folder(folder):
    text = inspected(make_config(source="folder", path=str(folder)))
    height, width = np.array([SIZES[number] for number in GOOD]).T
    assert text.startswith(f"folder {folder} ===") and re.search(r"^  records +9$", text, re.M)
    assert f"unusable, found by indexing: 1\n  1 x image of 0 bytes\n    {folder}: {EMPTY}.jpg" in text
    assert f"unusable: 1 of 9 ({100 / 9:.1f} %)\n  1 x undecodable image: " in text
    assert f"\n    {folder}: {BROKEN}.jpg" in text
    assert "sizes of 8 images of the sample" in text and "unknown" not in text
    sides, ratios = np.minimum(height, width), width / height
    assert bars(text, "shorter side") == {
        "0 to 63": (sides < 64).sum(),
        "64 to 127": ((sides >= 64) & (sides < 128)).sum(),
        "128 to 255": 0,
        "256 to 383": (sides >= 256).sum(),
    }
    found = bars(text, "width / height")
    assert sum(found.values()) == 8 and found["0.95 to 1.05"] == (abs(ratios - 1) < 0.05).sum() == 3
    assert f"so enlarged: {(sides < 64).sum()} of 8 ({100 * (sides < 64).mean():.1f} %)" in text
    captions = [caption for number in GOOD for caption in CAPTIONS[number]]
    several = sum(len(CAPTIONS[number]) > 1 for number in GOOD)
    assert f"captions: {len(captions)} of 8 records; {several} records have several, 0 captions are empty" in text
    for name, lengths in {"characters": list(map(len, captions)), "words": [len(c.split()) for c in captions]}.items():
        expected = min(lengths), np.median(lengths), np.percentile(lengths, 95), max(lengths)
        parity.close(lengths_in(text, name), expected, rtol=1e-5)
    assert f"one epoch of it: {9 / 4:,.1f} steps of 4" in text
    assert text.replace("\n", "").isprintable() and max(map(len, text.splitlines())) <= inspect.WIDTH
    assert text.endswith("contact sheet: none; --out=contact.png writes one")


def test_first_captions_are_the_runs(folder):
    config = make_config(source="folder", path=str(folder))
    (part,) = run_data.open_parts(config)
    order = Order(config.seed, 4, ((9,),))
    records = [part.source[i.rank] for i in order.batch(0) + order.batch(1) if i.rank != BROKEN]
    expected = [f'"{inspect.one_line(record.captions[0], 96)}"' for record in records[:3]]
    below = inspected(config).split("  words ")[1].splitlines()[1:4]
    assert [line.strip() for line in below] == expected


def test_sizes_of_records_that_lack_a_field_are_their_images(tmp_path):
    path = write_folder(tmp_path / "set", fields=True)
    lines = (path / "metadata.jsonl").read_text().replace(f'"width": {10 * SIZES[0][1]}', '"other": 1', 1)
    lines = lines.replace(f'"width": {10 * SIZES[1][1]}', '"width": 0', 1)
    (path / "metadata.jsonl").write_text(lines)
    config = make_config(source="folder", path=str(path))
    (part,) = run_data.open_parts(config)
    line = next(inspect.of_sizes(config, part, inspect.rows_of(config, part), None))
    assert line == "sizes of all 9 records, by the fields 'height' and 'width'; without usable values, by the image: 2"


def test_fields_filters_and_the_run_that_would_stop(tmp_path):
    path = write_folder(tmp_path / "set", fields=True)
    config = make_config(source="folder", path=str(path), filters=("score >= 2", "side < 2000"), max_bad_fraction=0.0)
    text = inspected(config)
    left = np.array([SIZES[number] for number in range(2, 9) if number != EMPTY])
    assert "score >= 2                   -2\n" in text and "side < 2000                  -1\n" in text
    assert "kept                          6\n  unusable, not counted above   1\n" in text
    assert "sizes of all 6 records, by the fields 'height' and 'width'" in text
    assert bars(text, "shorter side") == {
        "384 to 511": (10 * left.min(1) < 512).sum(),
        "512 to 767": ((10 * left.min(1) - 512) // 256 == 0).sum(),
        "768 to 1023": (10 * left.min(1) >= 768).sum(),
    }
    assert "so enlarged: 0 of 6" in text
    seen = np.delete(left, 2, axis=0)
    assert f"images of the sample themselves that are enlarged: {(seen.min(1) < 64).sum()} of 5 (" in text
    assert "would stop: about 2 of 10 records are unusable, more than --config.data.max_bad_fraction=0.0" in text
    config.data.max_bad_fraction = 0.3
    assert "A run would stop" not in inspected(config)


def test_buckets(folder):
    config = make_config(source="folder", path=str(folder), aspect_buckets=True, bucket_step=16, batch_size=3)
    text = inspected(config)
    buckets = np.array(run_data.image_sizes(config))
    sizes = np.array([size for number, size in enumerate(SIZES) if number != EMPTY])
    away = abs(np.log(sizes[:, :1] / sizes[:, 1:]) - np.log(buckets[:, 0] / buckets[:, 1]))
    counts = np.bincount(away.argmin(1), minlength=len(buckets))
    batches = -(-counts // 3)
    expected = {f"{h} x {w}, {b} batches": c for (h, w), b, c in zip(buckets, batches, counts, strict=True)}
    assert len(buckets) > 2 and bars(text, "aspect buckets") == expected
    assert f"one epoch of it: {batches.sum():.1f} steps of 3; {batches.sum() * 3 - 9} rows come again in it" in text
    assert run_data.small_buckets(counts.tolist(), 3) in text


def test_what_is_not_used_is_reported(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "set")
    (tmp_path / "set/a.heic").touch()
    text = inspected(make_config(source="folder", path=str(tmp_path / "set")))
    assert "\nnot used: 1 file of unknown kind (.heic)\n" in text


def test_mixture(folder):
    config = make_config(source="mixture", mixture=(f"3 folder {folder}", "1 shapes"), num_examples=20)
    text = inspected(config, sample=6)
    assert f"folder {folder}, 75 % of the mixture ===" in text
    assert "\nshapes, 25 % of the mixture ===" in text and f"one epoch of it: {9 / 4 / 0.75:.1f} steps of 4" in text
    assert f"one epoch of it: {20 / 4 / 0.25:.1f} steps of 4" in text and text.count("sample: 6 records") == 2


@pytest.mark.parametrize("encode", ["step", "start"])
@pytest.mark.parametrize("buckets", [False, True])
def test_sheet_shows_what_the_loader_gives(tmp_path, encode, buckets):
    """Also across batches, with random crops, flips, dropped captions, and images of several sizes."""
    path = write_folder(tmp_path / "set")
    for number in (BROKEN, EMPTY):
        (path / f"{number}.jpg").unlink()
    config = make_config(
        source="folder",
        path=str(path),
        flip=0.5,
        caption_dropout=0.3,
        encode=encode,
        aspect_buckets=buckets,
        bucket_step=8,
        bucket_max_aspect=3.0,
        batch_size=3,
    )
    out = tmp_path / "new" / "sheet.png"
    text = inspected(config, out=out, count=11)
    assert f"contact sheet: {out}, the first 11 images of a run, row by row" in text
    rows = list(itertools.islice(trained_on(config), 11))
    examples = inspect.rows_of(config, run_data.open_parts(config)[0])
    assert pickle.loads(pickle.dumps(examples)).groups == examples.groups  # as worker processes need
    assert not buckets or 0 in examples.groups[:-1]  # a bucket without images
    sheet = np.asarray(Image.open(out))
    corners, size = inspect.cells([row["pixels"].shape[:2] for row in rows])
    assert sheet.shape == (*size, 3) and len(set(corners)) == 11
    for row, (top, left) in zip(rows, corners, strict=True):
        height, width, _ = row["pixels"].shape
        np.testing.assert_array_equal(sheet[top : top + height, left : left + width], row["pixels"])
        below = sheet[top + height : top + height + inspect.LINES * inspect.LINE_HEIGHT, left : left + 160]
        assert below.min() < 128  # there is text
    shapes = {row["pixels"].shape for row in rows}
    assert len(shapes) > 1 if buckets else len(shapes) == 1
    (part,) = run_data.open_parts(config)
    first, _ = inspect.first_rows(*inspect.as_training(config, [part], [inspect.rows_of(config, part)]), 11)
    captions = [str(row[inspect.CAPTION]) for row in first]
    assert [len(caption) for caption in captions] == [int(row["length"]) for row in rows]
    assert 0 < sum(caption == "" for caption in captions) < 11


def trained_on(config):
    """Rows of a run one by one, made by training's own functions; {"pixels", "length" of the caption}."""
    (part,) = run_data.open_parts(config)
    rows = dataclasses.replace(inspect.rows_of(config, part), tokenize=lengths)
    if config.data.encode == "start":
        log = run_data.DataLog(loader.BadRecordLog(0.0), print)
        rows = run_data.encode_at_start(rows, dict, config.seed, log)
    rows = run_data.CaptionDropout(rows, {"length": np.int32(0)}, config.data.caption_dropout)
    order = Order(config.seed, config.data.batch_size, (tuple(rows.groups),))
    with contextlib.closing(loader.batches([rows], order, put=lambda batch: batch)) as batches:
        for batch in batches:
            yield from ({name: value[i] for name, value in batch.items()} for i in range(order.batch_size))


def lengths(captions):
    return {"length": np.array([[len(caption)] for caption in captions], np.int32)[:, 0]}


def test_replaced_images_are_reported(folder, tmp_path):
    config = make_config(source="folder", path=str(folder), batch_size=9)
    text = inspected(config, out=tmp_path / "a.png", count=9)
    sheet = text.split("contact sheet: ")[1]
    assert "replaced on it: 1\n" in sheet and sheet.endswith(f"{BROKEN}.jpg")


def test_shapes():
    text = inspected(make_config(source="shapes", num_examples=2000, workers=0, encode="start"), sample=50)
    assert "\n  records  2,000\n  kept     2,000\n" in text and "sample: 50 records" in text
    assert bars(text, "shorter side") == {"64 to 127": 2000} and "enlarged: 0 of 2,000 (0.0 %)" in text
    line = r"^([\d.]+) rows/s \((\d+) in (\S+) s\): feeds ([\d.]+) steps/s of 4$"
    rate, count, seconds, steps = map(float, re.search(line, text.replace(",", ""), re.M).groups())
    assert count % 4 == 0 and count / (seconds + 0.051) <= rate <= count / (seconds - 0.051)
    assert steps == pytest.approx(rate / 4, abs=0.02)
    assert 'data.encode = "start": it is done once, before training, 2,000 rows' in text


def test_measured_rate_is_the_readers(monkeypatch):
    """By a clock that moves 20 ms with each batch, except those that were read ahead in the meantime."""
    clock = [7.0]

    def read_ahead(batches, workers):
        for number in itertools.count():
            clock[0] += 0.02 if number > 5 else 0.0
            yield number

    monkeypatch.setattr(loader, "read_ahead", read_ahead)
    monkeypatch.setattr(inspect.time, "monotonic", lambda: clock[0])
    count, seconds = inspect.measure(loader.Batches((), Order(0, 8, ((100,),)), 0, range(4)), 0, 0.5)
    assert 0.5 <= seconds < 0.53 and count / seconds == pytest.approx(4 / 0.02)


def write_cache(out: Path) -> None:
    """6 records, each twice, and one that could not be used."""
    arrays = [
        {"name": "mean", "dtype": "float32", "shapes": [[2, 2, 4]]},
        {"name": "text_encoder", "dtype": "int32", "shapes": [[8]]},
    ]
    hashes = {"vae": "ab" * 32, "tokenizers": {"text_encoder": "cd" * 32}, "text_encoders": {"text_encoder": "ef" * 32}}
    fingerprint = {"resolution": 64, "sizes": [[64, 64]], "time_ids": False, "scaling_factor": 0.5, **hashes}
    plan = {
        "made_by": "lcm_jax 1",
        "fingerprint": fingerprint,
        "text": "ids",
        "variants": 2,
        "dtype": "float32",
        "shard_size": 7,
        "seed": 3,
        "data": {"source": "folder", "path": None, "crop": "random"},
        "examples": [6],
        "arrays": arrays,
    }
    out.mkdir()
    assert cache.begin(out, plan)
    shards = cache.shards_of([12], 7)
    row = {"mean": np.zeros((2, 2, 4)), "text_encoder": np.zeros(8)}
    for shard in shards:
        abouts = [{"key": str(rank), "shard": "a", "caption": "y" * (rank + 1)} for rank in shard.ranks]
        count = cache.write_shard(out / shard.name, (cache.pack(row, arrays, about) for about in abouts))
        cache.write_note(out, shard, count, [BadRecord("a", "12", "no image")] if shard.number else [])
    cache.finish(out, plan, shards, [])


def test_latents(tmp_path):
    write_cache(tmp_path / "cache")
    config = make_config(source="latents", path=str(tmp_path / "cache"), caption_dropout=0.5)
    text = inspected(config, out=tmp_path / "sheet.png")
    size = sum(file.stat().st_size for file in (tmp_path / "cache").glob("*.array_record"))
    assert f"6 records x 2 variants: 12 rows in 2 shards, {size / 2**20:,.1f} MiB" in text
    assert "unusable, when the cache was made: 1\n  1 x no image\n    a: 12\n" in text
    for fact in ("seed +3", "text +ids", "dtype +float32", "faults +1", "data.crop +random", "fingerprint.vae +(ab)+"):
        assert re.search(rf"^  {fact}$", text, re.M), fact
    assert re.search(r"array mean +float32 \[2, 2, 4\]$", text, re.M) and "data.path" not in text
    assert lengths_in(text, "characters") == [1, 6.5, 11.45, 12] and "shorter side" not in text
    assert f"one epoch of it: {12 / 4:.1f} steps of 4" in text and "\nread; threads: " in text
    assert text.endswith("contact sheet: none, a latent cache holds no images")
    assert not (tmp_path / "sheet.png").exists() and isinstance(cache.open(tmp_path / "cache"), cache.Cached)


def test_errors_come_before_long_work(tmp_path, folder):
    (tmp_path / "a.png").mkdir()
    for data, out, words in [
        ({}, Path("a.jpg"), "--out=a.jpg: the contact sheet is a PNG"),
        ({}, tmp_path / "a.png", "is a folder"),
        ({"path": "x", "resize_filter": "sinc"}, None, "^--config.data.resize_filter=sinc: "),
        ({"path": "x", "aspect_buckets": True, "bucket_step": 48}, None, "^--config.data.resolution=64: "),
        ({"path": str(tmp_path / "none")}, None, "^--config.data.path=.*none: not a folder"),
    ]:
        config = make_config(**{"source": "folder", "path": str(folder), **data})
        with pytest.raises(LcmError, match=words):
            inspected(config, out=out)


def test_program_refuses_in_one_line(folder, monkeypatch, capsys):
    class Given(dict):
        config, out, sample, seconds, count = make_config(source="folder", path=str(folder)), "sheet.jpg", 1, 0.1, 1

    monkeypatch.setattr(flags, "FLAGS", Given(verbosity=flags.FLAGS["verbosity"]))
    assert inspect.main([]) == 2
    stdout, stderr = capsys.readouterr()
    assert not stdout and re.fullmatch(r"error: --out=sheet.jpg: .*\n", stderr)


def test_program(folder, tmp_path):
    """Into a pipe of few characters, with captions of many. It starts no model and no device."""
    code = """import runpy, sys
try:
    runpy.run_module("lcm_jax.inspect", run_name="__main__", alter_sys=True)
finally:
    from jax._src import xla_bridge
    assert not xla_bridge.backends_are_initialized()
    assert not {"torch", "transformers", "tensorflow"} & sys.modules.keys()
"""
    out = tmp_path / "sheet.png"
    data = ["--config.data.source=folder", f"--config.data.path={folder}"]
    options = ["--config=configs/shapes_lcm.py", *data, "--seconds=0.1", "--count=4", f"--out={out}"]
    done = subprocess.run(
        [sys.executable, "-c", code, *options],
        cwd=ROOT,
        env=os.environ | {"PYTHONIOENCODING": "ascii", "COLUMNS": "20", "TERM": "xterm-256color"},
        text=True,
        capture_output=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert "reading a sample" in done.stderr and done.stdout.isascii() and "".join(lines).isprintable()
    assert "throughput ".ljust(inspect.WIDTH, "=") in lines
    assert Image.open(out).size[0] > 2 * inspect.MIN_WIDTH


def test_caption_lines_fit():
    font = ImageFont.load_default(inspect.FONT_SIZE)
    texts = ["one two", "w" * 300, "many words " * 60, "日本語のキャプション" * 20, "", "a " + "b" * 90]
    texts += ["العربية \ud800 x"]
    for text in texts:
        lines = inspect.wrapped(text, font, 160)
        assert len(lines) <= inspect.LINES and all(0 < font.getlength(line) <= 160 for line in lines)
        joined, whole = "".join(lines).replace(" ", ""), inspect.one_line(text).replace(" ", "")
        assert joined == whole or (joined.endswith("…") and whole.startswith(joined[:-1]))
    assert inspect.wrapped("one two", font, 160) == ["one two"]


def test_reasons_are_counted_without_their_numbers():
    found = [BadRecord("s", str(i), f"cut after {i} bytes") for i in range(5)]
    found += [BadRecord("s", "x", "no caption")] * 6
    assert list(inspect.of_bad_records(found)) == [
        *("  6 x no caption", "    s: x", "    s: x", "    s: x"),
        *("  5 x cut after N bytes", "    s: 0", "    s: 1", "    s: 2"),
    ]
    (_, named) = inspect.of_bad_records([BadRecord("/a" * 90, "key 7", "no caption")])
    assert len(named) == inspect.WIDTH and named.startswith("    …") and named.endswith("/a: key 7")
    many = list(inspect.of_bad_records([BadRecord("s", "k", letter) for letter in "abcdefghijk"]))
    assert many[-1] == "  3 x 3 other reasons" and len(many) == 2 * inspect.REASONS + 1


def test_nobody_reads_the_report():
    """`| head`: the program ends as all do, by `exit_code`."""

    class Closed(io.StringIO):
        def flush(self):
            raise BrokenPipeError

    with pytest.raises(BrokenPipeError):
        inspect.show(iter(["a line"]), inspect.Output(file=Closed()))
