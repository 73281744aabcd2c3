"""Collectives, loops and kernels in program text: programs compiled for eight CPU devices, and text of a TPU."""

import json
import os
import subprocess
import sys

import pytest

from lcm_jax.cost import hlo

# Prints {case: [[kind, link bytes, executions, axes], ...]} for programs on a mesh of data 2 x fsdp 4.
EIGHT = """
import json
import jax
jax.config.update("jax_num_cpu_devices", 8)
import jax.numpy as jnp
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec as P
from lcm_jax.cost import hlo

mesh = jax.make_mesh((2, 4), ("data", "fsdp"))

def in_loop(x):
    return lax.scan(lambda c, _: (lax.psum(c, "fsdp") / 4 + 1, None), x, None, length=5)[0]

CASES = {
    "psum": (lambda x: lax.psum(x, "fsdp"), P("data")),
    "psum_all": (lambda x: lax.psum(x, ("data", "fsdp")), P()),
    "all_gather": (lambda x: lax.all_gather(x, "fsdp", tiled=True), P("data")),
    "all_gather_data": (lambda x: lax.all_gather(x, "data", tiled=True), P("fsdp")),
    "psum_scatter": (lambda x: lax.psum_scatter(x, "fsdp", tiled=True), P(("data", "fsdp"))),
    "all_to_all": (lambda x: lax.all_to_all(x, "fsdp", 1, 0, tiled=True), P(("data", "fsdp"))),
    "ppermute": (lambda x: lax.ppermute(x, "data", [(0, 1), (1, 0)]), P(("data", "fsdp"))),
    "in_loop": (in_loop, P("data")),
}
x = jax.ShapeDtypeStruct((64, 128), jnp.float32, sharding=NamedSharding(mesh, P(("data", "fsdp"))))
found = {}
for name, (f, out) in CASES.items():
    part = jax.shard_map(f, mesh=mesh, in_specs=P(("data", "fsdp")), out_specs=out, check_vma=False)
    program = hlo.read(jax.jit(part).lower(x).compile().as_text())
    assert program.devices == 8 and not program.unknown
    found[name] = [[c.kind, c.link_bytes, c.times, c.axes(dict(mesh.shape))] for c in hlo.collectives(program)]

# A loop of products: (FLOPs, bytes) of the iterations after the first, on one device.
def loop(x, w):
    return lax.scan(lambda c, _: (jnp.tanh(c @ w), None), x, None, length=5)[0]
w = jax.ShapeDtypeStruct((128, 128), jnp.float32, sharding=NamedSharding(mesh, P()))
found["repeated"] = hlo.repeated(hlo.operations(hlo.read(jax.jit(loop).lower(x, w).compile().as_text())))
print(json.dumps(found))
"""
PART = 8 * 128 * 4  # bytes of one device's shard of x


@pytest.fixture(scope="module")
def eight():
    env = os.environ | {"JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-c", EIGHT], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize(
    ("case", "want"),
    [
        ("psum", ["all-reduce", 2 * PART * 3 / 4, 1, ["fsdp"]]),
        ("psum_all", ["all-reduce", 2 * PART * 7 / 8, 1, ["data", "fsdp"]]),
        ("all_gather", ["all-gather", 3 * PART, 1, ["fsdp"]]),
        ("all_gather_data", ["all-gather", PART, 1, ["data"]]),
        ("psum_scatter", ["reduce-scatter", 3 * PART / 4, 1, ["fsdp"]]),
        ("all_to_all", ["all-to-all", PART * 3 / 4, 1, ["fsdp"]]),
        ("ppermute", ["collective-permute", PART, 1, ["data"]]),
        ("in_loop", ["all-reduce", 2 * PART * 3 / 4, 5, ["fsdp"]]),
    ],
)
def test_collectives_of_known_size(eight, case, want):
    assert eight[case] == [want]


def test_repeated_iterations_of_a_loop(eight):
    flops, memory = eight["repeated"]
    assert flops == 4 * 2 * 8 * 128 * 128
    assert 4 * (128 * 128 * 4) < memory < 4 * (128 * 128 * 4 + 20 * PART)


TPU = """\
HloModule jit_step, is_scheduled=true, num_partitions=16

%fused (p.1: bf16[64,320], p.2: bf16[320,640]) -> bf16[64,640] {
  %p.1 = bf16[64,320]{1,0:T(8,128)(2,1)} parameter(0)
  %p.2 = bf16[320,640]{1,0:T(8,128)(2,1)S(1)} parameter(1)
  ROOT %convolution.1 = bf16[64,640]{1,0:T(8,128)(2,1)} convolution(%p.1, %p.2), dim_labels=bf_io->bf
}

%condition (c.1: (u32[], bf16[64,320])) -> pred[] {
  %constant.1 = u32[]{:T(128)} constant(8)
  %c.1 = (u32[]{:T(128)}, bf16[64,320]{1,0:T(8,128)(2,1)}) parameter(0)
  %get-tuple-element.1 = u32[]{:T(128)} get-tuple-element(%c.1), index=0
  ROOT %compare.1 = pred[]{:T(512)} compare(%get-tuple-element.1, %constant.1), direction=LT
}

%body (b.1: (u32[], bf16[64,320])) -> (u32[], bf16[64,320]) {
  %b.1 = (u32[]{:T(128)}, bf16[64,320]{1,0:T(8,128)(2,1)}) parameter(0)
  %get-tuple-element.2 = bf16[64,320]{1,0:T(8,128)(2,1)} get-tuple-element(%b.1), index=1
  %weights = bf16[320,640]{1,0:T(8,128)(2,1)S(1)} constant({...})
  %fusion.1 = bf16[64,640]{1,0:T(8,128)(2,1)} fusion(%get-tuple-element.2, %weights), kind=kOutput, calls=%fused, \
metadata={op_name="jit(step)/block_3/dot"}
  %collective-permute-start.1 = (bf16[64,320]{1,0}, bf16[64,320]{1,0}, u32[]{:S(2)}, u32[]{:S(2)}) \
collective-permute-start(%get-tuple-element.2), channel_id=1, source_target_pairs={{0,1},{1,2},{2,3},{3,0}}
  %collective-permute-done.1 = bf16[64,320]{1,0} collective-permute-done(%collective-permute-start.1)
  ROOT %tuple.1 = (u32[]{:T(128)}, bf16[64,320]{1,0:T(8,128)(2,1)}) tuple(%n, %collective-permute-done.1)
}

ENTRY %main (x.1: bf16[64,320], y.1: f32[20,256]) -> f32[320,256] {
  %x.1 = bf16[64,320]{1,0:T(8,128)(2,1)} parameter(0)
  %y.1 = f32[20,256]{1,0:T(8,128)} parameter(1)
  %while.1 = (u32[]{:T(128)}, bf16[64,320]{1,0:T(8,128)(2,1)}) while(%tuple.0), condition=%condition, body=%body
  %splash_mha_fwd.3 = bf16[2,8,4096,40]{3,2,1,0} custom-call(%mask, %q, %k), custom_call_target="tpu_custom_call"
  %mask = s8[1,4,4]{2,1,0} constant({...})
  %q = bf16[2,8,4096,40]{3,2,1,0} copy(%x.1)
  %k = bf16[2,8,1024,40]{3,2,1,0} copy(%x.1)
  %all-gather-start.1 = (f32[20,256]{1,0}, f32[80,256]{1,0}) all-gather-start(%y.1), \
replica_groups=[4,4]<=[4,4]T(1,0), dimensions={0}, use_global_device_ids=true
  %all-gather-done.1 = f32[80,256]{1,0} all-gather-done(%all-gather-start.1)
  %all-reduce.1 = (f32[20,256]{1,0}, /*index=1*/bf16[10]{0}) all-reduce(%y.1, %x.1), \
replica_groups={{0,1,2,3},{4,5,6,7},{8,9,10,11},{12,13,14,15}}, to_apply=%add
  ROOT %all-gather.2 = f32[320,256]{1,0:T(8,128)} all-gather(%y.1), replica_groups=mesh['a'=1,'b'=16] {'b'}, \
dimensions={0}, frontend_attributes={async_collective_name="all-gather-start.9"}
}
"""


def test_collectives_of_a_tpu_program():
    program = hlo.read(TPU)
    assert program.devices == 16 and program.times["body"] == 8 and program.fused == {"fused"} and not program.unknown
    mesh = {"data": 4, "fsdp": 4}
    found = {(c.kind, c.axes(mesh)): (c.link_bytes, c.times) for c in hlo.collectives(program)}
    assert found == {
        ("collective-permute", ("fsdp",)): (64 * 320 * 2, 8),
        ("all-gather", ("data",)): (3 * 20 * 256 * 4, 1),
        ("all-reduce", ("fsdp",)): (2 * (20 * 256 * 4 + 10 * 2) * 3 / 4, 1),
        ("all-gather", ("data", "fsdp")): (15 * 20 * 256 * 4, 1),
    }


def test_operations_of_a_tpu_program():
    operations = list(hlo.operations(hlo.read(TPU)))
    flops, memory = hlo.repeated(operations)
    assert flops == 7 * 2 * 64 * 640 * 320
    read_and_written = 64 * 320 * 2 + 64 * 640 * 2  # the weights are in the chip's own memory
    permuted = 3 * 64 * 320 * 2  # operand, and both halves of the result type
    assert memory == 7 * (read_and_written + permuted + (4 + 4 + 1))  # and the condition's comparison
    assert ("fusion jit(step)/block_*/dot", 8, 8 * read_and_written) in hlo.heaviest(operations)


def test_kernels_of_a_tpu_program():
    (kernel,) = hlo.kernels(hlo.read(TPU))
    assert kernel.operands == ((2, 8, 4096, 40), (2, 8, 1024, 40)) and kernel.times == 1
    assert kernel.bytes == 16 + 2 * 2 * 8 * 4096 * 40 * 2 + 2 * 8 * 1024 * 40 * 2


def test_loop_of_unknown_length_is_listed_and_counts_once():
    program = hlo.read(TPU.replace("direction=LT", "direction=NE"))
    assert program.unknown == ("while.1",) and program.times["body"] == 1
    assert hlo.repeated(hlo.operations(program)) == (0, 0)


def test_unknown_notation_of_replica_groups():
    with pytest.raises(ValueError, match="unknown notation of replica groups: , replica_groups=tree"):
        hlo.collectives(hlo.read(TPU.replace("replica_groups=[4,4]", "replica_groups=tree[4,4]")))


def test_size_bytes():
    sizes = {
        "f32[2,3]{1,0}": 24,
        "(bf16[4]{0}, /*index=1*/s8[3]{0})": 11,
        "pred[]": 1,
        "bf16[4]{0:T(8,128)S(1)}": 0,
        "f8e4m3fn[10]{0}": 10,
        "u32[]{:S(2)}": 0,
        "token[]": 0,
        "s4[6]{0}": 6,
    }
    assert {shape: hlo.size_bytes(shape) for shape in sizes} == sizes


CONVOLUTION = """\
HloModule jit_step, num_partitions=1

ENTRY %main (x: f32[2,8,8,4]) -> f32[2,8,8,16] {{
  %x = f32{left}{{3,2,1,0}} parameter(0)
  %k = f32{right}{{3,2,1,0}} parameter(1)
  ROOT %convolution.1 = f32{out}{{3,2,1,0}} convolution(%x, %k), {rest}
}}
"""


@pytest.mark.parametrize(
    ("left", "right", "out", "window", "labels", "products"),
    [
        ("[2,8,8,4]", "[3,3,4,16]", "[2,6,6,16]", "3x3", "b01f_01io->b01f", 2 * 36 * 16 * 9 * 4),
        ("[2,8,8,4]", "[3,3,4,16]", "[2,8,8,16]", "3x3 pad=1_1x1_1", "b01f_01io->b01f", 2 * 16 * 4 * 22**2),
        ("[2,8,8,4]", "[3,3,4,16]", "[2,4,4,16]", "3x3 stride=2x2 pad=1_1x1_1", "b01f_01io->b01f", 2 * 16 * 4 * 11**2),
        # 5 products of [6 7] by [7 8] as a convolution over the batch axis: mostly padding and zeros.
        ("[5,6,7,1]", "[5,7,8,1]", "[5,6,8,1]", "5x1 stride=4x1 lhs_dilate=5x1", "0bf1_0io1->0bf1", 5 * 6 * 7 * 8),
    ],
    ids=["valid", "padded", "strided", "batched product"],
)
def test_flops_of_a_convolution(left, right, out, window, labels, products):
    rest = f"window={{size={window}}}, dim_labels={labels}"
    program = hlo.read(CONVOLUTION.format(left=left, right=right, out=out, rest=rest))
    (convolution,) = hlo.operations(program)
    assert convolution.flops == 2 * products


# Of a program for an NVIDIA GPU: a convolution with its gradients, a product by cuBLAS and one by Triton, attention.
GPU = r"""HloModule jit_step, is_scheduled=true, num_partitions=1

%inside (p: bf16[128,256], q: bf16[256,512]) -> bf16[128,512] {
  %p = bf16[128,256]{1,0} parameter(0)
  %q = bf16[256,512]{1,0} parameter(1)
  ROOT %dot.1 = bf16[128,512]{1,0} dot(%p, %q), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

ENTRY %main (x: bf16[2,32,32,8], k: bf16[16,3,3,8], g: bf16[2,32,32,16], a: bf16[128,256], b: bf16[256,512]) -> bf16[] {
  %x = bf16[2,32,32,8]{3,2,1,0} parameter(0)
  %k = bf16[16,3,3,8]{3,2,1,0} parameter(1)
  %g = bf16[2,32,32,16]{3,2,1,0} parameter(2)
  %a = bf16[128,256]{1,0} parameter(3)
  %b = bf16[256,512]{1,0} parameter(4)
  %conv.1 = (bf16[2,32,32,16]{3,2,1,0}, u8[1000]{0}) custom-call(%x, %k), window={size=3x3 pad=1_1x1_1}, \
dim_labels=b01f_o01i->b01f, custom_call_target="__cudnn$convBiasActivationForward"
  %conv.2 = (bf16[2,32,32,8]{3,2,1,0}, u8[0]{0}) custom-call(%g, %k), window={size=3x3 pad=1_1x1_1}, \
dim_labels=b01f_o01i->b01f, custom_call_target="__cudnn$convBackwardInput"
  %conv.3 = (bf16[16,3,3,8]{3,2,1,0}, u8[0]{0}) custom-call(%x, %g), window={size=3x3 pad=1_1x1_1}, \
dim_labels=b01f_o01i->b01f, custom_call_target="__cudnn$convBackwardFilter"
  %gemm = (bf16[128,512]{1,0}, s8[4194304]{0}) custom-call(%a, %b), custom_call_target="__cublas$lt$matmul", \
backend_config={"gemm_backend_config":{"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"],\
"rhs_contracting_dimensions":["0"],"lhs_batch_dimensions":[],"rhs_batch_dimensions":[]}}}
  %triton = bf16[128,512]{1,0} fusion(%a, %b), kind=kCustom, calls=%inside, \
backend_config={"fusion_backend_config":{"kind":"__triton_nested_gemm_fusion"}}
  ROOT %copy = bf16[] copy(%x)
}
""".replace("\\\n", "")


def test_kernels_of_a_gpu_program_by_kind():
    """A convolution and its two gradients have the same FLOPs; cuDNN's and cuBLAS's workspaces are no traffic."""
    program = hlo.read(GPU)
    found = hlo.kinds(hlo.operations(program))
    conv, product = 2 * (2 * 32 * 32) * (3 * 3 * 8) * 16, 2 * 128 * 256 * 512
    x, k, g, gemm = 2 * 32 * 32 * 8 * 2, 16 * 9 * 8 * 2, 2 * 32 * 32 * 16 * 2, (128 * 256 + 256 * 512 + 128 * 512) * 2
    assert found == {
        "cuDNN convolution": (1, conv, x + k + g),
        "cuDNN convolution, input's gradient": (1, conv, x + k + g),
        "cuDNN convolution, filter's gradient": (1, conv, x + k + g),
        "cuBLAS product": (1, product, gemm),
        "Triton product": (1, product, gemm),
        "copy": (1, 0, x + 2),
    }
    assert hlo.kernels(program) == []  # these are counted as operations
