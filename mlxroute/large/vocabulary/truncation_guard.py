"""Detection of servers that cut a long prompt without a word, by their own count of its tokens."""

from __future__ import annotations

from typing import Final

from mlxroute.errors import LargeProtocolError

# Contexts are longer; a smaller constant is the count of a server that does not count.
_MIN_TOKENS: Final = 256
# So much further text has more tokens in any vocabulary, whatever its spelling.
_MIN_WORDS: Final = 8
_MIN_CHARACTERS: Final = 400


class TruncationGuard:
    """Compares the counts of prompts that continue each other. Not safe for several threads."""

    def __init__(self) -> None:
        self._text = ""
        self._count = 0

    def check(self, text: str, count: int | None) -> None:
        """Record a prompt and the server's count of its tokens.

        Raises LargeProtocolError if the count stays the same while the prompt grows.
        """
        if count is None or count < _MIN_TOKENS:
            return
        if count != self._count or not text.startswith(self._text):
            self._text, self._count = text, count
            return
        added = text[len(self._text) :]
        if len(added.split()) >= _MIN_WORDS or len(added) >= _MIN_CHARACTERS:
            raise LargeProtocolError(
                f"the server cut the prompt to {count:,} tokens: its context is too short"
            )
