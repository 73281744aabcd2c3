"""Programs that nobody here wrote, on files that lcm_jax wrote, and the other way round: `make test-clients`.

stable-diffusion.cpp draws what lcm_jax draws, from a single file and a LoRA of full-width SD 1.5, which it insists on:
random weights, 2.1 GB on disk, 13 GB of memory, 160 CPU-seconds. LyCORIS writes what lcm_jax reads, in seconds.
"""

import copy
import json
import re
import subprocess
import sys
import zlib
from pathlib import Path

import jax
import numpy as np
import parity
import pytest
import safetensors.numpy
import tiny
import torch
from lora_kit import pipeline

from lcm_jax import assets, load
from lcm_jax.errors import LcmError
from lcm_jax.models import lora
from lcm_jax.pretrained import load_pipeline, lora_files, lora_keys, save_single_file
from lcm_jax.sampling.plan import Settings

pytestmark = pytest.mark.clients

SEED, STEPS, SIZE, PROMPT = 42, 4, 64, "a b c"  # the stand-in of CLIP's vocabulary knows single letters
LARGEST, MEAN = 3.0, 0.5  # of 255; rounding to bytes alone gives 0.5 and 0.25


def random_leaf(path, leaf) -> np.ndarray:
    """float16: matrices of variance 1 / fan in (a LoRA's B: 1/4 of that), norms' scales about 1, biases about 0."""
    name = jax.tree_util.keystr(path)
    noise = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(leaf.shape, np.float32)
    if noise.ndim > 1:
        fan_in = noise.shape[-1] if "embedding']['embedding" in name else noise[..., 0].size
        return (noise / np.sqrt(fan_in * (4 if "lora_B" in name else 1))).astype(np.float16)
    return (0.05 * noise + ("scale" in name)).astype(np.float16)


def write_stand_in_tokenizer(folder: Path) -> None:
    """49,408 tokens in CLIP's layout; only those of single letters are right: merges are of other bytes."""
    tiny.write_tokenizer(folder)
    letters = list(tiny.vocabulary()[0])[:512]
    others = [letter for letter in letters if not letter[0].isascii()]
    merges = [(a, b) for a in others if "</w>" not in a for b in others][: 49406 - 512]
    tokens = [*letters, *map("".join, merges), tiny.START, tiny.END]
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *map(" ".join, merges), ""]))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """With model.safetensors, lora.safetensors and tokenizer/."""
    folder = tmp_path_factory.mktemp("sd15")
    sd15, shapes = load_pipeline(assets.architecture("stable-diffusion-v1-5/stable-diffusion-v1-5"), weights=False)
    params = jax.tree_util.tree_map_with_path(random_leaf, shapes)
    save_single_file(sd15, params, folder / "model.safetensors")
    adapters = jax.eval_shape(lambda p: lora.init(jax.random.key(0), p, 4), shapes["unet"])
    adapters = jax.tree_util.tree_map_with_path(random_leaf, adapters)
    lora_files.write_lora(folder / "lora.safetensors", adapters, sd15.unet, alpha=4, rank=4)
    write_stand_in_tokenizer(folder / "tokenizer")
    return folder


def ours(folder: Path, loras: tuple[str, ...]) -> np.ndarray:
    """The image [h w 3] in 0 .. 255 from torch's noise, as stable-diffusion.cpp scales it at the start."""
    model = load(folder / "model.safetensors", loras=loras, model_config=str(folder))
    generator, side = torch.Generator().manual_seed(SEED), SIZE // model.pipeline.vae.factor
    noise = np.stack([torch.randn((1, 4, side, side), generator=generator).numpy() for _ in range(STEPS)])
    noise[0] *= model.pipeline.schedule.sigmas[-1]
    z = model.latents(model.encode([PROMPT]), noise.transpose(0, 1, 3, 4, 2), 1.0, Settings(steps=STEPS))
    return np.asarray(model.decode(z))[0] * 255.0


def theirs(folder: Path, name: str, lora_file: Path | None) -> tuple[np.ndarray, str]:
    """The image [h w 3] of stable-diffusion.cpp in 0 .. 255, and its log. A second one in one process crashes it."""
    out = folder / f"{name}.npy"
    request = {"model": str(folder / "model.safetensors"), "lora": lora_file and str(lora_file), "out": str(out)}
    request |= {"prompt": PROMPT, "seed": SEED, "steps": STEPS, "size": SIZE}
    tiny.write_json(folder / f"{name}.json", request)
    program = [sys.executable, Path(__file__).with_name("clients_process.py"), folder / f"{name}.json"]
    done = subprocess.run(program, capture_output=True, text=True, timeout=1800)
    log = done.stdout + done.stderr
    assert done.returncode == 0, log[-2000:]
    return np.load(out).astype(np.float64), log


def test_stable_diffusion_cpp_makes_our_images_and_applies_our_lora(folder):
    lora_file = folder / "lora.safetensors"
    alone, _ = theirs(folder, "alone", None)
    with_lora, log = theirs(folder, "lora", lora_file)
    applied, present = map(int, re.search(r"\((\d+) / (\d+)\) LoRA tensors have been applied", log).groups())
    change = np.abs(with_lora - alone).mean()
    print(f"{applied} of {present} tensors of the LoRA applied, which change the image by {change:.1f}/255 on average")
    assert applied == present == 834 and change > 8
    for name, picture, loras in (("alone", alone, ()), ("with LoRA", with_lora, (str(lora_file),))):
        expected = ours(folder, loras)
        difference = np.abs(picture - expected)
        print(f"{name}: largest {difference.max():.2f}/255, mean {difference.mean():.3f}, std {expected.std():.1f}")
        assert difference.max() <= LARGEST and difference.mean() <= MEAN


# LyCORIS's own preset "full" fails on diffusers' UNet (one name twice).
PRESET = """
unet_target_module = ["Transformer2DModel", "ResnetBlock2D", "Downsample2D", "Upsample2D"]
text_encoder_target_module = ["CLIPAttention", "CLIPMLP"]
"""
ADDED = (".diff", ".diff_b", ".w_norm", ".b_norm")
# What LyCORIS is asked for, beside rank 4 and alpha 2 -> what `read_lora` says of its file; None: it reads every key.
LYCORIS = {
    "LoCon": ({"conv_dim": 2, "conv_alpha": 1}, None),
    "LoCon with a scalar": ({"use_scalar": True}, None),
    "rank-stabilized": ({"rs_lora": True}, None),
    "norms": ({"train_norm": True}, None),
    "Tucker": ({"use_tucker": True, "conv_dim": 2, "conv_alpha": 1}, None),
    "DoRA": ({"dora_wd": True}, "DoRA"),
    "LoHa": ({"algo": "loha"}, "LoHa"),
    "LoKr": ({"algo": "lokr"}, "LoKr"),
    "whole matrices": ({"algo": "full"}, None),
    "OFT": ({"algo": "diag-oft"}, "OFT"),
}


@pytest.mark.parametrize("name", LYCORIS)
def test_files_of_lycoris(name, tmp_path):
    from lycoris.kohya import create_network

    options, refusal = LYCORIS[name]
    (tmp_path / "preset.toml").write_text(PRESET)
    options = options | {"preset": str(tmp_path / "preset.toml"), "warn_on_unmatched": False}
    torch_unet, text_encoder = (copy.deepcopy(one) for one in (tiny.torch_unet("sd1"), tiny.torch_text_encoder("clip")))
    network = create_network(1.0, 4, 2, None, text_encoder, torch_unet, **options)
    network.apply_to(text_encoder, torch_unet, True, True)
    tiny.randomise(network, 7)
    path = tmp_path / "lycoris.safetensors"
    network.save_weights(str(path), torch.float32, {})
    modules = lora_files.modules_of(pipeline("sd1"))
    if refusal:
        with pytest.raises(LcmError, match=refusal):
            lora_files.read_lora(path, modules)
        return
    found = lora_files.read_lora(path, modules)
    added = {key: value for key, value in safetensors.numpy.load_file(path).items() if key.endswith(ADDED)}
    for key, value in added.items():
        name, _, role = key.rpartition(".")
        (layer,) = lora_keys.layers_of(name, modules)
        path_of_it = (layer.bias if role.startswith("b_") or role.endswith("_b") else layer.weight).path
        assert np.array_equal(np.sort(found.deltas[layer.part][path_of_it].ravel()), np.sort(value.ravel()))
    assert sum(map(len, found.deltas.values())) == len(added)
    read = found.parts
    if not read:
        return
    wanted = {"unet": network.unet_loras, "text_encoder": network.text_encoder_loras}
    wanted = {part: [one for one in ones if hasattr(one, "lora_down")] for part, ones in wanted.items()}
    assert {part: len(layers) for part, layers in read.items()} == {
        part: len(layers) for part, layers in wanted.items()
    }
    for part, prefix in (("unet", "lora_unet_"), ("text_encoder", "lora_te_")):
        by_name = {one.lora_name: one.get_diff_weight()[0].detach().numpy() for one in wanted[part]}
        for key, kernel in lora_keys.layers(modules[part]).items():
            if (factors := read[part].get(kernel.path[:-1])) is not None:
                delta = by_name[prefix + key.removeprefix("text_model.").replace(".", "_")]
                a, b = factors.lora_A, factors.lora_B.reshape(factors.lora_B.shape[-2:])
                delta = delta.transpose(*range(2, delta.ndim), 1, 0)  # as Flax has it
                parity.close(factors.scale * np.tensordot(a, b, 1), delta, rtol=0, of_max=8 * parity.EPS)
