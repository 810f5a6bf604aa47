"""Model text made safe for a terminal, and the writer for everything that is not one."""

from __future__ import annotations

from typing import IO

_CONTROLS = (
    *(code for code in range(0x20) if chr(code) not in "\n\t"),
    *range(0x7F, 0xA0),
    *range(0x202A, 0x202F),  # bidi embedding and override
    *range(0x2066, 0x206A),  # bidi isolates
)
# Half a surrogate pair, as JSON may carry, cannot be encoded for any stream.
_UNSAFE = dict.fromkeys(_CONTROLS, "") | dict.fromkeys(range(0xD800, 0xE000), "\ufffd")


def printable(text: str) -> str:
    """The text without characters that steer a terminal; newlines and tabs stay."""
    return text.translate(_UNSAFE)


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
