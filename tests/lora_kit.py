"""For the tests of LoRA: files with random factors in every format, and a comparison of two that were read."""

import numpy as np
import safetensors.numpy
import tiny

from lcm_jax.models import lora
from lcm_jax.pretrained import lora_keys

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
TEXT = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")


def pipeline(name):
    return tiny.loaded(name)[0]


def layer_names(module, targets=lora.DEFAULT_TARGETS):
    return [name for name in lora_keys.layers(module) if any(f".{name}".endswith(f".{t}") for t in targets)]


def factors(module, targets=lora.DEFAULT_TARGETS, rank=4, seed=0, rank_of=None):
    """Torch name -> random (A, B) in torch's shapes; rank_of: name -> rank, if ranks are mixed."""
    generator, table, found = np.random.default_rng(seed), lora_keys.layers(module), {}
    for name in layer_names(module, targets):
        out, fan, *window = table[name].torch_shape
        r = rank_of(name) if rank_of else rank
        a = generator.normal(size=(r, fan, *window)) / np.sqrt(fan * np.prod(window))
        b = 0.5 * generator.normal(size=(out, r, *(1 for _ in window))) / np.sqrt(r)
        found[name] = a.astype(np.float32), b.astype(np.float32)
    return found


def file_keys(form, name, part="unet", original=None):
    """(key of A, key of B, key of alpha or None)."""
    if form == "peft":
        return *(f"{part}.{name}.lora_{x}.weight" for x in "AB"), None
    if form == "diffusers":
        middle = "lora" if part == "unet" else "lora_linear_layer"
        return *(f"{part}.{name}.{middle}.{x}.weight" for x in ("down", "up")), None
    if form == "processors":
        attention, layer = name.removesuffix(".0").rsplit(".", 1)
        return *(f"{part}.{attention}.processor.{layer}_lora.{x}.weight" for x in ("down", "up")), None
    prefix = {"unet": "lora_unet_", "te": "lora_te_", "te1": "lora_te1_", "te2": "lora_te2_"}[part]
    stem = prefix + (original[name] if form == "sgm" else name).replace(".", "_")
    return f"{stem}.lora_down.weight", f"{stem}.lora_up.weight", f"{stem}.alpha"


def tensors_of(form, found, alpha=None, part="unet", original=None):
    tensors = {}
    for name, (a, b) in found.items():
        down, up, scale = file_keys(form, name, part, original)
        tensors |= {down: a, up: b}
        if alpha is not None:
            tensors[scale] = np.float32(alpha)
    return tensors


def save(path, tensors, **metadata):
    tensors = {key: np.array(x, order="C") for key, x in tensors.items()}
    safetensors.numpy.save_file(tensors, path, metadata={"format": "pt", **metadata})
    return path


def same_lora(one, two):
    assert one.parts.keys() == two.parts.keys()
    for part, layers in one.parts.items():
        assert layers.keys() == two.parts[part].keys()
        for path, f in layers.items():
            g = two.parts[part][path]
            np.testing.assert_array_equal(f.lora_A, g.lora_A)
            np.testing.assert_array_equal(f.lora_B, g.lora_B)
            assert f.scale == g.scale
    assert one.deltas.keys() == two.deltas.keys()
    for part, deltas in one.deltas.items():
        assert deltas.keys() == two.deltas[part].keys()
        for path, delta in deltas.items():
            np.testing.assert_array_equal(delta, two.deltas[part][path])
