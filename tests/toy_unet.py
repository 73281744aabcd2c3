"""A network of two layers that is called like a UNet, for tests of training steps."""

import jax.numpy as jnp
from flax import linen as nn


class Net(nn.Module):
    """Something small with a UNet's signature."""

    time_cond_proj_dim: int | None = None

    @nn.compact
    def __call__(self, z, t, text, timestep_cond=None, added_cond_kwargs=None):
        cond = nn.Dense(8, name="text")(text.mean(1)) + jnp.sin(t / 100.0)[:, None]
        if timestep_cond is not None:
            cond += nn.Dense(8, use_bias=False, name="cond_proj")(timestep_cond)
        hidden = nn.Conv(8, (3, 3), name="conv_in")(z) + cond[:, None, None, :]
        return nn.Conv(z.shape[-1], (3, 3), name="conv_out")(nn.tanh(hidden))
