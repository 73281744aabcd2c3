"""The commands of README and docs, run in the order of their pages, on embedded models in place of the readers' own."""

import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import docs_kit
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from docs_kit import ROOT, Command
from PIL import Image

from experiments import figures
from lcm_jax import assets
from lcm_jax.data import shapes, sources
from lcm_jax.errors import LcmError
from lcm_jax.foreign import read_json
from lcm_jax.models import controlnet, unet

# What makes two steps of the embedded model of any config.
SMALL = {
    "model.teacher": "shapes",
    "model.prediction_type": "v_prediction",
    "data.resolution": "64",
    "data.batch_size": "4",
    "data.filters": "()",
    "train.steps": "2",
    "train.accumulation_steps": "1",
    "checkpoint.every": "2",
    "sample.every": "0",
}
NAMES = {  # what a page calls it -> what is there
    "DIR_OR_HUB_ID": "shapes",
    "BASE": "shapes",
    "TEACHER": "shapes",
    "LCM": "runs/mine/export",
    "SimianLuo/LCM_Dreamshaper_v7": "runs/mine/export",
    "runs/shapes_lcm/export": "runs/mine/export",
    "LCM_LORA": "runs/lora/export",
    "STYLE.safetensors:0.8": "runs/lora/export:0.8",
    "SHARDS/{00000..00999}.tar": "SHARDS/{00000..00001}.tar",
}
PAGES = (
    *(f"docs/{name}.md" for name in ("export", "sampling", "prompts", "workflows", "presets", "evaluation", "data")),
    "README.md",
)
MAKES_ITS_OWN = ("README.md", "docs/data.md")
# Words of commands that cannot run here -> why.
ELSEWHERE = {
    "--config.mesh.fsdp=16": "16 devices",
    "--control=": "a ControlNet of SD 1.5",
    "stable-diffusion-inpainting": "an inpainting model",
    "--refiner=": "SDXL",
    "--preset=dmd2": "a published file",
    "--embedding=": "a published file",
    "--preview=": "TAESD's weights",
    "lcm_jax.app": "serves until it is stopped: make test-app",
    "lcm_jax.aot": "minutes, and a plugin: make test-aot",
    "lcm_jax.run.": "test_clients, test_run_config",
}


def prepare(folder: Path) -> None:
    """Pictures with captions, two tar shards, prompts, a photo and a mask."""
    (folder / "configs").symlink_to(ROOT / "configs")
    source = shapes.open(num_examples=12)
    (folder / "PICTURES").mkdir()
    for number in range(12):
        record = source[number]
        Image.fromarray(record.image).save(folder / "PICTURES" / f"{number:03d}.png")
        (folder / "PICTURES" / f"{number:03d}.txt").write_text(record.captions[0])
    (folder / "SHARDS").mkdir()
    for shard in range(2):
        names = [f"{number:03d}.{kind}" for number in range(6 * shard, 6 * shard + 6) for kind in ("png", "txt")]
        command = [
            "tar",
            "--create",
            f"--file={folder}/SHARDS/{shard:05d}.tar",
            f"--directory={folder}/PICTURES",
            *names,
        ]
        subprocess.run(command, check=True)
    assert len(sources.open_source("webdataset", str(folder / "SHARDS" / "{00000..00001}.tar"))) == 12
    (folder / "prompts.txt").write_text("a red star\na blue circle\n")
    photo = Image.fromarray(source[0].image)
    for name in ("photo.jpg", "photo.png"):
        photo.save(folder / name)
    mask = np.zeros((64, 64), np.uint8)
    mask[16:40, 16:40] = 255
    Image.fromarray(mask).save(folder / "mask.png")


def arguments(command: Command) -> list[str]:
    """With what is there in place of the reader's, and small."""
    found = []
    for word in command.arguments:
        flag, equals, value = word.partition("=")
        found.append(flag + equals + NAMES.get(value, value))
    if "--metric=clip_score:CLIP_FOLDER" in found:  # whose weights are not here: latency alone
        found.remove("--metric=clip_score:CLIP_FOLDER")
    if any(word.startswith("--config=") for word in found):
        small = [f"--config.{key}={value}" for key, value in SMALL.items()]
        found += small[1:] if "pokemon_lcf" in command.text else small  # it has no teacher
        found += ["--config.data.num_examples=16"] if "shapes_lcm" in command.text else []
    if command.module == "lcm_jax.sample" and "--model=shapes" in found and "--sampler=ddim" in found:
        found = ["--num_images=2" if word.startswith("--num_images=") else word for word in found]
    if "--out=images" in found:  # which several commands of a page write to
        found.append("--overwrite")
    if command.module == "lcm_jax.inspect":
        found.append("--seconds=0.2")
    if command.module == "lcm_jax.evaluate":
        found += ["--timings=1", "--batch_size=2"]
    return found


def reason_to_leave_out(command: Command) -> str:
    return next((why for word, why in ELSEWHERE.items() if word in command.text), "")


def run(page: str, folder: Path) -> list[str]:
    """Runs the commands of a page in their order; returns those that failed."""
    prepare(folder)
    failed, environment = [], os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    for command in docs_kit.commands(ROOT / page):
        if not command.module.startswith("lcm_jax.") or not command.arguments or reason_to_leave_out(command):
            continue
        words = [sys.executable, "-m", command.module, *arguments(command)]
        done = subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True, timeout=1800)
        if done.returncode:
            failed.append(f"{command}\n{' '.join(words[2:])}\n{done.stderr[-1000:]}")
    return failed


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """The folder of docs/training.md, whose models other pages use."""
    pytest.importorskip("diffusers")
    folder = tmp_path_factory.mktemp("training")
    assert run("docs/training.md", folder) == []
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES)
def test_commands_of_a_page_run(page, trained, tmp_path):
    if page not in MAKES_ITS_OWN:
        shutil.copytree(trained / "runs", tmp_path / "runs")
    if page == "docs/export.md":
        for name in ("mine", "lora"):
            shutil.rmtree(tmp_path / "runs" / name / "export")
    assert run(page, tmp_path) == []


def test_most_commands_are_run():
    """And what is left out is left out for a reason that is met."""
    found = [c for page in ("docs/training.md", *PAGES) for c in docs_kit.commands(ROOT / page)]
    found = [c for c in found if c.module.startswith("lcm_jax.") and c.arguments]
    assert len([c for c in found if not reason_to_leave_out(c)]) >= 25
    assert [word for word in ELSEWHERE if not any(word in c.text for c in found)] == []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("hub_id", "share"),
    [("stable-diffusion-v1-5/stable-diffusion-v1-5", 0.42), ("stabilityai/stable-diffusion-xl-base-1.0", 0.49)],
)
def test_a_controlnet_costs_what_workflows_says(hub_id, share):
    config = read_json(assets.architecture(hub_id) / "unet" / "config.json")
    known = set(controlnet.ControlNetModel.__dataclass_fields__) - {"time_cond_proj_dim"}
    fields = {key: value for key, value in config.items() if key in known}
    net, whole = controlnet.from_config(fields), unet.from_config(config)
    z, t, text = jnp.zeros((1, 64, 64, 4)), jnp.zeros(1), jnp.zeros((1, 77, whole.cross_attention_dim))
    added = {"text_embeds": jnp.zeros((1, 1280)), "time_ids": jnp.zeros((1, 6))} if "xl" in hub_id else None

    def weights(module, *inputs) -> int:
        tree = jax.eval_shape(module.init, jax.random.key(0), *inputs)
        return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))

    of_net = weights(net, z, t, text, jnp.zeros((1, 512, 512, 3)), added)
    assert round(of_net / weights(whole, z, t, text, None, added), 2) == share
    assert f"{share}" in (ROOT / "docs" / "workflows.md").read_text()


@pytest.mark.slow
def test_the_parts_of_memory_are_those_of_the_compiled_row():
    """Shapes of the state against XLA's arguments, which is what the figure divides."""
    parts = figures.memory_parts(row := figures.read_row("sd15_lora-rtx4090"))
    assert set(parts) == set(figures.PARTS) and min(parts.values()) > 0
    memory = row["report"]["memory"]
    assert abs(sum(parts.values()) - memory["needed"] - memory["outside"]) < 0.01 * memory["needed"]
    row["report"]["memory"]["arguments"] *= 1.1
    with pytest.raises(LcmError, match="compile it again"):
        figures.memory_parts(row)
