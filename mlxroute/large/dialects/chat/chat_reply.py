"""The text of a chat reply, and replies of models that think before they answer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from mlxroute.errors import LargeProtocolError
from mlxroute.large.dialects.json_fields import (
    as_object,
    as_text,
    first_choice,
    thought_tokens,
    usage_counts,
)

# Fields of a message that hold the thoughts of a model, beside its content.
_THOUGHTS: Final = ("reasoning_content", "reasoning", "thinking")
# The mark that begins thoughts where the server leaves them in the content.
_THOUGHT_MARK: Final = "<think>"
# No character takes more tokens than these, so an empty text of more is thoughts.
_MAX_TEXTLESS_TOKENS: Final = 8


class ModelThinks(LargeProtocolError):
    """Raised for a reply whose tokens are all thoughts, before the answer."""


def chat_text(reply: Mapping[str, object]) -> str:
    """Return the text of a chat reply; null content, as in a tool call, counts as empty.

    Raises ModelThinks, and LargeProtocolError for a reply of another form.
    """
    message = as_object(first_choice(reply).get("message"), what="message")
    text, has_thoughts = _content(message)
    has_thoughts = has_thoughts or any(message.get(key) for key in _THOUGHTS)
    is_long = (usage_counts(reply)["completion_tokens"] or 0) > _MAX_TEXTLESS_TOKENS
    is_hidden = not text and (has_thoughts or thought_tokens(reply) or is_long)
    if is_hidden or text.lstrip().startswith(_THOUGHT_MARK):
        raise ModelThinks("the model thinks first, instead of continuing the answer")
    return text


def _content(message: Mapping[str, object]) -> tuple[str, bool]:
    """Return the text of a message's content, and whether the content has parts that are none."""
    content = message.get("content")
    if not isinstance(content, list):
        return ("" if content is None else as_text(content, what="message.content")), False
    parts = [as_object(part, what="a part of message.content") for part in content]
    texts = [part for part in parts if part.get("type") == "text"]
    text = "".join(as_text(part.get("text"), what="the text of a part") for part in texts)
    return text, len(texts) < len(parts)
