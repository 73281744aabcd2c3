"""`python -m lcm_jax.evaluate`: rows that are kept, compared and drawn alike, what they measure, and every refusal."""

import dataclasses
import functools
import json
import os
import re
import sys
from pathlib import Path

import metrics_kit
import numpy as np
import pytest
import tiny
from PIL import Image

import lcm_jax
from lcm_jax import evaluate, pretrained, sample
from lcm_jax.data import shapes
from lcm_jax.errors import LcmError
from lcm_jax.metrics import clip_score, features, inputs, measures, plot, table
from lcm_jax.metrics import distances as cmmd
from lcm_jax.metrics import distances as frechet
from lcm_jax.metrics import rows as rows_lib
from lcm_jax.metrics import shapes as captions_lib
from lcm_jax.metrics import statistics as statistics_files
from lcm_jax.sampling import flags
from lcm_jax.sampling.png import not_finite, to_uint8
from lcm_jax.sampling.request import Request, Settings

RECORD = {"w_min": 2.0, "w_max": 8.0, "solver_steps": 20, "timestep_scaling": 10.0, "sigma_data": 0.5}
PROMPTS = ("a small red circle", "a blue square", "hello")


@pytest.fixture(scope="module")
def lcm(tmp_path_factory) -> Path:
    folder = tiny.copy("micro lcm", tmp_path_factory.mktemp("evaluate") / "lcm")
    tiny.write_json(folder / pretrained.RECORD, RECORD)
    return folder


@pytest.fixture(scope="module")
def prompts(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    path.write_text("\n".join(PROMPTS) + "\n")
    return path


loaded = functools.cache(lambda model: lcm_jax.load(model, mesh=flags.mesh_of(1)))


@functools.cache
def means_extractor(name: str) -> features.Extractor:
    """Features of a picture: the means of its three channels."""
    network = features.Network(
        name,
        3,
        lambda images: images.astype(np.float32),
        lambda params, x: x.mean((1, 2)) * params["scale"],
        {"scale": np.ones((), np.float32)},
        "none",
    )
    return features.make_extractor(network)


@pytest.fixture(scope="module")
def places(tmp_path_factory) -> Path:
    """What the command lines of bad input name in capitals."""
    folder = tmp_path_factory.mktemp("places")
    (folder / "empty.txt").write_text(" \n\n")
    (folder / "bare").mkdir()
    (folder / "torn").mkdir()
    for i in range(4):
        (folder / "torn" / f"{i}.png").write_bytes(b"no picture")
    for name, count, side, network in (
        ("four", 4, 16, "means/none"),
        ("three", 3, 16, "means/none"),
        ("large", 4, 32, "means/none"),
        ("other", 4, 16, "other/none"),
    ):
        pictures = np.random.default_rng(0).integers(0, 256, (count, side, side, 3), np.uint8)
        gathered = statistics_files.gather(means_extractor(network), [pictures])
        statistics_files.save(folder / f"{name}.npz", gathered)
    return folder


@pytest.fixture
def means(monkeypatch) -> features.Extractor:
    """Stands for the Inception of the FID, which wants 2,049 pictures."""
    extractor = means_extractor("means/none")
    monkeypatch.setattr(measures, "load_extractor", lambda kind, path, **_: extractor)
    return extractor


def command(model, prompts, out, *options) -> list[str]:
    words = [f"--model={model}", f"--prompts={prompts}", f"--out={out}", "--no-plot", "--batch_size=4", "--timings=2"]
    return [*words, *options]


def evaluated(*words) -> dict:
    """Runs the program; its table.json."""
    argv = command(*words)
    assert evaluate.main(argv) == 0
    return json.loads((Path(words[2]) / "table.json").read_text())


@pytest.fixture(scope="module")
def first(lcm, prompts, tmp_path_factory) -> tuple[Path, dict]:
    out = tmp_path_factory.mktemp("out") / "table"
    return out, evaluated(lcm, prompts, out, "--count=5", "--row=lcm:2:4,8", "--row=lcm:2:8", "--name=tiny")


def test_a_table_names_what_its_numbers_are_of(first):
    out, found = first
    assert [(row["sampler"], row["steps"], row["guidance_scale"], row["evaluations"]) for row in found["rows"]] == [
        ("lcm", 2, 4.0, 2),
        ("lcm", 2, 8.0, 2),
    ]
    assert (found["seed"], found["pictures"], found["height"], found["width"]) == (0, 5, 16, 16)
    for row in found["rows"]:
        low, high = row["quartiles"]
        assert 0 < low <= row["milliseconds"] <= high and row["timings"] == 2 and row["compile_seconds"] >= 0
    assert found["rows"][0]["compile_seconds"] > 0
    text = (out / "table.md").read_text()
    assert "| tiny | lcm | 2 | 8 | 2 |" in text
    assert "5 pictures per row, 16 x 16 pixels, seed 0" in text and "batches of 4 on 1 x cpu" in text


def test_rows_that_are_there_are_not_measured_again(first, lcm, prompts, tmp_path, monkeypatch):
    out, found = first
    written = {path: path.read_bytes() for path in (out / "rows").iterdir()}
    with monkeypatch.context() as patched:
        patched.setattr(evaluate, "measure", lambda *args: pytest.fail("measured again"))
        again = evaluated(lcm, prompts, out, "--count=5", "--row=lcm:2:8", "--name=tiny")
    assert again == found  # the row that was not asked for stays
    assert {path: path.read_bytes() for path in (out / "rows").iterdir()} == written

    asked = []
    monkeypatch.setattr(evaluate, "measure", lambda out, rows, *rest: asked.extend(rows))
    monkeypatch.setattr(evaluate, "write", lambda *args: [])
    evaluated(lcm, prompts, out, "--count=5", "--row=lcm:2:4,8", "--row=lcm:1:8", "--name=tiny")
    assert [(request.settings.steps, request.guidance_scale) for request in asked] == [(1, 8.0)]
    for option in ("--dtype=bfloat16", "--batch_size=2"):
        asked.clear()
        evaluated(lcm, prompts, out, "--count=5", "--row=lcm:2:4,8", "--name=tiny", option)
        assert len(asked) == 2, option


def test_a_stopped_command_keeps_what_it_has(lcm, prompts, tmp_path, monkeypatch):
    """The second row fails; the first is kept, and the command goes on with the second alone."""
    drawn, measured = [], rows_lib.measured

    def breaks(model, captions, request, *rest, **more):
        drawn.append(request.settings.steps)
        if drawn[-1] == 2 and drawn.count(2) == 1:
            raise LcmError("stopped")
        return measured(model, captions, request, *rest, **more)

    monkeypatch.setattr(rows_lib, "measured", breaks)
    words = (lcm, prompts, tmp_path / "out", "--row=lcm:1,2:8")
    assert evaluate.main(command(*words)) == 2
    assert [row.steps for row in table.kept(tmp_path / "out")] == [1]
    assert [row["steps"] for row in evaluated(*words)["rows"]] == [1, 2]
    assert drawn == [1, 2, 2]


@pytest.mark.slow
def test_another_model_stands_beside_and_a_changed_one_replaces(first, lcm, prompts, tmp_path, capsys):
    """Rows of one name and other weights never stand in one table."""
    out = tmp_path / "table"
    options = ("--count=5", "--row=lcm:1:8")
    evaluated(lcm, prompts, out, *options, "--row=lcm:1:4", "--name=one")
    beside = evaluated(tiny.folder("sd1"), prompts, out, "--count=5", "--row=ddim:1:3", "--name=teacher")
    assert [(row["model"], row["evaluations"]) for row in beside["rows"]] == [("one", 1), ("one", 1), ("teacher", 2)]
    vae = tmp_path / "vae"
    tiny.randomise(type(tiny.torch_vae())(**tiny.VAE), 99).save_pretrained(vae)
    capsys.readouterr()
    changed = evaluated(lcm, prompts, out, *options, "--name=one", f"--vae={vae}")
    assert [(row["model"], row["guidance_scale"]) for row in changed["rows"]] == [("one", 8.0), ("teacher", 3.0)]
    assert "1 rows of one are of another state" in capsys.readouterr().err
    teacher = ("--count=5", "--row=ddim:2:3", "--name=teacher")
    later = evaluated(tiny.folder("sd1"), prompts, out, *teacher)  # a command for another model brings none back
    assert [(row["model"], row["guidance_scale"], row["steps"]) for row in later["rows"]] == [
        ("one", 8.0, 1),
        ("teacher", 3.0, 1),
        ("teacher", 3.0, 2),
    ]
    assert "1 rows of one are of another state" in capsys.readouterr().err
    whole = evaluated(lcm, prompts, out, *options, "--row=lcm:1:4", "--name=one")  # the state before, asked for again
    assert [(row["model"], row["guidance_scale"]) for row in whole["rows"]][:2] == [("one", 4.0), ("one", 8.0)]


def test_a_models_configs_are_part_of_what_it_is(lcm, tmp_path):
    """Another scaling of the latents: the same weights, other pictures. Who wrote a file makes no difference."""

    def identity(folder):
        return rows_lib.model_about(lcm_jax.load(folder))

    def rewritten(name, **changes):
        folder = tiny.copy("micro lcm", tmp_path / name)
        path = folder / "vae" / "config.json"
        tiny.write_json(path, json.loads(path.read_text()) | changes)
        return identity(folder)

    own = rewritten("same", _diffusers_version="0.0.1")
    other = rewritten("other", scaling_factor=0.5)
    assert own == identity(lcm) and {key for key in own if own[key] != other[key]} == {"configs"}


def test_pictures_are_those_of_sample_whatever_the_batch(lcm, prompts, tmp_path, means, monkeypatch):
    """Every row starts from the noise of (seed, i): the statistics are those of pictures that `sample` draws."""
    seen = []

    def fold(state, images, captions):
        seen.append((images, list(captions)))
        return state

    monkeypatch.setattr(
        measures,
        "load",
        lambda *args: measures.Measure(
            "fid", 1, {"network": "none", "sha256": "0" * 64}, lambda: None, fold, lambda state: {"fid": 1.0}
        ),
    )
    for size in (2, 4):
        out = tmp_path / str(size)
        words = ["--metric=fid:" + str(prompts), "--row=lcm:2:8", "--seed=5", f"--batch_size={size}"]
        assert evaluate.main(command(lcm, prompts, out, *words)) == 0
    pictures = [np.concatenate([images for images, _ in part]) for part in (seen[:2], seen[2:])]
    assert seen[0][1] + seen[1][1] == seen[2][1] == list(PROMPTS)
    assert np.abs(pictures[0].astype(int) - pictures[1]).max() <= 1  # another program: sums may round differently
    for i, prompt in enumerate(PROMPTS):  # picture i of a prompt, as `sample` numbers them
        sampled = tmp_path / f"png{i}"
        assert (
            sample.main(
                [
                    f"--model={lcm}",
                    f"--out={sampled}",
                    f"--prompt={prompt}",
                    "--seed=5",
                    "--steps=2",
                    "--num_images=3",
                    "--batch_size=3",
                    "--guidance_scale=8",
                ]
            )
            == 0
        )
        theirs = np.asarray(Image.open(sampled / f"0000_{i:04d}.png"))
        assert np.abs(theirs.astype(int) - pictures[1][i]).max() <= 1


def test_fid_is_the_distance_to_the_folder_and_is_computed_once(lcm, prompts, tmp_path, means, monkeypatch):
    """Pictures of other sizes are brought to the model's; the reference's statistics are kept."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    values = np.random.default_rng(0).integers(0, 256, (6, 16, 16, 3), np.uint8)
    for i, value in enumerate(values):
        Image.fromarray(value).save(folder / f"{i}.png")
    drawn = []
    monkeypatch.setattr(statistics_files, "gather", _listening(statistics_files.gather, drawn))
    words = (lcm, prompts, tmp_path / "out", "--count=8", f"--metric=fid:{prompts}", f"--reference={folder}")
    found = evaluated(*words, "--row=lcm:1:8")["rows"][0]
    pictures = np.concatenate([batch for name, batch in drawn if name == "drawn"])
    assert len(pictures) == 8
    want = frechet.frechet_distance(means(pictures), means(values))
    assert abs(found["values"]["fid"] - want) < 1e-6 * want
    about = found["comparison"]["metrics"]["fid"]
    assert (about["network"], about["sha256"]) == (means.name, means.hash)
    assert about["reference"]["pictures"] == 6

    drawn.clear()
    again = evaluated(*words, "--row=lcm:1:4")["rows"]
    assert len(again) == 2 and not [name for name, _ in drawn if name == "reference"]
    assert "reference from" in (tmp_path / "out" / "table.md").read_text()


@pytest.mark.slow
def test_metrics_of_the_field_are_taken_by_name(lcm, prompts, tmp_path, monkeypatch):
    """CLIP score, CMMD and FD-DINOv2 of the pictures that were drawn, by networks of folders."""
    clip = metrics_kit.write_clip(tmp_path / "clip")
    dino = metrics_kit.write_dinov2(tmp_path / "dino", metrics_kit.torch_dinov2())
    folder, drawn, generate = tmp_path / "pictures", [], rows_lib.generate
    folder.mkdir()
    references = metrics_kit.pictures(40, 16, 16)
    for i, picture in enumerate(references):
        Image.fromarray(picture).save(folder / f"{i:02d}.png")

    def listen(*args, **more):
        for numbers, images, seconds in generate(*args, **more):
            drawn.append(images)
            yield numbers, images, seconds

    monkeypatch.setattr(rows_lib, "generate", listen)
    metrics = [f"--metric=clip_score:{clip}", f"--metric=cmmd:{clip}", f"--metric=fd_dinov2:{dino}"]
    (row,) = evaluated(
        lcm,
        prompts,
        tmp_path / "out",
        "--count=36",
        "--batch_size=12",
        "--row=lcm:1:8",
        *metrics,
        f"--reference={folder}",
    )["rows"]
    images, captions = np.concatenate(drawn), [PROMPTS[i % 3] for i in range(36)]
    values = row["values"]
    scores = clip_score.clip_scores(clip_score.load_clip(clip), images, captions)
    assert abs(values["clip_score"] - scores.mean()) < 1e-3
    extractor = features.load_extractor("clip", clip, resize="cmmd")
    want = cmmd.cmmd(extractor(images), extractor(references))
    assert want > 0 and abs(values["cmmd"] - want) < 1e-4 * want
    extractor = features.load_extractor("dinov2", dino)
    want = frechet.frechet_distance(extractor(images), extractor(references))
    assert abs(values["fd_dinov2"] - want) < 1e-4 * want
    text = (tmp_path / "out" / "table.md").read_text()
    assert "| CLIP score | CMMD | FD-DINOv2 |" in text and "/cmmd-28" in text
    assert len(list((tmp_path / "out" / "references").glob("*.npz"))) == 2


def _listening(gather, heard):
    def call(extractor, batches, start=None):
        batches = list(batches)
        name = "drawn" if len(batches) == 1 and len(batches[0]) == 4 else "reference"
        heard.extend((name, batch) for batch in batches)
        return gather(extractor, batches, start)

    return call


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--row=lcm:0:8"], r"--row=lcm:0:8: 0 steps are out of range; choose 1 to 50"),
        (["--row=lcm:21:8"], r"--row=lcm:21:8: --steps=21: out of range; choose 1 to 20"),
        (["--row=lcm:2:0.5"], r"--row=lcm:2:0.5: guidance scale 1 is no guidance"),
        (["--row=lcm:2:nan"], r"guidance scale 1 is no guidance"),
        (["--row=lcm:two"], r"--row=lcm:two: write SAMPLER:STEPS or SAMPLER:STEPS:SCALE"),
        (["--row=lcm"], r"--row=lcm: write SAMPLER:STEPS"),
        (["--row=euler:2"], r"--row=euler:2: sampler 'euler' is unknown; choose of lcm"),
        (["--count=0"], r"--count=0: must be at least 1"),
        (["--endpoint_steps=0"], r"--endpoint_steps=0: must be at least 1"),
        (["--timings=0"], r"--timings=0: must be at least 1"),
        (["--seed=-1"], r"--seed=-1: out of range"),
        (["--height=17"], r"--row=lcm:1:8: --height=17: not a multiple of the VAE's factor 2"),
        (["--prompts=EMPTY"], r"--prompts=\S+empty.txt holds no prompt; write one per line"),
        (["--prompts=/no/such"], r"--prompts=/no/such: cannot be read"),
        (["--source=shapes"], r"captions come from --prompts=FILE or from --source=NAME; give one of them"),
        (["--split=train"], r"--split is of a data source; give --source"),
        (["--metric=psnr"], r"--metric=psnr: choose NAME or NAME:WEIGHTS of fid, clip_score"),
        (["--metric=fid"], r"--metric=fid: .*no weights are given; fetch \S+ .*sha256 6726825d"),
        (["--metric=cmmd:/no/such"], r"--metric=cmmd:/no/such: .*/no/such does not exist; fetch .*sha256"),
        (["--metric=clip_score/x:EMPTY"], r"clip_score has no resize variants; leave out /x"),
        (["--metric=fid:EMPTY", "--metric=fid:EMPTY"], r"fid is there already; give it once"),
        (["--metric=shapes"], r"--metric=shapes: the scorer reads pictures of 64 x 64, these are 16 x 16"),
        (["--metric=fid:EMPTY"], r"--metric=fid compares with a reference of means/none .*none is given; give --ref"),
        (["--metric=fid:EMPTY", "--reference=FOUR"], r"--metric=fid needs at least 4 pictures per row, here are 3"),
        (["--metric=fid:EMPTY", "--count=4", "--reference=THREE"], r"three.npz is of 3 pictures, at least 4 are"),
        (["--metric=fid:EMPTY", "--count=4", "--reference=LARGE"], r"large.npz is of pictures of 32 x 32, those drawn"),
        (["--metric=fid:EMPTY", "--count=4", "--reference=OTHER"], r"statistics of another network are given.*other/n"),
        (
            ["--metric=fid:EMPTY", "--count=4", "--reference=FOUR", "--reference=OTHER"],
            r"holds statistics of another "
            r"network, other/none \(\w+\); the metrics' are means/none",
        ),
        (["--reference=EMPTY"], r"empty.txt: no .npz of statistics and no folder of pictures is there"),
        (["--metric=fid:EMPTY", "--reference=BARE"], r"bare holds no pictures"),
        (["--reference=BARE"], r"bare: no --metric compares with pictures; give one of fid"),
        (["--metric=fid:EMPTY", "--count=4", "--reference=FOUR", "--reference=THREE"], r"are both of means/none; give"),
        (["--metric=fid:EMPTY", "--count=4", "--reference=TORN"], r"0.png: not an image.*; remove it or mend it"),
        (["--out=EMPTY"], r"empty.txt is a file"),
        (["--negative_prompt=b"], r"this UNet has a w embedding"),
        (["--model=/no/such"], r"/no/such does not exist"),
    ],
)
def test_bad_input_is_one_line_before_long_work(
    lcm, prompts, places, tmp_path, capsys, monkeypatch, means, options, message
):
    monkeypatch.setattr(rows_lib, "measured", lambda *args, **more: pytest.fail("long work began"))
    monkeypatch.setattr(flags, "load", lambda model, **_: loaded(model))  # once for all
    for place in places.iterdir():
        options = [
            re.sub(f"[=:]{place.stem.upper()}$", lambda found, to=place: f"{found[0][0]}{to}", option)
            for option in options
        ]
    rows = [] if any(option.startswith("--row") for option in options) else ["--row=lcm:1:8"]
    assert evaluate.main(command(lcm, prompts, tmp_path / "out", *rows, *options)) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ") and re.search(message, error), error


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--seed=1"], r"a row \(tiny, lcm, 2 steps\) of seed 0, this command's is 1; .*--seed, or another --out"),
        (["--count=4"], r"of pictures 5, this command's is 4; .* the same --count"),
        (["--height=32"], r"of height 16, this command's is 32; .* the same --height"),
        (["--prompts=OTHER"], r"of prompts --prompts=\S+prompts.txt \(sha256 \w{12}\), this command's is --prompts="),
    ],
)
def test_rows_that_cannot_be_compared_are_not_mixed(first, lcm, prompts, tmp_path, capsys, options, message):
    out, _ = first
    (tmp_path / "other.txt").write_text("hello\n")
    options = [option.replace("OTHER", str(tmp_path / "other.txt")) for option in options]
    assert evaluate.main(command(lcm, prompts, out, "--count=5", "--row=lcm:1:8", "--name=another", *options)) == 2
    error = capsys.readouterr().err
    assert re.search(message, error) and error.count("\n") == 1, error


def test_the_same_prompts_from_another_place_are_the_same(first, lcm, tmp_path, monkeypatch):
    out, found = first
    (tmp_path / "moved.txt").write_text("\n".join(PROMPTS))
    monkeypatch.setattr(evaluate, "measure", lambda *args: pytest.fail("measured again"))
    assert evaluated(lcm, tmp_path / "moved.txt", out, "--count=5", "--row=lcm:2:8", "--name=tiny") == found


def test_captions_of_a_source_are_those_of_its_readable_records(tmp_path):
    folder = tmp_path / "set"
    folder.mkdir()
    for i in range(4):
        picture, caption = shapes.example(i)
        Image.fromarray(picture).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text("" if i == 1 else caption)
    argv = ["--model=x", "--row=lcm:1", f"--out={tmp_path / 'out'}", "--source=folder", f"--path={folder}"]
    found = evaluate.read_inputs(evaluate.parser().parse_args([*argv, "--count=3"]))
    assert list(found.captions) == [shapes.example(i)[1] for i in (0, 2, 3)]
    args = evaluate.parser().parse_args([*argv, "--count=3", "--references=2"])
    pictures = list(evaluate.read_reference(args, found, ()).pictures(32, 32))
    assert [picture.shape for picture in pictures] == [(32, 32, 3)] * 2
    with pytest.raises(LcmError, match=r"--references=2 is of --source's pictures, but --reference gives a folder"):
        evaluate.check_flags(evaluate.parser().parse_args([*argv, "--references=2", f"--reference={folder}"]))
    with pytest.raises(LcmError, match=r"has 3 records that can be read, --count=4 are asked for"):
        evaluate.read_inputs(evaluate.parser().parse_args([*argv, "--count=4"]))
    with pytest.raises(LcmError, match=r"^--split=heldout: the source 'folder' does not use it; leave it out"):
        evaluate.read_inputs(evaluate.parser().parse_args([*argv, "--split=heldout"]))


def test_of_the_shapes_the_held_out_captions_are_taken():
    """And styles are told apart as references, though their captions are the same."""
    abouts = []
    for style in ("plain", "card"):
        argv = ["--model=x", "--row=lcm:1", "--out=x", "--source=shapes", "--count=3", f"--style={style}"]
        args = evaluate.parser().parse_args(argv)
        found = evaluate.read_inputs(args)
        assert list(found.captions) == [shapes.caption(shapes.spec(i, "heldout")) for i in range(3)]
        abouts.append(table.same_origin(dict(evaluate.read_reference(args, found, ()).about())))
    assert abouts[0] != abouts[1]


def test_pictures_are_told_apart_by_what_is_in_them(tmp_path):
    for name, value in (("a", 1), ("b", 1), ("c", 2)):
        (tmp_path / name).mkdir()
        Image.fromarray(np.full((8, 8, 3), value, np.uint8)).save(tmp_path / name / "0.bmp")
    a, b, c = (inputs.files_about(inputs.picture_files(tmp_path / name), tmp_path / name) for name in "abc")
    assert table.same_origin(a) == table.same_origin(b) != table.same_origin(c)


def test_pictures_are_regular_files(tmp_path):
    os.mkfifo(tmp_path / "0.png")
    paths = inputs.picture_files(tmp_path)
    for read in (lambda: inputs.files_about(paths, tmp_path), lambda: list(inputs.file_pictures(paths, 8, 8))):
        with pytest.raises(LcmError, match="0.png is no regular file"):
            read()


def test_a_reference_that_is_too_short_is_told():
    source = inputs.of_source(_Broken(), 2, "broken").source
    assert [picture[0, 0, 0] for picture in inputs.source_pictures(source, 2, 8, 8)] == [0, 2]
    with pytest.raises(LcmError, match=r"2 pictures of the source can be decoded, 3 are needed.*--references=2"):
        list(inputs.source_pictures(source, 3, 8, 8))


class _Broken:
    """Three records of which the second is no picture."""

    faults = ()

    def __len__(self) -> int:
        return 3

    def __getitem__(self, number):
        from lcm_jax.data.records import Record

        image = b"no picture" if number == 1 else np.full((8, 8, 3), number, np.uint8)
        return Record(str(number), image, (f"caption {number}",))


class Pictures:
    """Records of given pictures, whose captions are all alike."""

    faults = ()

    def __init__(self, *pictures):
        self.pictures = pictures

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, number):
        from lcm_jax.data.records import Record

        return Record(str(number), self.pictures[number], ("a caption",))


def test_pictures_of_a_source_are_told_apart_by_what_is_in_them():
    """Captions alone do not: other pictures may have the same. Where they lie makes no difference."""
    black, white = np.zeros((8, 8, 3), np.uint8), np.full((8, 8, 3), 255, np.uint8)
    about = inputs.source_about(Pictures(black, white, white), 2, "here")
    assert about["pictures"] == 2 and about["from"] == "here"
    assert inputs.source_about(Pictures(black, white, black), 2, "there")["sha256"] == about["sha256"]
    assert inputs.source_about(Pictures(black, black), 2, "here")["sha256"] != about["sha256"]


def test_reference_pictures_that_had_to_grow_are_told(monkeypatch):
    said = []
    monkeypatch.setattr(inputs.logging, "warning", lambda text, *values: said.append(text % values))
    large, low = np.zeros((16, 16, 3), np.uint8), np.zeros((6, 16, 3), np.uint8)
    assert [p.shape for p in inputs.source_pictures(Pictures(large, low), 2, 8, 8)] == [(8, 8, 3)] * 2
    assert len(said) == 1 and "1 of 2 reference pictures are smaller than 8 x 8 (the smallest is 16 x 6)" in said[0]
    list(inputs.source_pictures(Pictures(large, low), 1, 8, 8))
    assert len(said) == 1


def test_rows_of_lists_are_all_combinations():
    assert evaluate.parse_rows(["lcm,ddim:1,2:3,8", "ddim:1:3", "ddim:4"]) == [
        *(
            evaluate.RowRequest(sampler, n, scale)
            for sampler in ("lcm", "ddim")
            for scale in (3.0, 8.0)
            for n in (1, 2)
        ),
        evaluate.RowRequest("ddim", 4),
    ]


def test_shapes_are_judged_by_their_captions():
    """Renders of the captions themselves are all right; in reversed order nearly none is."""
    specs = [shapes.spec(i, "heldout") for i in range(80)]
    captions = [shapes.caption(spec) for spec in specs]
    reference = measures.Reference((), None, dict, Path("unused"))
    measure = measures.load(measures.Spec("shapes"), captions, (64, 64), reference)
    renders = shapes.render_batch(specs)

    def judged(pictures):
        state = None
        for start in (0, 50):
            state = measure.fold(state, pictures[start : start + (50 if start == 0 else 30)], captions)
        return measure.finish(state)

    right, wrong = judged(renders), judged(renders[::-1])
    assert right["caption_accuracy"] == 1.0 and wrong["caption_accuracy"] < 0.2
    assert abs(right["shapes_frechet"] - wrong["shapes_frechet"]) < 1e-6 * right["shapes_frechet"]
    card = measures.load(measures.Spec("shapes"), captions, (64, 64), reference, style="card")
    assert card.about["reference"] != measure.about["reference"]
    assert (card.prepare.func, card.prepare.args) == (captions_lib.reference, ("card",))
    with pytest.raises(LcmError, match="needs at least 65 pictures per row, here are 64"):
        measures.load(measures.Spec("shapes"), captions[:64], (64, 64), reference)
    with pytest.raises(LcmError, match="not a caption of the shapes set: 'hello'"):
        measures.load(measures.Spec("shapes"), ["hello"] * 80, (64, 64), reference)


VALUES = {"caption_accuracy": 0.5, "endpoint_error": 0.25}
ROW = table.Row("m", "lcm", 1, 8.0, 1, VALUES, 1.0, (0.9, 1.1), 3, 0.5, {}, {})


def test_a_plot_has_a_line_for_each_sampler_and_scale():
    rows = [
        ROW,
        dataclasses.replace(ROW, steps=4, values={"caption_accuracy": 0.7}),
        dataclasses.replace(ROW, guidance_scale=3.0),
        dataclasses.replace(ROW, model="n", sampler="ddim"),
    ]
    lines = plot.series(rows)
    assert {name: [row.steps for row in members] for name, members in lines.items()} == {
        "m, lcm, scale 8": [1, 4],
        "m, lcm, scale 3": [1],
        "n, ddim, scale 8": [1],
    }
    assert plot.panels(rows) == ["caption_accuracy"] and plot.panels([ROW]) == ["caption_accuracy", "endpoint_error"]


def test_the_plot_is_a_picture(tmp_path):
    pytest.importorskip("matplotlib")
    plot.write([ROW, dataclasses.replace(ROW, steps=4, milliseconds=3.0)], tmp_path / "plot.png")
    with Image.open(tmp_path / "plot.png") as picture:
        assert picture.format == "PNG" and min(picture.size) > 200 and len(np.unique(np.asarray(picture))) > 10


def test_a_plot_of_no_quality_shows_latency(tmp_path):
    pytest.importorskip("matplotlib")
    bare = dataclasses.replace(ROW, values={})
    plot.write([bare, dataclasses.replace(bare, steps=4, milliseconds=3.0)], tmp_path / "plot.png")
    with Image.open(tmp_path / "plot.png") as picture:
        assert min(picture.size) > 200 and len(np.unique(np.asarray(picture))) > 10


def shared(**metrics) -> dict:
    prompts = {"from": "p", "sha256": "0" * 64}
    return {"seed": 0, "pictures": 3, "prompts": prompts, "height": 8, "width": 8, "metrics": metrics}


def drawn_with(spacing: str, **program) -> dict:
    program = {"dtype": "float32", "negative_prompt": None, "tiled": False, "batch_size": 4, "device": "cpu"} | program
    return {"model": {}, "program": program, "sampling": {"spacing": spacing}}


def test_metrics_asked_for_later_are_added_to_a_row(tmp_path):
    settings = drawn_with("trailing")
    first = dataclasses.replace(ROW, values={"fid": 1.0}, comparison=shared(fid={"sha256": "a"}), settings=settings)
    second = dataclasses.replace(ROW, values={"cmmd": 2.0}, comparison=shared(cmmd={"sha256": "b"}), settings=settings)
    assert not table.is_current(first, second.comparison, settings)
    for row in (first, second):
        table.keep(tmp_path, row)
    (both,) = table.kept(tmp_path)
    assert both.values == {"fid": 1.0, "cmmd": 2.0} and both.comparison["metrics"].keys() == {"fid", "cmmd"}
    for row in (first, second):
        assert table.is_current(both, row.comparison, settings)
    assert not table.is_current(both, shared(fid={"sha256": "c"}), settings)
    slower = dataclasses.replace(second, settings=drawn_with("trailing", batch_size=2, device="gpu", timings=9))
    assert not table.is_current(both, slower.comparison, slower.settings)
    assert table.keep(tmp_path, slower) is None  # another latency, the same pictures
    (both,) = table.kept(tmp_path)
    assert both.values == {"fid": 1.0, "cmmd": 2.0} and both.settings == slower.settings
    other = dataclasses.replace(second, settings=drawn_with("trailing", dtype="bfloat16"))
    aside = table.keep(tmp_path, other)  # other pictures: nothing is taken over, nor lost
    assert table.kept(tmp_path) == [other]
    assert json.loads(aside.read_text())["values"] == both.values
    later = table.keep(tmp_path, first)  # the same again: what was kept aside stays
    assert later != aside and json.loads(aside.read_text())["values"] == both.values
    assert json.loads(later.read_text())["values"] == other.values and table.kept(tmp_path) == [first]


def test_rows_drawn_otherwise_are_told_apart(tmp_path):
    """The spacing is in file, table and plot; the notes name flags, by model where they differ."""
    base = dataclasses.replace(ROW, sampler="ddim", comparison=shared(), settings=drawn_with("trailing"))
    leading = dataclasses.replace(base, settings=drawn_with("leading"))
    other = dataclasses.replace(base, model="n", settings=drawn_with("trailing", dtype="bfloat16", negative_prompt="b"))
    for row in (base, leading, other):
        table.keep(tmp_path, row)
    rows = table.kept(tmp_path)
    assert len(rows) == 3
    text = table.markdown(rows)
    assert "| m | ddim | 1 |" in text and "| m | ddim-leading | 1 |" in text
    assert (
        "- dtype float32 (m), bfloat16 (n); spacing trailing (m, n), leading (m); negative_prompt none (m), b (n); "
        "tiled False."
    ) in text
    assert len(plot.series(rows)) == 3
    lcm = dataclasses.replace(leading, sampler="lcm")
    assert table.sampler_of(lcm) == "lcm" and "- dtype float32; negative_prompt none; tiled" in table.markdown([lcm])


def test_pictures_that_are_not_finite_are_refused():
    class Broken:
        def encode(self, captions):
            return np.zeros(len(captions))

        def noise(self, seed, numbers, *_):
            return np.zeros(len(numbers))

        def latents(self, cond, *_):
            return cond

        def decode(self, z):
            images = np.full((len(z), 4, 4, 3), 0.5, np.float32)
            images[1] = np.nan
            return images

    model, request = rows_lib.EvaluatedModel("a", Broken(), 4), Request(Settings("ddim", 2), 3.0, 4, 4)
    with pytest.raises(LcmError, match="images 1 of ddim with 2 steps are not finite.*--dtype=float32"):
        next(rows_lib.generate(model, PROMPTS, request, seed=0))


def test_what_is_not_finite_stays_so(lcm):
    """Clipped to [0, 1], infinity would be a white picture."""
    generator = lcm_jax.load(lcm)
    decoded = np.array([np.inf, -np.inf, np.nan, 3.0, -3.0, 0.5], np.float32).reshape(2, 1, 1, 3)
    generator._decode = lambda vae, params, z: decoded
    images = generator.decode(np.zeros((2, 1, 1, 4), np.float32))
    np.testing.assert_array_equal(images.ravel(), np.array([np.nan, np.nan, np.nan, 1, 0, 0.75], np.float32))
    assert not_finite(images) == [0]
    np.testing.assert_array_equal(to_uint8(images).ravel(), [0, 0, 0, 255, 0, 191])


def test_without_matplotlib_the_program_says_so_at_once(lcm, prompts, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    argv = [word for word in command(lcm, prompts, tmp_path / "out", "--row=lcm:1") if word != "--no-plot"]
    assert evaluate.main(argv) == 2
    assert capsys.readouterr().err == (
        "error: the plot needs matplotlib: pip install 'lcm_jax[plot]', or leave the plot out with --no-plot\n"
    )
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_the_embedded_teacher_measures_as_its_recorded_rows(tmp_path):
    """One and two DDIM steps of 256 pictures, as experiments/shapes_teacher recorded them."""
    out = tmp_path / "table"
    argv = [
        "--model=shapes",
        "--source=shapes",
        "--count=256",
        "--metric=shapes",
        "--row=ddim:1,2:3",
        "--no-plot",
        "--batch_size=64",
        "--timings=1",
        f"--out={out}",
    ]
    assert evaluate.main(argv) == 0
    recorded = json.loads((Path(__file__).parents[1] / "experiments/shapes_teacher/teacher_rows.json").read_text())
    for row in json.loads((out / "table.json").read_text())["rows"]:
        (old,) = (
            r
            for r in recorded["tables"]["256"]
            if (r["method"], r["steps"], r["guidance_scale"]) == ("DDIM", row["steps"], 3.0)
        )
        values = row["values"]
        assert row["evaluations"] == old["evaluations"]
        assert abs(values["caption_accuracy"] - old["accuracy"]) <= 1 / 256
        assert abs(values["shapes_frechet"] - old["frechet"]) < 1e-2 * old["frechet"]
        if row["steps"] == 1:
            assert abs(values["endpoint_error"] - old["endpoint_error"]) < 1e-3 * old["endpoint_error"]
        else:
            assert "endpoint_error" not in values
