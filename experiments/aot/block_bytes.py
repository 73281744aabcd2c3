"""What causes the memory traffic of one UNet block on a TPU or GPU, forward and with its gradient; needs neither.

    python -m experiments.aot.block_bytes --model=sd15 --block=resnet [--images=8] [--chips=v5e:2x2|h100:1]
        [--remat=none] [--attention=auto] [--thorough] [--lower=FILE]

One chip, bfloat16, weights float32. Blocks: resnet, transformer (at the upper level), low (the transformer at the level
that has most of them: 16x16 in SD 1.5, 32x32 in SDXL). Prints FLOPs, bytes, temporaries, roofline time and the
operations that move the most. `--thorough` compiles without the options that make compiling quick.
"""

import dataclasses
import functools
import time

import jax
import jax.numpy as jnp
from absl import app, flags

from lcm_jax import aot
from lcm_jax.cost import chips, flops, roofline
from lcm_jax.models.attention import AttentionFn, dot_product_attention
from lcm_jax.models.layers import ResnetBlock2D, Run, remat
from lcm_jax.models.unet import Transformer2DModel
from lcm_jax.runtime import kernels as attention
from lcm_jax.runtime import mesh as mesh_lib
from lcm_jax.runtime import topology

_MODEL = flags.DEFINE_enum("model", "sd15", ["sd15", "sdxl"], "widths")
_BLOCK = flags.DEFINE_list("block", ["resnet", "transformer", "low"], "blocks to compile")
_IMAGES = flags.DEFINE_integer("images", 8, "images on the chip")
_CHIPS = flags.DEFINE_string("chips", "v5e:2x2", "its first chip is the target")
_REMAT = flags.DEFINE_string("remat", "none", "as train.remat")
_ATTENTION = flags.DEFINE_string("attention", "auto", "as model.attention")
_THOROUGH = flags.DEFINE_bool("thorough", False, "compile as a training run does")
_LOWER = flags.DEFINE_string("lower", "", "file to which the optimised programs are appended")


@dataclasses.dataclass(frozen=True)
class Shape:
    side: int
    width: int
    heads: int
    depth: int
    context: int
    linear: bool


SHAPES = {
    "sd15": {"upper": Shape(64, 320, 8, 1, 768, False), "low": Shape(16, 1280, 8, 1, 768, False)},
    "sdxl": {"upper": Shape(64, 640, 10, 2, 2048, True), "low": Shape(32, 1280, 20, 2, 2048, True)},
}


def block(name: str, shape: Shape, kernel: AttentionFn, choice: str) -> tuple:
    """(module, shapes of its arguments after the parameters); choice: what is recomputed for gradients."""
    dtype, n = jnp.bfloat16, _IMAGES.value
    x = jax.ShapeDtypeStruct((n, shape.side, shape.side, shape.width), dtype)
    if name == "resnet":
        temb = jax.ShapeDtypeStruct((n, 1280), dtype)
        return remat(ResnetBlock2D, choice)(shape.width, 32, 1e-5, Run(dtype)), (x, temb)
    context = jax.ShapeDtypeStruct((n, 77, shape.context), dtype)
    module = Transformer2DModel(shape.heads, shape.depth, 32, shape.linear, Run(dtype, kernel, remat=choice))
    return module, (x, context)


def programs(module) -> dict:
    """The forward pass; and forward and backward, for weights and inputs, from a given cotangent."""

    def gradient(params, cotangent, *args):
        out, backward = jax.vjp(module.apply, params, *args)
        return out, backward(cotangent)

    return {"forward": module.apply, "gradient": gradient}


def main(_) -> None:
    devices = topology.devices(_CHIPS.value)[:1]
    mesh = mesh_lib.make_mesh(devices=devices)
    chip = chips.lookup(devices[0].device_kind)
    kernel = attention.choose(_ATTENTION.value, jnp.bfloat16, mesh)
    for name in _BLOCK.value:
        shape = SHAPES[_MODEL.value]["low" if name == "low" else "upper"]
        module, args = block(name, shape, kernel, _REMAT.value)
        plain, _ = block(name, shape, dot_product_attention, "none")
        params = jax.eval_shape(plain.init, jax.random.key(0), *args)
        place = functools.partial(
            jax.tree.map, lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=mesh_lib.replicated(mesh))
        )
        for kind, program in programs(module).items():
            values = place((params, *args) if kind == "forward" else (params, args[0], *args))
            start = time.time()
            model_flops = flops.count(programs(plain)[kind], *values)
            with topology.tracing_for(chip):
                lowered = jax.jit(program).lower(*values)
            compiled = lowered.compile({} if _THOROUGH.value else aot.QUICK[devices[0].platform])
            report(f"{_MODEL.value} {name} {kind}", compiled, mesh, chip, model_flops, start)


def report(title: str, compiled, mesh, chip, model_flops: float, start: float) -> None:
    found = roofline.report(compiled, mesh, _IMAGES.value, model_flops, chip)
    seconds = found["seconds"]
    print(
        f"\n{title}: {found['bytes']['total'] / 2**20:.0f} MiB moved, temporaries "
        f"{found['memory']['temporaries'] / 2**20:.0f} MiB, FLOPs {found['flops']['total']:.3g} (model "
        f"{model_flops:.3g}), {1e3 * seconds['hbm']:.2f} ms HBM, {1e3 * seconds['flops']:.2f} ms FLOPs, utilisation "
        f"{found['utilisation']:.2f}, compiled in {time.time() - start:.0f} s"
    )
    for row in found["heaviest"]:
        print(f"    {row['bytes'] / 2**20:8.0f} MiB  {row['count']:3d} x {row['operation'][-110:]}")
    for kernel in found["kernels"]:
        print(f"    kernel {kernel}")
    if _LOWER.value:
        with open(_LOWER.value, "a", encoding="utf-8") as file:
            print(f"### {title}\n{compiled.as_text()}", file=file)
    print(end="", flush=True)


if __name__ == "__main__":
    app.run(main)
