"""The plain OpenAI `/v1/completions`: text in; text and, from some servers, bytes or ids out."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Final

from mlxroute.errors import LargeProtocolError
from mlxroute.large.dialects.base import Dialect, RequestOptions, add_model
from mlxroute.large.dialects.json_fields import (
    as_array,
    as_chosen_logprob,
    as_logprob,
    as_object,
    as_text,
    as_token_id,
    ends_answer,
    first_choice,
    mark_end,
    parse_chat_position,
    sort_by_logprob,
    usage_counts,
)
from mlxroute.large.prompt import Prompt, PromptForm
from mlxroute.large.reply import Completion, ReplyPosition, ReplyToken
from mlxroute.tokenizers.control_tokens import is_control_token
from mlxroute.tokenizers.utf8 import decode_or_none

# OpenAI's name of a token that begins or ends inside a character.
_BYTES_NAME: Final = re.compile(r"bytes:( ?)((?:\\x[0-9a-f]{2})+)")


class PlainCompletions(Dialect):
    """The dialect of any server with OpenAI's `/v1/completions`.

    It reads logprobs in the legacy shape (vLLM, OpenAI, Together) and in that of chats. Without
    `logprobs` requests ask for none, for servers that ignore or refuse them.
    """

    form = PromptForm.TEXT
    path = "/completions"

    def __init__(self, *, logprobs: bool) -> None:
        self._logprobs = logprobs
        self.name = "OpenAI completions" if logprobs else "OpenAI completions, text only"
        self.rung = 2 if logprobs else 4
        self.names_tokens = logprobs

    def request(self, prompt: Prompt, options: RequestOptions) -> dict[str, object]:
        """Ask for greedy tokens."""
        body: dict[str, object] = {
            "prompt": prompt.text,
            "max_tokens": options.max_tokens,
            "temperature": 0,
        }
        if self._logprobs:
            body["logprobs"] = options.top_logprobs
        return add_model(body, options)

    def completion(self, reply: Mapping[str, object], prompt: Prompt) -> Completion:
        """Read a reply; a text without logprobs becomes one position, whatever its length."""
        choice = first_choice(reply)
        text = as_text(choice.get("text"), what="choices[0].text")
        positions = _positions(choice.get("logprobs"), text=text)
        # Empty text can also be a part of a character or a control token.
        if ends_answer(choice, text=text):
            last = positions[-1].token
            if text and not is_control_token(last.text or "") and (last.text or last.data):
                positions = (*positions, ReplyPosition(ReplyToken(text="")))
            positions = mark_end(positions)
        return Completion(positions, text, **usage_counts(reply))


def _positions(value: object, *, text: str) -> tuple[ReplyPosition, ...]:
    logprobs = {} if value is None else as_object(value, what="logprobs")
    positions: list[ReplyPosition] = []
    if logprobs.get("content") is not None:
        content = as_array(logprobs["content"], what="logprobs.content")
        positions = [parse_chat_position(item) for item in content]
    elif logprobs.get("tokens") is not None:
        positions = _legacy_positions(logprobs)
    if not positions:
        return (ReplyPosition(ReplyToken(text=text)),)
    if len(positions) == 1 and text:
        return (_reconcile(positions[0], text),)
    return tuple(positions)


def _legacy_positions(logprobs: Mapping[str, object]) -> list[ReplyPosition]:
    tokens = as_array(logprobs["tokens"], what="logprobs.tokens")
    values = as_array(logprobs.get("token_logprobs") or [], what="token_logprobs")
    ids = as_array(logprobs.get("token_ids") or [], what="token_ids")
    tops = logprobs.get("top_logprobs") or []
    # Together sends the alternatives of a single position without a list around them.
    tops = [tops] if isinstance(tops, dict) else as_array(tops, what="top_logprobs")
    return [
        ReplyPosition(
            replace(
                named_token(name),
                token_id=as_token_id(ids[index]) if index < len(ids) else None,
                logprob=as_chosen_logprob(values[index]) if index < len(values) else None,
            ),
            sort_by_logprob(_legacy_top(tops[index] if index < len(tops) else None)),
        )
        for index, name in enumerate(tokens)
    ]


def _legacy_top(value: object) -> list[ReplyToken]:
    return [
        replace(named_token(name), logprob=as_logprob(number))
        for name, number in as_object(value or {}, what="top_logprobs").items()
    ]


def named_token(value: object) -> ReplyToken:
    """Return the token of a name in legacy logprobs: its text, or `bytes:` and its bytes."""
    name = as_text(value, what="a token's text")
    if (match := _BYTES_NAME.fullmatch(name)) is None:
        return ReplyToken(text=name)
    return ReplyToken(data=match[1].encode() + bytes.fromhex(match[2].replace("\\x", "")))


def _reconcile(position: ReplyPosition, text: str) -> ReplyPosition:
    """Check the only position of a reply against its text; either may lack the leading space.

    Raises LargeProtocolError where they differ otherwise: the text is then part of a character
    in another spelling, or wrong.
    """
    token = position.token
    if token.data is not None:
        # A server shows a part of a character in one of several ways.
        if decode_or_none(token.data) not in (None, text):
            raise LargeProtocolError("the reply's text and its first token differ")
        return position
    name = token.text or ""
    if name != text:
        if not name.strip() or name.strip() != text.strip():
            raise LargeProtocolError("the reply's text and its first token differ")
        name = max(name, text, key=len)
    whole = ReplyToken(token_id=token.token_id, text=name, logprob=token.logprob)
    return ReplyPosition(whole, position.top)
