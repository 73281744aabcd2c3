"""Keys of LoRA files: every spelling finds its layer; files for other models, or of other kinds, are refused."""

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
    table = lora_keys.spellings({"unet": unet})
    for n, original in lora_keys.sgm_names(unet).items():
        if n in lora_keys.layers(unet):
            assert table[lora_keys.underscored(n)].name == table[lora_keys.underscored(original)].name == n


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
PEFT = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"


@pytest.mark.parametrize(
    ("tensors", "metadata", "message"),
    [
        ({}, {}, "holds no tensors; download or save it again"),
        ({"conv_in.weight": DOWN}, {}, r"holds no LoRA: none of its 1 keys \(conv_in.weight\) is a factor"),
        ({f"{STEM}.hada_w1_a": DOWN}, {}, rf"is a LoHa \({STEM}.hada_w1_a\), which is not supported"),
        ({f"{STEM}.lokr_w1": DOWN}, {}, "is a LoKr"),
        (kohya(**{f"{STEM}.dora_scale": UP}), {}, "is a DoRA"),
        ({f"{PEFT}.lora_magnitude_vector": UP}, {}, "is a DoRA"),
        (kohya(**{f"{STEM}.lora_mid.weight": DOWN}), {}, "is a LoCon with CP decomposition"),
        (
            kohya(**{f"lora_unet_a_{i:02}.alpha": np.float32(1) for i in range(12)}),
            {},
            r"12 of \d+ keys match no layer of this model \(lora_unet_a_00.alpha, .*_09.alpha, and 2 more\); is it for",
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
        ({f"{PEFT}.lora_A.weight": DOWN, f"{PEFT}.lora_B.weight": UP}, {"lora_adapter_metadata": "{"}, "is not JSON"),
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
    exec(str(caught.value).split('python -c "')[1].removesuffix('"'), {})  # the conversion works
    assert len(read_lora(tmp_path, modules).parts["unet"]) == len(kohya()) // 3
    renamed = pickled.rename(tmp_path / "renamed.safetensors")
    refused(renamed, "is pickled")
    (tmp_path / "empty.safetensors").touch()
    refused(tmp_path / "empty.safetensors", r"\(0 bytes\) cannot be read as safetensors")
    (tmp_path / "short.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{}")
    refused(tmp_path / "short.safetensors", "cannot be read as safetensors")
    (tmp_path / "x.npz").write_bytes(b"something")
    refused(tmp_path / "x.npz", "x.npz is not a .safetensors file")
    refused(tmp_path / "nowhere.safetensors", "does not exist; give a .safetensors file, or owner/name/FILE")
    refused("runs/lora.safetensors", "does not exist; give a .safetensors file, or owner/name/FILE")
    (tmp_path / "two").mkdir()
    refused(tmp_path / "two", "holds no LoRA file")
    save(tmp_path / "two" / "a.safetensors", kohya())
    assert read_lora(tmp_path / "two", modules).parts.keys() == {"unet"}
    save(tmp_path / "two" / "b.safetensors", kohya())
    refused(tmp_path / "two", "holds a.safetensors, b.safetensors; name one of them")

    def snapshot_download(repository, *, allow_patterns):
        assert (repository, allow_patterns) == ("owner/name", [lora_files.FILE_NAME])
        return tmp_path / "two"

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda repository, file, revision: tmp_path / "two" / file)
    refused("owner/name", "name one of them")
    assert read_lora("owner/name/b.safetensors", modules).parts.keys() == {"unet"}
