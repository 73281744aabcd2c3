"""LoRA files: what diffusers and peft load gives the same model here; what is written here, they load."""

import functools
import hashlib
import json
import struct

import diffusers
import family
import jax
import jax.numpy as jnp
import numpy as np
import parity
import peft
import pytest
import safetensors.numpy
import tiny
import torch
from diffusers.utils import convert_state_dict_to_diffusers
from lora_kit import ATTENTION, TEXT, factors, file_keys, pipeline, same_lora, save, tensors_of

from lcm_jax.errors import LcmError
from lcm_jax.models import lora
from lcm_jax.models import unet as unet_lib
from lcm_jax.pretrained import load_pipeline, lora_files, lora_keys, names, safetensors_io
from lcm_jax.pretrained.lora_files import merge_into, modules_of, read_lora, write_lora


@functools.cache
def torch_pipeline(name):
    kind = diffusers.StableDiffusionXLPipeline if name == "sdxl" else diffusers.StableDiffusionPipeline
    options = {} if name == "sdxl" else {"safety_checker": None}
    pipe = kind.from_pretrained(tiny.folder(name), **options)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def oracle():
    """name -> diffusers' pipeline, whose adapters are removed afterwards."""
    used = []

    def get(name):
        used.append(torch_pipeline(name))
        return used[-1]

    yield get
    for pipe in used:
        pipe.unload_lora_weights()


@functools.cache
def inputs(name):
    unet, generator = pipeline(name).unet, np.random.default_rng(5)
    side, width = 8, unet.per_level("cross_attention_dim")[0]
    x = generator.normal(size=(1, side, side, 4)).astype(np.float32)
    text = generator.normal(size=(1, 7, width)).astype(np.float32)
    added = None
    if unet.addition_embed_type:
        sizes = np.array([[64, 64, 0, 0, 64, 64]], np.float32)
        added = {"text_embeds": generator.normal(size=(1, 32)).astype(np.float32), "time_ids": sizes}
    return x, np.array([321.0], np.float32), text, added


@functools.cache
def compiled(name):
    x, t, text, added = inputs(name)
    return jax.jit(lambda params: pipeline(name).unet.apply({"params": params}, x, t, text, None, added))


def ours(name, params):
    return np.asarray(compiled(name)(params))


def theirs(name, unet):
    x, t, text, added = inputs(name)
    added = added and {key: torch.from_numpy(value) for key, value in added.items()}
    x = torch.from_numpy(x).permute(0, 3, 1, 2)
    out = tiny.in_float64(unet, x, torch.from_numpy(t), torch.from_numpy(text), added_cond_kwargs=added).sample
    return out.permute(0, 2, 3, 1).numpy()


def agree(name, mine, other):
    """The UNets' outputs are equal but for rounding, and far from the base's."""
    got, wanted = ours(name, mine["unet"]), theirs(name, other)
    parity.close(got, wanted, rtol=0, of_max=4 * parity.NETWORK)  # adapters at twice their rank's strength amplify
    assert np.abs(got - ours(name, tiny.loaded(name)[1]["unet"])).max() > 0.05


SGM_OUTSIDE = (
    "conv_in",
    "conv_out",
    "time_embedding.linear_1",
    "time_embedding.linear_2",
    "add_embedding.linear_1",
    "add_embedding.linear_2",
)


def everything(form, name, path, seed=0, rank=4, alpha=None):
    """A file of one format for the UNet of `name`, with every layer that diffusers can read in that format."""
    unet = pipeline(name).unet
    targets = {"processors": ATTENTION, "sgm": lora.DEFAULT_TARGETS + SGM_OUTSIDE}.get(form, lora.DEFAULT_TARGETS)
    found = factors(unet, targets, rank, seed)
    return save(path, tensors_of(form, found, alpha, original=lora_keys.sgm_names(unet)))


MARKED = {
    "sd-scripts": ({"modelspec.prediction_type": "v"}, (), True),
    "its flags": ({"ss_v_parameterization": "True"}, (), True),
    "its zero SNR": ({"ss_zero_terminal_snr": "True"}, (), True),
    "keys": ({}, ("v_pred", "ztsnr"), True),
    "the same noise": ({"modelspec.prediction_type": "epsilon", "ss_zero_terminal_snr": "False"}, (), False),
    "nothing": ({}, (), False),
    "unknown": ({"modelspec.prediction_type": "flow"}, (), True),
}


@pytest.mark.parametrize("case", MARKED)
def test_a_lora_for_other_noise_is_merged_with_a_warning(tmp_path, monkeypatch, case):
    logged = []
    monkeypatch.setattr(lora_files.logging, "warning", lambda text, *args: logged.append(text % args))
    header, keys, warned = MARKED[case]
    base = pipeline("sd1")
    tensors = tensors_of("kohya", factors(base.unet, ("to_q",)), 2.0)
    marks = {key: np.zeros(0, np.float32) for key in keys}
    path = save(tmp_path / "marked.safetensors", tensors | marks, **header)
    read = read_lora(path, modules_of(base))
    merge_into(*tiny.loaded("sd1"), [(read, 1.0)])
    same_lora(read, read_lora(save(tmp_path / "plain.safetensors", tensors), modules_of(base)))
    assert len(logged) == warned and all(str(path) in text for text in logged)


@pytest.mark.parametrize(
    ("name", "form", "alpha"),
    [
        ("sd1", "diffusers", None),
        ("sd1", "processors", None),
        ("sd1", "kohya", 2.0),
        ("sdxl", "kohya", 8.0),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (("sd1", "peft", None), ("sd2", "kohya", None), ("sdxl", "peft", None), ("sdxl", "sgm", 3.0))
        ),
    ],
)
def test_one_file_gives_the_model_that_diffusers_gives(name, form, alpha, tmp_path, oracle):
    path = everything(form, name, tmp_path / "x.safetensors", alpha=alpha)
    pipe = oracle(name)
    pipe.load_lora_weights(str(tmp_path), weight_name=path.name)
    merged = merge_into(*tiny.loaded(name), [(read_lora(path, modules_of(pipeline(name))), 1.0)])
    agree(name, merged, pipe.unet)


@pytest.mark.parametrize("name", [pytest.param("sd1", marks=pytest.mark.slow), "sdxl"])
def test_adapters_add_up_as_in_diffusers(name, tmp_path, oracle):
    """Two and three files of different ranks, formats and alphas; one weight is negative."""
    pipe, base = oracle(name), pipeline(name)
    forms = [("kohya", 4, 2.0), ("peft", 3, None), ("sgm" if name == "sdxl" else "processors", 7, None)]
    loras, adapters, weights = [], [], [0.8, 1.0, -0.6]
    for i, (form, rank, alpha) in enumerate(forms):
        path = everything(form, name, tmp_path / f"{i}.safetensors", i, rank, alpha)
        pipe.load_lora_weights(str(tmp_path), weight_name=path.name, adapter_name=f"a{i}")
        loras.append(read_lora(path, modules_of(base)))
        adapters.append(f"a{i}")
        if i:
            pipe.set_adapters(adapters, weights[: i + 1])
            agree(name, merge_into(*tiny.loaded(name), list(zip(loras, weights, strict=False))), pipe.unet)


def test_what_diffusers_saves_is_read_exactly(tmp_path):
    """UNet and text encoder of `save_lora_weights`: alphas in its metadata, also ranks and alphas from patterns."""
    base, parts = pipeline("sd1"), {}
    patterns = dict(rank_pattern={"conv1": 2, ".*attn2.to_q": 5}, alpha_pattern={"down_blocks.0.resnets.0.conv1": 3})
    options = dict(init_lora_weights=False)
    unet = peft.LoraConfig(r=4, lora_alpha=6, target_modules=list(lora.DEFAULT_TARGETS), **patterns, **options)
    text = peft.LoraConfig(r=3, lora_alpha=9, target_modules=list(TEXT), use_rslora=True, **options)
    for part, config in (("unet", unet), ("text_encoder", text)):
        pipe = diffusers.StableDiffusionPipeline.from_pretrained(tiny.folder("sd1"), safety_checker=None)
        model = getattr(pipe, part)
        torch.manual_seed(7)
        model.add_adapter(config)
        parts[part] = model
    state = {part: peft.get_peft_model_state_dict(model, adapter_name="default") for part, model in parts.items()}
    diffusers.StableDiffusionPipeline.save_lora_weights(
        tmp_path,
        unet_lora_layers=convert_state_dict_to_diffusers(state["unet"]),
        text_encoder_lora_layers=convert_state_dict_to_diffusers(state["text_encoder"]),
        unet_lora_adapter_metadata=parts["unet"].peft_config["default"].to_dict(),
        text_encoder_lora_adapter_metadata=parts["text_encoder"].peft_config["default"].to_dict(),
    )
    got = read_lora(tmp_path, modules_of(base))
    assert got.parts.keys() == {"unet", "text_encoder"}
    for part, model in parts.items():
        table = lora_keys.layers(getattr(base, part))
        layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, peft.tuners.lora.LoraLayer)}
        assert len(layers) == len(got.parts[part])
        for name, layer in layers.items():
            kernel = table[name if name in table else f"text_model.{name}"]
            found = got.parts[part][kernel.path[:-1]]
            a, b = (x["default"].weight.detach().numpy() for x in (layer.lora_A, layer.lora_B))
            np.testing.assert_array_equal(found.lora_A, a.transpose(2, 3, 1, 0) if a.ndim == 4 else a.T)
            np.testing.assert_array_equal(found.lora_B, b.transpose(2, 3, 1, 0) if b.ndim == 4 else b.T)
            assert found.scale == pytest.approx(layer.scaling["default"], rel=1e-12)
    scales = {f.scale for f in got.parts["unet"].values()}
    assert scales == {6 / 4, 6 / 2, 3 / 2, 6 / 5}
    merged = merge_into(*tiny.loaded("sd1"), [(got, 1.0)])
    agree("sd1", merged, parts["unet"])
    texts_agree("sd1", merged, parts["text_encoder"], "text_encoder")


@functools.cache
def text_compiled(name, part):
    module = getattr(pipeline(name), part)
    return jax.jit(lambda params, ids: module.apply({"params": params}, ids))


def texts_agree(name, merged, other, part):
    ids = np.array([[0, 5, 6, 9, len(tiny.vocabulary()[0]) - 1]])
    got = text_compiled(name, part)(merged[part], ids)
    wanted = tiny.in_float64(other, torch.from_numpy(ids), output_hidden_states=True)
    base = text_compiled(name, part)(tiny.loaded(name)[1][part], ids)
    parity.close(got.last_hidden_state, wanted.last_hidden_state, rtol=0, of_max=parity.NETWORK)
    parity.close(got.hidden_states[-2], wanted.hidden_states[-2], rtol=0, of_max=parity.NETWORK)
    if hasattr(wanted, "text_embeds"):
        parity.close(got.pooled, wanted.text_embeds, rtol=0, of_max=parity.NETWORK)
    assert np.abs(got.last_hidden_state - base.last_hidden_state).max() > 0.05


@pytest.mark.parametrize(
    ("name", "form"),
    [
        pytest.param(name, form, marks=() if name == "sdxl" or form == "kohya" else pytest.mark.slow)
        for name in ("sd1", "sd2", "sdxl")
        for form in ("peft", "diffusers", "kohya")
    ],
)
def test_text_encoders(name, form, tmp_path, oracle):
    """UNet and text encoders in one file, with `text_model.` and, as in newer transformers, without."""
    base, pipe = pipeline(name), oracle(name)
    flat, full = {}, {}
    for part, module in modules_of(base).items():
        found = factors(module, ATTENTION if part == "unet" else TEXT, seed=len(part))
        kohya = {"unet": "unet", "text_encoder": "te1" if name == "sdxl" else "te", "text_encoder_2": "te2"}[part]
        options = (2.0, kohya) if form == "kohya" else (None, part)
        full |= tensors_of(form, found, *options)
        flat |= tensors_of(form, {key.removeprefix("text_model."): f for key, f in found.items()}, *options)
    got = read_lora(save(tmp_path / "flat.safetensors", flat), modules_of(base))
    same_lora(got, read_lora(save(tmp_path / "full.safetensors", full), modules_of(base)))
    pipe.load_lora_weights(str(tmp_path), weight_name="full.safetensors")  # diffusers needs `text_model.`
    merged = merge_into(*tiny.loaded(name), [(got, 0.7)])
    pipe.set_adapters(pipe.get_list_adapters()["unet"], 0.7)
    agree(name, merged, pipe.unet)
    for part in modules_of(base).keys() - {"unet"}:
        texts_agree(name, merged, getattr(pipe, part), part)


def random_adapters(name, rank=4):
    """(UNet, random adapters of the default layers)."""
    unet, generator = pipeline(name).unet, np.random.default_rng(3)
    shapes = jax.eval_shape(lambda p: lora.init(jax.random.key(0), p, rank), tiny.loaded(name)[1]["unet"])
    return unet, jax.tree.map(lambda x: (0.1 * generator.normal(size=x.shape)).astype(np.float32), shapes)


@pytest.mark.parametrize("form", lora_files.FORMATS)
@pytest.mark.parametrize(("name", "dtype"), [("sd1", np.float32), ("sd1", jnp.bfloat16), ("sdxl", np.float16)])
def test_a_round_trip_is_exact(name, form, dtype, tmp_path):
    unet, tree = random_adapters(name)
    path = write_lora(tmp_path / "new" / "x.safetensors", tree, unet, alpha=8, rank=4, format=form, dtype=dtype)
    got = read_lora(path, {"unet": unet})
    wanted = jax.tree.map(lambda x: np.asarray(x).astype(dtype).astype(np.float32), tree)
    jax.tree.map(np.testing.assert_array_equal, got.tree("unet"), wanted)
    assert set(got.scales("unet").values()) == {2.0} and set(got.scales("unet", 0.5).values()) == {1.0}
    stored = safetensors.numpy.load_file(path)
    assert {x.dtype for x in stored.values()} == {np.dtype(dtype)}
    assert {key: x.shape for key, x in stored.items()} == lora_files.file_shapes(tree, unet, form)
    assert [p.name for p in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize(("name", "form"), [("sd1", "kohya"), ("sd2", "peft"), ("sdxl", "kohya"), ("sdxl", "peft")])
def test_what_is_written_loads_in_diffusers(name, form, tmp_path, oracle):
    unet, tree = random_adapters(name)
    options = dict(dtype=np.float32, metadata={"modelspec.title": "x"})
    path = write_lora(tmp_path / "x.safetensors", tree, unet, alpha=2.5, rank=4, format=form, **options)
    with safetensors.safe_open(path, "np") as handle:
        assert handle.metadata()["modelspec.title"] == "x" and handle.metadata()["format"] == "pt"
    pipe = oracle(name)
    pipe.load_lora_weights(str(tmp_path), weight_name=path.name)
    params = lora.merge(tiny.loaded(name)[1]["unet"], [(tree, 2.5 / 4)])
    parity.close(ours(name, params), theirs(name, pipe.unet), rtol=0, of_max=parity.NETWORK)
    read = merge_into(*tiny.loaded(name), [(read_lora(path, {"unet": unet}), 1.0)])
    jax.tree.map(np.testing.assert_array_equal, read["unet"], params)


def abstract_adapters(name, rank=64):
    unet = unet_lib.from_config(family.UNETS[name])
    shapes = names.abstract_params(unet)
    return unet, jax.eval_shape(lambda key: lora.init(key, shapes, rank), jax.random.key(0))


def header_of(shapes):
    """The header that safetensors writes for these shapes in float16."""
    header, position = {"__metadata__": {"format": "pt"}}, 0
    for key, shape in shapes.items():
        end = position + 2 * int(np.prod(shape, dtype=np.int64))
        header[key] = {"dtype": "F16", "shape": list(shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(header, separators=(",", ":")).encode()
    return text + b" " * (-len(text) % 8), position


def test_the_published_lcm_lora_has_our_keys_and_shapes():
    """`lcm-lora-sdv1-5`: 834 tensors; the length and hash of its header and the size of the file are public."""
    unet, tree = abstract_adapters("sd15")
    shapes = lora_files.file_shapes(tree, unet)
    header, data = header_of(shapes)
    assert len(shapes) == 834 and sum(key.endswith(".alpha") for key in shapes) == 278
    assert len(header) == 116_544 and hashlib.sha256(header).hexdigest().startswith("3ca15dde66470e73")
    assert 8 + len(header) + data == 134_621_556
    assert shapes["lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight"] == (64, 320, 1, 1)
    assert shapes["lora_unet_down_blocks_0_attentions_0_proj_in.lora_up.weight"] == (320, 64, 1, 1)
    assert shapes["lora_unet_down_blocks_0_resnets_0_conv1.lora_down.weight"] == (64, 320, 3, 3)


@pytest.mark.parametrize(
    ("name", "tensors", "size"),
    [("sdxl", 2364, 393_854_624), pytest.param("ssd-1b", 1269, 209_991_222, marks=pytest.mark.slow)],
)
def test_the_published_lcm_loras_of_sdxl_have_our_layers_and_shapes(name, tensors, size):
    """They have diffusers' names and ours those of the original UNet; the sizes of their files are public."""
    unet, tree = abstract_adapters(name)
    ours = lora_files.file_shapes(tree, unet)
    spelled = {lora_keys.underscored(new): lora_keys.underscored(old) for old, new in lora_keys.sgm_names(unet).items()}
    published = {spelled[key.split(".")[0]] + "." + key.split(".", 1)[1]: shape for key, shape in ours.items()}
    header, data = header_of(dict(sorted(published.items())))
    assert len(published) == tensors and 8 + len(header) + data == size
    assert not ours.keys() & published.keys()

    def found(shapes):
        layers = lora_keys.match(name, shapes, {"unet": unet}, False)
        return {layer: {role: shapes[key] for role, key in keys.items()} for layer, keys in layers.items()}

    assert found(ours) == found(published)
    assert len(lora_files.file_shapes(tree, unet, "peft")) == tensors * 2 // 3


def test_the_header_in_a_file_is_that_header(tmp_path):
    """A file from `write_lora` begins with the header of `header_of`, which is safetensors' own, but for the digest."""
    unet, tree = random_adapters("sd1")
    data = write_lora(tmp_path / "x.safetensors", tree, unet, alpha=4, rank=4).read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + length])
    assert header["__metadata__"].pop(safetensors_io.HASH) == f"0x{hashlib.sha256(data[8 + length :]).hexdigest()}"
    wanted = json.loads(header_of(lora_files.file_shapes(tree, unet))[0])
    assert [*header.items()] == [*wanted.items()]


def test_a_single_model_saved_by_diffusers(tmp_path):
    unet = diffusers.UNet2DConditionModel.from_pretrained(tiny.folder("sd1") / "unet")
    unet.add_adapter(peft.LoraConfig(r=2, lora_alpha=3, target_modules=["to_q"], init_lora_weights=False))
    unet.save_lora_adapter(tmp_path)
    got = read_lora(tmp_path, modules_of(pipeline("sd1")))
    assert set(got.scales("unet").values()) == {1.5}
    agree("sd1", merge_into(*tiny.loaded("sd1"), [(got, 1.0)]), unet)


def test_mixed_ranks_and_alphas_and_the_missing_ones(tmp_path):
    """Oracle: W + weight * alpha / rank * B A of each layer in float64; alpha is the rank if it is missing."""
    base, params = tiny.loaded("sd1")
    found = factors(base.unet, rank_of=lambda name: 2 + len(name) % 4)
    tensors, alphas = tensors_of("kohya", found), {}
    for i, name in enumerate(found):
        if i % 3:
            alphas[name] = 0.5 * (i % 7 + 1)
            tensors[file_keys("kohya", name)[2]] = np.full([1] * (i % 2), alphas[name], np.float16)
    got = read_lora(save(tmp_path / "x.safetensors", tensors), modules_of(base))
    merged = merge_into(base, params, [(got, 0.8)])
    got, before = (names.to_torch(base.unet, p["unet"]) for p in (merged, params))
    for key, value in before.items():
        name = key.removesuffix(".weight")
        if name not in found or key.endswith(".bias"):
            np.testing.assert_array_equal(got[key], value)
            continue
        a, b = (x.astype(np.float64) for x in found[name])
        rank = len(a)
        delta = np.tensordot(b.reshape(-1, rank), a, 1) * 0.8 * alphas.get(name, rank) / rank
        parity.close(got[key], value + delta, atol=2e-6)


def test_1x1_layers_in_either_form(tmp_path):
    """SD 1's projections are 1x1 convolutions, SDXL's are linear: both can be stored as [r i] and [r i 1 1]."""
    for name in ("sd1", "sdxl"):
        modules = modules_of(pipeline(name))
        found = factors(modules["unet"], ("proj_in", "proj_out", "conv_shortcut", "to_q"))
        flat = {n: tuple(x.reshape(x.shape[:2]) for x in f) for n, f in found.items()}
        full = {n: tuple(x.reshape(*x.shape[:2], 1, 1) for x in f) for n, f in found.items()}
        one, two, three = (
            read_lora(save(tmp_path / f"{name}{i}.safetensors", tensors_of("kohya", f)), modules)
            for i, f in enumerate((found, flat, full))
        )
        same_lora(one, two)
        same_lora(one, three)


def test_a_third_factor_between_the_two(tmp_path):
    """LyCORIS' Tucker form. Oracle: sum over p, q of B[o p] M[p q kh kw] A[q i], beside a convolution without it."""
    base, params = tiny.loaded("sd1")
    found = factors(base.unet, ("conv1", "conv2"), rank=3)
    tensors, generator = tensors_of("kohya", found, 6.0), np.random.default_rng(2)
    before, wanted = names.to_torch(base.unet, params["unet"]), {}
    for name, (a, b) in found.items():
        delta = np.einsum("opxy,pikl->oikl", b, a)
        if name.endswith("conv1"):
            mid = generator.normal(size=(3, 3, *a.shape[2:])).astype(np.float32)
            stem, down = lora_keys.underscored(name), a[..., :1, :1]
            tensors |= {f"{stem}.lora_down.weight": down, f"{stem}.lora_mid.weight": mid}
            delta = np.einsum("opxy,pqkl,qiuv->oikl", b, mid, down)
        wanted[f"{name}.weight"] = before[f"{name}.weight"] + 0.5 * 6 / 3 * delta
    got = read_lora(save(tmp_path / "x.safetensors", tensors), modules_of(base))
    merged = names.to_torch(base.unet, merge_into(base, params, [(got, 0.5)])["unet"])
    for key, value in merged.items():
        parity.close(value, wanted.get(key, before[key]), atol=5e-6)


def test_what_a_file_adds_without_factors(tmp_path, caplog):
    """Norms, biases and whole matrices of LyCORIS, peft and ComfyUI. Oracle: torch tensors plus weight * difference."""
    base, params = tiny.loaded("sd1")
    generator, found = np.random.default_rng(1), factors(base.unet, ("conv1", "proj_in"), rank=2)
    stem, conv, norm = "down_blocks.0.attentions.0.", "down_blocks.0.resnets.0.conv1", "down_blocks.0.resnets.0.norm1"
    before = {part: names.to_torch(module, params[part]) for part, module in modules_of(base).items()}
    wanted = {part: {key: x.astype(np.float64) for key, x in state.items()} for part, state in before.items()}
    tensors = tensors_of("kohya", found, 6.0)
    for name, (a, b) in found.items():
        delta = np.tensordot(b.reshape(-1, 2).astype(np.float64), a, 1)
        wanted["unet"][f"{name}.weight"] += 0.5 * 6 / 2 * delta

    def add(key, part, target, scale=1.0):
        tensors[key] = (0.1 * generator.normal(size=before[part][target].shape)).astype(np.float32)
        wanted[part][target] += 0.5 * scale * tensors[key]

    add(f"{lora_keys.underscored(norm)}.w_norm", "unet", f"{norm}.weight")
    add(f"{lora_keys.underscored(norm)}.b_norm", "unet", f"{norm}.bias")
    add(f"unet.{stem}proj_in.lora_B.bias", "unet", f"{stem}proj_in.bias", scale=6 / 2)
    add(f"{lora_keys.underscored(conv)}.diff", "unet", f"{conv}.weight")  # beside factors
    add(f"{lora_keys.underscored(conv)}.diff_b", "unet", f"{conv}.bias")
    add("diffusion_model.out.0.diff", "unet", "conv_norm_out.weight")
    add("diffusion_model.time_embed.0.diff", "unet", "time_embedding.linear_1.weight")
    text = "text_model.embeddings.token_embedding"
    rows, features = before["text_encoder"][f"{text}.weight"].shape
    a, b = (generator.normal(size=shape).astype(np.float32) for shape in ((3, features), (rows, 3)))
    stem = "text_encoders.clip_l.transformer."
    tensors |= {f"{stem}{text}.lora_down.weight": a, f"{stem}{text}.lora_up.weight": b}
    wanted["text_encoder"][f"{text}.weight"] += 0.5 * b @ a
    projection = np.zeros((features, 2), np.float32)  # ComfyUI has one, which nothing uses
    tensors |= {f"{stem}text_projection.lora_{x}.weight": projection for x in ("up", "down")}
    add(f"{stem}text_model.final_layer_norm.diff_b", "text_encoder", "text_model.final_layer_norm.bias")
    with caplog.at_level("WARNING"):
        got = read_lora(save(tmp_path / "x.safetensors", tensors), modules_of(base))
    assert not caplog.text
    merged = merge_into(base, params, [(got, 0.5)])
    for part, module in modules_of(base).items():
        for key, value in names.to_torch(module, merged[part]).items():
            if (wanted[part][key] == before[part][key]).all():
                np.testing.assert_array_equal(value, before[part][key])
            parity.close(value, wanted[part][key], atol=2e-6)
    bad = tensors | {f"{lora_keys.underscored(norm)}.w_norm": np.full(3, np.nan, np.float32)}
    with pytest.raises(LcmError, match=r"norm1.w_norm \[3\] for \[32\]"):
        read_lora(save(tmp_path / "bad.safetensors", bad), modules_of(base))
    bad = tensors | {f"{lora_keys.underscored(norm)}.w_norm": np.full(32, np.nan, np.float32)}
    with pytest.raises(LcmError, match="norm1.w_norm has values that are not finite"):
        read_lora(save(tmp_path / "bad.safetensors", bad), modules_of(base))


def test_alphas_of_any_kind_of_number(tmp_path, caplog):
    """Integers and negative ones count; 0 leaves its layers as they are, with a warning; half precision is rounded."""
    base = pipeline("sd1")
    found = factors(base.unet, ("attn2.to_q",))
    for alpha, scale, warned in (
        (np.int64(2), 0.5, ""),
        (np.float16(-2), -0.5, ""),
        (np.float32(0), 0, "alpha is 0 for"),
    ):
        caplog.clear()
        tensors = tensors_of("kohya", found) | {file_keys("kohya", name)[2]: alpha for name in found}
        with caplog.at_level("WARNING"):
            got = read_lora(save(tmp_path / "x.safetensors", tensors), modules_of(base))
        assert set(got.scales("unet").values()) == {scale} and (warned in caplog.text if warned else not caplog.text)
    tensors = tensors_of("kohya", found) | {file_keys("kohya", name)[2]: np.float16(0.1) for name in found}
    config = {"lora_adapter_metadata": '{"unet.lora_alpha": 0.1}'}
    got = read_lora(save(tmp_path / "x.safetensors", tensors, **config), modules_of(base))
    assert set(got.scales("unet").values()) == {0.1 / 4}


def test_merging_is_pure_and_keeps_the_dtype(tmp_path):
    base, params = load_pipeline(tiny.folder("sd1"), param_dtype=jnp.bfloat16)
    before = jax.tree.map(np.copy, params)
    path = everything("kohya", "sd1", tmp_path / "x.safetensors", alpha=1.0)
    got = read_lora(path, modules_of(base))
    merged = merge_into(base, params, [(got, 0.5), (got, 0.5)])
    jax.tree.map(np.testing.assert_array_equal, params, before)
    assert merged["text_encoder"] is params["text_encoder"] and merged["vae"] is params["vae"]
    changed = jax.tree.map(lambda x, y: bool((x != y).any()), merged["unet"], params["unet"])
    assert sum(jax.tree.leaves(changed)) == len(got.parts["unet"])
    assert {leaf.dtype for leaf in jax.tree.leaves(merged["unet"])} == {np.dtype(jnp.bfloat16)}
    assert merge_into(base, params, [])["unet"] is params["unet"]


LINEAR = {"lora_A": np.full((32, 4), 1e6, np.float32), "lora_B": np.zeros((4, 128), np.float32)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(format="a1111"), "unknown LoRA format 'a1111'; choose one of kohya, peft"),
        (dict(dtype=np.float64), "cannot be written as float64"),
        (dict(rank=8), r"is of rank 4, not 8; give the rank that was trained"),
        (dict(alpha=0), "LoRA alpha 0 must be positive"),
        (dict(alpha=1e6), "alpha has values that are not finite in float16"),
        (dict(tree={}), "there are no adapters to write"),
        (dict(tree={"nowhere": LINEAR}), "the adapter nowhere fits no layer of this UNet; use the UNet"),
        (dict(tree={"conv_in": LINEAR}), r"adapter conv_in: shapes \[32, 4\], \[4, 128\] on a kernel \[3, 3, 4, 32\]"),
        (
            dict(tree={"time_embedding": {"cond_proj": LINEAR}}, unet=unet_lib.from_config(tiny.UNETS["lcm"])),
            "diffusers cannot read kohya's name of time_embedding.cond_proj; write format='peft'",
        ),
        (
            dict(tree={"time_embedding": {"linear_1": LINEAR}}),
            "lora_down.weight has values that are not finite in float16",
        ),
    ],
)
def test_what_cannot_be_written(change, message, tmp_path):
    unet, tree = random_adapters("sd1")
    options = dict(tree=tree, unet=unet, alpha=4, rank=4) | change
    with pytest.raises(LcmError, match=message):
        write_lora(tmp_path / "x.safetensors", **options)
    assert not any(tmp_path.iterdir())


def test_merging_refuses(tmp_path):
    base = pipeline("sdxl")
    found = factors(base.text_encoder_2, TEXT[:1])
    path = save(tmp_path / "x.safetensors", tensors_of("peft", found, part="text_encoder_2"))
    got = read_lora(path, modules_of(base))
    with pytest.raises(LcmError, match="the LoRA adapts a text_encoder_2, which this model does not have"):
        merge_into(*tiny.loaded("sd1"), [(got, 1.0)])
    for delta in ({("nowhere", "bias"): np.zeros(32)}, {("conv_out", "bias"): np.zeros(32)}):
        with pytest.raises(LcmError, match="1 LoRA adapters match none of the model's parameters"):
            lora.merge(tiny.loaded("sd1")[1]["unet"], [], [(delta, 1.0)])
    with pytest.raises(LcmError, match="LoRA weight nan is not finite"):
        merge_into(*tiny.loaded("sdxl"), [(got, float("nan"))])
    sd1 = pipeline("sd1")
    path = save(tmp_path / "huge.safetensors", tensors_of("kohya", factors(sd1.unet), alpha=1e38))
    huge = read_lora(path, modules_of(sd1))
    for lora_file, weight in ((huge, 100.0), (huge, 1e300)):
        with pytest.raises(LcmError, match=r"add what is not finite to .*/kernel of unet; use smaller weights"):
            merge_into(*tiny.loaded("sd1"), [(lora_file, weight)])
