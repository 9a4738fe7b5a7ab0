"""Weak scaling on this machine: as many rows for each process, whatever their number."""

import re
import statistics
from pathlib import Path

from launch.faults.injuries import RUN
from launch.faults.job import Job

COUNTS = (1, 2, 4)
_ROWS, _STEPS, _EVERY = 64, 200, 20  # of a process; of a run; between logs


def images_per_second(folder: Path, processes: int) -> float:
    """Return the throughput of so many processes together: the median between two logs, the first left out."""
    more = {
        "train.batch_size": _ROWS * processes,
        "train.num_steps": _STEPS,
        "train.log_every_steps": _EVERY,
        "checkpoint.every_steps": _STEPS,
        "log.sample_every_steps": 0,
        "mesh.fsdp": 1,
    }
    settings = [f"--config.{key}={value}" for key, value in more.items()]
    first, *others = Job(processes, *RUN, *settings, f"--workdir={folder}").finish()
    if any(ended.code for ended in (first, *others)):
        raise RuntimeError(f"{processes} processes: {first.errors[-2000:]}")
    rates = [
        float(rate.replace(",", "")) for rate in re.findall(r"([\d.,]+) images/s", first.output)
    ]
    return statistics.median(rates[1:])
