"""The run's state, the EMA target, and a student that starts from its teacher."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import parity
import pytest
from tiny_configs import UNETS

from lcm_jax.distill import state
from lcm_jax.errors import LcmError
from lcm_jax.models import unet as unet_lib
from lcm_jax.pretrained import names


def test_state_begins_with_two_copies():
    params = {"a": np.arange(6, dtype=np.float32).reshape(2, 3)}
    begun = state.create(params, optax.adamw(1e-3))
    assert begun.step == 0 and begun.step.dtype == jnp.int32
    for tree in (begun.params, begun.ema_params):
        np.testing.assert_array_equal(tree["a"], params["a"])
    params["a"] += 1
    begun.params["a"].delete()  # as donating does
    np.testing.assert_array_equal(begun.ema_params["a"], params["a"] - 1)


def test_a_jitted_beginning_shares_no_memory_with_its_origin():
    """The step donates the state: were a buffer the teacher's as well, the teacher would be gone."""
    params = {"a": jnp.arange(6.0).reshape(2, 3)}
    begun = jax.jit(lambda p: state.create(p, optax.adamw(1e-3)))(params)
    trees = (params, begun.params, begun.ema_params)
    assert len({tree["a"].unsafe_buffer_pointer() for tree in trees}) == 3
    jax.tree.map(lambda x: x.delete(), begun)
    np.testing.assert_array_equal(params["a"], np.arange(6).reshape(2, 3))


@pytest.mark.parametrize("abstract", [False, True])
def test_what_a_student_adds_is_as_its_parameters_are(abstract):
    unet = unet_lib.from_config(UNETS["sd15-w"] | {"time_cond_proj_dim": None})
    params = names.abstract_params(unet)
    params = params if abstract else jax.tree.map(lambda x: np.ones(x.shape, np.float32), params)
    placed = []

    def place(value):
        placed.append(value)
        return value

    told, weights = state.student_of(unet, params, 16, place)
    module, adapted = state.adapt(told, weights, jax.random.key(0), 2, 4.0, ("to_q", "to_k"), place)
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


@pytest.mark.parametrize(("decay", "which"), [(0.0, "theta"), (1.0, "ema")])
def test_ema_ends_of_the_range(decay, which):
    values = {"theta": jnp.float32([1.5]), "ema": jnp.float32([-2.0])}
    np.testing.assert_array_equal(state.update_ema(values["ema"], values["theta"], decay), values[which])


def test_student_has_a_zero_projection_of_w_and_the_teachers_weights():
    teacher = unet_lib.from_config(UNETS["sdxl-w"] | {"time_cond_proj_dim": None})
    params = jax.tree.map(lambda x: np.ones(x.shape, np.float32), names.abstract_params(teacher))
    student, begun = state.student_of(teacher, params, 24)
    assert student == unet_lib.from_config(UNETS["sdxl-w"] | {"time_cond_proj_dim": 24})
    shapes = jax.tree.map(lambda x: x.shape, begun)
    assert shapes == jax.tree.map(lambda x: x.shape, names.abstract_params(student))
    projection = begun["time_embedding"].pop("cond_proj")
    assert projection["kernel"].shape == (24, 32) and not projection["kernel"].any()
    jax.tree.map(np.testing.assert_array_equal, begun, params)
    assert "cond_proj" not in params["time_embedding"]  # the teacher's tree is not touched


def test_a_distilled_student_goes_on_as_it_is():
    unet = unet_lib.from_config(UNETS["sd15-w"])
    params = {"time_embedding": {"cond_proj": {"kernel": np.ones((16, 32), np.float32)}}}
    student, begun = state.student_of(unet, params, 16)
    assert student is unet and begun is params


def test_another_embedding_dimension_is_refused():
    unet = unet_lib.from_config(UNETS["sd15-w"])
    with pytest.raises(LcmError, match=r"dimension 16.*w_embedding_dim is 256") as error:
        state.student_of(unet, {}, 256)
    assert "\n" not in str(error.value)
