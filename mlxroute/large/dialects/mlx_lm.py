"""`mlx_lm.server`: text prompts in; token ids, raw vocabulary pieces and logprobs out."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Final

from mlxroute.errors import LargeProtocolError
from mlxroute.large.dialects.base import RequestOptions
from mlxroute.large.dialects.json_fields import (
    by_logprob,
    counts,
    ended,
    first_choice,
    logprob,
    mapping,
    sequence,
    string,
    token_id,
)
from mlxroute.large.prompt import Prompt, PromptForm
from mlxroute.large.reply import Completion, ReplyPosition, ReplyToken

_MAX_TOP_LOGPROBS: Final = 11


class MlxLm:
    """The `/v1/completions` of `mlx_lm.server`, which wants `logprobs` as a boolean."""

    name: Final = "mlx_lm completions"
    rung: Final = 2
    form: Final = PromptForm.TEXT
    path: Final = "/completions"
    at_root: Final = False
    names_model: Final = False
    crashes_on_cached_prompts: Final = True

    def request(self, prompt: Prompt, ask: RequestOptions) -> dict[str, object]:
        """Ask for greedy tokens. Without a model name the server uses the one it was given."""
        body: dict[str, object] = {
            "prompt": prompt.text,
            "max_tokens": ask.max_tokens,
            "temperature": 0,
            "logprobs": True,
            "top_logprobs": min(ask.top_logprobs, _MAX_TOP_LOGPROBS),
        }
        return body if ask.model is None else body | {"model": ask.model}

    def completion(self, reply: Mapping[str, object], prompt: Prompt) -> Completion:
        """Understand a reply. Its `text` is not used: reasoning and tool calls are cut from it."""
        choice = first_choice(reply)
        content = sequence(
            mapping(choice.get("logprobs"), what="logprobs").get("content"), what="logprobs.content"
        )
        entries = [_entry(item) for item in content]
        if not entries:
            raise LargeProtocolError("the reply holds no token")
        if choice.get("finish_reason") == "stop":
            entries = list(ended(entries))
        return Completion(tuple(entries), **counts(reply))


def _entry(value: object) -> ReplyPosition:
    # The entry itself is an arbitrary one of the alternatives, which come unsorted;
    # the token that was generated is the most likely of them.
    top = sequence(mapping(value, what="a token").get("top_logprobs"), what="top_logprobs")
    tokens = by_logprob([_token(mapping(item, what="an alternative")) for item in top])
    if not tokens or tokens[0].logprob == -math.inf:
        raise LargeProtocolError("a token comes without its probability")
    # Rows that only pad the vocabulary have no piece.
    return ReplyPosition(tokens[0], tuple(token for token in tokens if token.piece is not None))


def _token(item: Mapping[str, object]) -> ReplyToken:
    piece = item.get("token")
    return ReplyToken(
        token_id=token_id(item.get("id")),
        piece=None if piece is None else string(piece, what="a token's text"),
        logprob=logprob(item.get("logprob")),
    )
