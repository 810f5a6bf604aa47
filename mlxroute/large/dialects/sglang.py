"""SGLang's native `/generate`: token ids in and out."""

from __future__ import annotations

from collections.abc import Mapping

from mlxroute.errors import LargeProtocolError, LargeTruncated
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


class SglangGenerate(Dialect):
    """The dialect of SGLang, where a token is a triple of logprob, id and text."""

    name = "SGLang generate"
    rung = 1
    form = PromptForm.IDS
    path = "/generate"
    at_root = True
    names_model = False

    def request(self, prompt: Prompt, options: RequestOptions) -> dict[str, object]:
        """Ask for greedy tokens; at temperature 0 the server reports logprobs before scaling."""
        return {
            "input_ids": list(prompt.ids),
            "sampling_params": {
                "max_new_tokens": options.max_tokens,
                "temperature": 0,
                "repetition_penalty": 1.0,
                "presence_penalty": 0,
                "frequency_penalty": 0,
            },
            "return_logprob": True,
            "top_logprobs_num": options.top_logprobs,
            "return_text_in_logprobs": True,
        }

    def completion(self, reply: Mapping[str, object], prompt: Prompt) -> Completion:
        """Read a reply. Its text does not contain the end token.

        Raises LargeTruncated if the server truncated the prompt, as it does if told to.
        """
        meta = as_object(reply.get("meta_info"), what="meta_info")
        counts = checked_counts(
            meta.get("prompt_tokens"), meta.get("cached_tokens"), meta.get("completion_tokens")
        )
        count = counts["prompt_tokens"]
        if count is not None and count < len(prompt.ids):
            raise LargeTruncated("the server truncated the prompt: its context is too short")
        tokens = as_array(meta.get("output_token_logprobs"), what="output_token_logprobs")
        tops = as_array(meta.get("output_top_logprobs") or [], what="output_top_logprobs")
        if not tokens:
            raise LargeProtocolError("the reply holds no token")
        positions = [
            _position(token, tops[index] if index < len(tops) else None)
            for index, token in enumerate(tokens)
        ]
        finish = meta.get("finish_reason")
        if isinstance(finish, dict) and finish.get("type") == "stop":
            positions = list(mark_end(positions))
        return Completion(tuple(positions), as_text(reply.get("text"), what="text"), **counts)


def _position(token: object, top: object) -> ReplyPosition:
    chosen = _token(token)
    as_chosen_logprob(chosen.logprob)
    alternatives = as_array(top or [], what="output_top_logprobs")
    return ReplyPosition(chosen, sort_by_logprob([_token(other) for other in alternatives]))


def _token(value: object) -> ReplyToken:
    triple = as_array(value, what="a token")
    if len(triple) < 2:
        raise LargeProtocolError("a token is not a triple of logprob, id and text")
    text = triple[2] if len(triple) > 2 else None
    return ReplyToken(
        token_id=as_token_id(triple[1]),
        # The text of a part of a character is the replacement character.
        text=None if text is None else as_text(text, what="a token's text"),
        logprob=as_logprob(triple[0]),
    )
