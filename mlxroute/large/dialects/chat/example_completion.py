"""`/v1/chat/completions` of servers that only start new answers: completion by example."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from typing import Final, Self

from mlxroute.errors import LargeNotContinued
from mlxroute.large.dialects.base import RequestOptions, add_model
from mlxroute.large.dialects.chat.chat_reply import chat_text
from mlxroute.large.dialects.chat.fielded_dialect import FieldedDialect
from mlxroute.large.dialects.chat.framing import HIDDEN, frame, may_end, repeated_size
from mlxroute.large.dialects.chat.reply_leaks import find_leak
from mlxroute.large.dialects.chat.reply_pieces import drop_bytes, read_pieces, take_bytes
from mlxroute.large.dialects.json_fields import (
    ends_answer,
    first_choice,
    mark_end,
    usage_counts,
)
from mlxroute.large.prompt import Prompt, PromptForm
from mlxroute.large.reply import Completion, ReplyPosition, ReplyToken

# Tokens beyond those asked for: the last word of a text is left out, and a mark is recognised.
_SPARE_TOKENS: Final = 3
# Added where a first reply was too short: some replies copy the request's marks before the part.
_COPIED_TOKENS: Final = 24


class OnlyRepeated(LargeNotContinued):
    """Raised for a reply that ends after the repeated end of the answer so far."""


class ExampleCompletion(FieldedDialect):
    """The dialect of chat servers that only start new answers.

    The model is asked to write the end of the answer so far again and to go on from there: at first
    plainly, and where its reply does not do so, by worked examples. A reply that does not begin
    with that end gives no token, so that no comment and no lost space gets into the answer. The
    tokens are those of a model that was asked to continue, and not of its own greedy answer. The
    answer ends where both replies are nothing but its repeated end.
    """

    rung = 5
    form = PromptForm.CHAT
    path = "/chat/completions"
    is_approximate = True
    needs_greedy = False
    needs_logprobs = False

    name = plain_name = "completion by example"
    _shows_examples = False
    _only_repeated = False

    def fallback(self, prompt: Prompt, failure: LargeNotContinued) -> Self | None:
        """Return the dialect that shows worked examples, for an answer that has begun."""
        if self._shows_examples or not prompt.answer_start:
            return None
        dialect = copy.copy(self)
        dialect._shows_examples = True
        dialect._only_repeated = isinstance(failure, OnlyRepeated)
        return dialect

    def request(self, prompt: Prompt, options: RequestOptions) -> dict[str, object]:
        """Ask for the end of the answer so far and the tokens after it."""
        framing = frame(prompt, shows_examples=self._shows_examples)
        count = framing.repeated_tokens + options.max_tokens + _SPARE_TOKENS
        if options.max_tokens > 1 and framing.repeated:
            count += _COPIED_TOKENS
        body: dict[str, object] = {"messages": [dict(message) for message in framing.messages]}
        return add_model(body | self.request_fields(replace(options, max_tokens=count)), options)

    def completion(self, reply: Mapping[str, object], prompt: Prompt) -> Completion:
        """Read a reply. Raises LargeNotContinued if it does not go on with the answer so far."""
        choice = first_choice(reply)
        text = chat_text(reply)
        answer = prompt.answer_start
        size = repeated_size(prompt, text)
        if size is None:
            raise LargeNotContinued("the reply does not go on from the end of the answer so far")
        if not text.strip() and choice.get("finish_reason") != "length":
            raise LargeNotContinued("the reply is empty")
        rest = text[size:]
        ended = ends_answer(choice, text=rest)
        if ended and answer and not rest:
            self._check_end(answer, text)
        positions = drop_bytes(read_pieces(choice, text, ended=ended), len(text[:size].encode()))
        if (leak := find_leak(answer, rest, HIDDEN)) is not None:
            ended = False
            rest = rest[:leak]
            positions = take_bytes(positions, len(rest.encode()))
            if not positions or not rest.strip():
                raise LargeNotContinued("the reply goes on with control tokens or with the request")
        return Completion(_with_end(positions, ended=ended), rest, **usage_counts(reply))

    def _check_end(self, answer: str, text: str) -> None:
        """Raise LargeNotContinued if a reply that only repeats `answer` does not end it."""
        if not (answer.endswith(text.lstrip()) and may_end(answer)):
            raise LargeNotContinued("the reply ends where the answer so far cannot end")
        # Asked to begin with a sentence, some models write just that sentence.
        if not self._only_repeated:
            raise OnlyRepeated("the reply only repeats the end of the answer so far")


def _with_end(positions: tuple[ReplyPosition, ...], *, ended: bool) -> tuple[ReplyPosition, ...]:
    """Return the positions with the end of the answer; there is at least one."""
    end = ReplyPosition(ReplyToken(text=""))
    if ended:
        return mark_end((*positions, end))
    # A reply that was too short has a token of unknown text: more tokens are asked for.
    return positions or (end,)
