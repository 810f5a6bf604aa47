"""JSON Lines files that a long run appends to, also across interruptions."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, Final, TypeVar

from mlxroute.errors import UsageError
from mlxroute.untrusted_text import MAX_ROW_BYTES, MalformedText, TextFile, parse_json

_MAX_FILE_BYTES: Final = 4 * 2**30
_T = TypeVar("_T")


def read_records(path: Path, parse: Callable[[Any], _T]) -> Iterator[_T]:
    r"""Yield `parse` of the value of each row; nothing if the file does not exist.

    Rows end at `\n`. An incomplete last row, left by an interrupted run, is removed from the file.
    Raises UsageError, with the row, for one that is no JSON or that `parse` cannot read.
    """
    if not path.exists():
        return
    file = TextFile(path, "the file of records", max_bytes=_MAX_FILE_BYTES)
    _remove_incomplete_row(path)
    for number, text in file.rows():
        try:
            record = parse(parse_json(text, strict=False))
        except (MalformedText, KeyError, TypeError, ValueError, AttributeError) as exc:
            reason = str(exc) if isinstance(exc, MalformedText) else "it is not such a record"
            raise file.refuse(f"{reason}; delete the row or the file", row=number) from exc
        yield record


def append_records(path: Path, items: Sequence[Any]) -> None:
    """Append a row for each item, in a file that only its owner can read.

    Raises UsageError if the file cannot be written; then no part of a row stays in it.
    """
    data = b"".join(json.dumps(item).encode() + b"\n" for item in items)
    try:
        with open(path, "ab", buffering=0, opener=_open_private) as file:
            _append(file, data)
    except OSError as exc:
        raise _unwritable(path, exc) from exc


def _append(file: BinaryIO, data: bytes) -> None:
    """Append to an open file, or leave it as it was."""
    is_locked = _lock(file)
    size = os.fstat(file.fileno()).st_size
    try:
        # In one write, so that without locks rows of several processes do not mix either.
        while data:
            data = data[file.write(data) :]
    except BaseException:
        # Without the lock, rows of another process may follow.
        if is_locked:
            file.truncate(size)
        raise


def _open_private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


def _remove_incomplete_row(path: Path) -> None:
    if not path.is_file() or path.stat().st_size == 0:
        return
    try:
        with path.open("rb") as file:
            # Another process may be in the middle of a row.
            _lock(file)
            size = _complete_size(file)
            if size is not None and size < path.stat().st_size:
                os.truncate(path, size)
    except OSError as exc:
        raise _unwritable(path, exc) from exc


def _lock(file: BinaryIO) -> bool:
    """Lock a file until it is closed, and return True; False on a file system without locks."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX)
    except OSError:
        return False
    return True


def _complete_size(file: BinaryIO) -> int | None:
    r"""Return the size of a file up to its last `\n`; None if the last row is too long."""
    start = max(0, file.seek(0, os.SEEK_END) - MAX_ROW_BYTES)
    file.seek(start)
    newline = file.read(MAX_ROW_BYTES).rfind(b"\n")
    return None if newline < 0 < start else start + newline + 1


def _unwritable(path: Path, exc: OSError) -> UsageError:
    return UsageError(f"the file of records {path} cannot be written: {exc.strerror}")
