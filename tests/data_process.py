"""One of several real processes that read the data of one config; it writes its rows of the global batches to a file.

python tests/data_process.py CONFIG.json INDEX COUNT PORT START STEPS WORKERS OUT.npz
"""

import json
import sys

import jax


def main() -> None:
    config, out = sys.argv[1], sys.argv[8]
    index, count, port, start, steps, workers = map(int, sys.argv[2:8])
    if count > 1:
        jax.distributed.initialize(f"127.0.0.1:{port}", count, index)
    import contextlib
    import functools
    import itertools

    import numpy as np

    from lcm_jax.data import loader
    from lcm_jax.data.order import Order
    from lcm_jax.pretrained import load_pipeline
    from lcm_jax.run import config as config_lib
    from lcm_jax.run import data as training_data
    from lcm_jax.runtime import mesh as mesh_lib

    with open(config) as file:
        config = config_lib.ConfigDict(json.load(file))
    pipeline, _ = load_pipeline(config.model.teacher)
    (part,) = training_data.open_parts(config)
    tokenize = training_data.Tokenize(pipeline.tokenizers)
    examples = training_data.pictures(config, part.source, tokenize)
    order = Order(config.seed, config.data.batch_size, (examples.groups,))
    mesh = mesh_lib.make_mesh()
    put = functools.partial(mesh_lib.put_batch, mesh)
    mine = []
    with contextlib.closing(
        loader.batches(
            (examples,),
            order,
            start,
            put=put,
            workers=workers,
            bad_records=loader.BadRecordLog(1.0),
            rows=mesh_lib.process_rows(mesh, config.data.batch_size, jax.process_index()),
        )
    ) as batches:
        for batch in itertools.islice(batches, steps):
            assert all(value.shape[0] == config.data.batch_size for value in batch.values()), "global arrays"
            mine.append({name: shard_rows(value) for name, value in batch.items()})
    np.savez(out, **{name: np.stack([rows[name] for rows in mine]) for name in mine[0]})


def shard_rows(array: jax.Array):
    """The rows of a global array on this process's devices, in order."""
    import numpy as np

    shards = sorted(array.addressable_shards, key=lambda shard: shard.index[0].start or 0)
    return np.concatenate([shard.data for shard in shards])


if __name__ == "__main__":
    main()
