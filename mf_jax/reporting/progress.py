"""How far the work is: a bar with the time left on a terminal, a line now and then elsewhere."""

import sys
import time
from datetime import timedelta
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

_SECONDS_BETWEEN_LINES = 30.0


class PictureProgress:
    """Show how many pictures are done; use it as a context manager.

    Args:
      total: pictures to do, at least 1.
      is_wanted: False shows nothing.
    """

    def __init__(self, total: int, *, is_wanted: bool = True) -> None:
        self._total, self._done, self._where = total, 0, ""
        self._start = self._said = time.monotonic()
        console = Console(highlight=False)
        live = is_wanted and sys.stdout.isatty() and not console.is_dumb_terminal
        self._plain = is_wanted and not live
        self._bar = Progress(
            BarColumn(bar_width=None),
            TextColumn("{task.percentage:>3.0f}%", markup=False),
            TextColumn("{task.completed:,}/{task.total:,}", markup=False),
            TextColumn("{task.fields[rate]}", style="cyan", markup=False),
            TimeRemainingColumn(),
            TextColumn("{task.description}", markup=False),
            console=console,
            disable=not live,
            expand=True,
        )
        self._task = self._bar.add_task("", total=total, rate="")

    def __enter__(self) -> "PictureProgress":
        self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bar.stop()

    def shard(self, where: str) -> None:
        """Say which shard is being made."""
        self._where = where
        self._bar.update(self._task, description=where)

    def advance(self, count: int) -> None:
        """Count pictures as done."""
        if not count:
            return
        self._done += count
        self._bar.update(self._task, completed=self._done, rate=f"{self._rate():,.0f} images/s")
        is_time = time.monotonic() - self._said > _SECONDS_BETWEEN_LINES
        if self._plain and (is_time or self._done == self._total):
            self._said = time.monotonic()
            left = timedelta(seconds=round((self._total - self._done) / max(self._rate(), 1e-9)))
            print(
                f"{self._where}  {self._done:,}/{self._total:,} ({self._done / self._total:.0%})  "
                f"{self._rate():,.1f} images/s  {left} left",
                flush=True,
            )

    def _rate(self) -> float:
        return self._done / max(time.monotonic() - self._start, 1e-9)
