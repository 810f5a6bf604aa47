"""Progress of downloads, conversions and loading, on stderr."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import TYPE_CHECKING

from mlxroute.types import Progress as OnProgress

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import TaskID


_SELDOM_S = 60.0
# Lines that the speed is taken from: what was known before takes no time.
_LINES = 5


@contextmanager
def counting(console: Console) -> Iterator[OnProgress]:
    """Shows how many of a long run's pieces are done, and how long the rest may take.

    A bar on a terminal, elsewhere a line a minute.
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
    said = deque([(time.monotonic(), 0)], maxlen=_LINES)

    def progress(label: str, done: int, total: int | None) -> None:
        if label not in tasks:
            tasks[label] = bars.add_task(label, total=total)
        bars.update(tasks[label], completed=done, total=total)
        now_s = time.monotonic()
        if (
            not console.is_terminal
            and total
            and 0 < done < total
            and now_s - said[-1][0] > _SELDOM_S
        ):
            since_s, before = said[0]
            said.append((now_s, done))
            left_s = (now_s - since_s) / max(1, done - before) * (total - done)
            console.print(f"{label}: {done} of {total}, about {left_s / 60:.0f} min left")

    with bars:
        yield progress


class Reporter:
    """Draws a bar per piece of work on a terminal; elsewhere prints a line as each one ends."""

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
        self._began: dict[str, float] = {}
        self._finished: set[str] = set()

    def __enter__(self) -> Reporter:
        self._bars.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bars.stop()

    def notify(self, line: str) -> None:
        """Print one line above the bars."""
        self._console.print(line, style="dim", markup=False, soft_wrap=True)

    def progress(self, label: str, done: int, total: int | None) -> None:
        """Show `done` of `total` bytes; safe to call from worker threads."""
        if label in self._finished:
            return
        if label not in self._tasks:
            self._tasks[label] = self._bars.add_task(label, total=total)
            self._began[label] = time.monotonic()
        self._bars.update(self._tasks[label], completed=done, total=total)
        if total is not None and done >= total:
            seconds = time.monotonic() - self._began[label]
            self.notify(f"{label}: {total / 1e6:,.0f} MB in {seconds:.0f} s")
            self._bars.remove_task(self._tasks[label])
            self._finished.add(label)
