"""`/v1/chat/completions` with an unfinished assistant turn, which the server must continue."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from enum import Enum
from typing import Final

from mlxroute.errors import LargeProtocolError
from mlxroute.large.dialects.base import NO_THINKING, RequestOptions, add_model
from mlxroute.large.dialects.chat.chat_reply import chat_text
from mlxroute.large.dialects.chat.fielded_dialect import FieldedDialect
from mlxroute.large.dialects.json_fields import (
    ends_answer,
    first_choice,
    mark_end,
    parse_chat_positions,
    usage_counts,
)
from mlxroute.large.prompt import Prompt, PromptForm, check_last_turn
from mlxroute.large.reply import Completion, ReplyPosition, ReplyToken

_FLAGS: Final = {"continue_final_message": True, "add_generation_prompt": False}


class ContinuationMethod(Enum):
    """How a request marks its last chat turn as unfinished."""

    FLAGS = "flags"
    PREFIX = "prefix"
    TRAILING = "trailing turn"


class ChatContinuation(FieldedDialect):
    """The dialect of chat servers that continue an unfinished assistant turn.

    `method` is how requests mark the turn. `echoes` is for servers whose reply repeats the
    beginning of the turn. Without `logprobs` requests ask for none.
    """

    form = PromptForm.CHAT
    path = "/chat/completions"

    def __init__(
        self, method: ContinuationMethod, *, echoes: bool = False, logprobs: bool = True
    ) -> None:
        self._method = method
        self._echoes = echoes
        self.reads_logprobs = logprobs
        details = [method.value, *["echoing"] * echoes, *["text only"] * (not logprobs)]
        self.name = self.plain_name = f"chat continuation ({', '.join(details)})"
        self.rung = 3 if logprobs else 4
        self.names_tokens = logprobs
        if method is ContinuationMethod.FLAGS:
            self.own_names = frozenset((*_FLAGS, *NO_THINKING))
        elif method is ContinuationMethod.PREFIX:
            self.own_names = frozenset(("prefix",))

    def request(self, prompt: Prompt, options: RequestOptions) -> dict[str, object]:
        """Ask for greedy tokens; an empty answer start adds no assistant turn.

        Raises LargeUnsendable for a chat whose last turn the server would continue.
        """
        if self._method is not ContinuationMethod.FLAGS:
            check_last_turn(prompt.messages)
        messages: list[dict[str, object]] = [dict(message) for message in prompt.messages]
        body: dict[str, object] = {"messages": messages} | self.request_fields(options)
        if prompt.answer_start:
            messages.append({"role": "assistant", "content": prompt.answer_start})
            if self._method is ContinuationMethod.PREFIX:
                messages[-1]["prefix"] = True
            elif self._method is ContinuationMethod.FLAGS:
                body |= _FLAGS
        if self._method is ContinuationMethod.FLAGS:
            body |= NO_THINKING
        return add_model(body, options)

    def completion(self, reply: Mapping[str, object], prompt: Prompt) -> Completion:
        """Read a reply. Null content, as in a tool call, counts as empty text."""
        choice = first_choice(reply)
        text = self._continuation(reply, prompt)
        positions = parse_chat_positions(choice)
        if self.reads_logprobs and not positions and text:
            raise LargeProtocolError("the reply has text and no logprobs")
        if not positions:
            positions = [ReplyPosition(ReplyToken(text=text))]
        if ends_answer(choice, text=text):
            if text and _lacks_end_token(positions, text):
                positions.append(ReplyPosition(ReplyToken(text="")))
            positions = list(mark_end(positions))
        return Completion(tuple(positions), text, **usage_counts(reply))

    def _continuation(self, reply: Mapping[str, object], prompt: Prompt) -> str:
        """Return the reply's text without an echo of the turn's beginning."""
        text = chat_text(reply)
        if not (self._echoes and prompt.answer_start):
            return text
        if not text.startswith(prompt.answer_start):
            raise LargeProtocolError("the reply does not begin with the turn it continues")
        return text[len(prompt.answer_start) :]


def _lacks_end_token(positions: Sequence[ReplyPosition], text: str) -> bool:
    """Return whether the tokens of an ended answer spell its whole text, so none is its end."""
    if len(positions) == 1:
        return True
    # A listed end token may have a name and no bytes; its name must count.
    names = (token.data or (token.text or "").encode() for token in (p.token for p in positions))
    return bool(positions[-1].token.text) and b"".join(names).strip() == text.encode().strip()
