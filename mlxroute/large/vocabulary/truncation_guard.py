"""Detection of servers that cut a long prompt without a word, by their own count of its tokens."""

from __future__ import annotations

import threading
from typing import Final

from mlxroute.errors import LargeTruncated

# Contexts are longer; a smaller constant is the count of a server that does not count.
_MIN_TOKENS: Final = 256
# So much further text has more tokens in any vocabulary, whatever its spelling.
_MIN_WORDS: Final = 8
_MIN_CHARACTERS: Final = 400
# Prompts to compare with: those of conversations in turn, each with its branches.
_MAX_PROMPTS: Final = 16


class TruncationGuard:
    """Compares the counts of prompts that continue each other. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        # The counts of the last prompts, without those that a later one continues.
        self._counts: dict[str, int] = {}

    def check(self, text: str, count: int | None) -> None:
        """Record a prompt and the server's count of its tokens.

        Raises LargeTruncated if the count stays the same while the prompt grows.
        """
        if count is None or count < _MIN_TOKENS:
            return
        with self._lock:
            self._compare(text, count)

    def _compare(self, text: str, count: int) -> None:
        begins = [earlier for earlier in self._counts if text.startswith(earlier)]
        equal = [earlier for earlier in begins if self._counts[earlier] == count]
        # A prompt that grows in small steps is compared with the first of them.
        first = min(equal, key=len, default=text)
        added = text[len(first) :]
        if len(added.split()) >= _MIN_WORDS or len(added) >= _MIN_CHARACTERS:
            raise LargeTruncated(
                f"the server cut the prompt to {count:,} tokens: its context is too short"
            )
        for earlier in begins:
            del self._counts[earlier]
        self._counts[first] = count
        if len(self._counts) > _MAX_PROMPTS:
            del self._counts[next(iter(self._counts))]
