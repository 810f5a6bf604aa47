"""The plain OpenAI `/v1/completions`: text in; text and, from some servers, bytes or ids out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from mlxroute.errors import LargeProtocolError
from mlxroute.large.dialects.base import RequestOptions
from mlxroute.large.dialects.json_fields import (
    by_logprob,
    counts,
    ended,
    first_choice,
    given_logprob,
    logprob,
    mapping,
    named_entry,
    sequence,
    string,
    token_id,
)
from mlxroute.large.prompt import Prompt, PromptForm
from mlxroute.large.reply import Completion, ReplyPosition, ReplyToken
from mlxroute.tokenizers.control_tokens import is_control_token


class PlainCompletions:
    """Understands the legacy logprobs (vLLM, OpenAI, Together) and chat-style ones.

    Without `logprobs` it asks for none: for servers that ignore or refuse them.
    """

    form: Final = PromptForm.TEXT
    path: Final = "/completions"
    at_root: Final = False
    names_model: Final = True
    crashes_on_cached_prompts: Final = False

    def __init__(self, *, logprobs: bool) -> None:
        self._logprobs = logprobs
        self.name = "OpenAI completions" if logprobs else "OpenAI completions, text only"
        self.rung = 2 if logprobs else 4

    def request(self, prompt: Prompt, ask: RequestOptions) -> dict[str, object]:
        """Ask for greedy tokens."""
        body: dict[str, object] = {
            "prompt": prompt.text,
            "max_tokens": ask.max_tokens,
            "temperature": 0,
        }
        if self._logprobs:
            body["logprobs"] = ask.top_logprobs
        return body if ask.model is None else body | {"model": ask.model}

    def completion(self, reply: Mapping[str, object], prompt: Prompt) -> Completion:
        """Understand a reply; text alone stands for one position of unknown length."""
        choice = first_choice(reply)
        text = string(choice.get("text"), what="choices[0].text")
        entries = _entries(choice.get("logprobs"), text=text)
        # Empty text can also be a fragment or a special token: only `stop` makes it the end.
        if choice.get("finish_reason") == "stop":
            last = entries[-1].token
            if text and not is_control_token(last.text or "") and (last.text or last.data):
                entries = (*entries, ReplyPosition(ReplyToken(text="")))
            entries = ended(entries)
        return Completion(entries, text, **counts(reply))


def _entries(value: object, *, text: str) -> tuple[ReplyPosition, ...]:
    logprobs = {} if value is None else mapping(value, what="logprobs")
    entries: list[ReplyPosition] = []
    if logprobs.get("content") is not None:
        content = sequence(logprobs["content"], what="logprobs.content")
        entries = [named_entry(item) for item in content]
    elif logprobs.get("tokens") is not None:
        entries = _legacy_entries(logprobs)
    return _agreeing(entries, text) if entries else (ReplyPosition(ReplyToken(text=text)),)


def _legacy_entries(logprobs: Mapping[str, object]) -> list[ReplyPosition]:
    tokens = sequence(logprobs["tokens"], what="logprobs.tokens")
    values = sequence(logprobs.get("token_logprobs") or [], what="token_logprobs")
    ids = sequence(logprobs.get("token_ids") or [], what="token_ids")
    tops = logprobs.get("top_logprobs") or []
    # Together gives the alternatives of the only position without a list around them.
    tops = [tops] if isinstance(tops, dict) else sequence(tops, what="top_logprobs")
    return [
        ReplyPosition(
            ReplyToken(
                token_id=token_id(ids[index]) if index < len(ids) else None,
                text=string(name, what="a token's text"),
                logprob=given_logprob(values[index]) if index < len(values) else None,
            ),
            by_logprob(_legacy_top(tops[index] if index < len(tops) else None)),
        )
        for index, name in enumerate(tokens)
    ]


def _legacy_top(value: object) -> list[ReplyToken]:
    return [
        ReplyToken(text=string(text, what="an alternative's text"), logprob=logprob(number))
        for text, number in mapping(value or {}, what="top_logprobs").items()
    ]


def _agreeing(entries: list[ReplyPosition], text: str) -> tuple[ReplyPosition, ...]:
    """The positions, checked against the reply's text, of which one may lack the first space.

    Two texts that differ otherwise are a fragment of a character in disguise, or a lie.
    """
    if len(entries) != 1 or not text:
        return tuple(entries)
    token, top = entries[0].token, entries[0].top
    if token.data is not None:
        if token.data.decode("utf-8", errors="replace") != text:
            raise LargeProtocolError("the reply's text and its first token differ")
        return tuple(entries)
    name = token.text or ""
    if name != text:
        if not name.strip() or name.strip() != text.strip():
            raise LargeProtocolError("the reply's text and its first token differ")
        name = max(name, text, key=len)
    return (ReplyPosition(ReplyToken(token.token_id, None, None, name, token.logprob), top),)
