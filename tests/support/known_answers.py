"""A model that knows the answers of a probe by heart, asked to go on with them by example."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, Final

from mlxroute.large.negotiation.continuation_questions import CONTINUATIONS, FINISHED
from mlxroute.large.negotiation.probe_questions import COUNTING, MID_WORD
from mlxroute.types import Message
from tests.support.example_chat import write_by_example

_TOKEN: Final = re.compile(r" ?[^\W\d_\u2e80-\U0010ffff]+|\d+|\s+|.", re.DOTALL)
_KNOWN: Final = (
    FINISHED.text,
    *(
        question.text + question.expected + " and so on"
        for question in (*MID_WORD, COUNTING, *(question for _, question in CONTINUATIONS))
    ),
)


def go_on(conversation: Sequence[Message], answer: str) -> str:
    """Go on with an answer that is known by heart; begin and go on with others in one way."""
    known = next((text for text in _KNOWN if answer and text.startswith(answer)), None)
    if known is not None:
        return known[len(answer) :]
    return " large words, and more." if answer else "Sure! Here is an answer."


def write_known(messages: Sequence[dict[str, Any]], count: int) -> tuple[list[bytes], bool]:
    """Return the first tokens of a new answer, and whether the answer ends with them."""
    tokens = [token.encode() for token in _TOKEN.findall(write_by_example(messages, go_on))]
    return tokens[:count], len(tokens) < count
