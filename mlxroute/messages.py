"""Messages of a conversation as they come from outside: checked, and without old thinking."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Final

from mlxroute.errors import UsageError
from mlxroute.types import Message

_PARAGRAPH: Final = "\n\n"
_ROLES: Final = ("system", "user", "assistant")
_TAGS: Final = ("think", "thinking", "thought", "reasoning", "seed:think")
# Thinking that the answer begins with; cut off answers may never close it.
_THINKING: Final = [
    re.compile(rf"[\s\ufeff]*<{tag}>.*?(?:</{tag}>|\Z)\s*", re.DOTALL) for tag in _TAGS
] + [
    re.compile(rf"[\s\ufeff]*{re.escape(begin)}.*?(?:{re.escape(end)}|\Z)\s*", re.DOTALL)
    for begin, end in [
        ("[THINK]", "[/THINK]"),
        ("◁think▷", "◁/think▷"),
        ("<|begin_of_thought|>", "<|end_of_thought|>"),
        ("<|START_THINKING|>", "<|END_THINKING|>"),
        ("<|channel|>analysis<|message|>", "<|channel|>final<|message|>"),
        ("<|channel>thought", "<channel|>"),
    ]
]
# Some templates write the opening tag themselves, as the last part of the prompt.
_THINKING_END: Final = re.compile(r"^[ \t]*</(?:think|thinking)>[ \t]*(?:\n\s*|\Z)", re.MULTILINE)
ANSWER_OPENINGS: Final = {
    "<think>\n\n": "</think>\n\n",
    "<think>\n": "\n</think>\n\n",
    "<think>": "\n\n</think>\n\n",
    "<|start|>assistant": "<|channel|>final<|message|>",
}
"""Ends of rendered prompts of models that always think, and what `answer_opening` returns there."""


def read_messages(messages: Sequence[Mapping[str, object]]) -> tuple[Message, ...]:
    """Return the messages of a conversation as a model gets them.

    Contents are text, or lists of text parts, which are joined. The thinking that an assistant's
    message begins with is left out: models are trained to get earlier answers without it. Raises
    UsageError for anything else than messages of text.
    """
    if isinstance(messages, str | Mapping) or not isinstance(messages, Sequence):
        raise UsageError("messages must be a list of messages", parameter="messages")
    return tuple(_read(message, number) for number, message in enumerate(messages, start=1))


def without_thinking(answer: str) -> str:
    """Return an answer without the thinking that it begins with."""
    for pattern in _THINKING:
        if match := pattern.match(answer):
            return answer[match.end() :]
    end = _THINKING_END.search(answer)
    if end is None or "<think" in answer[: end.start()] or "```" in answer[: end.start()]:
        return answer
    return answer[end.end() :]


def answer_opening(prompt: str) -> str:
    """Return what has to follow a rendered prompt for an answer without thinking; often nothing.

    Templates of models that always think end with an open mark, that of gpt-oss before the name of
    a channel. What follows is what such models have seen before answers without thinking.
    """
    return next((text for end, text in ANSWER_OPENINGS.items() if prompt.endswith(end)), "")


def fold_system(messages: Sequence[Message]) -> list[Message]:
    """Return a conversation with its system messages at the beginning of the first user message.

    It is for templates that know no system role.
    """
    system = [m["content"] for m in messages if m["role"] == "system" and m["content"].strip()]
    turns = [dict(m) for m in messages if m["role"] != "system"]
    if not system:
        return turns or [dict(m) for m in messages]
    first = next((turn for turn in turns if turn["role"] == "user"), None)
    if first is None:
        return [{"role": "user", "content": _PARAGRAPH.join(system)}, *turns]
    first["content"] = _PARAGRAPH.join([*system, first["content"]])
    return turns


def join_neighbours(messages: Sequence[Message]) -> list[Message]:
    """Return a conversation in which neighbours of one role are one message."""
    joined: list[Message] = []
    for message in messages:
        if joined and joined[-1]["role"] == message["role"]:
            joined[-1]["content"] += _PARAGRAPH + message["content"]
        else:
            joined.append(dict(message))
    return joined


def _read(message: Mapping[str, object], number: int) -> Message:
    if not isinstance(message, Mapping):
        raise UsageError(f"message {number} is not a mapping", parameter="messages")
    role = message.get("role")
    if role not in _ROLES:
        raise UsageError(
            f"message {number} has role {role!r}; choose one of {', '.join(_ROLES)}",
            parameter="messages",
        )
    content = _text(message.get("content"))
    if content is None:
        raise UsageError(f"message {number} has content that is not text", parameter="messages")
    if role == "assistant":
        content = without_thinking(content)
    return {"role": str(role), "content": content}


def _text(content: object) -> str | None:
    """Return a content as text; None if it is none, or has lone surrogates."""
    if isinstance(content, list | tuple):
        parts = [
            part.get("text") if isinstance(part, Mapping) and part.get("type") == "text" else None
            for part in content
        ]
        if not all(isinstance(part, str) for part in parts):
            return None
        content = "".join(str(part) for part in parts)
    if not isinstance(content, str):
        return None
    try:
        content.encode()
    except UnicodeEncodeError:
        return None
    return content
