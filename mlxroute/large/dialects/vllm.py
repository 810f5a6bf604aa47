"""vLLM's `/v1/completions`: token ids in and out, logprobs named by id."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
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
    sequence,
    string,
    token_id,
)
from mlxroute.large.dialects.sse import merge_choice_events
from mlxroute.large.prompt import Prompt, PromptForm
from mlxroute.large.reply import Completion, ReplyPosition, ReplyToken

_NAMED_ID = re.compile(r"token_id:(\d{1,9})")


class VllmCompletions:
    """`by_id` asks for alternatives as ids, not text: text merges tokens that read the same."""

    name: Final = "vLLM completions"
    rung: Final = 1
    form: Final = PromptForm.IDS
    path: Final = "/completions"
    at_root: Final = False
    names_model: Final = True
    crashes_on_cached_prompts: Final = False

    def __init__(self, *, by_id: bool) -> None:
        self._by_id = by_id

    def request(self, prompt: Prompt, ask: RequestOptions) -> dict[str, object]:
        """Ask for greedy tokens, whatever sampling defaults the model's author set."""
        body: dict[str, object] = {
            "prompt": list(prompt.ids),
            "max_tokens": ask.max_tokens,
            "temperature": 0,
            "repetition_penalty": 1.0,
            "presence_penalty": 0,
            "frequency_penalty": 0,
            "logprobs": ask.top_logprobs,
            "return_token_ids": True,
            "return_tokens_as_token_ids": self._by_id,
        }
        if ask.streamed:
            body |= {"stream": True, "stream_options": {"include_usage": True}}
        return body if ask.model is None else body | {"model": ask.model}

    def join_events(self, events: Sequence[Mapping[str, object]]) -> dict[str, object]:
        """The reply that these events are the beginning of, or the whole."""
        return merge_choice_events(
            events, ["token_ids"], ["tokens", "token_logprobs", "top_logprobs", "text_offset"]
        )

    def completion(self, reply: Mapping[str, object], prompt: Prompt) -> Completion:
        """Understand a reply. Without ids in it the server is no vLLM."""
        choice = first_choice(reply)
        if choice.get("token_ids") is None:
            raise LargeProtocolError("the reply names no token ids")
        ids = [token_id(value) for value in sequence(choice["token_ids"], what="token_ids")]
        text = string(choice.get("text"), what="choices[0].text")
        if not ids:
            raise LargeProtocolError("the reply holds no token")
        logprobs = mapping(choice.get("logprobs"), what="logprobs")
        entries = [_entry(i, identity, logprobs) for i, identity in enumerate(ids)]
        if choice.get("finish_reason") == "stop":
            entries = list(ended(entries))
        return Completion(tuple(entries), text, **counts(reply))


def _entry(index: int, identity: int, logprobs: Mapping[str, object]) -> ReplyPosition:
    name = _at(logprobs.get("tokens"), index, what="logprobs.tokens")
    value = _at(logprobs.get("token_logprobs"), index, what="token_logprobs")
    top = _at(logprobs.get("top_logprobs"), index, what="top_logprobs")
    named = _named(string(name, what="a token's text"), None)
    if named.token_id not in (None, identity):
        raise LargeProtocolError("the reply's ids and its logprobs differ")
    return ReplyPosition(
        ReplyToken(token_id=identity, text=named.text, logprob=given_logprob(value)),
        by_logprob(
            [
                _named(text, logprob(number))
                for text, number in mapping(top or {}, what="top_logprobs").items()
            ]
        ),
    )


def _named(name: str, value: float | None) -> ReplyToken:
    if (match := _NAMED_ID.fullmatch(name)) is not None:
        return ReplyToken(token_id=token_id(int(match[1])), logprob=value)
    return ReplyToken(text=string(name, what="a token's text"), logprob=value)


def _at(values: object, index: int, *, what: str) -> object:
    items: Sequence[object] = sequence(values, what=what)
    if index >= len(items):
        raise LargeProtocolError(f"{what} is shorter than the reply")
    return items[index]
