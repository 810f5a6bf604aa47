"""The plain OpenAI `/v1/completions`: one token, as text and, from some servers, as bytes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Final

from mlxroute.errors import LargeProtocolError
from mlxroute.large.pieces import is_special
from mlxroute.large.wire import (
    Completion,
    Entry,
    WireToken,
    by_logprob,
    counts,
    first_choice,
    logprob,
    mapping,
    sequence,
    string,
    token_id,
)


class PlainCompletions:
    """Text prompt in; the legacy shape (vLLM, OpenAI) or chat-style content (llama-server) out."""

    name: Final = "OpenAI completions"
    gives_ids: Final = False
    dies_of_cached_prompts: Final = False

    def request(
        self, prompt: str, *, max_tokens: int, top_logprobs: int, model: str | None
    ) -> dict[str, object]:
        """Ask for greedy tokens."""
        body: dict[str, object] = {
            "prompt": prompt,
            "max_tokens": max_tokens,
            "temperature": 0,
            "logprobs": top_logprobs,
        }
        return body if model is None else body | {"model": model}

    def completion(self, reply: Mapping[str, object]) -> Completion:
        """Understand a reply to a request for one token."""
        choice = first_choice(reply)
        text = string(choice.get("text"), what="choices[0].text")
        entry = _first_entry(choice.get("logprobs"), text=text)
        # Empty text can also be a fragment or a special token: only `stop` makes it the end.
        if choice.get("finish_reason") == "stop" and (not text or is_special(text)):
            entry = Entry(entry.token, entry.top, ends=True)
        return Completion((entry,), *counts(reply))


def _first_entry(value: object, *, text: str) -> Entry:
    if value is None:
        return Entry(WireToken(text=text))
    logprobs = mapping(value, what="logprobs")
    if logprobs.get("content") is not None:
        return _content_entry(logprobs, text=text)
    if logprobs.get("tokens") is not None:
        return _legacy_entry(logprobs, text=text)
    return Entry(WireToken(text=text))


def _content_entry(logprobs: Mapping[str, object], *, text: str) -> Entry:
    content = sequence(logprobs["content"], what="logprobs.content")
    if not content:
        return Entry(WireToken(text=text))
    item = mapping(content[0], what="a token")
    token = _content_token(item)
    if token.data is not None and token.data.decode("utf-8", errors="replace") != text and text:
        raise LargeProtocolError("the reply's text and its first token differ")
    top = item.get("top_logprobs") or []
    return Entry(
        token,
        by_logprob(
            [
                _content_token(mapping(other, what="an alternative"))
                for other in sequence(top, what="top_logprobs")
            ]
        ),
    )


def _content_token(item: Mapping[str, object]) -> WireToken:
    identity = item.get("id", item.get("token_id"))
    data = item.get("bytes")
    return WireToken(
        token_id=None if identity is None else token_id(identity),
        data=None if data is None else _bytes(data),
        text=string(item.get("token"), what="a token's text"),
        logprob=_given(logprob(item.get("logprob"))),
    )


def _bytes(value: object) -> bytes:
    octets = sequence(value, what="bytes")
    data = bytearray()
    for octet in octets:
        if type(octet) is not int or not 0 <= octet <= 255:
            raise LargeProtocolError("a token's bytes are not numbers from 0 to 255")
        data.append(octet)
    return bytes(data)


def _legacy_entry(logprobs: Mapping[str, object], *, text: str) -> Entry:
    tokens = sequence(logprobs["tokens"], what="logprobs.tokens")
    if not tokens:
        return Entry(WireToken(text=text))
    values = sequence(logprobs.get("token_logprobs") or [None], what="token_logprobs")
    ids = sequence(logprobs.get("token_ids") or [None], what="token_ids")
    value, identity = (values[0] if values else None), (ids[0] if ids else None)
    return Entry(
        WireToken(
            token_id=None if identity is None else token_id(identity),
            text=_agreed(string(tokens[0], what="a token's text"), text),
            logprob=None if value is None else _given(logprob(value)),
        ),
        by_logprob(_legacy_top(logprobs.get("top_logprobs"))),
    )


def _legacy_top(value: object) -> list[WireToken]:
    if isinstance(value, list):
        value = value[0] if value else None
    if value is None:
        return []
    return [
        WireToken(text=string(text, what="an alternative's text"), logprob=logprob(number))
        for text, number in mapping(value, what="top_logprobs").items()
    ]


def _agreed(token: str, text: str) -> str:
    """The token's text by the two accounts of it, of which one may lack the leading space.

    Two texts that differ otherwise are a fragment of a character in disguise, or a lie.
    """
    if not text or token == text:
        return token
    if token.strip() and token.strip() == text.strip():
        return max(token, text, key=len)
    raise LargeProtocolError("the reply's text and its first token differ")


def _given(value: float) -> float:
    if value == -math.inf:
        raise LargeProtocolError("a token comes without its probability")
    return value
