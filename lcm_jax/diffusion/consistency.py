"""The consistency function: the network's x0, forced to be the identity at t = 0.

    f(z_t, t) = c_skip(t) z_t + c_out(t) x0(o; z_t, t)

    u = timestep_scaling t      c_skip = sigma_data^2 / (u^2 + sigma_data^2)      c_out = u / sqrt(u^2 + sigma_data^2)

c_out lacks the factor sigma_data that Song et al. have, because x0 stands here in place of a unit-variance output; so
c_skip + c_out^2 = 1. The boundary t = 0 is the latent with noise sigma_0 (0.029 for Stable Diffusion), not the clean
latent. Both constants are part of a trained model: inference must use those of training.

Source: Luo et al. 2023, "Latent Consistency Models", section 4.1, in the form that its released code has.
"""

import jax
import jax.numpy as jnp

from lcm_jax.diffusion.schedule import NoiseSchedule, expand_to, to_x0

SIGMA_DATA = 0.5
TIMESTEP_SCALING = 10.0


def boundary_scalings(
    t, sigma_data: float = SIGMA_DATA, timestep_scaling: float = TIMESTEP_SCALING
) -> tuple[jax.Array, jax.Array]:
    """(c_skip, c_out), float32 of t's shape; (1, 0) exactly at t = 0. t: training timesteps, [b] or scalar."""
    u = jnp.asarray(t, jnp.float32) * timestep_scaling
    total = u**2 + sigma_data**2
    return sigma_data**2 / total, u / jnp.sqrt(total)


def consistency_function(
    schedule: NoiseSchedule,
    output,
    z_t,
    t,
    sigma_data: float = SIGMA_DATA,
    timestep_scaling: float = TIMESTEP_SCALING,
) -> jax.Array:
    """f(z_t, t) from the network's output, float32. output, z_t: [b ...]; t: integers [b] or scalar."""
    c_skip, c_out = (expand_to(c, z_t) for c in boundary_scalings(t, sigma_data, timestep_scaling))
    return c_skip * jnp.asarray(z_t, jnp.float32) + c_out * to_x0(schedule, output, z_t, t)
