"""Normalized Attention Guidance: the formula at one layer, images of diffusers with it, flags, and what it refuses."""

import functools
from pathlib import Path
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import parity
import pytest
import tiny
import torch
from diffusers import ControlNetModel, DiffusionPipeline, StableDiffusionControlNetPipeline
from diffusers.schedulers import scheduling_lcm
from test_sample import arrays, compilations, generate
from test_sampling_control import MIDDLE, PROMPTS, picture, save_net

import lcm_jax
from lcm_jax import Control, sample
from lcm_jax.data import shapes
from lcm_jax.errors import BadArgument
from lcm_jax.metrics.networks import shapes as scorer
from lcm_jax.models.attention import dot_product_attention
from lcm_jax.models.unet import Attention
from lcm_jax.sampling.nag import guided_attention
from lcm_jax.sampling.request import make_request, warnings

NEGATIVE, SCALE, SEED, STEPS = "a large blue square", 3.0, 3, 2


def rows(*shape: int) -> np.ndarray:
    return np.random.default_rng(sum(shape)).standard_normal(shape).astype(np.float32)


def formula(z: np.ndarray, negative: np.ndarray, scale: float) -> np.ndarray:
    """The paper's equations as they are printed, float64: features of all heads together, [b s c]."""
    z, negative = np.float64(z), np.float64(negative)
    further = scale * z - (scale - 1) * negative
    ratio = np.abs(further).sum(-1, keepdims=True) / np.abs(z).sum(-1, keepdims=True)
    assert 0.2 < (ratio > 2.5).mean() < 0.8  # both cases of the minimum
    return 0.5 * further * np.minimum(ratio, 2.5) / ratio + 0.5 * z


def test_one_layer_is_the_formula_before_the_last_projection():
    """Texts of different lengths; with scale 1 it is the layer as it was."""
    layer, x, text, negative = Attention(heads=2), rows(3, 6, 8), rows(3, 5, 4), rows(3, 9, 4)
    params = layer.init(jax.random.key(0), x, text)
    identity = {**params["params"], "to_out_0": {"kernel": np.eye(8, dtype=np.float32), "bias": np.zeros(8)}}
    z, z_negative = (layer.apply({"params": identity}, x, one) for one in (text, negative))
    kernel, bias = (np.float64(params["params"]["to_out_0"][name]) for name in ("kernel", "bias"))

    def got(scale: float) -> np.ndarray:
        attend = functools.partial(guided_attention, dot_product_attention, 5, jnp.float32(scale))
        return layer.apply(params, x, jnp.concatenate([text, negative], axis=1), attend)

    want = formula(z, z_negative, 2.4) @ kernel + bias
    parity.close(got(2.4), want, rtol=0, of_max=parity.NETWORK)
    # Products with the keys of both texts may be rounded in another order than those with one's.
    parity.close(got(1.0), layer.apply(params, x, text), rtol=0, of_max=parity.NETWORK)


def test_bfloat16_is_rounded_once_and_zeros_stay_zeros():
    q, k, v = (jnp.asarray(rows(2, length, 2, 8), jnp.bfloat16) for length in (6, 12, 14))
    v = v[:, :12]
    attend = functools.partial(guided_attention, dot_product_attention, 5, jnp.float32(4.0))
    exact, low = attend(*(x.astype(jnp.float32) for x in (q, k, v))), attend(q, k, v)
    assert low.dtype == jnp.bfloat16
    # Z+ and Z- were rounded before: 4 Z+ - 3 Z- has 7 such errors.
    parity.close(low.astype(jnp.float32), exact, rtol=0, of_max=4 * parity.BFLOAT16)
    zeros = attend(q, k, 0 * v)
    np.testing.assert_array_equal(zeros, np.zeros_like(zeros))


class Processor:
    """diffusers' cross-attention with the formula, for a negative text [1 l e]; of two passes the second."""

    def __init__(self, negative: torch.Tensor, two_passes: bool):
        self.negative, self.two_passes = negative, two_passes

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, **_):
        def heads(x):
            return x.unflatten(-1, (attn.heads, -1)).transpose(1, 2)

        def attend(text):
            q, k, v = heads(attn.to_q(hidden_states)), heads(attn.to_k(text)), heads(attn.to_v(text))
            return torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)

        z = attend(encoder_hidden_states)
        further = SCALE * z - (SCALE - 1) * attend(self.negative.expand(len(z), -1, -1))
        ratio = further.norm(p=1, dim=-1, keepdim=True) / z.norm(p=1, dim=-1, keepdim=True)
        guided = 0.5 * further * ratio.clamp(max=2.5) / ratio + 0.5 * z
        if self.two_passes:
            guided[: len(z) // 2] = z[: len(z) // 2]
        return attn.to_out[0](guided)


def theirs(folder: Path, noise: np.ndarray, negative: str | None, guidance_scale: float, **options) -> np.ndarray:
    """Images [b h w 3] in [0, 1] of diffusers' pipeline with LCMScheduler and the processor, from our noise."""
    if "controlnet" in options:
        net = ControlNetModel.from_pretrained(options.pop("controlnet"))
        pipe = tiny.torch_pipeline(StableDiffusionControlNetPipeline, folder, controlnet=net)
    else:
        pipe = tiny.torch_pipeline(DiffusionPipeline, folder)
    one = {"num_images_per_prompt": 1}
    two_passes = guidance_scale > 1 and pipe.unet.config.time_cond_proj_dim is None
    states = pipe.encode_prompt(negative or "", device="cpu", do_classifier_free_guidance=False, **one)
    ours = Processor(states[0], two_passes)
    processors = {n: ours if n.endswith("attn2.processor") else p for n, p in pipe.unet.attn_processors.items()}
    pipe.unet.set_attn_processor(processors)
    if two_passes and negative is not None:
        options["negative_prompt"] = [negative] * len(PROMPTS)
    start, *between = torch.from_numpy(np.ascontiguousarray(noise.transpose(0, 1, 4, 2, 3)))
    draws = iter(between)
    options |= {"latents": start, "num_inference_steps": len(noise), "guidance_scale": guidance_scale}
    with mock.patch.object(scheduling_lcm, "randn_tensor", lambda *_, **__: next(draws)), torch.inference_mode():
        return pipe(PROMPTS, output_type="np", **options).images


def ours(model, **options) -> np.ndarray:
    request = make_request(model.pipeline, steps=STEPS, **options)
    return model.generate(request, PROMPTS, [0, 0], SEED)


@pytest.mark.parametrize(
    ("name", "guidance_scale", "negative"),
    [
        ("micro lcm", 8.0, NEGATIVE),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (
                ("lcm", 8.0, NEGATIVE),
                ("sd1", 1.0, NEGATIVE),
                ("sd1", 1.5, NEGATIVE),
                ("sd2", 1.5, None),
                ("sdxl", 1.5, None),  # the second pass has zeros, attention the empty text
                ("sdxl", 1.0, NEGATIVE),
                ("sdxl", 1.5, NEGATIVE),
            )
        ),
    ],
)
def test_images_of_diffusers_with_the_formula_in_its_attention(name, guidance_scale, negative):
    folder = tiny.folder(name)
    model, options = lcm_jax.load(folder), {"guidance_scale": guidance_scale, "negative_prompt": negative}
    got = ours(model, nag_scale=SCALE, **options)
    want = theirs(folder, model.noise(SEED, [0, 0], STEPS, 16, 16), negative, guidance_scale)
    parity.close(got, want, rtol=0, of_max=parity.NETWORK)
    plain = ours(model, guidance_scale=guidance_scale)
    assert np.abs(got - plain).max() > 0.02
    with compilations() as compiled:  # the scale is an array, and nothing is left of it at 1
        assert np.abs(ours(model, nag_scale=2.0, **options) - got).max() > 0.005
        np.testing.assert_array_equal(ours(model, nag_scale=1.0, guidance_scale=guidance_scale), plain)
    assert compiled == []


def test_nets_see_the_prompt_alone(tmp_path):
    folder, net = tiny.folder("middle lcm"), save_net(MIDDLE, 10, tmp_path / "net")
    model = lcm_jax.load(folder)
    control = [Control(model.control_net(net), picture(1), 0.8)]
    got = ours(model, negative_prompt=NEGATIVE, nag_scale=SCALE, control=control)
    noise = model.noise(SEED, [0, 0], STEPS, 16, 16)
    options = {"controlnet": net, "image": [picture(1)] * 2, "controlnet_conditioning_scale": 0.8}
    parity.close(got, theirs(folder, noise, NEGATIVE, 8.0, **options), rtol=0, of_max=parity.NETWORK)


def test_texts_may_have_different_numbers_of_chunks():
    model = lcm_jax.load(tiny.folder("micro lcm"))
    request = {"prompt_syntax": "a1111", "nag_scale": SCALE}

    def got(negative: str) -> np.ndarray:
        asked = make_request(model.pipeline, steps=1, negative_prompt=negative, **request)
        return model.generate(asked, ["a red circle BREAK hello", "a BREAK hello"], [0, 0], SEED)

    one, twice = got("blue"), got("blue BREAK blue")
    parity.close(one, twice, rtol=0, of_max=parity.NETWORK)  # attention to two copies is attention to one
    assert np.abs(one - got("square")).max() > 0.005


def test_the_program_records_and_repeats_it(tmp_path):
    words = (f"--negative_prompt={NEGATIVE}", "--num_images=1", "--steps=1", "--seed=3")
    found = generate(tiny.folder("micro lcm"), tmp_path / "a", *words, "--nag_scale=3")
    about = found["0000_0000.png"].text
    assert about["nag_scale"] == "3.0" and about["negative_prompt"] == NEGATIVE
    assert sample.main([f"--like={tmp_path / 'a' / '0000_0000.png'}", f"--out={tmp_path / 'b'}"]) == 0
    assert (tmp_path / "a" / "0000_0000.png").read_bytes() == (tmp_path / "b" / "0000_0000.png").read_bytes()
    plain = generate(tiny.folder("micro lcm"), tmp_path / "c", *words[1:])
    assert "nag_scale" not in plain["0000_0000.png"].text
    assert np.abs(arrays(plain) - arrays(found)).max() > 2


def test_bad_scales_and_negative_prompts_without_effect(tmp_path, capsys):
    lcm, plain = (lcm_jax.load(tiny.folder(name)).pipeline for name in ("micro lcm", "sd1"))
    for scale in (0.5, float("nan"), float("inf")):
        with pytest.raises(BadArgument, match=rf"nag_scale={scale:g}: 1 is no guidance in attention; use 1 to 1000"):
            make_request(lcm, nag_scale=scale)
    with pytest.raises(BadArgument, match="negative_prompt=b: this UNet has a w embedding.*add nag_scale=3"):
        make_request(lcm, negative_prompt="b")
    for options, count in (({}, 1), ({"nag_scale": 3.0}, 0), ({"guidance_scale": 2.0}, 0)):
        asked = {"sampler": "ddim", "guidance_scale": 1.0, "negative_prompt": "b"} | options
        found = warnings(plain, make_request(plain, **asked))
        assert len(found) == count and all("use a scale above 1, or nag_scale 3" in one for one in found)
    for scale in ("0", "1e+300", "nan"):
        words = ["--model=/nowhere", f"--out={tmp_path / 'out'}", "--prompt=a", f"--nag_scale={scale}"]
        assert sample.main(words) == 2
        line = f"error: --nag_scale={scale}: 1 is no guidance in attention; use 1 to 1000, such as 3\n"
        assert capsys.readouterr().err == line


@pytest.mark.slow
def test_red_circles_become_rare_in_one_pass_of_the_embedded_teacher():
    """Of 64 circles of open colour 8 are red by its law."""
    model, asked = lcm_jax.load("shapes"), {"steps": 10, "sampler": "ddim", "guidance_scale": 1.0, "batch_size": 32}

    def red(**options) -> int:
        images = model("a circle on a white background", num_images=64, **asked, **options)
        read, _ = scorer.score(np.stack([np.asarray(image) for image in images]))
        return int((read["colour"] == shapes.COLOURS.index("red")).sum())

    before, after = red(), red(negative_prompt="a red circle on a white background", nag_scale=SCALE)
    print(f"red: {before} of 64 images, with nag_scale {SCALE:g} {after}")
    assert before >= 4 and after <= 1
