"""The reply of the large model's server to a forwarded request: checked, and as chunks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from mlxroute.large.dialects.json_fields import usage_counts
from mlxroute.serving.http.api_error import ApiError
from mlxroute.serving.http.parsing.fields import clean_json, clean_text
from mlxroute.serving.http.replies.reply_forms import ReplyForm
from mlxroute.serving.http.replies.token_logprobs import UNKNOWN_LOGPROB


def read_choices(reply: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the choices of a reply, at least one, as values that JSON can carry.

    Raises ApiError for a reply without a message.
    """
    choices = reply.get("choices")
    if not isinstance(choices, list) or not choices:
        raise _wrong_reply("no choices")
    if not all(isinstance(item, dict) for item in choices):
        raise _wrong_reply("a choice that is not an object")
    if not all(isinstance(item.get("message"), dict) for item in choices):
        raise _wrong_reply("a choice without a message")
    return [_clean_choice(item) for item in choices]


def read_usage(reply: Mapping[str, Any]) -> dict[str, Any]:
    """Return the usage of a reply as JSON can carry it; counts that it does not report are 0."""
    usage = clean_json(reply.get("usage"))
    figures: dict[str, Any] = usage if isinstance(usage, dict) else {}
    counts = usage_counts(reply)
    prompt, completion = counts["prompt_tokens"] or 0, counts["completion_tokens"] or 0
    required = {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
    }
    return figures | {
        name: count for name, count in required.items() if type(figures.get(name)) is not int
    }


def reply_chunks(
    form: ReplyForm, reply: Mapping[str, Any], *, include_usage: bool
) -> Iterator[dict[str, Any]]:
    """Yield the first choice of a whole reply as the chunks of a stream, after that of the role.

    Raises ApiError at the end of a choice without a finish reason.
    """
    choice = reply["choices"][0]
    delta = {key: item for key, item in choice["message"].items() if key != "role"}
    calls = delta.get("tool_calls")
    if isinstance(calls, list):
        sent = [call for call in calls if isinstance(call, dict)]
        # Servers put -1 or null into a whole reply, and clients join the calls of one index.
        delta["tool_calls"] = [{**call, "index": index} for index, call in enumerate(sent)]
    yield form.delta_chunk(delta, choice.get("logprobs"))
    reason = choice.get("finish_reason")
    if not isinstance(reason, str) or not reason:
        raise _wrong_reply("no finish reason, so it may be incomplete")
    yield form.last_chunk(reason, reply["mlxroute"])
    if include_usage:
        yield form.usage_chunk(reply["usage"])


def _clean_choice(choice: Mapping[str, Any]) -> dict[str, Any]:
    # Servers in Python write -Infinity for the logprob of an impossible token.
    return {
        clean_text(key): clean_json(item, not_finite=UNKNOWN_LOGPROB if key == "logprobs" else None)
        for key, item in choice.items()
    }


def _wrong_reply(content: str) -> ApiError:
    return ApiError(502, f"the large model's reply has {content}", code="large_model_failed")
