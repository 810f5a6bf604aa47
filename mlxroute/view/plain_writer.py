"""Plain output of answers, for pipes and files."""

from __future__ import annotations

from typing import IO

from mlxroute.safe_text import printable


class PlainWriter:
    """Writes an answer to a stream as it is generated, and ends it with exactly one newline.

    Args:
        stream: Where the answer is written.

    Attributes:
        has_text: Whether any text has been written.
    """

    def __init__(self, stream: IO[str]) -> None:
        self.has_text = False
        self._stream = stream
        self._held_newlines = ""

    def write(self, text: str) -> None:
        """Write text and flush; newlines at its end are held back until more text follows."""
        text = self._held_newlines + printable(text)
        body = text.rstrip("\n")
        self._held_newlines = text[len(body) :]
        if body:
            self.has_text = True
            self._stream.write(body)
            self._stream.flush()

    def finish(self) -> None:
        """End the last line; leave the stream open."""
        self._held_newlines = ""
        self._stream.write("\n")
        self._stream.flush()
