"""ControlNets in sampling: images of diffusers' pipelines, gains and windows, flags, and what is refused."""

import re
from pathlib import Path
from unittest import mock

import cv2
import jax
import numpy as np
import parity
import pytest
import tiny
import torch
from diffusers import (
    ControlNetModel,
    StableDiffusionControlNetPipeline,
    StableDiffusionXLControlNetPipeline,
)
from diffusers.schedulers import scheduling_lcm
from PIL import Image
from test_models_controlnet import of_unet
from test_sample import compilations

import lcm_jax
from lcm_jax import Control, sample
from lcm_jax.errors import BadArgument, LcmError
from lcm_jax.sampling import control as control_lib
from lcm_jax.sampling.control import Net, conditions
from lcm_jax.sampling.generator import Generator
from lcm_jax.sampling.png import to_uint8
from lcm_jax.sampling.request import make_request, warnings

PROMPTS = ["a red circle", "a blue square"]
MIDDLE = tiny.UNETS["middle lcm"]


def save_net(unet: dict, seed: int, target: Path, **changes) -> Path:
    """A random net of factor 2 for a UNet of this config."""
    config = of_unet(unet, conditioning_embedding_out_channels=(8, 16), **changes)
    tiny.randomise(ControlNetModel(**config), seed).save_pretrained(target)
    return target


def picture(seed: int, height: int = 16, width: int = 16) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8))


@pytest.fixture(scope="module")
def micro(tmp_path_factory) -> Path:
    """A one-level LCM, conditioned on w, in `model`; nets for it in `a` and `b`; an image."""
    root = tmp_path_factory.mktemp("control")
    tiny.copy("middle lcm", root / "model")
    for seed, name in enumerate("ab"):
        save_net(MIDDLE, 10 + seed, root / name)
    picture(1).save(root / "image.png")
    return root


@pytest.fixture(scope="module")
def model(micro):
    return lcm_jax.load(micro / "model")


@pytest.fixture(scope="module")
def nets(micro, model) -> dict[str, Net]:
    return {name: model.control_net(micro / name) for name in "ab"}


def theirs(folder: Path, nets: list[Path], noise: np.ndarray, **options) -> np.ndarray:
    """Images [b h w 3] in [0, 1] of diffusers' pipeline with LCMScheduler, from our noise [steps b h w c]."""
    kinds = StableDiffusionControlNetPipeline, StableDiffusionXLControlNetPipeline
    kind = kinds[(folder / "text_encoder_2").exists()]
    found = [ControlNetModel.from_pretrained(net) for net in nets]
    pipe = tiny.torch_pipeline(kind, folder, controlnet=found if len(found) > 1 else found[0])
    start, *between = torch.from_numpy(np.ascontiguousarray(noise.transpose(0, 1, 4, 2, 3)))
    draws = iter(between)
    with mock.patch.object(scheduling_lcm, "randn_tensor", lambda *_, **__: next(draws)), torch.inference_mode():
        return pipe(PROMPTS, latents=start, num_inference_steps=len(noise), output_type="np", **options).images


def ours(model, **options) -> np.ndarray:
    return model.generate(make_request(model.pipeline, **options), PROMPTS, [0, 0], 3)


# Of two nets: scales, windows, guess mode. A UNet with w embedding takes one pass, and its nets never learn w.
CASES = [
    ((0.25, 0.75), ((0, 1), (0, 1)), False),
    ((1.0, 0.5), ((0, 0.5), (0.5, 1)), False),  # on in steps 1100 and 0011
    ((1.0, 0.5), ((0, 0.8), (0.3, 1)), True),  # 1110 and 0011
]


def test_images_of_diffusers_with_two_nets_by_one_program(micro, model, nets):
    pictures, noise = [picture(1), picture(2)], model.noise(3, [0, 0], 4, 16, 16)
    for n, (scales, windows, guess) in enumerate(CASES):
        want = theirs(
            micro / "model",
            [micro / "a", micro / "b"],
            noise,
            image=pictures,
            guidance_scale=8.0,
            controlnet_conditioning_scale=list(scales),
            control_guidance_start=[start for start, _ in windows],
            control_guidance_end=[end for _, end in windows],
            guess_mode=guess,
        )
        control = [
            Control(nets[name], image, scale, *window)
            for name, image, scale, window in zip("ab", pictures, scales, windows, strict=True)
        ]
        with compilations() as compiled:
            got = ours(model, control=control, control_guess=guess)
        assert not compiled or n == 0  # scales, windows and gains are arrays
        parity.close(got, want, rtol=0, of_max=parity.NETWORK)
        assert np.abs(got - ours(model)).max() > 0.05


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "scale", "guess", "changes"),
    [
        ("sd1", 1.5, False, {}),
        ("sd1", 1.5, True, {}),
        ("sd1", 1.0, True, {}),
        ("sd1", 1.5, False, {"global_pool_conditions": True}),
        ("sd1", 1.5, False, {"controlnet_conditioning_channel_order": "bgr"}),
        ("sd2", 1.0, False, {}),
        ("sdxl", 1.5, False, {}),
        ("sdxl", 1.5, True, {}),
    ],
)
def test_images_of_diffusers_in_one_pass_and_in_two(name, scale, guess, changes, tmp_path):
    net, model = save_net(tiny.UNETS[name], 10, tmp_path / "net", **changes), lcm_jax.load(tiny.folder(name))
    control = [Control(model.control_net(net), picture(1), 0.8, 0, 0.8)]
    want = theirs(
        tiny.folder(name),
        [net],
        model.noise(3, [0, 0], 4, 16, 16),
        image=[picture(1)] * 2,
        guidance_scale=scale,
        controlnet_conditioning_scale=0.8,
        control_guidance_end=0.8,
        guess_mode=guess,
    )
    got = ours(model, control=control, control_guess=guess, guidance_scale=scale)
    parity.close(got, want, rtol=0, of_max=parity.NETWORK)
    assert np.abs(got - ours(model, guidance_scale=scale)).max() > 0.02


def test_a_net_of_zeros_changes_nothing_and_one_net_in_two_parts_is_the_net(model, nets):
    zero, net = nets["a"], nets["b"]
    last = {key: tree for key, tree in zero.params.items() if key.startswith(("controlnet_down", "controlnet_mid"))}
    zero = Net("zero", zero.module, zero.params | jax.tree.map(np.zeros_like, last))
    plain = ours(model)
    steered = ours(model, control=[Control(zero, picture(1)), Control(net, picture(2), 0.0)])
    np.testing.assert_array_equal(to_uint8(steered), to_uint8(plain))
    parts = [Control(net, picture(2), scale) for scale in (0.25, 0.75)]
    whole = [Control(net, picture(2)), Control(net, picture(2), 0.0)]
    parity.close(ours(model, control=parts), ours(model, control=whole), rtol=0, of_max=parity.NETWORK)
    with compilations() as compiled:
        np.testing.assert_array_equal(ours(model), plain)  # without control nothing has changed
    assert compiled == []


def test_windows_follow_the_steps_of_image_to_image(model, nets):
    def image(*windows: tuple[float, float], strength: float = 0.5) -> np.ndarray:
        control = [Control(nets["a"], picture(2), 1.0, *window) for window in windows]
        found = ours(model, image=picture(3), strength=strength, steps=2, control=control)
        return to_uint8(found).astype(int)

    whole, first, second = image((0, 1)), image((0, 0.5)), image((0.5, 1))
    with compilations() as compiled:
        other = image((0, 1), strength=0.7)
    assert compiled == []
    different = [whole, first, second, other, image()]
    for n, one in enumerate(different):
        assert all(np.abs(one - another).max() > 2 for another in different[:n])


def test_gains_by_step_and_skip():
    net = mock.Mock()
    net.module.skip_widths, net.module.global_pool_conditions = (8,) * 4, False

    def gains(steps: int, guess: bool = False, **fields) -> np.ndarray:
        image = np.zeros((16, 16, 3), np.uint8)
        return conditions([Control(net, image, **fields)], steps, guess, True).gains[0]

    for window, on in {
        (0, 1): [1, 1, 1, 1],
        (0, 0.5): [1, 1, 0, 0],
        (0.5, 1): [0, 0, 1, 1],
        (0.3, 1): [0, 0, 1, 1],
        (0, 0.8): [1, 1, 1, 0],
        (0, 0.2): [0, 0, 0, 0],
    }.items():
        got = gains(4, scale=0.5, start=window[0], end=window[1])
        np.testing.assert_array_equal(got, 0.5 * np.repeat(np.array(on)[:, None], 5, axis=1))
    assert not gains(1, end=0.99).any()
    parity.close(gains(1, True, scale=2.0)[0], [0.2, 0.35566, 0.63246, 1.12468, 2.0], atol=5e-6)
    net.module.global_pool_conditions = True
    np.testing.assert_array_equal(gains(1, True), np.ones((1, 5)))
    pooled = [Control(net, np.zeros((16, 16, 3), np.uint8))]
    assert [conditions(pooled, 1, False, guided).first_alone for guided in (True, False)] == [(True,), (False,)]


def test_an_empty_window_is_a_warning(model, nets):
    def found(steps: int) -> list[str]:
        request = make_request(model.pipeline, steps=steps, control=[Control(nets["a"], picture(1), end=0.5)])
        return warnings(model.pipeline, request)

    assert found(4) == [] and len(found(1)) == 1
    assert re.search("a has no effect: none of 1 steps lies within 0-0.5; use more steps", found(1)[0])


def test_images_have_the_size_of_the_first_image_in_whole_latents(model, nets):
    request = make_request(model.pipeline, control=[Control(nets["a"], picture(1, 21, 25))])
    assert (request.height, request.width) == (20, 24) and request.control[0].image.shape == (20, 24, 3)
    request = make_request(model.pipeline, control=[Control(nets["a"], picture(1, 42, 50))], height=20, width=24)
    assert request.control[0].image.shape == (20, 24, 3)


def test_canny_finds_edges_at_the_size_of_the_images(model, nets):
    square = np.zeros((64, 64, 3), np.uint8)
    square[16:48, 16:48] = (255, 0, 0)
    request = make_request(model.pipeline, control=[Control(nets["a"], square, canny=(100, 200))], height=32, width=32)
    edges = request.control[0].image
    assert edges.shape == (32, 32, 3) and set(np.unique(edges)) == {0, 255} and (edges == edges[:, :, :1]).all()
    small = np.asarray(Image.fromarray(square).resize((32, 32), Image.Resampling.LANCZOS))
    np.testing.assert_array_equal(edges[:, :, 0], cv2.Canny(small, 100, 200))
    assert not edges[12:20, 12:20].any()  # inside
    with mock.patch.dict("sys.modules", cv2=None), pytest.raises(LcmError, match=r"canny needs OpenCV: pip install"):
        make_request(model.pipeline, control=[Control(nets["a"], square, canny=(100, 200))])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"scale": float("nan")}, "control=nan: a scale is finite"),
        ({"start": 0.5, "end": 0.5}, "control=0.5-0.5: a window is two parts of the steps, 0 <= START < END <= 1"),
        ({"end": 1.5}, "control=0-1.5: a window"),
        ({"canny": (200, 100)}, "canny=200,100: thresholds are 0 <= LOW <= HIGH"),
        ({"image": "/nowhere.png"}, "control=/nowhere.png: cannot be read"),
        ({"image": picture(1, 8, 16)}, "has 16 x 8 pixels; each side needs at least 16"),
        ({"image": picture(1, 16, 32)}, "a: its image has 32 x 16 pixels, another aspect than 16 x 16; crop the image"),
        ({"image": np.full((16, 16, 3), np.nan)}, "has values that are not finite"),
        ({"net": "owner/name"}, "control=owner/name: is no net; give what model.control_net returns"),
    ],
)
def test_bad_control_is_one_line_before_anything_is_compiled(model, nets, fields, message):
    with compilations() as compiled, pytest.raises(BadArgument, match=message) as caught:
        model("a", control=[Control(**{"net": nets["a"], "image": picture(1)} | fields)], height=16, width=16)
    assert compiled == [] and "\n" not in str(caught.value)


def test_a_net_loaded_for_another_model_is_refused(nets):
    other = lcm_jax.load(tiny.folder("sd1"))
    with pytest.raises(LcmError, match="/a is for skips of widths 16, 16, the model's UNet has skips of widths 32, 32"):
        other("a", control=Control(nets["a"], picture(1)))  # one needs no list


def test_the_flag_is_read_from_its_end(tmp_path):
    image = tmp_path / "a:b.png"
    picture(1).save(image)
    for text, want in {
        f"net:{image}": ("net", str(image), 1.0, 0.0, 1.0),
        f"owner/net:{image}:0.8": ("owner/net", str(image), 0.8, 0.0, 1.0),
        f"https://hf.co/o/n/f.safetensors:{image}:-.5:0.25-1": (
            "https://hf.co/o/n/f.safetensors",
            str(image),
            -0.5,
            0.25,
            1.0,
        ),
    }.items():
        assert control_lib.parse(text) == want
    for text in (
        "net",
        str(image),
        f"net:{image}:half",
        f"net:{image}:1:2",
        f"net:{image}:nan",
        "net:/nowhere.png:0.8",
    ):
        with pytest.raises(BadArgument, match=r"give NET:IMAGE\[:SCALE\[:START-END\]\], such as"):
            control_lib.parse(text)
    assert control_lib.parse_canny("100,200") == (100.0, 200.0)
    with pytest.raises(BadArgument, match="canny=100: give two thresholds, such as 100,200"):
        control_lib.parse_canny("100")


def test_the_program_asks_for_what_its_flags_say(micro, nets, tmp_path, monkeypatch):
    asked = []

    def generate(self, request, prompts, numbers, seed):
        asked.append(request)
        return np.zeros((len(prompts), 16, 16, 3), np.float32)

    monkeypatch.setattr(Generator, "generate", generate)
    flag = f"{micro / 'a'}:{micro / 'image.png'}:0.8:0-0.5"
    words = [f"--model={micro / 'model'}", f"--out={tmp_path}", "--prompt=a", "--num_images=1", "--control_guess"]
    assert sample.main([*words, f"--control={flag}", f"--control={micro / 'b'}:{micro / 'image.png'}"]) == 0
    assert asked[0].control_guess and (asked[0].height, asked[0].width) == (16, 16)
    for control, name, numbers in zip(asked[0].control, "ab", ((0.8, 0.0, 0.5), (1.0, 0.0, 1.0)), strict=True):
        assert (control.scale, control.start, control.end, control.canny) == (*numbers, None)
        np.testing.assert_array_equal(control.image, np.asarray(picture(1)))
        jax.tree.map(np.testing.assert_array_equal, control.net.params, nets[name].params)
    about = Image.open(tmp_path / "0000_0000.png").text
    assert about["control"].startswith(f"{flag}, ") and about["control_guess"] == "True" and "canny" not in about


def test_an_image_of_a_control_is_not_replaced(micro, tmp_path, capsys, load_once):
    own = tmp_path / "0000_0000.png"
    own.write_bytes((micro / "image.png").read_bytes())
    words = [f"--model={micro / 'model'}", f"--out={tmp_path}", "--prompt=a", "--overwrite"]
    assert sample.main([*words, f"--control={micro / 'a'}:{own}"]) == 2
    assert "has 0000_0000.png, which images are made from; choose another folder" in capsys.readouterr().err
    assert own.read_bytes() == (micro / "image.png").read_bytes()


@pytest.mark.slow
def test_the_program_generates_the_images_of_the_library(micro, model, nets, tmp_path):
    """On a mesh, with weights placed by its rule."""
    flags = [f"--control={micro / name}:{micro / 'image.png'}:0.8:0-0.8" for name in "ab"]
    words = [f"--model={micro / 'model'}", f"--out={tmp_path}", "--prompt=a", "--num_images=2"]
    assert sample.main([*words, *flags]) == 0
    control = [Control(nets[name], micro / "image.png", 0.8, end=0.8) for name in "ab"]
    for n, want in enumerate(model("a", num_images=2, control=control)):
        got = np.asarray(Image.open(tmp_path / f"0000_000{n}.png"), int)
        assert np.abs(got - np.asarray(want, int)).max() <= 1  # a value that is rounded


def test_bad_flags_are_one_line(micro, tmp_path, capsys, load_once):
    image = micro / "image.png"
    for flags, message in (
        (["--canny=100,200"], r"--canny=100,200: is for ControlNets; give --control=NET:IMAGE"),
        (["--control_guess"], r"--control_guess=True: is for ControlNets"),
        (
            [f"--control={micro / 'a'}:/nowhere.png"],
            r"--control=\S+/a:/nowhere.png: has no image /nowhere.png; give NET",
        ),
        ([f"--control={micro / 'a'}:{micro / 'a' / 'config.json'}"], r"--control=\S+config.json: not an image"),
        ([f"--control={micro / 'a'}:{image}:1:1-0"], r"--control=1-0: a window is two parts of the steps"),
        ([f"--control={micro / 'a'}:{image}", "--canny=200,100"], r"--canny=200,100: thresholds are"),
        (
            [f"--control={micro / 'a'}:{image}", "--height=32"],
            r"--control=\S+/a: its image has 16 x 16 pixels, another",
        ),
        ([f"--control={micro / 'model'}:{image}"], r"error: \S+/model/controlnet has no diffusion_pytorch_model"),
        ([f"--control={micro / 'no'}:{image}"], r"error: \S+/no does not exist; give a folder in diffusers format"),
    ):
        assert sample.main([f"--model={micro / 'model'}", f"--out={tmp_path / 'bad'}", "--prompt=a", *flags]) == 2
        error = capsys.readouterr().err
        assert re.search(message, error) and error.count("\n") == 1, error
        assert not (tmp_path / "bad").exists()
