"""Reading weights directly to their devices: one tensor after another, never a second copy of a model."""

import json
import os
import subprocess
import sys
from pathlib import Path

import family
import jax
import numpy as np
import pytest
import tiny

from lcm_jax.models import unet
from lcm_jax.pretrained import load_pipeline, load_unet, load_vae, names, save_single_file
from lcm_jax.pretrained.safetensors_io import write_weights
from lcm_jax.runtime import mesh as mesh_lib

MOST = 1.3  # times the size of a model: the anonymous memory that loading it may need


class Put:
    """What `put` returns here for an array."""

    def __init__(self, value):
        assert isinstance(value, np.ndarray) and value.flags.c_contiguous
        self.value, self.shape = value, value.shape


def assert_put(found, plain):
    assert jax.tree.structure(found) == jax.tree.structure(plain)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(plain), strict=True):
        assert isinstance(one, Put) and np.array_equal(one.value, other)


def test_every_parameter_of_every_part_is_put():
    folder = tiny.folder("sdxl")
    plain, found = (load_pipeline(folder, put=put)[1] for put in (None, Put))
    assert found.keys() == {"unet", "vae", "text_encoder", "text_encoder_2"}
    assert_put(found, plain)
    for load, part in ((load_unet, "unet"), (load_vae, "vae")):
        assert_put(load(folder, put=Put)[1], plain[part])


def test_parameters_of_single_files_and_of_replaced_parts_are_put(tmp_path):
    folder, file = tiny.folder("sd1"), tmp_path / "model.safetensors"
    save_single_file(*load_pipeline(folder), file)
    options = dict(config=folder, unet=folder)
    assert_put(load_pipeline(file, **options, put=Put)[1], load_pipeline(file, **options)[1])


def test_a_tensor_is_put_before_the_next_is_read():
    module = unet.from_config(tiny.UNETS["sd1"])
    shapes = {key: parameter.torch_shape for key, parameter in names.torch_table(module).items()}
    events = []

    def read(key):
        events.append("read")
        return np.zeros(shapes[key], np.float32)

    names.read_params(module, shapes, read, put=lambda value: events.append("put"))
    assert events == ["read", "put"] * len(shapes)


def test_to_a_mesh():
    mesh = mesh_lib.make_mesh(devices=jax.devices()[:1])
    found = load_unet(tiny.folder("sd1"), put=mesh_lib.place(mesh))[1]
    assert all(isinstance(leaf, jax.Array) and leaf.sharding.mesh == mesh for leaf in jax.tree.leaves(found))
    jax.tree.map(np.testing.assert_array_equal, found, load_unet(tiny.folder("sd1"))[1])


LOAD = """
import json, sys, threading
from pathlib import Path
import jax, numpy as np
jax.config.update("jax_num_cpu_devices", int(sys.argv[2]))
from lcm_jax.pretrained import load_unet
from lcm_jax.runtime import mesh as m

def anonymous():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("RssAnon:"))

put = m.place(m.make_mesh(1, -1))
jax.block_until_ready(put(np.zeros((512, 512), np.float32)))  # memory that comes with the first array
before, peak, done = anonymous(), 0, threading.Event()

def watch():
    global peak
    while not done.wait(0.002):
        peak = max(peak, anonymous())

watching = threading.Thread(target=watch)
watching.start()
_, params = load_unet(sys.argv[1], put=put)
jax.block_until_ready(params)
done.set()
watching.join()
leaves = jax.tree.leaves(params)
shards = sum(shard.data.nbytes for leaf in leaves for shard in leaf.addressable_shards)
size = sum(leaf.nbytes for leaf in leaves)
print(json.dumps({"peak": max(peak, anonymous()) - before, "size": size, "shards": shards}))
"""


@pytest.fixture(scope="module")
def sd15(tmp_path_factory):
    """A UNet of SD 1.5's size with random weights in float32, 3.4 GB; gone after the tests."""
    folder = tmp_path_factory.mktemp("sd15")
    tiny.write_json(folder / "config.json", family.UNETS["sd15"])
    table = names.torch_table(unet.from_config(family.UNETS["sd15"]))
    shapes = {key: parameter.torch_shape for key, parameter in table.items()}
    normal, file = np.random.default_rng(0).standard_normal, folder / "diffusion_pytorch_model.safetensors"
    write_weights(file, shapes, lambda key: normal(shapes[key], np.float32), "float32")
    yield folder
    file.unlink()


@pytest.mark.slow
@pytest.mark.parametrize("devices", [1, 8])
def test_no_second_copy_of_a_model_while_it_is_read(sd15, devices):
    done = subprocess.run(
        [sys.executable, "-c", LOAD, str(sd15), str(devices)],
        capture_output=True,
        text=True,
        env={**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(Path(__file__).parents[1])},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout)
    print(f"{devices} devices: {found['size']} bytes, peak {found['peak'] / found['size']:.3f} times that")
    assert found["size"] == 4 * family.UNET_SIZES["sd15"][0]
    assert found["shards"] < 1.02 * found["size"]  # all but the small ones are split
    assert found["peak"] < MOST * found["size"]
