"""A VAE on images that are too large for one pass: overlapping tiles, blended linearly.

Tiles start every (1 - overlap) of a tile. Over `extent = overlap * tile` rows (columns) a tile fades in from its
blended neighbour above, then from the one to its left:

    new[y] = (1 - y / extent) above[-extent + y] + (y / extent) new[y]

and each contributes its first (1 - overlap) part. This is the blend of diffusers' AutoencoderKL. The result differs
from the untiled one, in which GroupNorm and attention see the whole image.

The functions take a callable for one tile. A caller who jits it compiles at most four shapes (inner, right edge,
bottom edge, corner), and a few more if the edges leave slivers.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

OVERLAP = 0.25

Tree = Any


def tile_size(vae: Any) -> int:
    """Edge of a tile in pixels: the VAE's `sample_size`, the size that it was trained on."""
    size = vae.sample_size
    return min(size) if isinstance(size, tuple) else size


def encode(
    encode_tile: Callable[[jax.Array], Tree], images: jax.Array, *, tile: int, factor: int, overlap: float = OVERLAP
) -> Tree:
    """Tiled encoding.

    Args:
      encode_tile: [b h w 3] -> an array or a tree of arrays [b h/factor w/factor c], such as a VAE's `encode`, whose
        mean and log-variance are each blended.
      images: [b H W 3].
      tile: edge of a tile in pixels; `encode_tile` gets an image with no longer side whole.
      factor: pixels per latent.
      overlap: the part of a tile that its neighbour covers, too.

    Returns:
      What `encode_tile` returns, for the whole image.

    Raises:
      ValueError: tiles too small to advance with this overlap.
    """
    return _tiled(encode_tile, images, tile // factor, factor, 1, overlap)


def decode(
    decode_tile: Callable[[jax.Array], Tree], z: jax.Array, *, tile: int, factor: int, overlap: float = OVERLAP
) -> Tree:
    """Tiled decoding, z [b h w c] -> [b h*factor w*factor 3]; `tile` is in pixels, as in `encode`."""
    return _tiled(decode_tile, z, tile // factor, 1, factor, overlap)


def _tiled(fn: Callable[[jax.Array], Tree], x: jax.Array, cells: int, into: int, out: int, overlap: float) -> Tree:
    """cells: latents along a tile; into, out: pixels, or latents, per latent of x, and of the result.

    Tiles start and are cut at whole latents, so that those of x and of the result are in the same places.
    """
    tile, advance = cells * into, int(cells * (1 - overlap))
    if max(x.shape[1:3]) <= tile:
        return fn(x)
    if advance < 1:
        raise ValueError(f"tiles of {cells} latents do not advance with overlap {overlap}; use larger ones")
    step, keep, extent = advance * into, advance * out, (cells - advance) * out
    bands, above = [], None
    for top in range(0, x.shape[1], step):
        row: list[Tree] = []
        for j, left in enumerate(range(0, x.shape[2], step)):
            done = fn(x[:, top : top + tile, left : left + tile])
            if above is not None:
                done = _fade(above[j], done, extent, axis=1)
            if row:
                done = _fade(row[-1], done, extent, axis=2)
            row.append(done)
        bands.append(_join([jax.tree.map(lambda a: a[:, :keep, :keep], done) for done in row], axis=2))
        above = row
    return _join(bands, axis=1)


def _join(parts: list[Tree], axis: int) -> Tree:
    return jax.tree.map(lambda *leaves: jnp.concatenate(leaves, axis=axis), *parts)


def _fade(before: Tree, after: Tree, extent: int, axis: int) -> Tree:
    """`after` with its first `extent` rows (axis 1) or columns (axis 2) faded in from the end of `before`."""

    def fade(a: jax.Array, b: jax.Array) -> jax.Array:
        n = min(a.shape[axis], b.shape[axis], extent)
        if n == 0:
            return b
        ramp = jnp.arange(n, dtype=jnp.float32) / n
        ramp = ramp[:, None, None] if axis == 1 else ramp[:, None]
        tail = jax.lax.slice_in_dim(a, a.shape[axis] - n, a.shape[axis], axis=axis)
        head = jax.lax.slice_in_dim(b, 0, n, axis=axis)
        rest = jax.lax.slice_in_dim(b, n, b.shape[axis], axis=axis)
        return jnp.concatenate([(tail * (1 - ramp) + head * ramp).astype(b.dtype), rest], axis=axis)

    return jax.tree.map(fade, before, after)
