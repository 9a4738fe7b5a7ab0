"""The same run on other processes and devices."""

import json
from pathlib import Path

import numpy as np

from launch.faults.injuries import RUN
from launch.faults.job import Job
from mf_jax.data import make_batches, make_source
from mf_jax.data.pipeline import Source

STEPS = 20
SHAPES = (
    (1, 1, 1),
    (1, 8, 1),
    (1, 8, 8),
    (2, 1, 1),
    (2, 4, 1),
    (2, 4, 2),
    (2, 4, 8),
    (4, 1, 4),
    (4, 2, 1),
    (4, 2, 4),
)
"""Processes, devices of each, and over how many of all devices parameters are split; the first is the measure."""


def losses(folder: Path, processes: int, devices: int, fsdp: int) -> list[float]:
    """Return the loss of each step."""
    more = (
        f"--config.train.num_steps={STEPS}",
        "--config.train.log_every_steps=1",
        "--config.log.sample_every_steps=0",
    )
    job = Job(
        processes, *RUN, *more, f"--config.mesh.fsdp={fsdp}", f"--workdir={folder}", devices=devices
    )
    for ended in job.finish():
        if ended.code:
            raise RuntimeError(
                f"{processes} processes of {devices} devices, fsdp {fsdp}: {ended.errors[-2000:]}"
            )
    return [
        json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()
    ]


def largest_difference(ours: list[float], theirs: list[float]) -> float:
    """Return the largest relative difference of two lists of losses."""
    return float(np.max(np.abs(np.array(ours) / np.array(theirs) - 1)))


def batches_are_alike(source: Source, processes: int, batch_size: int) -> bool:
    """Return whether the parts of all processes are, one after the other, exactly the batches of one process."""

    def first(count: int, index: int) -> list:
        batches = make_batches(
            source,
            batch_size=batch_size,
            seed=0,
            start_step=0,
            flip=False,
            process_index=index,
            process_count=count,
        )
        return [next(batches) for _ in range(STEPS)]

    parts = [first(processes, index) for index in range(processes)]
    return all(
        np.array_equal(np.concatenate([part[step].x for part in parts]), batch.x)
        and np.array_equal(np.concatenate([part[step].labels for part in parts]), batch.labels)
        for step, batch in enumerate(first(1, 0))
    )


def digits() -> Source:
    """Return the data of the run."""
    from configs.digits import get_config

    return make_source(get_config().data, split="train")
