"""The one progress bar: live on a terminal, a line every half minute elsewhere."""

import contextlib
import sys
import time
from collections.abc import Iterable, Iterator
from datetime import timedelta
from typing import Any, TypeVar

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

_SECONDS_BETWEEN_LINES = 30.0
_SECONDS_OF_RATE = 600.0
Item = TypeVar("Item")


class ProgressBar(contextlib.ExitStack):
    """Show, until its `with` ends, how many steps are done, how fast, and how long the rest takes.

    A step has `per_step` units, which the rate counts.
    """

    def __init__(
        self,
        title: str,
        total: int,
        *,
        done: int = 0,
        per_step: int = 1,
        unit: str = "images",
        is_wanted: bool = True,
    ) -> None:
        super().__init__()
        console = Console(highlight=False)
        is_live = is_wanted and sys.stdout.isatty() and not console.is_dumb_terminal
        self._is_plain = is_wanted and not is_live
        self._bar = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=None),
            TextColumn("{task.percentage:>3.0f}%"),
            TextColumn("{task.completed:,}/{task.total:,}"),
            _RateColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}", style="green", markup=False),
            console=console,
            disable=not is_live,
            expand=True,
            speed_estimate_period=_SECONDS_OF_RATE,
        )
        fields = {"note": "", "per_step": per_step, "unit": unit}
        self._id = self._bar.add_task(title, total=total, completed=done, **fields)
        self._last_line = time.monotonic()
        self.enter_context(self._bar)

    def name(self, title: str) -> None:
        """Change the title."""
        self._bar.update(self._id, description=title)

    def move(self, done: int, note: str = "") -> None:
        """Set the steps done; a note, or half a minute without a line, prints one."""
        self._bar.update(self._id, completed=done, **({"note": note} if note else {}))
        self.remind(is_due=bool(note))

    def advance(self, count: int = 1) -> None:
        """Count steps as done; the last one prints a line."""
        if count:
            self._bar.update(self._id, advance=count)
            self.remind(is_due=self._bar.finished)

    def remind(self, *, is_due: bool = False) -> None:
        """Print a line, where there is no live bar, if it is due or the last was long ago."""
        is_late = time.monotonic() - self._last_line >= _SECONDS_BETWEEN_LINES
        if not self._is_plain or not (is_due or is_late):
            return
        self._last_line = time.monotonic()
        task = self._bar.tasks[0]
        parts = [f"{task.description} {task.completed:,}/{task.total:,} ({task.percentage:.0f}%)"]
        if task.speed:
            parts += [_rate(task), f"{timedelta(seconds=task.time_remaining)} left"]
        print("  ".join([*parts, task.fields["note"]]).rstrip(), flush=True)


def track(items: Iterable[Item], title: str, total: int, **options: Any) -> Iterator[Item]:
    """Yield items beside a `ProgressBar`, which takes the options."""
    with ProgressBar(title, total, **options) as bar:
        for item in items:
            yield item
            bar.advance()


class _RateColumn(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text(_rate(task) if task.speed else "", style="cyan")


def _rate(task: Task) -> str:
    rate = task.speed * task.fields["per_step"]
    return f"{rate:,.{0 if rate >= 10 else 2}f} {task.fields['unit']}/s"
