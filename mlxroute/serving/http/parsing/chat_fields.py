"""The body of a chat completion."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

from mlxroute.serving.http.api_error import ApiError, wrong
from mlxroute.serving.http.model_names import ModelNames
from mlxroute.serving.http.parsing.common_fields import (
    MAX_TOP_LOGPROBS,
    SCHEMA_FIELDS,
    TOOL_CHOICE_FIELDS,
    TOOL_FIELDS,
    AnswerFields,
    read_common,
    read_limit,
    refuse_decoding,
    with_ignored,
)
from mlxroute.serving.http.parsing.fields import Fields, clean_text
from mlxroute.serving.http.serving_session import ServingSession
from mlxroute.types import Message

_ROLES: Final = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "assistant": "assistant",
}
_TOOL_ROLES: Final = ("tool", "function")
_TEXT_PARTS: Final = ("text", "input_text")


@dataclass(frozen=True, slots=True)
class ChatFields:
    """A chat completion.

    Args:
        answer: The common fields.
        messages: The conversation, without a begun assistant turn.
        answer_start: The text of the assistant turn that the answer continues; may be empty.
        top_logprobs: Number of alternatives of each token; None without logprobs.
    """

    answer: AnswerFields
    messages: tuple[Message, ...]
    answer_start: str
    top_logprobs: int | None


class ToolsNeeded(Exception):
    """Raised for a request with tools or a schema, which only the large model could obey.

    Args:
        param: The field that asks for them.
    """

    def __init__(self, param: str) -> None:
        super().__init__(param)
        self.param = param


def read_chat(values: dict[str, Any], session: ServingSession, names: ModelNames) -> ChatFields:
    """Return the fields of a chat completion. Raises ApiError, and ToolsNeeded."""
    fields = Fields(values)
    # Only a text completion may write nothing.
    read_limit(fields, "max_tokens", low=1)
    answer = read_common(fields, session, names)
    _check_tools(fields)
    top = fields.integer("top_logprobs", low=0, high=MAX_TOP_LOGPROBS)
    if not (has_logprobs := fields.flag("logprobs")):
        fields.ignore("top_logprobs")
    messages, continues = _read_messages(fields)
    refuse_decoding(fields, answer.options.sampling)
    answer_start = messages.pop()["content"] if continues else ""
    if not messages:
        raise wrong("messages", "messages has no message before the assistant's begun turn")
    return ChatFields(
        answer=with_ignored(answer, fields),
        messages=tuple(messages),
        answer_start=answer_start,
        top_logprobs=(top or 0) if has_logprobs else None,
    )


def usual_messages(values: Any) -> Any:
    """Return messages with the roles and text parts that every server knows, the rest unchecked."""
    if not isinstance(values, list):
        return values
    return [_usual_message(value) if isinstance(value, dict) else value for value in values]


def _usual_message(value: dict[str, Any]) -> dict[str, Any]:
    role, content = value.get("role"), value.get("content")
    changes: dict[str, Any] = {}
    if isinstance(role, str) and role in _ROLES:
        changes["role"] = _ROLES[role]
    if isinstance(content, list):
        changes["content"] = [_usual_part(part) for part in content]
    # Some servers refuse an empty list of calls, and an answer of neither text nor calls.
    kept = {key: item for key, item in value.items() if key != "tool_calls" or item}
    has_calls = "tool_calls" in kept or "function_call" in kept
    if role == "assistant" and content is None and not has_calls:
        changes["content"] = ""
    return kept | changes


def _usual_part(part: Any) -> Any:
    if isinstance(part, str):
        return {"type": "text", "text": part}
    if isinstance(part, dict) and part.get("type") in _TEXT_PARTS:
        return {**part, "type": "text"}
    return part


def _check_tools(fields: Fields) -> None:
    for name in TOOL_FIELDS:
        if fields.take(name) not in (None, []):
            raise ToolsNeeded(name)
    for name in TOOL_CHOICE_FIELDS:
        if fields.take(name) not in (None, "none", "auto"):
            raise ToolsNeeded(name)
    form = fields.take("response_format")
    if form is not None and not isinstance(form, dict):
        raise wrong("response_format", "response_format must be an object")
    if form and form.get("type", "text") != "text":
        raise ToolsNeeded("response_format")
    for name in SCHEMA_FIELDS:
        if fields.take(name) not in (None, ""):
            raise ToolsNeeded(name)


def _read_messages(fields: Fields) -> tuple[list[Message], bool]:
    """Return the messages, and whether the last one is a begun turn of the assistant."""
    values = fields.take("messages")
    if not isinstance(values, list) or not values:
        raise wrong("messages", "messages must be a list with at least one message")
    messages = [_read_message(value, f"messages[{i}]") for i, value in enumerate(values)]
    continues = fields.flag("continue_final_message")
    generates = fields.take("add_generation_prompt")
    if generates is not None and not isinstance(generates, bool):
        raise wrong("add_generation_prompt", "add_generation_prompt must be true or false")
    is_assistant = messages[-1]["role"] == "assistant"
    if continues and not is_assistant:
        raise wrong("continue_final_message", "the last message is not the assistant's")
    has_prefix = is_assistant and values[-1].get("prefix") is True
    return messages, continues or has_prefix or (is_assistant and generates is False)


def _read_message(value: Any, where: str) -> Message:
    if not isinstance(value, dict):
        raise wrong(where, f"{where} must be an object with a role and a content")
    role = value.get("role")
    if role in _TOOL_ROLES:
        raise ToolsNeeded(f"{where}.role")
    if not isinstance(role, str) or role not in _ROLES:
        raise wrong(f"{where}.role", f"{where}.role must be one of {', '.join(_ROLES)}")
    if value.get("tool_calls") not in (None, []) or value.get("function_call") is not None:
        raise ToolsNeeded(f"{where}.tool_calls")
    content = value.get("content")
    if content is None and role == "assistant":
        content = ""
    return {"role": _ROLES[role], "content": _read_content(content, f"{where}.content")}


def _read_content(content: Any, where: str) -> str:
    if isinstance(content, str):
        return clean_text(content)
    if not isinstance(content, list):
        raise wrong(where, f"{where} must be a text or a list of parts")
    texts = []
    for number, part in enumerate(content):
        kind = part.get("type") if isinstance(part, dict) else None
        text = part.get("text") if kind in _TEXT_PARTS else None
        if isinstance(part, str):
            text = part
        if not isinstance(text, str):
            raise _wrong_part(kind, f"{where}[{number}]")
        texts.append(clean_text(text))
    return "".join(texts)


def _wrong_part(kind: Any, where: str) -> ApiError:
    if isinstance(kind, str) and kind not in _TEXT_PARTS:
        message = f"{where} is a part of type {kind!r}; only text is supported"
        return wrong(where, message, code="unsupported_value")
    return wrong(where, f'{where} must be {{"type": "text", "text": ...}}')
