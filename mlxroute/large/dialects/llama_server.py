"""llama.cpp's `llama-server`, native `/completion`: token ids in, ids and raw bytes out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

from mlxroute.errors import LargeProtocolError
from mlxroute.large.dialects.base import RequestOptions
from mlxroute.large.dialects.json_fields import (
    counted,
    ended,
    named_entry,
    sequence,
    string,
    token_id,
)
from mlxroute.large.dialects.sse import merge_events
from mlxroute.large.prompt import Prompt, PromptForm
from mlxroute.large.reply import Completion, ReplyPosition, ReplyToken

_FIELDS: Final = [
    *("content", "tokens", "stop_type", "completion_probabilities"),
    *("tokens_evaluated", "tokens_predicted", "timings", "truncated"),
]


class LlamaServer:
    """Positions whose text is an unfinished character come by id alone, without logprob."""

    name: Final = "llama-server completion"
    rung: Final = 1
    form: Final = PromptForm.IDS
    path: Final = "/completion"
    at_root: Final = True
    names_model: Final = False
    crashes_on_cached_prompts: Final = False

    def request(self, prompt: Prompt, ask: RequestOptions) -> dict[str, object]:
        """Ask for greedy tokens, whatever samplers the server was started with."""
        body: dict[str, object] = {
            "prompt": list(prompt.ids),
            "n_predict": ask.max_tokens,
            "n_probs": ask.top_logprobs,
            "temperature": 0,
            "samplers": ["temperature"],
            "cache_prompt": True,
            "return_tokens": True,
            "response_fields": _FIELDS,
        }
        return body | {"stream": True} if ask.streamed else body

    def join_events(self, events: Sequence[Mapping[str, object]]) -> dict[str, object]:
        """The reply that these events are the beginning of, or the whole."""
        return merge_events(events, ["tokens", "completion_probabilities"], ["content"])

    def completion(self, reply: Mapping[str, object], prompt: Prompt) -> Completion:
        """Understand a reply. A prompt that the server cut is not the one that was asked."""
        if reply.get("truncated") is True:
            raise LargeProtocolError("the server cut the prompt: its context is too short")
        ids = [token_id(value) for value in sequence(reply.get("tokens"), what="tokens")]
        named = sequence(
            reply.get("completion_probabilities") or [], what="completion_probabilities"
        )
        entries = _aligned(ids, [named_entry(item) for item in named])
        if not entries:
            raise LargeProtocolError("the reply holds no token")
        if reply.get("stop_type") == "eos":
            entries = list(ended(entries))
        timings = reply.get("timings")
        cached = timings.get("cache_n") if isinstance(timings, dict) else None
        return Completion(
            tuple(entries),
            string(reply.get("content"), what="content"),
            **counted(reply.get("tokens_evaluated"), cached, reply.get("tokens_predicted")),
        )


def _aligned(ids: Sequence[int], named: Sequence[ReplyPosition]) -> list[ReplyPosition]:
    """One entry for each id; those that come with a name are in the same order."""
    entries, rest = [], list(named)
    for identity in ids:
        if rest and rest[0].token.token_id == identity:
            entries.append(rest.pop(0))
        else:
            entries.append(ReplyPosition(ReplyToken(token_id=identity)))
    if rest and ids:
        raise LargeProtocolError("the reply's ids and its logprobs differ")
    # Without any ids the server ignored `return_tokens`; the names carry them.
    return entries or list(rest)
