"""Pictures and captions -> what the step is conditioned on and learns from, in a program of its own.

    rows {"pixels", token ids, "time_ids"} -> encode -> {"mean", "logvar", "encoder_hidden_states", ...}

The same program encodes a step's batch, a whole set before training begins, and a latent cache.
"""

from __future__ import annotations

import collections
import concurrent.futures
import functools
import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lcm_jax.data import loader
from lcm_jax.data.order import draws_at
from lcm_jax.data.records import BadRecord, BadRecordError
from lcm_jax.data.rows import Examples
from lcm_jax.pretrained import text as conditioning
from lcm_jax.pretrained.model import TEXT_ENCODERS, Pipeline, PipelineParams
from lcm_jax.runtime import kernels as compiler
from lcm_jax.runtime import mesh as mesh_lib
from lcm_jax.runtime import waiting
from lcm_jax.runtime.kernels import on_mesh

ENCODE_PIXELS = 8 * 1024**2  # of a batch that is encoded outside a step: a few GB of the VAE's activations
MAX_BATCH = 64
LEVELS = np.arange(256, dtype=np.float32) / 127.5 - 1.0  # 0..255 -> [-1, 1]; XLA would round the division otherwise
AHEAD = 128  # rows read before they are asked for

Rows = dict[str, np.ndarray]


def batch_size(resolution: int) -> int:
    """Pictures of about resolution^2 pixels that are encoded at once outside a step: a power of two."""
    return 2 ** int(math.log2(max(1, min(MAX_BATCH, ENCODE_PIXELS // resolution**2))))


def make_encode(
    pipeline: Pipeline, params: PipelineParams, mesh: Mesh | None = None, chunk: int = 0
) -> Callable[[Mapping[str, Any]], dict[str, Any]]:
    """rows -> {"mean", "logvar", and the conditioning}, float32, jitted; what is encoded already passes through.

    The pipeline's VAE and text encoders are used where they lie, in their own compute dtypes. float32 is what a latent
    cache gives, so that the step is one program.

    Args:
      params: of the VAE and the text encoders; on a mesh they lie by the rule of `runtime.mesh`.
      mesh: the rows, in its batch sharding, are encoded each on its device and stay there. Rows that are numpy arrays
        (the same on every process) are split over it, and come back whole.
      chunk: pictures that the VAE encodes at a time on each device, at most; 0: all of a batch.
    """
    params = {name: tree for name, tree in params.items() if name != "unet"}
    placed = pipeline if mesh is None else on_mesh(pipeline, mesh)
    encode, split, whole = _programs(placed.vae, placed.text_encoders, mesh, chunk)

    def call(rows: Mapping[str, Any]) -> dict[str, Any]:
        if not {"pixels", *TEXT_ENCODERS} & rows.keys():
            return dict(rows)
        if any(isinstance(value, jax.core.Tracer) for value in rows.values()):  # compiler options are of whole programs
            return encode(params, dict(rows))
        if mesh is None or not all(isinstance(value, np.ndarray) for value in rows.values()):
            return split(params, dict(rows))
        count = len(next(iter(rows.values())))
        return whole(params, {name: mesh_lib.spread(mesh, value) for name, value in rows.items()}, count)

    return call


@functools.lru_cache
def _programs(vae: Any, text_encoders: tuple[Any, Any], mesh: Mesh | None, chunk: int) -> tuple[Callable, ...]:
    """(encode, encode of rows that are split over the mesh, encode of rows that are whole on every process).

    They are the same for equal modules, so that a second model of an architecture compiles nothing.
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
            text = conditioning.encode_tokens(text_encoders, params, ids)
            encoded |= {name: value.astype(np.float32) for name, value in text.items()}
        return encoded

    def encode_first(params: Any, rows: dict[str, jax.Array], count: int) -> dict[str, jax.Array]:
        return {name: value[:count] for name, value in encode(params, rows).items()}

    jit = functools.partial(jax.jit, compiler_options=compiler.inference())
    split = jit(encode, out_shardings=mesh and mesh_lib.batch_sharding(mesh))
    whole = jit(encode_first, static_argnums=2, out_shardings=mesh and mesh_lib.replicated(mesh))
    return encode, split, whole


def in_chunks(fn: Callable[[jax.Array], Any], x: jax.Array, chunk: int, mesh: Mesh | None = None) -> Any:
    """`fn` of rows [b ...], at most `chunk` rows of each device at a time; 0: all at once.

    The rows of a batch that is split over `mesh` stay on their devices: each piece has as many of every one.
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
        out = fn(constrained(rows.reshape(-1, *rows.shape[2:]), mesh_lib.AXES))
        return jax.tree.map(lambda y: constrained(y.reshape(devices, chunk, *y.shape[1:]), mesh_lib.AXES), out)

    pieces = x.reshape(devices, mine // chunk, chunk, *x.shape[1:]).swapaxes(0, 1)
    out = jax.lax.map(piece, constrained(pieces, None, mesh_lib.AXES))
    return jax.tree.map(lambda y: constrained(y.swapaxes(0, 1).reshape(-1, *y.shape[3:]), mesh_lib.AXES), out)


def encode_rows(encode: Callable, rows: Rows, batch: int) -> Rows:
    """`encode` of at most `batch` rows, to the host; always through the program of a full batch."""
    count = len(next(iter(rows.values())))
    padding = np.minimum(np.arange(batch), count - 1)
    encoded = encode({name: value[padding] for name, value in rows.items()})
    return {name: value[:count] for name, value in jax.device_get(encoded).items()}


def in_order(
    examples: Examples, group: int, seed: int, ranks: Sequence[int], stop: Callable[[], Any] = lambda: False
) -> Iterator[tuple[int, Rows | BadRecord]]:
    """(rank, its row, or why it has none) of examples one after another, read ahead by threads.

    What is random about a row is a function of (seed, group, rank). Raises `waiting.Stopped` if a row has not come when
    `stop()` is true.
    """
    first = sum(examples.groups[:group])

    def read(rank: int) -> tuple[int, Rows | BadRecord]:
        try:
            return rank, examples.row(group, rank, draws_at(seed, first + rank))
        except BadRecordError as error:
            return rank, BadRecord(*examples.where(group, rank), str(error))

    def taken(rank: int, future: concurrent.futures.Future) -> tuple[int, Rows | BadRecord]:
        waiting.wait(
            lambda seconds: concurrent.futures.wait([future], seconds).done,
            lambda: "{}: {}, which is being read".format(*examples.where(group, rank)),
            stop=stop,
        )
        return future.result()

    pool = concurrent.futures.ThreadPoolExecutor(loader.THREADS)
    try:
        under_way: collections.deque = collections.deque()
        for rank in ranks:
            under_way.append((rank, pool.submit(read, rank)))
            if len(under_way) > AHEAD:
                yield taken(*under_way.popleft())
        while under_way:
            yield taken(*under_way.popleft())
    finally:
        pool.shutdown(wait=False, cancel_futures=True)  # a read may hang


def fingerprint(
    pipeline: Pipeline, params: PipelineParams, resolution: int, sizes: Sequence[tuple[int, int]]
) -> dict[str, Any]:
    """What decides how pictures and captions are encoded: a latent cache must agree in it with the run that reads it.

    {"resolution", "sizes" (h, w of each group), "time_ids", "scaling_factor", "vae", "tokenizers", "text_encoders"},
    models and tokenizers by the SHA-256 of their weights and vocabularies; values as they come back from JSON.
    """
    return {
        "resolution": resolution,
        "sizes": [list(size) for size in sizes],
        "time_ids": pipeline.is_xl,
        "scaling_factor": pipeline.vae.scaling_factor,
        "vae": weights_hash(params["vae"]),
        "tokenizers": {name: t.vocabulary_hash() for name, t in pipeline.tokenizers.items()},
        "text_encoders": {name: weights_hash(params[name]) for name in pipeline.tokenizers},
    }


def weights_hash(params: Any) -> str:
    """SHA-256 of a tree's names, dtypes, shapes and bytes."""
    digest = hashlib.sha256()
    for name, value in sorted(flatten_dict(params, sep="/").items()):
        if isinstance(value, jax.Array) and not value.is_fully_addressable:  # its shards lie on several processes
            value = multihost_utils.process_allgather(value, tiled=True)
        array = np.ascontiguousarray(jax.device_get(value))
        digest.update(f"{name} {array.dtype} {array.shape}\n".encode())
        digest.update(array.reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def null_text(pipeline: Pipeline, encode: Callable, encoded: bool) -> Rows:
    """The arrays of a row that stand for the caption "", of one row: its token ids, or its embeddings."""
    ids = conditioning.tokens(pipeline, [""])
    rows = encode_rows(encode, ids, 1) if encoded else ids
    return {name: value[0] for name, value in rows.items()}
