"""A model of a server that only starts new answers, and goes on with begun ones by example."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final

from mlxroute.large.dialects.chat.framing import frame
from mlxroute.large.prompt import Prompt
from mlxroute.types import Message

_TURNS_BEFORE: Final = len(frame(Prompt(messages=(), answer_start="x")).messages) - 1
_BEGIN: Final = "<beginning>"
_END: Final = "</beginning>\nThen go on from it."

Conversation = tuple[list[Message], str, str]


def read_question(messages: Sequence[dict[str, Any]]) -> Conversation | None:
    """Return conversation, answer so far and the part of it to repeat; None without a part."""
    *turns, last = [dict(message) for message in messages]
    asked, begin, rest = str(last["content"]).rpartition(_BEGIN)
    count = _TURNS_BEFORE - (messages[0]["role"] != "system")
    if not begin or not rest.endswith(_END) or len(messages) <= count:
        return None
    part, before = rest.removesuffix(_END), ""
    turns = turns[count:]
    if turns and turns[-1]["role"] == "assistant":
        before = turns.pop()["content"]
    else:
        turns.append({"role": "user", "content": asked.rpartition("\n\n")[0]})
    return turns, before + part, part


def write_by_example(
    messages: Sequence[dict[str, Any]], go_on: Callable[[Sequence[Message], str], str]
) -> str:
    """Return the whole reply: the part to repeat, and what `go_on` adds to the answer so far.

    `go_on` gets the conversation and the answer so far, and for a new answer an empty one.
    """
    question = read_question(messages)
    if question is None:
        return go_on(list(messages), "")
    conversation, answer, part = question
    return part + go_on(conversation, answer)
