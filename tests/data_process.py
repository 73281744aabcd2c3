"""One of several real processes that read the data of one config; it writes its rows of the global batches to a file.

python tests/data_process.py --config=CONFIG.json --out=FOLDER --start=0 --steps=5 --workers=0
"""

import contextlib
import functools
import itertools
import json
from pathlib import Path

import jax
import numpy as np
from absl import app, flags
from ml_collections import ConfigDict

from lcm_jax.data import loader
from lcm_jax.data.order import Order
from lcm_jax.pretrained import load_pipeline
from lcm_jax.run import data as run_data
from lcm_jax.runtime import distributed
from lcm_jax.runtime.mesh import make_mesh, process_rows, put_batch


def read(values: flags.FlagValues) -> None:
    config = ConfigDict(json.loads(Path(values.config).read_text()))
    pipeline, _ = load_pipeline(config.model.teacher)
    (part,) = run_data.open_parts(config)
    tokenize = functools.partial(run_data.tokenize_captions, pipeline.tokenizers)
    examples = run_data.image_rows(config, part.source, tokenize)
    mesh, index, mine = make_mesh(), jax.process_index(), []
    batches = loader.batches(
        (examples,),
        Order(config.seed, config.data.batch_size, (examples.groups,)),
        values.start,
        put=functools.partial(put_batch, mesh),
        workers=values.workers,
        bad_records=loader.BadRecordLog(1.0),
        rows=process_rows(mesh, config.data.batch_size, index),
    )
    with contextlib.closing(batches):
        for batch in itertools.islice(batches, values.steps):
            assert all(value.shape[0] == config.data.batch_size for value in batch.values()), "global arrays"
            mine.append({name: own_rows(value) for name, value in batch.items()})
    np.savez(Path(values.out, f"{index}.npz"), **{name: np.stack([rows[name] for rows in mine]) for name in mine[0]})


def own_rows(array: jax.Array) -> np.ndarray:
    """The rows of a global array on this process's devices, in order."""
    shards = sorted(array.addressable_shards, key=lambda shard: shard.index[0].start or 0)
    return np.concatenate([shard.data for shard in shards])


def main(argv: list[str]) -> int:
    del argv
    return distributed.exit_code(lambda: read(flags.FLAGS), **distributed.from_flags())


if __name__ == "__main__":
    flags.DEFINE_string("config", None, "")
    flags.DEFINE_string("out", None, "")
    for name in ("start", "steps", "workers"):
        flags.DEFINE_integer(name, 0, "")
    distributed.define_flags()
    app.run(main)
