"""Counting the bytes of work done in parallel."""

from __future__ import annotations

import threading

from mlxroute.types import Progress


class Meter:
    """Adds up bytes from several threads and reports the sum, one call at a time."""

    def __init__(self, label: str, *, total: int, progress: Progress, done: int = 0) -> None:
        self._label = label
        self._total = total
        self._progress = progress
        self._done = done
        self._lock = threading.Lock()

    def add(self, count: int) -> None:
        """`count` more bytes are done; negative when a part starts anew."""
        with self._lock:
            self._done += count
            self._progress(self._label, self._done, self._total)
