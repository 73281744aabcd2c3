"""`python -m lcm_jax.evaluate`: rows that are kept, compared and sampled alike, what they measure, and its refusals."""

import dataclasses
import functools
import io
import json
import os
import re
import sys
import tarfile
from pathlib import Path

import metrics_kit
import numpy as np
import parity
import pytest
import tiny
from flax import linen as nn
from PIL import Image

import lcm_jax
from experiments import embedded
from lcm_jax import evaluate, pretrained, sample
from lcm_jax.data import shapes
from lcm_jax.data.records import Record
from lcm_jax.errors import LcmError
from lcm_jax.metrics import distances, inputs, measures, plot, statistics, table
from lcm_jax.metrics import shapes as shapes_metric
from lcm_jax.metrics.clip_score import clip_scores, load_clip
from lcm_jax.metrics.features import Extractor, load_extractor, make_extractor
from lcm_jax.metrics.inputs import FolderImages, SourceImages
from lcm_jax.metrics.intervals import Estimate
from lcm_jax.metrics.networks.network import Network
from lcm_jax.metrics.rows import Evaluation, model_about
from lcm_jax.sampling.generator import Generator
from lcm_jax.sampling.plan import Settings
from lcm_jax.sampling.png import not_finite, to_uint8
from lcm_jax.sampling.request import Request

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


pytestmark = pytest.mark.usefixtures("load_once")


class Means(nn.Module):
    """Features of an image: the means of its three channels."""

    @nn.compact
    def __call__(self, x):
        return x.mean((1, 2)) * self.param("scale", nn.initializers.ones, ())


@functools.cache
def means_extractor(name: str) -> Extractor:
    params = {"scale": np.ones((), np.float32)}
    return make_extractor(Network(name, 3, Means(), params, lambda images: images.astype(np.float32), "none"))


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    """What the command lines of bad input name in capitals."""
    folder = tmp_path_factory.mktemp("files")
    (folder / "empty.txt").write_text(" \n\n")
    (folder / "bare").mkdir()
    (folder / "torn").mkdir()
    for i in range(4):
        (folder / "torn" / f"{i}.png").write_bytes(b"no image")
    for name, count, side, network in (
        ("four", 4, 16, "means/none"),
        ("three", 3, 16, "means/none"),
        ("large", 4, 32, "means/none"),
        ("other", 4, 16, "other/none"),
    ):
        images = np.random.default_rng(0).integers(0, 256, (count, side, side, 3), np.uint8)
        statistics.save(folder / f"{name}.npz", statistics.gather(means_extractor(network), [images]))
    return folder


@pytest.fixture
def means(monkeypatch) -> Extractor:
    """Stands for the Inception of the FID, which needs 2,049 images."""
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


def test_table_files(first):
    """What the rows share stands once, each row on a line; reading gives the rows back."""
    out, found = first
    assert [(row["sampler"], row["steps"], row["guidance_scale"], row["evaluations"]) for row in found["rows"]] == [
        ("lcm", 2, 4.0, 2),
        ("lcm", 2, 8.0, 2),
    ]
    assert (found["seed"], found["pictures"], found["height"], found["width"]) == (0, 5, 16, 16)
    for row in found["rows"]:
        low, high = row["quartiles"]
        assert 0 < low <= row["milliseconds"] <= high and row["timings"] == 2 and row["compile_seconds"] >= 0
        assert "comparison" not in row and row["settings"].keys() == {"sampling"}
    assert found["rows"][0]["compile_seconds"] > 0
    assert table.read(out) == table.read_rows(out)
    assert sum(line.startswith('  {"model"') for line in (out / "table.json").read_text().splitlines()) == 2
    text = (out / "table.md").read_text()
    assert "| tiny | lcm | 2 | 8 | 2 |" in text
    assert "5 images per row, 16 x 16 pixels, seed 0" in text and "batches of 4 on 1 x cpu" in text


def test_read_of_older_files(first, tmp_path):
    """Rows that were whole, and files of experiments/ whose comparison was an object."""
    out, found = first
    rows = [dataclasses.asdict(row) for row in table.read_rows(out)]
    shared = {key: found[key] for key in (*table.FLAGS, "metrics")}
    old = {key: found[key] for key in table.FLAGS} | {"notes": [], "rows": rows}
    published = {"notes": [], "comparison": shared, "models": found["models"], "rows": found["rows"]}
    for content in (old, published):
        tiny.write_json(tmp_path / "table.json", content)
        assert table.read(tmp_path) == table.read_rows(out)
    tiny.write_json(tmp_path / "table.json", {"rows": [{"model": "x"}]})
    with pytest.raises(LcmError, match="table.json .* cannot be read as a table of lcm_jax.evaluate: .*; delete it"):
        table.read(tmp_path)


def test_rows_are_not_measured_again(first, lcm, prompts, tmp_path, monkeypatch):
    out, found = first
    written = {path: path.read_bytes() for path in (out / "rows").iterdir()}
    (tmp_path / "moved.txt").write_text("\n".join(PROMPTS))  # the same prompts in another file
    with monkeypatch.context() as patched:
        patched.setattr(evaluate, "measure", lambda *args: pytest.fail("measured again"))
        for path in (prompts, tmp_path / "moved.txt"):
            assert evaluated(lcm, path, out, "--count=5", "--row=lcm:2:8", "--name=tiny") == found  # both rows stay
    assert {path: path.read_bytes() for path in (out / "rows").iterdir()} == written

    missing = []
    monkeypatch.setattr(evaluate, "measure", lambda out, evaluation, requests: missing.extend(requests))
    monkeypatch.setattr(evaluate, "write", lambda *args: [])
    evaluated(lcm, prompts, out, "--count=5", "--row=lcm:2:4,8", "--row=lcm:1:8", "--name=tiny")
    assert [(request.settings.steps, request.guidance_scale) for request in missing] == [(1, 8.0)]
    for option in ("--dtype=bfloat16", "--batch_size=2"):
        missing.clear()
        evaluated(lcm, prompts, out, "--count=5", "--row=lcm:2:4,8", "--name=tiny", option)
        assert len(missing) == 2, option


def test_a_negative_prompt_in_attention_is_noted(lcm, prompts, tmp_path, monkeypatch):
    latents, seen = Generator.latents, []

    def noted(*args, **more):
        seen.append((args[5], more))
        return latents(*args, **more)

    monkeypatch.setattr(Generator, "latents", noted)
    found = evaluated(lcm, prompts, tmp_path, "--count=1", "--row=lcm:2:8", "--negative_prompt=b", "--nag_scale=3")
    assert all(one == ("b", {"nag_scale": 3.0}) for one in seen)
    assert any("negative_prompt b (nag_scale 3)" in note for note in found["notes"])


def test_stopped_command_resumes(lcm, prompts, tmp_path, monkeypatch):
    """The second row fails; the first is kept, and the same command measures the second alone."""
    steps, measure = [], Evaluation.measure

    def breaks(self, request, advance):
        steps.append(request.settings.steps)
        if steps.count(2) == 1 and steps[-1] == 2:
            raise LcmError("stopped")
        return measure(self, request, advance)

    monkeypatch.setattr(Evaluation, "measure", breaks)
    words = (lcm, prompts, tmp_path / "out", "--row=lcm:1,2:8")
    assert evaluate.main(command(*words)) == 2
    assert [row.steps for row in table.read_rows(tmp_path / "out")] == [1]
    assert [row["steps"] for row in evaluated(*words)["rows"]] == [1, 2]
    assert steps == [1, 2, 2]


@pytest.mark.slow
def test_another_model_stands_beside_and_a_changed_one_replaces(lcm, prompts, tmp_path, capsys):
    """Rows of one name and other weights never stand in one table."""
    out = tmp_path / "table"
    options = ("--count=5", "--row=lcm:1:8")

    def shown(found):
        return [(row["model"], row["guidance_scale"], row["steps"]) for row in found["rows"]]

    evaluated(lcm, prompts, out, *options, "--row=lcm:1:4", "--name=one")
    beside = evaluated(tiny.folder("sd1"), prompts, out, "--count=5", "--row=ddim:1:3", "--name=teacher")
    assert [(row["model"], row["evaluations"]) for row in beside["rows"]] == [("one", 1), ("one", 1), ("teacher", 2)]
    vae = tmp_path / "vae"
    tiny.randomise(type(tiny.torch_vae())(**tiny.VAE), 99).save_pretrained(vae)
    capsys.readouterr()
    changed = evaluated(lcm, prompts, out, *options, "--name=one", f"--vae={vae}")
    assert shown(changed) == [("one", 8.0, 1), ("teacher", 3.0, 1)]
    error = capsys.readouterr().err
    assert "1 rows of one are of other weights or flags" in error and "it was moved to" in error
    teacher = ("--count=5", "--row=ddim:2:3", "--name=teacher")
    later = evaluated(tiny.folder("sd1"), prompts, out, *teacher)  # a command for another model brings none back
    assert shown(later) == [("one", 8.0, 1), ("teacher", 3.0, 1), ("teacher", 3.0, 2)]
    assert "1 rows of one are of other weights or flags" in capsys.readouterr().err
    whole = evaluated(lcm, prompts, out, *options, "--row=lcm:1:4", "--name=one")  # the first weights again
    assert shown(whole)[:2] == [("one", 4.0, 1), ("one", 8.0, 1)]


def test_model_about_covers_configs(lcm, tmp_path):
    """Another scaling of the latents: the same weights, other images. Who wrote a file makes no difference."""

    def rewritten(name, **changes):
        folder = tiny.copy("micro lcm", tmp_path / name)
        tiny.change_json(folder / "vae" / "config.json", **changes)
        return model_about(lcm_jax.load(folder))

    own = rewritten("same", _diffusers_version="0.0.1")
    other = rewritten("other", scaling_factor=0.5)
    assert own == model_about(lcm_jax.load(lcm)) and {key for key in own if own[key] != other[key]} == {"configs"}


class Recorder(measures.Measure):
    name, min_images, about = "fid", 1, {"network": "none", "sha256": "0" * 64}

    def __init__(self):
        self.seen = []

    def add(self, state, images, captions):
        self.seen.append((images, list(captions)))

    def estimates(self, state):
        return {"fid": Estimate(1.0, (0.5, 1.5))}


def test_images_are_those_of_sample_for_any_batch_size(lcm, prompts, tmp_path, monkeypatch):
    """Every row starts from the noise of (seed, i): it measures the images that `sample` generates."""
    recorder = Recorder()
    monkeypatch.setattr(measures, "load", lambda *args: recorder)
    options = [f"--metric=fid:{prompts}", "--row=lcm:2:8", "--seed=5"]
    for size in (2, 4):
        assert evaluate.main(command(lcm, prompts, tmp_path / str(size), *options, f"--batch_size={size}")) == 0
    seen = recorder.seen
    images = [np.concatenate([images for images, _ in part]) for part in (seen[:2], seen[2:])]
    assert seen[0][1] + seen[1][1] == seen[2][1] == list(PROMPTS)
    assert np.abs(images[0].astype(int) - images[1]).max() <= 1  # another program: sums may round differently
    options = ["--seed=5", "--steps=2", "--num_images=3", "--batch_size=3", "--guidance_scale=8"]
    for i, prompt in enumerate(PROMPTS):  # image i of a prompt, as `sample` numbers them
        out = tmp_path / f"png{i}"
        assert sample.main([f"--model={lcm}", f"--out={out}", f"--prompt={prompt}", *options]) == 0
        theirs = np.asarray(Image.open(out / f"0000_{i:04d}.png"))
        assert np.abs(theirs.astype(int) - images[1][i]).max() <= 1


def test_fid_is_the_distance_to_the_folder_and_is_computed_once(lcm, prompts, tmp_path, means, monkeypatch):
    folder = tmp_path / "images"
    folder.mkdir()
    references = np.random.default_rng(0).integers(0, 256, (6, 16, 16, 3), np.uint8)
    for i, image in enumerate(references):
        Image.fromarray(image).save(folder / f"{i}.png")
    generated, gather, read = [], statistics.gather, []

    def listening(extractor, batches, start=None, keep=0):
        batches = list(batches)
        (generated if len(batches[0]) == 4 else read).extend(batches)
        return gather(extractor, batches, start, keep)

    monkeypatch.setattr(statistics, "gather", listening)
    words = (lcm, prompts, tmp_path / "out", "--count=8", f"--metric=fid:{prompts}", f"--reference={folder}")
    (found,) = evaluated(*words, "--row=lcm:1:8")["rows"]
    images = np.concatenate(generated)
    assert len(images) == 8 and len(np.concatenate(read)) == 6
    parity.close(found["values"]["fid"], distances.frechet_distance(means(images), means(references)), rtol=1e-6)
    (row,) = table.read(tmp_path / "out")
    about = row.comparison["metrics"]["fid"]
    assert (about["network"], about["sha256"]) == (means.name, means.hash)
    assert about["reference"]["pictures"] == 6

    read.clear()
    assert len(evaluated(*words, "--row=lcm:1:4")["rows"]) == 2 and not read
    assert "reference from" in (tmp_path / "out" / "table.md").read_text()


@pytest.mark.slow
def test_metrics_by_networks_of_folders(lcm, prompts, tmp_path, monkeypatch):
    """CLIP score, CMMD and FD-DINOv2 of the generated images."""
    clip = metrics_kit.write_clip(tmp_path / "clip")
    dino = metrics_kit.write_dinov2(tmp_path / "dino", metrics_kit.torch_dinov2())
    folder, generated, generate = tmp_path / "images", [], Evaluation.generate
    folder.mkdir()
    references = metrics_kit.images(40, 16, 16)
    for i, image in enumerate(references):
        Image.fromarray(image).save(folder / f"{i:02d}.png")

    def listen(self, request):
        for numbers, images, seconds in generate(self, request):
            generated.append(images)
            yield numbers, images, seconds

    monkeypatch.setattr(Evaluation, "generate", listen)
    metrics = [f"--metric=clip_score:{clip}", f"--metric=cmmd:{clip}", f"--metric=fd_dinov2:{dino}"]
    options = ["--count=36", "--batch_size=12", "--row=lcm:1:8", f"--reference={folder}"]
    (row,) = evaluated(lcm, prompts, tmp_path / "out", *options, *metrics)["rows"]
    images, captions = np.concatenate(generated), [PROMPTS[i % 3] for i in range(36)]
    values = row["values"]
    parity.close(values["clip_score"], clip_scores(load_clip(clip), images, captions).mean(), rtol=0, atol=1e-3)
    extractor = load_extractor("clip", clip, resize="cmmd")
    want = distances.cmmd(extractor(images), extractor(references))
    assert want > 0
    parity.close(values["cmmd"], want, rtol=1e-4)
    extractor = load_extractor("dinov2", dino)
    parity.close(values["fd_dinov2"], distances.frechet_distance(extractor(images), extractor(references)), rtol=1e-4)
    text = (tmp_path / "out" / "table.md").read_text()
    assert "| CLIP score | CMMD | FD-DINOv2 |" in text and "/cmmd-28" in text
    assert len(list((tmp_path / "out" / "references").glob("*.npz"))) == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--row=lcm:0:8"], r"--row=lcm:0:8: --steps=0: out of range; choose 1 to 50"),
        (["--row=lcm:21:8"], r"--row=lcm:21:8: --steps=21: out of range; choose 1 to 20"),
        (["--row=lcm:2:0.5"], r"--row=lcm:2:0.5: --guidance_scale=0.5: 1 is no guidance"),
        (["--row=lcm:2:nan"], r"--guidance_scale=nan: 1 is no guidance"),
        (["--row=lcm:two"], r"--row=lcm:two: write SAMPLER:STEPS or SAMPLER:STEPS:SCALE"),
        (["--row=lcm"], r"--row=lcm: write SAMPLER:STEPS"),
        (["--row=heun:2"], r"--row=heun:2: sampler 'heun' is unknown; choose one of lcm"),
        (["--count=0"], r"--count=0: must be at least 1"),
        (["--images_per_caption=0"], r"--images_per_caption=0: must be at least 1"),
        (["--images_per_caption=1000000"], r"--images_per_caption=1000000: give 100000 at most"),
        (["--endpoint_steps=0"], r"--endpoint_steps=0: must be at least 1"),
        (["--timings=0"], r"--timings=0: must be at least 1"),
        (["--timings=1000000000"], r"--timings=1000000000: give 100000 at most"),
        (["--count=1000000000000"], r"--count=1000000000000: give 10000000 at most"),
        (["--batch_size=100000000000"], r"--batch_size=100000000000: .* GiB of memory or more"),
        (["--height=100000", "--width=100000"], r"--height=100000: .* GiB of memory or more"),
        (["--seed=-1"], r"--seed=-1: out of range"),
        (["--height=17"], r"--row=lcm:1:8: --height=17: not a multiple of the VAE's factor 2"),
        (["--prompts=EMPTY"], r"--prompts=\S+empty.txt holds no prompt; write one per line"),
        (["--prompts=/no/such"], r"--prompts=/no/such: cannot be read"),
        (["--source=shapes"], r"captions come from --prompts=FILE or from --source=NAME; give one of them"),
        (["--split=train"], r"--split is of a data source; give --source"),
        (["--gamma=0.3"], r"--gamma=0.3 is of the sampler tcd, which no --row has; leave it out"),
        (["--spacing=leading"], r"--spacing=leading: no --row has a sampler that uses it; leave it out"),
        (["--metric=psnr"], r"--metric=psnr: choose NAME or NAME:WEIGHTS of fid, clip_score"),
        (["--metric=fid"], r"--metric=fid: .*no weights are given; fetch \S+ .*sha256 6726825d"),
        (["--metric=cmmd:/no/such"], r"--metric=cmmd:/no/such: .*/no/such does not exist; fetch .*sha256"),
        (["--metric=clip_score/x:EMPTY"], r"clip_score has no resize variants; leave out /x"),
        (["--metric=fid:EMPTY", "--metric=fid:EMPTY"], r"fid is given twice; give it once"),
        (["--metric=shapes"], r"--metric=shapes: the scorer reads images of 64 x 64, these are 16 x 16"),
        (["--metric=fid:EMPTY"], r"--metric=fid compares with a reference of means/none .*none is given; give --ref"),
        (["--metric=fid:EMPTY", "--reference=FOUR"], r"--metric=fid needs at least 4 images per row, here are 3"),
        (["--metric=fid:EMPTY", "--count=4", "--reference=THREE"], r"three.npz is of 3 images, at least 4 are"),
        (["--metric=fid:EMPTY", "--count=4", "--reference=LARGE"], r"large.npz is of images of 32 x 32, the gen"),
        (["--metric=fid:EMPTY", "--count=4", "--reference=OTHER"], r"statistics of another network are given.*other/n"),
        (
            ["--metric=fid:EMPTY", "--count=4", "--reference=FOUR", "--reference=OTHER"],
            r"holds statistics of another network, other/none \(\w+\); the metrics' are means/none",
        ),
        (["--reference=EMPTY"], r"empty.txt is neither a .npz of statistics nor a folder of images"),
        (
            ["--metric=fid:EMPTY", "--count=4", "--reference=FOUR", "--reference=TORN"],
            r"torn: all .* in four.npz; leave",
        ),
        (["--metric=fid:EMPTY", "--reference=BARE"], r"bare holds no images"),
        (["--reference=BARE"], r"bare: no --metric compares with images; give one of fid"),
        (["--metric=fid:EMPTY", "--count=4", "--reference=FOUR", "--reference=THREE"], r"are both of means/none; give"),
        (["--metric=fid:EMPTY", "--count=4", "--reference=TORN"], r"0.png: not an image.*; remove it or replace it"),
        (["--out=EMPTY"], r"empty.txt is a file"),
        (["--negative_prompt=b"], r"this UNet has a w embedding"),
        (["--nag_scale=0"], r"--nag_scale=0: 1 is no guidance in attention"),
        (["--model=/no/such"], r"/no/such does not exist"),
    ],
)
def test_bad_input_is_one_line_before_long_work(
    lcm, prompts, files, tmp_path, capsys, monkeypatch, means, options, message
):
    monkeypatch.setattr(Evaluation, "measure", lambda *args: pytest.fail("long work began"))
    for file in files.iterdir():
        options = [re.sub(f"(?<=[=:]){file.stem.upper()}$", str(file), option) for option in options]
    rows = [] if any(option.startswith("--row") for option in options) else ["--row=lcm:1:8"]
    assert evaluate.main(command(lcm, prompts, tmp_path / "out", *rows, *options)) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ") and re.search(message, error), error


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--seed=1"], r"a row \(tiny, lcm, 2 steps\) with another --seed: 0 there, 1 here; .*, or another --out"),
        (["--count=4"], r"with another --count: 5 there, 4 here; "),
        (["--height=32"], r"with another --height: 16 there, 32 here; "),
        (
            ["--prompts=OTHER"],
            r"another --prompts or --source: --prompts=\S+prompts.txt \(sha256 \w{12}\) there, --prompts=\S+other.txt",
        ),
        (
            ["--images_per_caption=2"],
            r"--source: --prompts=\S+prompts.txt \(\S+ \w{12}\) there, .*, 2 images of each \(sha256 \w{12}\) here",
        ),
    ],
)
def test_incomparable_rows_are_refused(first, lcm, prompts, tmp_path, capsys, options, message):
    out, _ = first
    (tmp_path / "other.txt").write_text("hello\n")
    options = [option.replace("OTHER", str(tmp_path / "other.txt")) for option in options]
    assert evaluate.main(command(lcm, prompts, out, "--count=5", "--row=lcm:1:8", "--name=another", *options)) == 2
    error = capsys.readouterr().err
    assert re.search(message, error) and error.count("\n") == 1, error


def arguments(*options):
    return evaluate.parser().parse_args(["--model=x", "--row=lcm:1", "--out=x", *options])


def test_captions_and_references_of_a_source_are_of_its_usable_records(tmp_path):
    for i in range(4):
        image, caption = shapes.example(i)
        Image.fromarray(image).save(tmp_path / f"{i}.png")
        (tmp_path / f"{i}.txt").write_text("" if i == 1 else caption)
    source = ("--source=folder", f"--path={tmp_path}")
    found = evaluate.read_inputs(arguments(*source, "--count=3"))
    assert list(found.captions) == [shapes.example(i)[1] for i in (0, 2, 3)]
    args = arguments(*source, "--count=3", "--references=2")
    with pytest.raises(LcmError, match="^--references=2: no --metric compares with images; give one of fid"):
        evaluate.read_reference(args, found, [measures.Spec("clip_score")])
    reference = evaluate.read_reference(args, found, [measures.Spec("fid")])
    assert [image.shape for image in reference.images.read(32, 32)] == [(32, 32, 3)] * 2
    with pytest.raises(LcmError, match=r"--references=2 is of --source's images, but --reference gives a folder"):
        evaluate.check_flags(arguments(*source, "--references=2", f"--reference={tmp_path}"))
    with pytest.raises(LcmError, match=r"has 3 usable records, --count=4 needs 4; give --count=3 or less"):
        evaluate.read_inputs(arguments(*source, "--count=4"))
    with pytest.raises(LcmError, match=r"has 3 usable records, --count=25 needs 4; give --count=24 or less"):
        evaluate.read_inputs(arguments(*source, "--count=25", "--images_per_caption=8"))
    several = arguments(*source, "--count=24", "--images_per_caption=8")
    found = evaluate.read_inputs(several)
    assert len(found.captions) == 24
    assert evaluate.read_reference(several, found, ()).images.about["pictures"] == 3  # all that the source has
    with pytest.raises(LcmError, match=r"^--split=heldout: the source 'folder' does not use it; leave it out"):
        evaluate.read_inputs(arguments(*source, "--split=heldout"))


def test_shards_whose_folder_cannot_be_written_to(tmp_path):
    """What the error says to do can be done."""
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for suffix, content in (("png", b"image"), ("txt", b"caption")):
            file = tarfile.TarInfo(f"1.{suffix}")
            file.size = len(content)
            tar.addfile(file, io.BytesIO(content))
    (tmp_path / "a.tar.index.npz").mkdir()
    words = ("--source=webdataset", f"--path={tmp_path}/a.tar", "--count=1")
    with pytest.raises(LcmError, match=r"^--index_dir=\S+: the index .* cannot be written there .*another folder"):
        evaluate.read_inputs(arguments(*words))
    found = evaluate.read_inputs(arguments(*words, f"--index_dir={tmp_path}/indices"))
    assert found.captions == ("caption",) and found.name == f"webdataset {tmp_path}/a.tar"


def test_images_per_caption_stand_in_a_row(prompts):
    """`--count` is that of the images: the last caption may have fewer, and a list of prompts begins again."""
    one, two, three = PROMPTS

    def captions(*options):
        return list(evaluate.read_inputs(arguments(f"--prompts={prompts}", *options)).captions)

    assert captions("--images_per_caption=2") == [one, one, two, two, three, three]
    assert captions("--images_per_caption=2", "--count=3") == [one, one, two]
    assert captions("--images_per_caption=3", "--count=11") == [one] * 3 + [two] * 3 + [three] * 3 + [one] * 2
    assert captions("--images_per_caption=9", "--count=2") == [one, one]
    found = evaluate.read_inputs(arguments("--source=shapes", "--count=20", "--images_per_caption=8"))
    first, second, third = (shapes.example(i, "heldout")[1] for i in range(3))
    assert list(found.captions) == [first] * 8 + [second] * 8 + [third] * 4


def test_captions_of_shapes_are_held_out():
    """Styles differ as references, though their captions are the same."""
    abouts = []
    for style in ("plain", "card"):
        args = arguments("--source=shapes", "--count=3", f"--style={style}")
        found = evaluate.read_inputs(args)
        assert list(found.captions) == [shapes.caption(shapes.spec(i, "heldout")) for i in range(3)]
        abouts.append(evaluate.read_reference(args, found, ()).images.about)
    assert not table.same(*abouts)


def test_folder_images_are_identified_by_content(tmp_path):
    for name, value in (("a", 1), ("b", 1), ("c", 2)):
        (tmp_path / name).mkdir()
        Image.fromarray(np.full((8, 8, 3), value, np.uint8)).save(tmp_path / name / "0.bmp")
    a, b, c = (FolderImages(tmp_path / name).about for name in "abc")
    assert table.same(a, b) and not table.same(a, c)


def test_folder_images_are_regular_files(tmp_path):
    os.mkfifo(tmp_path / "0.png")
    for read in (lambda: FolderImages(tmp_path).about, lambda: list(FolderImages(tmp_path).read(8, 8))):
        with pytest.raises(LcmError, match="0.png is no regular file"):
            read()


def test_folder_images_are_all_that_a_person_sees(tmp_path, caplog):
    for name in ("set/a.JPG", "set/b.jfif", "set/c.heic", "set/a.txt", "other/d.avif"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(tmp_path / name, "PNG")
    (tmp_path / "set/linked").symlink_to(tmp_path / "other", target_is_directory=True)
    found = FolderImages(tmp_path / "set")
    assert [path.name for path in found.paths] == ["a.JPG", "b.jfif", "d.avif"] and len(list(found.read(8, 8))) == 3
    with pytest.raises(LcmError, match=r"holds no images .*, but 1 file of unknown kind \(\.heic\); give a folder"):
        for path in found.paths:
            path.unlink()
        (tmp_path / "set/a.txt").unlink()
        FolderImages(tmp_path / "set")


class Images:
    """A source of given images, whose captions are all alike."""

    def __init__(self, *images):
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, number):
        return Record(str(number), self.images[number], ("a caption",))


BLACK, WHITE = np.zeros((8, 8, 3), np.uint8), np.full((8, 8, 3), 255, np.uint8)


def test_source_images_skip_broken_ones():
    source = Images(BLACK, b"no image", WHITE)
    assert [image[0, 0, 0] for image in SourceImages(source, 2, "here").read(8, 8)] == [0, 255]
    with pytest.raises(LcmError, match=r"2 images of the source can be decoded, 3 are needed.*--references=2"):
        list(SourceImages(source, 3, "here").read(8, 8))


def test_source_images_are_identified_by_content():
    """Not by captions, which may be equal, nor by where they are."""
    about = SourceImages(Images(BLACK, WHITE, WHITE), 2, "here").about
    assert about["pictures"] == 2 and about["from"] == "here"
    assert SourceImages(Images(BLACK, WHITE, BLACK), 2, "there").about["sha256"] == about["sha256"]
    assert SourceImages(Images(BLACK, BLACK), 2, "here").about["sha256"] != about["sha256"]


def test_enlarged_references_are_reported(monkeypatch):
    warnings = []
    monkeypatch.setattr(inputs.logging, "warning", warnings.append)
    large, low = np.zeros((16, 16, 3), np.uint8), np.zeros((6, 16, 3), np.uint8)
    assert [i.shape for i in SourceImages(Images(large, low), 2, "here").read(8, 8)] == [(8, 8, 3)] * 2
    (warning,) = warnings
    assert "1 of 2 reference images are smaller than 8 x 8 (the smallest is 16 x 6)" in warning
    list(SourceImages(Images(large, low), 1, "here").read(8, 8))
    assert len(warnings) == 1


def test_parse_rows_gives_all_combinations():
    combinations = [("lcm", 3.0), ("lcm", 8.0), ("ddim", 3.0), ("ddim", 8.0)]
    assert evaluate.parse_rows(["lcm,ddim:1,2:3,8", "ddim:1:3", "ddim:4"]) == [
        *(evaluate.RowRequest(sampler, n, scale) for sampler, scale in combinations for n in (1, 2)),
        evaluate.RowRequest("ddim", 4),
    ]


def test_shapes_are_judged_by_their_captions(monkeypatch):
    """Renders of the captions themselves are all right; in reversed order nearly none is."""
    specs = [shapes.spec(i, "heldout") for i in range(80)]
    captions = [shapes.caption(spec) for spec in specs]
    reference = measures.Reference((), None, Path("unused"))

    def load(captions=captions, **more):
        return measures.load(measures.Spec("shapes"), captions, (64, 64), reference, **more)

    measure, renders = load(), shapes.render_batch(specs)

    def judged(images):
        return measure.estimates(measure.add(measure.add(None, images[:50], captions), images[50:], captions))

    right, wrong = judged(renders), judged(renders[::-1])
    assert right["caption_accuracy"] == (1.0, (1.0, 1.0)) and wrong["caption_accuracy"].value < 0.2
    low, high = wrong["caption_accuracy"].interval
    assert 0 <= low < wrong["caption_accuracy"].value < high < 0.4
    parity.close(right["shapes_frechet"].value, wrong["shapes_frechet"].value, rtol=1e-6)
    parity.close(right["shapes_frechet"].interval, wrong["shapes_frechet"].interval, rtol=1e-6)
    assert right["shapes_frechet"].interval[0] < right["shapes_frechet"].value < right["shapes_frechet"].interval[1]
    assert right.keys() == {"caption_accuracy", "shapes_frechet"}  # a caption each: nothing to tell of coverage
    styles = []
    monkeypatch.setattr(shapes_metric, "reference", styles.append)
    card = load(style="card")
    card.prepare()
    assert card.about["reference"] != measure.about["reference"] and styles == ["card"]
    with pytest.raises(LcmError, match="needs at least 65 images per row, here are 64"):
        load(captions[:64])
    with pytest.raises(LcmError, match="not a caption of the shapes set: 'hello'"):
        load(["hello"] * 80)


def test_coverage_of_shapes_is_measured_and_shown(monkeypatch):
    """Ten captions: one render of each, eight times, or eight renders of its law."""
    monkeypatch.setattr(shapes_metric, "reference", lambda style: None)
    monkeypatch.setattr(shapes_metric, "judge", lambda *args: (Estimate(1.0, None), Estimate(0.0, None)))
    captions = [shapes.caption(spec) for spec in shapes_metric.heldout(10) for _ in range(8)]
    measure = measures.load(measures.Spec("shapes"), captions, (64, 64), measures.Reference((), None, Path("unused")))

    def row(name, numbers):
        images = shapes.render_batch([shapes.drawn(*drawn) for drawn in zip(captions, numbers, strict=True)])
        found = measure.estimates(measure.add(None, images, captions))
        values = {key: one.value for key, one in found.items()}
        ends = {key: one.interval for key, one in found.items() if one.interval}
        shared = {"comparison": comparison(), "settings": settings()}
        return dataclasses.replace(ROW, model=name, values=values, intervals=ends, **shared)

    same, law = row("same", [i - i % 8 for i in range(80)]), row("law", range(80))
    assert same.values["collapsed"] == 1.0 and law.values["collapsed"] <= 0.1
    assert same.values["coverage_distance"] > 0.3 > abs(law.values["coverage_distance"])
    assert same.values["diversity"] < 0.5 < 0.8 < law.values["diversity"] < 1.2  # of two sizes, one is a half
    text = table.markdown([same, law])
    assert "| coverage distance | collapsed captions | diversity |" in text and "| 100.0% (100.0 to 100.0) |" in text
    assert law.intervals.keys() == {"coverage_distance", "collapsed", "diversity"}
    assert all(low <= law.values[key] <= high for key, (low, high) in law.intervals.items())


VALUES = {"caption_accuracy": 0.5, "endpoint_error": 0.25}
ROW = table.Row("m", "lcm", 1, 8.0, 1, VALUES, 1.0, (0.9, 1.1), 3, 0.5, {}, {})


def test_plot_has_a_line_for_each_sampler_and_scale():
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
    assert plot.styles(lines) == {
        "m, lcm, scale 8": {"color": "C0", "linestyle": "--"},
        "m, lcm, scale 3": {"color": "C0", "linestyle": "-"},
        "n, ddim, scale 8": {"color": "C1", "linestyle": "--"},
    }
    assert plot.panels(rows) == ["caption_accuracy"] and plot.panels([ROW]) == ["caption_accuracy", "endpoint_error"]


def test_error_bars_are_lengths():
    lengths = plot.error_lengths([0.5, 0.7, 1.0], [(0.4, 0.65), None, (0.9, 1.0)])
    parity.close(lengths, [[0.1, 0, 0.1], [0.15, 0, 0]], atol=1e-12)


@pytest.mark.parametrize("values", [VALUES, {}])
def test_plot_is_an_image(values, tmp_path):
    """Of quality, or of latency if there is none."""
    row = dataclasses.replace(ROW, values=values, intervals={"caption_accuracy": (0.4, 0.6)})
    plot.write([row, dataclasses.replace(row, steps=4, milliseconds=3.0)], tmp_path / "plot.png")
    with Image.open(tmp_path / "plot.png") as image:
        assert image.format == "PNG" and min(image.size) > 200 and len(np.unique(np.asarray(image))) > 10


def comparison(**metrics) -> dict:
    prompts = {"from": "p", "sha256": "0" * 64}
    return {"seed": 0, "pictures": 3, "prompts": prompts, "height": 8, "width": 8, "metrics": metrics}


def settings(spacing: str = "trailing", **program) -> dict:
    program = {"dtype": "float32", "negative_prompt": None, "tiled": False, "batch_size": 4, "device": "cpu"} | program
    return {"model": {}, "program": program, "sampling": {"spacing": spacing}}


def test_save_row_adds_metrics_of_the_same_images(tmp_path):
    own = settings()
    first = dataclasses.replace(ROW, values={"fid": 1.0}, comparison=comparison(fid={"sha256": "a"}), settings=own)
    second = dataclasses.replace(ROW, values={"cmmd": 2.0}, comparison=comparison(cmmd={"sha256": "b"}), settings=own)
    assert not table.is_current(first, second.comparison, own)
    for row in (first, second):
        table.save_row(tmp_path, row)
    (both,) = table.read_rows(tmp_path)
    assert both.values == {"fid": 1.0, "cmmd": 2.0} and both.comparison["metrics"].keys() == {"fid", "cmmd"}
    for row in (first, second):
        assert table.is_current(both, row.comparison, own)
    assert not table.is_current(both, comparison(fid={"sha256": "c"}), own)
    slower = dataclasses.replace(second, settings=settings(batch_size=2, device="gpu", timings=9))
    assert not table.is_current(both, slower.comparison, slower.settings)
    assert table.save_row(tmp_path, slower) is None  # another latency, the same images
    (both,) = table.read_rows(tmp_path)
    assert both.values == {"fid": 1.0, "cmmd": 2.0} and both.settings == slower.settings
    other = dataclasses.replace(second, settings=settings(dtype="bfloat16"))
    aside = table.save_row(tmp_path, other)  # other images: nothing is taken over, and nothing lost
    assert table.read_rows(tmp_path) == [other]
    assert json.loads(aside.read_text())["values"] == both.values
    later = table.save_row(tmp_path, first)
    assert later != aside and json.loads(aside.read_text())["values"] == both.values
    assert json.loads(later.read_text())["values"] == other.values and table.read_rows(tmp_path) == [first]


def test_intervals_are_kept_shown_and_optional(tmp_path):
    """Rows of before have none and stay; a later metric adds its own."""
    own = {"settings": settings(), "values": {"caption_accuracy": 0.945}}
    first = dataclasses.replace(ROW, intervals={"caption_accuracy": (0.931, 0.9577)}, comparison=comparison(), **own)
    second = dataclasses.replace(first, values={"cmmd": 2.0}, intervals={"cmmd": (1.75, 2.25)})
    for row in (first, second):
        table.save_row(tmp_path, row)
    (both,) = table.read_rows(tmp_path)
    assert both.intervals == {"caption_accuracy": (0.931, 0.9577), "cmmd": (1.75, 2.25)}
    older = dataclasses.replace(first, model="older", intervals={})
    table.save_row(tmp_path, older)
    (path,) = [path for path in (tmp_path / "rows").iterdir() if '"older"' in path.read_text()]
    found = json.loads(path.read_text())
    del found["intervals"]
    tiny.write_json(path, found)
    rows = table.read_rows(tmp_path)
    assert rows == [both, older] and table.is_current(rows[1], older.comparison, older.settings)
    table.write(tmp_path, rows)
    assert table.read(tmp_path) == rows
    text = (tmp_path / "table.md").read_text()
    assert "| 94.5% (93.1 to 95.8) | 2.000 (1.750 to 2.250) |" in text and "| 94.5% |  |" in text
    assert "In brackets: 95 % intervals over captions" in text
    assert "In brackets" not in table.markdown([older])
    for broken in ([], {"cmmd": [1.0]}, {"cmmd": [1.0, "2"]}, {"cmmd": 1.0}):
        tiny.write_json(path, found | {"intervals": broken})
        with pytest.raises(LcmError, match=f"{path.name}.*delete it"):
            table.read_rows(tmp_path)


def test_rows_of_other_flags_are_distinguished(tmp_path):
    """The spacing is in file, table and plot; the notes name flags, by model if they differ."""
    base = dataclasses.replace(ROW, sampler="ddim", comparison=comparison(), settings=settings())
    leading = dataclasses.replace(base, settings=settings("leading"))
    other = dataclasses.replace(base, model="n", settings=settings(dtype="bfloat16", negative_prompt="b"))
    for row in (base, leading, other):
        table.save_row(tmp_path, row)
    rows = table.read_rows(tmp_path)
    table.write(tmp_path, rows)
    assert len(rows) == 3 and table.read(tmp_path) == rows
    text = table.markdown(rows)
    assert "| m | ddim | 1 |" in text and "| m | ddim-leading | 1 |" in text
    assert (
        "- dtype float32 (m), bfloat16 (n); spacing trailing (m, n), leading (m); negative_prompt none (m), b (n); "
        "tiled False."
    ) in text
    assert len(plot.series(rows)) == 3
    offloaded = dataclasses.replace(base, model="o", settings=settings(offload="all"))
    assert re.search(
        r"; batches of (\d+ on \S+), batches of \1 --offload=all\. compile", table.markdown([base, offloaded])
    )
    lcm = dataclasses.replace(leading, sampler="lcm")
    assert table.sampler_of(lcm) == "lcm" and "- dtype float32; negative_prompt none; tiled" in table.markdown([lcm])


def test_rows_of_two_states_of_a_model_whose_command_was_stopped(tmp_path):
    """Without a table.json the last row says which state is the newest."""
    old = [dataclasses.replace(ROW, model="b", steps=n, comparison=comparison(), settings=settings()) for n in (1, 2)]
    new = dataclasses.replace(old[0], settings=settings(dtype="bfloat16"))
    own = dataclasses.replace(old[0], model="a")
    for row in (*old, new, own):
        table.save_row(tmp_path, row)
    for path in (tmp_path / "rows").glob("*.json"):
        written = 1 + ("bfloat16" in path.read_text())
        os.utime(path, (written, written))
    rows, others = table.newest(tmp_path, "a", own.state)
    assert [(row.model, row.settings["program"]["dtype"]) for row in rows] == [("a", "float32"), ("b", "bfloat16")]
    assert others == {"b": 1}


def test_images_that_are_not_finite_are_refused():
    class Broken:
        def encode(self, captions):
            return np.zeros(len(captions))

        def noise(self, seed, numbers, *_):
            return np.zeros(len(numbers))

        def latents(self, cond, *_, **__):
            return cond

        def decode(self, z):
            images = np.full((len(z), 4, 4, 3), 0.5, np.float32)
            images[1] = np.nan
            return images

    evaluation = Evaluation("a", Broken(), 4, PROMPTS, 0, (), None, 1, {}, {})
    with pytest.raises(LcmError, match="images 1 of ddim with 2 steps are not finite.*--dtype=float32"):
        next(evaluation.generate(Request(Settings("ddim", 2), 3.0, 4, 4)))


def test_decode_keeps_values_that_are_not_finite(lcm):
    """Clipped to [0, 1], infinity would be a white image."""
    generator = lcm_jax.load(lcm)
    decoded = np.array([np.inf, -np.inf, np.nan, 3.0, -3.0, 0.5], np.float32).reshape(2, 1, 1, 3)
    generator._decode = lambda vae, params, z: decoded
    images = generator.decode(np.zeros((2, 1, 1, 4), np.float32))
    np.testing.assert_array_equal(images.ravel(), np.array([np.nan, np.nan, np.nan, 1, 0, 0.75], np.float32))
    assert not_finite(images) == [0]
    np.testing.assert_array_equal(to_uint8(images).ravel(), [0, 0, 0, 255, 0, 191])


def test_missing_matplotlib_is_reported_at_once(lcm, prompts, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    argv = [word for word in command(lcm, prompts, tmp_path / "out", "--row=lcm:1") if word != "--no-plot"]
    assert evaluate.main(argv) == 2
    assert capsys.readouterr().err == (
        "error: the plot needs matplotlib: pip install 'lcm_jax[plot]', or leave the plot out with --no-plot\n"
    )
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_the_embedded_teacher_measures_as_its_recorded_rows(tmp_path):
    """One and two guided DDIM steps, as experiments/shapes_teacher recorded them for the demo."""
    out, ((count, each),), scale = tmp_path / "table", embedded.DEMO, embedded.best_guidance_scale()
    argv = ["--model=shapes", "--source=shapes", f"--count={count}", f"--images_per_caption={each}", "--metric=shapes"]
    options = [f"--row=ddim:1,2:{scale:g}", f"--out={out}", "--no-plot", "--batch_size=64", "--timings=1"]
    assert evaluate.main([*argv, *options]) == 0
    recorded = embedded.recorded_rows(embedded.DEMO)
    for row in table.read(out):
        wanted = "DDIM", row.steps, scale
        (old,) = (r for r in recorded if (r["method"], r["steps"], r["guidance_scale"]) == wanted)
        assert row.evaluations == old["evaluations"]
        # Sums of another order may change what is read of an image or two.
        assert abs(row.values["caption_accuracy"] - old["accuracy"]) <= 2 / count
        assert abs(row.values["coverage_distance"] - old["coverage"]) <= 2 / count
        parity.close(row.values["shapes_frechet"], old["frechet"], rtol=1e-2)
        if row.steps == 1:
            parity.close(row.values["endpoint_error"], old["endpoint_error"], rtol=1e-3)
        else:
            assert "endpoint_error" not in row.values
