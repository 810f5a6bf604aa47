"""Text Generation Inference's native `/generate`: text in, token ids out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from mlxroute.errors import LargeProtocolError
from mlxroute.large.dialects.base import Dialect, RequestOptions
from mlxroute.large.dialects.json_fields import (
    as_array,
    as_chosen_logprob,
    as_logprob,
    as_object,
    as_text,
    as_token_id,
    checked_counts,
    mark_end,
    sort_by_logprob,
)
from mlxroute.large.prompt import Prompt, PromptForm
from mlxroute.large.reply import Completion, ReplyPosition, ReplyToken

# The server's own default for `--max-top-n-tokens`.
_MAX_TOP: Final = 5


class TgiGenerate(Dialect):
    """The dialect of Text Generation Inference, which refuses a temperature of 0."""

    name = "TGI generate"
    rung = 2
    form = PromptForm.TEXT
    path = "/generate"
    at_root = True
    names_model = False

    def request(self, prompt: Prompt, options: RequestOptions) -> dict[str, object]:
        """Ask for greedy tokens, by `do_sample: false`."""
        return {
            "inputs": prompt.text,
            "parameters": {
                "max_new_tokens": options.max_tokens,
                "do_sample": False,
                "details": True,
                "top_n_tokens": min(options.top_logprobs, _MAX_TOP),
            },
        }

    def completion(self, reply: Mapping[str, object], prompt: Prompt) -> Completion:
        """Read a reply."""
        details = as_object(reply.get("details"), what="details")
        tokens = as_array(details.get("tokens"), what="details.tokens")
        tops = as_array(details.get("top_tokens") or [], what="details.top_tokens")
        if not tokens:
            raise LargeProtocolError("the reply holds no token")
        positions = [
            _position(item, tops[index] if index < len(tops) else [])
            for index, item in enumerate(tokens)
        ]
        if details.get("finish_reason") == "eos_token":
            positions = list(mark_end(positions))
        return Completion(
            tuple(positions),
            as_text(reply.get("generated_text"), what="generated_text"),
            **checked_counts(None, None, details.get("generated_tokens")),
        )


def _position(item: object, top: object) -> ReplyPosition:
    token = _token(item)
    as_chosen_logprob(token.logprob)
    alternatives = as_array(top, what="top_tokens")
    return ReplyPosition(token, sort_by_logprob([_token(other) for other in alternatives]))


def _token(value: object) -> ReplyToken:
    item = as_object(value, what="a token")
    return ReplyToken(
        token_id=as_token_id(item.get("id")),
        text=as_text(item.get("text"), what="a token's text"),
        logprob=as_logprob(item.get("logprob")),
    )
