"""vLLM's `/v1/completions`: token ids in and out, alternatives named by text or by id."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from mlxroute.errors import LargeProtocolError
from mlxroute.large.dialects.base import RequestOptions, StreamingDialect, add_model
from mlxroute.large.dialects.json_fields import (
    as_array,
    as_chosen_logprob,
    as_logprob,
    as_object,
    as_text,
    as_token_id,
    first_choice,
    mark_end,
    sort_by_logprob,
    usage_counts,
)
from mlxroute.large.dialects.sse import merge_choice_events
from mlxroute.large.prompt import Prompt, PromptForm
from mlxroute.large.reply import Completion, ReplyPosition, ReplyToken

_ID_NAME = re.compile(r"token_id:(\d{1,9})")


class VllmCompletions(StreamingDialect):
    """The dialect of vLLM.

    With `by_id` alternatives are named by id. Named by text, tokens with the same text are merged.
    """

    name = "vLLM completions"
    rung = 1
    form = PromptForm.IDS
    path = "/completions"

    def __init__(self, *, by_id: bool) -> None:
        self._by_id = by_id

    def request(self, prompt: Prompt, options: RequestOptions) -> dict[str, object]:
        """Ask for greedy tokens, whatever sampling defaults the model's author set."""
        body: dict[str, object] = {
            "prompt": list(prompt.ids),
            "max_tokens": options.max_tokens,
            "temperature": 0,
            "repetition_penalty": 1.0,
            "presence_penalty": 0,
            "frequency_penalty": 0,
            "logprobs": options.top_logprobs,
            "return_token_ids": True,
            "return_tokens_as_token_ids": self._by_id,
        }
        if options.streamed:
            body |= {"stream": True, "stream_options": {"include_usage": True}}
        return add_model(body, options)

    def join_events(self, events: Sequence[Mapping[str, object]]) -> dict[str, object]:
        """Merge the events received so far into one reply."""
        return merge_choice_events(
            events,
            lists=["token_ids"],
            logprobs=["tokens", "token_logprobs", "top_logprobs", "text_offset"],
        )

    def completion(self, reply: Mapping[str, object], prompt: Prompt) -> Completion:
        """Read a reply. Raises LargeProtocolError for one without ids: the server is not vLLM."""
        choice = first_choice(reply)
        if choice.get("token_ids") is None:
            raise LargeProtocolError("the reply names no token ids")
        ids = [as_token_id(value) for value in as_array(choice["token_ids"], what="token_ids")]
        text = as_text(choice.get("text"), what="choices[0].text")
        if not ids:
            raise LargeProtocolError("the reply holds no token")
        logprobs = as_object(choice.get("logprobs"), what="logprobs")
        positions = [_position(index, token_id, logprobs) for index, token_id in enumerate(ids)]
        if choice.get("finish_reason") == "stop":
            positions = list(mark_end(positions))
        return Completion(tuple(positions), text, **usage_counts(reply))


def _position(index: int, token_id: int, logprobs: Mapping[str, object]) -> ReplyPosition:
    name = _item(logprobs.get("tokens"), index, what="logprobs.tokens")
    logprob = _item(logprobs.get("token_logprobs"), index, what="token_logprobs")
    top = _item(logprobs.get("top_logprobs"), index, what="top_logprobs")
    named = _token(as_text(name, what="a token's text"), None)
    if named.token_id not in (None, token_id):
        raise LargeProtocolError("the reply's ids and its logprobs differ")
    alternatives = [
        _token(other, as_logprob(value))
        for other, value in as_object(top or {}, what="top_logprobs").items()
    ]
    return ReplyPosition(
        ReplyToken(token_id=token_id, text=named.text, logprob=as_chosen_logprob(logprob)),
        sort_by_logprob(alternatives),
    )


def _token(name: str, logprob: float | None) -> ReplyToken:
    """Return the token of a name, which is its text or `token_id:` and its id."""
    if (match := _ID_NAME.fullmatch(name)) is not None:
        return ReplyToken(token_id=as_token_id(int(match[1])), logprob=logprob)
    return ReplyToken(text=as_text(name, what="a token's text"), logprob=logprob)


def _item(values: object, index: int, *, what: str) -> object:
    items = as_array(values, what=what)
    if index >= len(items):
        raise LargeProtocolError(f"{what} is shorter than the reply")
    return items[index]
