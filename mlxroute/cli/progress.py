"""Progress on stderr: bytes of downloads and loading, and counts of long runs."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

from mlxroute.cli.terminal import print_note, redraw
from mlxroute.closeable import Closeable
from mlxroute.types import Progress as OnProgress

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import TaskID

_LINE_INTERVAL_S = 60.0
# Recent lines that the speed is estimated from: work done before the first of them, such as
# replies read from a file, would make it look too fast.
_RECENT_LINES = 5


class _CountLines:
    """Progress of a long run on an output that is not a terminal: one line a minute."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._label = ""
        self._points: deque[tuple[float, int]] = deque(maxlen=_RECENT_LINES)

    def update(self, label: str, done: int, total: int) -> None:
        now_s = time.monotonic()
        if label != self._label:
            self._label = label
            self._points.clear()
            self._points.append((now_s, done))
        if now_s - self._points[-1][0] <= _LINE_INTERVAL_S or not 0 < done < total:
            return
        first_s, first_done = self._points[0]
        self._points.append((now_s, done))
        left_s = (now_s - first_s) / max(1, done - first_done) * (total - done)
        self._console.print(f"{label}: {done} of {total}, about {left_s / 60:.0f} min left")


@contextmanager
def count_progress(console: Console) -> Iterator[OnProgress]:
    """Show how many items of a long run are done, and how long the rest may take.

    On a terminal this is a bar, elsewhere a line a minute.
    """
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}", markup=False),
        *(BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()),
        TimeRemainingColumn(),
    )
    bars = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
    tasks: dict[str, TaskID] = {}
    lines = _CountLines(console)

    def progress(label: str, done: int, total: int | None) -> None:
        if label not in tasks:
            tasks[label] = bars.add_task(label, total=total)
        bars.update(tasks[label], completed=done, total=total)
        if not console.is_terminal and total:
            lines.update(label, done, total)

    with redraw(console, pause=bars.stop, resume=bars.start):
        yield progress


class ByteProgress(Closeable):
    """Progress in bytes: on a terminal one bar per task, elsewhere a line when a task ends."""

    def __init__(self, console: Console) -> None:
        from rich.progress import (
            BarColumn,
            DownloadColumn,
            Progress,
            TextColumn,
            TimeRemainingColumn,
            TransferSpeedColumn,
        )

        self._console = console
        self._bars = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=None),
            DownloadColumn(binary_units=True),
            TransferSpeedColumn(),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._tasks: dict[str, TaskID] = {}
        self._start_s: dict[str, float] = {}
        self._finished: set[str] = set()
        self._display = ExitStack()
        self._display.enter_context(redraw(console, pause=self._bars.stop, resume=self._bars.start))

    def close(self) -> None:
        """Remove the bars."""
        self._display.close()

    def notify(self, line: str) -> None:
        """Print one line above the bars."""
        print_note(self._console, line)

    def progress(self, label: str, done: int, total: int | None) -> None:
        """Show `done` of `total` bytes of a task; safe to call from worker threads."""
        if label in self._finished:
            return
        if label not in self._tasks:
            self._tasks[label] = self._bars.add_task(label, total=total)
            self._start_s[label] = time.monotonic()
        self._bars.update(self._tasks[label], completed=done, total=total)
        if total is not None and done >= total:
            seconds = time.monotonic() - self._start_s[label]
            self.notify(f"{label}: {total / 1e6:,.0f} MB in {seconds:.0f} s")
            self._bars.remove_task(self._tasks[label])
            self._finished.add(label)
