"""Classifier-free guidance, and how its weight w is drawn and told to the student.

    guided = cond + w (cond - uncond)         w = 0: no guidance;  guidance_scale = w + 1 at the user's edge

The weights 1 + w and -w sum to one and x0, eps and v are affine in the network's output, so guiding the output, or x0
and eps one by one, is the same, and alpha_t x0 + sigma_t eps = z_t holds for the guided pair too.

The embedding of w, of dimension D with h = D // 2 (the student's `timestep_cond`):

    f_j = exp(-ln(10000) j / (h - 1)),  j = 0 .. h-1
    e   = [sin(1000 w f_0) .. sin(1000 w f_{h-1}), cos(1000 w f_0) .. cos(1000 w f_{h-1})], a zero appended if D is odd

It is not the UNet's timestep embedding, which has cosines first and divides by h.

Sources: Ho & Salimans 2022; Meng et al. 2023 (w as an input); Luo et al. 2023, "Latent Consistency Models",
section 4.2.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from lcm_jax.diffusion.schedule import expand_to
from lcm_jax.errors import LcmError


def classifier_free(cond, uncond, w) -> jax.Array:
    """cond + w (cond - uncond), float32.

    Args:
      cond, uncond: [b ...] of one kind: outputs, x0, eps or solver increments.
      w: guidance weight, [b] or scalar; 0 is no guidance.
    """
    cond, uncond = jnp.asarray(cond, jnp.float32), jnp.asarray(uncond, jnp.float32)
    return cond + expand_to(w, cond) * (cond - uncond)


def sample_w(key: jax.Array, shape: tuple[int, ...], w_min: float, w_max: float) -> jax.Array:
    """w ~ U[w_min, w_max), float32 of the shape; equal bounds give that one weight.

    Raises:
      LcmError: w_min > w_max, or a bound that is not finite.
    """
    if not -np.inf < w_min <= w_max < np.inf:
        raise LcmError(f"w_min={w_min}, w_max={w_max}: the range of w must be finite, with w_min at most w_max")
    return jax.random.uniform(key, shape, jnp.float32, w_min, w_max)


def w_embedding(w, dim: int = 256) -> jax.Array:
    """Embedding of guidance weights, float32 [b dim]. w: [b]; dim: the UNet's `time_cond_proj_dim`, at least 4.

    Angles reach 15,000 rad: in bfloat16 or float16 nothing is left of them, so cast the result, never w.

    Raises:
      LcmError: dim below 4 (h - 1 would be 0), or w not one value per sample.
    """
    if dim < 4:
        raise LcmError(f"w embedding of dimension {dim}; time_cond_proj_dim must be at least 4")
    w = jnp.asarray(w, jnp.float32)
    if w.ndim != 1:
        raise LcmError(f"w has shape {w.shape}; one value per sample, [b], is needed")
    angles = (1000.0 * w)[:, None] * _frequencies(dim // 2)
    return jnp.pad(jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1), ((0, 0), (0, dim % 2)))


@functools.cache
def _frequencies(half: int) -> np.ndarray:
    """f_j, float32 [half]: made on the host, the exponents rounded to float32 as the torch pipelines round them.

    The angles reach 15,000 rad, where 1e-7 in f is 1e-3 in the angle: the exponents' rounding is seen in the embedding,
    and so are the last bits of a float32 exp, which differ from chip to chip. Hence the exact exp, rounded once.
    """
    rate = np.log(np.float32(10000)) / np.float32(half - 1)
    exponents = np.arange(half, dtype=np.float32) * -rate
    return np.exp(exponents.astype(np.float64)).astype(np.float32)
