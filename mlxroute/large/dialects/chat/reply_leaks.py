"""What must not get from a reply into an answer: control tokens, and words of the framing."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Final

from mlxroute.tokenizers.control_tokens import control_tokens

_CONTROL_TOKENS: Final = control_tokens(frozenset(), any_form=True, in_answer=True)
# The beginning of a control token that the end of a reply cuts off.
_CUT_OFF: Final = re.compile(r"<[|｜]\S{0,80}\Z")
_MAX_CUT_OFF: Final = 82
# A hidden text is recognised by this many characters.
_RECOGNISED: Final = 12
# Longer than the name of a control token.
_TAIL: Final = 80


def find_leak(answer: str, new: str, hidden: Sequence[str]) -> int | None:
    """Return where text that must not be in an answer begins in `new`; None if there is none.

    It is 0 if it begins in the answer so far. `hidden` are texts of the request.
    """
    tail = answer[-_TAIL:]
    text = tail + new
    starts = [start for start, end in _CONTROL_TOKENS.find(text) if end > len(tail)]
    starts += [
        match.start()
        for match in _CUT_OFF.finditer(text, len(text) - _MAX_CUT_OFF)
        if match.end() > len(tail)
    ]
    for sign in (part[:_RECOGNISED] for part in hidden):
        # A sign that is in the answer so far is there for a reason.
        start = text.find(sign, max(0, len(tail) - len(sign) + 1))
        starts += [start] if start >= 0 else []
    return max(0, min(starts) - len(tail)) if starts else None
