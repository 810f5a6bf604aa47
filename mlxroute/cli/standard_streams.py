"""Standard streams that stay usable: closed ones, full ones, and ones that cannot encode text."""

from __future__ import annotations

import io
import os
import select
import sys
from collections.abc import Callable
from typing import IO, TYPE_CHECKING, Final

from mlxroute.errors import UsageError
from mlxroute.untrusted_text import MalformedText, check_piped_text

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

_MODES: Final = {"stdin": "r", "stdout": "w", "stderr": "w"}


class OutputUnusable(Exception):
    """Stdout cannot be written.

    It is not an OSError, as the libraries end the process on one where a pipe was closed.

    Attributes:
        is_closed_pipe: Whether the reader of a pipe has closed it, which is not a failure.
    """

    def __init__(self, error: OSError) -> None:
        super().__init__(f"the output cannot be written: {error.strerror}")
        self.is_closed_pipe = isinstance(error, BrokenPipeError)


class _Output(io.FileIO):
    """A standard stream that discards everything from its first failure on.

    Args:
        descriptor: The file descriptor.
        is_needed: Whether the first failure raises OutputUnusable.
    """

    def __init__(self, descriptor: int, *, is_needed: bool) -> None:
        super().__init__(descriptor, "wb", closefd=False)
        self._is_needed = is_needed
        self._failed = False

    def write(self, data: ReadableBuffer, /) -> int:
        """Write some of the data; return the number of bytes written or discarded."""
        if not self._failed:
            try:
                while (written := super().write(data)) is None:
                    # Another program has made the stream non-blocking.
                    select.select([], [self], [])
                return written
            except OSError as exc:
                self._failed = True
                if self._is_needed:
                    raise OutputUnusable(exc) from exc
        return memoryview(data).nbytes


def make_streams_safe() -> None:
    """Replace closed streams, and let no character and no failure of stderr end the process."""
    for name, mode in _MODES.items():
        stream = getattr(sys, name)
        if stream is None:
            stream = open(os.devnull, mode, encoding="utf-8")  # noqa: SIM115
            setattr(sys, name, stream)
        elif name != "stdin" and stream is getattr(sys, f"__{name}__"):
            stream = _guarded(stream, is_needed=name == "stdout")
            setattr(sys, name, stream)
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace" if name == "stdin" else "backslashreplace")


def _guarded(stream: io.TextIOWrapper, *, is_needed: bool) -> io.TextIOWrapper:
    return io.TextIOWrapper(
        io.BufferedWriter(_Output(stream.fileno(), is_needed=is_needed)),
        encoding=stream.encoding,
        line_buffering=stream.line_buffering,
        write_through=stream.write_through,
    )


def has_room(stream: IO[str]) -> bool:
    """Return whether a line can be written without waiting for a reader."""
    try:
        return bool(select.select([], [stream], [], 0)[1])
    except (OSError, ValueError):
        # The stream has no file descriptor.
        return True


def read_piped(read: Callable[[], str]) -> str:
    """Return what `read` reads from standard input. Raises UsageError if it is not text."""
    try:
        return check_piped_text(read())
    except UnicodeDecodeError as error:
        raise UsageError(f"stdin is not {error.encoding} text") from error
    except MalformedText as error:
        raise UsageError(f"stdin: {error}") from error
