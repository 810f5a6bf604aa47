"""`mlx_lm.server`: text prompts in; token ids, raw vocabulary pieces and logprobs out."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Final

from mlxroute.errors import LargeProtocolError
from mlxroute.large.dialects.base import Dialect, RequestOptions, add_model
from mlxroute.large.dialects.json_fields import (
    as_array,
    as_logprob,
    as_object,
    as_text,
    as_token_id,
    first_choice,
    mark_end,
    sort_by_logprob,
    usage_counts,
)
from mlxroute.large.prompt import Prompt, PromptForm
from mlxroute.large.reply import Completion, ReplyPosition, ReplyToken

_MAX_TOP_LOGPROBS: Final = 11


class MlxLm(Dialect):
    """The dialect of `mlx_lm.server`: `/v1/completions`, where `logprobs` is a boolean."""

    name = "mlx_lm completions"
    rung = 2
    form = PromptForm.TEXT
    path = "/completions"
    names_model = False
    crashes_on_cached_prompts = True

    def request(self, prompt: Prompt, options: RequestOptions) -> dict[str, object]:
        """Ask for greedy tokens. Without a model's name the server uses the one it started with."""
        body: dict[str, object] = {
            "prompt": prompt.text,
            "max_tokens": options.max_tokens,
            "temperature": 0,
            "logprobs": True,
            "top_logprobs": min(options.top_logprobs, _MAX_TOP_LOGPROBS),
        }
        return add_model(body, options)

    def completion(self, reply: Mapping[str, object], prompt: Prompt) -> Completion:
        """Read a reply. Its `text` is ignored: the server cuts reasoning and tool calls from it."""
        choice = first_choice(reply)
        content = as_array(
            as_object(choice.get("logprobs"), what="logprobs").get("content"),
            what="logprobs.content",
        )
        positions = [_position(item) for item in content]
        if not positions:
            raise LargeProtocolError("the reply holds no token")
        if choice.get("finish_reason") == "stop":
            positions = list(mark_end(positions))
        return Completion(tuple(positions), **usage_counts(reply))


def _position(value: object) -> ReplyPosition:
    # The item itself is an arbitrary one of the alternatives, which are unsorted; the generated
    # token is the most likely of them.
    top = as_array(as_object(value, what="a token").get("top_logprobs"), what="top_logprobs")
    tokens = sort_by_logprob([_token(as_object(item, what="an alternative")) for item in top])
    if not tokens or tokens[0].logprob == -math.inf:
        raise LargeProtocolError("a generated token has no probability")
    # Ids that only pad the vocabulary have no piece.
    return ReplyPosition(tokens[0], tuple(token for token in tokens if token.piece is not None))


def _token(item: Mapping[str, object]) -> ReplyToken:
    piece = item.get("token")
    return ReplyToken(
        token_id=as_token_id(item.get("id")),
        piece=None if piece is None else as_text(piece, what="a token's text"),
        logprob=as_logprob(item.get("logprob")),
    )
