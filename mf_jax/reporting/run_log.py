"""The run log: metrics.jsonl for programs, TensorBoard events for browsers, a progress bar for people.

Whatever depends on the clock goes to TensorBoard and the bar alone, so that the metrics.jsonl of a resumed run can be
compared byte for byte with that of a run that was never stopped.
"""

import json
import math
import os
import sys
import time
from collections.abc import Iterable, Mapping
from datetime import timedelta
from types import TracebackType
from typing import Any, SupportsFloat

import numpy as np
from etils.epath import Path
from PIL import Image
from rich.console import Console, RenderableType
from rich.live import Live
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from tensorboardX import summary
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary
from tensorboardX.record_writer import directory_check

from mf_jax.errors import BadInput
from mf_jax.runtime.files import in_bucket, replace_file

METRICS_FILE = "metrics.jsonl"
_FLUSH_SECONDS = 30
_SHOWN = ("loss", "u_error", "v_error")


class RunLog:
    """Record a training run on the one process that reports; use it as a context manager.

    Args:
        workdir: the run's folder; made if it is missing.
        num_steps: steps of the whole run, >= 1.
        start_step: steps already done, in [0, num_steps]. Rows of metrics.jsonl and TensorBoard events of later
            steps, left by a process that was killed after its last checkpoint, are dropped; 0 starts afresh.
        batch_size: images in a step over all devices, >= 1.
        show_progress: show a live bar on a terminal, or one plain line per `write` elsewhere; False prints nothing.

    Raises:
        BadInput: a number is out of range, or metrics.jsonl has an unreadable row before its last line.
    """

    def __init__(
        self,
        workdir: str | os.PathLike[str],
        *,
        num_steps: int,
        start_step: int,
        batch_size: int,
        show_progress: bool = True,
    ):
        _check_range("num_steps", num_steps, 1, math.inf)
        _check_range("start_step", start_step, 0, num_steps)
        _check_range("batch_size", batch_size, 1, math.inf)
        self._num_steps, self._batch_size, self._step = num_steps, batch_size, start_step
        self._latest: dict[str, SupportsFloat] = {}
        self._mark: tuple[int, float] | None = None
        path = Path(workdir) / METRICS_FILE
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = (
            [line for line, row in _lines(path) if row["step"] <= start_step] if start_step else []
        )
        replace_file(path, b"".join(kept))
        # the objects of a bucket cannot be added to
        self._write_row = _Rewritten(path, kept) if in_bucket(path) else _Appended(path)
        self._events = _Events(path.parent / "tensorboard", start_step)
        self._console = Console(highlight=False)
        live = sys.stdout.isatty() and not self._console.is_dumb_terminal
        self._bar = (
            _make_bar(self._console, num_steps, start_step) if show_progress and live else None
        )
        self._live = self._bar and Live(
            get_renderable=self._render, console=self._console, refresh_per_second=4
        )
        self._plain = show_progress and not live

    def __enter__(self) -> "RunLog":
        if self._live:
            self._live.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._live:
            self._live.stop()
        self._write_row.close()
        self._events.close()

    def write(self, step: int, metrics: Mapping[str, SupportsFloat]) -> None:
        """Append one row to metrics.jsonl and the same scalars, with the throughput, to TensorBoard.

        A value that is not finite is null in the row (JSON has no NaN), and the row's `non_finite` says which it was.

        Args:
            step: steps done, >= 0.
            metrics: name -> number. A name without a slash goes under `train/` in TensorBoard.

        Raises:
            BadInput: a metric is called `step` or `non_finite`, which the row keeps for itself.
        """
        for taken in {"step", "non_finite"} & set(metrics):
            raise BadInput(
                f"metrics has the name {taken!r}, which the row keeps for itself; rename that metric"
            )
        values = {name: float(metrics[name]) for name in sorted(metrics)}
        row = {"step": step} | {k: x if math.isfinite(x) else None for k, x in values.items()}
        if strange := {k: str(x) for k, x in values.items() if not math.isfinite(x)}:
            row["non_finite"] = strange
        self._write_row(json.dumps(row, allow_nan=False) + "\n")
        speed = self._speed(step)
        self.advance(step, metrics=values)
        for name, x in values.items():
            if math.isfinite(x):
                self._events.add(summary.scalar(name if "/" in name else f"train/{name}", x), step)
        if speed:
            self._events.add(summary.scalar("throughput/steps_per_second", speed), step)
            self._events.add(
                summary.scalar("throughput/images_per_second", speed * self._batch_size), step
            )
        if self._plain:
            print(self._plain_line(step, speed, values), flush=True)

    def advance(self, step: int, *, metrics: Mapping[str, SupportsFloat] | None = None) -> None:
        """Move the bar; cheap enough for every step, as the bar's own thread reads and formats the numbers.

        Args:
            step: steps done, >= 0.
            metrics: name -> number, of which the bar shows `u_error` and `v_error`. A device array is not waited for.
        """
        self._step = step
        if metrics:
            self._latest = {**self._latest, **metrics}
        if self._mark is None:  # the first step compiles: the throughput counts from its end
            self._mark = (step, time.perf_counter())

    def message(self, text: str) -> None:
        """Print a line, above the bar where there is one.

        Args:
            text: what to print, as it is.
        """
        if self._live:
            self._console.print(text, markup=False, soft_wrap=True)
        elif self._plain:
            print(text, flush=True)

    def picture(self, name: str, step: int, path: str | os.PathLike[str]) -> None:
        """Add a picture file to TensorBoard.

        Args:
            name: its name there.
            step: steps done when it was made, >= 0.
            path: a PNG file.
        """
        with Path(path).open("rb") as file, Image.open(file) as picture:
            pixels = np.asarray(picture.convert("RGB"))
        self._events.add(summary.image(name, pixels, dataformats="HWC"), step)

    def _speed(self, step: int) -> float | None:
        """Return steps per second since the last row, and start the count of the next."""
        now, mark = time.perf_counter(), self._mark
        self._mark = (step, now)
        return (
            (step - mark[0]) / (now - mark[1])
            if mark and step > mark[0] and now > mark[1]
            else None
        )

    def _plain_line(self, step: int, speed: float | None, values: Mapping[str, float]) -> str:
        parts = [f"step {step:,}/{self._num_steps:,} ({step / self._num_steps:.0%})"]
        if speed:
            left = timedelta(seconds=round((self._num_steps - step) / speed))
            parts += [_rate(speed * self._batch_size), f"{left} left"]
        return "  ".join(
            parts + [f"{name} {values[name]:.4g}" for name in _SHOWN if name in values]
        )

    def _render(self) -> RenderableType:
        """Bring the bar up to date; called by the thread that draws it."""
        speed, latest = self._bar.tasks[0].speed, self._latest
        shown = [f"{name} {float(latest[name]):.4g}" for name in _SHOWN[1:] if name in latest]
        self._bar.update(
            self._bar.task_ids[0],
            completed=self._step,
            rate=_rate(speed * self._batch_size) if speed else "",
            errors="  ".join(shown),
        )
        return self._bar.get_renderable()


class _Appended:
    """Adds lines to a file; a killed process can tear the last one, never an earlier one."""

    def __init__(self, path: Path):
        self._file = path.open("ab")
        self.close = self._file.close

    def __call__(self, line: str) -> None:
        self._file.write(line.encode("ascii"))
        self._file.flush()


class _Rewritten:
    """Writes a whole file anew with each line."""

    def __init__(self, path: Path, lines: Iterable[bytes]):
        self._path, self._content = path, b"".join(lines)

    def __call__(self, line: str) -> None:
        self._content += line.encode("ascii")
        replace_file(self._path, self._content)

    def close(self) -> None:
        """Do nothing: every line is there."""


class NoLog:
    """What a process has that does not report, in the place of `RunLog`."""

    def __init__(self, workdir: str | os.PathLike[str], **about: Any):
        del workdir, about

    def __enter__(self) -> "NoLog":
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def write(self, step: int, metrics: Mapping[str, SupportsFloat]) -> None:
        """Do nothing."""

    def advance(self, step: int, *, metrics: Mapping[str, SupportsFloat] | None = None) -> None:
        """Do nothing."""

    def message(self, text: str) -> None:
        """Do nothing."""

    def picture(self, name: str, step: int, path: str | os.PathLike[str]) -> None:
        """Do nothing."""


def read_metrics(workdir: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Read the rows of a run's metrics.jsonl, leaving out a last line torn by a killed process.

    Args:
        workdir: the run's folder.

    Returns:
        The rows in order, `{"step": int, name: float or None, ...}`; empty without a file.

    Raises:
        BadInput: a row before the last line is unreadable.
    """
    return [row for _, row in _lines(Path(workdir) / METRICS_FILE)]


def _lines(path: Path) -> list[tuple[bytes, dict[str, Any]]]:
    """Return each row as its bytes, ended by a newline, and as a dict."""
    lines = path.read_bytes().splitlines() if path.exists() else []
    pairs = []
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
            row["step"] + 0  # a row is an object with a number of steps
        except (ValueError, TypeError, KeyError):
            if number < len(lines):
                raise BadInput(
                    f"{path} line {number} is {line[:80]!r}; every line but the last must be a JSON object with "
                    "a step; delete that line"
                ) from None
            break
        pairs.append((line + b"\n", row))
    return pairs


class _Events:
    """Writes events for TensorBoard, which drops what an earlier file has of the steps after `start_step`.

    Not by a thread, as `SummaryWriter` does: that ends where the disk is full, and who adds events then waits for ever.
    """

    def __init__(self, folder: Path, start_step: int):
        directory_check(str(folder))
        # the suffix keeps a quick restart from writing over the file before, as names count whole seconds
        self._writer = EventsWriter(f"{folder}/events", f".from_{start_step}")
        self._flushed = -math.inf
        if start_step:
            self._write(step=start_step + 1, session_log=SessionLog(status=SessionLog.START))

    def add(self, what: Summary, step: int) -> None:
        """Add a summary of a step; it is in the file half a minute later at most, if more follows."""
        self._write(step=step, summary=what)
        if time.monotonic() - self._flushed > _FLUSH_SECONDS:
            self._writer.flush()
            self._flushed = time.monotonic()

    def _write(self, **about: Any) -> None:
        self._writer.write_event(Event(wall_time=time.time(), **about))

    def close(self) -> None:
        """Write all there is."""
        self._writer.close()


def _make_bar(console: Console, num_steps: int, start_step: int) -> Progress:
    bar = Progress(
        BarColumn(bar_width=None),
        TextColumn("{task.percentage:>3.0f}%", markup=False),
        TextColumn("{task.completed:,}/{task.total:,}", markup=False),
        TextColumn("{task.fields[rate]}", style="cyan", markup=False),
        TimeRemainingColumn(),
        TextColumn("{task.fields[errors]}", style="green", markup=False),
        console=console,
        auto_refresh=False,
        expand=True,
    )
    bar.add_task("train", total=num_steps, completed=start_step, rate="", errors="")
    return bar


def _rate(images_per_second: float) -> str:
    return f"{images_per_second:,.{0 if images_per_second >= 10 else 2}f} images/s"


def _check_range(name: str, value: int, low: int, high: int | float) -> None:
    if not low <= value <= high:
        allowed = f"at least {low}" if high == math.inf else f"in [{low}, {high}]"
        raise BadInput(f"{name} is {value}; it must be {allowed}; pass a number in that range")
