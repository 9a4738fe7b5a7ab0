"""The log of a run: metrics.jsonl for programs, TensorBoard for browsers, a bar for people.

metrics.jsonl holds nothing of the clock: a resumed run writes the bytes of one never stopped.
timing.json alone has wall time and throughput.
"""

import contextlib
import json
import math
import os
import time
from collections.abc import Mapping
from typing import Any, SupportsFloat

import numpy as np
from etils.epath import Path
from PIL import Image
from tensorboardX import summary
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary

from mf_jax.flow.errors import BadInput, left_out
from mf_jax.reporting.progress import ProgressBar
from mf_jax.runtime.files import in_bucket, replace_file, to_json

METRICS_FILE, TIMING_FILE = "metrics.jsonl", "timing.json"
_FLUSH_SECONDS = 30
_SHOWN = ("loss", "u_error", "v_error")


class RunLog:
    """Record a training run on the one process that reports; use it as a context manager.

    Args:
      start_step: steps already done; rows and events of later ones, left by a kill, are dropped.
      batch_size: images in a step over all devices.
      hardware: for people.
    """

    def __init__(
        self,
        workdir: str | os.PathLike[str],
        *,
        num_steps: int,
        start_step: int,
        batch_size: int,
        show_progress: bool = True,
        hardware: str = "",
    ):
        self._path, self._batch_size = Path(workdir) / METRICS_FILE, batch_size
        self._hardware, self._speed, self._started = hardware, 0.0, time.monotonic()
        self._seconds_before = _seconds_of(self._path.parent) if start_step else 0.0
        self._mark: tuple[int, float] | None = None
        self._path.parent.mkdir(parents=True, exist_ok=True)
        kept = [row for row in read_metrics(workdir) if row["step"] <= start_step]
        replace_file(self._path, "".join(map(_line, kept)).encode())
        self._events = None
        with left_out("TensorBoard"):
            self._events = _Events(self._path.parent / "tensorboard", start_step)
        self._bar = ProgressBar(
            "step", num_steps, done=start_step, per_step=batch_size, is_wanted=show_progress
        )

    def __enter__(self) -> "RunLog":
        self._bar.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.__exit__(*error)
        with left_out("TensorBoard"):
            if self._events:
                self._events.close()

    def advance(self, step: int) -> None:
        """Count a step as done; cheap enough for every step."""
        self._bar.move(step)
        self._bar.remind()
        if self._mark is None:  # the first step compiles: the throughput counts from its end
            self._mark = (step, time.perf_counter())

    def remind(self) -> None:
        """Show that the run goes on, where no step ends for long."""
        self._bar.remind()

    def write(self, step: int, metrics: Mapping[str, SupportsFloat]) -> None:
        """Append a row to metrics.jsonl, where a number that is not finite becomes null."""
        values = {name: float(metrics[name]) for name in sorted(metrics)}
        finite = {name: x for name, x in values.items() if math.isfinite(x)}
        line = _line({"step": step} | values)
        if in_bucket(self._path):  # an object of a bucket cannot be added to
            self._path.write_text(self._path.read_text() + line)
        else:
            with self._path.open("a") as file:
                file.write(line)
        for name, x in finite.items():
            self._add(summary.scalar(f"train/{name}", x), step)
        if speed := self._steps_per_second(step):
            self._speed = speed * self._batch_size
            for unit, size in (("steps", 1), ("images", self._batch_size)):
                rate = summary.scalar(f"throughput/{unit}_per_second", speed * size)
                self._add(rate, step)
        with left_out(TIMING_FILE):
            self._save_timing()
        self._bar.move(step, "  ".join(f"{k} {finite[k]:.4g}" for k in _SHOWN if k in finite))
        self._bar.print_line()

    def picture(self, name: str, step: int, path: str | os.PathLike[str]) -> None:
        """Add a picture file to TensorBoard."""
        with Path(path).open("rb") as file, Image.open(file) as picture:
            pixels = np.asarray(picture.convert("RGB"))
        self._add(summary.image(name, pixels, dataformats="HWC"), step)

    def _save_timing(self) -> None:
        """Write the hardware, wall seconds over all starts, and the latest speed."""
        seconds = self._seconds_before + time.monotonic() - self._started
        timing = {"hardware": self._hardware, "wall_seconds": round(seconds, 1)}
        timing |= {"images_per_second": self._speed} if self._speed else {}
        replace_file(self._path.parent / TIMING_FILE, json.dumps(timing).encode())

    def _add(self, content: Summary, step: int) -> None:
        """Add to TensorBoard; an error ends it, not the run."""
        events, self._events = self._events, None
        if events:
            with left_out("TensorBoard"):
                events.add(content, step)
                self._events = events

    def _steps_per_second(self, step: int) -> float | None:
        """Return the speed since the last row, and start the count of the next."""
        now, mark = time.perf_counter(), self._mark
        self._mark = (step, now)
        is_measured = mark and step > mark[0] and now > mark[1]
        return (step - mark[0]) / (now - mark[1]) if is_measured else None


def _seconds_of(folder: Path) -> float:
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        return float(json.loads((folder / TIMING_FILE).read_text())["wall_seconds"])
    return 0.0


def read_metrics(workdir: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Return the rows `{"step": int, name: float or None, ...}` of a run's metrics.jsonl, if any.

    A last line torn by a killed process is left out.
    """
    path = Path(workdir) / METRICS_FILE
    lines = path.read_bytes().splitlines() if path.exists() else []
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            rows.append(json.loads(line))
        except ValueError:
            if number < len(lines):
                raise BadInput(
                    f"{path} line {number} is {line[:80]!r}; every line but the last must be JSON; "
                    "delete that line"
                ) from None
    return rows


def _line(row: Mapping[str, Any]) -> str:
    return to_json(row) + "\n"


class _Events:
    """Write events for TensorBoard, which then drops earlier events of steps after `start_step`.

    `SummaryWriter` writes by a thread, which ends on a full disk: the run would wait forever.
    """

    def __init__(self, folder: Path, start_step: int):
        folder.mkdir(parents=True, exist_ok=True)
        # names count whole seconds: the suffix keeps a quick restart from overwriting a file
        self._writer = EventsWriter(f"{folder}/events", f".from_{start_step}")
        self._flushed = -math.inf
        if start_step:
            self._write(step=start_step + 1, session_log=SessionLog(status=SessionLog.START))

    def add(self, content: Summary, step: int) -> None:
        """Add a summary of a step; it reaches the file half a minute later, or with the next."""
        self._write(step=step, summary=content)
        if time.monotonic() - self._flushed > _FLUSH_SECONDS:
            self._writer.flush()
            self._flushed = time.monotonic()

    def _write(self, **content: Any) -> None:
        self._writer.write_event(Event(wall_time=time.time(), **content))

    def close(self) -> None:
        """Write the rest."""
        self._writer.close()
