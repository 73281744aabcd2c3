"""How far one step of a sampler is from where the teacher's guided ODE ends: the error that distillation makes small.

    error = RMSE(z_one_step, z_end) / std(z_end)        z_end = DDIM over the whole solver grid, from the same noise

This is what one step of a perfect consistency model would give (Luo et al. 2023, equation 9).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import jax
import numpy as np

from lcm_jax.diffusion import solvers
from lcm_jax.diffusion.denoiser import guided_output
from lcm_jax.generate import Generator, Settings, draw_noise
from lcm_jax.runtime import compiler

COUNT = 64  # captions that the error is taken over, at most


class Endpoints:
    """Endpoints of a teacher's guided ODE for the first captions of a table, solved once for each guidance scale."""

    def __init__(self, teacher: Generator, captions: Sequence[str], solver_steps: int, seed: int, shape: Sequence[int]):
        """Solves nothing yet.

        Args:
          teacher: a model that is guided by two passes.
          captions: picture i's caption stands at i; the first COUNT are taken.
          solver_steps: N of the solver grid.
          seed: of the noise, the table's.
          shape: of a latent, [h w c].
        """
        self.captions = list(captions[:COUNT])
        self.noise = draw_noise(seed, range(len(self.captions)), 1, shape)
        self._ends: dict[float, np.ndarray] = {}
        self._teacher, self._cond = teacher, teacher.encode(self.captions)
        unet, schedule = teacher.pipeline.unet, teacher.pipeline.schedule

        @functools.partial(jax.jit, compiler_options=compiler.inference())
        def solve(params, cond, null, noise, scale):
            def model(x, t):
                return guided_output(unet, params, x, t, cond, null, scale - 1.0)

            return solvers.ode_endpoint(model, noise, schedule, solver_steps)

        self._solve = solve

    def at(self, guidance_scale: float) -> np.ndarray:
        """Latents [b h w c] where the ODE ends at a guidance scale."""
        if guidance_scale not in self._ends:
            teacher = self._teacher
            args = (teacher.params["unet"], self._cond, teacher.null, self.noise[0], guidance_scale)
            self._ends[guidance_scale] = np.asarray(self._solve(*args))
        return self._ends[guidance_scale]

    def error(self, generator: Generator, settings: Settings, guidance_scale: float) -> float:
        """RMSE of one step of a sampler to the endpoint, in standard deviations of the endpoints."""
        cond = generator.encode(self.captions)
        z = np.asarray(generator.latents(cond, self.noise, guidance_scale, settings))
        end = self.at(guidance_scale)
        return float(np.sqrt(np.mean(np.square(z - end))) / np.std(end))
