"""SGLang's native `/generate`: token ids in and out."""

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


class SglangGenerate:
    """Triples of logprob, id and (absent unless asked for) text, the generated one apart."""

    name: Final = "SGLang generate"
    rung: Final = 1
    form: Final = PromptForm.IDS
    path: Final = "/generate"
    at_root: Final = True
    names_model: Final = False
    crashes_on_cached_prompts: Final = False

    def request(self, prompt: Prompt, ask: RequestOptions) -> dict[str, object]:
        """Ask for greedy tokens; logprobs are those before temperature only at temperature 0."""
        return {
            "input_ids": list(prompt.ids),
            "sampling_params": {
                "max_new_tokens": ask.max_tokens,
                "temperature": 0,
                "repetition_penalty": 1.0,
                "presence_penalty": 0,
                "frequency_penalty": 0,
            },
            "return_logprob": True,
            "top_logprobs_num": ask.top_logprobs,
            "return_text_in_logprobs": True,
        }

    def completion(self, reply: Mapping[str, object], prompt: Prompt) -> Completion:
        """Understand a reply; its text leaves a matched end token out."""
        meta = mapping(reply.get("meta_info"), what="meta_info")
        tokens = sequence(meta.get("output_token_logprobs"), what="output_token_logprobs")
        tops = sequence(meta.get("output_top_logprobs") or [], what="output_top_logprobs")
        if not tokens:
            raise LargeProtocolError("the reply holds no token")
        entries = [
            _entry(token, tops[index] if index < len(tops) else None)
            for index, token in enumerate(tokens)
        ]
        finish = meta.get("finish_reason")
        if isinstance(finish, dict) and finish.get("type") == "stop":
            entries = list(ended(entries))
        return Completion(
            tuple(entries),
            string(reply.get("text"), what="text"),
            **counted(
                meta.get("prompt_tokens"), meta.get("cached_tokens"), meta.get("completion_tokens")
            ),
        )


def _entry(token: object, top: object) -> ReplyPosition:
    chosen = _token(token)
    given_logprob(chosen.logprob)
    others = sequence(top or [], what="output_top_logprobs")
    return ReplyPosition(chosen, by_logprob([_token(other) for other in others]))


def _token(value: object) -> ReplyToken:
    triple = sequence(value, what="a token")
    if len(triple) < 2:
        raise LargeProtocolError("a token is no triple of logprob, id and text")
    text = triple[2] if len(triple) > 2 else None
    return ReplyToken(
        token_id=token_id(triple[1]),
        # A part of a character comes as the replacement character, which says nothing.
        text=None if text is None else string(text, what="a token's text"),
        logprob=logprob(triple[0]),
    )
