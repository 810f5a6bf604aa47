"""Never-send patterns: contexts that match one stay on this machine."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any, Final

from mlxroute.engine.escalation.text_forms import (
    fold_pattern,
    fold_text,
    ignores_case,
    pattern_forms,
    text_forms,
)

# Unbounded repeats, back references, look-arounds and similar: a match may depend on text of any
# length. Escaped characters match too, which costs time but never misses a match.
_UNBOUNDED = re.compile(r"[*+]|\{\d*,\}|\\[1-9]|\(\?(?![aimsux]*[:)]|P<)")
_REPEATS = re.compile(r"\{(?:\d*,)?(\d+)\}")
# Some patterns take time that doubles with each character of the text.
_MAX_SEARCH_S: Final = 0.5
_MAX_FORM_LENGTH: Final = 18
_FLAGS: Final = ("ASCII", "IGNORECASE", "MULTILINE", "DOTALL", "VERBOSE")


class NeverSend:
    """Searches the context of each position for patterns.

    `texts` are the messages of the prompt; they are searched too, because a chat template may
    change them. Texts are searched as they are and in the forms of Unicode that look the same. A
    pattern that cannot be searched in time counts as a match.
    """

    def __init__(self, patterns: Sequence[re.Pattern[str]], texts: Sequence[str]) -> None:
        self._patterns = tuple(map(_Searcher, patterns))
        self._texts = tuple(texts)
        self._texts_match: int | None = None
        self._are_texts_searched = False

    @property
    def has_patterns(self) -> bool:
        """Whether there is any pattern."""
        return bool(self._patterns)

    def match(self, context: str) -> int | None:
        """Return the number, from 1, of a pattern that matches; None if none does.

        Text without a match is searched again only where new text may complete one.
        """
        if not self._are_texts_searched:
            self._are_texts_searched = True
            self._texts_match = _search_texts(self._patterns, self._texts)
        if self._texts_match is not None:
            return self._texts_match
        forms, folded = text_forms(context), fold_text(context)
        for number, pattern in enumerate(self._patterns, start=1):
            if pattern.matches(forms, folded):
                return number
        return None


def find_match(patterns: Sequence[re.Pattern[str]], texts: Sequence[str]) -> int | None:
    """Return the number, from 1, of a pattern that matches one of the texts; None if none does."""
    return _search_texts(tuple(map(_Searcher, patterns)), texts)


class _Searcher:
    """One pattern in all its forms, with the texts in which it was not found."""

    def __init__(self, pattern: re.Pattern[str]) -> None:
        self._forms = [
            compiled
            for form in pattern_forms(pattern.pattern)
            if (compiled := _compile(form, pattern, is_own=form == pattern.pattern)) is not None
        ]
        self._folded: Any = None
        if ignores_case(pattern):
            self._folded = _compile(fold_pattern(pattern.pattern), pattern, is_own=False)
        self._reach = _max_match_length(pattern.pattern)
        # By pattern and form of the text; no match begins or ends in them.
        self._clean: dict[tuple[int, int], str] = {}

    def matches(self, forms: Sequence[str], folded: str) -> bool:
        """Return whether a form of the pattern matches a form of a text."""
        for p, pattern, t, text in self._searches(forms, folded):
            clean = self._clean.get((p, t), "")
            searched = len(clean) if text.startswith(clean) else 0
            # A start, unlike a slice, keeps the text before it for anchors and look-behinds.
            if _search(pattern, text, max(0, searched - self._reach)):
                return True
            self._clean[p, t] = text
        return False

    def matches_anew(self, forms: Sequence[str], folded: str) -> bool:
        """Return the same for a text that has nothing to do with earlier ones."""
        return any(
            _search(pattern, text, 0) for _, pattern, _, text in self._searches(forms, folded)
        )

    def _searches(self, forms: Sequence[str], folded: str) -> list[tuple[int, Any, int, str]]:
        searches = [
            (p, pattern, t, text)
            for p, pattern in enumerate(self._forms)
            for t, text in enumerate(forms)
        ]
        if self._folded is not None:
            searches.append((-1, self._folded, -1, folded))
        return searches


def _search_texts(patterns: Sequence[_Searcher], texts: Sequence[str]) -> int | None:
    for text in texts:
        forms, folded = text_forms(text), fold_text(text)
        for number, pattern in enumerate(patterns, start=1):
            if pattern.matches_anew(forms, folded):
                return number
    return None


def _compile(form: str, pattern: re.Pattern[str], *, is_own: bool) -> Any:
    """Compile a form of a pattern for searches with a time limit; None if it is not a pattern.

    A pattern that only `re` understands is used as it is, and has no time limit.
    """
    import regex

    flags = regex.V0
    for name in _FLAGS:
        if pattern.flags & getattr(re, name):
            flags |= getattr(regex, name)
    try:
        compiled = regex.compile(form, flags)
    except (regex.error, RecursionError, OverflowError, ValueError, IndexError):
        return pattern if is_own else None
    # A rewritten pattern that matches nothing at all would match everywhere.
    if not is_own and compiled.search("") is not None and pattern.search("") is None:
        return None
    return compiled


def _search(pattern: Any, text: str, start: int) -> bool:
    """Return whether a pattern matches from `start` on, or might, as it takes too long."""
    if isinstance(pattern, re.Pattern):
        return pattern.search(text, start) is not None
    try:
        return pattern.search(text, start, timeout=_MAX_SEARCH_S) is not None
    except (TimeoutError, MemoryError, RecursionError):
        return True


def _max_match_length(pattern: str) -> int:
    """Return an upper bound of the characters, from its start on, that a match depends on."""
    if _UNBOUNDED.search(pattern):
        return 1 << 62
    # A part of a pattern is at least as long as one match of it, and repeats can be nested. Other
    # forms of a character can be longer.
    return (
        _MAX_FORM_LENGTH
        * len(pattern)
        * math.prod(max(1, int(count)) for count in _REPEATS.findall(pattern))
    )
