"""How many batches a second the input pipeline of training delivers."""

import itertools

from ml_collections import ConfigDict

from mf_jax.bench import measure
from mf_jax.data import Source
from mf_jax.runtime.sharding import make_mesh, put_batch
from mf_jax.train import batches_of

SHOWN = "into batches batch_seconds_median batches_per_second images_per_second"
LEAST_SECONDS = 1.0
"""Long enough that the batches held ready at the start matter little."""


def run(config: ConfigDict, source: Source, say: measure.Say) -> measure.Result:
    """See `BENCHMARKS`; a row for batches in host memory, and one for batches on the devices."""
    mesh, size = make_mesh(data=config.mesh.data, fsdp=config.mesh.fsdp), config.train.batch_size
    places = {"host memory": tuple, "devices": lambda batch: put_batch(mesh, tuple(batch))}
    turns, rows = measure.turns(config) | {"least_seconds": LEAST_SECONDS}, []
    for into, put in places.items():
        say(f"reading into {into}")
        batches = itertools.repeat(batches_of(config, source))
        contender = batches, lambda each, put=put: put(next(each))  # reading is timed too
        (seconds,) = measure.take_turns(contender, **turns)
        rate = len(seconds) / sum(seconds)
        row = {"into": into, "batches": len(seconds), **measure.spread("batch", seconds)}
        rows.append(row | {"batches_per_second": rate, "images_per_second": rate * size})
    return {"batch_size": size, "notes": [], "rows": rows}
