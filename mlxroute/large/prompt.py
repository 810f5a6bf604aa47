"""The prompt of a completion request, in one of the forms that servers accept."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from mlxroute.errors import LargeUnsendable
from mlxroute.types import Message


class PromptForm(StrEnum):
    """The form in which a server accepts the prompt."""

    IDS = "token ids"
    TEXT = "rendered text"
    CHAT = "continued chat turn"


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt in one form; the fields of the other forms are empty.

    `ids` are token ids of the large vocabulary. `text` is a rendered prompt. `messages` are a chat
    whose assistant turn has begun with `answer_start`. `neutralised` are the names of control
    tokens in message contents, which got a space because the server would read them as tokens.
    """

    ids: tuple[int, ...] = ()
    text: str = ""
    messages: tuple[Message, ...] = ()
    answer_start: str = ""
    neutralised: tuple[str, ...] = ()

    @property
    def whole_text(self) -> str:
        """The text or the chat as one text, with which those of longer prompts begin."""
        turns = [f"{message['role']}\n{message['content']}\n" for message in self.messages]
        answer = f"assistant\n{self.answer_start}" if self.answer_start else ""
        return self.text + "".join(turns) + answer


def check_last_turn(messages: Sequence[Message]) -> None:
    """Raise LargeUnsendable for a chat that ends with a closed turn of the assistant.

    Servers that continue a trailing turn would not begin a new one after it.
    """
    if messages and messages[-1]["role"] == "assistant":
        raise LargeUnsendable(
            "the conversation ends with an answer, which the large model's server would continue"
            " instead of beginning a new one"
        )
