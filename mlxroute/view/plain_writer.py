"""The writer of answers to pipes and files."""

from __future__ import annotations

from typing import IO

from mlxroute.safe_text import printable


class PlainWriter:
    """Writes an answer as it comes to a pipe or file and ends it with exactly one newline."""

    def __init__(self, stream: IO[str]) -> None:
        self._stream = stream
        self._newlines = ""

    def write(self, text: str) -> None:
        """Write and flush; newlines wait until it is known that they are not the last ones."""
        text = self._newlines + printable(text)
        body = text.rstrip("\n")
        self._newlines = text[len(body) :]
        if body:
            self._stream.write(body)
            self._stream.flush()

    def finish(self) -> None:
        """End the last line; the stream stays open."""
        self._newlines = ""
        self._stream.write("\n")
        self._stream.flush()
