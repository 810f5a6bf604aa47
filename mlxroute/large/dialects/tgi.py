"""Text Generation Inference's native `/generate`: text in, token ids out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from mlxroute.errors import LargeProtocolError
from mlxroute.large.dialects.base import RequestOptions
from mlxroute.large.dialects.json_fields import (
    by_logprob,
    counted,
    ended,
    given_logprob,
    logprob,
    mapping,
    sequence,
    string,
    token_id,
)
from mlxroute.large.prompt import Prompt, PromptForm
from mlxroute.large.reply import Completion, ReplyPosition, ReplyToken

# The server's own default for `--max-top-n-tokens`.
_MAX_TOP: Final = 5


class TgiGenerate:
    """Greedy is `do_sample: false`; a temperature of 0 is refused."""

    name: Final = "TGI generate"
    rung: Final = 2
    form: Final = PromptForm.TEXT
    path: Final = "/generate"
    at_root: Final = True
    names_model: Final = False
    crashes_on_cached_prompts: Final = False

    def request(self, prompt: Prompt, ask: RequestOptions) -> dict[str, object]:
        """Ask for greedy tokens."""
        return {
            "inputs": prompt.text,
            "parameters": {
                "max_new_tokens": ask.max_tokens,
                "do_sample": False,
                "details": True,
                "top_n_tokens": min(ask.top_logprobs, _MAX_TOP),
            },
        }

    def completion(self, reply: Mapping[str, object], prompt: Prompt) -> Completion:
        """Understand a reply."""
        details = mapping(reply.get("details"), what="details")
        tokens = sequence(details.get("tokens"), what="details.tokens")
        tops = sequence(details.get("top_tokens") or [], what="details.top_tokens")
        if not tokens:
            raise LargeProtocolError("the reply holds no token")
        entries = []
        for index, item in enumerate(tokens):
            token = _token(item)
            given_logprob(token.logprob)
            others = sequence(tops[index] if index < len(tops) else [], what="top_tokens")
            entries.append(ReplyPosition(token, by_logprob([_token(other) for other in others])))
        if details.get("finish_reason") == "eos_token":
            entries = list(ended(entries))
        return Completion(
            tuple(entries),
            string(reply.get("generated_text"), what="generated_text"),
            **counted(None, None, details.get("generated_tokens")),
        )


def _token(value: object) -> ReplyToken:
    item = mapping(value, what="a token")
    return ReplyToken(
        token_id=token_id(item.get("id")),
        text=string(item.get("text"), what="a token's text"),
        logprob=logprob(item.get("logprob")),
    )
