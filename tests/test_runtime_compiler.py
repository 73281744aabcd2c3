"""What XLA gets beside the program: options that this jaxlib knows and that reach the programs, memory, caches."""

import os
import re
import subprocess
import sys

import gpu_kit
import jax
import jax.numpy as jnp
import pytest

from lcm_jax.cost import chips
from lcm_jax.runtime import kernels as compiler
from lcm_jax.runtime import mesh as mesh_lib
from lcm_jax.runtime import topology

YNN = "__ynn_fusion"  # in the compiled text


def soft(x):
    """A product, an exponential and a sum, which XLA's CPU compiler gives to YNNPACK if left alone."""
    return jnp.exp(x @ x).sum(0)


def compiled_text(options):
    return jax.jit(soft, compiler_options=options).lower(jnp.ones((256, 256))).compile().as_text()


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="of the CPU's compiler")
def test_a_cpu_computes_without_ynnpack_but_for_the_sums_of_training():
    assert YNN in compiled_text({})
    assert YNN not in compiled_text(compiler.inference())
    training = compiled_text(compiler.training("cpu"))
    assert YNN in training and " dot(" in training  # the product is XLA's own


def test_each_platform_has_its_own():
    assert compiler.inference("tpu") == {}
    assert all(name.startswith("xla_tpu_") for name in compiler.training("tpu"))
    one, several = compiler.training("gpu"), compiler.training("gpu", 2)
    assert compiler.inference("gpu") == one == {"xla_gpu_dot_merger_threshold_mb": 0}
    assert several == one | {"xla_gpu_enable_latency_hiding_scheduler": True}
    assert compiler.training("cpu", 2) == compiler.training("cpu")


def test_a_jaxlib_gets_only_the_options_that_it_knows(monkeypatch):
    monkeypatch.setattr(compiler, "_OVERLAP", {"gpu": {"xla_gpu_no_such_option": True}})
    monkeypatch.setattr(compiler, "_INFERENCE", {"cpu": {"xla_cpu_no_such_option": ""}})
    assert compiler.inference("cpu") == {}
    assert compiler.training("gpu", 2) == compiler.training("gpu") != {}


@pytest.mark.gpu_aot
@gpu_kit.needs_compiler
def test_the_cuda_compiler_keeps_products_apart():
    """Three products of one operand, which XLA joins below 64 MB and then slices: of q, k and v, one kernel each."""
    where = jax.sharding.SingleDeviceSharding(topology.devices("rtx4090:1")[0])
    x, *weights = (jax.ShapeDtypeStruct((512, 512), jnp.bfloat16, sharding=where) for _ in range(4))
    lowered = jax.jit(lambda x, *weights: [x @ w for w in weights]).lower(x, *weights)
    joined, apart = (
        lowered.compile(compiler_options=options).as_text() for options in (None, compiler.training("gpu", 2))
    )
    assert "[512,1536]" in joined and "[512,1536]" not in apart


@pytest.mark.gpu_aot
@gpu_kit.needs_compiler
def test_gradients_are_summed_beside_other_kernels():
    """Between the start and the end of each reduce-scatter of sharded gradients, and not without the option."""
    mesh = mesh_lib.make_mesh(data=1, fsdp=2, devices=topology.devices("rtx4090:2"))
    gather = mesh_lib.gather_weights(mesh, jnp.bfloat16)

    def loss(weights, x):
        for w in weights:
            x = jax.nn.gelu(x @ gather(w, x))
        return jnp.square(x.astype(jnp.float32)).mean()

    weights = mesh_lib.abstract_state(mesh, [jax.ShapeDtypeStruct((4096, 4096), jnp.float32)] * 4)
    x = jax.ShapeDtypeStruct((1024, 4096), jnp.bfloat16, sharding=mesh_lib.batch_sharding(mesh))
    step = jax.jit(jax.grad(loss), out_shardings=jax.tree.map(lambda w: w.sharding, weights)).lower(weights, x)

    def beside(options: dict) -> list[bool]:
        text = step.compile(compiler_options=options).as_text()
        spans = re.findall(r"= [^\n]* reduce-scatter-start\((.*?) reduce-scatter-done\(", text, re.DOTALL)
        return [" fusion(" in span or " custom-call(" in span for span in spans]

    with_it, without = beside(compiler.training("gpu", 2)), beside(compiler.training("gpu"))
    assert len(with_it) == len(without) == 4 and all(with_it) and not any(without)


AS_PROGRAM = """import os, sys
sys.argv, sys.orig_argv = ["-m"], ["python", "-m", {module!r}]  # as they are while `python -m` imports a package
import lcm_jax
print([os.environ.get(name) for name in {names!r}])
"""
SHARES = ["XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION"]


@pytest.mark.parametrize(
    ("module", "given", "expected"),
    [
        ("lcm_jax.sample", {}, [str(chips.POOL), None]),
        ("lcm_jax.sample", {SHARES[0]: "0.5"}, ["0.5", None]),
        ("lcm_jax.sample", {SHARES[1]: "0.5"}, [None, "0.5"]),  # jax refuses both names at once
        ("mine", {}, [None, None]),
    ],
)
def test_programs_take_most_of_a_gpu_unless_the_user_says_how_much(module, given, expected):
    environment = {name: value for name, value in os.environ.items() if name not in SHARES} | given
    source = AS_PROGRAM.format(module=module, names=SHARES)
    done = subprocess.run([sys.executable, "-c", source], env=environment, capture_output=True, text=True)
    assert done.stdout == f"{expected}\n", done.stderr
