"""Stop strings: the text of an answer ends before the first match."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from mlxroute.types import Token


class StopStrings:
    """Buffers tokens whose text may be the beginning of a stop string.

    `is_hit` becomes true when a stop string is complete; no token is released after that.
    """

    def __init__(self, stop: Sequence[str]) -> None:
        self._stop = tuple(text for text in stop if text)
        self._buffer: list[Token] = []
        self.is_hit = False

    def push(self, token: Token) -> Iterator[Token]:
        """Yield the tokens that can be released now.

        At a match the last token's text is cut where the stop string begins.
        """
        if not self._stop:
            yield token
            return
        self._buffer.append(token)
        text = "".join(buffered.text for buffered in self._buffer)
        matches = [index for index in (text.find(stop) for stop in self._stop) if index >= 0]
        if matches:
            self.is_hit = True
            yield from self._release(min(matches), cut=True)
        else:
            yield from self._release(len(text) - self._partial_match(text), cut=False)

    def flush(self) -> Iterator[Token]:
        """Yield the buffered tokens when the answer ends for another reason."""
        yield from self._buffer
        self._buffer = []

    def _partial_match(self, text: str) -> int:
        """Return the length of the longest tail of `text` that begins a stop string."""
        longest = max((len(stop) for stop in self._stop), default=0)
        for size in range(min(len(text), longest - 1), 0, -1):
            if any(stop.startswith(text[-size:]) for stop in self._stop):
                return size
        return 0

    def _release(self, length: int, *, cut: bool) -> Iterator[Token]:
        """Yield the tokens within the first `length` characters.

        The token that crosses that limit is cut there if `cut`, and otherwise stays buffered.
        """
        while self._buffer:
            token = self._buffer[0]
            if len(token.text) > length:
                if not cut:
                    return
                token = replace(token, text=token.text[:length])
            self._buffer.pop(0)
            length -= len(token.text)
            yield token
