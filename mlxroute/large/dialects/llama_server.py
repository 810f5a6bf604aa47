"""llama.cpp's `llama-server`, native `/completion`: token ids in, ids and raw bytes out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Final

from mlxroute.errors import LargeProtocolError, LargeTruncated
from mlxroute.large.dialects.base import RequestOptions, StreamingDialect, add_model
from mlxroute.large.dialects.json_fields import (
    as_array,
    as_text,
    as_token_id,
    checked_counts,
    mark_end,
    parse_chat_position,
)
from mlxroute.large.dialects.sse import merge_events
from mlxroute.large.prompt import Prompt, PromptForm
from mlxroute.large.reply import Completion, ReplyPosition, ReplyToken

_FIELDS: Final = [
    *("content", "tokens", "stop_type", "completion_probabilities"),
    *("tokens_evaluated", "tokens_predicted", "timings", "truncated"),
]
# The fields of an event that are about its own token.
_TOKEN_FIELDS: Final = frozenset({"content", "tokens", "completion_probabilities"})
# Far more tokens than a request asks for.
_MAX_UNNAMED: Final = 1024


class LlamaServer(StreamingDialect):
    """The dialect of `llama-server`.

    A token that is part of a character has an id only, without text or logprob. With speculative
    decoding, only the first token of a reply has a logprob.
    """

    name = "llama-server completion"
    rung = 1
    form = PromptForm.IDS
    path = "/completion"
    at_root = True

    def request(self, prompt: Prompt, options: RequestOptions) -> dict[str, object]:
        """Ask for greedy tokens, whatever samplers the server was started with."""
        body: dict[str, object] = {
            "prompt": list(prompt.ids),
            "n_predict": options.max_tokens,
            "n_probs": options.top_logprobs,
            "temperature": 0,
            "samplers": ["temperature"],
            "cache_prompt": True,
            "return_tokens": True,
            "response_fields": _FIELDS,
        }
        # A server with several models (router mode) needs the name; one with a single ignores it.
        return add_model(body | {"stream": True} if options.streamed else body, options)

    def join_events(self, events: Sequence[Mapping[str, object]]) -> dict[str, object]:
        """Merge the events received so far into one reply.

        A token that ends inside a character has no event, and the event after it has the whole
        character. From such a place on, `tokens` has null for each token.
        """
        received = named = whole = predicted = 0
        for number, event in enumerate(events, start=1):
            received += len(_event_tokens(event))
            counted = event.get("tokens_predicted")
            predicted = max(predicted, counted if type(counted) is int else received)
            # A draft model's tokens are counted together, before the first of their events.
            if received >= predicted:
                named = received
                whole = number
        later = [_without_tokens(event) for event in events[whole:]]
        lists = ["tokens", "completion_probabilities"]
        reply = merge_events([*events[:whole], *later], lists=lists, texts=["content"])
        if unnamed := min(predicted - named, _MAX_UNNAMED):
            reply["tokens"] = [*as_array(reply.get("tokens", []), what="tokens"), *[None] * unnamed]
        return reply

    def completion(self, reply: Mapping[str, object], prompt: Prompt) -> Completion:
        """Read a reply. Raises LargeTruncated if the server truncated the prompt."""
        ids = [
            None if value is None else as_token_id(value)
            for value in as_array(reply.get("tokens"), what="tokens")
        ]
        probabilities = as_array(
            reply.get("completion_probabilities") or [], what="completion_probabilities"
        )
        positions = _align(ids, [parse_chat_position(item) for item in probabilities])
        if not positions:
            raise LargeProtocolError("the reply holds no token")
        positions = [positions[0], *map(_without_placeholder, positions[1:])]
        is_of_whole_prompt = reply.get("tokens_evaluated") == len(prompt.ids)
        # A full context counts as truncated. Its first token is of the whole prompt in any case.
        if reply.get("truncated") is True and not (is_of_whole_prompt and len(positions) == 1):
            raise LargeTruncated("the server truncated the prompt: its context is too short")
        if reply.get("stop_type") == "eos":
            positions = list(mark_end(positions))
        timings = reply.get("timings")
        cached = timings.get("cache_n") if isinstance(timings, dict) else None
        return Completion(
            tuple(positions),
            as_text(reply.get("content"), what="content"),
            **checked_counts(reply.get("tokens_evaluated"), cached, reply.get("tokens_predicted")),
        )


def _event_tokens(event: Mapping[str, object]) -> Sequence[object]:
    """Return the tokens of an event; of a server that ignores `return_tokens`, those with text."""
    tokens = event.get("tokens") or event.get("completion_probabilities") or []
    return as_array(tokens, what="tokens")


def _without_tokens(event: Mapping[str, object]) -> dict[str, object]:
    return {key: value for key, value in event.items() if key not in _TOKEN_FIELDS}


def _without_placeholder(position: ReplyPosition) -> ReplyPosition:
    """Return a position without the logprob of 0 that stands for an unknown one.

    The server reports it, without alternatives, for tokens that were drafted (llama.cpp issue
    27972). A token that is certain has alternatives, as requests ask for them.
    """
    if position.top or position.token.logprob:
        return position
    return replace(position, token=replace(position.token, logprob=None))


def _align(ids: Sequence[int | None], with_text: Sequence[ReplyPosition]) -> list[ReplyPosition]:
    """Return one position for each id; `with_text` are some of them, in the same order."""
    positions = []
    rest = list(with_text)
    for token_id in ids:
        if rest and rest[0].token.token_id == token_id:
            positions.append(rest.pop(0))
        else:
            positions.append(ReplyPosition(ReplyToken(token_id=token_id)))
    if rest and ids:
        raise LargeProtocolError("the reply's ids and its logprobs differ")
    # A server that ignores `return_tokens` sends no ids, only the probabilities.
    return positions or list(rest)
