"""What the step's program moves between eight devices: weights and gradients, and no examples."""

import collections
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import sys

import jax
import jax.numpy as jnp

from lcm_jax.diffusion import schedule, solvers
from lcm_jax.distill import objective, state
from lcm_jax.distill.step import learning_rate_schedule, make_optimizer, make_step
from lcm_jax.runtime import mesh as mesh_lib


class Net:
    '''Convolutions with a UNet's signature; `gather` is applied to the weights where they are used.'''

    time_cond_proj_dim, dtype = None, jnp.float32

    def __init__(self, gather):
        self.gather = gather or (lambda weight: weight)

    def apply(self, variables, z, t, text, timestep_cond=None, added_cond_kwargs=None):
        conv = lambda x, w: jax.lax.conv_general_dilated(
            x, self.gather(w), (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
        params = variables["params"]
        hidden = conv(z, params["in"]) + (text.mean(1) @ self.gather(params["text"]))[:, None, None]
        return conv(jnp.tanh(conv(hidden, params["middle"])), params["out"])


data, fsdp, parts = map(int, sys.argv[1:])
mesh = mesh_lib.make_mesh(data, fsdp)
array = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)
params = {"in": array(3, 3, 4, 96), "middle": array(3, 3, 96, 96), "out": array(3, 3, 96, 4), "text": array(768, 96)}
net = Net(mesh_lib.gather_weights(mesh, jnp.float32))
noise = schedule.from_config({"_class_name": "LCMScheduler"})
problem = objective.Problem(
    student=net, teacher=net, schedule=noise, grid=solvers.solver_grid(noise, 50), distance=objective.pseudo_huber,
    w_min=2.0, w_max=9.0, scaling_factor=0.5)
rate = learning_rate_schedule(1e-3)
optimizer = make_optimizer(rate)
initial = mesh_lib.abstract_state(mesh, jax.eval_shape(lambda p: state.create(p, optimizer), params))
frozen = objective.Frozen(teacher=params, null={"encoder_hidden_states": array(1, 7, 768)})
batch = {"mean": array(32, 8, 8, 4), "logvar": array(32, 8, 8, 4), "cond": {"encoder_hidden_states": array(32, 7, 768)}}
rows = mesh_lib.batch_sharding(mesh)
batch = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=rows), batch)
step = jax.jit(make_step(problem, optimizer, 0.9, parts, rate), donate_argnums=0,
               out_shardings=(jax.tree.map(lambda x: x.sharding, initial), mesh_lib.replicated(mesh)))
args = initial, mesh_lib.abstract_state(mesh, frozen), batch, jax.eval_shape(jax.random.key, 0)
print(step.lower(*args).compile().as_text())
"""
MOVES = re.compile(
    r"= (.*?) (all-gather|all-reduce|reduce-scatter|collective-permute|all-to-all|"
    r"collective-broadcast|ragged-all-to-all)(?:-start)?\("
)


def compiled(data: int, fsdp: int, parts: int) -> str:
    environment = os.environ | {"JAX_NUM_CPU_DEVICES": "8", "JAX_PLATFORMS": "cpu"}
    environment.pop("JAX_DISABLE_MOST_OPTIMIZATIONS", None)
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(data), str(fsdp), str(parts)],
        env=environment,
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize(("data", "fsdp", "parts"), [(2, 4, 2), pytest.param(1, 8, 1, marks=pytest.mark.slow)])
def test_weights_and_gradients_move_and_examples_stay(data, fsdp, parts):
    text = compiled(data, fsdp, parts)
    moved = collections.defaultdict(set)
    for result, kind in MOVES.findall(text):
        shapes = re.findall(r"f32\[([\d,]*)\]", result)
        moved[kind] |= {tuple(map(int, filter(None, dims.split(",")))) for dims in shapes}
    print(dict(moved))
    weights = {(3, 3, 96, 96), (768, 96)}
    assert moved.pop("all-gather") == weights
    gradients = {*weights, (96, 768), (3, 3, 4, 96), (3, 3, 96, 4), (5,), ()}
    gradients |= {(3, 3, 96, 96 // fsdp), (96, 768 // fsdp)}
    assert moved.pop("all-reduce") | moved.pop("reduce-scatter", set()) <= gradients
    assert not moved
    if parts > 1:  # the gradient that is summed over the parts is split like the weights
        (sums,) = (line for line in text.splitlines() if " while(" in line and "f32[3,3,4,96]" in line)
        first = re.findall(r"f32\[([\d,]*)\]", sums)[:5]
        assert sorted(first) == sorted(["", "3,3,4,96", f"3,3,96,{96 // fsdp}", "3,3,96,4", f"{768 // fsdp},96"])
