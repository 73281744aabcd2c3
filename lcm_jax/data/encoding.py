"""Images and captions -> what the step trains on and is conditioned on, by one program of its own.

    rows {"pixels", token ids, "time_ids"} -> encode -> {"mean", "logvar", "encoder_hidden_states", ...}

The same program encodes the batch of a step, all examples before training begins, and the rows of a latent cache.
"""

from __future__ import annotations

import collections
import concurrent.futures
import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lcm_jax.data import loader
from lcm_jax.data.order import draws_at
from lcm_jax.data.records import BadRecord, BadRecordError
from lcm_jax.data.rows import Examples
from lcm_jax.pretrained.model import TEXT_ENCODERS, Pipeline, PipelineParams
from lcm_jax.pretrained.text import encode_tokens
from lcm_jax.runtime import kernels, waiting
from lcm_jax.runtime.mesh import AXES, batch_sharding, replicated, spread

ENCODE_PIXELS = 8 * 1024**2  # of a batch that is encoded outside a step: a few GB of the VAE's activations
MAX_BATCH = 64
LEVELS = np.arange(256, dtype=np.float32) / 127.5 - 1.0  # 0..255 -> [-1, 1]; XLA would round the division otherwise
NO_TEXT = -1  # token id of rows whose conditioning is zeros: the null text of SDXL (`Constants.zero_null`)
AHEAD = 128  # rows that are read before they are asked for

Rows = dict[str, np.ndarray]


def batch_size(resolution: int) -> int:
    """Number of images of about resolution^2 pixels that are encoded at once outside a step: a power of two."""
    return 2 ** int(math.log2(max(1, min(MAX_BATCH, ENCODE_PIXELS // resolution**2))))


def make_encode(
    pipeline: Pipeline, params: PipelineParams, mesh: Mesh | None = None, chunk: int = 0
) -> Callable[[Mapping[str, Any]], dict[str, Any]]:
    """rows -> {"mean", "logvar", and the conditioning}, float32, jitted; arrays that are encoded already are kept.

    VAE and text encoders run in their own compute dtypes. The results are float32, as those of a latent cache are, so
    that one step serves both.

    Args:
      params: of the VAE and the text encoders; on a mesh they are sharded by the rule of `runtime.mesh`.
      mesh: rows in its batch sharding are encoded each on its device and stay there. Rows that are numpy arrays (the
        same on every process) are split over it, and come back whole.
      chunk: images that the VAE encodes at a time on each device, at most; 0: all of a batch.
    """
    params = {name: tree for name, tree in params.items() if name != "unet"}
    placed = pipeline if mesh is None else kernels.on_mesh(pipeline, mesh)
    encode, split, whole = _programs(placed.vae, placed.text_encoders, mesh, chunk)

    def call(rows: Mapping[str, Any]) -> dict[str, Any]:
        if not {"pixels", *TEXT_ENCODERS} & rows.keys():
            return dict(rows)
        if any(isinstance(value, jax.core.Tracer) for value in rows.values()):  # only whole programs have options
            return encode(params, dict(rows))
        if mesh is None or not all(isinstance(value, np.ndarray) for value in rows.values()):
            return split(params, dict(rows))
        count = len(next(iter(rows.values())))
        return whole(params, {name: spread(mesh, value) for name, value in rows.items()}, count)

    return call


@functools.lru_cache
def _programs(vae: Any, text_encoders: tuple[Any, Any], mesh: Mesh | None, chunk: int) -> tuple[Callable, ...]:
    """(encode, encode of rows that are split over the mesh, encode of rows that are whole on every process).

    Equal modules get the same functions, so that a second model of an architecture compiles nothing.
    """

    def encode_pixels(params: Any, pixels: jax.Array) -> tuple[jax.Array, jax.Array]:
        return vae.apply({"params": params}, jnp.asarray(LEVELS)[pixels], method="encode")

    def encode(params: Any, rows: dict[str, jax.Array]) -> dict[str, jax.Array]:
        encoded = dict(rows)
        if "pixels" in rows:
            one = functools.partial(encode_pixels, params["vae"])
            encoded["mean"], encoded["logvar"] = in_chunks(one, encoded.pop("pixels"), chunk, mesh)
        ids = {name: encoded.pop(name) for name in TEXT_ENCODERS if name in rows}
        if ids:
            text = encode_tokens(text_encoders, params, ids)
            if text_encoders[1] is not None:
                has_text = next(iter(ids.values()))[:, 0] != NO_TEXT
                text = {name: jnp.where(_rows_like(has_text, value), value, 0) for name, value in text.items()}
            encoded |= {name: value.astype(np.float32) for name, value in text.items()}
        return encoded

    def encode_first(params: Any, rows: dict[str, jax.Array], count: int) -> dict[str, jax.Array]:
        return {name: value[:count] for name, value in encode(params, rows).items()}

    jit = functools.partial(jax.jit, compiler_options=kernels.inference())
    split = jit(encode, out_shardings=mesh and batch_sharding(mesh))
    whole = jit(encode_first, static_argnums=2, out_shardings=mesh and replicated(mesh))
    return encode, split, whole


def _rows_like(rows: jax.Array, like: jax.Array) -> jax.Array:
    """[b] -> [b 1 ...], to broadcast against `like` [b ...]."""
    return rows.reshape(-1, *(1,) * (like.ndim - 1))


def in_chunks(fn: Callable[[jax.Array], Any], x: jax.Array, chunk: int, mesh: Mesh | None = None) -> Any:
    """`fn` of rows [b ...], at most `chunk` rows of each device at a time; 0: all at once.

    Rows that are split over `mesh` stay on their devices: each piece has equally many rows of every device.
    """
    devices = 1 if mesh is None else mesh.size
    mine = x.shape[0] // devices
    if not 0 < chunk < mine:
        return fn(x)
    chunk = next(size for size in range(chunk, 0, -1) if mine % size == 0)

    def constrained(value: jax.Array, *spec: Any) -> jax.Array:
        if mesh is None:
            return value
        return jax.lax.with_sharding_constraint(value, NamedSharding(mesh, PartitionSpec(*spec)))

    def piece(rows: jax.Array) -> Any:  # [devices chunk ...]
        out = fn(constrained(rows.reshape(-1, *rows.shape[2:]), AXES))
        return jax.tree.map(lambda y: constrained(y.reshape(devices, chunk, *y.shape[1:]), AXES), out)

    pieces = x.reshape(devices, mine // chunk, chunk, *x.shape[1:]).swapaxes(0, 1)
    out = jax.lax.map(piece, constrained(pieces, None, AXES))
    return jax.tree.map(lambda y: constrained(y.swapaxes(0, 1).reshape(-1, *y.shape[3:]), AXES), out)


def encode_rows(encode: Callable, rows: Rows, batch: int) -> Rows:
    """`encode` of at most `batch` rows, on the host; always by the program of a full batch."""
    count = len(next(iter(rows.values())))
    padding = np.minimum(np.arange(batch), count - 1)
    encoded = encode({name: value[padding] for name, value in rows.items()})
    return {name: value[:count] for name, value in jax.device_get(encoded).items()}


def in_order(
    examples: Examples, group: int, seed: int, ranks: Sequence[int], stop: Callable[[], Any] = lambda: False
) -> Iterator[tuple[int, Rows | BadRecord]]:
    """(rank, row or reason why there is none) of one example after another, read ahead by threads.

    The random numbers of a row are a function of (seed, group, rank). Raises `waiting.Stopped` if a row has not come
    when `stop()` is true.
    """
    first = sum(examples.groups[:group])

    def read(rank: int) -> tuple[int, Rows | BadRecord]:
        try:
            return rank, examples.row(group, rank, draws_at(seed, first + rank))
        except BadRecordError as error:
            return rank, BadRecord(*examples.where(group, rank), str(error))

    def result(rank: int, future: concurrent.futures.Future) -> tuple[int, Rows | BadRecord]:
        waiting.wait(
            lambda seconds: concurrent.futures.wait([future], seconds).done,
            lambda: "{}: {}, which is being read".format(*examples.where(group, rank)),
            stop=stop,
        )
        return future.result()

    pool = concurrent.futures.ThreadPoolExecutor(loader.THREADS)
    try:
        pending: collections.deque = collections.deque()
        for rank in ranks:
            pending.append((rank, pool.submit(read, rank)))
            if len(pending) > AHEAD:
                yield result(*pending.popleft())
        while pending:
            yield result(*pending.popleft())
    finally:
        pool.shutdown(wait=False, cancel_futures=True)  # a read may hang
