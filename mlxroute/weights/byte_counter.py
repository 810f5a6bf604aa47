"""Hashes of files, and the progress of downloads and hashes, counted in bytes."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Final

from mlxroute.types import Progress

CHUNK_BYTES: Final = 4 << 20
"""What is read of a file at a time."""


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


def sha256_of(path: Path, *, on_bytes: Callable[[int], None] | None = None) -> str:
    """Return the SHA-256 of a file in hexadecimal; `on_bytes` receives the size of each chunk."""
    return _hash_of(path, "sha256", b"", on_bytes)


def git_id_of(path: Path, *, on_bytes: Callable[[int], None] | None = None) -> str:
    """Return git's id of a file's content; `on_bytes` receives the size of each chunk."""
    return _hash_of(path, "sha1", b"blob %d\0" % path.stat().st_size, on_bytes)


def _hash_of(
    path: Path, algorithm: str, start: bytes, on_bytes: Callable[[int], None] | None
) -> str:
    digest = hashlib.new(algorithm, start, usedforsecurity=False)
    with open(path, "rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
            if on_bytes is not None:
                on_bytes(len(chunk))
    return digest.hexdigest()
