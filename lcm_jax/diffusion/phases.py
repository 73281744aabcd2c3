"""The phased map: the student's step ends at the edge of its phase, not at the origin of the path.

The path is cut at the timesteps of the sampler, of M steps, into M phases. From z_t with the network's output o

    J(o; t -> s) = alpha_s x0(o) + sigma_s eps(o)          J(o; t -> t) = z_t

goes to the edge s below t. With the exact solver of the guided path the product of all jumps is the path itself for
every M, while the map to the origin, noised again between steps, undoes part of the guidance. There are no boundary
scalings: where t is an edge J is the identity.

The edges are the sampler's own timesteps, so that training and sampling agree for any solver grid: M = 4 on 50 points
has 759, 499, 259 and 0. (Cutting the grid into equal parts, as the paper's code does, gives 739, 499, 239, which no
sampler visits.)

Source: Wang et al. 2024, "Phased Consistency Models" (arXiv 2405.18407), equations 5 to 7.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from lcm_jax.diffusion import timesteps
from lcm_jax.diffusion.schedule import NoiseSchedule, broadcast_like, to_eps, to_x0
from lcm_jax.diffusion.solvers import SolverGrid, ddim_jump


def edges(schedule: NoiseSchedule, grid: SolverGrid, phases: int) -> np.ndarray:
    """Ends of the phases, int32 [phases], falling to 0. Raises LcmError for more phases than the grid has points."""
    visited = timesteps.lcm(phases, schedule.num_train_timesteps, grid.num_steps)
    return np.append(visited[1:], 0).astype(np.int32)


def ends(schedule: NoiseSchedule, grid: SolverGrid, phases: Sequence[int]) -> np.ndarray:
    """Where the student's step from each grid point ends, int32 [stages N], one row for each number of phases.

    It is the largest edge that is not above the end of the solver's jump from there.
    """
    return np.stack([_largest_below(edges(schedule, grid, count), grid.prev_timesteps) for count in phases])


def _largest_below(values: np.ndarray, limits: np.ndarray) -> np.ndarray:
    rising = values[::-1]
    return rising[np.searchsorted(rising, limits, side="right") - 1]


def jump(schedule: NoiseSchedule, output, z_t, t, s) -> jax.Array:
    """J(output; t -> s), float32 [b ...]; exactly z_t where s = t.

    Args:
      schedule: noise table and prediction type.
      output: of the network at (z_t, t), [b ...].
      z_t: noisy latents [b ...].
      t, s: integers, [b] or scalar, s <= t.
    """
    x0, eps = to_x0(schedule, output, z_t, t), to_eps(schedule, output, z_t, t)
    z_s = ddim_jump(x0, eps, jnp.asarray(schedule.alphas_cumprod)[s])
    return jnp.where(broadcast_like(t - s, z_t) == 0, jnp.asarray(z_t, jnp.float32), z_s)
