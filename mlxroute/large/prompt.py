"""The prompt of a completion request, in one of the forms that servers accept."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

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
