"""What can happen to a job while it trains or evaluates, each at a moment of its own."""

import dataclasses
import json
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

from launch.faults.job import Ended, Job
from mf_jax.runtime.checkpoint import fingerprint, saved_steps

PROCESSES = 2
RUN = (
    "--config=configs/digits.py",
    "--config.model.depth=1",
    "--config.model.width=128",
    "--config.train.num_steps=40",
    "--config.train.batch_size=32",
    "--config.train.log_every_steps=4",
    "--config.optim.warmup_steps=0",
    "--config.log.sample_every_steps=10",
    "--config.checkpoint.every_steps=5",
    "--config.mesh.fsdp=2",
    "--config.eval.num_samples=500",
    "--config.eval.steps=1,2,4",
    "--config.job.heartbeat_timeout_seconds=10",
    "--config.job.start_timeout_seconds=30",  # for one that is killed before it has joined the others
)
"""A run of seconds whose parameters are worth splitting."""
_PATIENCE = 60  # seconds within which what is left of a job must have ended


@dataclasses.dataclass(frozen=True)
class Undisturbed:
    """What a run leaves that nothing happens to.

    arrays: digits that differ for any other arrays in the last checkpoint. metrics: metrics.jsonl. scores: the
    rows of its evaluation. seconds: it takes to train, and to evaluate.
    """

    arrays: str
    metrics: bytes
    scores: list
    seconds: tuple[float, float]


def undisturbed(folder: Path) -> Undisturbed:
    """Train and evaluate in a folder without disturbance, twice: the first time compiles."""
    seconds = []
    for mode in ("train", "eval"):
        _all_well(start_job(folder, mode).finish())
    remove(folder)
    for mode in ("train", "eval"):
        start = time.monotonic()
        _all_well(start_job(folder, mode).finish())
        seconds.append(time.monotonic() - start)
    return Undisturbed(*left_in(folder), tuple(seconds))


def start_job(folder: Path, mode: str = "train") -> Job:
    """Start the processes of the run of a folder."""
    return Job(PROCESSES, *RUN, f"--workdir={folder}", f"--mode={mode}")


def left_in(folder: Path) -> tuple[str, bytes, list]:
    """Return arrays, metrics and scores of a finished run."""
    arrays = fingerprint(folder, saved_steps(folder)[-1])
    return (
        arrays,
        (folder / "metrics.jsonl").read_bytes(),
        json.loads((folder / "eval.json").read_text())["rows"],
    )


def _all_well(ended: list[Ended]) -> None:
    for index, process in enumerate(ended):
        if process.code:
            raise RuntimeError(
                f"process {index} ended with {process.code}: {process.errors[-2000:]}"
            )


def kill_one(folder: Path, chance: random.Random, before: Undisturbed) -> list[Ended]:
    """SIGKILL to one process at a random moment."""
    return _struck(
        start_job(folder), chance.uniform(0, before.seconds[0]), signal.SIGKILL, chance.randrange(2)
    )


def kill_all(folder: Path, chance: random.Random, before: Undisturbed) -> list[Ended]:
    """SIGKILL to all processes at a random moment."""
    return _struck(start_job(folder), chance.uniform(0, before.seconds[0]), signal.SIGKILL)


def stop_one(folder: Path, chance: random.Random, before: Undisturbed) -> list[Ended]:
    """SIGTERM to one process at a random moment."""
    return _struck(
        start_job(folder), chance.uniform(0, before.seconds[0]), signal.SIGTERM, chance.randrange(2)
    )


def kill_while_saving(folder: Path, chance: random.Random, before: Undisturbed) -> list[Ended]:
    """SIGKILL to one or all processes while a checkpoint is being written."""
    job, wanted = start_job(folder), chance.randrange(1, 8)
    seen: set[str] = set()

    def is_saving() -> bool:
        unfinished = {path.name for path in (folder / "checkpoints").glob("*tmp*")}
        seen.update(unfinished)
        return bool(unfinished) and len(seen) >= wanted

    job.wait_for(is_saving)
    return _struck(job, chance.uniform(0, 0.1), signal.SIGKILL, *chance.choice([(), (0,), (1,)]))


def kill_while_evaluating(folder: Path, chance: random.Random, before: Undisturbed) -> list[Ended]:
    """SIGKILL to one process at a random moment of an evaluation."""
    _all_well(start_job(folder).finish())
    moment = chance.uniform(0, before.seconds[1])
    return _struck(start_job(folder, "eval"), moment, signal.SIGKILL, chance.randrange(2))


def fill_the_disk(folder: Path, chance: random.Random, before: Undisturbed) -> list[Ended]:
    """A file system of random size, too small for the four checkpoints that lie there at a time; then there is room."""
    folder.mkdir(parents=True)
    size = chance.randrange(4, 26)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}m", "tmpfs", folder], check=True)
    ended = start_job(folder).finish()
    subprocess.run(["mount", "-o", "remount,size=100m", folder], check=True)
    return ended


INJURIES: dict[str, Callable[[Path, random.Random, Undisturbed], list[Ended]]] = {
    "one process killed": kill_one,
    "all processes killed": kill_all,
    "one process told to stop": stop_one,
    "killed while saving": kill_while_saving,
    "killed while evaluating": kill_while_evaluating,
    "disk full": fill_the_disk,
}
"""What happens, by its name in the document."""


def _struck(job: Job, seconds: float, number: int, *indices: int) -> list[Ended]:
    """Let a job run so long, send a signal, and wait for what is left of it."""
    job.wait_for(lambda: False, timeout=seconds)
    job.send(number, *indices)
    return job.finish(_PATIENCE)


def heal(folder: Path, before: Undisturbed) -> dict:
    """Give the same commands again, to the end; return what came of it.

    Returns:
      resumed_at: the step that the run continued from, 0 for its beginning. identical: whether all arrays, metrics and
      scores are those of the undisturbed run. damaged: checkpoints that were found damaged and not used.
    """
    again = start_job(folder).finish()
    _all_well(again)
    _all_well(start_job(folder, "eval").finish())
    said = again[0].output
    mark = "; continuing at step "
    resumed = int(said.split(mark)[1].split()[0]) if mark in said else 0
    identical = left_in(folder) == (before.arrays, before.metrics, before.scores)
    return {"resumed_at": resumed, "identical": identical, "damaged": said.count(" is damaged (")}


def remove(folder: Path) -> None:
    """Delete a run, and the file system it was on."""
    if folder.is_mount():
        subprocess.run(["umount", folder], check=True)
    shutil.rmtree(folder, ignore_errors=True)
