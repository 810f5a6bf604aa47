"""A model of a server that only starts new answers, and goes on with begun ones by example."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any, Final

from mlxroute.large.dialects.chat.framing import frame
from mlxroute.large.prompt import Prompt
from mlxroute.types import Message

_EXAMPLES: Final = frame(Prompt(messages=(), answer_start="x"), shows_examples=True).messages[:-1]
_BEGIN: Final = "<beginning>"
_END: Final = "</beginning>\nThen go on from it."
_FIRST: Final = re.compile(r"(.*)\n\nBegin your answer with(?: \"([^\n\"]*)\"|:\n(.*))", re.DOTALL)
_NEXT: Final = "Go on with your answer. Begin with:\n"

Conversation = tuple[list[Message], str, str]
# The next tokens of the answer to these messages, and whether the answer ends.
Write = Callable[[Sequence[dict[str, Any]], int], tuple[list[bytes], bool]]


def shows_examples(messages: Sequence[dict[str, Any]]) -> bool:
    """Return whether a request shows worked examples before the conversation."""
    return tuple(messages[: len(_EXAMPLES)]) == _EXAMPLES


def read_question(messages: Sequence[dict[str, Any]]) -> Conversation | None:
    """Return conversation, answer so far and the part of it to repeat; None without a part."""
    *turns, last = [dict(message) for message in messages]
    text, before = str(last["content"]), ""
    if shows_examples(messages):
        turns = turns[len(_EXAMPLES) :]
        asked, _, rest = text.rpartition(_BEGIN)
        part, question = rest.removesuffix(_END), asked.rpartition("\n\n")[0]
    else:
        first = _FIRST.fullmatch(text)
        if first is None and not text.startswith(_NEXT):
            return None
        question, part = first[1] if first else "", text.removeprefix(_NEXT)
        part = (first[2] if first[3] is None else first[3]) if first else part
    if turns and turns[-1]["role"] == "assistant":
        before = turns.pop()["content"]
    else:
        turns.append({"role": "user", "content": question})
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


def after_examples(write: Write) -> Write:
    """Return the model as one that goes on with a begun answer only after worked examples."""

    def write_after_examples(
        messages: Sequence[dict[str, Any]], count: int
    ) -> tuple[list[bytes], bool]:
        if read_question(messages) is not None and not shows_examples(messages):
            return [b"Sure", b"!"][:count], False
        return write(messages, count)

    return write_after_examples
