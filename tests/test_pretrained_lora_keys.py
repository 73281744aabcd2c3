"""Keys of LoRA files: every spelling finds its layer; files for other models, or of other kinds, are refused."""

import itertools
import re

import family
import huggingface_hub
import numpy as np
import peft
import pytest
import torch
from lora_kit import ATTENTION, TEXT, factors, pipeline, same_lora, save, tensors_of

from lcm_jax.errors import LcmError
from lcm_jax.models import unet as unet_lib
from lcm_jax.pretrained import lora_files, lora_keys
from lcm_jax.pretrained.lora_files import modules_of, read_lora

DOWN, UP = np.zeros((4, 32), np.float32), np.zeros((32, 4), np.float32)


@pytest.mark.parametrize("name", ["sd15", "sdxl", "ssd-1b", "tiny-sd"])
def test_no_two_layers_share_a_spelling(name):
    unet = unet_lib.from_config(family.UNETS[name])
    for spelled in (list(lora_keys.layers(unet)), list(lora_keys.sgm_names(unet).values())):
        assert len({lora_keys.underscored(n) for n in spelled}) == len(spelled)
    for n, original in lora_keys.sgm_names(unet).items():
        for spelling in (n, original, lora_keys.underscored(n), lora_keys.underscored(original)):
            assert [layer.name for layer in lora_keys.layers_of(spelling, {"unet": unet})] == [n]


def test_names_of_trainers(tmp_path):
    """Prefixes of peft's trainer, its adapter names, no prefix; and alpha in adapter_config.json."""
    modules = modules_of(pipeline("sd1"))
    found = factors(modules["unet"], rank=3)
    plain = read_lora(save(tmp_path / "x.safetensors", tensors_of("peft", found)), modules)
    for i, prefix in enumerate(("", "base_model.model.", "base_model.model.unet.", "unet.base_model.model.")):
        tensors = {prefix + key.removeprefix("unet."): x for key, x in tensors_of("peft", found).items()}
        same_lora(read_lora(save(tmp_path / f"{i}.safetensors", tensors), modules), plain)
        tensors = {key.replace(".weight", ".default.weight"): x for key, x in tensors.items()}
        same_lora(read_lora(save(tmp_path / f"{i}d.safetensors", tensors), modules), plain)
    (tmp_path / "run").mkdir()
    save(tmp_path / "run" / "adapter_model.safetensors", tensors)
    with pytest.raises(LcmError, match="adapter_config.json is missing"):
        read_lora(tmp_path / "run", modules)
    peft.LoraConfig(r=3, lora_alpha=12).save_pretrained(tmp_path / "run")
    assert set(read_lora(tmp_path / "run", modules).scales("unet").values()) == {4.0}


KOHYA = {"unet": "lora_unet_", "text_encoder": "lora_te1_", "text_encoder_2": "lora_te2_"}
PREFIXES = {
    "unet": (
        *("", "unet.", "diffusion_model.", "model.diffusion_model.", "base_model.model.", "unet.base_model.model."),
        *("base_model.model.unet.", "lora_unet_", "lora_unet.", "unet_", "lycoris_", "lora_prior_unet_"),
        *("module.unet.", "unet.module."),
    ),
    "text_encoder": (
        *("text_encoder.", "text_encoders.clip_l.transformer.", "text_encoders.clip_h.transformer.", "clip_l."),
        *("clip_l.transformer.", "te1.", "te.", "lora_te_", "lora_te1_", "text_encoder.base_model.model."),
        *("text_encoder_1.", "lora_text_encoder_", "lora_text_encoder_1_"),
    ),
    "text_encoder_2": (
        *("text_encoder_2.", "text_encoders.clip_g.transformer.", "clip_g.", "te2.", "lora_te2_"),
        "lora_text_encoder_2_",
    ),
}
LEAVES = (  # of A, B and alpha
    ("lora_down.weight", "lora_up.weight", "alpha"),
    ("lora_A.weight", "lora_B.weight", "alpha"),
    ("lora_A.default.weight", "lora_B.default.weight", "alpha"),
    ("lora_A", "lora_B", "alpha"),
    ("lora.down.weight", "lora.up.weight", "lora.alpha"),
    ("lora_linear_layer.down.weight", "lora_linear_layer.up.weight", "alpha"),
)
FEW = ("to_q", "to_out.0", "proj_in", "ff.net.0.proj", "conv1", "conv_in", "upsamplers.0.conv", "time_emb_proj")


@pytest.mark.parametrize("name", ["sd1", "sd2", "sdxl"])
def test_every_prefix_may_stand_before_every_spelling(name, tmp_path):
    """Names of diffusers or of the original UNet, dots or underscores, leaf names of every program: one LoRA."""
    modules = modules_of(pipeline(name))
    for part, module in modules.items():
        found = factors(module, FEW if part == "unet" else TEXT[:2])
        spelled = {"own": {n: n for n in found}}
        if part == "unet":
            spelled["original"] = lora_keys.sgm_names(module)
            late = re.compile(r"(?<=output_blocks\.\d)\.1\.conv$")  # OneTrainer has SDXL's place for all
            spelled["OneTrainer"] = {n: late.sub(".2.conv", new) for n, new in spelled["original"].items()}
        else:
            spelled["short"] = {n: n.removeprefix("text_model.") for n in found}

        def read(spelling, prefix, separator, leaves, part=part, found=found):
            tensors = {}
            for n, values in found.items():
                stem = prefix + spelling[n].replace(".", separator)
                tensors |= {f"{stem}.{leaf}": x for leaf, x in zip(leaves, (*values, np.float32(2)), strict=True)}
            return read_lora(save(tmp_path / "x.safetensors", tensors), modules)

        wanted = read(spelled["own"], KOHYA[part], "_", LEAVES[0])
        assert wanted.parts.keys() == {part} and {f.scale for f in wanted.parts[part].values()} == {0.5}
        cases = itertools.product(PREFIXES[part], spelled.values(), "._")
        for i, (prefix, spelling, separator) in enumerate(cases):
            same_lora(read(spelling, prefix, separator, LEAVES[i % len(LEAVES)]), wanted)


def test_a_file_that_does_not_name_its_text_encoder(tmp_path):
    """As peft and LyCORIS save one model: read where there is one text encoder, and not guessed where there are two."""
    for name in ("sdxl", "sd1"):
        modules = modules_of(pipeline(name))
        found = factors(modules["text_encoder"], TEXT[:1])
        wanted = read_lora(save(tmp_path / "wanted.safetensors", tensors_of("kohya", found, part="te1")), modules)
        for prefix, separator in (("lycoris_", "_"), ("", "."), ("base_model.model.", ".")):
            stems = {prefix + n.replace(".", separator): values for n, values in found.items()}
            tensors = {f"{stem}.lora_{x}.weight": y for stem, v in stems.items() for x, y in zip("AB", v, strict=True)}
            path = save(tmp_path / "x.safetensors", tensors)
            if name == "sd1":
                same_lora(read_lora(path, modules), wanted)
                continue
            with pytest.raises(LcmError, match="may be for text_encoder and text_encoder_2 of this model; put the"):
                read_lora(path, modules)
    peft.LoraConfig(r=4, lora_alpha=12).save_pretrained(tmp_path / "run")
    save(tmp_path / "run" / "adapter_model.safetensors", tensors)
    assert set(read_lora(tmp_path / "run", modules).scales("text_encoder").values()) == {3.0}


def a1111_name(key):
    """Where A1111 1.10 looks for a key of a UNet: its table of diffusers' names, made for SD 1.x, or what it is."""
    names = {"conv1": "in_layers_2", "conv2": "out_layers_3", "time_emb_proj": "emb_layers_1"}
    names["conv_shortcut"] = "skip_connection"
    name = key.removeprefix("lora_unet_")
    if found := re.fullmatch(r"(down|up)_blocks_(\d)_(resnets|attentions)_(\d)_(.+)", name):
        half, level, kind, place, end = found.groups()
        n = 3 * int(level) + int(place) + (half == "down")
        end = names.get(end, end) if kind == "resnets" else end
        return f"{'input' if half == 'down' else 'output'}_blocks_{n}_{int(kind == 'attentions')}_{end}"
    if found := re.fullmatch(r"mid_block_(resnets|attentions)_(\d)_(.+)", name):
        kind, place, end = found.groups()
        return f"middle_block_{1 if kind == 'attentions' else 2 * int(place)}_{names.get(end, end)}"
    if found := re.fullmatch(r"down_blocks_(\d)_downsamplers_0_conv", name):
        return f"input_blocks_{3 * int(found[1]) + 3}_0_op"
    if found := re.fullmatch(r"up_blocks_(\d)_upsamplers_0_conv", name):
        return f"output_blocks_{3 * int(found[1]) + 2}_{1 if found[1] == '0' else 2}_conv"
    if found := re.fullmatch(r"time_embedding_linear_(\d)", name):
        return f"time_embed_{2 * int(found[1]) - 2}"
    return {"conv_in": "input_blocks_0_0", "conv_out": "out_2"}.get(name, name)


SIMILAR = ("sd15-inpaint", "lcm-sdxl", "lcm-ssd-1b")  # each has the layers of another, or one more


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.slow if name in SIMILAR else ())
        for name in sorted(family.UNETS.keys() - {"small-sd", "tiny-sd"})  # A1111 has no pruned SD UNets
    ],
)
def test_a1111_finds_every_layer_of_kohyas_file(name):
    """With one block in each transformer, which names alike what is in the others."""
    shallow = {"transformer_layers_per_block": 1, "reverse_transformer_layers_per_block": None}
    unet = unet_lib.from_config(family.UNETS[name] | shallow)
    original, spelled = lora_keys.sgm_names(unet), lora_keys.kohya_names(unet)
    for layer, written in spelled.items():
        assert a1111_name(lora_keys.underscored(written)) == original[layer].replace(".", "_"), layer
    unread = {"time_embedding.cond_proj"} if name.startswith("lcm-") else set()  # by diffusers
    unread |= {f"add_embedding.linear_{i}" for i in (1, 2)} if name == "sdxl-refiner" else set()
    assert lora_keys.layers(unet).keys() - spelled.keys() == unread
    assert ("output_blocks.2.2.conv" in spelled.values()) == (name.removeprefix("lcm-") in ("sdxl", "ssd-1b", "vega"))


def test_old_attention_names_of_text_encoders(tmp_path):
    """diffusers 0.16 called q_proj of a text encoder to_q_lora."""
    modules = modules_of(pipeline("sd1"))
    found = factors(modules["text_encoder"], TEXT[:4])
    new = read_lora(save(tmp_path / "new.safetensors", tensors_of("peft", found, part="text_encoder")), modules)
    for prefix in ("text_encoder.text_model.", "text_encoder."):
        old = {}
        for name, (a, b) in found.items():
            stem = prefix + name.removeprefix("text_model.").removesuffix("_proj")
            attention, layer = stem.rsplit(".", 1)
            old |= {f"{attention}.to_{layer}_lora.down.weight": a, f"{attention}.to_{layer}_lora.up.weight": b}
        same_lora(read_lora(save(tmp_path / "old.safetensors", old), modules), new)


def kohya(name="sd1", **changes):
    return tensors_of("kohya", factors(pipeline(name).unet, ATTENTION), 4.0) | changes


STEM = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
CONV = "lora_unet_down_blocks_0_resnets_0_conv1"
PEFT = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"


@pytest.mark.parametrize(
    ("tensors", "metadata", "message"),
    [
        ({}, {}, "holds no tensors; download or save it again"),
        ({"conv_in.weight": DOWN}, {}, r"holds no LoRA: none of its 1 keys \(conv_in.weight\) is a factor"),
        (kohya(**{"a\nb.lora_up.weight": UP}), {}, r"has a key 'a\\nb.lora_up.weight' with control characters"),
        ({f"{STEM}.hada_w1_a": DOWN}, {}, rf"is a LoHa \({STEM}.hada_w1_a\), which is not supported"),
        ({f"{STEM}.lokr_w1": DOWN}, {}, "is a LoKr"),
        (kohya(**{f"{STEM}.dora_scale": UP}), {}, "is a DoRA"),
        ({f"{PEFT}.lora_magnitude_vector": UP}, {}, "is a DoRA"),
        (kohya(**{f"{STEM}.lora_mid.weight": DOWN}), {}, r"1 of \d+ keys match no layer of this model .*lora_mid"),
        ({f"{CONV}.lora_mid.weight": DOWN}, {}, "1 keys lack a factor of their layer"),
        (
            {f"{CONV}.lora_{x}.weight": t for x, t in (("down", DOWN), ("mid", DOWN), ("up", UP))},
            {},
            r"conv1 \[4, 32\], \[4, 32\], \[32, 4\] for \[32, 32, 3, 3\]",
        ),
        (
            kohya(**{f"lora_unet_a_{i:02}.alpha": np.float32(1) for i in range(12)}),
            {},
            r"12 of \d+ keys match no layer of this model \(lora_unet_a_00.alpha, .*_09.alpha, and 2 more\); every f",
        ),
        ({"lora_te2_x.lora_down.weight": DOWN}, {}, r"1 of 1 keys match no layer .*; it is for another architecture"),
        (
            {f"{STEM}.lora_down.weight": DOWN},
            {},
            rf"1 keys lack a factor of their layer \({STEM}.lora_down.weight\); the file is incomplete",
        ),
        ({f"{PEFT}.lora_B.weight": UP}, {}, "1 keys lack a factor of their layer"),
        (
            {f"{STEM}.lora_down.weight": DOWN[:, :9], f"{STEM}.lora_up.weight": UP},
            {},
            r"1 of 1 layers have other shapes .*attn1.to_q \[4, 9\], \[32, 4\] for \[32, 32\]\); it is for another",
        ),
        ({f"{STEM}.lora_down.weight": DOWN, f"{STEM}.lora_up.weight": UP[:, :3]}, {}, "other shapes than this model's"),
        (
            {f"{STEM}.lora_down.weight": DOWN, f"{STEM}.lora_up.weight": UP, f"{STEM}.alpha": UP[0]},
            {},
            rf"{STEM}.alpha \[4\] for \[\]",
        ),
        ({f"{STEM}.lora_down.weight": DOWN.astype(np.int32), f"{STEM}.lora_up.weight": UP}, {}, "is int32; only float"),
        ({f"{STEM}.lora_down.weight": DOWN, f"{STEM}.lora_up.weight": UP * np.nan}, {}, "lora_up.weight has values"),
        (
            {f"{STEM}.lora_down.weight": DOWN.astype(np.float64) + 1e300, f"{STEM}.lora_up.weight": UP},
            {},
            "lora_down.weight has values",
        ),
        (
            {f"{PEFT}.lora_{x}.{y}.weight": t for x, t in (("A", DOWN), ("B", UP)) for y in ("a", "b")},
            {},
            "for one layer; keep one adapter in the file",
        ),
        (kohya("sdxl"), {}, r"attends to text of width 64; this model's has 32: use a LoRA for this model"),
        (
            {
                f"{STEM.replace('attn1', 'attn2')[:-1]}k.lora_{x}.weight": np.zeros(s, np.float32)
                for x, s in (("down", (4, 2048)), ("up", (32, 4)))
            },
            {},
            r"of width 2048 \(SDXL\); this model's has 32",
        ),
        (
            {f"{PEFT}.lora_A.weight": DOWN, f"{PEFT}.lora_B.weight": UP},
            {"lora_adapter_metadata": '{"unet.r": 4}'},
            "metadata gives no lora_alpha for unet, so the strength is unknown",
        ),
        (
            {f"{PEFT}.lora_A.weight": DOWN, f"{PEFT}.lora_B.weight": UP},
            {"lora_adapter_metadata": '{"text_encoder.r": 4, "text_encoder.lora_alpha": 4}'},
            "gives no lora_alpha for unet",
        ),
        (
            {f"{PEFT}.lora_A.weight": DOWN, f"{PEFT}.lora_B.weight": UP},
            {"lora_adapter_metadata": "{"},
            "is not valid JSON",
        ),
        (
            {f"{PEFT}.lora_A.weight": DOWN, f"{PEFT}.lora_B.weight": UP},
            {"lora_adapter_metadata": '{"unet.lora_alpha": 4, "unet.alpha_pattern": {"(": 1}}'},
            r"'\(' is not a pattern",
        ),
        (
            {f"{PEFT}.lora_A.weight": DOWN, f"{PEFT}.lora_B.weight": UP},
            {"lora_adapter_metadata": '{"unet.lora_alpha": 4, "unet.use_dora": true}'},
            r"is a DoRA \(use_dora\)",
        ),
        *(
            ({f"{PEFT}.lora_A.weight": DOWN, f"{PEFT}.lora_B.weight": UP}, {"lora_adapter_metadata": entries}, message)
            for entries, message in (
                ('{"unet.lora_alpha": NaN}', "lora_alpha of unet is nan, not a finite number; the file is broken"),
                ('{"lora_alpha": -Infinity}', "lora_alpha of unet is -inf, not a finite number"),
                ('{"unet.lora_alpha": 1e39}', "lora_alpha of unet is 1e.39, not a finite number"),
                (f'{{"unet.lora_alpha": 1{400 * "0"}}}', r"lora_alpha of unet is 10{39}, not a finite number"),
                ('{"unet.lora_alpha": true}', "lora_alpha of unet is True, not a finite number"),
                ('{"unet.lora_alpha": "8"}', "lora_alpha of unet is 8, not a finite number"),
                ('{"unet.lora_alpha": [8]}', r"lora_alpha of unet is \[8\], not a finite number"),
                ('{"unet.lora_alpha": null}', "gives no lora_alpha for unet"),
                ('{"unet.lora_alpha": 3e38, "unet.use_rslora": true}', "alpha of unet.down_.* is 6e.38, not a finite"),
                (
                    '{"unet.lora_alpha": 4, "unet.alpha_pattern": ["to_q"]}',
                    r"alpha_pattern of unet is \['to_q'\], not an obj",
                ),
                ('{"unet.lora_alpha": 4, "unet.alpha_pattern": {"to_q": NaN}}', "alpha_pattern 'to_q' is nan, not a"),
                (
                    '{"unet.lora_alpha": 4, "unet.alpha_pattern": {"other": {}}}',
                    r"'other' is \{\}, not a finite number",
                ),
                ('{"unet.lora_alpha": 4, "unet.alpha_pattern": {"(.*)*x": 4}}', r"'\(\.\*\)\*x' could take for ever"),
                ('{"unet.lora_alpha": 4, "unet.alpha_pattern": {".*.*.*.*x": 4}}', "could take for ever to match"),
                ('{"unet.lora_alpha": 4, "unet.use_rslora": "no"}', "use_rslora of unet is no, not true or false"),
                ("[1]", "lora_adapter_metadata holds a list, not a JSON object; save it again"),
                (100_000 * "[", "lora_adapter_metadata is not valid JSON .it is nested too deeply"),
            )
        ),
        *(
            (
                {f"{STEM}.lora_down.weight": DOWN, f"{STEM}.lora_up.weight": UP, f"{STEM}.alpha": alpha},
                {},
                rf"{STEM}.alpha is {shown}, not a finite number; the file is broken",
            )
            for alpha, shown in (
                (np.float32(np.nan), "nan"),
                (np.float16(np.inf), "inf"),
                (np.float64(1e300), "1e.300"),
                (np.bool_(True), "True"),
                (np.complex64(1 + 2j), r"\(1.2j\)"),
            )
        ),
        (
            {f"{STEM}.lora_down.weight": DOWN.astype(np.complex64), f"{STEM}.lora_up.weight": UP},
            {},
            "lora_down.weight is complex64; only floating-point",
        ),
        (
            {f"{STEM}.lora_down.weight": DOWN[:0], f"{STEM}.lora_up.weight": UP[:, :0]},
            {},
            f"{STEM}.lora_down.weight is of rank 0; the file is broken",
        ),
        ({f"{STEM}.oft_blocks": DOWN}, {}, r"is a rotation \(OFT\)"),
        ({f"{STEM}.a1.weight": DOWN}, {}, "is a GLoRA"),
        ({"bundle_emb.cat.clip_l": DOWN, "bundle_emb.dog.string_to_param.*": DOWN}, {}, r"alone \(cat, dog\), no LoRA"),
        (kohya(), {"lora_adapter_metadata": '{"unet.lora_alpha": 8}'}, "is 4.0 in its tensor and 8.0 in the metadata"),
        (
            {f"{STEM}.lora_down.weight": DOWN, f"{STEM}.lora_up.weight": UP},
            {"ss_network_alpha": "8"},
            r"trained with alpha 8 \(ss_network_alpha\) but 1 layers have no .alpha",
        ),
    ],
)
def test_files_that_are_refused(tensors, metadata, message, tmp_path):
    path = save(tmp_path / "x.safetensors", tensors, **metadata)
    with pytest.raises(LcmError, match=message) as caught:
        read_lora(path, modules_of(pipeline("sd1")))
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)


def test_unused_keys_can_be_ignored(tmp_path, caplog):
    """A file with a text encoder for a UNet alone, and keys of no layer."""
    modules = modules_of(pipeline("sd1"))
    text = tensors_of("kohya", factors(modules["text_encoder"], TEXT[:1]), 4.0, part="te")
    extra = text | {"lora_unet_nowhere.lora_down.weight": DOWN, "lora_unet_mid_block_attentions_9_proj_in.alpha": UP}
    path = save(tmp_path / "x.safetensors", kohya() | extra)
    with pytest.raises(LcmError, match=rf"{len(extra)} of \d+ keys match no layer"):
        read_lora(path, {"unet": modules["unet"]})
    with caplog.at_level("WARNING"):
        got = read_lora(path, {"unet": modules["unet"]}, ignore_unused=True)
    same_lora(got, read_lora(save(tmp_path / "y.safetensors", kohya()), modules))
    assert f"{len(extra)} of {len(kohya() | extra)} keys match no layer" in caplog.text


def test_bundled_embeddings_are_left_out_with_a_warning(tmp_path, caplog):
    modules = modules_of(pipeline("sdxl"))
    keys = ("cat.clip_l", "cat.clip_g", "a.dog.string_to_param.*", "bird.emb_params", "fish")
    plain = kohya("sdxl")
    path = save(tmp_path / "x.safetensors", plain | {f"bundle_emb.{key}": DOWN for key in keys})
    with caplog.at_level("WARNING"):
        got = read_lora(path, modules)
    same_lora(got, read_lora(save(tmp_path / "y.safetensors", plain), modules))
    assert f"{path} holds embeddings, too (a.dog, bird, cat, fish); they are left out" in caplog.text


@pytest.mark.parametrize(
    ("key", "why"),
    [
        (f"{STEM}.diff_b", "every factor does. What these change would be lost; set ignore_unused"),  # has no bias
        ("lora_unet_nowhere.w_norm", "every factor does"),
        (f"{STEM}.something", "every factor does"),
        ("lora_unet_nowhere.lora_up.weight", "is it for another architecture, or for parts .* Set ignore_unused"),
        ("control_model.input_blocks.1.1.proj_in.lora_up.weight", "is it for another architecture"),
        ("lora_controlnet_conv_in.lora_up.weight", "is it for another architecture"),
        ("lora_unet_down_blocks_0_resnets_0_norm1.lora_up.weight", "is it for another architecture"),  # not adapted
    ],
)
def test_an_unused_key_tells_what_would_be_lost(key, why, tmp_path):
    modules = modules_of(pipeline("sd1"))
    path = save(tmp_path / "x.safetensors", kohya() | {key: UP[:, 0]})
    with pytest.raises(LcmError, match=f"1 of .* keys match no layer of this model .{re.escape(key)}.; {why}"):
        read_lora(path, modules)
    same_lora(
        read_lora(path, modules, ignore_unused=True), read_lora(save(tmp_path / "y.safetensors", kohya()), modules)
    )


def test_other_containers_are_refused(tmp_path, monkeypatch):
    modules = modules_of(pipeline("sd1"))

    def refused(source, message):
        with pytest.raises(LcmError, match=message) as caught:
            read_lora(source, modules)
        assert "\n" not in str(caught.value)

    tensors = {key: torch.from_numpy(np.asarray(x)) for key, x in kohya().items()}
    pickled = tmp_path / "pytorch_lora_weights.bin"
    torch.save(tensors, pickled)
    refused(pickled, "is pickled, which can run code, and is not opened; convert it once, .* torch: python -c")
    refused(tmp_path, "is pickled")
    with pytest.raises(LcmError) as caught:
        read_lora(pickled, modules)
    exec(str(caught.value).split('"')[1], {})  # the conversion works
    assert len(read_lora(tmp_path, modules).parts["unet"]) == len(kohya()) // 3
    renamed = pickled.rename(tmp_path / "renamed.safetensors")
    refused(renamed, "is pickled")
    (tmp_path / "empty.safetensors").touch()
    refused(tmp_path / "empty.safetensors", r"\(0 bytes\) cannot be read as safetensors")
    (tmp_path / "short.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{}")
    refused(tmp_path / "short.safetensors", "cannot be read as safetensors")
    (tmp_path / "x.npz").write_bytes(b"\x93NUMPY\1\0")
    refused(tmp_path / "x.npz", "x.npz is not a .safetensors file")
    (tmp_path / "x.gguf").write_bytes(b"GGUF" + bytes(40))
    refused(tmp_path / "x.gguf", "is a GGUF file")
    refused(tmp_path / "nowhere.safetensors", "does not exist; give a .safetensors file, or owner/name/FILE")
    refused("runs/lora.safetensors", "does not exist; give a .safetensors file, or owner/name/FILE")
    (tmp_path / "two").mkdir()
    refused(tmp_path / "two", "holds no LoRA file")
    save(tmp_path / "two" / "a.safetensors", kohya())
    assert read_lora(tmp_path / "two", modules).parts.keys() == {"unet"}
    save(tmp_path / "two" / "b.safetensors", kohya())
    refused(tmp_path / "two", "holds a.safetensors, b.safetensors; name one of them")

    def snapshot_download(repository, *, allow_patterns, revision=None):
        assert repository == "owner/name"
        revisions.append(revision)
        asked.append(allow_patterns)
        return tmp_path / "two"

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda repository, file, revision: tmp_path / "two" / file)
    asked, revisions = [], []
    refused("owner/name", "name one of them")
    assert read_lora("owner/name/b.safetensors", modules).parts.keys() == {"unet"}
    # As peft saves one: its config has the alpha.
    files = [lora_files.FILE_NAME, "adapter_model.safetensors", "adapter_config.json"]
    assert asked == [files]
    save(tmp_path / "two" / files[1], tensors_of("peft", factors(modules["unet"], ATTENTION), part="base_model.model"))
    refused("owner/name", "adapter_config.json is missing")
    (tmp_path / "two" / files[2]).write_text('{"lora_alpha": 6}')
    for source in ("owner/name", "owner/name/adapter_model.safetensors"):
        assert set(read_lora(source, modules).scales("unet").values()) == {1.5}
    assert asked == [files] * 3 + [["*adapter_config.json"]]
    read_lora("https://hf.co/owner/name/blob/refs%2Fpr%2F1/adapter_model.safetensors", modules)
    assert revisions == [None] * 4 + ["refs/pr/1"], "else the config is that of another revision"
