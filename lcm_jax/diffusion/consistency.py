"""The consistency function: the network's x0, forced to be the identity at t = 0.

    f(z_t, t) = c_skip(t) z_t + c_out(t) x0(o; z_t, t)

    u = timestep_scaling t      c_skip = sigma_data^2 / (u^2 + sigma_data^2)      c_out = u / sqrt(u^2 + sigma_data^2)

c_out does not have the factor sigma_data of Song et al., because it multiplies x0 and not an output of unit variance;
so c_skip + c_out^2 = 1. The boundary t = 0 is the latent with noise sigma_0 (0.029 for Stable Diffusion), not the clean
latent. Both constants belong to a trained model: inference must use those of its training.

Source: Luo et al. 2023, "Latent Consistency Models", section 4.1, in the form of its released code.
"""

import jax
import jax.numpy as jnp

from lcm_jax.diffusion.schedule import NoiseSchedule, broadcast_like, to_x0

SIGMA_DATA = 0.5
TIMESTEP_SCALING = 10.0


def boundary_scalings(
    t, sigma_data: float = SIGMA_DATA, timestep_scaling: float = TIMESTEP_SCALING
) -> tuple[jax.Array, jax.Array]:
    """(c_skip, c_out), float32 with the shape of t; exactly (1, 0) at t = 0. t: training timesteps, [b] or scalar."""
    u = jnp.asarray(t, jnp.float32) * timestep_scaling
    total = u**2 + sigma_data**2
    return sigma_data**2 / total, u / jnp.sqrt(total)  # c_skip, c_out


def consistency_function(
    schedule: NoiseSchedule,
    output,
    z_t,
    t,
    sigma_data: float = SIGMA_DATA,
    timestep_scaling: float = TIMESTEP_SCALING,
) -> jax.Array:
    """f(z_t, t) from the network's output, float32.

    Args:
      schedule: noise table and prediction type.
      output: of the network at (z_t, t), [b ...].
      z_t: noisy latents [b ...].
      t: integers, [b] or scalar.
      sigma_data, timestep_scaling: those that the model was trained with.
    """
    c_skip, c_out = (broadcast_like(c, z_t) for c in boundary_scalings(t, sigma_data, timestep_scaling))
    return c_skip * jnp.asarray(z_t, jnp.float32) + c_out * to_x0(
        schedule, output, z_t, t
    )  # Luo et al. 2023, section 4.1
