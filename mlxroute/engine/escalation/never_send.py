"""Which contexts must stay on this machine."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

# Repeats without an end, back references, look-aheads and their like: a match may depend on text
# of any length. (An escaped one counts too: that costs time, not a match.)
_UNBOUNDED = re.compile(r"[*+]|\{\d*,\}|\\[1-9]|\(\?(?![aimsux]*[:)]|P<)")
_REPEATS = re.compile(r"\{(?:\d*,)?(\d+)\}")


class NeverSend:
    """Patterns whose match anywhere in an answer's context keeps its positions local.

    `texts` are what the prompt was rendered from: a chat template may change them. A match holds
    for every later context, except where the text it was found in has been taken back.
    """

    def __init__(self, patterns: Sequence[re.Pattern[str]], texts: Sequence[str]) -> None:
        self._patterns = tuple(patterns)
        self._texts = tuple(texts)
        self._clean = ""
        self._found: tuple[str, int] | None = None

    def match(self, context: str) -> int | None:
        """The number (from 1) of a pattern that matches, or None.

        What was searched before is searched again only as far as new text can change the outcome.
        """
        if self._found is not None and context.startswith(self._found[0]):
            return self._found[1]
        self._found = self._search(context)
        if self._found is not None:
            return self._found[1]
        self._clean = context
        return None

    def _search(self, context: str) -> tuple[str, int] | None:
        """The beginning that later contexts must share for the match to hold, and its pattern."""
        searched = len(self._clean) if context.startswith(self._clean) else 0
        for number, pattern in enumerate(self._patterns, start=1):
            if not searched and any(map(pattern.search, self._texts)):
                return "", number
            # Unlike a slice, a start leaves what comes before it to anchors and look-behinds.
            if pattern.search(context, max(0, searched - _reach(pattern.pattern))):
                return context, number
        return None


def _reach(pattern: str) -> int:
    """How many characters, at most, decide on a match from where it starts."""
    if _UNBOUNDED.search(pattern):
        return 1 << 62
    # No part of a pattern is shorter than what it matches once, and repeats can be nested.
    return len(pattern) * math.prod(max(1, int(count)) for count in _REPEATS.findall(pattern))
