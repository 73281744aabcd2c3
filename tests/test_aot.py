"""Compiling for machines that are not here: the same program as the run's, its report, and what fits."""

import dataclasses
import importlib.util
import json
import os
import re
import runpy
import subprocess
import sys
import types
from pathlib import Path

import gpu_kit
import jax
import jax.numpy as jnp
import numpy as np
import optax
import parity
import pytest
import tiny_configs
import training_processes as runs
from ml_collections import ConfigDict

from lcm_jax import aot
from lcm_jax.cost import chips, roofline
from lcm_jax.cost.chips import GIB
from lcm_jax.errors import LcmError
from lcm_jax.run import models as run_models
from lcm_jax.run import report
from lcm_jax.run import step as run_step
from lcm_jax.runtime import kernels, topology
from lcm_jax.runtime.mesh import abstract_state, batch_sharding, gather_weights, make_mesh, replicated
from lcm_jax.sampling import report as sampling
from lcm_jax.sampling.plan import Settings
from lcm_jax.sampling.request import Request

ROOT = Path(__file__).parents[1]


def config_of(name: str, **changes) -> ConfigDict:
    config = runpy.run_path(str(ROOT / "configs" / f"{name}.py"))["get_config"]()
    changes = {"data.batch_size": 4, "model.dtype": "float32"} | changes
    with config.unlocked():
        config.update_from_flattened_dict(changes)
    return aot.prepared(config)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> str:
    """A folder with nothing but configs, of a model that is quick to trace."""
    folder = tmp_path_factory.mktemp("tiny")
    unet = tiny_configs.UNETS["sd15"] | {
        "block_out_channels": [32],
        "cross_attention_dim": 32,
        "layers_per_block": 1,
        "mid_block_type": None,
        "down_block_types": ["CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D"],
    }
    parts = {"unet": unet, "vae": tiny_configs.VAES["sd"], "text_encoder": tiny_configs.CLIPS["vit-l"]}
    index = {"unet": ["diffusers", "UNet2DConditionModel"], "text_encoder": ["transformers", "CLIPTextModel"]}
    scheduler = {"_class_name": "DDIMScheduler", "beta_schedule": "scaled_linear"}
    for name, value in {
        "model_index.json": index,
        "scheduler/scheduler_config.json": scheduler,
        **{f"{part}/config.json": config for part, config in parts.items()},
    }.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(json.dumps(value))
    return str(folder)


def one_device() -> jax.sharding.Mesh:
    return make_mesh(devices=jax.devices()[:1])


@pytest.mark.parametrize("name", ["shapes_lcm", "shapes_lcm_lora"])
def test_build_gives_the_program_of_arrays(name, tiny):
    config, mesh = config_of(name, **{"model.teacher": tiny, "lora.targets": ("to_q",)}), one_device()
    teacher, params = run_models.load_teacher(config, weights=False)
    params = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), dict(params))
    models = run_models.Models(teacher, params, *run_models.load_student(config, teacher, params))
    of_arrays = run_step.make(config, models, mesh)
    assert report.build(config, mesh)[0].lower().as_text() == of_arrays.lower().as_text()


def test_the_step_is_compiled_with_the_options_for_its_devices(tiny, monkeypatch):
    asked = []
    monkeypatch.setattr(kernels, "training", lambda *devices: asked.append(devices) or {"xla_no_such_option": 1})
    step, _ = report.build(config_of("shapes_lcm", **{"model.teacher": tiny}), one_device())
    assert asked == [("cpu", 1)]
    with pytest.raises(jax.errors.JaxRuntimeError, match="xla_no_such_option"):
        step.lower().compile()


@pytest.mark.parametrize("name", ["shapes_lcm", "shapes_lcm_lora"])
def test_frozen_weights_of_an_accelerator_are_in_16_bits_and_what_is_trained_is_not(name, tiny):
    config = config_of(name, **{"model.teacher": tiny, "model.dtype": "auto", "lora.targets": ("to_q",)})
    assert (config.model.dtype, config.model.teacher_dtype) == ("bfloat16", "bfloat16")
    step, _ = report.build(config, one_device())
    assert step.frozen.base is None and {x.dtype for x in jax.tree.leaves(step.frozen.null)} == {np.dtype("float32")}
    frozen = step.frozen.teacher
    layers = frozen["conv_in"]["kernel"], frozen["conv_in"]["bias"], *frozen["conv_norm_out"].values()
    assert [x.dtype.name for x in layers] == ["bfloat16"] * 2 + ["float32"] * 2
    trained = [x for x in jax.tree.leaves(step.state) if jax.numpy.issubdtype(x.dtype, np.floating)]
    assert {x.dtype.name for x in trained} == {"float32"}


@pytest.fixture(scope="module")
def compiled(tiny):
    """(config, its step, the step compiled)."""
    config = config_of("shapes_lcm", **{"model.teacher": tiny})
    step, _ = report.build(config, one_device())
    return config, step, report.compile_step(step, config, {})[0]


def test_roofline_report_of_a_step_on_this_machine(compiled):
    (_, step, compiled), mesh = compiled, one_device()
    flops = step.model_flops()
    found = json.loads(json.dumps(roofline.report(compiled, mesh, 4, flops)))
    arguments = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves((step.state, step.frozen, step.batch)))
    parity.close(found["memory"]["arguments"], arguments, rtol=0.01)
    assert report.device_bytes((step.state, step.frozen, step.batch)) == arguments
    # XLA leaves out products with padding, a tenth of the model's here.
    assert 0.9 < found["flops"]["total"] / found["model_flops"] < 1.1
    assert found["chip"] is None and "utilisation" not in found and found["collectives"] == {}
    assert "roofline" not in roofline.text(found)
    on_v5e = roofline.report(compiled, mesh, 4, flops, chips.CHIPS["v5e"], {"option": 1})
    assert on_v5e["seconds"]["bound"] == "hbm"
    parity.close(on_v5e["utilisation"], flops / (197e12 * on_v5e["bytes"]["total"] / 819e9), rtol=1e-6)
    assert "197 TFLOP/s" in roofline.text(on_v5e) and "option=1" in roofline.text(on_v5e)


@pytest.mark.slow
def test_report_counts_the_encoders(compiled, monkeypatch):
    (config, _, compiled), mesh = compiled, one_device()
    monkeypatch.setattr(report, "compile_step", lambda *args: (compiled, {}))
    found = report.report(config, mesh, {}, chips.CHIPS["v5e"])
    memory = found["memory"]
    params = run_models.shapes(config).teacher_params
    held = sum(leaf.size * 4 for name in ("vae", "text_encoder") for leaf in jax.tree.leaves(params[name]))
    assert memory["encoders"] == held > 0
    assert memory["needed"] == held + sum(memory[name] for name in roofline.PARTS if name != "encoders")
    assert "encoders  " in roofline.text(found) and found["compile_seconds"] >= 0
    small = dataclasses.replace(chips.CHIPS["v5e"], hbm_bytes=memory["needed"] - 1)
    with pytest.raises(report.DoesNotFit, match="does not fit .* too much; .*--config.train.remat=block"):
        report.report(config, mesh, {}, small)
    report.report(config, mesh, {}, dataclasses.replace(small, hbm_bytes=memory["needed"]))


def test_build_refuses_what_a_run_would_refuse(tiny):
    config = config_of("shapes_lcm", **{"model.teacher": tiny, "data.resolution": 66})
    with pytest.raises(LcmError, match="data.resolution = 66 .* factor 4"):
        report.build(config, one_device())


@pytest.mark.slow
def test_model_flops_do_not_depend_on_rematerialisation_or_accumulation(tiny):
    def counted(**changes):
        step, _ = report.build(config_of("shapes_lcm", **{"model.teacher": tiny} | changes), one_device())
        return step.model_flops()

    plain = counted()
    assert counted(**{"train.remat": "block", "train.accumulation_steps": 2}) == plain
    parity.close(counted(**{"data.batch_size": 8}), 2 * plain, rtol=1e-3)


class _Exhausted:
    """A program of 2 GiB of arguments that XLA finds too large."""

    def __init__(self, message: str, devices: int = 1):
        whole = replicated(gpu_kit.devices("tpu", devices))
        self.message, self.frozen, self.batch = message, None, {}
        self.state = jax.ShapeDtypeStruct((2**29,), "float32", sharding=whole)
        self.key = jax.ShapeDtypeStruct((), "uint32", sharding=whole)

    def lower(self):
        return self

    def compile(self, compiler_options):
        raise jax.errors.JaxRuntimeError(self.message)


@pytest.mark.parametrize(
    ("message", "words"),
    [
        (
            "XLA:TPU compile permanent error. Ran out of memory in memory space hbm. Used 17.31G of 15.75G hbm. "
            "Exceeded hbm capacity by 1.56G.",
            "17.31 GiB of 15.75, 1.56 too much",
        ),
        (
            "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (17.31G) "
            "exceeds available HBM (15.75G).",
            "19.31 GiB of 15.75, 3.56 too much",
        ),
    ],
)
def test_compile_step_reports_how_much_is_missing_and_what_to_change(message, words):
    config, step = config_of("shapes_lcm", **{"train.remat": "none", "data.batch_size": 8}), _Exhausted(message)
    with pytest.raises(report.DoesNotFit, match=words) as caught:
        report.compile_step(step, config, {})
    for way in ("train.remat=block", "data.batch_size (now 8)", "teacher_dtype=bfloat16"):
        assert way in str(caught.value)
    assert "mesh.fsdp" not in str(caught.value)  # of one device
    with pytest.raises(report.DoesNotFit, match=r"mesh\.fsdp"):
        report.compile_step(_Exhausted(message, devices=2), config, {})
    mesh = gpu_kit.devices("tpu")
    weights = jax.ShapeDtypeStruct((2**29,), "float32", sharding=replicated(mesh))
    generator = types.SimpleNamespace(
        mesh=mesh,
        params={"unet": {"kernel": weights}},
        trace=lambda *_: {"sampler": _Exhausted(message)},
        sliced=False,
        weights=types.SimpleNamespace(mode="text"),
    )
    request = Request(Settings(), 1.0, 512, 512)
    with pytest.raises(report.DoesNotFit, match=f"8 images of 512 x 512 .*: {words.partition(',')[0]} on each"):
        sampling.report(generator, request, 8, {}, chips.CHIPS["v5e"])
    generator.sliced = True
    with pytest.raises(report.DoesNotFit, match="on each; use --weights=int8 or --offload=all$"):
        sampling.report(generator, request, 1, {}, chips.CHIPS["v5e"])
    generator.params["unet"], generator.weights.mode = {"kernel": {"int8": weights}}, "all"
    with pytest.raises(report.DoesNotFit, match="on each; use devices with more memory$"):
        sampling.report(generator, request, 1, {}, chips.CHIPS["v5e"])
    other = _Exhausted("INTERNAL: Mosaic failed: Used 3.00G of 2.00G")
    with pytest.raises(jax.errors.JaxRuntimeError, match="Mosaic"):
        report.compile_step(other, config, {})


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--topology=h100:8", "--slices=2"), r"--slices=2: is of TPUs; .* --topology=h100:2x8"),
        (("--topology=v5e:4x4", "--slices=2", "--sampling"), r"--slices=2: is for training"),
        (
            ("--topology=v5e:4x4", "--sampling", "--fit", "--batch_size=4"),
            r"--batch_size=4: --fit looks for the largest",
        ),
        (("--topology=cpu",), r"--topology=cpu: is for --sampling"),
        (("--topology=h100:8", "--weights=int8"), r"--weights=int8: is for --sampling; .* remove it"),
        (("--topology=h100:8", "--batch_size=4"), r"--batch_size=4: is for --sampling; .* --config\.data\.batch_size"),
    ],
)
def test_flags_that_would_not_count_are_refused(flags, words, capsys):
    assert runs.run_here("lcm_jax.aot", "--config=configs/sd15_lcm.py", *flags) == 2
    assert re.match(f"error: {words}", capsys.readouterr().err)


def test_what_does_not_fit_is_told_only_what_the_config_can_take(tiny):
    """A batch of an image a device cannot be smaller, nor go in parts; without a teacher nothing is frozen."""
    plain = {"model.teacher": tiny, "train.remat": "block", "train.mu_dtype": "bfloat16", "data.batch_size": 6}
    mesh = gpu_kit.devices("tpu", 2)

    def ways(**changes):
        return str(report._does_not_fit(config_of("shapes_lcm", **plain | changes), mesh, 2 * GIB, GIB))

    assert "batch_size (now 6); --config.train.accumulation_steps=3" in ways(), "6 images are not 2 x 2 x n"
    assert "--config.train.accumulation_steps=4" in ways(**{"data.batch_size": 8, "train.accumulation_steps": 2})
    assert "batch_size" not in ways(**{"data.batch_size": 2}) and "accumul" not in ways(**{"data.batch_size": 2})
    assert "teacher_dtype" in ways() and "--config.model.dtype=bfloat16" in ways()
    tuned = {"objective": "lcf", "model.student": tiny, "model.teacher": None, "distill.solver": "ddim"}
    assert "teacher_dtype" not in ways(**tuned)
    full = {"data.batch_size": 2, "model.dtype": "bfloat16", "model.teacher_dtype": "bfloat16", "mesh.fsdp": 2}
    assert ways(**full).endswith("too much; use devices with more memory, or more of them")


def test_sampling_on_this_machine_computes_as_lcm_jax_sample_does_here(tiny, monkeypatch):
    """In float32 unless the config says otherwise; chips compute in bfloat16."""
    found = []

    def stop(generator, *_):
        found.append((generator.pipeline.unet.dtype, generator.params["unet"]["conv_in"]["kernel"].dtype))
        raise LcmError("seen")

    monkeypatch.setattr(sampling, "report", stop)
    words = "--config=configs/shapes_lcm.py", f"--config.model.teacher={tiny}", "--topology=cpu", "--sampling"
    for dtype in ("auto", "bfloat16"):
        assert runs.run_here("lcm_jax.aot", *words, f"--config.model.dtype={dtype}") == 2
    assert found == [("float32", "float32"), ("bfloat16", "bfloat16")]


@pytest.mark.parametrize(
    ("base", "each", "bend", "want"),
    [(4, 1.5, 0, 7), (4, 4, 0, 2), (14, 1.5, 0, 1), (1, 0.1, 0, 147), (4, 1, 0.2, 5), (20, 0, 0, None)],
)
def test_fit_finds_the_largest_batch_that_is_verified(base, each, bend, want):
    """Also if memory grows faster than linearly: the estimate fails, and the failure bounds the next one."""
    tried = []

    def attempt(images):
        tried.append(images)
        need = base + images * each + bend * images**2
        if need > 15.75:
            raise report.DoesNotFit("too much", need * GIB, 15.75 * GIB)
        return need * GIB, 15.75 * GIB, f"result {images}"

    if want is None:
        with pytest.raises(report.DoesNotFit):
            aot.fit(attempt, print)
    else:
        assert aot.fit(attempt, print) == (want, f"result {want}")
    assert len(tried) <= 2 + aot.VERIFY


def program(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "lcm_jax.aot", *arguments]
    return subprocess.run(command, cwd=ROOT, env=os.environ | {"JAX_PLATFORMS": ""}, capture_output=True, text=True)


def test_program_reports_an_unknown_topology_in_one_line(capsys):
    assert runs.run_here("lcm_jax.aot", "--config=configs/sdxl_lcm.py", "--topology=v5e:3x3") == 2
    error = capsys.readouterr().err
    assert error.startswith("error: unknown topology 'v5e:3x3'; choose one of v4:") and error.count("\n") == 1


@pytest.mark.parametrize(("chips", "extra"), [("v5e:4x4", "tpu"), ("h100:8", "cuda-aot")])
def test_absent_devices_need_their_compiler(monkeypatch, chips, extra):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(LcmError, match=rf"which is not installed: pip install 'lcm_jax\[{extra}\]'"):
        topology.devices(chips)


@pytest.mark.tpu_aot
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu")
def test_a_tiny_model_for_four_chips(tmp_path):
    out = tmp_path / "report.json"
    done = program("--config=configs/shapes_lcm.py", "--topology=v5e:2x2", "--config.mesh.fsdp=4", f"--out={out}")
    assert done.returncode == 0, done.stderr
    found = json.loads(out.read_text())
    assert found["devices"] == 4 and found["chip"]["name"] == "v5e" and 0 < found["utilisation"] < 1
    assert set(found["collectives"]["all-gather"]) == {"fsdp"}
    assert done.stdout.startswith("devices") and "compile options" in done.stdout


def test_generating_for_absent_devices_decodes_in_the_dtype_asked_for(tiny):
    """As `lcm_jax.load` has it; a training run's VAE, which encodes, may be float32 beside networks in bfloat16."""
    config = config_of("shapes_lcm", **{"model.teacher": tiny, "model.dtype": "bfloat16"})
    assert run_models.shapes(config).student.vae.dtype == jnp.float32
    assert aot.generator_of(config, one_device())[0].pipeline.vae.dtype == jnp.bfloat16


def test_generating_for_absent_devices_is_by_the_sampler_of_the_map(tiny, monkeypatch):
    """`lcm_jax.sample`'s default: one that goes from edge to edge of a phased map, and reads no noise between."""
    asked = []
    monkeypatch.setattr(
        sampling,
        "report",
        lambda generator, request, *_: (
            asked.append(request.settings) or {"memory": dict.fromkeys(("needed", "available"), 1)}
        ),
    )
    for name in ("shapes_lcm", "shapes_pcm"):
        aot.analyse_sampling(config_of(name, **{"model.teacher": tiny}), jax.devices()[:1], None, 1, 2, False)
    assert [(one.sampler, one.steps) for one in asked] == [("lcm", 2), ("tcd", 2)]


@pytest.mark.slow
def test_the_peak_by_what_waits_on_the_host(tiny):
    """Of this CPU, which has no limits that are known; 8 bits are an eighth of float32's 32, all but a few."""
    config = config_of("shapes_lcm", **{"model.teacher": tiny})
    whole, lean = (
        aot.analyse_sampling(config, jax.devices()[:1], None, 2, 1, False, **switches)
        for switches in ({}, {"weights": "int8", "offload": "all", "sliced": True})
    )
    for found, mode in ((whole, "none"), (lean, "all")):
        memory = found["memory"]
        held, beside, peak = memory["of_parts"], memory["beside"], memory["peak"]
        used = {"text": "text_encoder", "sampler": "unet", "decoder": "vae"}
        assert memory["weights"] == sum(held.values()) and memory["needed"] == peak[mode]
        assert peak["none"] == memory["weights"] + max(beside.values())
        assert peak["all"] == max(held[part] + beside[name] for name, part in used.items())
        rest = max(beside["sampler"], beside["decoder"]) - held["text_encoder"]
        assert peak["text"] == memory["weights"] + max(beside["text"], rest)
        assert "by --offload: none" in sampling.text(found) and "roofline" not in sampling.text(found)
    assert lean["memory"]["of_parts"]["unet"] < 0.6 * whole["memory"]["of_parts"]["unet"]
    assert lean["memory"]["of_parts"]["vae"] == whole["memory"]["of_parts"]["vae"]
    assert lean["memory"]["beside"]["decoder"] < 0.7 * whole["memory"]["beside"]["decoder"]


@pytest.mark.parametrize(
    "message", ["INTERNAL: Couldn't find output tile sizes that satisfy hlo: %dot", "INTERNAL: other"]
)
def test_a_product_without_tiles_is_left_to_cublas_with_a_line(message, monkeypatch):
    def compile_(compiler_options):
        if "xla_gpu_enable_triton_gemm" not in compiler_options:
            raise jax.errors.JaxRuntimeError(message)
        return "program"

    said = []
    monkeypatch.setattr(topology.waiting, "say", said.append)
    lowered = types.SimpleNamespace(compile=compile_)
    if "other" in message:
        with pytest.raises(jax.errors.JaxRuntimeError, match="other"):
            topology.compile_program(lowered, {"effort": -1})
        assert not said
        return
    program, options = topology.compile_program(lowered, {"effort": -1})
    assert program == "program" and options == {"effort": -1, "xla_gpu_enable_triton_gemm": False}
    assert "cuBLAS" in said[0]


@pytest.mark.gpu_aot
@gpu_kit.needs_compiler
def test_a_step_for_two_nodes_of_gpus(tmp_path):
    """Convolutions are channels-last and attention is cuDNN's; the only collectives are those of the split weights."""
    out = tmp_path / "report.json"
    done = program("--config=configs/shapes_lcm.py", "--topology=h100:2x8", "--config.mesh.fsdp=8", f"--out={out}")
    assert done.returncode == 0, done.stderr
    found = json.loads(out.read_text())
    assert found["devices"] == 16 and found["chip"]["name"] == "h100" and 0 < found["utilisation"] < 1
    assert set(found["collectives"]["all-gather"]) == {"fsdp"} and found["dcn_bytes"] > 0
    kinds = {row["kind"]: row for row in found["kinds"]}
    assert kinds["cuDNN convolution"]["count"] > 100 and "convolution" not in kinds
    assert {kernel["name"] for kernel in found["kernels"]} == {"__cudnn$fmhaSoftmax", "__cudnn$fmhaSoftmaxBackward"}
    parity.close(found["flops"]["total"], found["model_flops"], rtol=0.05)
    assert "cuDNN attention, gradient" in done.stdout and "CUDA takes 1.10 GiB outside" in done.stdout


@pytest.mark.gpu_aot
@gpu_kit.needs_compiler
def test_what_does_not_fit_a_card(tmp_path):
    """Exit code 1: the report, and the remedy in the last line."""
    asked = "--config=configs/shapes_lcm.py", "--sampling", f"--out={tmp_path / 'report.json'}"
    done = program(*asked, "--topology=rtx4090:1", "--batch_size=2")
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "report.json").read_text())
    assert set(found["programs"]) == {"text", "sampler", "decoder"} and found["images"] == 2
    memory = found["memory"]
    assert memory["needed"] == memory["weights"] + max(memory["beside"].values()) < memory["available"]
    done = program(*asked, "--topology=rtx4090:1", "--batch_size=200000")
    assert done.returncode == 1 and "sampler " in done.stdout
    assert re.match(
        "error: 200000 images of 64 x 64 do not fit .*; use a smaller --batch_size", done.stderr.splitlines()[-1]
    )


@pytest.mark.tpu_aot
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu")
def test_gradients_wait_as_shards():
    """Clipping reads every gradient before the first update; until then a device must keep only its shards."""
    mesh = make_mesh(data=1, fsdp=16, devices=topology.devices("v5e:4x4"))
    gather = gather_weights(mesh, jnp.bfloat16)
    depth, width = 12, 4096  # of a smaller model XLA sums all gradients at once, some 100 MB

    def step(weights, x):
        def loss(weights):
            y = x
            for w in weights:
                y = y + jax.checkpoint(lambda y, w: jax.nn.silu(y @ gather(w, y)))(y, w)
            return jnp.square(y.astype(jnp.float32)).mean()

        grads = jax.grad(loss)(weights)
        scale = 1e-3 / jnp.maximum(1.0, optax.tree.norm(grads))
        return jax.tree.map(lambda w, g: w - scale * g, weights, grads)

    weights = abstract_state(mesh, [jax.ShapeDtypeStruct((width, width), jnp.float32)] * depth)
    x = jax.ShapeDtypeStruct((256, width), jnp.bfloat16, sharding=batch_sharding(mesh))
    options = kernels.training("tpu") | aot.QUICK["tpu"]
    compiled = jax.jit(step, donate_argnums=0).lower(weights, x).compile(compiler_options=options)
    whole = depth * width * width * 2  # bytes of all gradients in bfloat16
    assert compiled.memory_analysis().temp_size_in_bytes < 0.5 * whole
