"""Intercepted and merged adapters against peft's on torch UNets; which layers the default targets adapt."""

import functools
import math

import family
import jax
import jax.numpy as jnp
import numpy as np
import parity
import pytest
import tiny
import torch
from diffusers import UNet2DConditionModel
from flax import linen as nn
from flax import traverse_util
from peft import LoraConfig

from lcm_jax.errors import LcmError
from lcm_jax.models import lora
from lcm_jax.models.unet import from_config
from lcm_jax.pretrained import names

RANK, ALPHA = 4, 6.0
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})  # compiles sooner


def peft_unet(kind: str, seed: int = 5, targets=lora.DEFAULT_TARGETS) -> UNet2DConditionModel:
    """A torch UNet of `tiny.UNETS` with its random weights, and random A and B from `seed` at `targets`."""
    unet = tiny.randomise(UNet2DConditionModel(**tiny.UNETS[kind]), 1)
    unet.add_adapter(LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=list(targets), init_lora_weights=False))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in unet.named_parameters():
            if ".lora_" in name:
                p.copy_(0.5 * torch.randn(p.shape, generator=generator) / p[0].numel() ** 0.5)
    return unet.eval()


def adapter_tree(values: dict) -> dict:
    """peft's tensors, or their gradients, by name -> the adapter tree, by a rule that only this test has."""
    tree = {}
    for name, value in values.items():
        module, factor = name.removesuffix(".default.weight").rsplit(".", 1)
        array = value.detach().numpy()
        tree[(*path_of(module), factor)] = array.transpose(2, 3, 1, 0) if array.ndim == 4 else array.T
    return traverse_util.unflatten_dict(tree)


def path_of(module: str) -> tuple[str, ...]:
    parts = []
    for part in module.split("."):
        parts[-1:] = [f"{parts[-1]}_{part}"] if part.isdigit() else [*parts[-1:], part]
    return tuple(parts)


def base_params(module: nn.Module, unet: UNet2DConditionModel) -> dict:
    """The weights of a peft UNet without its adapters."""
    state = {k.replace(".base_layer", ""): v for k, v in unet.state_dict().items() if ".lora_" not in k}
    return names.from_torch(module, state)


def factors(unet: UNet2DConditionModel) -> dict:
    return adapter_tree({k: v for k, v in unet.named_parameters() if ".lora_" in k})


def arguments(kind: str, side: int = 8) -> tuple:
    rng = np.random.default_rng(2)
    config = tiny.UNETS[kind]

    def draw(*size):
        return rng.standard_normal(size).astype(np.float32)

    added = None
    if config.get("addition_embed_type"):
        added = {"text_embeds": draw(2, 32), "time_ids": np.float32([[64, 48, 0, 3, 64, 64], [9, 8, 7, 6, 5, 4]])}
    return draw(2, side, side, 4), np.array([19, 777]), draw(2, 7, config["cross_attention_dim"]), None, added


@functools.cache
def case(kind: str):
    """(torch UNet with adapters, module, base weights, adapters)."""
    torch_unet = peft_unet(kind)
    module = from_config(tiny.UNETS[kind])
    return torch_unet, module, base_params(module, torch_unet), factors(torch_unet)


@pytest.mark.parametrize(
    ("kind", "side"), [("sd1", 7), *(pytest.param(kind, 8, marks=pytest.mark.slow) for kind in ("sd1", "sdxl"))]
)
def test_adapted_and_merged_equal_peft(kind, side):
    """sd1 has 1x1 convolutions into the transformers, sdxl linear layers; both have strided, shortcut and time layers.

    The padding of the strided convolution matters most for an odd side, 7.
    """
    torch_unet, module, base, adapters = case(kind)
    kinds = {path[-1] for path in lora.by_layer(adapters)}
    assert {"to_q", "to_out_0", "proj_in", "conv1", "conv", "conv_shortcut", "time_emb_proj", "proj"} <= kinds
    args = arguments(kind, side)
    z, t, text, _, added = args
    want = (
        tiny.in_float64(
            torch_unet,
            torch.from_numpy(z).permute(0, 3, 1, 2),
            torch.from_numpy(t),
            torch.from_numpy(text),
            added_cond_kwargs=added and {k: torch.from_numpy(v) for k, v in added.items()},
        )
        .sample.permute(0, 2, 3, 1)
        .numpy()
    )
    adapted, plain = jit(lora.Adapted(module, ALPHA / RANK).apply), jit(module.apply)
    got = adapted({"params": {"base": base, "lora": adapters}}, *args)
    merged = plain({"params": lora.merge(base, [(adapters, ALPHA / RANK)])}, *args)
    without = plain({"params": base}, *args)
    assert np.abs(without - want).max() > 0.1
    parity.close(got, want, rtol=0, of_max=parity.NETWORK)
    parity.close(merged, want, rtol=0, of_max=parity.NETWORK)
    begun = jax.tree.map_with_path(lambda path, x: x * (path[-1].key == "lora_A"), adapters)
    parity.close(adapted({"params": {"base": base, "lora": begun}}, *args), without, rtol=0, of_max=parity.NETWORK)


@pytest.mark.slow
def test_init_has_pefts_distribution():
    """And B is zero, with which the test above shows that adapters change nothing."""
    _, _, base, _ = case("sd1")
    fresh = lora.init(jax.random.key(0), base, 64)
    for path, pair in lora.by_layer(fresh).items():
        kernel = base
        for part in path:
            kernel = kernel[part]
        bound = 1 / math.sqrt(kernel["kernel"][..., 0].size)  # kaiming_uniform with a = sqrt(5)
        a = np.asarray(pair["lora_A"])
        assert a.dtype == np.float32 and not pair["lora_B"].any()
        assert a.shape == (*kernel["kernel"].shape[:-1], 64) and pair["lora_B"].shape[-2:] == (
            64,
            kernel["bias"].size if "bias" in kernel else kernel["kernel"].shape[-1],
        )
        assert 0.98 * bound < np.abs(a).max() <= bound and abs(a.std() * math.sqrt(3) / bound - 1) < 0.05
    other = lora.init(jax.random.key(1), base, 64)
    some = lora.init(jax.random.key(0), jax.eval_shape(lambda: base), 64, ("to_q",))
    differ = jax.tree.map(lambda a, b: bool((a != b).any()), fresh, other)
    assert all(pair["lora_A"] for pair in lora.by_layer(differ).values())
    for path, pair in lora.by_layer(some).items():
        np.testing.assert_array_equal(pair["lora_A"], lora.by_layer(fresh)[path]["lora_A"])


@pytest.mark.slow
def test_half_precision_stays_half():
    _, module, base, adapters = case("sd1")
    args = arguments("sd1")
    variables = {"params": {"base": base, "lora": adapters}}
    want = jit(lora.Adapted(module, 1.5).apply)(variables, *args)
    half = lora.Adapted(module.clone(dtype=jnp.bfloat16), 1.5)
    got = jit(half.apply)(variables, *args)
    assert got.dtype == jnp.bfloat16 and half.dtype == jnp.bfloat16
    parity.near(got, want, 8 * parity.BFLOAT16)
    text = jit(half.apply).lower(variables, *args).as_text()
    products = [line for line in text.splitlines() if "dot_general" in line or "stablehlo.convolution" in line]
    assert len(products) > 100
    # Only attention's logits are float32, and their operands are in half precision.
    assert not [line for line in products if "xf32>, tensor" in line.split(":")[-1]]


def test_merge_of_several_adapters_leaves_the_base_unchanged():
    _, _, base, one = case("sd1")
    kept = jax.tree.map(np.copy, base)
    two = jax.tree.map(lambda x: x[::-1] * 0.5, factors(peft_unet("sd1", 8, ("to_k", "conv2"))))
    of_layer = {path: 0.1 * i for i, path in enumerate(lora.by_layer(two))}
    got = traverse_util.flatten_dict(lora.merge(base, [(one, 0.8), (two, of_layer)]))
    for path, kernel in traverse_util.flatten_dict(kept).items():
        want = kernel.astype(np.float64)
        for tree, scale in ((one, 0.8), (two, of_layer.get(path[:-1]))):
            pair = lora.by_layer(tree).get(path[:-1])
            if pair is not None and path[-1] == "kernel":
                a, b = (pair[n].astype(np.float64) for n in ("lora_A", "lora_B"))
                want = want + scale * np.tensordot(a, b.reshape(b.shape[-2:]), 1)
        parity.close(got[path], want, rtol=0, atol=1e-6, what="/".join(path))
    jax.tree.map(np.testing.assert_array_equal, base, kept)
    assert jax.tree.structure(lora.merge(base, [])) == jax.tree.structure(base)


def test_adapters_that_do_not_fit_are_refused_by_name():
    _, module, base, adapters = case("sd1")
    with pytest.raises(LcmError, match=r"'to_z' matches no layer"):
        lora.target_paths(base, ("to_q", "to_z"))
    with pytest.raises(LcmError, match="norm1"):  # norms are not adapted
        lora.target_paths(base, ("norm1",))
    with pytest.raises(LcmError, match="rank 0"):
        lora.init(jax.random.key(0), base, 0)
    stray = {**adapters, "nowhere": {"lora_A": np.zeros((3, 2)), "lora_B": np.zeros((2, 3))}}
    with pytest.raises(LcmError, match="nowhere"):
        lora.merge(base, [(stray, 1.0)])
    with pytest.raises(LcmError, match="nowhere"):
        apply = functools.partial(jax.eval_shape, lora.Adapted(module, 1.0).apply)
        apply({"params": {"base": base, "lora": stray}}, *arguments("sd1"))
    with pytest.raises(LcmError, match=r"to_k: lora_A \[64, 4\] and lora_B \[4, 32\] on a kernel \[32, 32\]"):
        sdxl = factors(peft_unet("sdxl", 1, ("down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k",)))
        wrong = sdxl["down_blocks_1"]["attentions_0"]["transformer_blocks_0"]["attn2"]["to_k"]
        wrong = {"lora_A": wrong["lora_A"], "lora_B": wrong["lora_B"][:, :32]}
        block = {"transformer_blocks_0": {"attn2": {"to_k": wrong}}}
        lora.merge(base, [({"down_blocks_0": {"attentions_0": block}}, 1.0)])


def test_adapted_has_its_modules_fields_and_is_static():
    module = from_config(tiny.UNETS["lcm"])
    adapted = lora.Adapted(module, 0.5)
    assert adapted.time_cond_proj_dim == 16 and adapted.per_level("cross_attention_dim") == (32, 32)
    assert hash(adapted) == hash(lora.Adapted(module, 0.5)) and adapted != lora.Adapted(module, 1.0)
    for name in ("clone", "init", "bind"):
        with pytest.raises(AttributeError, match=name):
            getattr(adapted, name)


@pytest.mark.parametrize(("model", "count"), [("sd15", 278), ("sdxl", 788), ("ssd-1b", 423)])
def test_default_targets_are_those_of_the_published_files(model, count):
    shapes = names.abstract_params(from_config(family.UNETS[model]))
    paths = lora.target_paths(shapes)
    assert len(paths) == len(set(paths)) == count and paths == sorted(paths)
    trained = jax.eval_shape(lambda key: lora.init(key, shapes, 64), jax.random.key(0))
    millions = sum(math.prod(x.shape) for x in jax.tree.leaves(trained)) / 1e6
    assert millions == pytest.approx({"sd15": 67.5, "sdxl": 197, "ssd-1b": 105}[model], abs=0.5)  # report, table 1
