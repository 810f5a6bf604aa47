"""Progress of downloads and hashes, counted in bytes."""

from __future__ import annotations

import threading

from mlxroute.types import Progress


class ByteCounter:
    """Adds up the bytes that several threads process and reports the sum, one call at a time.

    Args:
        label: Name of the work, passed to `progress`.
        total: Number of bytes when the work is done.
        progress: Receives the label, the sum and the total.
        done: Bytes processed before. 0 by default.
    """

    def __init__(self, label: str, *, total: int, progress: Progress, done: int = 0) -> None:
        self._label = label
        self._total = total
        self._progress = progress
        self._done = done
        self._lock = threading.Lock()

    def add(self, count: int) -> None:
        """Add `count` bytes and report the sum; `count` is negative if a part starts again."""
        with self._lock:
            self._done += count
            self._progress(self._label, self._done, self._total)
