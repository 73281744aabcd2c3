"""`python -m lcm_jax.sample` on UNets without w embedding: LoRAs, negative prompts, single files, warnings.

The oracle is a torch diffusers pipeline with LCMScheduler, from the same latents and noise.
"""

import dataclasses
import json
import re
import shutil
from pathlib import Path

import diffusers
import jax
import jax.numpy as jnp
import lora_kit
import numpy as np
import pytest
import tiny
from test_export import diffusers_images
from test_sample import PROMPT, arrays, generate

import lcm_jax
from lcm_jax import sample
from lcm_jax.errors import BadArgument
from lcm_jax.models.layers import dtypes_in_use
from lcm_jax.pretrained import RECORD, lora_keys, save_single_file, text
from lcm_jax.sampling.generator import draw_noise
from lcm_jax.sampling.load import add_loras, pairs_of, parse_lora
from lcm_jax.sampling.request import make_request, warnings

SEED, STEPS = 5, 3
OPTIONS = (f"--seed={SEED}", f"--steps={STEPS}", "--num_images=2", "--batch_size=2")
LONG = "hello " * 80  # 82 tokens with start and end


def theirs(name, monkeypatch, prepare=lambda pipe: None, **options) -> np.ndarray:
    """What diffusers generates for the two images; `prepare` changes the pipeline first."""
    pipe = diffusers.DiffusionPipeline.from_pretrained(tiny.folder(name))
    pipe.scheduler = diffusers.LCMScheduler.from_config(pipe.scheduler.config)
    prepare(pipe)
    if "negative_prompt" in options:
        options["negative_prompt"] = [options["negative_prompt"]] * 2
    noise = draw_noise(SEED, [0, 1], STEPS, (8, 8, 4))
    images = diffusers_images(pipe, monkeypatch, [PROMPT] * 2, noise, 16, **options)
    assert ((images > 0) & (images < 255)).mean() > 0.5  # images, not saturation
    return images


def check_same(ours, images, what) -> None:
    difference = np.abs(arrays(ours) - images).max()
    print(f"{what}: largest difference {difference}/255")
    assert difference <= 2, what


@pytest.fixture(scope="module")
def lora_files(tmp_path_factory) -> tuple[Path, Path]:
    """One for the UNet, kohya's names with alphas; one for UNet and text encoder, peft's names."""
    folder, pipeline = tmp_path_factory.mktemp("loras"), lora_kit.pipeline("sd1")
    one = lora_kit.tensors_of("kohya", lora_kit.factors(pipeline.unet, seed=1), alpha=2.0)
    two = lora_kit.tensors_of("peft", lora_kit.factors(pipeline.unet, lora_kit.ATTENTION, rank=2, seed=2))
    text = lora_kit.factors(pipeline.text_encoder, ("q_proj", "v_proj"), rank=2, seed=3)
    two |= lora_kit.tensors_of("peft", text, part="text_encoder")
    return lora_kit.save(folder / "one.safetensors", one), lora_kit.save(folder / "two.safetensors", two)


def test_loras_are_merged_as_diffusers_adds_them(lora_files, tmp_path, monkeypatch):
    """Two at once with weights, one pass a step by default; a LoRA for the text encoder counts."""
    one, two = lora_files
    ours = generate(tiny.folder("sd1"), tmp_path / "out", f"--lora={one}:0.5", f"--lora={two}", *OPTIONS)
    assert ours["0000_0000.png"].text["guidance_scale"] == "1.0"
    assert ours["0000_0000.png"].text["lora"] == f"{one}:0.5, {two}"

    def add(pipe):
        for name, path in (("one", one), ("two", two)):
            pipe.load_lora_weights(path.parent, weight_name=path.name, adapter_name=name)
        pipe.set_adapters(["one", "two"], [0.5, 1.0])

    check_same(ours, theirs("sd1", monkeypatch, add, guidance_scale=1.0), "two LoRAs")
    alone = arrays(generate(tiny.folder("sd1"), tmp_path / "alone", f"--lora={one}:0.5", *OPTIONS))
    assert np.abs(alone - arrays(ours)).max() > 8


@pytest.mark.parametrize(
    ("name", "negative"),
    [
        ("sd1", "a large blue square"),
        ("sdxl", None),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (("sd1", None), ("sd1", ""), ("sdxl", ""), ("sdxl", "a large blue square"))
        ),
    ],
)
def test_guidance_between_1_and_2_is_diffusers_two_passes(name, negative, tmp_path, monkeypatch):
    """SDXL: no negative prompt is zeros, "" is encoded; SD: both are "" encoded."""
    more = () if negative is None else (f"--negative_prompt={negative}",)
    ours = generate(tiny.folder(name), tmp_path, "--guidance_scale=1.5", *more, *OPTIONS)
    options = {} if negative is None else {"negative_prompt": negative}
    check_same(ours, theirs(name, monkeypatch, guidance_scale=1.5, **options), f"{name}, {negative!r}")
    assert ours["0000_0000.png"].text.get("negative_prompt") == negative


def test_null_is_the_empty_text_or_zeros():
    for name in ("sd1", "sdxl"):
        pipeline, params = tiny.loaded(name)
        unset, empty, other = (text.null(pipeline, params, prompt) for prompt in (None, "", "blue"))
        encoded = text.encode(pipeline, params, [""])
        for key, value in encoded.items():
            np.testing.assert_array_equal(empty[key], value)
            np.testing.assert_array_equal(unset[key], np.zeros_like(value) if name == "sdxl" else value)
            assert np.abs(other[key] - value).max() > 0.01
    index = pipeline.configs["model_index"] | {"force_zeros_for_empty_prompt": False}
    pipeline = dataclasses.replace(pipeline, configs={**pipeline.configs, "model_index": index})
    np.testing.assert_array_equal(text.null(pipeline, params)["text_embeds"], encoded["text_embeds"])


@pytest.mark.slow
def test_a_single_file_is_a_model(tmp_path):
    folder = tiny.folder("sd1")
    path = save_single_file(*tiny.loaded("sd1"), tmp_path / "model.safetensors", dtype=np.float32)
    ours = generate(path, tmp_path / "a", f"--model_config={folder}", *OPTIONS)
    np.testing.assert_array_equal(arrays(ours), arrays(generate(folder, tmp_path / "b", *OPTIONS)))


ADDRESS = "https://huggingface.co/owner/name/resolve/main/x.safetensors"


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("FILE", ("FILE", 1.0)),
        ("FILE:0.8", ("FILE", 0.8)),
        ("FILE:-1", ("FILE", -1.0)),
        ("FILE:1e-1", ("FILE", 0.1)),
        ("owner/name", ("owner/name", 1.0)),
        ("owner/name/x.safetensors:.5", ("owner/name/x.safetensors", 0.5)),
        (f"{ADDRESS}:0.5", (ADDRESS, 0.5)),
        (f"{ADDRESS}?download=true", (f"{ADDRESS}?download=true", 1.0)),
        ("ODD:name", ("ODD:name", 1.0)),
        ("ODD:name:2", ("ODD:name", 2.0)),
        ("FILE:nan", "weight nan is not finite"),
        ("FILE:", "'' is no weight; write .*file:0.8"),
        ("FILE:1,5", "'1,5' is no weight"),
        ("FILE:50%", "'50%' is no weight"),
        ("FILE:1.0:0.5", "'1.0:0.5' is no weight"),
        ("nothing", "nothing does not exist"),
        ("https://elsewhere.org/x.safetensors", "https://elsewhere.org/x.safetensors does not exist"),
        ("/no/such:2", "/no/such does not exist; give a .safetensors file, a folder, or owner/name"),
    ],
)
def test_parse_lora_takes_a_number_after_the_last_colon_as_weight(tmp_path, given, expected):
    for name in ("file", "odd:name"):
        (tmp_path / name).touch()

    def real(text):
        return text.replace("FILE", str(tmp_path / "file")).replace("ODD", str(tmp_path / "odd"))

    if isinstance(expected, str):
        with pytest.raises(BadArgument, match=expected):
            parse_lora(real(given))
    else:
        assert parse_lora(real(given)) == (real(expected[0]), expected[1])


def test_loras_are_given_alone_or_in_a_list_by_name_or_path(tmp_path):
    path = tmp_path / "a.safetensors"
    path.touch()
    for given in (path, str(path), [path], [f"{path}:1"], [(path, 1)], [[str(path), np.float32(1)]]):
        assert pairs_of(given) == [(str(path), 1.0)], given
    for wrong in ((str(path), 0.5), [(path, "0.5")], [None]):  # the first: a pair that is in no list
        with pytest.raises(BadArgument, match=r'is no LoRA; give "FILE", "FILE:WEIGHT" or \(file, weight\)'):
            pairs_of(wrong)
    with pytest.raises(BadArgument, match="^lora=a.safetensors: weight nan is not finite"):
        pairs_of([("a.safetensors", float("nan"))])


@pytest.mark.parametrize("dtype", ["fp16", "float64", None, np.int8])
def test_a_dtype_that_networks_do_not_compute_in_is_refused(dtype):
    with pytest.raises(BadArgument, match="dtype=.*: choose one of auto, float32, bfloat16, float16"):
        lcm_jax.load("/nowhere", dtype=dtype)


def lora_with_record(folder: Path, record: dict, **tensors) -> Path:
    """A LoRA in a folder with its lcm_config.json, as `export` writes it."""
    folder.mkdir()
    found = lora_kit.factors(lora_kit.pipeline("sd1").unet, ("to_q",), rank=2, seed=4)
    lora_kit.save(folder / "pytorch_lora_weights.safetensors", lora_kit.tensors_of("peft", found) | tensors)
    tiny.write_json(folder / RECORD, record)
    return folder


def test_add_loras_joins_the_records(lora_files, tmp_path):
    """Without a record 50 steps and 10, the published LCM-LoRAs'; else the record's, in file or folder."""
    pipeline, params = tiny.loaded("sd1")
    assert pipeline.record == {} and not pipeline.is_lcm

    def constants(*sources):
        merged, _ = add_loras(pipeline, params, [(str(source), 1.0) for source in sources])
        return merged.constants.solver_steps, merged.constants.timestep_scaling

    assert constants(lora_files[0]) == (50, 10.0)
    folder = lora_with_record(tmp_path / "a", {"solver_steps": 20, "timestep_scaling": 5.0})
    assert constants(folder) == constants(lora_files[0], folder) == (20, 5.0)
    header = {RECORD: json.dumps({"solver_steps": 25})}
    found = lora_kit.factors(pipeline.unet, ("to_q",), rank=2)
    path = lora_kit.save(tmp_path / "b.safetensors", lora_kit.tensors_of("kohya", found, alpha=2.0), **header)
    assert constants(path) == (25, 10.0)
    (tmp_path / "alone").mkdir()
    shutil.copy(path, tmp_path / "alone" / "pytorch_lora_weights.safetensors")
    assert constants(tmp_path / "alone") == (25, 10.0)
    with pytest.raises(BadArgument, match=r"^lora=.*solver_steps is 20 for \S+, 25 for \S+; they cannot go together"):
        constants(folder, path)
    other = lora_with_record(tmp_path / "v", {"prediction_type": "v_prediction"})
    with pytest.raises(BadArgument, match="prediction_type is epsilon for the model, v_prediction for"):
        constants(other)


def test_loras_are_added_in_float32_and_rounded_once(lora_files):
    """Whatever the dtype, each leaf is the one of float32, in the dtype in which it is used."""
    loras = [f"{lora_files[0]}:0.5", str(lora_files[1])]
    model = lcm_jax.load(tiny.folder("sd1"), loras=loras, dtype="float32")
    half = lcm_jax.load(tiny.folder("sd1"), loras=loras, dtype="bfloat16")
    dtypes = dtypes_in_use(model.params, "bfloat16")
    assert half.params["unet"]["down_blocks_0"]["resnets_0"]["conv1"]["kernel"].dtype == jnp.bfloat16
    jax.tree.map(np.testing.assert_array_equal, half.params, jax.tree.map(jnp.astype, model.params, dtypes))
    pipeline, params = tiny.loaded("sd1")
    merged = add_loras(pipeline, params, [(str(lora_files[0]), 0.5), (str(lora_files[1]), 1.0)])[1]
    jax.tree.map(np.testing.assert_array_equal, model.params, dict(merged))


def test_loras_that_do_not_fit_are_refused(tmp_path, capsys, caplog):
    """Of another architecture, or with keys of no layer, which --ignore_unused allows."""
    extra = {"unet.nowhere.lora_A.weight": np.ones((2, 3), np.float32)}
    fits, more = lora_with_record(tmp_path / "lora", {}), lora_with_record(tmp_path / "more", {}, **extra)
    options = [f"--out={tmp_path / 'out'}", "--prompt=a", *OPTIONS]
    for model, lora, word in (("sdxl", fits, "architecture"), ("sd1", more, "unet.nowhere.lora_A.weight")):
        assert sample.main([f"--model={tiny.folder(model)}", f"--lora={lora}", *options]) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ") and error.count("\n") == 1 and word in error
    assert not (tmp_path / "out").exists()
    assert sample.main([f"--model={tiny.folder('sd1')}", f"--lora={more}", *options, "--ignore_unused"]) == 0
    assert "1 of" in caplog.text and "unet.nowhere" in caplog.text


def test_loras_of_other_programs_make_the_same_images(lora_files, tmp_path, caplog):
    """OneTrainer's names with a bundled embedding against kohya's; LyCORIS' norms count."""
    unet, tensors = lora_kit.pipeline("sd1").unet, {}
    original = lora_keys.sgm_names(unet)
    for name, (a, b) in lora_kit.factors(unet, seed=1).items():
        stem = f"unet.{original[name]}"
        tensors |= {f"{stem}.lora_down.weight": a, f"{stem}.lora_up.weight": b, f"{stem}.alpha": np.float32(2)}
    bundled = tensors | {"bundle_emb.cat.clip_l": np.ones((2, 32), np.float32)}
    norm = tensors | {"lora_unet_conv_norm_out.w_norm": np.full(32, 0.5, np.float32)}
    images = {}
    for name, path in {
        "kohya": lora_files[0],
        "other": lora_kit.save(tmp_path / "other.safetensors", bundled),
        "norm": lora_kit.save(tmp_path / "norm.safetensors", norm),
    }.items():
        images[name] = arrays(generate(tiny.folder("sd1"), tmp_path / name, f"--lora={path}", *OPTIONS))
    np.testing.assert_array_equal(images["other"], images["kohya"])
    assert "other.safetensors holds embeddings, too (cat)" in caplog.text
    assert np.abs(images["norm"] - images["kohya"]).max() > 8


def warned(pipeline, guidance_scale=1.0, **options) -> str:
    return "\n".join(warnings(pipeline, make_request(pipeline, guidance_scale=guidance_scale, **options)))


def test_warnings():
    teacher, lcm = (tiny.loaded(name)[0] for name in ("sd1", "lcm"))
    plain = dataclasses.replace(teacher, record={"solver_steps": 50})
    for scale in (1.0, 1.5, 2.0):
        assert warned(plain, scale) == ""
    burnt = warned(plain, 2.5)
    assert re.search("guidance scale 2.5 .* oversaturated, with burnt contrast", burnt) and "\n" not in burnt
    assert warned(teacher, 7.5, sampler="ddim") == warned(lcm, 8.0) == ""
    assert "has no effect at guidance scale 1" in warned(plain, negative_prompt="b")
    assert warned(plain, 1.5, negative_prompt="b") == ""
    assert "this may not be a Latent Consistency Model" in warned(teacher)
    assert warned(dataclasses.replace(teacher, may_be_lcm=True)) == ""
    scheduler = teacher.configs["scheduler"] | {"_class_name": "LCMScheduler"}
    by_scheduler = dataclasses.replace(teacher, configs={**teacher.configs, "scheduler": scheduler})
    assert by_scheduler.is_lcm and warned(by_scheduler) == ""


def test_warnings_and_cut_prompts_are_on_stderr_and_images_are_made(lora_files, tmp_path, capsys):
    options = ("--guidance_scale=3", f"--negative_prompt={LONG}", f"--lora={lora_files[0]}", *OPTIONS)
    assert len(generate(tiny.folder("sd1"), tmp_path, *options, prompt=f"a red {LONG}")) == 2
    first, *cut = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: ")]
    assert "oversaturated" in first
    assert [
        re.match(r"warning: a prompt of (\d+) tokens is cut to 77, (\d+) are lost: '", line).groups() for line in cut
    ] == [("84", "7"), ("82", "5")]


def test_encode_logs_captions_that_are_cut(caplog):
    pipeline, params = tiny.loaded("sdxl")
    exact = "hello " * 75
    assert text.truncated(pipeline, [exact, LONG, LONG, "a"]) == {LONG: (82, 77)}
    text.encode(pipeline, params, [exact, "a"])
    assert not caplog.text
    text.encode(pipeline, params, ["a", LONG])
    assert "1 of 2 captions are longer than 77 tokens and were cut; the longest, of 82" in caplog.text
