"""Encoding and sampling on several devices: the same results, with the weights in shards."""

import os
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import parity
import pytest
import tiny

from lcm_jax import sample
from lcm_jax.data import encoding
from lcm_jax.pretrained import RECORD, load_pipeline


@pytest.mark.parametrize(("chunk", "pieces"), [(1, [1]), (2, [2]), (4, [3]), (5, [3]), (6, [6]), (0, [6]), (9, [6])])
def test_in_chunks_takes_the_largest_that_divide_the_rows(chunk, pieces):
    seen, x = [], jnp.arange(12.0).reshape(6, 2)

    def fn(rows):
        seen.append(len(rows))
        return {"double": 2 * rows, "sum": rows.sum(1)}

    out = encoding.in_chunks(fn, x, chunk)
    assert seen == pieces
    np.testing.assert_array_equal(out["double"], 2 * x)
    np.testing.assert_array_equal(out["sum"], x.sum(1))


def test_make_encode_gives_the_same_numbers_in_chunks():
    loaded = load_pipeline(tiny.folder("sd1"))
    pixels = np.random.default_rng(0).integers(0, 256, (6, 16, 16, 3), np.uint8)
    want = encoding.make_encode(*loaded)({"pixels": pixels})
    got = encoding.make_encode(*loaded, chunk=2)({"pixels": pixels})
    for name in want:
        parity.near(got[name], want[name], 1e-6, name)


START = """
import re, sys
import jax, numpy as np
from PIL import Image
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_default_matmul_precision", "highest")
import lcm_jax
from lcm_jax import sample
from lcm_jax.data import encoding
from lcm_jax.pretrained import load_pipeline, text
from lcm_jax.pretrained.model import weights_hash
from lcm_jax.runtime.mesh import batch_sharding, make_mesh, param_sharding, place, put_batch
from lcm_jax.sampling.generator import draw_noise
from lcm_jax.sampling.png import to_uint8
param_sharding.__defaults__ = (64,)  # tiny models have no large weights
source = sys.argv[1]

def close(got, want, most=1e-5):
    jax.tree.map(lambda g, w: np.testing.assert_allclose(g, w, rtol=most, atol=most), got, want)
"""

ENCODE = (
    START
    + """
host, params = load_pipeline(source)
rng = np.random.default_rng(0)
rows = {"pixels": rng.integers(0, 256, (32, 16, 16, 3), np.uint8),
        "text_encoder": np.tile(text.tokens(host, ["a red circle", "blue"])["text_encoder"], (16, 1))}
want = encoding.make_encode(host, params)(rows)

def dimensions(shape):  # XLA may transpose a weight
    return tuple(sorted(int(size) for size in shape if int(size) > 1))

weights = {dimensions(leaf.shape) for leaf in jax.tree.leaves(dict(params))}
for data, fsdp, chunk in ((2, 4, 3), (8, 1, 0)):
    mesh = make_mesh(data, fsdp)
    pipeline, placed = load_pipeline(source, put=place(mesh))
    kernel = placed["vae"]["encoder"]["conv_in"]["kernel"]
    assert kernel.sharding.shard_shape(kernel.shape) == (3, 3, 3, 16 // fsdp)
    encode = encoding.make_encode(pipeline, placed, mesh, chunk)
    got = encode(put_batch(mesh, rows))
    assert all(value.sharding.is_equivalent_to(batch_sharding(mesh), value.ndim) for value in got.values())
    close(got, want)
    close(encoding.encode_rows(encode, {name: value[:5] for name, value in rows.items()}, 12),
          {name: value[:5] for name, value in want.items()})
    program = jax.jit(encode).lower(put_batch(mesh, rows)).compile().as_text()
    found = {}
    for shapes, kind in re.findall(r" = (.*?) (all-\\w+|reduce-scatter|collective-permute)(?:-start)?\\(", program):
        found.setdefault(kind, set()).update(re.findall(r"\\[([\\d,]*)\\]", shapes))
    assert found.keys() == ({"all-gather"} if fsdp > 1 else set()), found
    assert {dimensions(shape.split(",")) for shapes in found.values() for shape in shapes} <= weights, found
assert weights_hash(placed["vae"]) == weights_hash(params["vae"])
print("fine")
"""
)

SAMPLE = (
    START
    + """
def images_of(model, noise, **options):
    return model.decode(model.latents(model.encode(prompts), noise, 3.0, lcm_jax.Settings(steps=2), **options))

prompts = ["a red circle", "a blue square", "hello"]
noise = draw_noise(3, range(3), 2, (8, 8, 4))
mesh = make_mesh(2, 4)
one, several = lcm_jax.load(source), lcm_jax.load(source, mesh=mesh)
weights = several.params["unet"]["conv_in"]["kernel"]
assert weights.sharding.shard_shape(weights.shape) == (3, 3, 4, 8)
images = images_of(several, noise)
assert images.shape == (3, 16, 16, 3)
close(images, images_of(one, noise), 1e-4)
close(images_of(several, noise, nag_scale=3.0), images_of(one, noise, nag_scale=3.0), 1e-4)
wide = draw_noise(3, range(3), 1, (8, 16, 4))[0]
close(*(lcm_jax.load(source, mesh=mesh, tiled=True).decode(wide) for mesh in (mesh, None)), 1e-4)
options = [f"--model={source}", f"--out={sys.argv[2]}", "--num_images=1", "--steps=2"]
options += [f"--prompt={prompt}" for prompt in prompts]
assert sample.main([*options, "--fsdp=4", "--guidance_scale=3", "--seed=3"]) == 0
want = to_uint8(images_of(one, draw_noise(3, [0, 0, 0], 2, (8, 8, 4)))).astype(int)
for i, image in enumerate(want):
    written = np.asarray(Image.open(f"{sys.argv[2]}/{i:04d}_0000.png")).astype(int)
    assert abs(written - image).max() <= 1
print("fine")
"""
)


def test_sample_refuses_fsdp_that_does_not_divide_the_devices(capsys, tmp_path):
    options = [f"--model={tiny.folder('sd1')}", "--prompt=hello", f"--out={tmp_path / 'out'}", "--fsdp=3"]
    assert sample.main(options) == 2
    assert "--fsdp=3: does not divide the 1 devices; choose a divisor, or -1 for all" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize(("program", "folder"), [(ENCODE, "sd1"), (SAMPLE, "lcm")], ids=["encode", "sample"])
def test_on_eight_devices(program, folder, tmp_path):
    source = tiny.copy(folder, tmp_path / "model")
    if folder == "lcm":
        tiny.write_json(source / RECORD, {"w_min": 2.0, "w_max": 8.0, "solver_steps": 50})
    done = subprocess.run(
        [sys.executable, "-c", program, str(source), str(tmp_path / "out")],
        capture_output=True,
        text=True,
        env={**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(Path(__file__).parents[1])},
    )
    assert done.stdout.splitlines()[-1:] == ["fine"], done.stderr[-2000:]
