"""How many batches a second the input pipeline of training delivers."""

import jax
from ml_collections import ConfigDict

from mf_jax.bench.measure import Result, Say, spread, time_stream
from mf_jax.data import Source, make_batches
from mf_jax.runtime.sharding import make_mesh, put_batch

LEAST_SECONDS = 1.0
"""What the batches that count take together, so that those held ready at the start matter little."""


def bench_input(config: ConfigDict, source: Source, say: Say) -> Result:
    """Measure the input pipeline, with nothing else to do.

    Args:
      config: checked.
      source: the data.
      say: is told what is being done.

    Returns:
      A row for batches in host memory, and one for batches put on the devices.
    """
    mesh = make_mesh(data=config.mesh.data, fsdp=config.mesh.fsdp)
    places = {"host memory": tuple, "devices": lambda batch: put_batch(mesh, tuple(batch))}
    rows = []
    for into, put in places.items():
        say(f"reading into {into}")
        batches = make_batches(
            source,
            batch_size=config.train.batch_size,
            seed=config.seed,
            flip=config.data.flip,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
        )
        seconds = time_stream(
            lambda batches=batches, put=put: put(next(batches)),
            repeats=config.bench.repeats,
            dropped=config.bench.dropped,
            least_seconds=LEAST_SECONDS,
        )
        rate = len(seconds) / sum(seconds)
        row = {
            "into": into,
            "batches": len(seconds),
            **spread("batch", seconds),
            "batches_per_second": rate,
        }
        rows.append(row | {"images_per_second": rate * config.train.batch_size})
    return {"batch_size": config.train.batch_size, "notes": [], "rows": rows}
