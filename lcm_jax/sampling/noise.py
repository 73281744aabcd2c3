"""Standard normal noise of a seed: jax's own, or the numbers that other programs draw, in numpy, without torch.

    source        noise of image i of a prompt                         as in
    jax           threefry, keyed by (seed, i)                         lcm_jax alone
    torch         of its own generator on the CPU, of seed + i         diffusers with a list of generators, A1111's CPU
    torch-batch   row i of what one generator draws for all images     diffusers with one generator
    nv            of its own Philox stream, of seed + i                A1111's NV, and its GPU on an NVIDIA card

A generator first draws what a sampler starts from, then what it adds between its steps, each in the order c h w. Where
images are encoded by sampling the VAE's posterior, it draws that before the start, or between it and the rest.

Torch's CPU generator is MT19937 with Box-Muller in float32, in blocks of 16 numbers; fewer than 16 are drawn one by one
in float64. `TorchGenerator` equals `torch.randn` bit for bit where torch uses AVX2 or AVX-512, elsewhere to 2.4e-6.

Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3") counts calls and elements. So does
torch on a GPU as long as a tensor has no more elements than the card runs threads: 221,184 on an A100.
"""

import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

SOURCES = ("jax", "torch", "torch-batch", "nv")
_POSTERIORS = 2**30  # number of the first entry for a posterior in jax's noise, beyond those of all steps
_SECOND_PASS = 2**29  # number of its first entry in jax's noise
_BLOCK = 16  # numbers that torch transforms together


def draw_noise(
    seed: int,
    numbers: Sequence[int],
    steps: int,
    shape: Sequence[int],
    source: str = "jax",
    num_images: int | None = None,
    before: int = 0,
    behind: int = 0,
    again: bool = False,
) -> np.ndarray:
    """Noise [steps b h w c]: entry 0 starts the sampler, the others are added between an LCM's steps.

    The noise of image i is a function of (seed, i), with source "torch-batch" of (seed, i, num_images); its first
    entries are the same for every number of steps.

    numbers: i of each image, [b]. shape: of a latent, [h w c]. source: one of `SOURCES`.
    num_images: that "torch-batch" draws together; None: up to the last of `numbers`.
    before, behind: entries for posteriors that a generator draws before and behind the start. Those come first in the
      result, [before + behind + steps b h w c]. "torch-batch" draws one row of each, for all images.
    again: for a second pass: other numbers of jax; a generator starts again from its seed, as in A1111.
    """
    if source == "jax":
        first = _SECOND_PASS if again else 0
        entries = [*range(_POSTERIORS, _POSTERIORS + before + behind), *range(first, first + steps)]
        return _of_jax(seed, numbers, entries, shape)
    height, width, channels = shape
    size = height * width * channels

    def drawn(randn, images: int) -> np.ndarray:
        def entries(count: int, rows: int) -> list[np.ndarray]:
            of_rows = (images, channels, height, width)
            found = [randn(rows * size).reshape(rows, *of_rows[1:]) for _ in range(count)]
            return [np.broadcast_to(one, of_rows) for one in found]

        early, start, late = entries(before, 1), entries(1, images), entries(behind, 1)
        return np.stack([*early, *late, *start, *entries(steps - 1, images)])

    if source == "torch-batch":
        images = max(numbers) + 1 if num_images is None else num_images
        found = drawn(TorchGenerator(seed).randn, images)[:, list(numbers)]
    else:
        generator = {"torch": TorchGenerator, "nv": Philox}[source]
        found = np.concatenate([drawn(generator(seed + number).randn, 1) for number in numbers], axis=1)
    return np.ascontiguousarray(found.transpose(0, 1, 3, 4, 2))


def _of_jax(seed: int, numbers: Sequence[int], entries: Sequence[int], shape: Sequence[int]) -> np.ndarray:
    keys = jax.vmap(functools.partial(jax.random.fold_in, jax.random.key(seed)))(jnp.asarray(numbers, jnp.uint32))

    def of_step(step):
        return jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, step), tuple(shape)))(keys)

    return np.asarray(jax.vmap(of_step)(jnp.asarray(entries, jnp.int32)))


class TorchGenerator:
    """`torch.Generator("cpu").manual_seed(seed)`, for `torch.randn` in float32."""

    def __init__(self, seed: int):
        self._engine = np.random.RandomState(seed % 2**32)  # torch ignores the upper half of a seed, too
        self._spare: float | None = None

    def randn(self, n: int) -> np.ndarray:
        """The next n numbers, float32 [n], in the order of a contiguous tensor."""
        if n < _BLOCK:
            return np.array([self._one() for _ in range(n)], np.float32)
        x = self._uniforms(n)
        whole = n - n % _BLOCK
        x[:whole] = _box_muller(x[:whole])
        if whole < n:  # the last block overlaps the one before, and is drawn again
            x[-_BLOCK:] = _box_muller(self._uniforms(_BLOCK))
        return x

    def _words(self, n: int) -> np.ndarray:
        return self._engine.randint(0, 2**32, n, np.uint32)

    def _uniforms(self, n: int) -> np.ndarray:
        return (self._words(n) & np.uint32(2**24 - 1)).astype(np.float32) * np.float32(2**-24)

    def _one(self) -> float:
        """One of the two numbers that two uniforms give; the other is the next, whatever is drawn between them."""
        if self._spare is not None:
            found, self._spare = self._spare, None
            return found
        words = self._words(4).tolist()
        u, v = (((high << 32 | low) & (2**53 - 1)) * 2.0**-53 for high, low in (words[:2], words[2:]))
        radius, angle = math.sqrt(-2 * math.log1p(-v)), 2 * math.pi * u
        self._spare = radius * math.sin(angle)
        return radius * math.cos(angle)


def _box_muller(uniforms: np.ndarray) -> np.ndarray:
    """Uniforms in [0, 1), float32 [16 k] -> normal numbers: in each block the first 8 are radii, the others angles."""
    u, v = np.moveaxis(uniforms.reshape(-1, 2, _BLOCK // 2), 1, 0)
    radius = np.sqrt(np.float32(-2) * _log(np.float32(1) - u))
    sine, cosine = _sincos(np.float32(6.2831855) * v)
    return np.stack([radius * cosine, radius * sine], axis=1).reshape(-1)


# Torch's vectorised log, sine and cosine are Cephes' polynomials. Where they are `_fma` here, a product and a sum are
# one fused operation; other roundings change one number in a hundred by an ulp or two.


def _fma(a, b, c) -> np.ndarray:
    """a b + c in float32, rounded once: in float64 the product is exact."""
    a, b, c = (np.asarray(x, np.float32).astype(np.float64) for x in (a, b, c))
    return (a * b + c).astype(np.float32)


def _horner(x: np.ndarray, *coefficients: float) -> np.ndarray:
    return functools.reduce(lambda y, p: _fma(y, x, p), coefficients)


def _log(x: np.ndarray) -> np.ndarray:
    m, e = np.frexp(x)
    low = m < np.float32(0.70710678)
    f, e = np.where(low, 2 * m, m) - np.float32(1), (e - low).astype(np.float32)
    z = f * f
    y = _horner(
        f,
        7.0376836292e-2,
        -1.1514610310e-1,
        1.1676998740e-1,
        -1.2420140846e-1,
        1.4249322787e-1,
        -1.6668057665e-1,
        2.0000714765e-1,
        -2.4999993993e-1,
        3.3333331174e-1,
    )
    y = _fma(y * f, z, e * np.float32(-2.12194440e-4))
    return _fma(e, 0.693359375, f + _fma(z, -0.5, y))


def _sincos(angle: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Sine and cosine of angles >= 0: polynomials of what is left of them after j pi / 4, taken off in three parts."""
    j = ((angle * np.float32(1.2732395)).astype(np.int32) + 1) & ~1
    x = angle
    for part in (-0.78515625, -2.4187564849853516e-4, -3.7748949774e-8):
        x = _fma(j, part, x)
    z = x * x
    cosine = _horner(z, 2.443315711809948e-5, -1.388731625493765e-3, 4.166664568298827e-2) * z
    cosine = _fma(cosine, z, z * np.float32(-0.5)) + np.float32(1)
    sine = _fma(_horner(z, -1.9515295891e-4, 8.3321608736e-3, -1.6666654611e-1) * z, x, x)
    swapped = (j & 2) != 0
    sine, cosine = np.where(swapped, cosine, sine), np.where(swapped, sine, cosine)
    return np.where((j & 4) != 0, -sine, sine), np.where(((j - 2) & 4) == 0, -cosine, cosine)


class Philox:
    """The noise of a GPU: element n of call k is a function of (seed, k, n)."""

    def __init__(self, seed: int):
        self._key, self._calls = (seed % 2**32, seed >> 32), 0

    def randn(self, n: int) -> np.ndarray:
        """The numbers of the next call, float32 [n]."""
        mask, (k0, k1) = np.uint64(2**32 - 1), self._key
        zeros, elements = np.zeros(n, np.uint64), np.arange(n, dtype=np.uint64)
        a, b, c, d = zeros + np.uint64(self._calls), zeros, elements, zeros
        self._calls += 1
        for _ in range(10):
            p, q = a * np.uint64(0xD2511F53), c * np.uint64(0xCD9E8D57)
            a, b = (q >> np.uint64(32)) ^ b ^ np.uint64(k0), q & mask
            c, d = (p >> np.uint64(32)) ^ d ^ np.uint64(k1), p & mask
            k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
        unit, turn = (float(np.float32(x)) for x in (2.3283064e-10, 2.3283064e-10 * 6.2831855))  # 2^-32, of 2 pi
        u, v = a * unit + unit / 2, b * turn + turn / 2
        return (np.sqrt(-2 * np.log(u)) * np.sin(v)).astype(np.float32)
