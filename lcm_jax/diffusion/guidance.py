"""Classifier-free guidance; sampling its weight w, and embedding it as an input of the student.

    guided = cond + w (cond - uncond)         w = 0 is no guidance; users give guidance_scale = w + 1

The weights 1 + w and -w sum to one, and x0, eps and v are affine in the network's output. So guiding the output is the
same as guiding x0 and eps, and alpha_t x0 + sigma_t eps = z_t holds for the guided pair, too.

The embedding of w, of dimension D with h = D // 2 (the student's `timestep_cond`):

    f_j = exp(-ln(10000) j / (h - 1)),  j = 0 .. h-1
    e   = [sin(1000 w f_0) .. sin(1000 w f_{h-1}), cos(1000 w f_0) .. cos(1000 w f_{h-1})], a zero appended if D is odd

Unlike the UNet's timestep embedding it has sines first and divides by h - 1.

Sources: Ho & Salimans 2022; Meng et al. 2023 (w as an input); Luo et al. 2023, "Latent Consistency Models",
section 4.2.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from lcm_jax.diffusion.schedule import broadcast_like
from lcm_jax.errors import LcmError


def classifier_free(cond, uncond, w) -> jax.Array:
    """cond + w (cond - uncond), float32.

    Args:
      cond, uncond: outputs, x0, eps or solver increments, [b ...]; both of the same kind.
      w: guidance weight, [b] or scalar; 0 is no guidance.
    """
    cond, uncond = jnp.asarray(cond, jnp.float32), jnp.asarray(uncond, jnp.float32)
    return cond + broadcast_like(w, cond) * (cond - uncond)  # Ho & Salimans 2022, equation 6


def sample_w(key: jax.Array, shape: tuple[int, ...], w_min: float, w_max: float) -> jax.Array:
    """w ~ U[w_min, w_max), float32 [*shape]; if the bounds are equal, that weight.

    Raises:
      LcmError: w_min > w_max, or a bound that is not finite.
    """
    if not -np.inf < w_min <= w_max < np.inf:
        raise LcmError(f"w_min={w_min}, w_max={w_max}: give finite bounds of w, with w_min at most w_max")
    return jax.random.uniform(key, shape, jnp.float32, w_min, w_max)


def w_embedding(w, dim: int = 256) -> jax.Array:
    """Embedding e of guidance weights, float32 [b dim].

    Args:
      w: guidance weights [b]. Cast the result to half precision, never w: angles of up to 15,000 rad lose all their
        digits.
      dim: the UNet's `time_cond_proj_dim`, at least 4 (below, h - 1 is 0).

    Raises:
      LcmError: dim below 4, or w not of shape [b].
    """
    if dim < 4:
        raise LcmError(f"a w embedding of dimension {dim} is too small; time_cond_proj_dim must be at least 4")
    w = jnp.asarray(w, jnp.float32)
    if w.ndim != 1:
        raise LcmError(f"w has shape {w.shape}; it must be one value per sample, [b]")
    angles = (1000.0 * w)[:, None] * _frequencies(dim // 2)  # 1000 w f_j
    return jnp.pad(jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1), ((0, 0), (0, dim % 2)))


@functools.cache
def _frequencies(half: int) -> np.ndarray:
    """f_j, float32 [half], computed on the host."""
    # At an angle of 15,000 rad an error of 1e-7 in f is 1e-3, so every rounding shows in the embedding. The exponents
    # are rounded to float32 as in the torch pipelines; exp is exact and rounded once, as float32 exp differs by chip.
    rate = np.log(np.float32(10000)) / np.float32(half - 1)
    exponents = np.arange(half, dtype=np.float32) * -rate
    return np.exp(exponents.astype(np.float64)).astype(np.float32)
