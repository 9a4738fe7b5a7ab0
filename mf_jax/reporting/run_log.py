"""The log of a run: metrics.jsonl for programs, TensorBoard for browsers, a bar for people.

metrics.jsonl holds nothing of the clock: a resumed run writes the bytes of one never stopped.
timing.json alone has wall time and throughput.
"""

import contextlib
import math
import sys
import time
from collections.abc import Mapping
from datetime import timedelta
from typing import Any, SupportsFloat

import jax
import numpy as np
from etils.epath import Path, PathLike
from PIL import Image
from tensorboardX import summary
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog

from mf_jax.flow.errors import BadInput, left_out
from mf_jax.reporting.progress import ProgressBar
from mf_jax.runtime import processes
from mf_jax.runtime.files import in_bucket, replace_file
from mf_jax.runtime.json_files import read_json, read_lines, sealed, tell_once, write_json

METRICS_FILE, TIMING_FILE = "metrics.jsonl", "timing.json"
TIMING = {"wall_seconds?": 0.0, "images_per_second?": 0.0, "hardware?": "", "last_row?": 0}
"""What timing.json is like; see `parse_json`."""
_FLUSH_SECONDS = 30
_PLANNED_FROM = 10  # steps after the first
_SHOWN = ("loss", "u_error", "v_error")


def hardware() -> str:
    """Return what this job runs on."""
    device, count = jax.devices()[0], jax.device_count()
    is_cpu, several = device.platform == "cpu", f" in {jax.process_count()} processes"
    kind = "cpu" if is_cpu else device.device_kind
    cores = f" of {processes.cpu_count()} cores" * is_cpu
    return f"{count} {kind} device{'s' * (count > 1)}{cores}{several * processes.are_several()}"


class RunLog(contextlib.ExitStack):
    """Record, until its `with` ends, a training run on the one process that reports.

    Args:
      start_step: steps already done; rows and events of later ones, left by a kill, are dropped.
    """

    def __init__(
        self, workdir: PathLike, *, num_steps: int, start_step: int, batch_size: int, is_shown: bool
    ):
        super().__init__()
        self._path, self._batch_size = Path(workdir) / METRICS_FILE, batch_size
        self._num_steps, self._shows_plan = num_steps, is_shown
        timing = _timing_of(self._path.parent) if start_step else {}
        self._started = time.monotonic() - timing.get("wall_seconds", 0.0)
        self._timing = {"hardware": hardware()}
        self._mark: tuple[int, float] | None = None  # a step, and when it ended
        self._first = self._mark
        self._path.parent.mkdir(parents=True, exist_ok=True)
        kept = [row for row in read_metrics(workdir) if row["step"] <= start_step]
        replace_file(self._path, "".join(sealed(row) + "\n" for row in kept).encode())
        self._save_timing(kept[-1]["step"] if kept else 0)
        self._events = _Events(self._path.parent / "tensorboard", start_step)
        self.callback(self._events.close)
        sizes = {"done": start_step, "per_step": batch_size, "is_wanted": is_shown}
        self._bar = self.enter_context(ProgressBar("step", num_steps, **sizes))
        self.remind = self._bar.remind  # that the run goes on, where no step ends for long

    def advance(self, step: int) -> None:
        """Count a step as done; cheap enough for every step."""
        self._bar.move(step)
        if not self._mark:  # the first step compiles: the throughput counts from its end
            self._mark = (step, time.perf_counter())
        self._first = self._first or self._mark
        if self._shows_plan and step == self._first[0] + _PLANNED_FROM:
            self._print_plan(step)

    def _print_plan(self, step: int) -> None:
        """Print how long the run will take, by its first steps, and its memory up to here."""
        first, started = self._first
        seconds = (time.perf_counter() - started) / (step - first)
        left = timedelta(seconds=round((self._num_steps - step) * seconds))
        device = jax.local_devices()[0]
        peak = (device.memory_stats() or {}).get("peak_bytes_in_use", 0)
        if device.platform == "cpu" and sys.platform == "linux":
            import resource

            peak = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        memory = f", {peak / 1e9:.1f} GB of memory" * (peak > 0)
        print(f"{seconds:.2g} s a step, {left} to step {self._num_steps:,}{memory}", flush=True)

    def write(self, step: int, metrics: Mapping[str, SupportsFloat]) -> None:
        """Append a row to metrics.jsonl, where a number that is not finite becomes null."""
        values = {name: float(metrics[name]) for name in sorted(metrics)}
        finite = {name: x for name, x in values.items() if math.isfinite(x)}
        line = sealed({"step": step} | values) + "\n"
        if in_bucket(self._path):  # an object of a bucket cannot be added to
            self._path.write_text(self._path.read_text() + line)
        else:
            with self._path.open("a") as file:
                file.write(line)
        curves = {f"train/{name}": x for name, x in finite.items()}
        now = time.perf_counter()
        if self._mark and step > self._mark[0] and now > self._mark[1]:
            speed = (step - self._mark[0]) / (now - self._mark[1])
            images = self._timing["images_per_second"] = speed * self._batch_size
            curves |= {"throughput/steps_per_second": speed, "throughput/images_per_second": images}
        self._mark = (step, now)
        for name, x in curves.items():
            self._events.add(step, summary=summary.scalar(name, x))
        self._save_timing(step)
        self._bar.move(step, "  ".join(f"{k} {finite[k]:.4g}" for k in _SHOWN if k in finite))

    def picture(self, name: str, step: int, path: PathLike) -> None:
        """Add a picture file to TensorBoard."""
        with Path(path).open("rb") as file, Image.open(file, formats=["PNG"]) as picture:
            pixels = np.asarray(picture.convert("RGB"))
        self._events.add(step, summary=summary.image(name, pixels, dataformats="HWC"))

    def _save_timing(self, last_row: int) -> None:
        """Write the hardware, wall seconds over all starts, the latest speed and row."""
        seconds = round(time.monotonic() - self._started, 1)
        with left_out(TIMING_FILE):
            timing = self._timing | {"wall_seconds": seconds, "last_row": last_row}
            write_json(self._path.parent / TIMING_FILE, timing)


def _timing_of(folder: Path) -> dict[str, Any]:
    path = folder / TIMING_FILE
    try:
        return read_json(path, TIMING) if path.exists() else {}
    except BadInput as problem:
        tell_once(f"{problem}; it is left out")
        return {}


def read_metrics(workdir: PathLike) -> list[dict[str, Any]]:
    """Return the rows `{"step": int, name: float or None, ...}` of a run's metrics.jsonl, if any.

    A last line torn by a killed process is left out.
    """

    def check(row: dict[str, Any]) -> str:
        wrong = [name for name, x in row.items() if isinstance(x, bool | str | list | dict)]
        return f"{', '.join(wrong)} must be a number or null" if wrong else ""

    path = Path(workdir) / METRICS_FILE
    note = {"note": "as torn by a kill", "only_last": True}
    rows = read_lines(path, {"step": 0}, check, **note)
    last, written = rows[-1]["step"] if rows else 0, _timing_of(path.parent).get("last_row", 0)
    if last < written:
        tell_once(f"{path}: ends at step {last}, though rows were written up to step {written}")
    return rows


class _Events:
    """Write events for TensorBoard, which then drops earlier ones of steps after `start_step`.

    An error ends it, not the run. The thread of `SummaryWriter` ends on a full disk: the run would
    wait forever.
    """

    def __init__(self, folder: Path, start_step: int):
        self._writer, self._flushed = None, -math.inf
        with left_out("TensorBoard"):
            folder.mkdir(parents=True, exist_ok=True)
            # names count whole seconds: the suffix keeps a quick restart from overwriting a file
            self._writer = EventsWriter(f"{folder}/events", f".from_{start_step}")
        if start_step:
            self.add(start_step + 1, session_log=SessionLog(status=SessionLog.START))

    def add(self, step: int, **content: Any) -> None:
        """Add an event of a step; it reaches the file half a minute later, or with the next."""
        writer, self._writer = self._writer, None
        with left_out("TensorBoard"):
            if writer:
                writer.write_event(Event(wall_time=time.time(), step=step, **content))
                if time.monotonic() - self._flushed > _FLUSH_SECONDS:
                    writer.flush()
                    self._flushed = time.monotonic()
                self._writer = writer

    def close(self) -> None:
        """Write the rest."""
        with left_out("TensorBoard"):
            if self._writer:
                self._writer.close()
