"""The body of a text completion."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

from mlxroute.serving.http.api_error import wrong
from mlxroute.serving.http.model_names import ModelNames
from mlxroute.serving.http.parsing.common_fields import (
    MAX_TOP_LOGPROBS,
    SCHEMA_FIELDS,
    TOOL_CHOICE_FIELDS,
    TOOL_FIELDS,
    AnswerFields,
    read_common,
    refuse_decoding,
    with_ignored,
)
from mlxroute.serving.http.parsing.fields import Fields, clean_text
from mlxroute.serving.http.serving_session import ServingSession

TextPrompt = str | tuple[int, ...]
"""A text or token ids, continued as they are."""

_MAX_PROMPTS: Final = 128
_MAX_ID: Final = 2**31


@dataclass(frozen=True, slots=True)
class PromptFields:
    """A text completion.

    Args:
        answer: The common fields.
        prompts: The prompts; each gets a choice of the reply.
        echo: Whether the text begins with the prompt.
        top_logprobs: Number of alternatives of each token; None without logprobs.
        writes_nothing: Whether only the prompt is scored: `max_tokens` is 0.
    """

    answer: AnswerFields
    prompts: tuple[TextPrompt, ...]
    echo: bool
    top_logprobs: int | None
    writes_nothing: bool


def read_completion(
    values: dict[str, Any], session: ServingSession, names: ModelNames
) -> PromptFields:
    """Return the fields of a text completion. Raises ApiError."""
    fields = Fields(values)
    answer = read_common(fields, session, names)
    fields.refuse("suffix", neutral=("",), reason="text is not filled into the middle")
    _refuse_tools(fields)
    refuse_decoding(fields, answer.options.sampling)
    prompts = tuple(_read_prompts(fields.take("prompt")))
    if answer.stream and len(prompts) > 1:
        raise wrong("prompt", "a stream has one prompt; send one request for each prompt")
    is_scored = fields.flag("echo")
    top = _read_logprobs(fields)
    writes_nothing = fields.take("max_tokens") == 0
    if writes_nothing and not is_scored:
        raise wrong("max_tokens", "max_tokens must be at least 1 without echo")
    return PromptFields(
        answer=with_ignored(answer, fields),
        prompts=prompts,
        echo=is_scored,
        top_logprobs=top,
        writes_nothing=writes_nothing,
    )


def _refuse_tools(fields: Fields) -> None:
    """Raise for tools and for a schema, which only chat completions can have."""
    neutral: dict[str, tuple[Any, ...]] = {
        **dict.fromkeys(TOOL_FIELDS, ([],)),
        **dict.fromkeys(TOOL_CHOICE_FIELDS, ("none", "auto")),
        **dict.fromkeys(SCHEMA_FIELDS, ("",)),
        "response_format": ({}, {"type": "text"}),
    }
    for name, values in neutral.items():
        fields.refuse(name, neutral=values, reason="use /v1/chat/completions")


def _read_logprobs(fields: Fields) -> int | None:
    # `logprobs: false` of chat completions is sent here, too.
    if fields.take("logprobs") is False:
        return None
    return fields.integer("logprobs", low=0, high=MAX_TOP_LOGPROBS)


def _read_prompts(value: Any) -> list[TextPrompt]:
    if isinstance(value, str) or _is_ids(value):
        value = [value]
    if not isinstance(value, list) or not value:
        raise wrong("prompt", "prompt must be a text, a list of token ids, or a list of these")
    if len(value) > _MAX_PROMPTS:
        raise wrong("prompt", f"prompt has more than {_MAX_PROMPTS} prompts; send several requests")
    return [_read_prompt(item) for item in value]


def _read_prompt(value: Any) -> TextPrompt:
    if isinstance(value, str) and value:
        return clean_text(value)
    if _is_ids(value):
        if all(0 <= token_id < _MAX_ID for token_id in value):
            return tuple(value)
        raise wrong("prompt", "prompt has a token id that is out of range")
    raise wrong("prompt", "prompt has an item that is empty, or neither a text nor token ids")


def _is_ids(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(type(item) is int for item in value)
