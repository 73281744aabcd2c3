"""The run's state, the EMA target, and a student that starts from its teacher."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import parity
import pytest
from tiny_configs import UNETS

from lcm_jax.distill import state
from lcm_jax.distill.student import adapt, student_of
from lcm_jax.errors import LcmError
from lcm_jax.models import unet as unet_lib
from lcm_jax.pretrained import names


@pytest.mark.parametrize("jit", [lambda create: create, jax.jit])
def test_the_initial_state_shares_no_memory(jit):
    """The step donates the state: if the teacher shared a buffer with it, the teacher's weights would be gone."""
    params = {"a": jnp.arange(6.0).reshape(2, 3)}
    initial = jit(lambda p: state.create(p, optax.adamw(1e-3)))(params)
    assert initial.step == 0 and initial.step.dtype == jnp.int32
    trees = (params, initial.params, initial.ema_params)
    assert len({tree["a"].unsafe_buffer_pointer() for tree in trees}) == 3
    jax.tree.map(lambda x: x.delete(), initial.params)  # as donating does
    for tree in (params, initial.ema_params):
        np.testing.assert_array_equal(tree["a"], np.arange(6).reshape(2, 3))


@pytest.mark.parametrize("abstract", [False, True])
def test_what_a_student_adds_is_as_its_parameters_are(abstract):
    unet = unet_lib.from_config(UNETS["sd15-w"] | {"time_cond_proj_dim": None})
    params = names.abstract_params(unet)
    params = params if abstract else jax.tree.map(lambda x: np.ones(x.shape, np.float32), params)
    placed = []

    def place(value):
        placed.append(value)
        return value

    with_w, weights = student_of(unet, params, 16, place)
    module, adapted = adapt(with_w, weights, jax.random.key(0), 2, 4.0, ("to_q", "to_k"), place)
    assert module.scale == 2 and adapted["base"] is weights
    added = [weights["time_embedding"]["cond_proj"]["kernel"], *jax.tree.leaves(adapted["lora"])]
    assert len(placed) == len(added) > 4 and all(a is p for a, p in zip(added, placed, strict=True))
    kinds = {type(value) for value in added}
    assert kinds == {jax.ShapeDtypeStruct} if abstract else jax.ShapeDtypeStruct not in kinds


def test_ema_distance_shrinks_geometrically():
    """With theta constant, theta^- - theta is mu^n of what it was."""
    rng = np.random.default_rng(0)
    ema, theta = ({"a": {"b": rng.standard_normal(5).astype(np.float32)}} for _ in range(2))
    before, decay, n = ema["a"]["b"] - theta["a"]["b"], 0.95, 30
    for _ in range(n):
        ema = state.update_ema(ema, theta, decay)
    parity.close(ema["a"]["b"] - theta["a"]["b"], decay**n * before, rtol=1e-4, atol=1e-6)


def test_student_has_a_zero_projection_of_w_and_the_teachers_weights():
    teacher = unet_lib.from_config(UNETS["sdxl-w"] | {"time_cond_proj_dim": None})
    params = jax.tree.map(lambda x: np.ones(x.shape, np.float32), names.abstract_params(teacher))
    student, weights = student_of(teacher, params, 24)
    assert student == unet_lib.from_config(UNETS["sdxl-w"] | {"time_cond_proj_dim": 24})
    shapes = jax.tree.map(lambda x: x.shape, weights)
    assert shapes == jax.tree.map(lambda x: x.shape, names.abstract_params(student))
    projection = weights["time_embedding"].pop("cond_proj")
    assert projection["kernel"].shape == (24, 32) and not projection["kernel"].any()
    jax.tree.map(np.testing.assert_array_equal, weights, params)
    assert "cond_proj" not in params["time_embedding"]  # the teacher's tree is not touched


def test_a_distilled_student_is_taken_as_it_is():
    unet = unet_lib.from_config(UNETS["sd15-w"])
    params = {"time_embedding": {"cond_proj": {"kernel": np.ones((16, 32), np.float32)}}}
    student, weights = student_of(unet, params, 16)
    assert student is unet and weights is params
    with pytest.raises(LcmError, match=r"dimension 16.*w_embedding_dim is 256"):
        student_of(unet, {}, 256)
