"""Never-send patterns: contexts that match one stay on this machine."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

# Unbounded repeats, back references, look-arounds and similar: a match may depend on text of any
# length. Escaped characters match too, which costs time but never misses a match.
_UNBOUNDED = re.compile(r"[*+]|\{\d*,\}|\\[1-9]|\(\?(?![aimsux]*[:)]|P<)")
_REPEATS = re.compile(r"\{(?:\d*,)?(\d+)\}")


class NeverSend:
    """Searches the context of each position for patterns.

    `texts` are the messages of the prompt; they are searched too, because a chat template may
    change them. A match in a context holds for every later context that begins with it.
    """

    def __init__(self, patterns: Sequence[re.Pattern[str]], texts: Sequence[str]) -> None:
        self._patterns = tuple(patterns)
        self._texts = tuple(texts)
        self._clean_context = ""
        # The beginning that a context must have for the match to hold, and the pattern's number.
        self._last_match: tuple[str, int] | None = None

    @property
    def has_patterns(self) -> bool:
        """Whether there is any pattern."""
        return bool(self._patterns)

    def match(self, context: str) -> int | None:
        """Return the number, from 1, of a pattern that matches; None if none does.

        Text without a match is searched again only where new text may complete one.
        """
        if self._last_match is not None and context.startswith(self._last_match[0]):
            return self._last_match[1]
        self._last_match = self._search(context)
        if self._last_match is not None:
            return self._last_match[1]
        self._clean_context = context
        return None

    def _search(self, context: str) -> tuple[str, int] | None:
        searched = len(self._clean_context) if context.startswith(self._clean_context) else 0
        for number, pattern in enumerate(self._patterns, start=1):
            if not searched and any(map(pattern.search, self._texts)):
                return "", number
            # A start, unlike a slice, keeps the text before it for anchors and look-behinds.
            if pattern.search(context, max(0, searched - _max_match_length(pattern.pattern))):
                return context, number
        return None


def _max_match_length(pattern: str) -> int:
    """Return an upper bound of the characters, from its start on, that a match depends on."""
    if _UNBOUNDED.search(pattern):
        return 1 << 62
    # A part of a pattern is at least as long as one match of it, and repeats can be nested.
    return len(pattern) * math.prod(max(1, int(count)) for count in _REPEATS.findall(pattern))
