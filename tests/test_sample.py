"""`python -m lcm_jax.sample`: files, what an image depends on, errors, and the baselines against torch diffusers."""

import contextlib
import dataclasses
import gc
import re
import resource
import shutil
import weakref
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, StableDiffusionPipeline
from PIL import Image
from safetensors.numpy import load_file, save_file

import lcm_jax
from lcm_jax import pretrained, sample
from lcm_jax.errors import BadArgument, LcmError
from lcm_jax.runtime import kernels
from lcm_jax.sampling.generator import Generator, draw_noise
from lcm_jax.sampling.plan import make_plan
from lcm_jax.sampling.png import grid
from lcm_jax.sampling.request import make_request, warnings

RECORD = {"w_min": 2.0, "w_max": 8.0, "solver_steps": 20, "timestep_scaling": 10.0, "sigma_data": 0.5}
PROMPT = "a small red circle"
ONE = ("--num_images=1", "--batch_size=2", "--seed=5", "--steps=3")  # the first of `three`


@pytest.fixture(scope="module")
def lcm(tmp_path_factory) -> Path:
    """An LCM's folder with the record of its distillation."""
    folder = tiny.copy("micro lcm", tmp_path_factory.mktemp("sample") / "lcm")
    tiny.write_json(folder / pretrained.RECORD, RECORD)
    return folder


def generate(model, out, *options, prompt=PROMPT) -> dict[str, Image.Image]:
    """Runs the program; its images by name."""
    prompts = [f"--prompt={prompt}"] if prompt else []
    assert sample.main([f"--model={model}", f"--out={out}", *prompts, *options]) == 0
    return {path.name: Image.open(path) for path in sorted(Path(out).glob("*.png"))}


def arrays(images) -> np.ndarray:
    return np.stack([np.asarray(image).astype(int) for image in images.values()])


@pytest.fixture(scope="module")
def three(lcm, tmp_path_factory) -> dict[str, Image.Image]:
    return generate(lcm, tmp_path_factory.mktemp("out"), "--num_images=3", "--batch_size=2", "--seed=5", "--steps=3")


def test_images_record_prompt_seed_and_settings(three, lcm):
    assert list(three) == ["0000_0000.png", "0000_0001.png", "0000_0002.png"]
    for i, image in enumerate(three.values()):
        assert (image.mode, image.size) == ("RGB", (16, 16))
        assert image.text == {
            "prompt": PROMPT,
            "image": str(i),
            "model": str(lcm),
            "sampler": "lcm",
            "steps": "3",
            "guidance_scale": "8.0",
            "seed": "5",
            "size": "16x16",
            "dtype": "float32",
        }


def test_an_image_depends_on_its_number_alone(three, lcm, tmp_path):
    seen = arrays(three)
    assert len(np.unique(seen.reshape(3, -1), axis=0)) == 3
    # Batches of one are another program, whose sums may round differently.
    assert np.abs(arrays(generate(lcm, tmp_path / "one", *ONE))[0] - seen[0]).max() <= 1
    alone = generate(lcm, tmp_path / "alone", "--num_images=3", "--batch_size=1", *ONE[2:])
    assert np.abs(arrays(alone) - seen).max() <= 1
    other = generate(lcm, tmp_path / "other", *ONE, "--seed=6")
    assert np.abs(arrays(other)[0] - seen[0]).max() > 8


def test_draw_noise_begins_the_same_for_every_number_of_steps():
    few, many = (draw_noise(3, [4, 9], steps, (2, 3, 4)) for steps in (1, 4))
    np.testing.assert_array_equal(few, many[:1])
    np.testing.assert_array_equal(draw_noise(3, [9], 4, (2, 3, 4))[:, 0], many[:, 1])
    assert abs(draw_noise(0, range(8), 4, (16, 16, 4)).std() - 1) < 0.02


def test_prompts_from_a_file_come_after_those_of_the_command_line(three, lcm, tmp_path):
    (tmp_path / "prompts.txt").write_text(f"\n  a blue square \n\n{PROMPT}\n", encoding="utf-8")
    options = (f"--prompts={tmp_path / 'prompts.txt'}", *ONE)
    images = generate(lcm, tmp_path / "out", *options, prompt="große Kreise 圆")
    assert [image.text["prompt"] for image in images.values()] == ["große Kreise 圆", "a blue square", PROMPT]
    assert list(images) == ["0000_0000.png", "0001_0000.png", "0002_0000.png"]
    np.testing.assert_array_equal(arrays(images)[2], arrays(three)[0])
    assert np.abs(arrays(images)[1] - arrays(three)[0]).max() > 1


def test_unet_and_vae_are_exchanged(three, lcm, tmp_path):
    """A plain SD with an LCM's UNet folder, record beside it, generates the images of that LCM."""
    unet = shutil.copytree(lcm / "unet", tmp_path / "unet")
    shutil.copy(lcm / pretrained.RECORD, unet)
    images = generate(tiny.folder("sd1"), tmp_path / "out", f"--unet={unet}", *ONE)
    assert np.abs(arrays(images)[0] - arrays(three)[0]).max() <= 1  # a batch of one, as above
    assert images["0000_0000.png"].text["unet"] == str(unet)

    vae = tmp_path / "vae"
    other = tiny.randomise(type(tiny.torch_vae())(**tiny.VAE), 99)
    other.save_pretrained(vae)
    images = generate(lcm, tmp_path / "other", f"--vae={vae}", *ONE)
    model = lcm_jax.load(lcm, vae=str(vae))
    assert model.pipeline.record == RECORD
    want = other.decoder.conv_out.bias.numpy()
    np.testing.assert_array_equal(model.params["vae"]["decoder"]["conv_out"]["bias"], want)
    assert np.abs(arrays(images)[0] - arrays(three)[0]).max() > 8


def test_guidance_outside_the_record_is_one_warning_and_the_image_is_made(lcm, tmp_path, capsys):
    pipeline = lcm_jax.load(lcm).pipeline
    unrecorded = dataclasses.replace(pipeline, record={})
    for scale, count in ((3, 0), (9, 0), (2.9, 1), (9.5, 1)):
        assert len(warnings(pipeline, make_request(pipeline, guidance_scale=scale))) == count
        assert warnings(unrecorded, make_request(unrecorded, guidance_scale=scale)) == []
    assert len(generate(lcm, tmp_path, "--guidance_scale=20", *ONE)) == 1
    assert capsys.readouterr().err == (
        "warning: guidance scale 20 is outside 3 to 9, the range this model was distilled on\n"
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--steps=0"], r"--steps=0: out of range; choose 1 to 50"),
        (["--steps=51"], r"--steps=51: out of range; choose 1 to 50"),
        (["--steps=21"], r"--steps=21: out of range; choose 1 to 20"),  # the record's solver steps
        (["--steps=two"], r"argument --steps: invalid int value: 'two'"),
        (["--stepz=4"], r"unrecognized arguments: --stepz=4"),
        (["--sampler=heun"], r"argument --sampler: invalid choice: 'heun'"),
        (["--height=17"], r"--height=17: not a multiple of the VAE's factor 2"),
        (["--width=0"], r"--width=0: not a multiple of the VAE's factor 2"),
        (["--guidance_scale=0.5"], r"--guidance_scale=0.5: .*use 1 or more"),
        (["--guidance_scale=nan"], r"--guidance_scale=nan: .*use 1 or more"),
        (["--seed=-1"], r"--seed=-1: out of range"),
        (["--num_images=0"], r"--num_images=0: must be at least 1"),
        ([], r"no prompt; give --prompt"),
        (["--prompts=NOWHERE"], r"--prompts=NOWHERE: cannot be read \(No such file or directory\)"),
        (["--model=/no/such/folder"], r"/no/such/folder does not exist; give a folder"),
        (["--negative_prompt=b"], r"--negative_prompt=b: this UNet has a w embedding.*LCM-LoRA"),
        (["--model_config=SD1"], r"--model_config=\S+ is for a single .safetensors file, which "),
        (["--lora=/no/such.safetensors"], r"--lora=\S+: /no/such.safetensors does not exist; give a"),
        (["--lora=TEXT:inf"], r"weight inf is not finite"),
        (["--lora=TEXT"], r"prompts.txt is not a .safetensors file"),
        (["--vae=TEXT"], r"prompts.txt is a file; a folder in diffusers format is needed"),
        (["--out=TEXT"], r"--out=.*prompts.txt: is a file; give a folder"),
        (["--model=BROKEN"], r"diffusion_pytorch_model.safetensors .*cannot be read"),
        (["--model=NO_RECORD"], r"lcm_config.json is not valid JSON"),
        (["--model=EDM"], r"unsupported _class_name='EDMEulerScheduler'"),
        (["--unet=EDM"], r"unsupported _class_name='EDMEulerScheduler'"),
        (["--prompts=LATIN1"], r"--prompts=.*: cannot be read \(not UTF-8\)"),
        (["--prompt_syntax=compel"], r"argument --prompt_syntax: invalid choice: 'compel'"),
        (["--prompt_syntax=a1111", "--prompt=(b"], r"--prompt=\(b: the bracket \( \(character 1\) has no partner"),
        (["--emphasis=no_norm"], r"--emphasis=no_norm: is what weights do, which plain prompts do not have"),
        (["--clip_skip=3"], r"--clip_skip=3: out of range; choose 1, the last layer, to 2"),
        (["--embedding=/no/such.safetensors"], r"--embedding=\S+: /no/such.safetensors does not exist"),
        (["--lora_dir=/no"], r"--lora_dir=/no: is for <lora:NAME:WEIGHT> in a1111 prompts"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(lcm, tmp_path, capsys, load_once, options, message):
    paths = {name: tmp_path / name.lower() for name in ("LATIN1", "BROKEN", "NO_RECORD", "EDM")}
    paths |= {"SD1": tiny.folder("sd1"), "TEXT": tmp_path / "prompts.txt"}
    paths["TEXT"].write_text("a\n")
    paths["LATIN1"].write_bytes("größe".encode("latin1"))
    if "BROKEN" in str(options):
        weights = tiny.copy("micro lcm", paths["BROKEN"]) / "unet" / "diffusion_pytorch_model.safetensors"
        weights.write_bytes(weights.read_bytes()[:5000])
    if "NO_RECORD" in str(options):
        (tiny.copy("micro lcm", paths["NO_RECORD"]) / pretrained.RECORD).write_text("{")
    if "EDM" in str(options):
        scheduler = tiny.copy("sd1", paths["EDM"]) / "scheduler" / "scheduler_config.json"
        tiny.write_json(scheduler, {"_class_name": "EDMEulerScheduler"})
    for name, path in paths.items():
        options = [option.replace(f"={name}", f"={path}") for option in options]
    if options and not options[0].startswith("--prompts"):
        options = ["--prompt=a", *options]
    out = tmp_path / "out"
    try:
        code = sample.main([f"--model={lcm}", f"--out={out}", *options])
    except SystemExit as exit:
        code = exit.code
    error = capsys.readouterr().err
    assert code == 2 and error.startswith("error: ") and error.count("\n") == 1
    assert re.search(message, error), error
    assert not out.exists()


def test_images_that_are_not_finite_are_refused(lcm, tmp_path, capsys, monkeypatch):
    def broken(self, request, prompts, numbers, seed):
        images = np.full((len(prompts), 4, 4, 3), np.nan, np.float32)
        images[1] = 0.5
        return images

    monkeypatch.setattr(Generator, "generate", broken)
    assert sample.main([f"--model={lcm}", f"--out={tmp_path}", f"--prompt={PROMPT}", "--num_images=3"]) == 2
    assert "0000_0000.png, 0000_0002.png: not finite, and would be black; try --dtype" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["0000_0001.png"]  # the good one is kept
    with pytest.raises(LcmError, match="image 0 is not finite, and would be black; try dtype float32"):
        lcm_jax.load(lcm)(PROMPT, num_images=3)


def test_grid_places_images_row_by_row():
    images = np.arange(3, dtype=np.uint8).reshape(3, 1, 1, 1) * np.ones((3, 2, 2, 3), np.uint8)
    placed = grid(images, 2)
    assert placed.shape == (4, 4, 3)
    assert (placed[:2, :2] == 0).all() and (placed[:2, 2:] == 1).all()
    assert (placed[2:, :2] == 2).all() and (placed[2:, 2:] == 255).all()


@pytest.mark.parametrize(
    ("sampler", "scheduler", "guidance_scale", "negative_prompt"),
    [
        ("ddim", DDIMScheduler, 5.0, None),
        pytest.param("ddim", DDIMScheduler, 5.0, "a blue square", marks=pytest.mark.slow),
        pytest.param("ddim", DDIMScheduler, 1.0, None, marks=pytest.mark.slow),
        pytest.param("dpm_solver_pp_2m", DPMSolverMultistepScheduler, 5.0, None, marks=pytest.mark.slow),
    ],
)
def test_the_teacher_generates_the_images_of_diffusers(tmp_path, sampler, scheduler, guidance_scale, negative_prompt):
    """Guided by two passes (scale 5), and unguided by one (scale 1); trailing spacing, same latents."""
    folder, seed = tiny.folder("sd1"), 7
    options = [f"--sampler={sampler}", f"--guidance_scale={guidance_scale}", "--num_images=2", "--batch_size=2"]
    options += [f"--negative_prompt={negative_prompt}"] if negative_prompt else []
    ours = arrays(generate(folder, tmp_path, *options, f"--seed={seed}", "--steps=4"))

    pipe = tiny.torch_pipeline(StableDiffusionPipeline, folder, scheduler)
    noise = draw_noise(seed, [0, 1], 1, (8, 8, 4))[0]
    theirs = pipe(
        [PROMPT] * 2,
        negative_prompt=negative_prompt and [negative_prompt] * 2,
        height=16,
        width=16,
        num_inference_steps=4,
        guidance_scale=guidance_scale,
        output_type="pil",
        latents=torch.from_numpy(noise.transpose(0, 3, 1, 2).copy()),
    ).images
    theirs = np.stack([np.asarray(image).astype(int) for image in theirs])
    assert ((theirs > 0) & (theirs < 255)).mean() > 0.5  # images, not saturation
    difference = np.abs(ours - theirs).max()
    print(f"{sampler} at {guidance_scale}: largest difference {difference}/255")
    assert difference <= 2


def test_another_size_and_half_precision_which_is_the_default_but_on_a_cpu(lcm, tmp_path, monkeypatch):
    monkeypatch.setattr(kernels, "auto_dtype", {"cpu": "bfloat16"}.get)  # by the platform of the mesh
    options = ("--height=10", "--width=14", "--num_images=1", "--batch_size=1", "--steps=1")
    image = generate(lcm, tmp_path, *options)["0000_0000.png"]
    assert image.size == (14, 10) and (image.text["steps"], image.text["dtype"]) == ("1", "bfloat16")


@pytest.mark.parametrize(("dtype", "of_vae"), [("bfloat16", "bfloat16"), ("float16", "float32")])
def test_a_vae_that_overflows_float16_decodes_in_bfloat16(dtype, of_vae, lcm, tmp_path):
    folder = shutil.copytree(lcm, tmp_path / "lcm")
    tiny.change_json(folder / "vae/config.json", force_upcast=True)
    pipeline = lcm_jax.load(folder, dtype=dtype).pipeline
    assert pipeline.unet.dtype == dtype and pipeline.vae.dtype == of_vae


def test_three_lines_give_the_images_of_the_program(three, lcm):
    model = lcm_jax.load(lcm)
    images = model(PROMPT, steps=3, guidance_scale=8, seed=5, num_images=3, batch_size=2)
    np.testing.assert_array_equal(arrays(dict(enumerate(images))), arrays(three))
    assert len(model([PROMPT, "a blue square"], steps=3, height=10, width=14)) == 2
    with pytest.raises(BadArgument, match="^steps=21: out of range; choose 1 to 20$"):  # the record's solver steps
        model(PROMPT, steps=21)
    with pytest.raises(BadArgument, match="^seed=-1: out of range"):
        model(PROMPT, seed=-1)


def test_nothing_is_computed_that_is_thrown_away(lcm, monkeypatch):
    """One image is a batch of one, and a w embedding needs no null text."""
    sizes = []

    def generate(self, request, prompts, numbers, seed, generate=Generator.generate):
        sizes.append(len(prompts))
        return generate(self, request, prompts, numbers, seed)

    monkeypatch.setattr(Generator, "generate", generate)
    monkeypatch.setattr("lcm_jax.pretrained.text.null", None)
    model = lcm_jax.load(lcm)
    assert len(model(PROMPT, steps=1)) == 1 and sizes == [1]
    assert len(model(PROMPT, steps=1, num_images=3, batch_size=2)) == 3 and sizes == [1, 2, 2]
    assert model([]) == []


def test_the_record_decides_how_an_lcm_is_sampled(lcm):
    """No call can sample with constants other than those of the distillation: only the model has them."""
    pipeline = lcm_jax.load(lcm).pipeline
    others = {"solver_steps": 100, "timestep_scaling": 5.0, "sigma_data": 1.0}
    other = dataclasses.replace(pipeline, record=RECORD | others)
    settings = lcm_jax.Settings(steps=4)
    assert make_plan(pipeline, settings).timesteps == (999, 749, 499, 249)
    assert make_plan(other, settings).timesteps == (999, 749, 499, 249)
    assert make_plan(dataclasses.replace(pipeline, record={}), settings).timesteps == (999, 759, 499, 259)
    assert dict(make_plan(other, settings).options) == {"timestep_scaling": 5.0, "sigma_data": 1.0}
    assert pipeline != other and pipeline == dataclasses.replace(pipeline, record=RECORD | {"step": 3})


def test_prompts_with_weights_and_embeddings_are_recorded(three, lcm, tmp_path, capsys):
    """And the program's images are the library's."""
    star = tmp_path / "Star.safetensors"
    save_file({"emb_params": np.random.default_rng(0).standard_normal((2, 32), np.float32)}, star)
    options = (*ONE, "--prompt_syntax=a1111", "--clip_skip=2", f"--embedding={star}")
    prompt = "a (small:1.4) star, [red] circle"
    images = generate(lcm, tmp_path / "out", *options, prompt=prompt)
    about = images["0000_0000.png"].text
    keys = ("prompt", "prompt_syntax", "emphasis", "clip_skip", "embedding")
    assert [about[key] for key in keys] == [prompt, "a1111", "original", "2", str(star)]
    assert not capsys.readouterr().err
    model = lcm_jax.load(lcm, embeddings=[str(star)])
    again = model(prompt, steps=3, seed=5, prompt_syntax="a1111", clip_skip=2)
    assert (arrays(images) == np.asarray(again[0])).all()
    assert np.abs(arrays(images) - arrays(three)[0]).max() > 8

    plain = make_request(model.pipeline, steps=3)
    sample.warn(model, plain, [prompt, "a"], syntax_given=False)
    sample.warn(model, plain, ["a (red) hat"], syntax_given=True)
    marked, unused = capsys.readouterr().err.splitlines()
    assert re.match("warning: without --prompt_syntax=a1111 .* plain text: 'a \\(small:1.4", marked), marked
    assert unused == "warning: no prompt has the embedding Star; write Star where it belongs"


def test_prompts_of_different_lengths_are_guided_together():
    """Both are repeated to a common length; what needs the model is refused at once."""
    model = lcm_jax.load(tiny.folder("sd1"))
    model._sample = lambda unet, schedule, plan, params, cond, null, noise, scale, *_: (cond, null)
    options = {"guidance_scale": 2.0, "prompt_syntax": "a1111", "negative_prompt": "red " * 200}
    request = make_request(model.pipeline, **options)
    model.decode = lambda z: z
    cond, null = model.generate(request, ["red " * 76, "a"], [0, 0], 0)
    lengths = [text["encoder_hidden_states"].shape for text in (cond, null)]
    assert lengths == [(2, 6 * 77, 32), (1, 6 * 77, 32)]
    assert null["encoder_hidden_states"].std(0).max() == 0
    for prompt, syntax, message in (
        ("a <lora:x:1>", "a1111", "asks for <lora:x:1>, and the model is loaded with none"),
        ("(a", "comfy", r"the bracket \( \(character 1\) has no partner"),
        ("embedding:x", "comfy", "there is no embedding 'x'; those given: none"),
        ("red " * 6000, "a1111", "a prompt of 80 chunks of 75 tokens is too long; shorten it to 64 chunks"),
    ):
        with pytest.raises(LcmError, match=message):
            model(prompt, prompt_syntax=syntax)


@contextlib.contextmanager
def compilations():
    """A list that receives an entry for every program that is compiled."""
    seen: list[str] = []

    def listen(event: str, _: float, **about) -> None:
        if event.endswith("backend_compile_duration"):
            seen.append(str(about))

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield seen
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def test_a_second_model_compiles_nothing_and_a_dropped_one_is_freed(lcm, tmp_path):
    """Two fine-tunes of one architecture share every program; nothing keeps the weights of one that is gone."""
    other = tiny.copy("micro lcm", tmp_path / "other")
    tiny.write_json(other / pretrained.RECORD, RECORD | {"step": 7})
    weights = other / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = {name: 1.5 * value for name, value in load_file(weights).items()}
    save_file(tensors, weights, {"format": "pt"})

    first = lcm_jax.load(lcm)
    one = first(PROMPT, steps=2)[0]
    with compilations() as compiled:
        second = lcm_jax.load(other)
        assert np.abs(np.subtract(one, second(PROMPT, steps=2)[0], dtype=int)).max() > 1
    assert compiled == []
    leaves = [weakref.ref(leaf) for leaf in jax.tree.leaves(first.params)]
    del first
    gc.collect()
    assert len(leaves) > 50 and not any(leaf() for leaf in leaves)


def test_lines_of_a_prompts_file(tmp_path, capsys):
    """UTF-8 with or without a byte order mark, lines end with LF or CR LF alone; what cannot be seen is reported."""

    def read(content: bytes, *options):
        (tmp_path / "p.txt").write_bytes(content)
        words = ["--model=m", f"--out={tmp_path / 'out'}", f"--prompts={tmp_path / 'p.txt'}", *options]
        return sample.read_prompts(sample.parser().parse_args(words))

    assert read("\ufeffa red circle\r\n\ta cat\u2028on a mat \n\n \n".encode()) == [
        "a red circle",
        "a cat\u2028on a mat",
    ]
    assert read("a\n \ufeffjoined\n".encode()) == ["a", "joined"] and not capsys.readouterr().err
    assert read("a\nb\x0cc\nd\x85e\n".encode()) == ["a", "b\x0cc", "d\x85e"]
    assert capsys.readouterr().err.endswith("p.txt: line 2 has the character U+000C, and 1 more lines have such\n")
    for content, message in (
        ("a\n".encode("utf-16"), "UTF-16.; save it as UTF-8"),
        (b"a\nb\0\n", "zero byte in line 2"),
        (b"a\n\xff", "not UTF-8"),
        (b"a\n" + b"x" * 200_000, "line 2 has 200000 characters"),
        (b" \n\n", "no prompt"),
    ):
        with pytest.raises(LcmError, match=message):
            read(content)
    for flag in ("prompt", "negative_prompt"):  # a shell's bytes that are not UTF-8
        with pytest.raises(BadArgument, match=rf"^{flag}=.udcff"):
            read(b"a\n", f"--{flag}=\udcff")


def test_sizes_that_nobody_can_mean_are_refused_before_anything_is_compiled(lcm, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(Generator, "generate", None)
    for options, message in (
        (
            ["--height=100000", "--width=100000", "--num_images=1"],
            r"--height=100000: 1 images of 100000 x 100000 .* GiB",
        ),
        (["--batch_size=100000000", "--num_images=20000000"], r"--(batch_size|num_images)=\d+: .*(GiB|make room)"),
        (["--num_images=1000000000000"], r"--num_images=1000000000000: .* make room"),
    ):
        out = tmp_path / "out"
        assert sample.main([f"--model={lcm}", f"--out={out}", "--prompt=a", *options]) == 2
        error = capsys.readouterr().err
        assert re.search(message, error) and error.count("\n") == 1, error
    with pytest.raises(BadArgument, match="^height=100000: "):
        lcm_jax.load(lcm)(PROMPT, height=100_000, width=100_000)


def test_images_of_another_request_are_not_replaced(three, lcm, tmp_path, capsys):
    out = tmp_path / "out"
    generate(lcm, out, *ONE)
    (out / ".0001_0000.png.0123abcd.partial").touch()  # of one that was killed
    assert set(generate(lcm, out, *ONE)) == {"0000_0000.png"} and len(list(out.iterdir())) == 1
    for options in (("--prompt=b", *ONE), (f"--prompt={PROMPT}", *ONE, "--seed=6")):
        assert sample.main([f"--model={lcm}", f"--out={out}", *options]) == 2
        assert f"--out={out}: has 0000_0000.png of another prompt, model" in capsys.readouterr().err
    (image,) = generate(lcm, out, *ONE, "--overwrite", prompt="b").values()
    assert image.text["prompt"] == "b"


def test_files_that_are_read_or_not_ours_are_not_replaced(tmp_path, capsys):
    """The image of one batch would be what the next one starts from; a preview is removed in the end."""
    own = tmp_path / "0001_0000.png"
    Image.new("RGB", (16, 16)).save(own)
    sample.check_out(tmp_path, [{}], range(4), {own}, overwrite=True)  # its name is not in use
    sample.check_out(tmp_path, [{}] * 2, range(4), (), overwrite=True)
    with pytest.raises(BadArgument, match="has 0001_0000.png, which images are made from; choose another folder"):
        sample.check_out(tmp_path, [{}] * 2, range(4), {tmp_path / "." / own.name}, overwrite=True)
    preview = own.rename(tmp_path / "preview.png")
    assert sample.main([f"--out={tmp_path}", "--model=/nowhere", "--prompt=a", "--preview=/nowhere"]) == 2
    assert "has a preview.png of others; choose another folder, or --overwrite" in capsys.readouterr().err
    sample.show(preview, np.zeros((1, 2, 2, 3), np.uint8), 1)  # of a run that was killed
    sample.check_preview(preview)


def test_a_full_disk_and_a_signal_leave_whole_images_alone(lcm, tmp_path, capsys, monkeypatch, load_once):
    def images(self, request, prompts, numbers, seed):
        return np.random.default_rng(0).random((len(prompts), 64, 64, 3), np.float32)

    def stopped(path, image, about, write=sample.write_png):
        if about["image"] == 1:
            raise KeyboardInterrupt
        write(path, image, about)

    monkeypatch.setattr(Generator, "generate", images)
    words = [f"--model={lcm}", "--prompt=a"]
    assert sample.main([*words, f"--out={tmp_path / 'room'}"]) == 0  # no program is kept with a size that is cut off
    words.append(f"--out={tmp_path / 'out'}")
    capsys.readouterr()
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        assert sample.main(words) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    error = capsys.readouterr().err
    assert f"{tmp_path / 'out' / '0000_0000.png'} cannot be written (File too large); make room" in error
    assert not any((tmp_path / "out").iterdir())
    monkeypatch.setattr(sample, "write_png", stopped)
    assert sample.main(words) == 130
    assert capsys.readouterr().err == f"stopped; 1 images are in {tmp_path / 'out'}\n"
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["0000_0000.png"]
