"""Less memory: weights in 8 bits, networks that wait on the host, decoding one image at a time; what they change."""

import dataclasses
import functools
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import parity
import pytest
import tiny
from flax import traverse_util
from test_sample import compilations
from test_sampling_control import MIDDLE, picture, save_net

import lcm_jax
from lcm_jax import Control, sample
from lcm_jax.errors import BadArgument, LcmError
from lcm_jax.models import int8, lora
from lcm_jax.models.unet import UNet2DConditionModel
from lcm_jax.pretrained import load_pipeline, names
from lcm_jax.runtime import kernels
from lcm_jax.runtime.mesh import default_device, one_by_one
from lcm_jax.sampling import load as load_lib
from lcm_jax.sampling import offload
from lcm_jax.sampling.generator import Generator
from lcm_jax.sampling.request import make_request

PROMPTS = ["a small red circle", "a blue square"]


@functools.cache
def model(name: str = "micro lcm", **options):
    return lcm_jax.load(tiny.folder(name), **options)


def images(model, **options) -> np.ndarray:
    """float32 [b H W 3] of three images of `PROMPTS[0]` and three of the other, four at once."""
    request = make_request(model.pipeline, steps=2, **options)
    return np.concatenate(list(model.batches(request, PROMPTS, 3, seed=0, batch_size=4)))


def whole(params):
    """The tree that int8 weights stand for, in numpy."""
    flat = dict(traverse_util.flatten_dict(params))
    for path in [path[:-1] for path in flat if path[-1] == "int8"]:
        flat[path] = np.asarray(flat.pop((*path, "int8")), np.float32) * flat.pop((*path, "scale"))
    return traverse_util.unflatten_dict(flat)


def test_without_a_mesh_the_networks_have_the_attention_of_programs(monkeypatch):
    """Which needs no memory for all logits of a large image; images are those of any attention."""
    one, pipeline = model(), load_pipeline(tiny.folder("micro lcm"))[0]
    assert one.mesh.size == 1 and one.pipeline.parts == kernels.on_mesh(pipeline, one.mesh).parts
    with jax.default_device("cpu"):  # a platform's name, as the option may be
        assert [default_device()] == list(one.mesh.devices.flat)
    monkeypatch.setattr(kernels, "LOGITS_LIMIT", 0)
    shape = (1, 4096, 1, 8)
    assert (
        one.pipeline.vae.attention_fn.kind(shape, shape)
        == one.pipeline.unet.attention_fn.kind(shape, shape)
        == "chunked"
    )


def test_quantised_kernels_are_off_by_half_a_step_at_most():
    kernel = np.random.default_rng(0).normal(size=(3, 3, 64, 16)).astype(np.float32)
    kernel[..., 3] *= 100  # its scale is its own
    kernel[..., 5] = 0
    stored = int8.quantise(kernel)
    assert stored["int8"].dtype == np.int8 and stored["scale"].shape == (16,)
    assert np.abs(stored["int8"]).max((0, 1, 2)).tolist() == [127 * (i != 5) for i in range(16)]
    error = np.abs(stored["int8"] * stored["scale"] - kernel).max((0, 1, 2))
    assert (error <= stored["scale"] * 0.5001).all() and error[0] > stored["scale"][0] * 0.4
    gaussian = np.random.default_rng(1).normal(size=(1280, 1280)).astype(np.float32)
    stored = int8.quantise(gaussian)
    rms = np.sqrt(np.mean(np.square(stored["int8"] * stored["scale"] - gaussian)))
    assert 0.0075 < rms < 0.0085  # the reference's .0080


def test_what_is_stored_in_8_bits():
    """Kernels of every layer but the first, the last, the time embedding; of UNet and text encoders, not of the VAE."""
    full, small = model().params, model(weights="int8").params
    for part in ("unet", "text_encoder", "vae"):
        kernels_of = {path for path in traverse_util.flatten_dict(full[part]) if path[-1] == "kernel"}
        stored = {path[:-1] for path in traverse_util.flatten_dict(small[part]) if path[-1] == "int8"}
        left = {path[0] for path in kernels_of - stored}
        want = {"unet": {"conv_in", "conv_out", "time_embedding"}, "text_encoder": set()}
        assert left == want[part] if part in want else not stored
    leaf = full["unet"]["down_blocks_0"]["resnets_0"]["conv1"]["kernel"]
    got = small["unet"]["down_blocks_0"]["resnets_0"]["conv1"]["kernel"]
    jax.tree.map(np.testing.assert_array_equal, dict(got), int8.quantise(leaf))


@pytest.mark.parametrize("name", ["micro lcm", pytest.param("sdxl", marks=pytest.mark.slow)])
def test_int8_generates_what_the_rounded_weights_generate(name):
    """Exactly q s in float32; the images are near those of whole weights, and others."""
    small = model(name, weights="int8")
    params = {part: whole(tree) for part, tree in small.params.items()}
    rounded = Generator(model(name).pipeline, params)
    got = images(small)
    parity.close(got, images(rounded), atol=2e-4)  # sums in another order; whole weights are off by 10 times as much
    difference = np.abs(got - images(model(name)))
    assert 2e-3 < difference.max() and difference.mean() < 0.05


def test_a_lora_is_added_before_and_refused_after(tmp_path, monkeypatch):
    """What is quantised is the sum, in float32."""
    small, kernel = model(weights="int8"), model().params["unet"]  # loaded before anything is patched
    layer = "down_blocks_0", "resnets_0", "conv1", "kernel"
    monkeypatch.setattr(load_lib.lora_files, "changes", lambda *_: {"unet": {layer: lambda: np.float32(0.25)}})
    monkeypatch.setattr(load_lib, "_read_loras", lambda *_: ([], {}))
    (tmp_path / "a.safetensors").touch()
    monkeypatch.setattr(load_lib.digests, "warn", lambda *_: None)
    merged = lcm_jax.load(tiny.folder("micro lcm"), loras=[str(tmp_path / "a.safetensors")], weights="int8")
    got = merged.params["unet"]
    for name in layer:
        kernel, got = kernel[name], got[name]
    jax.tree.map(np.testing.assert_array_equal, dict(got), int8.quantise(np.asarray(kernel) + np.float32(0.25)))

    with pytest.raises(LcmError, match="merging LoRAs needs whole weights, these are int8.*without int8"):
        lora.merge(small.params["unet"], [])
    with pytest.raises(LcmError, match="saving needs whole weights"):
        names.to_torch(small.pipeline.unet, small.params["unet"])


def test_dequantised_kernels_are_never_all_whole_at_once():
    """Compiled for this CPU, whose compiler would make them whole before the loop over the steps."""
    unet = UNet2DConditionModel(
        block_out_channels=(64,),
        layers_per_block=2,
        down_block_types=("CrossAttnDownBlock2D",),
        up_block_types=("CrossAttnUpBlock2D",),
        mid_block_type=None,
        cross_attention_dim=64,
    )
    shapes = names.param_shapes(unet, jnp.float32)
    stored = int8.shapes(shapes)

    def steps(params, x, context):
        def step(i, x):
            return x - kernels.dequantising(unet).apply({"params": params}, x, jnp.full(1, 10.0 * i), context)

        return jax.lax.fori_loop(0, 4, step, x)

    x, context = jnp.zeros((1, 8, 8, 4)), jnp.zeros((1, 7, 64))
    compiled = jax.jit(steps).lower(stored, x, context).compile()
    large = sum(x.size * 4 for x in jax.tree.leaves(shapes))
    assert compiled.memory_analysis().temp_size_in_bytes < large / 3


@pytest.mark.parametrize("options", [{}, pytest.param({"weights": "int8"}, marks=pytest.mark.slow)])
def test_offloaded_networks_are_on_the_device_only_while_they_run(options, monkeypatch):
    plain = model(**options)
    away = lcm_jax.load(tiny.folder("micro lcm"), offload="all", **options)
    seen, put = [], away.weights._to_device
    monkeypatch.setattr(
        away.weights, "_to_device", lambda tree: seen.append((tree, sorted(away.weights._visiting))) or put(tree)
    )
    np.testing.assert_array_equal(images(away), images(plain))
    order = [next(part for part, home in away.params.items() if home is tree) for tree, _ in seen]
    assert order == ["text_encoder", "unet", "vae", "unet", "vae"]  # two batches, encoded together
    assert all(others == [] for _, others in seen) and not away.weights._visiting
    kinds = {leaf.sharding.memory_kind for leaf in jax.tree.leaves(away.params)}
    assert kinds == {"pinned_host"}


def test_offloaded_text_encoders_leave_the_rest_where_it_is():
    away = lcm_jax.load(tiny.folder("micro lcm"), offload="text")
    kinds = {
        part: {leaf.sharding.memory_kind == "pinned_host" for leaf in jax.tree.leaves(tree)}
        for part, tree in away.params.items()
    }
    assert kinds == {"unet": {False}, "vae": {False}, "text_encoder": {True}}
    with away.weights.using("text_encoder", "unet") as outer, away.weights.using("text_encoder") as inner:
        assert inner["text_encoder"] is outer["text_encoder"] and outer["unet"] is away.params["unet"]
    assert offload.resident("text", away.params, ["vae"]) == {"unet", "vae"}
    assert offload.resident(None, away.params, ["vae"]) == {"unet", "vae", "text_encoder"}


def test_weights_wait_as_numpy_where_there_is_no_pinned_memory(monkeypatch):
    monkeypatch.setattr(offload, "_PINNED", "no such memory")
    away = lcm_jax.load(tiny.folder("micro lcm"), offload="all")
    assert {type(leaf) for leaf in jax.tree.leaves(away.params)} == {np.ndarray}
    np.testing.assert_array_equal(images(away), images(model()))


def test_sliced_decodes_one_image_at_a_time():
    seen = []

    def fn(x):
        seen.append(x.shape)
        return 2 * x

    rows = jnp.arange(24.0).reshape(4, 3, 2)
    np.testing.assert_array_equal(one_by_one(fn, rows, None), 2 * rows)
    assert seen == [(1, 3, 2)]
    sliced = model(sliced=True)
    parity.close(images(sliced), images(model()), atol=2e-5)


TWO_DEVICES = """
import sys
import jax
import numpy as np
jax.config.update("jax_num_cpu_devices", 2)
import lcm_jax
from lcm_jax.models import int8
from lcm_jax.runtime.mesh import gather_weights, make_mesh, place

mesh, random = make_mesh(1, 2), np.random.default_rng(0)
kernel, x = random.normal(size=(512, 512)).astype(np.float32), random.normal(size=(4, 512)).astype(np.float32)
stored = jax.tree.map(place(mesh), int8.quantise(kernel))
assert not stored["int8"].sharding.is_fully_replicated
whole = int8.Dequantise(np.float32, gather_weights(mesh, np.float32), barriers=False)
program = jax.jit(lambda stored, x: x @ whole({"kernel": stored}, after=x)["kernel"]).lower(stored, x).compile()
want = x @ (np.asarray(stored["int8"]).astype(np.float32) * np.asarray(stored["scale"]))
np.testing.assert_allclose(program(stored, x), want, rtol=0, atol=1e-3)
gathered = [line for line in program.as_text().splitlines() if "all-gather(" in line or "all-gather-start(" in line]
assert gathered and all("s8[" in line for line in gathered), gathered

switches = dict(weights="int8", sliced=True, offload="all")
model, alone = lcm_jax.load(sys.argv[1], mesh=mesh, **switches), lcm_jax.load(sys.argv[1], **switches)
assert {leaf.sharding.memory_kind for leaf in jax.tree.leaves(model.params)} == {"pinned_host"}
got, want = ([np.asarray(image, int) for image in one("a star", steps=2, num_images=3)] for one in (model, alone))
assert np.abs(np.subtract(got, want)).max() <= 1, "another rounding, at most"
"""


@pytest.mark.slow
def test_on_two_devices():
    """Split kernels are gathered as 8 bits; the images are those of one device."""
    done = subprocess.run(
        [sys.executable, "-c", TWO_DEVICES, str(tiny.folder("micro lcm"))], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_controlnets_are_in_8_bits_beside_a_unet_that_is(tmp_path):
    folder, path = tiny.folder("middle lcm"), save_net(MIDDLE, 10, tmp_path / "net")
    small, plain = lcm_jax.load(folder, weights="int8"), lcm_jax.load(folder)
    rounded = Generator(plain.pipeline, {part: whole(tree) for part, tree in small.params.items()})
    net, full = small.control_net(path), plain.control_net(path)
    assert int8.has_quantised(net.params) and not int8.has_quantised(full.params)
    made = [
        images(model, control=[Control(net, picture(1))])
        for model, net in (
            (small, net),
            (rounded, dataclasses.replace(full, params=whole(net.params))),
            (rounded, full),
        )
    ]
    parity.close(made[0], made[1], atol=2e-4)
    assert np.abs(made[0] - made[2]).max() > 2e-3


@pytest.mark.slow
@pytest.mark.parametrize("options", [{"dtype": "bfloat16"}, {"tiled": True}])
def test_int8_goes_with(options):
    got, want = (images(lcm_jax.load(tiny.folder("micro lcm"), weights=w, **options)) for w in ("int8", None))
    assert 0 < np.abs(got - want).mean() < 0.05


@pytest.mark.parametrize("name", ["micro lcm", pytest.param("sd1", marks=pytest.mark.slow)])
def test_one_program_serves_every_guidance_scale_and_seed(name):
    made = model(name)
    first = images(made, guidance_scale=3.0)
    with compilations() as compiled:
        for scale, seed in ((2.0, 0), (7.5, 1)):
            made(PROMPTS, steps=2, guidance_scale=scale, seed=seed, num_images=2)
    assert compiled == [] and len(first) == 6


def test_switches_are_recorded_and_repeated_and_wrong_ones_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(Generator, "generate", lambda self, request, prompts, *_: np.zeros((len(prompts), 16, 16, 3)))
    monkeypatch.setattr(Generator, "encode", lambda self, *_, **__: {})
    words = [f"--model={tiny.folder('micro lcm')}", f"--prompt={PROMPTS[0]}", "--steps=2", "--num_images=1"]
    switches = ["--weights=int8", "--sliced", "--offload=all"]
    assert sample.main([*words, f"--out={tmp_path / 'a'}", *switches]) == 0
    about = sample.png.read_about(tmp_path / "a" / "0000_0000.png")
    assert (about["weights"], about["sliced"]) == ("int8", "True") and "offload" not in about  # as --fsdp
    argv = [f"--out={tmp_path / 'b'}"]
    args = sample.repeated(sample.parser(), argv, tmp_path / "a" / "0000_0000.png")
    assert (args.weights, args.sliced, args.offload) == ("int8", True, None)
    for name, message in (("weights", "choose int8"), ("offload", "choose one of text, all")):
        with pytest.raises(BadArgument, match=f"^{name}=fp4: {message}"):
            lcm_jax.load(tiny.folder("micro lcm"), **{name: "fp4"})
